"""Sizes that a config claims and no file of weights bears out, seen before anything is built."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from hftl.config.section import Source
from hftl.errors import RecipeError, format_error_line
from hftl.models.architectures import get_architecture
from hftl.models.padding import accepts_attention_mask
from hftl.models.parts import ArchitectureSpec, get_encoder_class
from hftl.runtime import paths

MAX_REPEATS = 1000
"""Layers, groups or experts; the deepest encoders have some hundred."""
MAX_LABELS = 1_000_000
REPEAT_KEYS = re.compile(
    r"(num|n)_(\w+_)?(layers?|groups?|blocks?|experts?|stages?)|\w*layers|depths?"
)
"""Keys that say how often a part is built, in every family's words."""
MAX_SIZE_RATIO, SIZE_SLACK = 2, 50_000_000
"""How many times the file's numbers a model may have, and how many more: a head drawn anew."""


def find_config_fault(config: Any) -> str | None:
    """The first key of a config that claims more than any model has, with its value.

    Args:
        config: what config.json holds, which may be of any shape.
    """
    for key, value in _iterate_counts(config):
        most = MAX_LABELS if key == "num_labels" else MAX_REPEATS
        if value > most:
            return f"{key} is {value}, and no model has more than {most:,}"
    return None


def find_folder_fault(folder: Path) -> str | None:
    """The same of a folder's config.json; None where there is none to be read."""
    try:
        return find_config_fault(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def find_size_fault(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Whether a model is far larger than its file of weights.

    Args:
        model: built of the config, without weights.
        shapes: of the file's tensors.
    """
    built = sum(one.numel() for one in [*model.parameters(), *model.buffers()])
    held = sum(map(math.prod, shapes.values()))
    if built <= MAX_SIZE_RATIO * held + SIZE_SLACK:
        return None
    return f"its config makes a model of {built:,} numbers, and its weights hold {held:,}"


def read_tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors, from the headers alone.

    Raises:
        SafetensorError: if a file does not open.
    """
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    return found


def _iterate_counts(config: Any) -> Iterator[tuple[str, int]]:
    """Every count, however deep; of a list, as of blocks by stage, the sum."""
    waiting = [config]
    while waiting:
        told = waiting.pop()
        if not isinstance(told, dict):
            continue
        waiting.extend(told.values())
        for key, value in told.items():
            numbers = value if isinstance(value, list) else [value]
            repeated = REPEAT_KEYS.fullmatch(key) or key == "num_labels"
            if repeated and all(isinstance(number, int) for number in numbers):
                yield key, sum(numbers)


# The source model: found, pinned, and described before a weight is read.


WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
"""Weight files, the first kind that a checkpoint has."""
CONFIG_PATTERNS = ("*.json", "*.txt", "*.model")
"""Configs, among them the processor's, vocabularies and merges."""


@dataclass(frozen=True)
class SourceModel:
    """A pretrained checkpoint, on the disk.

    `folder` is where it lies, for a hub id the snapshot of one commit. `public_id` is the hub id
    that a published adapter names as its base, where there is one, and `revision` its commit.
    `architecture` is what the checkpoint is, and `config` what it is read as: ViTMAE's encoder
    as ViT.
    """

    name: str
    folder: Path
    revision: str | None
    public_id: str | None
    is_local: bool
    config: Any
    architecture: str

    @property
    def model_type(self) -> str:
        """The name in transformers of the architecture that it is read as."""
        return self.config.model_type

    @property
    def architecture_spec(self) -> ArchitectureSpec:
        """Where the architecture's parts lie."""
        return get_architecture(self.config)


def find_source(source: Source, on_hub: bool = False) -> SourceModel:
    """Finds the checkpoint; one of the hub is pinned to its commit and fetched.

    Args:
        source: where it is.
        on_hub: whether it is a hub id even where a folder here has that name.

    Raises:
        RecipeError: if a folder is missing or holds no model, or the architecture is unsupported.
        HubError: if a hub id is unknown, gated, or the hub cannot be reached.
    """
    from transformers import AutoConfig

    path = None if on_hub else paths.resolve_local_path(source.model, "source.model")
    if path is not None and not path.exists():
        raise RecipeError(
            f"source.model: the folder {source.model} does not exist", "Check the path"
        )
    folder = path or _download_snapshot(source.model, source.revision, ["config.json"])
    why = find_folder_fault(folder)
    if why is not None:
        raise RecipeError(
            f"source.model: {source.model} is no model: {why}", "Correct its config.json"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"source.model: {source.model} is no model: {format_error_line(error)}",
            "Give one with config.json and model.safetensors",
        ) from error
    kind = config.model_type
    config = _read_as_encoder(config)
    get_architecture(config)
    if path is not None:
        return SourceModel(
            source.model, path, source.revision, source.published_as, True, config, kind
        )
    commit = folder.name
    for weights in WEIGHT_PATTERNS:
        folder = _download_snapshot(source.model, commit, [*CONFIG_PATTERNS, weights])
        if list(folder.glob(weights)):
            break
    public_id = source.published_as or source.model
    return SourceModel(source.model, folder, commit, public_id, False, config, kind)


def describe_load_error(error: Exception) -> str:
    """Return one line on why weights do not load; of a refused pickle, that none of it has run."""
    if isinstance(error, (UnpicklingError, EOFError)):
        return (
            "a pickle of its weights (.bin) is damaged or holds more than tensors; none of it was "
            "run"
        )
    return format_error_line(error)


def load_tokenizer(source: SourceModel) -> Any:
    """Return the source's own tokenizer, which pads on the right and gives the attention mask.

    Published so, it makes a text's outputs under plain transformers independent of the texts
    beside it, as they are in hftl, see `TextInputs`.

    Raises:
        RecipeError: if the checkpoint ships none, or one that cannot pad.
    """
    from transformers import AutoTokenizer

    fix = "Save the tokenizer beside the model"
    try:
        found: Any = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"source.model: {source.name} has no usable tokenizer: {format_error_line(error)}",
            fix,
        ) from error
    # Without its files transformers makes one that knows the special tokens alone.
    if len(found) <= len(found.all_special_ids):
        raise RecipeError(
            f"source.model: {source.name} has no usable tokenizer: it has no vocabulary", fix
        )
    if found.pad_token_id is None:
        raise RecipeError(
            f"source.model: the tokenizer of {source.name} has no padding token",
            "Set pad_token in its tokenizer_config.json",
        )
    found.padding_side = "right"
    if (
        accepts_attention_mask(get_encoder_class(source.config))
        and "attention_mask" not in found.model_input_names
    ):
        found.model_input_names = [*found.model_input_names, "attention_mask"]
    return found


def load_processor(source: SourceModel) -> Any:
    """The source's own image processor, the one that needs no torchvision.

    Raises:
        RecipeError: if the checkpoint ships none.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(
            source.folder, backend="pil", trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(
            f"source.model: {source.name} has no usable image processor: {format_error_line(error)}",
            "Save the processor beside the model",
        ) from error


def _read_as_encoder(config: Any) -> Any:
    """ViTMAE has no classification class; its encoder is ViT's, layer by layer."""
    from transformers import ViTConfig

    if config.model_type != "vit_mae":
        return config
    known = ViTConfig().to_dict().keys() - {"model_type", "architectures"}
    return ViTConfig(**{key: told for key, told in config.to_dict().items() if key in known})


def hash_source_weights(source: SourceModel) -> str:
    """`hash_checkpoint` of a source model.

    Raises:
        RecipeError: if it has no weights, or they do not open.
    """
    found = hash_checkpoint(source.folder)
    if found is None:
        raise RecipeError(
            f"source.model: {source.name} has no weights", "Give one with model.safetensors"
        )
    return found


def hash_checkpoint(folder: Path) -> str | None:
    """sha256 over a checkpoint's tensors, by name; over the bytes of files of older kinds.

    None where it has none.

    Raises:
        RecipeError: if a file does not open.
    """
    digest = hashlib.sha256()
    for kind in WEIGHT_PATTERNS:
        files = sorted(folder.glob(kind))
        for file in files:
            if file.suffix == ".safetensors":
                _hash_tensors(file, digest)
            else:
                digest.update(file.read_bytes())
        if files:
            return digest.hexdigest()
    return None


def _hash_tensors(file: Path, digest: Any) -> None:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    except SafetensorError as error:
        raise RecipeError(
            f"source.model: {file} does not open: {error}", "Save it again, or fetch it again"
        ) from error


def _download_snapshot(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    """The snapshot of a commit with the files of these patterns, none of its folders."""
    from huggingface_hub import snapshot_download

    with paths.translate_hub_errors(repo_id, "model", "source.model: "):
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=patterns, ignore_patterns="*/*"
            )
        )
