"""Compare figures without a block of rows with the figures of the remaining rows."""

from collections.abc import Callable

import numpy as np
import pytest

from hftl.analysis.drift import (
    JackknifeProbes,
    compute_cka,
    jackknife_cka,
    jackknife_relational_kl,
)
from hftl.analysis.neighbours import (
    JackknifeEstimate,
    count_needed_neighbours,
    jackknife_neighbour_hits,
    jackknife_shared_neighbours,
    mean_shared_neighbours,
    rank_neighbours,
)
from hftl.errors import DataError
from hftl.measure.forgetting import ForgettingSpec, measure_forgetting
from hftl.measure.statistics import assign_blocks

ROWS = 90
UNITS = np.arange(ROWS) // 4
BLOCKS = assign_blocks(UNITS, 10)
RNG = np.random.default_rng(0)
BEFORE = RNG.normal(size=(ROWS, 12))
AFTER = BEFORE + 0.7 * RNG.normal(size=(ROWS, 12))


def list_hits(rows: np.ndarray) -> np.ndarray:
    """Return whether each row's nearest other row is of its unit."""
    return UNITS[rows][rank_neighbours(AFTER[rows], 1)[:, 0]] == UNITS[rows]


def order(side: np.ndarray) -> np.ndarray:
    return rank_neighbours(side, count_needed_neighbours(BLOCKS, 10))


@pytest.mark.parametrize(
    ("estimate", "figure"),
    [
        (jackknife_shared_neighbours(order(BEFORE), order(AFTER), BLOCKS),
         lambda i: mean_shared_neighbours(BEFORE[i], AFTER[i])),
        (jackknife_neighbour_hits(order(AFTER), UNITS, BLOCKS), lambda i: list_hits(i).mean()),
        (jackknife_relational_kl(BEFORE, AFTER, 0.05, BLOCKS),
         lambda i: jackknife_relational_kl(BEFORE[i], AFTER[i], 0.05, 0 * BLOCKS[i]).value),
        (jackknife_cka(BEFORE, AFTER, BLOCKS), lambda i: compute_cka(BEFORE[i], AFTER[i])),
    ],
    ids=["shared", "same", "kl", "cka"],
)  # fmt: skip
def test_leaving_out_a_block_leaves_out_queries_and_references(
    estimate: JackknifeEstimate, figure: Callable[[np.ndarray], float]
) -> None:
    assert estimate.value == pytest.approx(figure(np.arange(ROWS)))
    without = estimate.without
    expected = [figure(np.flatnonzero(BLOCKS != block)) for block in range(10)]
    np.testing.assert_allclose(without, expected, rtol=1e-9)
    assert np.ptp(without) > 0


def test_probes_are_fitted_without_the_block() -> None:
    labels = (BEFORE[:, 0] > 0).astype(np.int64)
    probes = JackknifeProbes.fit(BEFORE, labels, UNITS, 1.0, BLOCKS)
    whole, without, _ = probes.score(BEFORE, labels)
    assert 0.7 < whole < 1 and len(without) == 10
    wrong = labels.copy()
    wrong[BLOCKS == 3] = 1 - wrong[BLOCKS == 3]
    spoilt = JackknifeProbes.fit(BEFORE, wrong, UNITS, 1.0, BLOCKS)
    assert spoilt.score(BEFORE, labels)[1][3] == pytest.approx(without[3]), "it saw none of them"
    assert spoilt.score(BEFORE, labels)[0] < whole


def test_effects_are_those_on_the_remaining_rows() -> None:
    estimate = jackknife_neighbour_hits(order(AFTER), UNITS, BLOCKS)
    right = list_hits(np.arange(ROWS))
    assert isinstance(estimate.effects, np.ndarray) and not estimate.effects.diagonal().any()
    for block in range(10):
        left = BLOCKS != block
        own_part = (right[left].sum() - right.sum()) / ROWS
        through_others = estimate.effects[block].sum()
        whole = estimate.without[block] * left.sum() / ROWS - estimate.value
        assert own_part + through_others == pytest.approx(whole, abs=1e-12)
    assert estimate.effects.any()


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(DataError, match="9 rows have no 10 neighbours"):
        count_needed_neighbours(np.zeros(9, int), 10)


def sides(general: np.ndarray) -> dict[str, np.ndarray]:
    return {"general": general, "new": general[:1]}


def test_interval_without_any_change_is_bounded_by_the_documents() -> None:
    """The encoder changed, and no row's neighbour: 20 documents rule out no less than 3 / 20."""
    before = sides(BEFORE[:80])
    units = np.arange(80) // 4
    spec = ForgettingSpec({"document": units.astype(str)}, (), units, 0.05)
    moved = [sides(scale * BEFORE[:80]) for scale in (2, 3, 4)]
    figures = measure_forgetting(before, {"own": moved}, spec)["own"]
    for figure in (figures["neighbours"], figures["controls"]["document"]["same"]):
        assert figure["change"] == pytest.approx(0, abs=1e-12)
        assert figure["ci95"] == pytest.approx([-0.15, 0.15])
    still = measure_forgetting(before, {"own": [before] * 3}, spec)["own"]
    assert still["neighbours"]["ci95"] == [0, 0], "of the same encoder nothing is forgotten"


def test_one_document_or_very_few_rows_give_no_interval() -> None:
    before, after = sides(BEFORE[:14]), [sides(AFTER[:14])] * 3
    for units in (np.zeros(14, int), np.arange(14) // 7):
        labels = (np.arange(14) % 2).astype(str)
        spec = ForgettingSpec({"tone": labels}, ("tone",), units, 0.05)
        figures = measure_forgetting(before, {"own": after}, spec)["own"]
        assert figures["neighbours"]["ci95"] is None and figures["neighbours"]["after"] < 1


def test_intervals_cover_as_often_as_stated() -> None:
    """Draw 40 documents of one to three rows, and 3 seeds that forget unequally."""
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(40), 1 + np.arange(40) % 3)
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(60):
        old = rng.normal(size=(40, 16))[units] + 0.7 * rng.normal(size=(len(units), 16))
        after = []
        for _ in range(3):
            far = 0.5 * np.exp(0.25 * rng.standard_normal())
            turn = rng.normal(size=(16, 16)) / 4
            noise = rng.normal(size=old.shape)
            after.append(sides(old + 0.7 * far * (old @ turn + noise)))
        spec = ForgettingSpec({"document": units.astype(str)}, (), units, 0.2)
        figures = measure_forgetting(sides(old), {"own": after}, spec)["own"]
        values = {name: figures[name] for name in ("neighbours", "kl", "cka")}
        values["same"] = figures["controls"]["document"]["same"]
        for name, figure in values.items():
            rows.setdefault(name, []).append((figure["change"], *figure["ci95"]))
    for values in rows.values():
        change, low, high = np.array(values).T
        covered = np.mean((low <= change.mean()) & (change.mean() <= high))
        assert covered >= 0.9
        assert np.mean(high - low) < 4 * 3.92 * change.std(), "and no wider than 3 seeds need"
