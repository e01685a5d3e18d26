"""Find faults of labels and splits by the frozen source: wrong labels, permuted maps, groups.

A check takes the examined rows and yields findings; it is one function in `LABEL_CHECKS`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.special import softmax

from hftl.analysis.domains import read_part
from hftl.analysis.label_maps import MIN_MAP_GAIN, find_exchange
from hftl.analysis.neighbours import normalize_rows
from hftl.analysis.probe import fit_probe
from hftl.analysis.row_faults import MAX_PLACES, MIN_SHIFT, compare_shares, compute_worth
from hftl.analysis.source_faults import PROBE_C, ExaminedRows, SourceCheck
from hftl.config.data import Table
from hftl.data.rows import Row
from hftl.data.slices import list_columns, read_cells
from hftl.data.splits import MEASURED_SPLITS, hash_row, hash_text
from hftl.finetune.build_context import pin_revisions
from hftl.train.facts import Finding

LEVEL, ERROR_LEVEL = 0.001, 0.05
"""Of label shift, and of wrong labels: these are called possible, as a better reading is at .05,
and clean labels stay below `FLAT_ERRORS`."""
SURE_SHARE = 0.25
"""The rows that a probe is surest of, in which wrong labels show."""
FLAT_ERRORS = 0.4
"""Errors among the surest rows, relative to all, above which labels are wrong. Hard rows are those
that a probe is unsure of: clean labels leave 0 to .35 there, labels flipped at random .6 and more.
"""
MIN_SURE_ERRORS = 4
MAX_COMPARED = 400
"""Rows of another split that its labels or groups are compared on, at most."""
MIN_GROUPS, MAX_VALUES = 10, 0.9
MIN_LIFT = 3.0
FRACTION = re.compile(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", re.IGNORECASE)
DOCUMENT = re.compile(r"(.+?)[_\-./#: ]\d+")
"""The name of a part of a document, such as `12_3`, whose start names the document."""


def check_label_errors(examined: ExaminedRows) -> Iterator[Finding]:
    """Find labels that are wrong, by confident learning on probabilities out of fold."""
    from scipy.stats import binom

    if examined.context.prepared.task != "classification":
        return
    probabilities, labels = softmax(examined.logits, axis=1), examined.targets
    wrong = probabilities.argmax(1) != labels
    sure = np.argsort(-probabilities.max(1), kind="stable")[: int(SURE_SHARE * len(labels))]
    errors, share = int(wrong[sure].sum()), float(wrong.mean())
    p_value = float(binom.sf(errors - 1, len(sure), FLAT_ERRORS * share)) if errors else 1.0
    if errors < MIN_SURE_ERRORS or p_value >= ERROR_LEVEL:
        return
    suspects = find_label_errors(probabilities, labels)
    if len(suspects) == 0:
        return
    names = examined.context.prepared.names
    yield Finding(
        kind="label errors",
        what=f"about {len(suspects) / len(labels):.1%} of the labels of train look wrong",
        where=[
            f"{examined.rows[i].where}: {names[labels[i]]!r}, more like "
            f"{names[probabilities[i].argmax()]!r}"
            for i in suspects[:MAX_PLACES]
        ],
        confidence="possible",
        evidence=f"{errors} of the {len(sure)} of {len(labels)} rows that a probe is surest of "
        "have another label",
        fix="look at them and correct the wrong ones",
    )


def find_label_errors(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the rows whose label is probably wrong, the worst first, by confident learning.

    A row counts as of class j if its probability reaches the mean probability of j among the rows
    that are labelled j; of several the likeliest. The counts by given and confident class, scaled
    to the labels' own counts, say how many rows of each class belong to another, and those with
    the largest margin are taken (Northcutt et al. 2021, JAIR 70:1373-1411: pruning by noise rate).

    Args:
        probabilities: (rows, classes), each by a model that has not seen the row.
        labels: (rows,) class ids.
    """
    classes = probabilities.shape[1]
    thresholds = np.array([
        probabilities[labels == j, j].mean() if (labels == j).any() else np.inf
        for j in range(classes)
    ])  # fmt: skip
    reached = np.where(probabilities >= thresholds, probabilities, -1.0)
    confident = reached.max(1) >= 0
    joint = np.zeros((classes, classes))
    np.add.at(joint, (labels[confident], reached[confident].argmax(1)), 1)
    np.fill_diagonal(joint, np.maximum(joint.diagonal(), 1))
    counts = np.bincount(labels, minlength=classes)
    expected = np.rint(joint / joint.sum(1, keepdims=True) * counts[:, None]).astype(int)
    suspects: dict[int, float] = {}
    for given, true in zip(*np.nonzero(expected), strict=True):
        if given == true:
            continue
        rows = np.flatnonzero(labels == given)
        margins = probabilities[rows, true] - probabilities[rows, given]
        for i in np.argsort(-margins, kind="stable")[: expected[given, true]]:
            if margins[i] > 0:
                suspects[int(rows[i])] = max(suspects.get(int(rows[i]), 0.0), float(margins[i]))
    return np.array(sorted(suspects, key=lambda row: -suspects[row]), dtype=np.int64)


def check_label_map(examined: ExaminedRows) -> Iterator[Finding]:
    """Find a table whose labels are those of train under other names."""
    prepared = examined.context.prepared
    if prepared.task != "classification":
        return
    own = float((examined.logits.argmax(1) == examined.targets).mean())
    for split in MEASURED_SPLITS:
        if not isinstance(getattr(examined.recipe.data, split), Table):
            continue
        rows = _sample(prepared.rows[split])
        labels = prepared.encode_targets(rows)
        predicted = _predict(examined, rows).argmax(1)
        groups = examined.context.group_outputs(rows)
        exchange = find_exchange(predicted, labels, prepared.names, groups)
        if exchange is None or own - exchange.straight < MIN_MAP_GAIN:
            continue
        yield Finding(
            kind="label map",
            what=f"the labels of {split} are exchanged against train's: {exchange.names}",
            confidence="likely",
            cost=exchange.gain,
            evidence=f"a probe of train is right in {exchange.straight:.0%} of {len(rows)} rows, "
            f"and in {exchange.mapped:.0%} under the other map; on train in {own:.0%}",
            fix=f"correct the label column of data.{split}, or the ids that it was written by",
        )


def check_unlabeled_shares(examined: ExaminedRows) -> Iterator[Finding]:
    """Find unlabelled inputs whose predicted classes have other shares than train's."""
    recipe, context = examined.recipe, examined.context
    if context.prepared.task != "classification" or recipe.data.unlabeled is None:
        return
    unlabeled, train = recipe.data.unlabeled, recipe.data.train
    if len(unlabeled.text_columns) != len(train.text_columns):
        return  # Single texts beside pairs have other features, whatever their classes.
    rows = read_part(recipe, context, "unlabeled", MAX_COMPARED)
    classes = len(context.prepared.names)
    before = np.bincount(examined.logits.argmax(1), minlength=classes)
    after = np.bincount(_predict(examined, rows).argmax(1), minlength=classes)
    shares = before / before.sum(), after / after.sum()
    distance = float(np.abs(shares[0] - shares[1]).sum() / 2)
    p_value = compare_shares(before, after, compute_worth(examined.rows), compute_worth(rows))
    if p_value < LEVEL and distance >= MIN_SHIFT:
        worst = int(np.abs(shares[0] - shares[1]).argmax())
        yield Finding(
            kind="label shift",
            what="the classes of data.unlabeled have other shares than train's: a probe predicts "
            f"{context.prepared.names[worst]!r} of {shares[1][worst]:.0%} of its rows, and of "
            f"{shares[0][worst]:.0%} of train's",
            confidence="likely",
            evidence=f"{len(rows)} rows, p {p_value:.1g}; the inputs may differ too",
            fix="see hftl shift for the shares and the inputs, and hftl predict --prior to correct "
            "for the shares",
        )


def check_groups(examined: ExaminedRows) -> Iterator[Finding]:
    """Find a column whose rows belong together and are in several splits."""
    from scipy.stats import binom

    recipe, context = examined.recipe, examined.context
    if recipe.data.group is not None:
        return
    prepared = context.prepared
    splits = {
        split: [r for r in rows if r.table == "train"] for split, rows in prepared.rows.items()
    }
    everything = [row for rows in splits.values() for row in rows]
    placed = [split for split, rows in splits.items() for _ in rows]
    for name, values in _list_group_columns(examined, everything):
        counts = Counter(values)
        holding: dict[str, set[str]] = defaultdict(set)
        for place, value in zip(placed, values, strict=True):
            holding[value].add(place)
        shared = sum(len(some) > 1 for some in holding.values())
        if shared < MIN_GROUPS:
            continue
        rows, own = _draw_groups(everything, values)
        hits, chance = count_group_neighbours(_extract(examined, rows), own, rows)
        pairs = len(rows)
        p_value = float(binom.sf(hits - 1, pairs, min(1.0, chance))) if hits else 1.0
        if p_value >= LEVEL or hits / pairs < MIN_LIFT * chance:
            continue
        yield Finding(
            kind="groups",
            what=f"{shared} of the {len(counts)} groups of {name} are in several splits",
            confidence="likely",
            evidence=f"{hits / pairs:.0%} of {pairs} rows have a nearest neighbour of their own "
            f"group, by chance {chance:.1%}",
            fix=f"set data.group to {name.split(' ')[0]!r}, or to a column of its groups",
        )


def count_group_neighbours(
    features: np.ndarray, groups: Sequence[str], rows: Sequence[Row]
) -> tuple[int, float]:
    """Return how many rows have a nearest neighbour of their own group, and the share by chance.

    Neighbours are sought among rows of the same label: a column that follows the labels would look
    like groups.
    """
    vectors = normalize_rows(features)
    labels = np.array([str(row.label) for row in rows])
    names = np.asarray(groups)
    hits, chance = 0, 0.0
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        if len(own) < 2:
            continue
        cosines = vectors[own] @ vectors[own].T
        np.fill_diagonal(cosines, -np.inf)
        same = names[own, None] == names[own]
        hits += int(same[np.arange(len(own)), cosines.argmax(1)].sum())
        chance += float((same.sum(1) - 1).sum()) / (len(own) - 1)
    return hits, chance / len(rows)


def _list_group_columns(examined: ExaminedRows, rows: list[Row]) -> Iterator[tuple[str, list[str]]]:
    """Yield columns of train's table that may name groups, and the value of each row."""
    context = examined.context
    data = pin_revisions(examined.recipe.data, context.prepared.facts.hub_revisions)
    table, modality = data.train, context.prepared.modality
    inputs = {*table.text_columns, *table.label_columns, table.image}
    columns = [name for name in list_columns(table, "train", modality) if name not in inputs]
    for column, cells in read_cells(table, "train", modality, rows, columns).items():
        if any(isinstance(cell, (list, dict, float)) or cell is None for cell in cells):
            continue
        values = [str(cell) for cell in cells]
        if any("." in v for v in values) and all(map(FRACTION.fullmatch, values)):
            continue  # A measurement.
        starts = [match[1] if (match := DOCUMENT.fullmatch(value)) else "" for value in values]
        for name, own in ((column, values), (f"{column} before its last number", starts)):
            distinct = len(set(own))
            if MIN_GROUPS <= distinct <= MAX_VALUES * len(own) and "" not in own:
                yield name, own
                break


def _draw_groups(rows: list[Row], values: list[str]) -> tuple[list[Row], list[str]]:
    """Return rows of whole groups with their groups, at most so many."""
    order = sorted(
        range(len(rows)), key=lambda i: (hash_text(f"groups {values[i]}"), hash_row(rows[i]))
    )[:MAX_COMPARED]
    return [rows[i] for i in order], [values[i] for i in order]


def _sample(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: hash_row(row, 0, "check"))[:MAX_COMPARED]


def _extract(examined: ExaminedRows, rows: list[Row]) -> np.ndarray:
    return examined.context.extract_features(examined.pooling, 0, rows)


def _predict(examined: ExaminedRows, rows: list[Row]) -> np.ndarray:
    """Return the logits of rows of another split by the probe of the examined ones."""
    context = examined.context
    groups = context.group_outputs(examined.rows)
    probe = fit_probe(examined.features, examined.targets, context.num_outputs, groups, PROBE_C)
    return probe.logits(_extract(examined, rows))


LABEL_CHECKS: tuple[SourceCheck, ...] = (
    check_label_errors,
    check_label_map,
    check_unlabeled_shares,
    check_groups,
)
