"""Define the section `finetune` of a recipe: the strategy and its training."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from hftl.config.section import MAX_WEIGHT, MIN_TEMPERATURE, Section, name_by_label
from hftl.config.upstream_args import validate_lora_args, validate_training_args
from hftl.errors import RecipeError
from hftl.finetune.strategies import FINETUNE_STRATEGIES, STRATEGIES, StrategySpec

if TYPE_CHECKING:
    Strategy = str
else:
    Strategy = Literal[FINETUNE_STRATEGIES]

ClassWeight = Literal["balanced"] | Mapping[str, float] | None
"""How classes weigh; one that a mapping leaves out weighs 1."""
DEFAULT_TRAINING = {"learning_rate": 5.0e-4, "num_train_epochs": 5}
DEFAULT_LORA = {"r": 8, "lora_alpha": 16}


class Rates(Section):
    """Set learning rates of the parts of a model; the default is `training.learning_rate`."""

    embeddings: float | None = Field(default=None, ge=0)
    blocks: list[Annotated[float, Field(ge=0)]] | None = Field(default=None, min_length=1)
    """From the bottom to the top; the last one holds for all blocks above."""
    head: float | None = Field(default=None, ge=0)


class Gradual(Section):
    """Set the phases' length in gradual unfreezing (Howard & Ruder 2018, arXiv:1801.06146)."""

    epochs: float = Field(default=1, gt=0)
    """Of every phase, at most, instead of `training.num_train_epochs`."""
    final_epochs: float = Field(default=0, ge=0)
    """Of a last phase, in which everything trains at a low rate from the best weights so far; 0: no
    such phase."""
    final_rate: float = Field(default=0.1, gt=0)
    """Factor on the learning rate in that phase."""


class ZeroShot(Section):
    """Set the texts that stand for the classes in zero-shot classification.

    A class is its descriptions, or every template with its words (`data.label_names`, or the
    label). Several texts of a class are an ensemble.
    """

    templates: list[str] | None = Field(default=None, min_length=1)
    """Texts with {} for a class's words. null: `a photo of a {}.` for pictures, `This example is
    {}.` for a source with an entailment head, the words alone for other sources of texts."""
    descriptions: Annotated[Mapping[str, str | list[str]], BeforeValidator(name_by_label)] = {}
    """By label: a whole text, or a list of them, instead of the templates."""
    temperature: float = Field(default=0.05, ge=MIN_TEMPERATURE)
    """Divides the cosines of texts; a pair of image and text encoder has learned its own."""

    @field_validator("templates")
    @classmethod
    def _check_templates(cls, templates: list[str] | None) -> list[str] | None:
        for template in templates or ():
            if template.count("{}") != 1:
                raise RecipeError(
                    f"finetune.zero_shot.templates: {template!r} has {template.count('{}')} places "
                    "{} for a class's words, expected one",
                    "Write it as 'a photo of a {}.'",
                )
        return templates

    @field_validator("descriptions")
    @classmethod
    def _check_descriptions(
        cls, descriptions: Mapping[str, str | list[str]]
    ) -> Mapping[str, str | list[str]]:
        for label, texts in descriptions.items():
            listed = [texts] if isinstance(texts, str) else texts
            if not listed or not all(text.strip() for text in listed):
                raise RecipeError(
                    f"finetune.zero_shot.descriptions: the text of {label!r} is empty", "Write it"
                )
        return descriptions

    def list_prompts(self, label: str, words: str, template: str) -> list[str]:
        """Return the texts that stand for a class.

        Args:
            label: the class.
            words: for it.
            template: where the recipe gives none.
        """
        described = self.descriptions.get(label)
        if described is not None:
            return [described] if isinstance(described, str) else list(described)
        return [text.replace("{}", words) for text in self.templates or [template]]


class Finetune(Section):
    """Describe the strategy and its training. `training` is transformers', `lora` is peft's."""

    strategy: Strategy = "lora"
    pooling: Literal["native", "mean", "cls", "cls+mean", "embedding", "last"] = "native"
    """native: the stock class's. mean: of tokens or patches. cls: the first token. cls+mean: both,
    of pictures. embedding: what a pair of image and text encoders (CLIP) compares with texts. last:
    the last token of a vision-language source's prompt."""
    head_init: Literal["probe", "random", "zero_shot"] = "probe"
    blocks: int = Field(default=2, ge=1)
    class_weight: ClassWeight = None
    """`balanced`: n / (classes * count) of the arm's own training rows; or a weight by label. With
    several labels a row, `balanced` weighs each label's positives and negatives so, and a mapping
    its positives."""
    focal_gamma: float = Field(default=0.0, ge=0)
    """Exponent of focal loss (Lin et al. 2017, arXiv:1708.02002); 0: cross-entropy."""
    patience: int | None = Field(default=None, ge=1)
    """Evaluations without improvement on validation before training stops; null: never."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Each block's learning rate is that of the one above it times this; null: one rate for all."""
    lr: Rates | None = None
    gradual: Gradual = Gradual()
    zero_shot: ZeroShot = ZeroShot()
    cache: Literal["auto", "always", "never"] = "auto"
    """Whether frozen blocks below those that train run once a row, and later steps read what they
    returned from the run folder; auto: where that is faster. Results are the same but for rounding.
    """
    freeze_batchnorm: bool | None = None
    """Whether BatchNorm keeps the source's running statistics where it trains; null: below 1 000
    training rows."""
    lora: dict[str, Any] = DEFAULT_LORA
    training: dict[str, Any] = DEFAULT_TRAINING

    @property
    def spec(self) -> StrategySpec:
        """Return the facts about the strategy."""
        return STRATEGIES[self.strategy]

    @property
    def learning_rates(self) -> dict[str, float | list[float] | None] | None:
        """Return `lr` as `TransferTrainer` takes it."""
        return None if self.lr is None else self.lr.model_dump()

    @model_validator(mode="after")
    def _check_phase_length(self) -> Self:
        if self.spec.schedule == "phases" and self.training.get("max_steps", -1) > 0:
            raise RecipeError(
                "finetune.training.max_steps is of one training, and gradual unfreezing is several",
                "Use finetune.gradual.epochs",
            )
        return self

    @field_validator("class_weight", mode="before")
    @classmethod
    def _check_class_weight(cls, value: Any) -> Any:
        if value is None or value == "balanced":
            return value
        if not isinstance(value, dict) or not value:
            raise RecipeError(
                f"finetune.class_weight is {value!r}", "Use balanced, or {label: weight, ...}"
            )
        for label, weight in value.items():
            is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not is_number or not 0 <= weight <= MAX_WEIGHT:
                raise RecipeError(
                    f"finetune.class_weight: {label!r} weighs {weight!r}, expected a number "
                    f"from 0 to {MAX_WEIGHT:g}",
                    "Correct it",
                )
        return {label: float(weight) for label, weight in name_by_label(value).items()}

    @field_validator("training", mode="before")
    @classmethod
    def _validate_training(cls, training: Any) -> dict[str, object]:
        return DEFAULT_TRAINING | validate_training_args("finetune", training)

    @field_validator("lora", mode="before")
    @classmethod
    def _validate_lora(cls, lora: Any) -> dict[str, object]:
        return DEFAULT_LORA | validate_lora_args("finetune", lora)
