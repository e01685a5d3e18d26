"""Read what a published folder's hftl.json says of the model.

It is validated once, as it is read; a folder that plain peft wrote has none, and gets the defaults.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from hftl.config.data import BadRowsRule, Data, Task
from hftl.data.facts import LabelType, TagScheme
from hftl.errors import RunFolderError
from hftl.measure.facts import LabelCurve
from hftl.measure.record import PUBLISHED_FILE
from hftl.publish.settings_files import read_json_mapping
from hftl.runtime import paths
from hftl.runtime.run_folder import hash_file

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
    bad_rows: BadRowsRule = "refuse"


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
        tree = read_json_mapping(folder / PUBLISHED_FILE)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            name, (key, value) = paths.get_display_name(folder), _find_faulty_key(tree, error)
            raise RunFolderError(
                f"{name} does not load: {PUBLISHED_FILE} says {repr(value)[:40]} for {key}",
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
