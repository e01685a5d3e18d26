"""Penalize the distance of weights to where they started, and read a LoRA layer's update.

Under LoRA the effective weights count: the base's and the update s B A. What an adapter saves
whole inside the encoder counts as the encoder's own. All of it is computed in fp32.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from hftl.config.retain import L2SP as L2SPSection
from hftl.config.upstream_args import ZERO_UPDATE_INITS
from hftl.errors import RecipeError
from hftl.models.lora_concat import EXACT_FIELDS
from hftl.models.model_parts import get_encoder, get_model_spec
from hftl.retain.regularizer import Config, Regularizer, Step, TrainingStart

LOW_RANK_FIELDS = (*EXACT_FIELDS, "init_lora_weights", "bias", "modules_to_save")
"""Fields under any value of which a wrapped layer's update is s B A; `check_unchanged_base` reads
the two that change the base."""
LORA_DEFAULTS = {field.name: field.default for field in fields(LoraConfig)}
PEFT_WRAPPING = re.compile(r"\.base_layer(?=\.)|\.modules_to_save\.[^.]+(?=\.)")
"""What peft inserts into the name of a parameter."""
UNTRAINED_TOLERANCE = 1e-6
"""The largest squared norm of an untrained update, as a share of the weight's."""


class WeightPenalty(Regularizer[Config]):
    """Penalize the encoder's trained weights; a batch adds its share of the step's penalty."""

    _start: dict[str, Tensor]

    def prepare(self, start: TrainingStart) -> None:
        """Copy the encoder's trained weights; see `record_start`."""
        self.record_start(start.model)

    def record_start(self, model: nn.Module) -> None:
        """Copy the encoder's trained weights.

        Raises:
            RecipeError: for LoRA whose update is not s B A on the original, starting from zero.
        """
        _check_adapter(model)
        self._start = {n: p.detach().clone() for n, p in iterate_encoder_parameters(model)}

    def loss(self, step: Step) -> Tensor:
        """Return the batch's share of the penalty, a float32 scalar."""
        return self.compute_penalty(step.model) * step.share

    def compute_penalty(self, model: nn.Module) -> Tensor:
        """Return the penalty with its weight, a float32 scalar in any precision of training."""
        device = next(model.parameters()).device
        with torch.autocast(device.type, enabled=False):
            parts = list(self.iterate_parts(model))
            return torch.stack(parts).sum() if parts else torch.zeros((), device=device)

    def iterate_parts(self, model: nn.Module) -> Iterator[Tensor]:
        """Yield the penalty of each parameter and LoRA layer, scalars."""
        raise NotImplementedError


class L2SP(WeightPenalty[L2SPSection]):
    """Penalize weight / 2 |theta - theta0|^2 + head / 2 |phi|^2.

    Li et al. 2018, arXiv:1802.01483, equation 3: theta are the encoder's trained weights and theta0
    those it started from, phi the head's. Under LoRA |s B A|^2, by tr((A A^T)(B^T B)), which needs
    no matrix of the layer's size. Adam's moments scale a penalty like any gradient; `decoupled`
    takes the step outside of them, as AdamW decays weights (Chen et al. 2020, RecAdam,
    arXiv:2004.12651, section 3.3).

    Args:
        weight: of the encoder's distance, 0.01 by default.
        head: of the head's distance to zero, 0 by default.
        decoupled: replace the first penalty by theta <- theta - rate * weight * (theta - theta0)
            after each step.

    Raises:
        RecipeError: for a negative weight.
    """

    section = L2SPSection

    def record_start(self, model: nn.Module) -> None:
        """Copy the encoder's trained weights.

        Raises:
            RecipeError: if `decoupled` under LoRA, whose base does not move; see `WeightPenalty`.
        """
        super().record_start(model)
        if any(True for _ in iterate_lora_layers(model)):
            self.config.check_arm("lora", "classification")

    def iterate_parts(self, model: nn.Module) -> Iterator[Tensor]:
        """Yield the head's and, unless decoupled, the encoder's squared distances."""
        for parameter in iterate_head_parameters(model):
            yield self.config.head / 2 * parameter.float().square().sum()
        if not self.weight or self.config.decoupled:
            return
        for name, parameter in iterate_encoder_parameters(model):
            yield self.weight / 2 * compute_shift(parameter, self._start[name]).square().sum()
        for _, layer in iterate_lora_layers(model):
            yield self.weight / 2 * compute_update_norm(layer)

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take the decoupled step with each parameter's own learning rate."""
        if not self.config.decoupled:
            return
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        with torch.no_grad():
            for name, parameter in iterate_encoder_parameters(model):
                if id(parameter) in rates:
                    step = rates[id(parameter)] * self.weight
                    parameter.sub_(step * (parameter - self._start[name]))


def check_unchanged_base(lora: Mapping[str, object], section: str) -> None:
    """Refuse LoRA under which the base, with the adapter off, is not the original.

    PiSSA, OLoRA, CorDA and LoftQ change the base's weights; `false` and null start from a random
    update; a trained `bias` changes the base.

    Args:
        lora: fields of `peft.LoraConfig`.
        section: where they stand in the recipe.

    Raises:
        RecipeError: naming the field.
    """
    init = lora.get("init_lora_weights", True)
    if init not in ZERO_UPDATE_INITS:
        raise RecipeError(
            f"{section}.init_lora_weights={init}: retain compares with the base with the adapter "
            "off, and this changes the base or starts from an update",
            "Leave it out, or leave retain out",
        )
    if lora.get("bias") not in (None, "none"):
        raise RecipeError(
            f"{section}.bias={lora['bias']} trains the base's biases, and retain compares with the "
            "base with the adapter off",
            "Set it to none, or leave retain out",
        )


def check_low_rank(lora: Mapping[str, object], section: str) -> None:
    """Refuse LoRA whose update of a weight is not s B A, such as DoRA's.

    Args:
        lora: fields of `peft.LoraConfig`; a field that is not known to be harmless is refused.
        section: where they stand in the recipe.

    Raises:
        RecipeError: naming the field.
    """
    for name, value in lora.items():
        if name in LOW_RANK_FIELDS or not value or value == LORA_DEFAULTS.get(name):
            continue
        raise RecipeError(
            f"{section}.{name}={value}: l2sp, ewc and interpolate read the update s B A, and this "
            "changes it",
            "Leave it out, or use kl",
        )


def _check_adapter(model: nn.Module) -> None:
    """Refuse an adapter whose update is not s B A on the original, starting from zero."""
    for module in model.modules():
        if isinstance(module, PeftModel):
            for name in module.active_adapters:
                lora = module.peft_config[name].to_dict()
                check_unchanged_base(lora, "lora")
                check_low_rank(lora, "lora")
    for name, layer in iterate_lora_layers(model):
        with torch.no_grad():
            weight_norm = layer.get_base_layer().weight.float().square().sum()
            is_trained = compute_update_norm(layer) > UNTRAINED_TOLERANCE * weight_norm
        if is_trained:
            raise RecipeError(
                f"the adapter on {name} has been trained already, and l2sp and ewc take the base "
                "under it for the original",
                "Merge it into the base first, or use kl with reference=",
            )


def iterate_encoder_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the encoder's trained parameters, an adapter's apart, by their names in `AutoModel`."""
    encoder = get_encoder(model, get_model_spec(model))
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            yield PEFT_WRAPPING.sub("", name), parameter


def iterate_head_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the trained parameters outside the encoder."""
    inside = {id(parameter) for _, parameter in iterate_encoder_parameters(model)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in inside and ".lora_" not in name:
            yield parameter


def iterate_lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the encoder's layers that carry LoRA, by their names in `AutoModel`."""
    encoder = get_encoder(model, get_model_spec(model))
    for name, module in encoder.named_modules():
        if hasattr(module, "lora_A"):
            yield name, module


def compute_shift(parameter: Tensor, start: Tensor) -> Tensor:
    """Return theta - theta0 in float32."""
    return parameter.float() - start.float()


def compute_update(layer: Any) -> Tensor:
    """Return s B A of a layer's one adapter, of the weight's shape, float32 with gradient."""
    name = layer.active_adapters[0]
    if not _is_linear(layer):
        return layer.get_delta_weight(name).float()
    product = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float()
    return layer.scaling[name] * product


def compute_update_norm(layer: Any) -> Tensor:
    """Return |s B A|^2 = s^2 tr((A A^T)(B^T B)), from two matrices of the rank's size."""
    if not _is_linear(layer):
        return compute_update(layer).square().sum()
    name = layer.active_adapters[0]
    a, b = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float()
    return layer.scaling[name] ** 2 * ((a @ a.T) * (b.T @ b)).sum()


def _is_linear(layer: Any) -> bool:
    """Return False for embeddings and convolutions, whose factors in peft have other shapes."""
    return isinstance(layer.get_base_layer(), nn.Linear)
