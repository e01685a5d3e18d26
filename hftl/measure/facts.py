"""Describe slices and scores: where a model is better or worse, and what its scores mean."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from hftl.data.facts import RecordPart, SliceKind

MIN_JUDGED_ROWS = 50
"""Test rows from which on a slice that loses holds the verdict."""

Interval = tuple[float, float]
GainOutcome = Literal["positive", "equivalent", "negative", "undetermined"]


@dataclass(frozen=True)
class Estimate:
    """Hold a value and its 95 % interval; None where there is none."""

    value: float
    ci95: Interval | None


class SliceScore(RecordPart):
    """Describe one slice of the test rows: the own arm's score, and its gain over the baseline."""

    column: str
    value: str
    kind: SliceKind
    rows: int
    score: float
    """The mean over seeds."""
    score_ci95: Interval | None
    gain: float | None
    """Positive is better; None without a baseline."""
    gain_ci95: Interval | None
    """Of this slice alone. None with one seed or one group of rows."""
    p_value: float | None
    """Of no gain, two-sided, corrected for the number of slices by Holm's method."""
    outcome: Literal["better", "worse", "within noise"] | None
    """Beyond noise after the correction; None without a p-value."""

    @property
    def phrase(self) -> str:
        """Return the slice in words: `city = Oslo`, `length > 12, <= 30`, `city is missing`."""
        if self.kind == "missing":
            return f"{self.column} is missing"
        if self.kind == "rare":
            return f"{self.column}: rare values"
        return f"{self.column} {'= ' if self.kind == 'value' else ''}{self.value}"


class SliceColumn(RecordPart):
    """Describe how one column was cut."""

    name: str
    cuts: list[float] = Field(default_factory=list[float])
    """Quantiles at which numbers were cut; empty where values are slices."""
    pooled_values: int
    """Values that are in one slice together, as each is in few rows."""


class SliceSection(RecordPart):
    """Describe every slice; those of one column share no row and have all."""

    baseline: str | None
    """The arm that gains are over, that of the transfer gain."""
    columns: list[SliceColumn]
    slices: list[SliceScore]

    @property
    def losers(self) -> list[SliceScore]:
        """Return the slices that are worse than the baseline beyond noise, the worst first."""
        worse = [part for part in self.slices if part.outcome == "worse"]
        return sorted(worse, key=lambda part: part.gain or 0.0)


class ScoreEstimate(RecordPart):
    """Hold a score on test and its 95 % interval over items; None with one group of rows."""

    value: float
    ci95: Interval | None


class CalibrationScores(RecordPart):
    """Hold how far probabilities are off: less is better."""

    ece: ScoreEstimate
    """The expected calibration error, of the predicted class; multi-label: the mean over labels."""
    brier: ScoreEstimate
    """The mean squared error, summed over classes; multi-label: the mean over labels."""


class LabelCurve(RecordPart):
    """Describe how the probability of one label comes of its logit.

    By Platt's method it is sigmoid(slope * logit + intercept); isotonic, it is interpolated between
    the points of logits and probabilities, constant beyond them; `none` leaves the sigmoid.
    """

    method: Literal["platt", "isotonic", "none"]
    slope: float = 1.0
    intercept: float = 0.0
    logits: list[float] = Field(default_factory=list[float])
    probabilities: list[float] = Field(default_factory=list[float])


class CalibrationSection(RecordPart):
    """Describe the probabilities of the published weights on test."""

    temperature: float | None
    """Fitted on validation, of few rows drawn towards 1; `predict` divides logits by it. None where
    validation is all right or no finite one is best, and for multi-label."""
    likeliest: float | None = None
    """The temperature of greatest likelihood, which is not drawn; null in older records."""
    labels: dict[str, LabelCurve] | None = None
    """Multi-label: fitted on validation; `predict` gives these probabilities."""
    bins: int
    """Of equal mass, that the calibration error is computed in."""
    before: CalibrationScores
    after: CalibrationScores | None
    """With the temperature, or the curves of the labels; None where there is neither."""
    change: ScoreEstimate | None = None
    """Of the Brier score by them, above 0 where they make it worse, with the interval of the mean
    difference of each row; null where there is neither, and in older records."""
    confusion: list[list[int]] | None = None
    """Rows of validation by their class and by the predicted one: what shares are estimated by."""


class ThresholdSection(RecordPart):
    """Describe the probabilities above which labels are predicted, and what they are worth.

    They are fitted on validation and measured on test, of the published weights. The other figures
    of the record are at .5, as is every arm's part in the gain.
    """

    metric: Literal["f1", "micro_f1"]
    thresholds: dict[str, float]
    """Of the sigmoid of each label's logit, before calibration."""
    before: dict[str, ScoreEstimate]
    """Every metric on test at .5."""
    after: dict[str, ScoreEstimate]
    """At the thresholds."""
    gain: ScoreEstimate
    """In `metric` on test, the interval that of the difference."""


class CoverageFigure(RecordPart):
    """Describe prediction sets of one nominal coverage on test."""

    coverage: float
    held: ScoreEstimate
    """The share of rows whose set holds what is true."""
    size: float
    """The mean number of classes in a set, for a target the width of the interval."""


class ConformalSection(RecordPart):
    """Hold what prediction sets are made from, and how often they held on test."""

    rows: int
    """Of validation."""
    groups: int | None = None
    """That the rows come in, where the recipe names some."""
    scores: list[float]
    """How far each row of validation is from its label, ascending; of many rows a part, see
    `measure.conformal`."""
    test: list[CoverageFigure]


class AbstentionPoint(RecordPart):
    """Describe the surest rows of test."""

    share: float
    """Of all rows."""
    accuracy: ScoreEstimate
    score: float
    """The least score among them, as `predict` gives it."""


class AbstentionSection(RecordPart):
    """Describe what is gained by leaving the least sure rows of test unanswered."""

    points: list[AbstentionPoint]
    """By share, ascending; the last is of all rows."""
    aurc: ScoreEstimate
    """The area under the risk-coverage curve: the mean error rate over all shares."""
    best_aurc: float
    """That of scores which put every mistake last."""
