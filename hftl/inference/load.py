"""The config of a published model, also where only peft saved it, and where its inputs' files are.

A folder that peft alone has written holds no config.json: the class follows from its settings and
the base, the number of outputs and of tokens from the tensors that were saved.
"""

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hftl.config.section import Source
from hftl.doctor.adapter_folder import ADAPTER_WEIGHTS, open_adapter_folder
from hftl.doctor.companion_files import NUMBERED_LABEL, PROCESSOR_FILES, TOKENIZER_FILES
from hftl.doctor.shape_check import (
    PREFIX,
    adjust_config,
    compare_shapes,
    find_model_class,
    get_module_path,
    is_adapter_key,
    list_adapter_tensors,
)
from hftl.errors import RecipeError, RunFolderError
from hftl.inference.find_model import read_json_mapping, wrap_loading_errors
from hftl.models.architectures import TOKEN_CLASSIFICATION, ArchitectureSpec, get_architecture
from hftl.models.encoders import get_stock_encoder, has_prefix
from hftl.models.heads import get_placeholder_name
from hftl.models.source import find_source
from hftl.publish import reload_check
from hftl.runtime import paths


def read_model_config(folder: Path, base: Path | None) -> Any:
    """Return the config of a published model, `architectures` naming its class.

    Args:
        folder: of the adapter or whole model.
        base: the folder of the adapter's base.

    Raises:
        RecipeError: if it is no adapter of a model with a trained head.
        RunFolderError: if its files do not load.
    """
    from transformers import AutoConfig

    with wrap_loading_errors(folder):
        if base is None or (folder / "config.json").exists():
            return AutoConfig.from_pretrained(folder)
        return _infer_peft_config(folder, base)


def _infer_peft_config(folder: Path, base: Path) -> Any:
    patient, _ = open_adapter_folder(folder)
    source = find_source(Source(model=str(base)))
    kind = find_model_class(patient, source)
    if kind is None or not kind.__name__.endswith("Classification"):
        task = patient.adapter_config.get("task_type")
        made_for = f"is an adapter for {task}" if task else "does not say which class it is for"
        raise RecipeError(
            f"{paths.get_display_name(folder)} {made_for}, and has no trained head to predict with",
            "Give an adapter of a model that classifies sequences, tokens or images",
        )
    config = adjust_config(patient, source, kind)
    config.architectures = [kind.__name__]
    names = [str(name) for name in config.id2label.values()]
    if len(names) > 1 and all(map(NUMBERED_LABEL.fullmatch, names)):
        logging.getLogger("hftl").warning(
            "%s names no labels: %s to %s are the outputs of its head in their order",
            paths.get_display_name(folder), names[0], names[-1],
        )  # fmt: skip
    return config


def find_inputs_folder(folder: Path, base: Path | None, images: bool) -> Path:
    """Return the folder of the tokenizer or image processor: the adapter's, or else the base's."""
    names = PROCESSOR_FILES if images else TOKENIZER_FILES
    has_own = any((folder / name).exists() for name in names)
    return folder if has_own or base is None else base


# Load a published model; refuse one that its files do not fill exactly.
#
# transformers and peft draw what a file lacks, or holds in another shape, at random, and pass over
# what they do not know. The answers of such a model mean nothing.


UNUSED_PARTS = ("pooler", "mask_token")
"""Parts of an encoder that a task's class may leave out of a checkpoint."""


@dataclass(frozen=True)
class IncompleteBase:
    """A base and the tensors that an adapter must bring for it, with what is wrong with each.

    `folder` is where the weights lie; `whole` that they are the published model's own.
    """

    model: Any
    folder: Path
    is_whole_model: bool
    missing: dict[str, str]


def load_published(
    folder: Path, base: Path | None, config: Any = None
) -> reload_check.PublishedModel:
    """Load a published folder, in eval mode and fp32.

    Args:
        folder: holds an adapter or a whole model.
        base: the folder of the adapter's base; None for a whole model.
        config: of the model; None takes the folder's own.

    Raises:
        RunFolderError: naming the first tensor that is missing, unexpected or of another shape.
    """
    filled = load_incomplete_base(folder, base or folder, config)
    if base is None:
        return add_head(folder, filled.model)
    return add_head(folder, add_adapter(filled, filled.model, folder, "default"))


def load_incomplete_base(folder: Path, base: Path, config: Any = None) -> IncompleteBase:
    """Load what an adapter goes on; a whole model where `base` is its own folder.

    Raises:
        RunFolderError: if the file holds tensors that the model has no place for; and for a whole
            model if it lacks any.
    """
    with wrap_loading_errors(base if base != folder else folder):
        loaded = reload_check.load_base(folder, base, config)
    whole = base == folder
    architecture = _get_architecture(loaded.model)
    pooled = (folder / "head.safetensors").exists()
    strange = sorted(_list_unexpected(loaded, architecture, whole))
    if pooled:
        # By it stock classes refuse the file; the model's head is in a file of its own.
        strange = [key for key in strange if key != get_placeholder_name(architecture)]
    if strange:
        raise _build_misfit_error(
            base, whole, strange, f"holds {strange[0]}, which config.json has no place for"
        )
    lacking = dict(_list_missing(loaded, architecture, pooled))
    if whole:
        _refuse_missing(base, whole, lacking)
    return IncompleteBase(loaded.model, base, whole, lacking)


def add_adapter(base: IncompleteBase, model: Any, folder: Path, name: str) -> Any:
    """Put an adapter on a base, which may carry others already, and make it the one in use.

    Args:
        base: as it was loaded.
        model: its model, or that under a `PeftModel`.
        folder: of the adapter.
        name: of the adapter in the model.

    Raises:
        RunFolderError: naming the first tensor that is missing, unexpected or of another shape.
    """
    from peft import PeftModel

    called = paths.get_display_name(folder)
    shapes = _read_adapter_shapes(folder)
    brought = {key.removeprefix(PREFIX) for key in shapes}
    _refuse_missing(
        base.folder, False, {k: v for k, v in base.missing.items() if k not in brought}, called
    )
    with wrap_loading_errors(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of what is refused below
        if isinstance(model, PeftModel):
            model.load_adapter(folder, name, ignore_mismatched_sizes=True)
        else:
            model = PeftModel.from_pretrained(
                model, folder, adapter_name=name, ignore_mismatched_sizes=True
            )
        model.set_adapter(name)
        findings = compare_shapes(shapes, list_adapter_tensors(model, name))
    if findings:
        first = findings[0]
        raise RunFolderError(
            f"{called} does not load: {first.where}: {first.what}",
            f"{first.fix}; or look closer: hftl doctor {called}",
        )
    return model


def brings_own_tensors(folder: Path) -> bool:
    """Say whether an adapter overwrites tensors of its base, such as resized embeddings."""
    settings = read_json_mapping(folder / "adapter_config.json")
    saved = tuple(f".{name}" for name in settings.get("modules_to_save") or [])
    modules = [
        get_module_path(key) for key in _read_adapter_shapes(folder) if not is_adapter_key(key)
    ]
    return any(not f".{module}".endswith(saved) for module in modules)


def add_head(folder: Path, model: Any) -> reload_check.PublishedModel:
    """Put the folder's own head on the model, where it has one.

    Raises:
        RunFolderError: if the head is of another width than the model.
    """
    with wrap_loading_errors(folder):
        published = reload_check.attach_head(folder, model)
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if published.head is not None and width not in (None, published.head.in_features):
        raise RunFolderError(
            f"{paths.get_display_name(folder)} does not load: head.safetensors takes "
            f"{published.head.in_features} features, and the model gives {width}",
            "Give the folder as it was published, or the right base: --base MODEL",
        )
    return published


def _get_architecture(model: Any) -> ArchitectureSpec:
    tokens = type(model).__name__.endswith("ForTokenClassification")
    architecture = get_architecture(model.config)
    return architecture.for_task(TOKEN_CLASSIFICATION) if tokens else architecture


def _list_missing(
    loaded: reload_check.LoadedBase, architecture: ArchitectureSpec, pooled: bool
) -> Iterator[tuple[str, str]]:
    """Yield the tensors drawn at random that outputs depend on, and why."""
    unused = architecture.unused_parts
    if pooled and architecture.pooler is not None:
        unused = (*unused, architecture.pooler)
    for key in sorted(loaded.missing | loaded.mismatched.keys()):
        if has_prefix(key.removeprefix(f"{architecture.encoder}."), unused):
            continue
        shapes = loaded.mismatched.get(key)
        yield key, f"lacks {key}" if shapes is None else (
            f"has {key} of {shapes[0]} where config.json makes {shapes[1]}")  # fmt: skip


def _list_unexpected(
    loaded: reload_check.LoadedBase, architecture: ArchitectureSpec, whole: bool
) -> Iterator[str]:
    """Yield tensors of the file that should have a place: of a base, those of the encoder."""
    encoder = get_stock_encoder(loaded.model, architecture)
    parts = {name for name, _ in encoder.named_children()}
    buffers = {name.rsplit(".", 1)[-1] for name, _ in loaded.model.named_buffers()}
    for key in loaded.unexpected:
        inside = key.removeprefix(f"{architecture.encoder}.")
        of_encoder = inside != key or inside.split(".")[0] in parts
        names = set(inside.split("."))
        if not names & (buffers | set(UNUSED_PARTS)) and (whole or of_encoder):
            yield key


def _refuse_missing(
    folder: Path, whole: bool, lacking: dict[str, str], adapter: str | None = None
) -> None:
    if lacking:
        what = next(iter(lacking.values()))
        if adapter is not None:
            what += f", and the adapter {adapter} does not bring it"
        raise _build_misfit_error(folder, whole, list(lacking), what)


def _build_misfit_error(folder: Path, whole: bool, keys: list[str], what: str) -> RunFolderError:
    called = paths.get_display_name(folder)
    more = f" ({len(keys)} tensors in all)" if len(keys) > 1 else ""
    if whole:
        return RunFolderError(
            f"{called} does not load: its file {what}{more}",
            "Save weights and config.json again from the trained model",
        )
    return RunFolderError(
        f"the base {called} {what}{more}: such a model answers at random",
        "Give the base that the adapter was trained on, --base MODEL, or save the adapter again",
    )


def _read_adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of an adapter's tensors.

    Raises:
        RunFolderError: if there is no file of safetensors; a pickle is not opened.
    """
    from safetensors import safe_open

    path, called = folder / ADAPTER_WEIGHTS, paths.get_display_name(folder)
    if not path.exists():
        pickle = (folder / "adapter_model.bin").exists()
        raise RunFolderError(
            f"{called} does not load: it has no {ADAPTER_WEIGHTS}"
            + ("; adapter_model.bin is a pickle, which is not opened" if pickle else ""),
            f"Save the adapter as safetensors; or look closer: hftl doctor {called}",
        )
    with wrap_loading_errors(folder), safe_open(path, "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
