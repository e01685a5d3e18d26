"""Say on the card what the analyses of the source's frozen features found."""

from dataclasses import dataclass

from hftl.analysis.facts import (
    AnalysisSection,
    CurveAnalysis,
    DistanceAnalysis,
    Estimate,
    LabelCount,
    ProbeAnalysis,
    SetShift,
    ShiftAnalysis,
)


@dataclass(frozen=True)
class EvidencePart:
    """Hold one analysis as the card shows it: its name, a sentence and its picture's text."""

    name: str
    sentence: str
    alt: str


def build_evidence_parts(section: AnalysisSection | None) -> list[EvidencePart]:
    """Return the parts of the card, in the order of the commands."""
    parts: list[EvidencePart] = []
    if section is None:
        return parts
    if section.probe is not None:
        alt = "Probes of every layer, and how alike the layers are"
        parts.append(EvidencePart("probe", describe_probe(section.probe), alt))
    if section.curve is not None:
        alt = "Scores over the number of labels, with bands"
        parts.append(EvidencePart("curve", describe_curve(section.curve), alt))
    if section.distance is not None:
        alt = "Distances between the sets of rows, with intervals"
        parts.append(EvidencePart("distance", describe_distance(section.distance), alt))
    if section.shift is not None:
        alt = "Shares of the classes in train and in the other sets, and how far inputs differ"
        parts.append(EvidencePart("shift", describe_shift(section.shift), alt))
    return parts


def describe_probe(facts: ProbeAnalysis) -> str:
    """Return which layer a linear probe reads best, and whether that is beyond noise."""
    best = next(score for score in facts.sites if score.site == facts.best)
    words = (
        f"A linear probe reads {facts.best} of the source best: validation {facts.metric} "
        f"{_format_estimate(best.probe)}"
    )
    if facts.own == facts.best:
        return f"{words}; this model's head reads the same."
    if facts.own is None or facts.over_own is None:
        return f"{words}."
    gap = facts.over_own
    clear = gap.ci95 is not None and gap.ci95[0] > 0
    interval = "" if gap.ci95 is None else f" [{gap.ci95[0]:+.3f}, {gap.ci95[1]:+.3f}]"
    return (
        f"{words}, {gap.value:+.3f}{interval} over {facts.own}, which this model's head reads: "
        f"{'beyond' if clear else 'within'} noise."
    )


def describe_curve(facts: CurveAnalysis) -> str:
    """Return what labels are worth: where baselines catch up, and what twice as many would give."""
    unit = "labels a class" if facts.per_class else "labels"
    sentences = []
    for one in facts.labels:
        ratio = one.ratios[len(one.ratios) // 2]
        size = facts.sizes[len(one.ratios) // 2]
        needs = _format_ratio(ratio, facts.sizes[-1] / size)
        end = (
            f"does not catch up with it up to {facts.sizes[-1]} {unit}"
            if one.catches_up.value is None
            else f"catches up with it at {'most' if one.catches_up.is_at_most else 'about'} "
            f"{one.catches_up.value:.0f} {unit}"
        )
        sentences.append(
            f"For the score of {one.arm} with {size} {unit}, {one.baseline} needs {needs} as many; "
            f"it {end}."
        )
    forecast = facts.arms[0].forecast
    if forecast is not None:
        sentences.append(
            f"By its power law {facts.arms[0].arm} would reach {facts.metric} "
            f"{_format_estimate(forecast.predicted)} with {forecast.labels} {unit}."
        )
    return " ".join(sentences) or f"{facts.arms[0].arm} was scored over the number of {unit}."


def describe_distance(facts: DistanceAnalysis) -> str:
    """Return how far test lies from train, and what lies farthest apart."""
    first = facts.pairs[0]
    words = (
        f"The proxy A-distance between {first.first} and {first.second}, 0 for one domain and 2 "
        f"for disjoint ones, is {_format_estimate(first.a_distance)}."
    )
    farthest = max(facts.pairs, key=lambda pair: pair.mmd.value)
    if farthest is first:
        return words
    return (
        f"{words} By MMD^2 {farthest.first} and {farthest.second} lie farthest apart: "
        f"{_format_estimate(farthest.mmd)} (p = {farthest.mmd_p_value:.3f})."
    )


def describe_shift(facts: ShiftAnalysis) -> str:
    """Return for each set whether its classes and inputs are as train's."""
    return " ".join(_describe_set(one) for one in facts.sets)


def _describe_set(one: SetShift) -> str:
    inputs = f"a classifier of inputs reaches an AUC of {one.auc:.3f}, p = {one.auc_p_value:.3f}"
    if one.outcome == "none":
        return f"The {one.name} rows are as train within noise ({inputs})."
    if one.outcome == "covariate shift":
        return f"The {one.name} rows are other inputs than train's ({inputs})."
    moved = max(
        one.shares,
        key=lambda row: abs((row.estimated.value if row.estimated else row.train) - row.train),
    )
    to = (
        ""
        if moved.estimated is None
        else f" and is estimated as {_format_estimate(moved.estimated)}"
    )
    shares = (
        f"The classes of the {one.name} rows have other shares than train's (p = "
        f"{one.label_p_value:.2g}): {moved.label} has {moved.train:.3f} in train{to}"
    )
    if one.outcome == "label shift" and one.matched_p_value is None:
        return f"{shares}; whether the inputs of each class differ, too, is not known."
    if one.outcome == "label shift":
        return f"{shares}; the inputs of each class are as train's within noise."
    return f"{shares}; but the inputs differ, too ({inputs}), so that the estimate may be off."


def _format_estimate(estimate: Estimate) -> str:
    if estimate.ci95 is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.ci95[0]:.3f}, {estimate.ci95[1]:.3f}]"


def _format_ratio(ratio: LabelCount, most: float) -> str:
    if ratio.value is None:
        return f"more than {most:.1f} times"
    return f"{'at most ' if ratio.is_at_most else ''}{ratio.value:.1f} times"
