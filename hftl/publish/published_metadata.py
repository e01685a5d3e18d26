"""Read what a published folder says of itself, and resolve the base that its adapter goes on.

`hftl.json` is validated once, as it is read; a folder that plain peft wrote has none, and gets the
defaults. `adapter_config.json` and `config.json` may be anybody's.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from hftl.config.data import Data, Task
from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.data.facts import LabelType, TagScheme
from hftl.errors import RunFolderError
from hftl.measure.facts import LabelCurve
from hftl.runtime import paths
from hftl.runtime.run_folder import UnreadableJsonError, hash_file, read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
RECORD_FILE = "hftl.json"
HEAD_WEIGHTS = "head.safetensors"
THRESHOLDS_KEY = "label_thresholds"
"""In config.json, the probability above which each label of several is predicted; transformers
ignores it."""
LABEL_ID = re.compile(r"[0-9]{1,18}")
"""Python refuses to read a longer number."""


def read_json_mapping(path: Path) -> dict[str, object]:
    """Read the mapping in a JSON file; an empty one where there is no file.

    Raises:
        RunFolderError: if the file holds no mapping.
    """
    if not path.exists():
        return {}
    try:
        content = read_json(path)
    except (OSError, UnreadableJsonError) as error:
        raise _build_json_error(path) from error
    if not isinstance(content, dict):
        raise _build_json_error(path)
    return content


def _build_json_error(path: Path) -> RunFolderError:
    name = paths.get_display_name(path.parent)
    return RunFolderError(
        f"{name}: {path.name} is no mapping in JSON", f"Look closer: hftl doctor {name}"
    )


def drop_local_names(settings: dict[str, object]) -> dict[str, object]:
    """Return settings without the local paths that transformers writes into them."""
    return {k: v for k, v in settings.items() if k not in ("_name_or_path", "name_or_path")}


@dataclass(frozen=True)
class SettingsFile:
    """Hold a mapping in JSON of anybody's; a value of an unexpected type reads as missing."""

    FILE: ClassVar[str]
    settings: dict[str, object] = field(default_factory=dict)
    """All of them, as they stand in the file."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the settings of a folder; none where there is no such file.

        Raises:
            RunFolderError: if the file holds no mapping.
        """
        return cls(read_json_mapping(folder / cls.FILE))

    def get_text(self, key: str) -> str | None:
        """Return a text that is not empty."""
        value = self.settings.get(key)
        return value if isinstance(value, str) and value else None

    def get_names(self, key: str) -> list[str]:
        """Return a list of names; empty where it is missing."""
        names = self.settings.get(key)
        return list(map(str, names)) if isinstance(names, list) else []

    def get_mapping(self, key: str) -> dict[str, object]:
        """Return a mapping inside; empty where it is missing."""
        value = self.settings.get(key)
        return value if isinstance(value, dict) else {}


class ModelConfig(SettingsFile):
    """Hold the settings of config.json."""

    FILE = MODEL_CONFIG

    @property
    def class_names(self) -> list[str]:
        """Return the classes of transformers that it was made of, mostly one."""
        return self.get_names("architectures")

    @property
    def label_names(self) -> list[str]:
        """Return the label names in the order of their ids; empty where it has none."""
        if "id2label" not in self.settings:
            return self.get_names("label_names")  # as timm writes them
        names = self.get_mapping("id2label")
        if not all(LABEL_ID.fullmatch(str(key)) for key in names):
            return []
        return [str(names[key]) for key in sorted(names, key=lambda key: int(str(key)))]


class AdapterConfig(SettingsFile):
    """Hold the settings of adapter_config.json."""

    FILE = ADAPTER_CONFIG

    @property
    def base_name(self) -> str | None:
        """Return the hub id or path of the base."""
        return self.get_text("base_model_name_or_path")

    @property
    def base_hub_id(self) -> str | None:
        """Return the base's name where it reads as a hub id."""
        name = self.base_name
        return name if name and paths.is_hub_id(name) else None

    @property
    def revision(self) -> str | None:
        """Return the commit of the base."""
        return self.get_text("revision")

    @property
    def task_type(self) -> str | None:
        """Return peft's name of the task, such as SEQ_CLS."""
        return self.get_text("task_type")

    @property
    def model_class(self) -> str | None:
        """Return the class of transformers, which peft writes where there is no task type."""
        name = self.get_mapping("auto_mapping").get("base_model_class")
        return name if isinstance(name, str) else None

    @property
    def modules_to_save(self) -> list[str]:
        """Return the modules that are saved whole beside the adapter."""
        return self.get_names("modules_to_save")

    def find_local_base(self, follow_paths: bool = True) -> Path | None:
        """Return the folder of this machine that is named as the base; None where there is none.

        Only a hub has commits, so a pinned hub id is never a folder here. A path counts where it is
        the folder of a model: no other file that a stranger may name is opened.
        """
        name = self.base_name
        is_pinned = self.base_hub_id is not None and self.revision is not None
        if not follow_paths or name is None or is_pinned or name.startswith(paths.PACKAGE_PREFIX):
            return None
        folder = paths.resolve_local_path(name, ADAPTER_CONFIG)
        return folder if folder is not None and (folder / MODEL_CONFIG).is_file() else None


TextColumns = str | Annotated[list[str], Field(min_length=1, max_length=2)]
LabelColumns = str | Annotated[list[str], Field(min_length=2)]


class PublishedPart(BaseModel):
    """Describe a part of the file; keys that are not listed are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)


class PublishedColumns(PublishedPart):
    """Describe the columns of the training table."""

    text: TextColumns = "text"
    image: str = "image"
    label: LabelColumns = "label"


class PublishedInputs(PublishedPart):
    """Describe how the model takes its inputs, and whether classes had as many rows in training."""

    shots: int | None = None
    train: PublishedColumns = PublishedColumns()
    max_length: int = Field(default=Data.model_fields["max_length"].default, ge=2)
    max_pixels: int = Field(default=Data.model_fields["max_pixels"].default, ge=1)


class PublishedFinetune(PublishedPart):
    """Hold what is read of the recipe's fine-tuning."""

    class_weight: JsonValue = None


class PublishedSource(PublishedPart):
    """Hold what is read of the recipe's source."""

    quantization: str | None = None


class PublishedRecipe(PublishedPart):
    """Hold what is read of the recipe."""

    source: PublishedSource = PublishedSource()
    data: PublishedInputs = PublishedInputs()
    finetune: PublishedFinetune = PublishedFinetune()


class PublishedTags(TagScheme):
    """Describe how tags mark entities; a file of another version may say more of them."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class PublishedData(PublishedPart):
    """Describe what the outputs mean."""

    task: Task
    labels: list[str] | None = None
    tag_scheme: PublishedTags | None = None
    label_type: LabelType = "text"
    fingerprint: str | None = None
    """The hash of data and splits."""
    label_counts: dict[str, dict[str, int]] | None = None


class PublishedBase(PublishedPart):
    """Describe the model that an adapter goes on."""

    model: str = ""
    weights_sha256: str | None = None


class PublishedAdaptation(PublishedPart):
    """Describe an adaptation; `base` where it changed the base itself."""

    base: PublishedBase | None = None


class PublishedCurve(LabelCurve):
    """Describe a label's probability; a file of another version may say more of it."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    @model_validator(mode="after")
    def _check_points(self) -> Self:
        if self.method == "isotonic" and not 0 < len(self.logits) == len(self.probabilities):
            raise ValueError("isotonic takes as many logits as probabilities")
        return self


class PublishedConformal(PublishedPart):
    """Hold what prediction sets are made from."""

    rows: int = Field(ge=1)
    groups: int | None = None
    scores: list[float] = Field(min_length=1)


class PublishedCalibration(PublishedPart):
    """Hold what makes probabilities of logits; None divides by nothing."""

    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    confusion: list[list[int]] | None = None
    labels: dict[str, PublishedCurve] | None = None


class PublishedForward(PublishedPart):
    """Hold what the model takes besides its inputs; the prompt of a vision-language model."""

    prompt: str | None = None


class PublishedMetadata(PublishedPart):
    """Hold all that is read of hftl.json; a folder without the file has the defaults."""

    data: PublishedData | None = None
    recipe: PublishedRecipe = PublishedRecipe()
    source: PublishedBase = PublishedBase()
    adapt: PublishedAdaptation | None = None
    metric: str | None = None
    calibration: PublishedCalibration | None = None
    conformal: PublishedConformal | None = None
    forward: PublishedForward | None = None
    weight_files: dict[str, str] | None = None
    """The sha256 of each file of tensors, as the reload was proved."""

    @property
    def tag_scheme(self) -> TagScheme | None:
        """Return the scheme of the tags; None where there is none or the file does not say it."""
        tags = self.data and self.data.tag_scheme
        names = set(self.data.labels or []) if self.data else set()
        # A scheme with more or fewer tags than the model is of another model.
        if tags is None or set(tags.standard) != names:
            return None
        return tags

    @property
    def adapted_base(self) -> PublishedBase | None:
        """Return the adapted base; None where the adapter goes on the source itself."""
        return self.adapt.base if self.adapt is not None else None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read hftl.json of a published folder.

        Raises:
            RunFolderError: naming the key that makes no sense.
        """
        tree = read_json_mapping(folder / RECORD_FILE)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            name, (key, value) = paths.get_display_name(folder), _find_faulty_key(tree, error)
            raise RunFolderError(
                f"{name} does not load: {RECORD_FILE} says {repr(value)[:40]} for {key}",
                f"Look closer: hftl doctor {name}",
            ) from error


def find_changed_weights(
    folder: Path, names: Iterable[str], published: Mapping[str, object]
) -> tuple[str, str] | None:
    """Return the first file of tensors that is not the one that was published, and how it differs.

    Args:
        folder: of the model.
        names: of its files.
        published: the sha256 of each file of tensors; none where the folder does not say.
    """
    files = [name for name in sorted(names) if name.endswith(".safetensors")]
    for name in files if published else []:
        digest, expected = hash_file(folder / name), published.get(name)
        if expected is None:
            return name, "is not among the files that were published"
        if digest != expected:
            return name, f"is not what was published: expected sha256 {expected}, got {digest}"
    return None


def _find_faulty_key(tree: object, error: ValidationError) -> tuple[str, object]:
    """Return the dotted key of the first error, as deep as the file has it, and its value."""
    keys: list[str] = []
    for key in map(str, error.errors()[0]["loc"]):
        if not isinstance(tree, dict) or key not in tree:
            break
        tree = tree[key]
        keys.append(key)
    return ".".join(keys), tree


@dataclass(frozen=True)
class BaseReference:
    """Say where an adapter's base is.

    `on_hub` is True where the source is a hub id even if a folder here has that name.
    """

    source: Source
    on_hub: bool = False


def resolve_base(
    folder: Path, adapter: AdapterConfig, recorded: str, is_adapted: bool, base: str | None = None,
    follow_paths: bool = True,
) -> BaseReference | None:  # fmt: skip
    """Return where the base of an adapter is; None where nothing says it.

    The first of these that applies: what the user says, the base that the adapter's own run has
    adapted, the source in that run's recipe, an installed package, what the adapter names.

    Args:
        folder: the adapter's.
        adapter: its settings.
        recorded: the source model that hftl.json names, or an empty text.
        is_adapted: whether training changed the source before the adapter was put on it.
        base: what the user says it is.
        follow_paths: False ignores a path that the adapter names, as whoever wrote it may have
            meant any file of this machine.
    """
    if base is not None:
        return BaseReference(Source(model=base))
    if is_adapted:
        if (folder.parent / "publish-base").exists():
            return BaseReference(Source(model=str(folder.parent / "publish-base")))
    else:
        own = _read_recipe_source(folder)
        # A relative path holds only where the run was made, a pinned base everywhere.
        if own is not None and (paths.is_local(own.model) or adapter.revision is None):
            return BaseReference(own)
        if _is_installed_package(recorded):
            return BaseReference(Source(model=recorded))
    return _resolve_named_base(adapter, follow_paths)


def _resolve_named_base(adapter: AdapterConfig, follow_paths: bool) -> BaseReference | None:
    """Return the base that adapter_config.json names."""
    folder = adapter.find_local_base(follow_paths)
    if folder is not None:
        return BaseReference(Source(model=str(folder)))
    if adapter.base_hub_id is None:
        return None
    return BaseReference(Source(model=adapter.base_hub_id, revision=adapter.revision), on_hub=True)


def _is_installed_package(place: str) -> bool:
    """Return whether a place is inside an installed package, and not reached from it by `..`."""
    inside = place.removeprefix(paths.PACKAGE_PREFIX)
    return place != inside and not paths.leaves_folder(inside) and paths.is_local(place)


def _read_recipe_source(folder: Path) -> Source | None:
    """Read the source in the recipe of the run that the folder is the publish folder of."""
    file = folder.parent / "recipe.yaml"
    return Recipe.load(file).source if folder.name == "publish" and file.exists() else None
