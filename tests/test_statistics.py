"""Check the interval's coverage in simulation, and every estimator against brute force."""

import itertools
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from hftl.measure.statistics import (
    classify_gain,
    compute_mean_squares,
    effective_count,
    estimate_mean_error,
    jackknife,
    mean_interval,
    relative_error_reduction,
    select_within_one_standard_error,
)

GAIN = 0.12
GRID = list(itertools.product((3, 5, 8), (400, 2000), (0.005, 0.01, 0.02, 0.03)))


Interval = Callable[[np.ndarray], tuple[float, float] | None]


class Population:
    """Hold items whose difficulty two arms and all seeds share, so that the gain is known.

    An arm is right on an item with log-odds shift + ease[item]. The shift of a seed gives the arm
    a set accuracy over the whole population: a seed with effect a_s gains exactly GAIN + a_s.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        shared, own, base = rng.standard_normal((3, 5000))
        self.own = 3 * (0.9 * shared + 0.19**0.5 * own)
        self.base = 3 * (0.9 * shared + 0.19**0.5 * base)
        self.shifts = np.linspace(-4, 10, 1000)
        self.own_accuracies = self._accuracies(self.own)
        # An item is right when uniform * (1 + odds) < odds, which spares the draws a logarithm.
        self.own_odds = np.exp(self.own).astype(np.float32)
        base_shift = np.interp(0.65, self._accuracies(self.base), self.shifts)
        self.base_odds = np.exp(self.base + base_shift).astype(np.float32)

    def _accuracies(self, ease: np.ndarray) -> np.ndarray:
        return np.array([np.mean(1 / (1 + np.exp(-shift - ease))) for shift in self.shifts])

    def draw(
        self, rng: np.random.Generator, replicates: int, seeds: int, items: int, sd: float
    ) -> np.ndarray:
        """Draw differences of correctness in {-1, 0, 1}, (replicates, seeds, items)."""
        item = rng.integers(len(self.own), size=(replicates, 1, items))
        accuracy = 0.65 + GAIN + rng.normal(0, sd, (replicates, seeds, 1))
        shift = np.exp(np.interp(accuracy, self.own_accuracies, self.shifts)).astype(np.float32)
        odds, base = shift * self.own_odds[item], self.base_odds[item]
        luck = rng.random((2, replicates, seeds, items), dtype=np.float32)
        own_right = luck[0] * (1 + odds) < odds
        base_right = luck[1] * (1 + base) < base
        return own_right.astype(np.int8) - base_right


POPULATION = Population()


def bounds(interval: tuple[float, float] | None) -> tuple[float, float]:
    assert interval is not None
    return interval


def naive_interval(values: np.ndarray) -> tuple[float, float]:
    """Compute an interval over items only, as if these very seeds were all there is."""
    item = values.mean(axis=0)
    half = 1.96 * item.std(ddof=1) / len(item) ** 0.5
    return item.mean() - half, item.mean() + half


def coverage(interval: Interval, seeds: int, items: int, sd: float, replicates: int) -> float:
    rng = np.random.default_rng([seeds, items, round(sd * 1000)])
    step = max(1, 200_000 // (seeds * items))
    hits = 0
    for start in range(0, replicates, step):
        for values in POPULATION.draw(rng, min(step, replicates - start), seeds, items, sd):
            low, high = bounds(interval(values))
            hits += low <= GAIN <= high
    return hits / replicates


CORNERS = set(itertools.product((3, 8), (400, 2000), (0.005, 0.03)))


@pytest.mark.parametrize(
    ("seeds", "items", "sd", "replicates"),
    [
        *((*cell, 1500) for cell in sorted(CORNERS)),
        *(pytest.param(*cell, 4000, marks=pytest.mark.slow) for cell in GRID),
    ],
)
def test_interval_covers_the_known_gain(seeds: int, items: int, sd: float, replicates: int) -> None:
    assert 0.93 <= coverage(mean_interval, seeds, items, sd, replicates) <= 0.97


def test_item_only_interval_undercovers_where_seeds_differ() -> None:
    assert coverage(naive_interval, 3, 2000, 0.03, replicates=500) < 0.90


def table(seed: int, seeds: int, units: int, seed_sd: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    effects = seed_sd * rng.standard_normal((seeds, 1)) + rng.standard_normal(units)
    return effects + rng.standard_normal((seeds, units))


def test_mean_squares_equal_those_of_loops_and_their_sums_add_up() -> None:
    values = table(2, 4, 7)
    grand = sum(values[s, i] for s in range(4) for i in range(7)) / 28
    row = [sum(values[s, i] for i in range(7)) / 7 for s in range(4)]
    column = [sum(values[s, i] for s in range(4)) / 4 for i in range(7)]
    seed = sum((row[s] - grand) ** 2 for s in range(4) for _ in range(7)) / 3
    unit = sum((column[i] - grand) ** 2 for _ in range(4) for i in range(7)) / 6
    pairs = itertools.product(range(4), range(7))
    error = sum((values[s, i] - row[s] - column[i] + grand) ** 2 for s, i in pairs) / 18
    assert compute_mean_squares(values) == pytest.approx((seed, unit, error))
    assert 3 * seed + 6 * unit + 18 * error == pytest.approx(np.sum((values - grand) ** 2))


def test_interval_without_unit_or_without_seed_effect_is_the_one_sample_t_interval() -> None:
    rng = np.random.default_rng(3)
    gains, items = rng.standard_normal(4), rng.standard_normal(30)
    for values, sample in (
        (np.repeat(gains[:, None], 30, axis=1), gains),
        (np.repeat(items[None], 4, axis=0), items),
    ):
        expected = stats.ttest_1samp(sample, 0).confidence_interval(0.95)
        assert mean_interval(values) == pytest.approx(tuple(expected))


def test_interval_moves_with_shift_and_scale_and_ignores_order() -> None:
    values = table(4, 5, 60)
    low, high = bounds(mean_interval(values))
    assert mean_interval(values + 1e3) == pytest.approx((low + 1e3, high + 1e3))
    assert mean_interval(-2 * values) == pytest.approx((-2 * high, -2 * low))
    assert mean_interval(values[::-1]) == pytest.approx((low, high))
    assert mean_interval(np.random.default_rng(0).permutation(values, axis=1)) == pytest.approx(
        (low, high)
    )


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7])
def test_interval_of_equal_values_is_the_point_without_warnings(value: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mean_interval(np.full((3, 17), value)) == (value, value)


def test_interval_with_two_seeds_or_no_unit_variance_left_is_finite_and_not_a_point() -> None:
    flipped = np.array([[1.0, -1, 1, -1], [-1, 1, -1, 1.5]])  # MS_unit is under MS_error
    _, unit_ms, error_ms = compute_mean_squares(flipped)
    low, high = bounds(mean_interval(flipped))
    assert unit_ms < error_ms and np.isfinite([low, high]).all() and low < high


def test_interval_needs_two_seeds_and_two_units() -> None:
    assert mean_interval(np.zeros((1, 50))) is None
    assert mean_interval(np.zeros((3, 1))) is None
    assert mean_interval(np.zeros((0, 5))) is None


def test_bad_values_are_named_with_their_place() -> None:
    values = np.zeros((3, 4))
    values[2, 1] = np.nan
    for bad, message in (
        (values, r"values\[2, 1\] is nan"), (values[0], r"2 dimensions, got shape \(4,\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            mean_interval(bad)
    with pytest.raises(ValueError, match="level"):
        mean_interval(np.zeros((2, 2)), level=95)
    with pytest.raises(ValueError, match=r"score without block\[3\] is nan"):
        jackknife(lambda rows: np.nan if 3 not in rows else 0.0, np.arange(6))
    with pytest.raises(ValueError, match="score of all rows is inf"):
        jackknife(lambda rows: np.inf, np.arange(6))
    for units in (np.arange(6.0), np.zeros((2, 2), dtype=int), np.zeros(6, dtype=int)):
        with pytest.raises(ValueError, match="units"):
            jackknife(lambda rows: 0.0, units)


def test_jackknife_of_pearson_equals_deleting_one_row_at_a_time() -> None:
    x, y = np.random.default_rng(6).standard_normal((2, 40))
    y += x
    values = jackknife(lambda rest: float(np.corrcoef(x[rest], y[rest])[0, 1]), np.arange(40))
    whole = np.corrcoef(x, y)[0, 1]
    expected = [
        40 * whole - 39 * np.corrcoef(np.delete(x, i), np.delete(y, i))[0, 1] for i in range(40)
    ]
    np.testing.assert_allclose(values, expected)


def clusters(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw rows of 60 documents of very unequal sizes that share a document effect."""
    ids = np.repeat(7 * np.arange(60)[::-1], 1 + np.arange(60) % 9)
    return ids, rng.standard_normal(60)[ids // 7] + 0.5 * rng.standard_normal(len(ids))


def test_jackknife_of_unequal_clusters_keeps_the_mean_and_the_cluster_robust_variance() -> None:
    ids, rows = clusters(np.random.default_rng(7))
    values = jackknife(lambda rest: rows[rest].mean(), ids)
    deviations = [np.sum(rows[ids == unit] - rows.mean()) / len(rows) for unit in np.unique(ids)]
    assert len(values) == 60
    assert values.mean() == pytest.approx(rows.mean())
    assert values.var(ddof=1) / 60 == pytest.approx(60 / 59 * np.sum(np.square(deviations)))


def test_jackknife_blocks_do_not_depend_on_the_order_of_rows() -> None:
    ids = np.random.default_rng(9).permutation(11) * 3 - 5
    values, ordered = (
        jackknife(lambda rest, rows=rows: rows[rest].mean(), rows, blocks=4)
        for rows in (ids, np.sort(ids))
    )
    np.testing.assert_allclose(values, ordered)


@pytest.mark.parametrize("sizes", [None, np.array([1, 9, 2, 5, 5])])
@pytest.mark.parametrize("seeds", [3, 8])
def test_p_value_is_at_most_a_level_exactly_where_the_interval_excludes_zero(
    seeds: int, sizes: np.ndarray | None
) -> None:
    error = estimate_mean_error(np.random.default_rng(12).standard_normal((seeds, 5)), sizes)
    assert error is not None
    for level in (0.05, 0.01):
        bound = error.interval(0.0, 1 - level)[1]
        assert error.p_value(bound) == pytest.approx(level) == error.p_value(-bound)
    assert error.p_value(0.0) == 1


def test_p_value_is_students_where_seeds_or_units_alone_vary() -> None:
    rng = np.random.default_rng(13)
    seeds, units = rng.standard_normal((8, 1)) + 0.7, rng.standard_normal((1, 30)) + 0.3
    for values, sample in ((np.tile(seeds, (1, 30)), seeds), (np.tile(units, (8, 1)), units)):
        error = estimate_mean_error(values)
        assert error is not None
        expected = stats.ttest_1samp(sample.ravel(), 0).pvalue
        assert error.p_value(float(values.mean())) == pytest.approx(expected)


def test_effective_count_is_their_number_for_equal_clusters_and_less_for_others() -> None:
    assert effective_count(np.full(17, 3)) == pytest.approx(17)
    assert effective_count(np.array([100, 1, 1, 1])) == pytest.approx(1, abs=0.01)
    assert 2 < effective_count(np.array([3, 2, 1])) < 3


@pytest.mark.parametrize(
    ("interval", "margin", "expected"),
    [
        (None, 0.01, "undetermined"), ((0.02, 0.05), 0.01, "positive"),
        ((-0.05, -0.02), 0.01, "negative"), ((-0.005, 0.005), 0.01, "equivalent"),
        ((0.001, 0.009), 0.01, "equivalent"), ((-0.005, 0.02), 0.01, "undetermined"),
        ((0.001, 0.01), 0.01, "positive"), ((-0.01, -0.001), 0.01, "negative"),
        ((0.0, 0.02), 0.01, "undetermined"), ((-0.02, 0.0), 0.01, "undetermined"),
        ((0.0, 0.0), 0.0, "undetermined"), ((0.0, 0.0), 0.01, "equivalent"),
    ],
)  # fmt: skip
def test_outcome(interval: tuple[float, float] | None, margin: float, expected: str) -> None:
    assert classify_gain(interval, margin) == expected


@pytest.mark.parametrize(
    ("interval", "margin"), [((0, 1), -1), ((0, 1), np.nan), ((1, 0), 1), ((np.nan, 1), 1)]
)
def test_an_outcome_needs_an_interval_and_a_margin(
    interval: tuple[float, float], margin: float
) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        classify_gain(interval, margin)


@pytest.mark.parametrize(
    ("own", "other", "best", "expected"),
    [
        (0.9, 0.8, 1.0, 0.5), (0.7, 0.8, 1.0, -0.5), (1.0, 0.8, 1.0, 1.0), (1.5, 2.0, 0.0, 0.25),
        (0.9, 1.0, 1.0, None), (np.nan, 0.8, 1.0, None), (0.9, np.inf, 1.0, None),
    ],
)  # fmt: skip
def test_relative_error_reduction(
    own: float, other: float, best: float, expected: float | None
) -> None:
    reduction = relative_error_reduction(own, other, best=best)
    assert reduction == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("scores", "errors", "costs", "chosen"),
    [
        ([0.9], [0.0], [1.0], 0),
        ([0.7, 0.8, 0.9], [0.05, 0.05, 0.05], [0, 1, 2], 2),
        ([0.7, 0.86, 0.9], [0.05, 0.05, 0.05], [0, 1, 2], 1),
        # The error that counts is the best one's.
        ([0.7, 0.86, 0.9], [0.5, 0.5, 0.01], [0, 1, 2], 2),
        # Exactly one standard error away is within it.
        ([0.5, 0.75, 1.0], [0.0, 0.0, 0.25], [0, 1, 2], 1),
        # Less is better of costs, in whatever order they come.
        ([0.88, 0.9, 0.87], [0.05] * 3, [3, 2, 1], 2),
        # Of equal costs the better score, of equal scores the first.
        ([0.88, 0.9, 0.9], [0.05] * 3, [1, 1, 1], 1),
        # Errors such as rmse come with their sign turned.
        ([-0.30, -0.28, -0.29], [0.015] * 3, [0.0, 2.0, 1.0], 2),
    ],
)
def test_one_standard_error(
    scores: list[float], errors: list[float], costs: list[float], chosen: int
) -> None:
    assert select_within_one_standard_error(scores, errors, costs) == chosen


@pytest.mark.parametrize(
    "columns", [([], [], []), ([1.0], [0.0, 0.0], [1.0]), ([float("nan")], [0.0], [1.0])]
)
def test_one_standard_error_refuses(columns: tuple[list[float], ...]) -> None:
    with pytest.raises(ValueError):
        select_within_one_standard_error(*columns)
