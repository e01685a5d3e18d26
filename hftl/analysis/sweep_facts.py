"""Define what a sweep of learning rates by layer has come to."""

from typing import Literal

from hftl.analysis.facts import Estimate, Interval, Provenance
from hftl.data.facts import RecordPart


class RateSetting(RecordPart):
    """Hold learning rates as a recipe's `finetune` gives them, under a name for tables."""

    name: str
    learning_rate: float
    layer_decay: float | None = None
    embeddings: float | None = None
    blocks: tuple[float, ...] | None = None
    head: float | None = None

    @property
    def is_single(self) -> bool:
        """Return whether one rate holds for all layers."""
        own = (self.layer_decay, self.embeddings, self.blocks, self.head)
        return all(value is None for value in own)


class Rung(RecordPart):
    """Score a setting that was trained for a share of the recipe's epochs."""

    share: float
    score: float | None
    """On the rows that choose; null where it diverged."""


class SweepTrial(RecordPart):
    """Hold one setting, the mean rate of the layers under it, and the rungs that it reached."""

    setting: RateSetting
    mean_rate: float
    rungs: list[Rung]


class PartEffect(RecordPart):
    """Compare one rate for all with another rate for one part; positive is better."""

    part: str
    factor: float
    """Of the one rate; 0 freezes the part."""
    gain: float | None
    """Null where training diverged."""
    error: float | None
    """The standard error over rows; null where they are of one unit."""
    ci95: Interval | None
    """Over rows, so wide that all parts' intervals hold at once."""

    @property
    def is_clear(self) -> bool:
        """Return whether the interval excludes 0."""
        return self.ci95 is not None and not self.ci95[0] <= 0 <= self.ci95[1]


class HeldComparison(RecordPart):
    """Compare the best layer-wise setting with the best one rate where neither was chosen."""

    rows: int
    seeds: list[int]
    """Others than the search's."""
    single: Estimate
    layerwise: Estimate
    gain: Estimate
    """Of the layer-wise setting; positive is better."""
    outcome: Literal["positive", "equivalent", "negative", "undetermined"]


class SweepAnalysis(RecordPart):
    """Search learning rates by layer, and compare the best with the best one rate.

    Half of validation chooses, on one seed; the other half measures the gain, on fresh seeds.
    """

    source: str
    strategy: str
    metric: str
    lower_is_better: bool
    choosing_rows: int
    search_seed: int
    trainings: int
    trials: list[SweepTrial]
    parts: list[PartEffect]
    part_share: float
    """Of the epochs, that the parts were compared at."""
    single: str
    """The name of the best setting with one rate."""
    layerwise: str
    """The name of the best other setting."""
    winner: str
    """The better of the two where they were chosen."""
    held: HeldComparison
    provenance: Provenance | None = None

    def get_setting(self, name: str) -> RateSetting:
        """Return the setting of a name."""
        return next(trial.setting for trial in self.trials if trial.setting.name == name)
