"""Word the card's sentence on the advice: what was expected before training, and what came."""

from hftl.analysis.advice_facts import AdviceSection
from hftl.measure.record import Record


def describe_advice(record: Record) -> str:
    """Return what was advised and forecast, and how right that was; nothing without advice."""
    section = record.advice
    if section is None:
        return ""
    return f"{_describe_forecast(section, str(record.own_arm))}{_describe_choice(section)}"


def _describe_forecast(section: AdviceSection, own: str) -> str:
    """Return the own arm's forecast with its outcome; nothing where either is missing."""
    outcome = section.outcome
    row = outcome and next((row for row in outcome.strategies if row.arm == own), None)
    expected = section.forecast and row and section.forecast.get_score(row.strategy)
    if not row or not expected:
        return ""
    low, high = expected.score_pi90
    place = "inside" if row.covered else "outside"
    return (
        f"From the frozen source and the training rows alone, `{row.strategy}` was forecast at "
        f"accuracy {expected.score:.3f} [{low:.3f}, {high:.3f}] (90 % interval); it has "
        f"{row.score:.3f}, {place}. "
    )


def _describe_choice(section: AdviceSection) -> str:
    advised, outcome = f"The strategy advised was `{section.strategy}`", section.outcome
    if outcome is None:
        return f"{advised}."
    if outcome.gap is None:
        return f"{advised}; whether it is the best is open, as it or every other did not run."
    if section.strategy == outcome.best:
        return f"{advised}, the best of those that ran."
    nearness = "within a point" if outcome.right else "more than a point"
    verb = "of" if outcome.right else "behind"
    return f"{advised}, {nearness} {verb} the best that ran, `{outcome.best}` ({outcome.gap:.3f})."
