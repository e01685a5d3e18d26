"""Forecast what every strategy would score, from one pass of the frozen source.

Ridge regressions on the probe's and the classical model's accuracy out of fold, the labels a class
and the number of classes, fitted on runs of many small tasks; `benchmarks/forecast.py` writes their
coefficients to `forecast.json`. Intervals are conformal: the 90 % quantile of the errors on data
sets that were left out, in units of the error expected of so many rows.
"""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from math import log, sqrt

from hftl.analysis.advice_facts import Forecast, Interval, StrategyForecast, TaskFeatures
from hftl.data.facts import Modality, RecordPart

MIN_ROWS = 40
"""Training rows below which the probe's accuracy is too uncertain to forecast from."""
SPREAD = 0.03
"""The error of a forecast that more rows do not lessen: a standard deviation of accuracy."""


class LinearFit(RecordPart):
    """Hold a linear model of standardised features."""

    center: list[float]
    scale: list[float]
    weights: list[float]
    bias: float

    def predict(self, values: list[float]) -> float:
        """Return the value for features, (features,)."""
        parts = zip(values, self.center, self.scale, self.weights, strict=True)
        return self.bias + sum(weight * (x - mean) / scale for x, mean, scale, weight in parts)


class Reach(RecordPart):
    """Hold the range of every feature in the runs that were fitted, and their kinds of source."""

    labels: tuple[float, float]
    """A class."""
    classes: tuple[int, int]
    probe: tuple[float, float]
    gap: tuple[float, float]
    modalities: list[Modality]
    encoders: list[str]
    """Model types of the sources."""


class TrainingSettings(RecordPart):
    """Hold the rates and epochs of the runs that were fitted."""

    rates: dict[Modality, dict[str, float]]
    epochs: list[tuple[int, int]]
    """Training rows up to which each number of epochs holds, in order; the last holds beyond."""


class ForecastModel(RecordPart):
    """Hold everything that was fitted, and how it did on data sets that were left out."""

    head: LinearFit
    """The accuracy of `head` on test, minus the probe's out of fold."""
    over_baseline: LinearFit
    """`head` minus the better of scratch and the classical model, on test."""
    over_head: dict[str, LinearFit]
    """Each other strategy minus `head`, on test."""
    score_quantile: dict[str, float]
    gain_quantile: dict[str, float]
    reach: Reach
    training: TrainingSettings
    runs: int
    data_sets: int
    judged: int
    """Runs that were forecast without their data sets, for the figures below."""
    coverage: float
    gain_coverage: float
    within_point: float
    rule_within_point: float
    """The same share for the rule of thumb by the number of labels."""
    adaptations: int
    """Recipes with adaptation among the records."""
    adaptations_better: int
    """Of these, the ones in which it gained beyond noise."""


@cache
def load_forecast_model() -> ForecastModel:
    """Return the model that ships with the package."""
    text = files("hftl.analysis").joinpath("forecast.json").read_text("utf-8")
    return ForecastModel.model_validate_json(text)


def list_values(task: TaskFeatures) -> list[float]:
    """Return what the regressions read."""
    return [task.probe, log(task.labels_per_class), log(task.classes), task.gap]


def list_settings(
    strategy: str, modality: Modality, rows: int, training: TrainingSettings
) -> dict[str, int | float]:
    """Return the recipe keys that a strategy trained with on so many rows; none where solved."""
    rate = training.rates[modality].get(strategy)
    if rate is None:
        return {}
    epochs = choose_epochs(rows, training.epochs)
    settings: dict[str, int | float] = {"finetune.training.learning_rate": rate}
    if strategy == "gradual":
        final = max(2, epochs // 2)
        return settings | {"finetune.gradual.epochs": 1, "finetune.gradual.final_epochs": final}
    return settings | {"finetune.training.num_train_epochs": epochs}


def choose_epochs(rows: int, epochs: Sequence[tuple[int, int]]) -> int:
    """Return the epochs for so many training rows."""
    return next((number for most, number in epochs if rows <= most), epochs[-1][1])


def compute_score_error(task: TaskFeatures) -> float:
    """Return the standard deviation that is expected of a score's forecast."""
    return sqrt(_compute_variance(task.probe, task.read_rows) + SPREAD**2)


def compute_gain_error(task: TaskFeatures) -> float:
    """Return the standard deviation that is expected of a gain's forecast."""
    variance = _compute_variance(task.classical, task.read_rows)
    return sqrt(compute_score_error(task) ** 2 + variance)


def _compute_variance(share: float, rows: int) -> float:
    """Return the variance of a share over rows, not 0 where all rows are right."""
    likely = (share * rows + 1) / (rows + 2)
    return likely * (1 - likely) / rows


def explain_no_forecast(task: TaskFeatures, model: ForecastModel) -> str | None:
    """Return the reasons why a task is out of the forecast's reach; None where it is not."""
    if task.train_rows < MIN_ROWS:
        return f"{task.train_rows} training rows are fewer than the {MIN_ROWS} that it needs"
    reach = model.reach
    if task.modality not in reach.modalities:
        return f"it was fitted on {' and '.join(reach.modalities)} alone, not on {task.modality}"
    reasons = [
        f"{words} {value:g} is outside {least:g} to {most:g} of the fitted runs"
        for words, value, (least, most) in (
            ("number of labels a class", task.labels_per_class, reach.labels),
            ("number of classes", task.classes, reach.classes),
            ("the probe's accuracy out of fold", task.probe, reach.probe),
            ("the classical model's accuracy minus the probe's", task.gap, reach.gap),
        )
        if not least <= value <= most
    ]
    return "; ".join(reasons) or None


def explain_extrapolation(task: TaskFeatures, model: ForecastModel) -> str | None:
    """Return how a task in reach differs from the runs; None where its kind of source is theirs."""
    encoders = model.reach.encoders
    if task.encoder is None or task.encoder in encoders:
        return None
    return (
        f"extrapolates: the source is of type {task.encoder}, and the forecast was fitted on "
        f"{' and '.join(encoders)} alone; its intervals do not allow for the difference"
    )


def forecast_scores(task: TaskFeatures, model: ForecastModel) -> Forecast:
    """Return the forecast of every strategy, the best first; of equals the first in the model."""
    values = list_values(task)
    head = min(1.0, max(0.0, task.probe + model.head.predict(values)))
    gain = model.over_baseline.predict(values)
    over_head = {"head": 0.0} | {n: fit.predict(values) for n, fit in model.over_head.items()}
    rows: list[StrategyForecast] = []
    for strategy, more in over_head.items():
        score = min(1.0, max(0.0, head + more))
        half = model.score_quantile[strategy] * compute_score_error(task)
        gain_half = model.gain_quantile[strategy] * compute_gain_error(task)
        rows.append(
            StrategyForecast(
                strategy=strategy,
                score=score,
                score_pi90=_clip(score - half, score + half, 0.0),
                gain=gain + more,
                gain_pi90=_clip(gain + more - gain_half, gain + more + gain_half, -1.0),
                settings=list_settings(strategy, task.modality, task.train_rows, model.training),
            )
        )
    order = sorted(rows, key=lambda row: -over_head[row.strategy])
    return Forecast(
        features=task,
        strategies=order,
        runs=model.runs,
        data_sets=model.data_sets,
        judged=model.judged,
        coverage=model.coverage,
        within_point=model.within_point,
    )


def _clip(low: float, high: float, least: float) -> Interval:
    """Return an interval within the values that there are."""
    return max(least, low), min(1.0, high)
