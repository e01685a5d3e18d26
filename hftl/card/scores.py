"""Word what the scores of the published weights mean: calibration, thresholds, sets, abstention."""

from hftl.card.markdown import escape_markup
from hftl.card.wording import join_words, list_validation_choices
from hftl.measure.facts import (
    AbstentionPoint,
    AbstentionSection,
    CalibrationSection,
    ConformalSection,
    ScoreEstimate,
    ThresholdSection,
)
from hftl.measure.record import Record

SHOWN_COVERAGE = 0.9
SHOWN_SHARES = (0.9, 0.8, 0.5)
MAX_THRESHOLDS = 12
"""Labels whose threshold is named."""
CURVE_WORDS = {"platt": "by Platt's method", "isotonic": "by isotonic regression"}


def format_scores(record: Record) -> list[str]:
    """Return a sentence or two on each of what the record holds of scores."""
    sections = [
        record.calibration and format_calibration(record.calibration),
        record.thresholds and format_thresholds(record.thresholds),
        record.conformal and format_conformal(record.conformal, record),
        record.abstention and format_abstention(record.abstention),
    ]
    return [sentence for sentence in sections if sentence]


def format_calibration(section: CalibrationSection) -> str:
    """Return how far the probabilities are off, and by what they are calibrated."""
    each = "" if section.labels is None else ", means over labels"
    start = (
        "The published weights' probabilities on test: expected calibration error "
        f"{format_estimate(section.before.ece)} ({section.bins} bins of equal mass{each}), Brier "
        f"score {format_estimate(section.before.brier)}"
    )
    by = "temperature" if section.labels is None else "curves"
    if section.after is None:
        return f"{start}; validation gave no {by} to calibrate them by."
    if section.labels is None:
        way = f"logits divided by the temperature {section.temperature:.3g}"
        if section.likeliest and abs(section.likeliest / (section.temperature or 1) - 1) > 0.01:
            way += f" ({section.likeliest:.3g} before a prior drew it towards 1)"
    else:
        way = f"each label calibrated {_count_methods(section)}"
    change = ""
    if section.change is not None:
        change = f", the Brier score changed by {format_estimate(section.change, '+.3f')}"
    return (
        f"{start}; with {way}, fitted on validation, {format_estimate(section.after.ece)} and "
        f"{format_estimate(section.after.brier)}{change}. hftl predicts with "
        f"{'it' if section.labels is None else 'them'}, and the labels stay; the plain libraries "
        "do not."
    )


def _count_methods(section: CalibrationSection) -> str:
    methods = [curve.method for curve in (section.labels or {}).values()]
    parts = [
        f"{words} ({methods.count(method)} of {len(methods)})"
        for method, words in CURVE_WORDS.items()
        if method in methods
    ]
    return " or ".join(parts)


def format_thresholds(section: ThresholdSection) -> str:
    """Return the thresholds, and what they are worth on test."""
    shown = list(section.thresholds.items())
    if len({threshold for _, threshold in shown}) == 1:
        named = f"{shown[0][1]:.3g} for every label"
    else:
        named = ", ".join(
            f"{escape_markup(name)} {threshold:.3g}" for name, threshold in shown[:MAX_THRESHOLDS]
        )
        if len(shown) > MAX_THRESHOLDS:
            named += f" and {len(shown) - MAX_THRESHOLDS} more"
    metric = section.metric
    return (
        f"hftl predicts a label above a threshold that was fitted on validation for {metric} "
        f"({named}; `label_thresholds` in config.json, of the sigmoid of the logit): {metric} on "
        f"test {format_estimate(section.after[metric])}, and "
        f"{format_estimate(section.before[metric])} at .5, a difference of "
        f"{format_estimate(section.gain, '+.3f')}. The other scores and gains of this card are at "
        ".5."
    )


def format_conformal(section: ConformalSection, record: Record) -> str:
    """Return how often prediction sets held on test; nothing where validation was too small."""
    task = str(record.data.task)
    figure = next((f for f in section.test if f.coverage == SHOWN_COVERAGE), None)
    if figure is None:
        return ""
    what = {
        "classification": "sets of classes that hold the true one",
        "multi-label": "sets that hold every true label",
    }.get(task, "intervals that hold the true number")
    size = "mean width" if task == "regression" else "mean size"
    rows = f"{section.rows:,} rows of validation"
    if section.groups is not None:
        rows += f" in {section.groups:,} groups"
    chosen = join_words(list_validation_choices(record))
    limits = f" (approximate, as validation also chose {chosen})" if chosen else ""
    return (
        f"`hftl predict --coverage {SHOWN_COVERAGE:g}` gives {what} for about "
        f"{SHOWN_COVERAGE:.0%} of inputs like the {rows}{limits}: on test they held it for "
        f"{format_estimate(figure.held)} of the rows, {size} {figure.size:.3g}."
    )


def format_abstention(section: AbstentionSection) -> str:
    """Return the accuracy of the surest shares of test."""
    whole = section.points[-1]
    parts = [
        f"{format_estimate(point.accuracy)} of the surest {share:.0%}"
        for share in SHOWN_SHARES
        if (point := _find_point(section, share)) is not None
    ]
    surest = f"; {', '.join(parts)}" if parts else ""
    return (
        f"Accuracy of all test rows {format_estimate(whole.accuracy)}{surest} (area under the "
        f"risk-coverage curve {format_estimate(section.aurc)}, {section.best_aurc:.3f} at best)."
    )


def _find_point(section: AbstentionSection, share: float) -> AbstentionPoint | None:
    return next((p for p in section.points[:-1] if abs(p.share - share) < 0.02), None)


def format_estimate(score: ScoreEstimate, form: str = ".3f") -> str:
    """Return `0.105 [0.071, 0.139]`, or the value alone where there is no interval."""
    value = format(score.value, form)
    if score.ci95 is None:
        return value
    low, high = (format(bound, form) for bound in score.ci95)
    return f"{value} [{low}, {high}]"
