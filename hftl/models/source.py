"""Find the source model, pin its commit, and read its config, tokenizer and weights' hash."""

import re
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from hftl.config.section import Source
from hftl.errors import RecipeError, format_error_line, is_out_of_memory
from hftl.models.architecture_spec import ArchitectureSpec
from hftl.models.architectures import READ_AS, get_config_spec
from hftl.models.config_limits import find_folder_fault
from hftl.models.encoders import accepts_attention_mask, get_encoder_class
from hftl.models.foreign_code import find_foreign_setting
from hftl.models.image_architectures import IMAGE_HALVES
from hftl.models.quantization import check_quantization
from hftl.models.timm_architecture import (
    TIMM_WRAPPER,
    build_missing_timm_error,
    drop_old_labels,
)
from hftl.models.weight_files import WEIGHT_PATTERNS, hash_checkpoint
from hftl.runtime import paths
from hftl.runtime.run_folder import UnreadableJsonError, fingerprint, read_json

CONFIG_PATTERNS = ("*.json", "*.txt", "*.model")
"""Configs, the processor's among them, vocabularies and merges."""


@dataclass(frozen=True)
class SourceModel:
    """Describe a pretrained checkpoint on the disk.

    Args:
        name: folder or hub id, as the recipe has it.
        folder: the checkpoint's; for a hub id, the snapshot of one commit.
        revision: the commit of a hub id.
        public_id: the hub id that a published adapter names as its base, where there is one.
        is_local: whether `name` is a folder.
        config: of the architecture that the checkpoint is read as: ViT for ViTMAE.
        architecture: the checkpoint's own model type.
        quantization: how its frozen weights are held, see the recipe's section.
    """

    name: str
    folder: Path
    revision: str | None
    public_id: str | None
    is_local: bool
    config: Any
    architecture: str
    quantization: str | None = None

    @property
    def model_type(self) -> str:
        """Return the model type that the checkpoint is read as."""
        return self.config.model_type

    @property
    def architecture_spec(self) -> ArchitectureSpec:
        """Return the spec of the architecture that the checkpoint is read as."""
        return get_config_spec(self.config)


def find_source(source: Source, on_hub: bool = False) -> SourceModel:
    """Find the checkpoint; one on the hub is downloaded at a pinned commit.

    Args:
        source: folder or hub id.
        on_hub: take it for a hub id even where a folder has that name.

    Raises:
        RecipeError: if a folder is missing or holds no model, or the architecture is unsupported.
        HubError: if a hub id is unknown, gated, or the hub cannot be reached.
    """
    from transformers import AutoConfig

    if source.quantization is not None:
        check_quantization()
    path = None if on_hub else paths.resolve_local_path(source.model, "source.model")
    if path is not None and not path.exists():
        where, fix = paths.explain_missing_path(source.model)
        raise RecipeError(f"source.model: the folder {source.model} {where}", fix)
    if path is not None:
        _refuse_other_path(source.model, path)
    folder = path or _download_snapshot(source.model, source.revision, ["config.json"])
    _refuse_foreign_settings(source.model, folder)
    why = find_folder_fault(folder)
    if why is not None:
        raise RecipeError(
            f"source.model: {source.model} is no model: {why}", "Correct its config.json"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ImportError as error:  # ImageNet's label names are in timm alone
        raise build_missing_timm_error() from error
    except CONFIG_ERRORS as error:
        raise RecipeError(
            f"source.model: {source.model} is no model: {format_error_line(error)}",
            "Give one with config.json and model.safetensors",
        ) from error
    kind = config.model_type
    config = _read_as_encoder(config)
    if kind in IMAGE_HALVES:
        raise RecipeError(
            f"source.model: {source.model} is the image half of a pair alone ({kind})",
            "Give the whole pair, as its authors published it",
        )
    get_config_spec(config)
    if path is not None:
        return SourceModel(
            source.model, path, source.revision, source.published_as, True, config, kind,
            source.quantization,
        )  # fmt: skip
    commit = folder.name
    for weights in WEIGHT_PATTERNS:
        folder = _download_snapshot(source.model, commit, [*CONFIG_PATTERNS, weights])
        if list(folder.glob(weights)):
            break
    _refuse_foreign_settings(source.model, folder)
    public_id = source.published_as or source.model
    return SourceModel(
        source.model, folder, commit, public_id, False, config, kind, source.quantization
    )


def _refuse_other_path(name: str, path: Path) -> None:
    """Refuse a file, and a run folder, in the place of a model's folder."""
    if not path.is_dir():
        raise RecipeError(
            f"source.model: {name} is a file, expected the folder of a model",
            "Give the folder that holds config.json and model.safetensors",
        )
    if (path / "recipe.yaml").exists() and not (path / "config.json").exists():
        raise RecipeError(
            f"source.model: {name} is the folder of a run, expected that of a model",
            f"Give what the run published, {name.rstrip('/')}/publish, if that is a whole model",
        )


def _refuse_foreign_settings(name: str, folder: Path) -> None:
    """Refuse settings that load foreign code or files, and an adapter, which transformers loads."""
    why = find_foreign_setting(folder, may_link=name.startswith(paths.PACKAGE_PREFIX))
    if why is not None:
        raise RecipeError(
            f"source.model: {name} is not loaded: {why}", "Remove it, or give another model"
        )
    if (folder / "adapter_config.json").exists():
        raise RecipeError(
            f"source.model: {name} holds an adapter (adapter_config.json), not a model alone",
            "Give its base, or merge the adapter into it and save the whole model elsewhere",
        )


# Loading meets files of anybody's: the libraries check little, and each call fails in its own way.
BUILD_ERRORS = (
    ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError,
    AssertionError, re.error, StrictDataclassError,
)  # fmt: skip
"""What transformers and peft raise on settings that fit no model.

A class of transformers: AttributeError for a key that config.json lacks, TypeError for a value of
another type, KeyError for an unknown activation, ValueError for sizes that do not divide,
RuntimeError for sizes that torch refuses, ArithmeticError for sizes of 0 or above any number,
AssertionError for a padding token that is not embedded, StrictDataclassError for a key of
config.json that is of another type than its class declares. A config, tokenizer or processor:
TypeError and AttributeError where its JSON is no mapping, RecursionError where it is nested too
deep. peft: ValueError for targets that match nothing, KeyError for an unknown peft_type, IndexError
for layers that the model lacks, re.error for a pattern.
"""
TENSOR_FILE_ERRORS = (SafetensorError, OSError)
"""What `safe_open` raises on a file that is cut short, or cannot be read."""
CONFIG_ERRORS = (OSError, *BUILD_ERRORS)
"""What `from_pretrained` of a config, tokenizer or processor raises; OSError for a file that is
missing or no JSON."""
LOADING_ERRORS = (*CONFIG_ERRORS, ImportError, SafetensorError, EOFError, UnpicklingError)
"""What `from_pretrained` of a model raises: the same, and what reading the weights does.

`torch.load`: EOFError, UnpicklingError and RuntimeError for a pickle. peft: ImportError for
settings of a package that is not installed (megatron_config).
"""


def describe_load_error(error: Exception) -> str:
    """Return one line on why weights do not load; for a refused pickle, that it was not run."""
    if isinstance(error, (UnpicklingError, EOFError)):
        return (
            "a pickle of its weights (.bin) is damaged or holds more than tensors; none of it was "
            "run"
        )
    return format_error_line(error)


TOKENIZER_JSON_FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json")
UNKNOWN_WORD = "\U00013000\u1400\ua900\U000103a0"
"""Letters of four scripts, not all of which a vocabulary has."""


class TokenizerError(ValueError):
    """Report that a folder holds no tokenizer, or none that encodes every text."""


class TranslatedTokenizerErrors:
    """Turn what transformers and tokenizers raise on a tokenizer's files into TokenizerError.

    Args:
        folder: that holds them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: object) -> None:
        """Raise a TokenizerError in place of such an error."""
        if kind is None:
            return
        # The tokenizers library raises Exception itself, and panics, which are BaseExceptions of a
        # class that cannot be imported; ImportError is of a package that a class asks for.
        is_own = kind is Exception or kind.__name__ == "PanicException"
        is_known = issubclass(kind, (*CONFIG_ERRORS, ImportError)) and not is_out_of_memory(error)
        if is_own or is_known:
            file = "tokenizer.json: " if is_own else ""
            why = _find_unreadable_file(self.folder) or f"{file}{format_error_line(error)}"
            raise TokenizerError(why) from error


def _find_unreadable_file(folder: Path) -> str | None:
    """Return which of a tokenizer's files is no JSON, and why; None where none is."""
    for name in TOKENIZER_JSON_FILES:
        try:
            if (folder / name).exists():
                read_json(folder / name)
        except (OSError, UnreadableJsonError) as error:
            return f"{name} is no JSON: {error}"
    return None


def open_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder as it is saved, if it encodes any text.

    Raises:
        TokenizerError: if there is none, or its files make no sense.
    """
    from transformers import AutoTokenizer

    with TranslatedTokenizerErrors(folder):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # Some need a token for what they do not know, and fail at the first such text without one.
        ids = tokenizer(UNKNOWN_WORD)["input_ids"]
        tokens, names = tokenizer.convert_ids_to_tokens(ids), list(tokenizer.model_input_names)
    if "input_ids" not in names or not all(isinstance(name, str) for name in names):
        raise TokenizerError(
            f"tokenizer_config.json: model_input_names is {names!r}, expected names with input_ids"
        )
    if None in tokens:
        raise TokenizerError("tokenizer.json: it adds a token to a text that its vocabulary lacks")
    return tokenizer


def load_tokenizer(source: SourceModel) -> Any:
    """Return the source's own tokenizer, which pads on the right and gives the attention mask.

    Published with these settings, plain transformers gives a text the same outputs whatever else
    is in its batch, as hftl does (see `TextInputs`).

    A decoder's without a padding token pads with the token that ends a text, as do most that have
    one: a padding token that the model does not embed could not be read.

    Raises:
        RecipeError: if the checkpoint ships none, or one that cannot pad.
    """
    fix = "Save the tokenizer beside the model"
    try:
        tokenizer = open_tokenizer(source.folder)
    except TokenizerError as error:
        raise RecipeError(
            f"source.model: {source.name} has no usable tokenizer: {error}", fix
        ) from error
    # Without tokenizer files transformers builds one that knows only the special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise RecipeError(
            f"source.model: {source.name} has no usable tokenizer: it has no vocabulary", fix
        )
    complete_padding(tokenizer, source.config)
    why = find_padding_fault(tokenizer, source.config)
    if why is not None:
        raise RecipeError(
            f"source.model: the tokenizer of {source.name} {why}",
            "Set pad_token in its tokenizer_config.json",
        )
    tokenizer.padding_side = "right"
    if (
        accepts_attention_mask(get_encoder_class(source.config))
        and "attention_mask" not in tokenizer.model_input_names
    ):
        tokenizer.model_input_names = [*tokenizer.model_input_names, "attention_mask"]
    return tokenizer


def complete_padding(tokenizer: Any, config: Any) -> None:
    """Let a decoder's tokenizer without a padding token that is embedded pad by a text's end."""
    pad_id = tokenizer.pad_token_id
    if get_config_spec(config).is_causal and tokenizer.eos_token_id is not None:
        if pad_id is None or pad_id >= config.get_text_config().vocab_size:
            tokenizer.pad_token = tokenizer.eos_token


def find_padding_fault(tokenizer: Any, config: Any) -> str | None:
    """Return why a tokenizer cannot pad what a model reads; None where it can."""
    number = tokenizer.pad_token_id
    if number is None:
        return "has no padding token"
    embedded = getattr(config.get_text_config(), "vocab_size", None)
    if embedded is None or number < embedded:
        return None
    return (
        f"pads with {tokenizer.pad_token!r}, which has the number {number}, and the model embeds "
        f"{embedded} tokens"
    )


def match_padding(source: SourceModel, tokenizer: Any) -> SourceModel:
    """Return a source whose config names the tokenizer's padding token, if it is a decoder.

    Its classes find the last token of a text by that, and refuse batches where the config has none.
    Nothing is generated, so that no keys and values are kept.
    """
    if not source.architecture_spec.is_causal:
        return source
    config = deepcopy(source.config)
    config.update({"pad_token_id": tokenizer.pad_token_id})
    config.get_text_config().use_cache = False
    return replace(source, config=config)


TORCHVISION_ONLY = ("dinov3_vit", "dinov3_convnext")
"""Architectures whose own processor needs torchvision. ViT's does the same by PIL, but that it
resizes 8-bit pixels, not floats; the published folder holds ViT's."""


def load_image_processor(source: SourceModel, image_size: int | None = None) -> Any:
    """Return the source's own image processor, the one that needs no torchvision.

    Args:
        source: the checkpoint.
        image_size: the side that timm's rule is applied to, in pixels; None: the source's own.

    Raises:
        RecipeError: if the checkpoint ships none.
    """
    from transformers import AutoImageProcessor, ViTImageProcessorPil

    if source.model_type == TIMM_WRAPPER:
        from hftl.models.timm_processor import build_timm_processor

        return build_timm_processor(source.config, image_size)
    auto: Any = AutoImageProcessor
    more = {"backend": "pil", "trust_remote_code": False}
    if source.model_type in TORCHVISION_ONLY:
        auto, more = ViTImageProcessorPil, {}
    try:
        return check_image_processor(auto.from_pretrained(source.folder, **more))
    except (ImportError, *CONFIG_ERRORS) as error:
        # OSError for a file that is missing or no JSON, ImportError for a class that needs a
        # package which is not installed.
        raise RecipeError(
            f"source.model: {source.name} has no usable image processor: "
            f"{format_error_line(error)}",
            "Save the processor beside the model",
        ) from error


def check_image_processor(processor: Any) -> Any:
    """Return a processor, if it is one of images.

    Raises:
        ValueError: if it reads something else.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    if not isinstance(processor, ImageProcessingMixin):
        raise ValueError(f"{type(processor).__name__} reads no images")
    return processor


def _read_as_encoder(config: Any) -> Any:
    """Return the config of the architecture that the checkpoint is read as, see `READ_AS`."""
    from transformers import AutoConfig

    if config.model_type == TIMM_WRAPPER:
        drop_old_labels(config)
    model_type = READ_AS.get(config.model_type)
    if model_type is None:
        return config
    known = AutoConfig.for_model(model_type).to_dict().keys() - {"model_type", "architectures"}
    fields = {key: value for key, value in config.to_dict().items() if key in known}
    return AutoConfig.for_model(model_type, **fields)


UNHASHED_CONFIG_KEYS = ("_name_or_path", "name_or_path", "transformers_version")
"""Keys of config.json that say where a checkpoint was and what wrote it, not how it computes."""


def hash_source_config(source: SourceModel) -> str:
    """Return the hash of a source model's config.json, but for names, paths and versions, and of
    how its weights are held.

    The file counts, and not the parsed config, to which every version of transformers adds keys.
    """
    config = _drop_unhashed_keys(read_json(source.folder / "config.json"))
    return fingerprint(config if source.quantization is None else [config, source.quantization])


def _drop_unhashed_keys(node: object) -> object:
    """Return a config, and those in it, without `UNHASHED_CONFIG_KEYS`."""
    if isinstance(node, list):
        return [_drop_unhashed_keys(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {k: _drop_unhashed_keys(v) for k, v in node.items() if k not in UNHASHED_CONFIG_KEYS}


def hash_source_weights(source: SourceModel) -> str:
    """Return `hash_checkpoint` of a source model.

    Raises:
        RecipeError: if it has no weights, or they do not open.
    """
    digest = hash_checkpoint(source.folder)
    if digest is None:
        raise RecipeError(
            f"source.model: {source.name} has no weights", "Give one with model.safetensors"
        )
    return digest


def _download_snapshot(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    """Download the files of a commit that match the patterns, without its folders."""
    from huggingface_hub import snapshot_download

    with paths.translate_hub_errors(repo_id, "model", "source.model: "):
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=patterns, ignore_patterns="*/*"
            )
        )
