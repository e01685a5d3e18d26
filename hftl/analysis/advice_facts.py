"""Describe advice and forecast: what is known of a task before anything trains, and what follows.

The record's `advice` is an `AdviceSection`: rules with their numbers, the forecast, and, once arms
are measured, how right both were.
"""

import yaml

from hftl.data.facts import Modality, RecordPart

Interval = tuple[float, float]

RULE_DIFFERS, RECIPE_DIFFERS = "the rule of thumb says", "the recipe trains"
"""How a conflict of the rule with the forecast begins, and one of the recipe with the advice."""


class TaskFeatures(RecordPart):
    """Hold what one pass of the frozen source says of a classification task.

    Accuracies are out of fold, on training rows: validation and test stay unread.
    """

    modality: Modality
    train_rows: int
    """Of one draw."""
    read_rows: int
    """Rows that were scored, all draws together."""
    classes: int
    probe: float
    classical: float
    encoder: str | None = None
    """The source's model type; null in older records."""

    @property
    def gap(self) -> float:
        """Return how far the classical model is ahead of the probe."""
        return self.classical - self.probe

    @property
    def labels_per_class(self) -> float:
        """Return the mean number of training rows of a class."""
        return self.train_rows / self.classes


class StrategyForecast(RecordPart):
    """Hold the accuracy on test that a strategy is expected to reach, with 90 % intervals."""

    strategy: str
    score: float
    score_pi90: Interval
    gain: float
    """Over the better of scratch and the classical model."""
    gain_pi90: Interval
    settings: dict[str, int | float] | None = None
    """Recipe keys of the training that the score is of; null in older records."""

    def format_arm(self) -> str:
        """Return the item of `measure.arms` that trains like this, in one line of YAML."""
        if not self.settings:
            return self.strategy
        arm = {self.strategy: self.settings}
        return yaml.safe_dump(
            arm, default_flow_style=True, sort_keys=False, width=float("inf")
        ).strip()


class Forecast(RecordPart):
    """Hold the forecast of every strategy, the best first, and how good such forecasts were."""

    features: TaskFeatures
    strategies: list[StrategyForecast]
    runs: int
    """That it was fitted on."""
    data_sets: int
    judged: int | None = None
    """Of these runs, those that were forecast without their data sets, which `coverage` and
    `within_point` are of; null in older records."""
    coverage: float
    """The share of scores that the 90 % interval held, on data sets that it was not fitted on."""
    within_point: float
    """The share of those runs in which its choice was within a point of the best strategy."""

    def get_score(self, strategy: str) -> StrategyForecast | None:
        """Return the forecast of a strategy; None where it has none."""
        return next((row for row in self.strategies if row.strategy == strategy), None)


class AdviceRule(RecordPart):
    """Hold one rule: the strategy that it names, if any, the numbers it read, and its source."""

    name: str
    strategy: str | None
    text: str
    source: str


class StrategyOutcome(RecordPart):
    """Compare the forecast of a strategy with what its arm scored on test, the mean over seeds."""

    strategy: str
    arm: str
    score: float
    covered: bool
    """Whether the 90 % interval of the score holds it."""
    gain: float | None = None
    """Over the better of the classical model and scratch; null where either did not run."""
    gain_covered: bool | None = None
    trained_with: dict[str, int | float | None] | None = None
    """Recipe keys of the forecast's training that the arm set otherwise, with the arm's values:
    the score is then of another training than the forecast. Empty where it is the same; null in
    older records."""


class AdviceOutcome(RecordPart):
    """State how right advice and forecast were; only plain arms count, without adapt and retain."""

    best: str | None
    """The best strategy of those that ran; null where fewer than two did."""
    gap: float | None
    """Of the advised strategy to the best, in accuracy; null where the advised one did not run."""
    right: bool | None
    """Whether the gap is a point at most."""
    strategies: list[StrategyOutcome]


class AdviceSection(RecordPart):
    """Advise a strategy: by the forecast where there is one, else by the number of labels."""

    strategy: str
    rules: list[AdviceRule]
    conflicts: list[str]
    """Where rules, forecast and recipe differ or the forecast extrapolates, in a sentence each."""
    forecast: Forecast | None = None
    no_forecast: str | None = None
    """The reason where there is none."""
    outcome: AdviceOutcome | None = None
    """Null until arms are measured, and for another task than classification."""


def name_conflict(conflict: str) -> str:
    """Return what a conflict is about, for the line that shows it: recipe, rule, or the reach of a
    forecast, a caution."""
    if conflict.startswith(RECIPE_DIFFERS):
        return "recipe"
    return "rule" if conflict.startswith(RULE_DIFFERS) else "caution"
