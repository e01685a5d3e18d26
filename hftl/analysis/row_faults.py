"""Find faults that the rows show by themselves: near copies, and splits of other classes.

A check takes recipe and rows and yields findings; it is one function in `ROW_CHECKS`.
"""

from collections.abc import Callable, Iterator

import numpy as np
from scipy import special

from hftl.config.data import Table
from hftl.config.recipe import Recipe
from hftl.data.near_copies import NearPair, describe_near_copies
from hftl.data.normalization import is_stray_value
from hftl.data.prepare import PreparedData
from hftl.data.rows import Row
from hftl.data.splits import MEASURED_SPLITS
from hftl.measure.statistics import effective_count
from hftl.plurals import choose_verb, count_noun
from hftl.train.facts import Finding

MAX_PLACES = 3
"""Places that a finding names, at most."""
LOOK_ALIKES = (
    "re-encoded, resized, in other colours or strokes; small ones of one outline can be "
    "look-alikes: 3 of 10 pairs of garments were"
)
"""What near pictures are. No limit tells the false ones from the others, see `data.duplicates`."""
LEVEL = 0.001
LOG_TIE = 1e-7
"""By how much logarithms of equal probabilities may differ."""
MIN_SHIFT = 0.05
"""Share of the rows that would need another label, from which on shares of classes differ."""

RowCheck = Callable[[Recipe, PreparedData], Iterator[Finding]]


def check_near_leakage(recipe: Recipe, prepared: PreparedData) -> Iterator[Finding]:
    """Find rows that measure and are nearly the same as one of another split."""
    pairs = [pair for pair in prepared.near_copies if pair.split != pair.other_split]
    if not pairs:
        return
    rows = {id(pair.row) for pair in pairs}
    tested = {id(pair.row) for pair in pairs if pair.split == "test"}
    tested |= {id(pair.other) for pair in pairs if pair.other_split == "test"}
    is_image = prepared.modality == "image"
    name, evidence = ("text", "they differ in a few words")
    if is_image:
        name, evidence = ("picture", LOOK_ALIKES)
    fix = (
        "remove them" if recipe.data.group else "name what they share in data.group, or remove them"
    )
    if is_image:
        fix = f"look at them, then {fix}"
    yield Finding(
        kind="leakage",
        what=describe_near_copies(len(rows), name),
        where=list_places(pairs),
        rows=len(tested),
        confidence="likely",
        evidence=evidence,
        fix=fix,
    )


def check_near_labels(recipe: Recipe, prepared: PreparedData) -> Iterator[Finding]:
    """Find near copies inside train that have differing labels."""
    if prepared.task not in ("classification", "multi-label"):
        return
    pairs = [
        pair
        for pair in prepared.near_copies
        if pair.split == pair.other_split == "train" and pair.row.label != pair.other.label
    ]
    if pairs:
        yield Finding(
            kind="near labels",
            what=f"{count_noun(len(pairs), 'pair')} of near copies in train "
            f"{choose_verb(len(pairs), 'has')} differing labels",
            where=list_places(pairs),
            confidence="likely",
            evidence="one of the two labels is wrong, or the difference decides it",
            fix="look at them and correct the wrong ones",
        )


def list_places(pairs: list[NearPair]) -> list[str]:
    """Return the first pairs as places of the user's files."""
    return [f"{pair.row.where} and {pair.other.where}" for pair in pairs[:MAX_PLACES]]


def check_missing_classes(recipe: Recipe, prepared: PreparedData) -> Iterator[Finding]:
    """Find classes of train that validation or test lacks: no score says how they are."""
    counts = prepared.facts.label_counts or {}
    rows = {name: sum(one.get(name, 0) for one in counts.values()) for name in prepared.names}
    names = [name for name in prepared.names if not is_stray_value(name, rows[name])]
    for split in MEASURED_SPLITS:
        absent = [name for name in names if not counts.get(split, {}).get(name)]
        if absent:
            more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
            yield Finding(
                kind="missing class",
                what=f"{split} has no row of {', '.join(map(repr, absent[:5]))}{more}",
                confidence="certain",
                fix=f"give more rows of each class, or a larger data.{split}",
            )


def check_label_shares(recipe: Recipe, prepared: PreparedData) -> Iterator[Finding]:
    """Find a table whose classes have other shares than train's; a fraction is stratified."""
    if prepared.task != "classification":
        return
    train = count_labels(prepared, "train")
    for split in MEASURED_SPLITS:
        if not isinstance(getattr(recipe.data, split), Table):
            continue
        counts = count_labels(prepared, split)
        shares = train / train.sum(), counts / counts.sum()
        distance = float(np.abs(shares[0] - shares[1]).sum() / 2)
        worths = [compute_worth(prepared.rows[part]) for part in ("train", split)]
        p_value = compare_shares(train, counts, worths[0], worths[1])
        if p_value < LEVEL and distance >= MIN_SHIFT:
            worst = int(np.abs(shares[0] - shares[1]).argmax())
            yield Finding(
                kind="label shift",
                what=f"the classes have other shares in {split} than in train: "
                f"{prepared.names[worst]!r} {shares[1][worst]:.0%} for {shares[0][worst]:.0%}",
                confidence="certain",
                evidence=f"{distance:.0%} of the rows would need another label, p {p_value:.1g}",
                fix="make sure that the model will be used so, and see hftl predict --prior",
            )


def count_labels(prepared: PreparedData, split: str) -> np.ndarray:
    """Return the rows of each class, (classes,) float64."""
    targets = prepared.encode_targets(prepared.rows[split])
    return np.bincount(targets, minlength=len(prepared.names)).astype(np.float64)


def compute_worth(rows: list[Row]) -> float:
    """Return how many independent rows a row is worth: those of a group are alike."""
    if rows[0].group is None:
        return 1.0
    _, sizes = np.unique([str(row.group) for row in rows], return_counts=True)
    return effective_count(sizes) / len(rows)


def compare_shares(
    first: np.ndarray, second: np.ndarray, first_worth: float, second_worth: float
) -> float:
    """Return the p-value of equal shares in two counts of classes.

    The lesser of two tests, twice it: a test of homogeneity, which sees many shares that differ a
    little, and of each class against all others (Fisher's exact test, Bonferroni), which sees one
    that differs much: of ten classes the first alone overlooks one with 31 % for 10 % in 65 rows.

    Args:
        first: (classes,) counts.
        second: the same.
        first_worth: how many independent rows a row of the first is worth.
        second_worth: the same of the second.
    """
    present = first + second > 0
    if present.sum() < 2:
        return 1.0
    table = np.stack([first * first_worth, second * second_worth])[:, present]
    lesser = min(compute_homogeneity_p(table), table.shape[1] * _compare_single_classes(table))
    return min(1.0, 2 * lesser)


# scipy.stats has both tests; importing it takes half a second of every run.


def compute_homogeneity_p(table: np.ndarray) -> float:
    """Return the p-value of Pearson's test that the rows of counts (2, classes) are alike."""
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    return float(special.chdtrc(table.shape[1] - 1, statistic))


def compute_fisher_p(first: int, second: int, first_others: int, second_others: int) -> float:
    """Return the two-sided p-value of Fisher's exact test on four counts.

    The sum of all tables of the same margins that are no more probable than this one.
    """
    of_first, of_second = first + first_others, second + second_others
    drawn = first + second
    counts = np.arange(max(0, drawn - of_second), min(drawn, of_first) + 1)
    logs = _log_binomial(of_first, counts) + _log_binomial(of_second, drawn - counts)
    logs -= special.logsumexp(logs)
    return min(1.0, float(np.exp(logs[logs <= logs[first - counts[0]] + LOG_TIE]).sum()))


def _log_binomial(total: int, chosen: np.ndarray) -> np.ndarray:
    gammaln = special.gammaln
    return gammaln(total + 1) - gammaln(chosen + 1) - gammaln(total - chosen + 1)


def _compare_single_classes(table: np.ndarray) -> float:
    """Return the least p-value of a class against all others, in counts (2, classes)."""
    counts = np.floor(table).astype(np.int64)
    others = counts.sum(1, keepdims=True) - counts
    tables = np.stack([*counts, *others], 1).tolist()
    return min(compute_fisher_p(*numbers) for numbers in tables)


ROW_CHECKS: tuple[RowCheck, ...] = (
    check_near_leakage,
    check_near_labels,
    check_missing_classes,
    check_label_shares,
)
