"""Whether the weights under an adapter stay the original's, and what the adapter adds to them."""

from dataclasses import fields
from typing import Any

from peft import LoraConfig

from hftl.errors import RecipeError
from hftl.model.concat import HARMLESS

UNCHANGED = (True, "gaussian", "orthogonal")
"""Values of peft's `init_lora_weights` that leave the base as it is and start from no update."""
PLAIN = (*HARMLESS, "init_lora_weights", "bias", "modules_to_save")
"""Fields under any value of which a wrapped layer's update is s B A; the first two are looked at
by `check_unchanged_base`."""
DEFAULTS = {field.name: field.default for field in fields(LoraConfig)}


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
    if begins not in UNCHANGED:
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
        if name in PLAIN or not value or value == DEFAULTS.get(name):
            continue
        raise RecipeError(
            f"{section}.{name}={value}: l2sp, ewc and interpolate look at the update s B A, and "
            "with this it is another",
            "Leave it out, or use kl",
        )
