"""Concatenate LoRA adapters that were trained one after the other into one on the original base.

Each stage adds b_i a_i to a weight (Hu et al. 2022, arXiv:2106.09685, eq. 3), the next one on top
of the sum, so that all of them together add

    b_1 a_1 + b_2 a_2 = [b_1 b_2] [a_1; a_2],

one adapter whose rank is the sum of the ranks: an identity, nothing is approximated.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, PeftType, TaskType, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hftl.config.upstream_args import BASE_PRESERVING_INITS
from hftl.errors import RecipeError, RunFolderError

PEFT_PREFIX = "base_model.model."
"""The prefix that peft puts before every path."""
EXACT_FIELDS = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "runtime_config",
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode",
)  # fmt: skip
"""Fields of `peft.LoraConfig` that leave the update b a on the original base, whatever they are."""


class LoraFactors(NamedTuple):
    """Hold the factors of a linear layer's update b a, (out, in).

    `a` is (r, in) and `b` (out, r), float32; the scale alpha / r, or alpha / sqrt(r) where the
    rank is stabilised (Kalajdzievski 2023, arXiv:2312.03732), is folded into `b`.
    """

    a: Tensor
    b: Tensor


def check_concatenable(lora: Mapping[str, Any], place: str, last: bool = False) -> None:
    """Refuse an adapter whose update is not b a on the original base.

    Args:
        lora: fields of `peft.LoraConfig`.
        place: the recipe key of the fields, as `finetune.lora`.
        last: whether no stage follows; only then are `modules_to_save` carried over.

    Raises:
        RecipeError: naming the field. Whatever is not known to be exact is refused: DoRA, biases,
            other variants, an initialisation that changes the base, tokens or other parameters.
    """
    for name, value in lora.items():
        if name in EXACT_FIELDS or not value or value == _get_default(name):
            continue
        if name == "modules_to_save" and last:
            continue
        if name == "init_lora_weights" and value in BASE_PRESERVING_INITS:
            continue
        shown = json.dumps(value) if isinstance(value, bool) else value
        raise RecipeError(
            f"{place}.{name}={shown} cannot be joined into one adapter on the original base: what "
            "it trains is not B A on linear layers alone",
            "Remove it, or adapt with method full, which publishes the adapted base first",
        )


def extract_factors(adapted: nn.Module, prefix: str = "") -> dict[str, LoraFactors]:
    """Return the factors of every LoRA layer, on the CPU, by the layer's path in the encoder.

    Args:
        adapted: a `PeftModel`, or a module that holds one.
        prefix: path of the encoder below the wrapper, with its dot, as `bert.`; the returned
            paths leave it out.

    Raises:
        RecipeError: if a wrapped layer is not linear or lies outside the encoder, or the adapter
            cannot be joined.
    """
    wrapper = _find_peft_model(adapted)
    (active,) = wrapper.active_adapters
    config = wrapper.peft_config[active]
    if config.peft_type != PeftType.LORA:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise RecipeError(f"an adapter of type {kind} cannot be joined", "Use LoRA")
    check_concatenable(config.to_dict(), "lora", last=True)
    factors = {}
    for path, layer in wrapper.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if not isinstance(layer.get_base_layer(), nn.Linear) or not path.startswith(prefix):
            kind = type(layer.get_base_layer()).__name__
            raise RecipeError(
                f"the adapter on {path} ({kind}) cannot be joined: only linear layers of the "
                "encoder can",
                "Leave it out of target_modules",
            )
        factors[path.removeprefix(prefix)] = _extract_layer_factors(layer, active)
    return factors


def concat_factors(stages: Sequence[Mapping[str, LoraFactors]]) -> dict[str, LoraFactors]:
    """Concatenate the stages' factors into one adapter.

    Args:
        stages: the factors of each, first to last; stages may adapt different layers.
    """
    paths = sorted({path for stage in stages for path in stage})
    parts = {path: [stage[path] for stage in stages if path in stage] for path in paths}
    return {
        path: LoraFactors(torch.cat([f.a for f in stacked]), torch.cat([f.b for f in stacked], 1))
        for path, stacked in parts.items()
    }


def save_factors(factors: Mapping[str, LoraFactors], path: Path) -> None:
    """Write a safetensors file with `<path>.lora_A` and `<path>.lora_B` for each layer."""
    named = {f"{layer}.lora_A": pair.a.contiguous() for layer, pair in factors.items()}
    named |= {f"{layer}.lora_B": pair.b.contiguous() for layer, pair in factors.items()}
    save_file(named, path)


def load_factors(path: Path) -> dict[str, LoraFactors]:
    """Read the factors that `save_factors` wrote.

    Raises:
        RunFolderError: if the file holds anything but pairs of factors.
    """
    named = load_file(path)
    layers = sorted({name.removesuffix(".lora_A").removesuffix(".lora_B") for name in named})
    if set(named) != {f"{layer}.lora_{part}" for layer in layers for part in "AB"}:
        raise RunFolderError(f"{path} does not hold pairs of factors", "Run the adaptation again")
    return {
        layer: LoraFactors(named[f"{layer}.lora_A"], named[f"{layer}.lora_B"]) for layer in layers
    }


def get_saved_tensors(adapted: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of an adapter's `modules_to_save`, by the names that peft gives them."""
    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        _find_peft_model(adapted), save_embedding_layers=False
    )
    return {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}


@dataclass(frozen=True)
class AdapterSettings:
    """Hold what an adapter's config says beside its layers and ranks."""

    task_type: TaskType | None = None
    """Peft's name of the task; None for images."""
    modules_to_save: list[str] | None = None
    """The modules that are saved whole, as fine-tuning named them."""
    base: str | None = None
    """Public id of the base model."""
    revision: str | None = None
    """The base's commit."""
    base_class: type[nn.Module] | None = None
    """The class that the adapter is applied to, which `AutoPeftModel` reads where there is no task
    type."""


def write_adapter(
    folder: Path, factors: Mapping[str, LoraFactors], prefix: str, saved: Mapping[str, Tensor],
    settings: AdapterSettings,
) -> None:  # fmt: skip
    """Write a plain peft folder, `adapter_config.json` and `adapter_model.safetensors`.

    The scale is in the factors, so alpha equals the rank in every layer. A layer that is saved
    whole is no longer adapted: its weight was merged when its training began.

    Args:
        folder: made if it does not exist.
        factors: by the layers' paths in the encoder.
        prefix: path of the encoder in the class that the adapter is applied to, with its dot, as
            `bert.`; empty for `AutoModel`.
        saved: the tensors of `modules_to_save`, by the names that peft gives them.
        settings: what else the folder says of itself.
    """
    adapted = {
        f"{prefix}{path}": pair
        for path, pair in factors.items()
        if f"{PEFT_PREFIX}{prefix}{path}.weight" not in saved
    }
    ranks = {path: len(pair.a) for path, pair in adapted.items()}
    usual = min(Counter(ranks.values()).most_common(), key=lambda pair: (-pair[1], pair[0]))[0]
    # peft matches a pattern against the end of a path, and a dot against anything.
    unusual = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual, lora_alpha=usual, rank_pattern=unusual, alpha_pattern=dict(unusual),
        target_modules=list(adapted), modules_to_save=settings.modules_to_save,
        task_type=settings.task_type, inference_mode=True,
        base_model_name_or_path=settings.base, revision=settings.revision,
    )  # fmt: skip
    peft_config = config.to_dict() | {"target_modules": sorted(adapted)}
    base_class = settings.base_class
    if settings.task_type is None and base_class is not None:
        peft_config["auto_mapping"] = {
            "base_model_class": base_class.__name__, "parent_library": base_class.__module__,
        }  # fmt: skip
    tensors = {f"{PEFT_PREFIX}{path}.lora_A.weight": pair.a for path, pair in adapted.items()}
    tensors |= {f"{PEFT_PREFIX}{path}.lora_B.weight": pair.b for path, pair in adapted.items()}
    tensors |= saved
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(peft_config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(f"{text}\n", encoding="utf-8")
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def _find_peft_model(adapted: nn.Module) -> PeftModel:
    for module in adapted.modules():
        if isinstance(module, PeftModel):
            return module
    raise TypeError(f"{type(adapted).__name__} carries no adapter")


def _extract_layer_factors(layer: LoraLayer, name: str) -> LoraFactors:
    a: Any = layer.lora_A[name].weight
    b: Any = layer.lora_B[name].weight
    scaled = b.detach().double() * layer.scaling[name]
    return LoraFactors(a.detach().float().cpu().clone(), scaled.float().cpu())


def _get_default(name: str) -> Any:
    """Return the default of a field of `peft.LoraConfig`; None for a field that it lacks."""
    matches = [f for f in fields(LoraConfig) if f.name == name]
    if not matches or matches[0].default is MISSING:
        return None
    return matches[0].default
