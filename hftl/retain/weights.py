"""Whether the weights under an adapter stay the original's, and what the adapter adds to them."""

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from hftl.config.upstream_args import ZERO_UPDATE_INITS
from hftl.errors import RecipeError
from hftl.models.heads import get_encoder, get_model_architecture
from hftl.models.lora_concat import EXACT_FIELDS

LOW_RANK_FIELDS = (*EXACT_FIELDS, "init_lora_weights", "bias", "modules_to_save")
"""Fields under any value of which a wrapped layer's update is s B A; the first two are looked at
by `check_unchanged_base`."""
LORA_DEFAULTS = {field.name: field.default for field in fields(LoraConfig)}


def check_unchanged_base(lora: dict[str, Any], section: str) -> None:
    """Refuses LoRA under which the base, with the adapter off, is not the original.

    PiSSA, OLoRA, CorDA and LoftQ write another base; `false` and null start from a random update;
    a trained `bias` changes the base.

    Args:
        lora: fields of `peft.LoraConfig`.
        section: where they stand in the recipe.

    Raises:
        RecipeError: naming the field.
    """
    begins = lora.get("init_lora_weights", True)
    if begins not in ZERO_UPDATE_INITS:
        raise RecipeError(
            f"{section}.init_lora_weights={begins}: retain is taken against the base with the "
            "adapter off, and this changes the base or starts from an update",
            "Leave it out, or leave retain out",
        )
    if lora.get("bias") not in (None, "none"):
        raise RecipeError(
            f"{section}.bias={lora['bias']} trains the base's biases, and retain is taken against "
            "the base with the adapter off",
            "Set it to none, or leave retain out",
        )


def check_low_rank(lora: dict[str, Any], section: str) -> None:
    """Refuses LoRA whose update of a weight is not s B A, as DoRA's.

    Args:
        lora: fields of `peft.LoraConfig`.
        section: where they stand in the recipe.

    Raises:
        RecipeError: naming the field; whatever is not known to leave the update alone is refused.
    """
    for name, value in lora.items():
        if name in LOW_RANK_FIELDS or not value or value == LORA_DEFAULTS.get(name):
            continue
        raise RecipeError(
            f"{section}.{name}={value}: l2sp, ewc and interpolate look at the update s B A, and "
            "with this it is another",
            "Leave it out, or use kl",
        )


# Penalties on weights: how far they are from where they started.
#
# Under LoRA it is the effective weights that count: the base's and the update s B A. What an
# adapter saves whole inside the encoder counts as the encoder's own. All of it is computed in fp32.


PEFT_WRAPPING = re.compile(r"\.base_layer(?=\.)|\.modules_to_save\.[^.]+(?=\.)")
"""What peft puts into the name of a parameter."""
UNTRAINED_TOLERANCE = 1e-6
"""The share of a weight's squared length that an update which starts at zero may have."""


class L2SP:
    """weight / 2 |theta - theta0|^2 + head / 2 |phi|^2 (Li et al. 2018, arXiv:1802.01483, eq. 3).

    theta are the encoder's trained weights and theta0 those it started from, phi the head's. Under
    LoRA |s B A|^2, by tr((A A^T)(B^T B)), which needs no matrix of the layer's size. Through Adam's
    moments a penalty is scaled like any gradient; `decoupled` takes the step outside of them, as
    AdamW decays weights (Chen et al. 2020, RecAdam, arXiv:2004.12651, section 3.3).

    Args:
        weight: of the encoder's distance.
        head: of the head's distance to zero.
        decoupled: whether theta <- theta - rate * weight * (theta - theta0) after each step
            stands in the place of the first penalty.

    Raises:
        RecipeError: for a negative weight.
    """

    def __init__(self, weight: float = 0.01, head: float = 0.0, decoupled: bool = False) -> None:
        if weight < 0 or head < 0:
            raise RecipeError(
                f"l2sp: weight={weight}, head={head} would drive the model away", "Raise them"
            )
        self.weight = weight
        self.head = head
        self.decoupled = decoupled
        self._start: dict[str, Tensor] = {}

    def start(self, model: nn.Module) -> None:
        """Remembers where the encoder's trained weights are.

        Raises:
            RecipeError: if `decoupled` under LoRA, whose base does not move, or for LoRA whose
                update is not s B A on the original.
        """
        _check_adapter(model)
        if self.decoupled and any(True for _ in iterate_lora_layers(model)):
            raise RecipeError(
                "l2sp.decoupled moves weights, and under LoRA the base does not move",
                "Set it to false",
            )
        self._start = {name: p.detach().clone() for name, p in iterate_encoder_parameters(model)}

    def penalty(self, model: nn.Module) -> Tensor:
        """A scalar float32."""
        device = next(model.parameters()).device
        with torch.autocast(device.type, enabled=False):
            parts = [
                self.head / 2 * p.float().square().sum() for p in iterate_head_parameters(model)
            ]
            if self.weight and not self.decoupled:
                parts += [
                    self.weight / 2 * compute_shift(p, self._start[name]).square().sum()
                    for name, p in iterate_encoder_parameters(model)
                ]
                parts += [
                    self.weight / 2 * compute_update_norm(layer)
                    for _, layer in iterate_lora_layers(model)
                ]
            return _sum_parts(parts, device)

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Takes the decoupled step with each parameter's own learning rate."""
        if not self.decoupled:
            return
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        with torch.no_grad():
            for name, parameter in iterate_encoder_parameters(model):
                if id(parameter) in rates:
                    step = rates[id(parameter)] * self.weight
                    parameter.sub_(step * (parameter - self._start[name]))


class EWC:
    """weight / 2 sum_i F_i (theta_i - theta0_i)^2 (Kirkpatrick et al. 2017, equation 3).

    Args:
        weight: of the penalty; F has a mean of 1, see `fisher.compute_fisher`.
        fisher: by the parameter's name in the encoder, of its shape; under LoRA the wrapped
            layers' weights count. What has no entry costs nothing.

    Raises:
        RecipeError: for a negative weight.
    """

    def __init__(self, weight: float, fisher: dict[str, Tensor]) -> None:
        if weight < 0:
            raise RecipeError(f"ewc.weight={weight} would drive the model away", "Raise it")
        self.weight = weight
        self._fisher = dict(fisher)
        self._start: dict[str, Tensor] = {}

    def start(self, model: nn.Module) -> None:
        """Remembers where the encoder's trained weights are.

        Raises:
            RecipeError: if nothing that trains has a Fisher information, or one is of another
                shape, or for LoRA whose update is not s B A on the original.
        """
        _check_adapter(model)
        shapes = {name: p.shape for name, p in iterate_encoder_parameters(model)}
        shapes |= {
            f"{name}.weight": layer.get_base_layer().weight.shape
            for name, layer in iterate_lora_layers(model)
        }
        known = {name: f for name, f in self._fisher.items() if name in shapes}
        strange = [name for name, f in known.items() if f.shape != shapes[name]]
        if strange or not known:
            what = "nothing of the encoder that trains has a Fisher information"
            if strange:
                what = (
                    f"the Fisher information of {strange[0]} is {tuple(known[strange[0]].shape)}, "
                    f"and the weight {tuple(shapes[strange[0]])}"
                )
            raise RecipeError(f"ewc: {what}", "Give that of the same source")
        device = next(model.parameters()).device
        self._fisher = {name: f.to(device, torch.float32) for name, f in known.items()}
        self._start = {
            n: p.detach().clone() for n, p in iterate_encoder_parameters(model) if n in known
        }

    def penalty(self, model: nn.Module) -> Tensor:
        """A scalar float32."""
        device = next(model.parameters()).device
        with torch.autocast(device.type, enabled=False):
            parts = [
                (self._fisher[name] * compute_shift(p, self._start[name]).square()).sum()
                for name, p in iterate_encoder_parameters(model)
                if name in self._start
            ]
            for name, layer in iterate_lora_layers(model):
                if f"{name}.weight" in self._fisher:
                    parts.append(
                        (self._fisher[f"{name}.weight"] * compute_update(layer).square()).sum()
                    )
            return self.weight / 2 * _sum_parts(parts, device)


def iterate_encoder_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The encoder's own trained parameters, without an adapter's, by their names in `AutoModel`."""
    encoder = get_encoder(model, get_model_architecture(model))
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            yield PEFT_WRAPPING.sub("", name), parameter


def iterate_head_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trained parameters outside the encoder."""
    inside = {id(p) for _, p in iterate_encoder_parameters(model)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in inside and ".lora_" not in name:
            yield parameter


def iterate_lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The encoder's layers that carry LoRA, by their names in `AutoModel`."""
    encoder = get_encoder(model, get_model_architecture(model))
    for name, module in encoder.named_modules():
        if hasattr(module, "lora_A"):
            yield name, module


def compute_shift(parameter: Tensor, start: Tensor) -> Tensor:
    """theta - theta0 in float32."""
    return parameter.float() - start.float()


def compute_update(layer: Any) -> Tensor:
    """s B A of a layer's one adapter, of the weight's shape, float32 with gradient."""
    name = layer.active_adapters[0]
    if not _is_linear(layer):
        return layer.get_delta_weight(name).float()
    product = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float()
    return layer.scaling[name] * product


def compute_update_norm(layer: Any) -> Tensor:
    """|s B A|^2 = s^2 tr((A A^T)(B^T B)), from two matrices of the rank's size."""
    if not _is_linear(layer):
        return compute_update(layer).square().sum()
    name = layer.active_adapters[0]
    a, b = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float()
    return layer.scaling[name] ** 2 * ((a @ a.T) * (b.T @ b)).sum()


def _is_linear(layer: Any) -> bool:
    """peft adapts embeddings and convolutions by factors of other shapes."""
    return isinstance(layer.get_base_layer(), nn.Linear)


def _check_adapter(model: nn.Module) -> None:
    """Refuses an adapter whose update is not s B A on the original, starting from nothing."""
    for module in model.modules():
        if isinstance(module, PeftModel):
            for name in module.active_adapters:
                settings = module.peft_config[name].to_dict()
                check_unchanged_base(settings, "lora")
                check_low_rank(settings, "lora")
    for name, layer in iterate_lora_layers(model):
        with torch.no_grad():
            begun = (
                compute_update_norm(layer)
                > UNTRAINED_TOLERANCE * layer.get_base_layer().weight.float().square().sum()
            )
        if begun:
            raise RecipeError(
                f"the adapter on {name} has been trained already, and l2sp and ewc take the base "
                "under it for the original",
                "Merge it into the base first, or use kl with reference=",
            )


def _sum_parts(parts: list[Tensor], device: torch.device) -> Tensor:
    return torch.stack(parts).sum() if parts else torch.zeros((), device=device)
