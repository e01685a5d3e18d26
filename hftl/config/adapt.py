"""Define the section `adapt` of a recipe: continued pre-training, in one stage or several."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from hftl.config.section import Section
from hftl.config.upstream_args import validate_lora_args, validate_training_args
from hftl.errors import RecipeError

Objective = Literal["mlm", "clm", "mae"]
Method = Literal["full", "lora", "lora+blocks"]
DEFAULT_ADAPT_TRAINING = {"num_train_epochs": 10, "warmup_steps": 0.06, "weight_decay": 0.01}
DEFAULT_ADAPT_LORA = {"r": 16, "lora_alpha": 32}
DEFAULT_ADAPT_RATES = {
    ("mlm", "full"): 1.0e-4, ("mlm", "lora"): 5.0e-4, ("mlm", "lora+blocks"): 3.0e-4,
    ("clm", "full"): 5.0e-5, ("clm", "lora"): 2.0e-4, ("clm", "lora+blocks"): 1.0e-4,
    ("mae", "full"): 5.0e-5, ("mae", "lora"): 5.0e-4, ("mae", "lora+blocks"): 3.0e-4,
}  # fmt: skip
DEFAULT_MASK_RATIOS = {"mlm": 0.15, "mae": 0.75}
KEYS_OF_OBJECTIVES = {
    "mask_ratio": ("mlm", "mae"), "whole_words": ("mlm",), "pack": ("mlm", "clm"),
    "norm_pix_loss": ("mae",), "decoder": ("mae",), "distill": ("mae",),
}  # fmt: skip
"""Keys that not every objective reads."""
DEFAULT_TOLERANCES = {"probe": 0.01, "general": 0.1, "neighbours": 0.5, "off": 0.0}
"""By guard: a point of the probe's metric, a tenth of a nat of the general loss (with mae a tenth
of the loss), half of the neighbours."""


class Decoder(Section):
    """Describe the decoder of masked images, for a source without one."""

    width: int = Field(default=192, ge=8)
    depth: int = Field(default=2, ge=1)


class Adapt(Section):
    """Describe continued pre-training on unlabelled inputs, and the guard against forgetting."""

    objective: Objective
    """Predict masked tokens, the next token of a decoder, or masked patches."""
    corpus: Literal["task", "unlabeled"] | None = None
    """`task`: train's own inputs, before shots (TAPT); `unlabeled`: data.unlabeled (DAPT); null:
    unlabeled where it is given (Gururangan et al. 2020, arXiv:2004.10964)."""
    method: Method = "full"
    mask_ratio: float | None = Field(default=None, gt=0, lt=1)
    """mlm, mae: share of the words, or of the patches, that are hidden; null: .15, .75."""
    whole_words: bool = True
    pack: bool = True
    """mlm, clm: documents side by side in blocks of data.max_length, or each by itself."""
    norm_pix_loss: bool = True
    decoder: Decoder = Decoder()
    distill: float = Field(default=0.0, ge=0)
    """mae: weight of the distance to the original's features (GFM)."""
    lora: dict[str, Any] = DEFAULT_ADAPT_LORA
    blocks: int = Field(default=1, ge=1)
    """lora+blocks: how many top blocks train whole."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the corpus that never trains; the loss on it is what adaptation is judged by."""
    transductive: bool = False
    """Lets inputs of validation and test into the corpus."""
    guard: Literal["probe", "general", "neighbours", "off"] | None = None
    """The measure that must not get worse; null: probe, without a task neighbours."""
    tolerance: float | None = Field(default=None, ge=0)
    """By how much the guard may get worse, in its own unit; null: see `DEFAULT_TOLERANCES`. A share
    of the start where that unit says nothing: general with mae, whose loss is an error of pixels,
    and the probe of a regression."""
    patience: int | None = Field(default=3, ge=1)
    """Evaluations that are not the best so far before it stops; null: never."""
    training: dict[str, Any]

    @property
    def masked_share(self) -> float:
        """Return the share of words or patches that are hidden: none under clm."""
        return self.mask_ratio or 0.0

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, tree: Any) -> Any:
        """Fill in the defaults that depend on the objective and the method."""
        if not isinstance(tree, dict):
            return tree
        objective, method = str(tree.get("objective")), str(tree.get("method", "full"))
        rate = DEFAULT_ADAPT_RATES.get((objective, method), 1.0e-4)
        training = validate_training_args("adapt", tree.get("training") or {})
        values: dict[str, object] = {
            "mask_ratio": DEFAULT_MASK_RATIOS.get(objective),
            **{key: value for key, value in tree.items() if value is not None},
        }
        return values | {"training": DEFAULT_ADAPT_TRAINING | {"learning_rate": rate} | training}

    @model_validator(mode="after")
    def _check_objective_keys(self) -> Self:
        """Refuse a key that the objective does not read."""
        for key, objectives in KEYS_OF_OBJECTIVES.items():
            is_given = getattr(self, key) != type(self).model_fields[key].default
            if self.objective not in objectives and is_given:
                raise RecipeError(
                    f"adapt.{key} is read by the objective {' and '.join(objectives)}, and "
                    f"adapt.objective is {self.objective}",
                    "Remove it",
                )
        return self

    @field_validator("lora", mode="before")
    @classmethod
    def _validate_lora(cls, lora: Any) -> dict[str, object]:
        return DEFAULT_ADAPT_LORA | validate_lora_args("adapt", lora)


def _tag_stages(value: Any) -> str:
    """Return the tag by which pydantic chooses between one stage and a list."""
    return "several" if isinstance(value, list) else "one"


Stages = Annotated[
    Annotated[Adapt, Tag("one")] | Annotated[list[Adapt], Tag("several"), Field(min_length=1)],
    Discriminator(_tag_stages),
]
