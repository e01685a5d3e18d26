"""Write the model's part of the publish folder: a plain peft or transformers folder and a head."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from peft import TaskType
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hftl.config.finetune import Finetune
from hftl.data.image_inputs import ImageInputs
from hftl.data.image_processing import get_image_size
from hftl.data.prompted_inputs import PromptedInputs
from hftl.finetune.arm_files import load_trained_tensors
from hftl.finetune.context import ExperimentContext
from hftl.finetune.trainable import apply_strategy
from hftl.finetune.zero_shot import build_start_model
from hftl.models.architecture_spec import ArchitectureSpec
from hftl.models.encoders import get_encoder_class
from hftl.models.heads import build_label_settings, get_placeholder_name
from hftl.models.lora import build_path_pattern, get_peft_model_inside
from hftl.models.lora_concat import (
    PEFT_PREFIX,
    AdapterSettings,
    concat_factors,
    extract_factors,
    get_saved_tensors,
    load_factors,
    write_adapter,
)
from hftl.models.model_parts import unwrap_adapter
from hftl.models.pairs import EMBEDDING_SCALE, EmbeddingModel
from hftl.models.pooled_model import PooledImageModel, PooledModel
from hftl.models.quantization import build_quantization_config
from hftl.models.timm_architecture import TIMM_WRAPPER, set_timm_image_size
from hftl.publish.settings_files import THRESHOLDS_KEY, drop_local_names
from hftl.runtime.run_folder import to_json

SAMPLE_ROWS = 32
"""Test rows whose logits prove the reload."""


class ReloadSample(TypedDict, total=False):
    """Hold the rows whose logits prove the reload, as `reload_check` reads them from a file.

    They are `texts`, `words`, or the names of `images` beside the file, for a vision-language model
    with `prompts`; `token_ids` where this machine lacks a package that the processor needs.
    `quantization` are the settings of the base's weights, where they are not whole.
    """

    logits: list[list[float]]
    texts: list[tuple[str, ...]]
    words: list[tuple[str, ...]]
    max_length: int
    images: list[str]
    arguments: dict[str, bool]
    prompts: list[str]
    token_ids: list[list[int]]
    quantization: dict[str, Any]


def rebuild_model(
    context: ExperimentContext, finetune: Finetune, seed: int, weights: Path
) -> nn.Module:
    """Rebuild the model of an arm from the source and the tensors that the arm trained.

    Raises:
        RunFolderError: if the weights are not those of this model.
    """
    if finetune.spec.is_solved:
        built = context.build_model(finetune.pooling, seed)
    else:
        # peft keeps the head it wraps; it must be the one that training started from.
        built = build_start_model(context, finetune, seed)
    model = apply_strategy(built.model, context.decide_batchnorm(finetune, seed), built.fresh)
    load_trained_tensors(model, weights)
    return model.eval()


def export_model(
    context: ExperimentContext, model: nn.Module, finetune: Finetune, folder: Path,
    thresholds: Mapping[str, float] | None = None,
) -> None:  # fmt: skip
    """Write weights, config with labels, tokenizer, and the head where pooling is not native.

    The adapter names the public base and its revision, never a path.

    Args:
        context: the source and the rows.
        model: the trained one.
        finetune: how it was trained.
        folder: to write.
        thresholds: by label, for config.json; none where each label's is .5.
    """
    source = context.source
    task = context.prepared.task
    labels: dict[str, object] = {
        **build_label_settings(context.prepared.names, context.num_outputs, task),
        **({THRESHOLDS_KEY: dict(thresholds)} if thresholds else {}),
    }
    if finetune.spec.trains_adapter:
        export_adapter(context, model, folder)
        # What the adapter is put on: for a stock class with its labels, so that it can be named.
        known = (
            {}
            if isinstance(model, PooledModel)
            else {"architectures": [type(unwrap_adapter(model)).__name__]}
        )
        _write_config(context, {**labels, **known}, folder)
    else:
        whole: Any = model.encoder if isinstance(model, PooledModel) else model
        whole.config.update(labels)
        whole.float()  # Plain classes compute in the precision that the file names.
        _write_image_size(whole.config, context.inputs)
        whole.save_pretrained(folder, state_dict=_build_state_dict(model, source.architecture_spec))
    if isinstance(model, EmbeddingModel):
        # The pair's config, for what the folder says of its inputs; the class names the half.
        half = type(unwrap_adapter(model.encoder)).__name__
        _write_config(context, {**labels, "architectures": [half]}, folder)
    if isinstance(model, PooledModel):
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in _collect_head(model).items()},
            folder / "head.safetensors",
            metadata=_describe_head(model),
        )
    context.inputs.save(folder)
    for path in folder.glob("*config.json"):
        _rewrite_json(path, drop_local_names)


def _write_config(context: ExperimentContext, changes: Mapping[str, object], folder: Path) -> None:
    """Write the source's config with some settings changed."""
    config = deepcopy(context.source.config)
    config.update(dict(changes))
    _write_image_size(config, context.inputs)
    config.save_pretrained(folder)


def _collect_head(model: PooledModel) -> dict[str, Tensor]:
    """Return the tensors after the encoder; what multiplies embeddings is folded into the head."""
    weight, bias = model.head.weight, model.head.bias
    if not isinstance(model, EmbeddingModel):
        return {"weight": weight, "bias": bias}
    scaled = {"weight": EMBEDDING_SCALE * weight, "bias": bias}
    if isinstance(model.projection, nn.Linear):
        return {**scaled, "projection": model.projection.weight}
    return scaled


def _describe_head(model: PooledModel) -> dict[str, str]:
    """Return how the head's input is pooled, as the metadata of its file."""
    described = {"pooling": model.pooling}
    if isinstance(model, PooledImageModel):
        described["prefix_tokens"] = str(model.prefix)
    return described


def _write_image_size(config: Any, inputs: Any) -> None:
    if config.model_type == TIMM_WRAPPER:
        set_timm_image_size(config, get_image_size(inputs.processor))


def export_adapter(context: ExperimentContext, model: nn.Module, folder: Path) -> None:
    """Write the adapter; where adaptation was by LoRA too, concatenate both on the first's base.

    It names the public base and its revision, never a path.
    """
    base = context.public_base
    adapter = get_peft_model_inside(model)
    adapter.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    named: dict[str, str | None] = {
        "base_model_name_or_path": base.public_id, "revision": base.revision
    }  # fmt: skip
    if context.lora_factors:
        own = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        pooled = isinstance(model, PooledModel)
        prefix = "" if pooled else f"{context.source.architecture_spec.encoder}."
        stages = [*map(load_factors, context.lora_factors), extract_factors(adapter, prefix)]
        settings = AdapterSettings(
            task_type=own["task_type"],
            modules_to_save=own["modules_to_save"],
            base_class=None if pooled else type(unwrap_adapter(model)),
        )
        write_adapter(folder, concat_factors(stages), prefix, get_saved_tensors(adapter), settings)
    if isinstance(model, PooledModel):
        # An adapter for `AutoModel` fits no stock task class: there the same layers lie below the
        # encoder's name, which a list of names would match by the ends of the paths.
        pattern = _build_target_pattern(
            folder / "adapter_model.safetensors", unwrap_adapter(adapter)
        )
        named |= {"target_modules": pattern, "layers_to_transform": None, "layers_pattern": None}
    _rewrite_json(
        folder / "adapter_config.json", lambda settings: _sort_name_lists({**settings, **named})
    )


def _build_state_dict(model: nn.Module, architecture: ArchitectureSpec) -> dict[str, Tensor]:
    """Return the tensors of a whole model; of a `PooledModel` those of its encoder.

    The latter get an empty tensor where the stock task class has its last layer. No stock class
    pools as hftl does. Without that tensor it would load the encoder, draw a head at random and
    predict the real labels, after a warning; an empty one, of no layer's shape, makes it refuse.
    `AutoModel` ignores it.
    """
    if not isinstance(model, PooledModel):
        return model.state_dict()
    return model.encoder.state_dict() | {get_placeholder_name(architecture): torch.empty(0)}


def _build_target_pattern(weights: Path, encoder: nn.Module) -> str:
    """Return the pattern that matches the adapted layers by their whole paths, and no other."""
    with safe_open(weights, "pt") as file:
        keys = [key for key in file.keys() if ".lora_A." in key]  # noqa: SIM118
    paths = {key.removeprefix(PEFT_PREFIX).split(".lora_A.")[0] for key in keys}
    return build_path_pattern(sorted(paths), [n for n, _ in encoder.named_modules()])


def export_encoder(context: ExperimentContext, folder: Path) -> None:
    """Write an adapted encoder without a task: an adapter on its base, or the whole encoder.

    Where adaptation was rejected, the weights are the source's and none are written.
    """
    base = context.public_base
    if context.lora_factors and not context.base_is_adapted:
        factors = concat_factors([load_factors(file) for file in context.lora_factors])
        text = context.prepared.modality == "text"
        settings = AdapterSettings(
            task_type=TaskType.FEATURE_EXTRACTION if text else None,
            base=base.public_id,
            revision=base.revision,
            base_class=get_encoder_class(context.source.config),
        )
        write_adapter(folder, factors, "", {}, settings)
    elif context.base is not None:
        shutil.copytree(context.source.folder, folder, dirs_exist_ok=True)
    if not (folder / "config.json").exists():
        context.source.config.save_pretrained(folder)
    context.inputs.save(folder)
    for path in folder.glob("*config.json"):
        _rewrite_json(path, drop_local_names)


def export_base(context: ExperimentContext, folder: Path) -> None:
    """Write the adapted base that an adapter goes on, as a plain folder of transformers."""
    shutil.copytree(context.public_base.folder, folder)
    context.inputs.save(folder)
    for path in folder.glob("*config.json"):
        _rewrite_json(path, drop_local_names)


def select_sample_rows(context: ExperimentContext) -> list[int]:
    """Return the places of the test rows that prove the reload: of images the smallest."""
    rows = context.prepared.rows["test"]
    return sorted(range(len(rows)), key=lambda i: math.prod(rows[i].size or (1,)))[:SAMPLE_ROWS]


def select_sample_logits(context: ExperimentContext, logits: np.ndarray) -> np.ndarray:
    """Return the logits of `select_sample_rows`, of those of all test rows."""
    counts = context.prepared.count_words(context.prepared.rows["test"])
    parts = np.split(logits.astype(np.float64), np.cumsum(counts)[:-1])
    return np.concatenate([parts[i] for i in select_sample_rows(context)])


def write_reload_sample(context: ExperimentContext, logits: np.ndarray, folder: Path) -> Path:
    """Write test rows as a user has them, and their logits, for the proof of the reload.

    Images are copied whole. Words that were cut off have no logits and are left out of the
    comparison.

    Args:
        context: of the experiment.
        logits: of `select_sample_rows`.
        folder: to write into.
    """
    prepared = context.prepared
    rows = prepared.rows["test"]
    chosen = select_sample_rows(context)
    finite = logits[np.isfinite(logits).all(1)].astype(np.float64)
    sample: ReloadSample = {"logits": finite.tolist()}
    quantization = describe_quantization(context)
    if quantization is not None:
        sample["quantization"] = quantization
    if isinstance(context.inputs, ImageInputs):
        sample["arguments"] = context.inputs.arguments
        sample["images"] = []
        for number, image in enumerate(context.inputs.decode_images([rows[i] for i in chosen])):
            image.save(folder / f"sample{number}.png")
            sample["images"].append(f"sample{number}.png")
        if isinstance(context.inputs, PromptedInputs):
            contents = [rows[i].content for i in chosen]
            sample["prompts"] = [context.inputs.write_prompt(*content[1:]) for content in contents]
            if context.inputs.lacks_video_package:
                encoded = context.encode_rows([rows[i] for i in chosen])
                sample["token_ids"] = [[int(i) for i in row["input_ids"]] for row in encoded]
    else:
        contents = [rows[i].content for i in chosen]
        sample["words" if prepared.task == "token-classification" else "texts"] = contents
        sample["max_length"] = context.inputs.max_length
    path = folder / "sample.json"
    path.write_text(to_json(sample), encoding="utf-8")
    return path


def describe_quantization(context: ExperimentContext) -> dict[str, Any] | None:
    """Return transformers' settings by which the source's weights are quantized; None: whole."""
    source = context.source
    if source.quantization is None:
        return None
    spec = source.architecture_spec.for_task(context.prepared.task)
    return build_quantization_config(spec).to_dict()


def _sort_name_lists(settings: dict[str, object]) -> dict[str, object]:
    """Sort the names that peft holds as sets, whose order changes from process to process."""
    names = ("target_modules", "exclude_modules")
    lists = {k: v for k in names if isinstance(v := settings.get(k), list)}
    return {**settings, **{name: sorted(values) for name, values in lists.items()}}


def _rewrite_json(path: Path, change: Callable[[dict[str, object]], dict[str, object]]) -> None:
    settings = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
