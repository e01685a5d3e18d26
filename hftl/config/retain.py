"""Describe the recipe's section `retain`: the regularizers toward the original, and replay.

Each regularizer is one section here and one class, named by `implementation`. The section says all
that is known before anything is loaded: its keys, its limits, its cost and its words on the card.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from hftl.config.section import MAX_WEIGHT, MIN_TEMPERATURE, Section
from hftl.errors import RecipeError
from hftl.finetune.strategies import STRATEGIES

FORM_PHRASES = {
    "relational": "how similar rows are to others",
    "probe": "the probe's classes",
    "features": "the embeddings",
    "mlm": "the masked-language head",
    "clm": "the next token",
    "zero_shot": "the classes told by their names",
}
INPUT_PHRASES = {
    "target": "the task's rows",
    "general": "general rows",
    "both": "the task's rows and general ones",
}


class ChosenWeight(Protocol):
    """Hold the weight of KL that was chosen for all seeds."""

    weight: float


class FisherSource(Protocol):
    """Describe what the Fisher information was taken of: its kind, and how many general rows."""

    kind: str
    rows: int


class ChosenShare(Protocol):
    """Hold the share of the way from the original to the trained weights."""

    alpha: float


class DescribedTraining(Protocol):
    """Describe the record's facts on the training of one seed, as far as `retain` reads them.

    The record's own class comes later in the layers.
    """

    @property
    def kl_weight(self) -> ChosenWeight | None:
        """Return the choice where `weight` is auto."""
        ...

    @property
    def fisher(self) -> FisherSource | None:
        """Return EWC's information; None in records of older versions."""
        ...

    @property
    def interpolation(self) -> ChosenShare | None:
        """Return the choice among the shares of `interpolate`."""
        ...


class RegularizerSection(Section):
    """Describe one regularizer of a recipe; a key `weight` scales its term of the loss."""

    needs_plain_lora: ClassVar[bool] = False
    """True if it reads the update s B A of a LoRA layer, which DoRA and others do not have."""

    weight: Any

    @property
    def implementation(self) -> str:
        """Return the class that computes it, as `module:name`."""
        raise NotImplementedError

    @property
    def is_active(self) -> bool:
        """Return False if it adds nothing to the loss."""
        return self.weight == "auto" or self.weight > 0

    @property
    def reads_general_data(self) -> bool:
        """Return True if it reads general data."""
        return self.mixes_general

    @property
    def mixes_general(self) -> bool:
        """Return True if steps must hold general rows."""
        return False

    @property
    def reads_general_labels(self) -> bool:
        """Return True if it reads the task's labels of general data."""
        return False

    @property
    def reads_task_head(self) -> bool:
        """Return True if it compares the outputs of the task's head."""
        return False

    def check_arm(self, strategy: str, task: str) -> None:
        """Raise a RecipeError if it cannot regularize such an arm."""

    def describe(self, training: DescribedTraining) -> str:
        """Return its clause on the card.

        Args:
            training: the record's facts on the training of one seed.
        """
        raise NotImplementedError

    @property
    def reads_outputs(self) -> bool:
        """Return True if it reads the original's outputs on every row."""
        return False

    def count_extra_steps(self, general_ratio: float) -> float:
        """Return its cost in training, in steps for each row of the target."""
        del general_ratio
        return 0.0

    @property
    def setup_rows(self) -> int:
        """Return how many rows it takes a gradient of before training."""
        return 0


class KL(RegularizerSection):
    """Describe KL to the original: of what distribution, on which inputs, how much of it."""

    weight: float | Literal["auto"] = 0.1
    """auto: of a short grid the one that forgets least within one standard error of the best."""
    on: Literal["probe", "relational", "features", "mlm", "clm", "zero_shot"] = "relational"
    temperature: float = Field(default=1.0, ge=MIN_TEMPERATURE)
    direction: Literal["forward", "reverse"] = "forward"
    inputs: Literal["target", "general", "both"] = "target"
    tau: float | None = Field(default=None, ge=MIN_TEMPERATURE)
    """relational: cosines are divided by it; null: 0.05 for texts, 0.07 for images."""
    anchors: int = Field(default=256, ge=0)
    """relational: rows of the fixed bank that similarities are taken to; 0: the batch's others."""

    @field_validator("weight")
    @classmethod
    def _check_weight(cls, weight: float | str) -> float | str:
        if weight != "auto" and float(weight) < 0:
            raise ValueError(f"a weight below 0 would drive the model away, got {weight}")
        if weight != "auto" and float(weight) > MAX_WEIGHT:
            raise ValueError(f"a weight above {MAX_WEIGHT:g} would overflow, got {weight}")
        return weight

    @property
    def implementation(self) -> str:
        """Return the class by the head that is compared."""
        return {
            "mlm": "hftl.retain.pretraining_kl:MaskedTokenKL",
            "clm": "hftl.retain.pretraining_kl:NextTokenKL",
            "zero_shot": "hftl.retain.pretraining_kl:ZeroShotKL",
        }.get(self.on, "hftl.retain.kl:KLToOriginal")

    @property
    def on_pretraining_head(self) -> bool:
        """Return True if it compares a head that the source brings along."""
        return self.on in ("mlm", "clm", "zero_shot")

    @property
    def mixes_general(self) -> bool:
        """Return True if it is taken on general rows."""
        return self.inputs != "target"

    @property
    def reads_task_head(self) -> bool:
        """Return True if it compares the classes of the task's head."""
        return self.on == "probe"

    @property
    def reads_outputs(self) -> bool:
        """Return True for the forms that compare outputs of the model's own forward."""
        return self.is_active and not self.on_pretraining_head

    def check_arm(self, strategy: str, task: str) -> None:
        """Refuse a temperature that would have no effect."""
        if task == "regression" and self.on == "probe" and self.temperature != 1:
            raise RecipeError(
                "retain.kl.temperature: the KL between two Gaussians has none", "Leave it at 1"
            )

    def count_extra_steps(self, general_ratio: float) -> float:
        """Return a step a row for a head of the source's own: a pass to train through."""
        rows = {"target": 1.0, "general": general_ratio, "both": 1.0 + general_ratio}
        return rows[self.inputs] if self.is_active and self.on_pretraining_head else 0.0

    def describe(self, training: DescribedTraining) -> str:
        """Return its clause on the card; a chosen weight is the same for all seeds."""
        weight = self.weight
        if weight == "auto":
            assert training.kl_weight is not None
            weight = training.kl_weight.weight
        direction = "" if self.direction == "forward" else "reverse "
        return (
            f"{direction}KL of {FORM_PHRASES[self.on]} on {INPUT_PHRASES[self.inputs]}, weight "
            f"{weight:g}, temperature {self.temperature:g}"
        )


class L2SP(RegularizerSection):
    """Describe the distance of the weights to where they started."""

    needs_plain_lora: ClassVar[bool] = True

    weight: float = Field(default=0.01, ge=0, le=MAX_WEIGHT)
    head: float = Field(default=0.0, ge=0, le=MAX_WEIGHT)
    """Of the new head, whose distance is taken to zero."""
    decoupled: bool = False
    """Outside the optimizer's moments, as AdamW decays weights."""

    @property
    def implementation(self) -> str:
        """Return the class."""
        return "hftl.retain.weights:L2SP"

    @property
    def is_active(self) -> bool:
        """Return False if neither encoder nor head is pulled anywhere."""
        return self.weight > 0 or self.head > 0

    def check_arm(self, strategy: str, task: str) -> None:
        """Refuse the decoupled step where the base does not train."""
        if STRATEGIES[strategy].trains_adapter and self.decoupled:
            raise RecipeError(
                "retain.l2sp.decoupled moves weights, and under LoRA the base does not move",
                "Set it to false",
            )

    def describe(self, training: DescribedTraining) -> str:
        """Return its clause on the card."""
        return f"the distance of the weights (L2-SP), weight {self.weight:g}"


class EWC(RegularizerSection):
    """Describe the same distance, each weight by how much the original's outputs depend on it."""

    needs_plain_lora: ClassVar[bool] = True

    weight: float = Field(default=1.0, ge=0, le=MAX_WEIGHT)
    fisher: Literal["features", "exact", "sampled", "empirical"] = "features"
    samples: int = Field(default=256, ge=1)
    """Rows of general data that the Fisher information is taken over."""

    @property
    def implementation(self) -> str:
        """Return the class."""
        return "hftl.retain.fisher:EWC"

    @property
    def reads_general_data(self) -> bool:
        """Return True: the Fisher information is taken on general rows, before training."""
        return True

    @property
    def reads_general_labels(self) -> bool:
        """Return True for the empirical information, which is that of the rows' own labels."""
        return self.fisher == "empirical"

    @property
    def setup_rows(self) -> int:
        """Return the rows of the Fisher information."""
        return self.samples

    def check_arm(self, strategy: str, task: str) -> None:
        """Refuse an information of one label a row for a task of one label a word."""
        if self.fisher != "features" and task == "token-classification":
            raise RecipeError(
                f"retain.ewc.fisher={self.fisher} is of one answer a row, and {task} has one a "
                "word",
                "Use features",
            )

    def describe(self, training: DescribedTraining) -> str:
        """Return its clause on the card; records of older versions lack the information's kind."""
        fisher = training.fisher
        information = "the Fisher information of general rows"
        if fisher is not None:
            information = f"the {fisher.kind} Fisher information of {fisher.rows:,} general rows"
        return f"EWC by {information}, weight {self.weight:g}"


class Replay(Section):
    """Describe general data beside the target's in every batch."""

    ratio: float = Field(default=0.5, gt=0, le=100)
    """Rows of general data for each row of the target."""
    labelled: bool = False
    """Whether their labels count in the loss, too: the column of data.general that is named as the
    one of the task's labels."""
    weight: float = Field(default=1.0, ge=0, le=MAX_WEIGHT)
    """labelled: of their mean loss, beside the mean over the target's rows."""

    @model_validator(mode="after")
    def _check_weight(self) -> Self:
        if not self.labelled and "weight" in self.model_fields_set and self.weight != 1:
            raise ValueError("weight is of the loss on labelled rows, and labelled is false")
        return self

    def describe(self) -> str:
        """Return the card's clause on labelled rows."""
        return (
            f"replay of labelled general rows, {self.ratio:g} for each of the task's, weight "
            f"{self.weight:g}"
        )


def _tag_kl(value: Any) -> str:
    return "several" if isinstance(value, list) else "one"


class Retain(Section):
    """Describe what keeps the model near the original."""

    reference: Literal["start", "source"] = "start"
    """start: the model that fine-tuning starts from, after any adaptation; source: before it."""
    kl: (
        Annotated[
            Annotated[KL, Tag("one")] | Annotated[list[KL], Tag("several"), Field(min_length=1)],
            Discriminator(_tag_kl),
        ]
        | None
    ) = None
    l2sp: L2SP | None = None
    ewc: EWC | None = None
    replay: Replay | None = None
    interpolate: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(
        default=None, min_length=1
    )
    """Shares of the way from the original to the trained weights, of which the best is kept."""

    @property
    def regularizers(self) -> list[RegularizerSection]:
        """Return the sections of all regularizers, in the order of the keys."""
        values = (getattr(self, name) for name in type(self).model_fields)
        sections = (value if isinstance(value, list) else [value] for value in values)
        return [s for part in sections for s in part if isinstance(s, RegularizerSection)]

    @property
    def kl_terms(self) -> list[KL]:
        """Return the KL terms as a list."""
        return [section for section in self.regularizers if isinstance(section, KL)]

    @property
    def has_auto_weight(self) -> bool:
        """Return True if a weight of KL is still to be chosen."""
        return any(kl.weight == "auto" for kl in self.kl_terms)

    @property
    def mixes_general(self) -> bool:
        """Return True if steps hold general rows."""
        return self.replay is not None or any(s.mixes_general for s in self.regularizers)

    @property
    def reads_general_data(self) -> bool:
        """Return True if general data are read."""
        return self.mixes_general or any(s.reads_general_data for s in self.regularizers)

    @property
    def reads_general_labels(self) -> bool:
        """Return True if the task's labels of general data are read."""
        replays_labels = self.replay is not None and self.replay.labelled
        return replays_labels or any(s.reads_general_labels for s in self.regularizers)

    @property
    def needs_plain_lora(self) -> bool:
        """Return True if the update of a LoRA layer must be s B A."""
        by_section = any(section.needs_plain_lora for section in self.regularizers)
        return by_section or self.interpolate is not None

    def describe(self, training: Sequence[DescribedTraining]) -> list[str]:
        """Return the card's clauses.

        Args:
            training: the record's facts on the training of each seed.
        """
        clauses = [section.describe(training[0]) for section in self.regularizers]
        if self.replay is not None and self.replay.labelled:
            clauses.append(self.replay.describe())
        parts = [f"kept near the original by {' and '.join(clauses)}"] if clauses else []
        if self.interpolate:
            chosen = [facts.interpolation for facts in training]
            shares = ", ".join(f"{share.alpha:g}" for share in chosen if share is not None)
            parts.append(f"interpolated with the original, {shares} of the way")
        return parts
