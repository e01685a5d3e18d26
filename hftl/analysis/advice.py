"""Advise a strategy: rules by labels, probe, curve and distance, and the forecast.

Where the forecast speaks it decides, because it rests on measured runs; where a rule says otherwise
both are shown with their numbers. Every rule names its source, a paper or this project's own runs.
"""

from math import sqrt

from hftl.analysis.advice_facts import (
    RECIPE_DIFFERS,
    RULE_DIFFERS,
    AdviceRule,
    AdviceSection,
    Forecast,
    TaskFeatures,
)
from hftl.analysis.facts import AnalysisSection, CurveAnalysis, DistanceAnalysis
from hftl.analysis.forecast import (
    ForecastModel,
    explain_extrapolation,
    explain_no_forecast,
    forecast_scores,
)
from hftl.analysis.probe import FOLDS

FEW, SOME, MANY = 100, 1000, 10_000
"""Labels a class below which the rule of thumb says head, the top blocks, the upper half."""
FAR = 1.5
"""The proxy A-distance, of 2 at most, from which on a domain counts as far."""
WORTH = 0.02
"""The gain by twice the labels that is worth more than a choice of strategy: two points."""
NOISE = 1.96
LABEL_RULES = (
    (FEW, "head", "a linear head, as training distorts good features where labels are few",
     "Kumar et al. 2022, arXiv:2202.10054"),
    (SOME, "partial", "the top one or two blocks (finetune.blocks: 2)",
     "He et al. 2022, arXiv:2111.06377: few trained blocks reach most of full fine-tuning"),
    (MANY, "partial", "the upper half of the blocks, each at a lower rate than the one above it "
     "(finetune.blocks, finetune.layer_decay: 0.9)",
     "Howard & Ruder 2018, arXiv:1801.06146; Zhang et al. 2021, arXiv:2006.05987"),
    (float("inf"), "full", "the whole encoder", "Mosbach et al. 2021, arXiv:2006.04884"),
)  # fmt: skip
"""Labels a class below which each holds, its strategy, the words for it, and its source. Papers
give the mechanism; the limits are customary."""


def choose_by_labels(labels: float) -> str:
    """Return the strategy that the rule of thumb names for so many labels a class."""
    return next((rule[1] for rule in LABEL_RULES if labels < rule[0]), "full")


def advise(
    labels: float,
    unit: str,
    task: TaskFeatures | str,
    model: ForecastModel,
    strategy: str,
    analysis: AnalysisSection | None = None,
) -> AdviceSection:
    """Return the advice for a task.

    Args:
        labels: labelled training rows a class, or in all, as `unit` says.
        unit: such as `a class`.
        task: what the feature pass says, or why there is none to forecast from.
        model: the forecast's.
        strategy: that of the recipe.
        analysis: what was measured of the source's features beside it.
    """
    reason = task if isinstance(task, str) else explain_no_forecast(task, model)
    forecast = None if isinstance(task, str) or reason else forecast_scores(task, model)
    by_labels = apply_label_rule(labels, unit)
    rules = [by_labels]
    rules += [] if isinstance(task, str) else [compare_with_classical(task)]
    if analysis is not None and analysis.curve is not None:
        rules += read_curve(analysis.curve)
    if analysis is not None and analysis.distance is not None:
        rules += read_distance(analysis.distance, model)
    rules += [] if forecast is None else [read_forecast(forecast)]
    advised = str(by_labels.strategy) if forecast is None else forecast.strategies[0].strategy
    return AdviceSection(
        strategy=advised,
        rules=rules,
        conflicts=list_conflicts(advised, by_labels, forecast, model, strategy),
        forecast=forecast,
        no_forecast=reason,
    )


def apply_label_rule(labels: float, unit: str) -> AdviceRule:
    """Return the rule of thumb by the number of labels."""
    if labels == 0:
        return AdviceRule(
            name="labels",
            strategy="zero_shot",
            text="no labels: zero-shot classification, or adaptation to the inputs (adapt)",
            source="Gururangan et al. 2020, arXiv:2004.10964",
        )
    _, strategy, words, source = next(
        (rule for rule in LABEL_RULES if labels < rule[0]), LABEL_RULES[-1]
    )
    return AdviceRule(
        name="labels", strategy=strategy, text=f"{labels:g} labels {unit}: {words}", source=source
    )


def compare_with_classical(task: TaskFeatures) -> AdviceRule:
    """Say whether the frozen source reads the labels better than the classical model."""
    variance = sum(share * (1 - share) for share in (task.probe, task.classical))
    gap, noise = task.probe - task.classical, NOISE * sqrt(variance / task.read_rows)
    numbers = (
        f"on {task.read_rows:,} rows of train, each by a model of the other folds ({FOLDS}, fewer "
        f"of few groups), the probe has accuracy {task.probe:.3f} and the classical model "
        f"{task.classical:.3f}"
    )
    if gap > noise:
        text = f"{numbers}: the source has something to transfer"
    elif gap < -noise:
        text = (
            f"{numbers}: frozen, the source is worse than no pretraining (negative transfer); "
            "compare other sources by hftl rank"
        )
    else:
        text = f"{numbers}: within noise, nothing says that the source has anything to transfer"
    return AdviceRule(name="probe", strategy=None, text=text, source="this recipe's training rows")


def read_curve(curve: CurveAnalysis) -> list[AdviceRule]:
    """Say what twice the labels would give, by the power law of the frozen features."""
    first = curve.arms[0]
    if first.forecast is None:
        return []
    sign = -1 if curve.lower_is_better else 1
    now, then = first.points[-1].score.value, first.forecast.predicted.value
    more = sign * (then - now)
    worth = "are worth more than a choice of strategy" if more >= WORTH else "would add little"
    text = (
        f"{first.arm}: {curve.metric} {now:.3f} with {first.points[-1].labels} labels, "
        f"{then:.3f} with {first.forecast.labels} by its power law: more labels {worth}"
    )
    return [AdviceRule(name="curve", strategy=None, text=text, source="hftl curve, this recipe")]


def read_distance(distance: DistanceAnalysis, model: ForecastModel) -> list[AdviceRule]:
    """Say how far train lies from unlabelled and general data, and what that means for adapt."""
    rules: list[AdviceRule] = []
    for pair in distance.pairs:
        names = {pair.first, pair.second}
        other = names - {"train"}
        if "train" not in names or not other & {"unlabeled", "general"}:
            continue
        value = pair.a_distance.value
        text = f"train lies {value:.2f} of 2 from {other.pop()} (proxy A-distance): "
        text += (
            "far; adaptation by adapt pays for far domains, if at all"
            if value >= FAR
            else "near; adaptation is not expected to pay"
        )
        source = (
            "Gururangan et al. 2020, arXiv:2004.10964; in this project's records adaptation gained "
            f"beyond noise in {model.adaptations_better} of {model.adaptations}"
        )
        rules.append(AdviceRule(name="distance", strategy=None, text=text, source=source))
    return rules


def read_forecast(forecast: Forecast) -> AdviceRule:
    """Return the forecast's choice as a rule."""
    best = forecast.strategies[0]
    text = (
        f"{best.strategy} is expected at accuracy {best.score:.3f} "
        f"[{best.score_pi90[0]:.3f}, {best.score_pi90[1]:.3f}] as the arm {best.format_arm()}"
    )
    source = (
        f"fitted on {forecast.runs} runs of {forecast.data_sets} data sets; on {forecast.judged} "
        f"of them, forecast without their data sets, its intervals held {forecast.coverage:.0%} of "
        f"scores, and its choices were within a point of the best in {forecast.within_point:.0%}; "
        "features and penalty were chosen with such figures in view, which makes them optimistic"
    )
    return AdviceRule(name="forecast", strategy=best.strategy, text=text, source=source)


def list_conflicts(
    advised: str, by_labels: AdviceRule, forecast: Forecast | None, model: ForecastModel, own: str
) -> list[str]:
    """Return where the forecast extrapolates, and where rules, forecast and recipe differ."""
    conflicts: list[str] = []
    if forecast is not None and (reason := explain_extrapolation(forecast.features, model)):
        conflicts.append(reason)
    if forecast is not None and by_labels.strategy != advised:
        conflicts.append(
            f"{RULE_DIFFERS} {by_labels.strategy}, the forecast {advised}"
            f"{_format_lead(forecast, str(by_labels.strategy))}; the forecast is followed: on data "
            f"sets that it was not fitted on its choice was within a point of the best in "
            f"{model.within_point:.0%}, that of the rule in {model.rule_within_point:.0%}"
        )
    if own != advised:
        lead = arm = ""
        if forecast is not None:
            lead = _format_lead(forecast, own)
            arm = f", to compare give measure.arms: [{forecast.strategies[0].format_arm()}]"
        conflicts.append(f"{RECIPE_DIFFERS} {own}, the advice is {advised}{lead}{arm}")
    return conflicts


def _format_lead(forecast: Forecast, other: str) -> str:
    """Return by how much the forecast's best is expected to be ahead of another strategy."""
    row = forecast.get_score(other)
    if row is None:
        return ""
    return f", {100 * (forecast.strategies[0].score - row.score):.1f} points ahead"
