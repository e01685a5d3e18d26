"""Load a published model, and refuse one that its files do not fill exactly.

transformers and peft draw what a file lacks, or holds in another shape, at random, and ignore what
they do not know: the predictions of such a model mean nothing. A folder that peft alone has written
holds no config.json: the class follows from its settings and the base, the number of outputs and of
tokens from the tensors that were saved.
"""

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hftl.config.section import Source
from hftl.doctor.adapter_folder import open_adapter_folder
from hftl.doctor.adapter_tensors import (
    adjust_config,
    compare_shapes,
    find_model_class,
    is_adapter_key,
    list_adapter_tensors,
)
from hftl.doctor.file_checks import NUMBERED_LABEL, PROCESSOR_FILES, TOKENIZER_FILES
from hftl.doctor.renamed_modules import get_module_path
from hftl.errors import RecipeError, RunFolderError
from hftl.inference.find_model import build_loading_error, wrap_loading_errors
from hftl.models.architecture_spec import TOKEN_CLASSIFICATION, ArchitectureSpec
from hftl.models.architectures import get_config_spec, get_hidden_size
from hftl.models.config_limits import find_folder_fault
from hftl.models.encoders import get_stock_encoder, has_prefix
from hftl.models.heads import find_oversize, get_placeholder_name
from hftl.models.lora_concat import PEFT_PREFIX
from hftl.models.quantization import build_quantization_config, check_quantization
from hftl.models.source import CONFIG_ERRORS, LOADING_ERRORS, TENSOR_FILE_ERRORS, find_source
from hftl.models.weight_files import read_file_shapes
from hftl.publish import reload_check
from hftl.publish.published_metadata import PublishedMetadata
from hftl.publish.settings_files import ADAPTER_WEIGHTS, HEAD_WEIGHTS, MODEL_CONFIG, AdapterConfig
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
    if base is None or (folder / MODEL_CONFIG).exists():
        return _load_config(folder)
    return _infer_peft_config(folder, base)


def _load_config(folder: Path) -> Any:
    from transformers import AutoConfig

    why = find_folder_fault(folder)
    if why is not None:
        raise build_loading_error(folder, f"{MODEL_CONFIG}: {why}")
    with wrap_loading_errors(folder, CONFIG_ERRORS):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _infer_peft_config(folder: Path, base: Path) -> Any:
    """Build the config of an adapter that peft alone has written, from its tensors and its base."""
    adapter = open_adapter_folder(folder)
    source = find_source(Source(model=str(base)))
    model_class = find_model_class(adapter, source)
    if model_class is None or not model_class.__name__.endswith("Classification"):
        task = adapter.adapter_config.task_type
        made_for = f"is an adapter for {task}" if task else "does not say which class it is for"
        raise RecipeError(
            f"{paths.get_display_name(folder)} {made_for}, and has no trained head to predict with",
            "Give an adapter of a model that classifies sequences, tokens or images",
        )
    config = adjust_config(adapter, source, model_class)
    config.architectures = [model_class.__name__]
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


UNUSED_PARTS = ("pooler", "mask_token", "lm_head")
"""Parts of a checkpoint that a task's class may leave out."""


@dataclass(frozen=True)
class IncompleteBase:
    """Hold a base, and the tensors that an adapter must bring for it."""

    model: Any
    folder: Path
    """Of the weights."""
    is_whole_model: bool
    missing: dict[str, str]
    """What is wrong with each of these tensors, by its name."""


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
    quantization = _read_quantization(folder)
    _refuse_oversize(base)
    with wrap_loading_errors(base, LOADING_ERRORS):
        loaded = reload_check.load_base(folder, base, config, quantization)
    is_whole_model = base == folder
    architecture = _get_architecture(loaded.model)
    has_own_head = (folder / HEAD_WEIGHTS).exists()
    unexpected = sorted(_list_unexpected(loaded, architecture, is_whole_model))
    if has_own_head:
        # The empty tensor that makes stock classes refuse the encoder of such a model.
        unexpected = [key for key in unexpected if key != get_placeholder_name(architecture)]
    if unexpected:
        what = f"holds {unexpected[0]}, which config.json has no place for"
        raise _build_misfit_error(base, is_whole_model, unexpected, what)
    missing = dict(_list_missing(loaded, architecture, has_own_head))
    if is_whole_model:
        _refuse_missing(base, is_whole_model, missing)
    return IncompleteBase(loaded.model, base, is_whole_model, missing)


def _refuse_oversize(base: Path) -> None:
    """Refuse to build a model far larger than its weights: it may not fit into memory."""
    from transformers import AutoModel

    config = _load_config(base)
    with wrap_loading_errors(base, LOADING_ERRORS):
        why = find_oversize(AutoModel.from_config, config, base)
    if why is not None:
        raise build_loading_error(base, why)


def _read_quantization(folder: Path) -> Any:
    """Return transformers' settings of a base that the adapter was trained on in 4 bits, or None.

    Raises:
        RecipeError: if they cannot be used here.
    """
    metadata = PublishedMetadata.read(folder)
    if metadata.recipe.source.quantization is None:
        return None
    check_quantization()
    spec = get_config_spec(_load_config(folder))
    if metadata.data is not None:
        spec = spec.for_task(metadata.data.task)
    return build_quantization_config(spec)


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

    name_of_folder = paths.get_display_name(folder)
    shapes = _read_adapter_shapes(folder)
    saved = {key.removeprefix(PEFT_PREFIX) for key in shapes}
    missing = {key: what for key, what in base.missing.items() if key not in saved}
    _refuse_missing(base.folder, False, missing, name_of_folder)
    with wrap_loading_errors(folder, LOADING_ERRORS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of what is refused below
        if isinstance(model, PeftModel):
            model.load_adapter(folder, name, ignore_mismatched_sizes=True)
        else:
            model = PeftModel.from_pretrained(
                model, folder, adapter_name=name, ignore_mismatched_sizes=True
            )
        model.set_adapter(name)
        expected = list_adapter_tensors(model, name)
    findings = compare_shapes(shapes, expected)
    if findings:
        first = findings[0]
        raise RunFolderError(
            f"{name_of_folder} does not load: {first.where}: {first.what}",
            f"{first.fix}; or look closer: hftl doctor {name_of_folder}",
        )
    return model


def overwrites_base_tensors(folder: Path) -> bool:
    """Return whether an adapter overwrites tensors of its base, such as resized embeddings."""
    saved = tuple(f".{name}" for name in AdapterConfig.read(folder).modules_to_save)
    keys = [key for key in _read_adapter_shapes(folder) if not is_adapter_key(key)]
    modules = map(get_module_path, keys)
    return any(not f".{module}".endswith(saved) for module in modules)


def add_head(folder: Path, model: Any) -> reload_check.PublishedModel:
    """Put the folder's own head on the model, where it has one.

    Raises:
        RunFolderError: if the head is of another width than the model.
    """
    with wrap_loading_errors(folder, (*TENSOR_FILE_ERRORS, ValueError)):
        published = reload_check.attach_head(folder, model)
    if published.head is None:
        return published
    config = getattr(model, "config", None)
    width = None if config is None else get_hidden_size(config)
    if width is not None:
        width *= len(published.pooling.split("+"))
    projection: Any = published.projection
    read = published.head.in_features if projection is None else projection.shape[1]
    if width not in (None, read):
        raise RunFolderError(
            f"{paths.get_display_name(folder)} does not load: head.safetensors takes "
            f"{read} features, and the model gives {width}",
            "Give the folder as it was published, or the right base: --base MODEL",
        )
    return published


def _get_architecture(model: Any) -> ArchitectureSpec:
    is_tagger = type(model).__name__.endswith("ForTokenClassification")
    architecture = get_config_spec(model.config)
    return architecture.for_task(TOKEN_CLASSIFICATION) if is_tagger else architecture


def _list_missing(
    loaded: reload_check.LoadedBase, architecture: ArchitectureSpec, has_own_head: bool
) -> Iterator[tuple[str, str]]:
    """Yield the tensors drawn at random that outputs depend on, and why."""
    unused = architecture.unused_parts
    if has_own_head:
        unused = (*unused, architecture.pooler or "pooler")
    for key in sorted(loaded.missing | loaded.mismatched.keys()):
        if has_prefix(key.removeprefix(f"{architecture.encoder}."), unused):
            continue
        shapes = loaded.mismatched.get(key)
        yield key, f"lacks {key}" if shapes is None else (
            f"has {key} of {shapes[0]} where config.json makes {shapes[1]}")  # fmt: skip


def _list_unexpected(
    loaded: reload_check.LoadedBase, architecture: ArchitectureSpec, is_whole_model: bool
) -> Iterator[str]:
    """Yield tensors of the file that should have a place: of a base, those of the encoder."""
    encoder = get_stock_encoder(loaded.model, architecture)
    parts = {name for name, _ in encoder.named_children()}
    buffers = {name.rsplit(".", 1)[-1] for name, _ in loaded.model.named_buffers()}
    for key in loaded.unexpected:
        inside = key.removeprefix(f"{architecture.encoder}.")
        of_encoder = inside != key or inside.split(".")[0] in parts
        names = set(inside.split("."))
        if not names & (buffers | set(UNUSED_PARTS)) and (is_whole_model or of_encoder):
            yield key


def _refuse_missing(
    folder: Path, is_whole_model: bool, missing: dict[str, str], adapter: str | None = None
) -> None:
    if missing:
        what = next(iter(missing.values()))
        if adapter is not None:
            what += f", and the adapter {adapter} does not bring it"
        raise _build_misfit_error(folder, is_whole_model, list(missing), what)


def _build_misfit_error(
    folder: Path, is_whole_model: bool, keys: list[str], what: str
) -> RunFolderError:
    name = paths.get_display_name(folder)
    more = f" ({len(keys)} tensors in all)" if len(keys) > 1 else ""
    if is_whole_model:
        return RunFolderError(
            f"{name} does not load: its file {what}{more}",
            "Save weights and config.json again from the trained model",
        )
    return RunFolderError(
        f"the base {name} {what}{more}: such a model answers at random",
        "Give the base that the adapter was trained on, --base MODEL, or save the adapter again",
    )


def _read_adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of an adapter's tensors.

    Raises:
        RunFolderError: if there is no file of safetensors; a pickle is not opened.
    """
    path, name = folder / ADAPTER_WEIGHTS, paths.get_display_name(folder)
    if not path.exists():
        pickle = (folder / "adapter_model.bin").exists()
        raise RunFolderError(
            f"{name} does not load: it has no {ADAPTER_WEIGHTS}"
            + ("; adapter_model.bin is a pickle, which is not opened" if pickle else ""),
            f"Save the adapter as safetensors; or look closer: hftl doctor {name}",
        )
    with wrap_loading_errors(folder, TENSOR_FILE_ERRORS):
        return read_file_shapes(path)
