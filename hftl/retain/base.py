"""Whether the weights under an adapter stay the original's."""

from typing import Any

from hftl.errors import RecipeError

UNCHANGED = (None, True, "gaussian", "orthogonal")
"""Values of peft's `init_lora_weights` that leave the base as it is and start from no update."""


def check_unchanged_base(lora: dict[str, Any], section: str) -> None:
    """Refuses LoRA under which the base, with the adapter off, is not the original.

    PiSSA, OLoRA, CorDA and LoftQ write another base; a trained `bias` changes it.

    Args:
        lora: fields of `peft.LoraConfig`.
        section: where they stand in the recipe.

    Raises:
        RecipeError: naming the field.
    """
    begins = lora.get("init_lora_weights")
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
    """Refuses LoRA whose update of a weight is not s B A.

    Raises:
        RecipeError: naming the field.
    """
    if lora.get("use_dora"):
        raise RecipeError(
            f"{section}.use_dora: l2sp and ewc look at the update s B A, and DoRA's is another",
            "Leave it out, or use kl",
        )
