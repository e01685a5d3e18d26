"""Word the card's sentence on the advice: what was expected before training, and what came."""

from collections.abc import Mapping

from hftl.analysis.advice_facts import AdviceSection
from hftl.measure.advice_outcome import SCORE
from hftl.measure.record import Record


def describe_advice(record: Record) -> str:
    """Return what was advised and forecast, and how right that was; nothing without advice."""
    section = record.advice
    if section is None:
        return ""
    own = record.recipe.finetune.strategy
    forecast = _describe_forecast(section, own, str(record.own_arm))
    return forecast + _describe_choice(section, str(record.metric))


def _describe_forecast(section: AdviceSection, strategy: str, own_arm: str) -> str:
    """Return the forecast of the own strategy with its outcome; nothing where either is missing.

    The outcome is of the arm that trains as was forecast, where one does.
    """
    outcome = section.outcome
    row = outcome and next((row for row in outcome.strategies if row.strategy == strategy), None)
    expected = section.forecast and row and section.forecast.get_score(row.strategy)
    if not row or not expected:
        return ""
    low, high = expected.score_pi90
    place = "inside" if row.covered else "outside"
    forecast = (
        f"From the frozen source and the training rows alone, `{row.strategy}` was forecast at "
        f"accuracy {expected.score:.3f} [{low:.3f}, {high:.3f}] (90 % interval)"
    )
    arm = "it" if row.arm == own_arm else f"the arm `{row.arm}`"
    if not row.trained_with or not expected.settings:
        # Older records do not say what an arm trained with.
        is_named = row.arm != own_arm and row.trained_with is not None
        scored = f"{arm}, which trains so, has" if is_named else f"{arm} has"
        return f"{forecast}; {scored} {row.score:.3f}, {place}. "
    before = _format_settings({key: expected.settings[key] for key in row.trained_with})
    after = _format_settings(row.trained_with)
    return (
        f"{forecast} for {before}. {arm[0].upper()}{arm[1:]} was trained with {after}, so that the "
        f"forecast is of another training; it has {row.score:.3f}, {place}. "
    )


def _format_settings(settings: Mapping[str, float | None]) -> str:
    """Return such as `learning_rate 0.001 and num_train_epochs 10`."""
    parts = [
        f"`{key.rpartition('.')[2]}` {'unset' if value is None else format(value, 'g')}"
        for key, value in settings.items()
    ]
    return " and ".join(parts)


def _describe_choice(section: AdviceSection, metric: str) -> str:
    advised, outcome = f"The strategy advised was `{section.strategy}`", section.outcome
    if outcome is None:
        return f"{advised}."
    if outcome.gap is None:
        return f"{advised}; whether it is the best is open, as it or every other did not run."
    if section.strategy == outcome.best:
        return f"{advised}, the best of those that ran{'' if metric == SCORE else f' by {SCORE}'}."
    nearness = "within a point" if outcome.right else "more than a point"
    verb = "of" if outcome.right else "behind"
    gap = f"{outcome.gap:.3f} of {SCORE}"
    return f"{advised}, {nearness} {verb} the best that ran, `{outcome.best}` ({gap})."
