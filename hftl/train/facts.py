"""Describe trainings: the parts of the record that say what was checked, tried and trained.

The stage that trains builds the part, its file stores it, and the record embeds it as it is.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field

from hftl.data.facts import OpenPart, RecordPart
from hftl.errors import NumericError

Number = int | float
"""A number of another phase's file, which keeps its JSON form: 3 stays 3."""


def _drop_nonfinite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Score = Annotated[float | None, BeforeValidator(_drop_nonfinite)]
"""The value of a metric; null where it is not finite, as JSON holds no such number."""


class SplitMetrics(RecordPart):
    """Hold every metric of one arm and seed, by name."""

    validation: Mapping[str, Score]
    test: Mapping[str, Score]


class LearningRate(RecordPart):
    """Describe the learning rate of one part of an arm's model."""

    part: str
    parameters: int
    decayed: int
    """Parameters that weight decay applies to."""
    rate: float


FaultKind = Literal[
    "normalization", "rescale", "channels", "casing", "tokenizer", "label map", "leakage",
    "near labels", "label shift", "missing class", "groups", "long inputs", "label errors",
    "bad rows",
]  # fmt: skip
"""What can be wrong with a recipe's inputs or labels before anything trains."""


class Finding(RecordPart):
    """Describe a fault of the inputs or labels: what, where, how sure, and what to do."""

    kind: FaultKind
    what: str
    where: list[str] = Field(default_factory=list[str])
    """Places of the user's files, the first few; absent from a published record."""
    confidence: Literal["certain", "likely", "possible"]
    evidence: str = ""
    """What the confidence rests on; empty where it was counted."""
    rows: int | None = None
    """Rows of test that are concerned, where the verdict counts them."""
    cost: float | None = None
    """Points of the probe's accuracy that the fault costs, where it was measured: .05 is five."""
    fix: str

    @property
    def sentence(self) -> str:
        """Return the warning in one sentence, without the places."""
        sure = "" if self.confidence == "certain" else f"{self.confidence}: "
        shown = f" ({sure}{self.evidence})" if self.evidence else ""
        return f"{self.what}{shown}; {self.fix}"


class BaselineScore(RecordPart):
    """Hold what one baseline scores on validation, with its interval over rows."""

    arm: str
    score: float
    ci95: tuple[float, float] | None


class BaselineCheck(RecordPart):
    """Compare the baselines that need no training on validation: is there anything to transfer?"""

    metric: str
    train_rows: int
    validation_rows: int
    scores: list[BaselineScore]
    gain: float
    """Of the probe over the better of majority and classical; positive is better."""
    gain_ci95: tuple[float, float] | None
    over: str


class CheckFacts(RecordPart):
    """Describe the inputs that the preflight saw, and its warnings."""

    warnings: list[str]
    findings: list[Finding] = Field(default_factory=list[Finding])
    """The faults among the warnings; those that need the source's features by `hftl check` alone.
    """
    examined: str | None = None
    """What the faults that need features were sought on, in words."""
    baseline: BaselineCheck | None = None
    median_tokens: Number | None = None
    max_tokens: int | None = None
    """Tokens after which a text is cut; null in older records."""
    truncated: float | None = None
    """Share of texts that are cut."""
    unknown_tokens: float | None = None
    median_side: float | None = None
    """Of images, in pixels."""
    image_size: Number | None = None
    enlarged: float | None = None
    elongated: float | None = None
    learning_rates: dict[str, list[LearningRate]] | None = None
    """By the name of an arm whose parts have their own."""


class TriedKLWeight(RecordPart):
    """Hold the outcome of one weight: the score on validation, its error, what was forgotten."""

    weight: float
    score: float
    error: float
    forgotten: float


class ChosenKLWeight(OpenPart):
    """Hold the weight of KL that was chosen, once for all seeds."""

    weight: float
    tried: list[TriedKLWeight] = Field(default_factory=list[TriedKLWeight])


class FisherFacts(OpenPart):
    """Describe the Fisher information that EWC weighs by."""

    kind: str
    rows: int
    draws: int | None = None
    """Labels, or directions of features, that were drawn for each row; null where none was."""
    scale: float | None = None
    """The mean over all parameters that the information was divided by."""
    mean: float | None = None
    """The mean that is left."""


class TriedAlpha(RecordPart):
    """Hold the score on validation of one share of the way, and its standard error."""

    alpha: float
    score: float
    error: float


class InterpolationFacts(OpenPart):
    """Hold the share of the way from the original to the trained weights."""

    alpha: float
    tried: list[TriedAlpha] = Field(default_factory=list[TriedAlpha])


class HeadFacts(RecordPart):
    """Compare the loss of the head that KL reads with that of the label frequencies alone."""

    loss: float
    shares: float
    weak: bool


class TargetScaleFacts(RecordPart):
    """Hold mean and standard deviation of the targets that an arm trained on."""

    mean: float
    sd: float


class ClassWeightFacts(RecordPart):
    """Hold the weight of each class, by label, and the training rows that it was computed from."""

    weights: Mapping[str, float]
    negative: Mapping[str, float] | None = None
    """With several labels a row: of the rows that have the label not."""
    counts: Mapping[str, int]
    """Labelled rows, or words, of each class."""


class TrainingFacts(OpenPart):
    """Describe the training of one arm and seed; each strategy sets the keys that apply to it."""

    penalty: float | None = None
    """Of a solved arm: the strength of its regularization."""
    prompts: Mapping[str, list[str]] | None = None
    """Of zero-shot classification: the texts that stand for each class, by label."""
    learning_rate: float | None = None
    precision: str | None = None
    epochs: Number | None = None
    best_epoch: Number | None = None
    kl_weight: ChosenKLWeight | None = None
    fisher: FisherFacts | None = None
    interpolation: InterpolationFacts | None = None
    target_scale: TargetScaleFacts | None = None
    class_weights: ClassWeightFacts | None = None
    freeze_batchnorm: bool | None = None
    """Of a model with BatchNorm: whether all of its running statistics stayed as they were."""
    micro_batch: int | None = None
    """Rows that ran at once since memory ran out; a step held as many as before."""
    general_rows: int | None = None
    """Rows of general data that were mixed into the steps."""
    head_opinion: HeadFacts | None = None
    forgotten: float | None = None
    """Where a weight of KL is tried: the share of nearest neighbours that was lost."""
    history: list[dict[str, Number]] | None = None
    """Losses and validation metrics by epoch."""

    def merge(self, other: Self) -> Self:
        """Return the facts with those that another holds."""
        return self.model_copy(update={k: getattr(other, k) for k in other.model_fields_set})


class ArmEntry(RecordPart):
    """Describe one arm and seed."""

    arm: str
    seed: int
    strategy: str
    metrics: SplitMetrics
    trainable_parameters: int
    training: TrainingFacts

    def get_score(self, split: Literal["validation", "test"], metric: str) -> float:
        """Return a metric that figures are computed from.

        Raises:
            NumericError: if it is not finite.
        """
        score = (self.metrics.test if split == "test" else self.metrics.validation)[metric]
        if score is None:
            raise NumericError(
                f"{self.arm} seed {self.seed}: {metric} on {split} is not finite",
                "Set measure.metric to another one and run again; no arm is trained anew",
            )
        return score


class ArmFile(ArmEntry):
    """Hold the metrics.json of an arm's folder."""

    timings: dict[str, float]

    def drop_timings(self) -> ArmEntry:
        """Return the entry of the record, which has the timings of all arms in one place."""
        return ArmEntry(**{name: getattr(self, name) for name in ArmEntry.model_fields})


class TriedRate(RecordPart):
    """Hold the metrics on validation of one learning rate; null where it diverged."""

    learning_rate: float
    metrics: Mapping[str, Score] | None
    diverged: str | None = None


class TrialFacts(RecordPart):
    """Hold what a folder of the search keeps of one training beside its weights."""

    score: TriedRate
    training: TrainingFacts | None = None
    """None where it diverged, and has no weights."""
    timings: dict[str, float] = Field(default_factory=dict[str, float])


class ScratchSearch(OpenPart):
    """Describe the search of the learning rate and of the length of training from scratch."""

    learning_rate: float
    share: float = 1.0
    """Of the whole budget, what each seed trains for: `SEARCH_SHARE` where the best rate scored
    more over that than over the whole."""
    beyond: list[float] = Field(default_factory=list[float])
    """Rates that were tried past those of the recipe."""
    at_edge: bool = False
    """Whether the best is still the lowest or highest tried."""
    tried: list[TriedRate] = Field(default_factory=list[TriedRate])
    """Rates over `SEARCH_SHARE` of the budget."""
    whole: TriedRate | None = None
    """The best of them over the whole budget."""
