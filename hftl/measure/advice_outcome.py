"""Hold advice and forecast against what the arms scored, in one record or in many."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hftl.analysis.advice_facts import AdviceOutcome, AdviceSection, Forecast, StrategyOutcome
from hftl.config.recipe import Arm
from hftl.measure.record import Record
from hftl.train.facts import ArmEntry

RIGHT = 0.01
"""The gap to the best strategy within which advice counts as right: a point."""
SCORE = "accuracy"
"""What the forecast is of, whatever the recipe's metric."""
BASELINES = ("scratch", "classical")


def judge_advice(
    section: AdviceSection, arms: Sequence[Arm], entries: Sequence[ArmEntry]
) -> AdviceOutcome | None:
    """Return how right advice and forecast were; None where no arm has an accuracy.

    An arm with adaptation or retention is another training than the one that was forecast.
    """
    scores = {arm.name: _average(arm.name, entries) for arm in arms}
    known = {name: score for name, score in scores.items() if score is not None}
    if not known:
        return None
    plain: dict[str, tuple[Arm, float]] = {}
    for arm in _put_forecast_first(arms, section.forecast):
        is_plain = not arm.stages and arm.retain is None and not arm.spec.is_baseline
        if is_plain and arm.name in known:
            plain.setdefault(arm.strategy, (arm, known[arm.name]))
    over = [known[name] for name in BASELINES if name in known]
    baseline = max(over) if len(over) == len(BASELINES) else None
    forecast = section.forecast
    outcomes = [] if forecast is None else _compare_scores(forecast, plain, baseline)
    best = max(plain, key=lambda name: plain[name][1]) if len(plain) > 1 else None
    gap = None
    if best is not None and section.strategy in plain:
        gap = plain[best][1] - plain[section.strategy][1]
    return AdviceOutcome(
        best=best, gap=gap, right=None if gap is None else gap <= RIGHT, strategies=outcomes
    )


def _put_forecast_first(arms: Sequence[Arm], forecast: Forecast | None) -> list[Arm]:
    """Return the arms, those that train as their strategy was forecast before all others."""
    return sorted(arms, key=lambda arm: bool(_list_differences(arm, forecast)))


def _list_differences(arm: Arm, forecast: Forecast | None) -> dict[str, int | float | None] | None:
    """Return the keys that an arm's training sets otherwise than the forecast's, with its values;
    None where no forecast names its training."""
    row = None if forecast is None else forecast.get_score(arm.strategy)
    if row is None or row.settings is None:
        return None
    own = {key: _read_setting(arm, key) for key in row.settings}
    return {key: value for key, value in own.items() if value != row.settings[key]}


def _read_setting(arm: Arm, key: str) -> int | float | None:
    """Return the value of a recipe key such as `finetune.training.learning_rate` in an arm."""
    value: Any = {"finetune": arm.finetune.model_dump()}
    for part in key.split("."):
        value = None if value is None else value.get(part)
    return value


def _average(arm: str, entries: Sequence[ArmEntry]) -> float | None:
    """Return an arm's accuracy on test, the mean over seeds; None where one has none."""
    scores = [entry.metrics.test.get(SCORE) for entry in entries if entry.arm == arm]
    known = [score for score in scores if score is not None]
    return float(np.mean(known)) if known and len(known) == len(scores) else None


def _compare_scores(
    forecast: Forecast, plain: dict[str, tuple[Arm, float]], baseline: float | None
) -> list[StrategyOutcome]:
    outcomes: list[StrategyOutcome] = []
    for row in forecast.strategies:
        if row.strategy not in plain:
            continue
        arm, score = plain[row.strategy]
        gain = None if baseline is None else score - baseline
        low, high = row.gain_pi90
        outcomes.append(
            StrategyOutcome(
                strategy=row.strategy,
                arm=arm.name,
                score=score,
                covered=row.score_pi90[0] <= score <= row.score_pi90[1],
                gain=gain,
                gain_covered=None if gain is None else low <= gain <= high,
                trained_with=_list_differences(arm, forecast),
            )
        )
    return outcomes


@dataclass(frozen=True)
class AdviceHistory:
    """Count over many runs how often advice and forecast were right.

    Attributes:
        runs: that were read.
        without: of these, those whose record holds no outcome of advice.
        scores: forecast scores, and of these those within their interval.
        gains: the same of gains.
        advised: runs in which the advised strategy and another one ran, and of these those in
            which it was within a point of the best.
        errors: measured minus forecast score, by strategy, the mean.
        otherwise: of the forecast scores, those of arms that trained at other rates or epochs than
            the forecast's, and of these those within its interval.
    """

    runs: int
    without: int
    scores: tuple[int, int]
    gains: tuple[int, int]
    advised: tuple[int, int]
    errors: dict[str, float]
    otherwise: tuple[int, int]


def count_history(records: Sequence[Record]) -> AdviceHistory:
    """Return how often the advice and the forecasts of records were right."""
    sections = [record.advice for record in records if record.advice and record.advice.outcome]
    outcomes = [section.outcome for section in sections if section.outcome]
    rows = [row for outcome in outcomes for row in outcome.strategies]
    gains = [row.gain_covered for row in rows if row.gain_covered is not None]
    rights = [outcome.right for outcome in outcomes if outcome.right is not None]
    errors: dict[str, list[float]] = {}
    for section in sections:
        for row in section.outcome.strategies if section.outcome else []:
            expected = section.forecast and section.forecast.get_score(row.strategy)
            if expected:
                errors.setdefault(row.strategy, []).append(row.score - expected.score)
    return AdviceHistory(
        runs=len(records),
        without=len(records) - len(outcomes),
        scores=(len(rows), sum(row.covered for row in rows)),
        gains=(len(gains), sum(gains)),
        advised=(len(rights), sum(rights)),
        errors={name: float(np.mean(values)) for name, values in errors.items()},
        otherwise=(
            sum(bool(row.trained_with) for row in rows),
            sum(bool(row.trained_with) and row.covered for row in rows),
        ),
    )
