"""Estimate intervals, p-values and outcomes for a transfer gain measured over several seeds.

A transfer gain is the mean over seeds of (own arm's metric - baseline's metric) on the same test
items. Two things make it uncertain: which seeds were run and which items were drawn. The functions
here keep both in view; `jackknife` turns any metric into per-item values that can be averaged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from hftl.measure.facts import GainOutcome

MAX_BLOCKS = 400
"""Most blocks of the jackknife."""
MIN_SEEDS_FOR_P = 6
"""Seeds from which on a p-value is given; simulated at .05 and .01 from there on."""


@dataclass(frozen=True)
class MeanError:
    """Hold the standard error of a mean and the degrees of freedom of its t distribution."""

    value: float
    degrees_of_freedom: float

    def interval(self, centre: float, level: float = 0.95) -> tuple[float, float]:
        """Return the t interval (low, high) around `centre`.

        Raises:
            ValueError: `level` is outside (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie in (0, 1), got {level}")
        half = float(special.stdtrit(self.degrees_of_freedom, (1 + level) / 2)) * self.value
        return centre - half, centre + half

    def p_value(self, centre: float) -> float:
        """Return the two-sided p-value of a mean of 0; it is at most 1 - level exactly where the
        interval of that level excludes 0."""
        if self.value == 0:
            return float(centre == 0)
        return 2 * float(special.stdtr(self.degrees_of_freedom, -abs(centre) / self.value))


def jackknife(
    score: Callable[[np.ndarray], float], units: np.ndarray, blocks: int = MAX_BLOCKS
) -> np.ndarray:
    """Return delete-one-block pseudo-values of a statistic, to be averaged with equal weights.

    Delete-m_j jackknife: with n rows, g blocks of m_j rows, T = score(all) and T_j = score(without
    block j),

        value_j = T + g (1 - m_j / n) (T - T_j),

    which for equal blocks is the classic g T - (g - 1) T_j. Its plain mean is the estimator of
    Busing, Meijer & van der Leeden (1999, Statistics and Computing 9:3-8), g T - sum_j (1 - m_j/n)
    T_j; for a mean of rows it is T itself, and the values' variance / g is the cluster-robust
    g / (g - 1) sum_j (m_j / n)^2 (mean_j - T)^2. The blocks depend on `units` alone, so values of
    two arms or two seeds on the same rows can be subtracted or stacked.

    Args:
        score: maps row positions, (k,) int64 ascending, to the statistic on those rows.
        units: (rows,) integer cluster id per row; rows of one cluster stay together.
        blocks: most blocks to form; the i-th smallest id goes to block i modulo their number.

    Returns:
        (n_blocks,) float64 in the statistic's own unit, n_blocks = min(blocks, distinct ids).

    Raises:
        ValueError: `units` is not one-dimensional and integer or has under two distinct ids,
            `blocks` is under 2, or a score is not finite.
    """
    block = assign_blocks(units, blocks)
    count = int(block.max()) + 1
    whole = _as_finite_array("score of all rows", score(np.arange(len(block))), 0)
    without = _as_finite_array(
        "score without block",
        [score(np.flatnonzero(block != j)) for j in range(count)],
        1,
    )
    return compute_pseudo_values(float(whole), without, np.bincount(block))


def compute_pseudo_values(whole: float, without: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the values of `jackknife` from a statistic of all rows and those without each block.

    Args:
        whole: of all rows.
        without: (blocks,) without each.
        sizes: (blocks,) rows of each.
    """
    return whole + len(sizes) * (1 - sizes / sizes.sum()) * (whole - without)


def assign_blocks(units: np.ndarray, blocks: int = MAX_BLOCKS) -> np.ndarray:
    """Return the jackknife's block of every row, (rows,) int64.

    Raises:
        ValueError: see `jackknife`.
    """
    units = np.asarray(units)
    if units.ndim != 1 or not np.issubdtype(units.dtype, np.integer):
        raise ValueError(f"units must be (rows,) integers, got {units.shape} {units.dtype}")
    distinct, rank = np.unique(units, return_inverse=True)
    count = min(blocks, len(distinct))
    if count < 2:
        raise ValueError(f"jackknife needs 2 blocks, got {len(distinct)} units, blocks={blocks}")
    return rank % count


def effective_count(sizes: np.ndarray) -> float:
    """Return how many clusters of equal size are as uncertain as these.

    (sum v)^2 / sum v^2 of the variances v of the clusters' sums, the effective number of clusters
    of Carter, Schnepel & Steigerwald (2017, Review of Economics and Statistics 99:698-709) for a
    mean. v is m where rows are independent and m^2 where rows of a cluster are alike; m^1.5 is
    between them, and what is simulated. Equal sizes give their number.

    Args:
        sizes: (clusters,) rows of each.
    """
    variances = np.asarray(sizes, dtype=np.float64) ** 1.5
    return float(variances.sum() ** 2 / (variances @ variances))


def compute_mean_squares(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean squares (seeds, units, error) of a two-way table with one value a cell.

    Args:
        values: (seeds, units) float64, at least 2 x 2.

    Returns:
        MS_seed, MS_unit, MS_error in the squared unit of `values`, with S - 1, N - 1 and
        (S - 1)(N - 1) degrees of freedom. Their expectations are N s_seed^2 + s_error^2,
        S s_unit^2 + s_error^2 and s_error^2 (Searle, Casella & McCulloch 1992, Variance
        Components, ch. 4).
    """
    seeds, units = values.shape
    grand = values.mean()
    seed = values.mean(axis=1, keepdims=True) - grand
    unit = values.mean(axis=0, keepdims=True) - grand
    error = (values - grand - seed - unit).ravel()
    return (
        units * float(np.sum(seed**2)) / (seeds - 1),
        seeds * float(np.sum(unit**2)) / (units - 1),
        float(error @ error) / ((seeds - 1) * (units - 1)),
    )


def estimate_mean_error(
    values: np.ndarray,
    sizes: np.ndarray | None = None,
    widening: float = 1.0,
    twice: float = 0.0,
) -> MeanError | None:
    """Estimate the error of a mean over random seeds and random units (two-way components).

    Model d[s, i] = mu + a_s + b_i + e_si, all three random. The variance of the grand mean is
    estimated from the mean squares as

        V = V_seed + V_unit,  V_seed = MS_seed / (S N),  V_unit = max(MS_unit - MS_error, 0) / (S N)

    and the degrees of freedom from its shares w = V_seed / V and 1 - w as

        1 / f = w^k / (S - 1) + (1 - w)^k / (G - 1),  k = max(1, 2 - 2 / (S - 1)),

    G being `effective_count` of the units' sizes, N where these are equal. With many seeds k is 2,
    the rule of Satterthwaite (1946, Biometrics Bulletin 2:110-114), who takes the shares as if
    they were known; with 2 degrees of freedom for seeds they are not, a small MS_seed shrinks V
    and t together, and coverage falls to .92. k = 1 is to first order the rule of Cochran (1964,
    Biometrics 20:191-195), who averages the critical values; it holds with 3 seeds and errs to the
    safe side with more (false alarms of .04 at .05 with 6 or 8). Without a unit effect this is the
    one-sample t distribution over seeds, without a seed effect that over units. In theory coverage
    at .95 stays in .94-.965 from 3 seeds on, whatever the shares; with 2 seeds it can fall to
    .905.

    Args:
        values: (seeds, units) contributions to the gain; their mean over everything is the gain.
        sizes: (units,) rows of each, None where they are equal.
        twice: variance of the mean that the units' values count twice; at most half of theirs is
            taken away.
        widening: factor of the seeds' standard error, for seeds whose effects are skewed.

    Returns:
        None with one seed (it cannot tell gain from luck) or under two units.

    Raises:
        ValueError: `values` is not two-dimensional or not finite.
    """
    values = _as_finite_array("values", values, 2)
    seeds, units = values.shape
    if seeds < 2 or units < 2:
        return None
    # Equal values then centre to exact zeros, not to rounding noise.
    from_seeds, unit_square, error_square = compute_mean_squares(values - values[0, 0])
    from_seeds *= widening**2
    from_units = max(unit_square - error_square, 0.0)
    total = from_seeds + max(from_units - twice * values.size, from_units / 2)
    if total == 0:
        return MeanError(0.0, seeds - 1)
    share = from_seeds / total
    power = max(1.0, 2 - 2 / (seeds - 1))
    inverse = share**power / (seeds - 1) + (1 - share) ** power / _unit_degrees_of_freedom(
        units, sizes
    )
    return MeanError((total / values.size) ** 0.5, 1 / inverse)


def mean_interval(
    values: np.ndarray, level: float = 0.95, sizes: np.ndarray | None = None
) -> tuple[float, float] | None:
    """Return the interval of `estimate_mean_error` around the mean; None where that is None.

    Raises:
        ValueError: see `estimate_mean_error`, or `level` is outside (0, 1).
    """
    error = estimate_mean_error(values, sizes)
    if error is None:
        return None
    origin = float(values[0, 0])
    return error.interval(origin + float((values - origin).mean()), level)


def estimate_item_error(values: np.ndarray, sizes: np.ndarray | None = None) -> MeanError | None:
    """Estimate the error of a mean over random items, for one model: the one-sample t.

    sd / sqrt(N), sd with N - 1 degrees of freedom (Student 1908, Biometrika 6:1).

    Args:
        values: (units,) contributions to the statistic, as from `jackknife`.
        sizes: (units,) rows of each, None where they are equal.

    Returns:
        None under two units.

    Raises:
        ValueError: `values` is not one-dimensional or not finite.
    """
    values = _as_finite_array("values", values, 1)
    if len(values) < 2:
        return None
    error = float((values - values[0]).std(ddof=1)) / len(values) ** 0.5
    return MeanError(error, _unit_degrees_of_freedom(len(values), sizes))


def _unit_degrees_of_freedom(units: int, sizes: np.ndarray | None) -> float:
    # Two clusters of very unequal size are hardly more than one; a t needs some freedom.
    return units - 1 if sizes is None else max(effective_count(sizes) - 1, 0.5)


def wilson_interval(
    share: float, count: float, freedom: float = np.inf, level: float = 0.95
) -> tuple[float, float]:
    """Return the score interval of a share (Wilson 1927, JASA 22:209-212), inside [0, 1].

    The t interval of a share near 0 or 1 covers too seldom: .84 at .97 of 100.

    Args:
        share: in [0, 1].
        count: of how many it is a share; where these are not independent, how many independent
            ones are as uncertain (Korn & Graubard 1998, Survey Methodology 24:193-201).
        freedom: of the t distribution, where `count` was estimated.
        level: nominal coverage, in (0, 1).
    """
    critical = float(special.stdtrit(min(freedom, 1e9), (1 + level) / 2))
    spread = critical**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = (share * (1 - share) * spread + spread**2 / 4) ** 0.5 / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def rule_of_three_half_width(units: float, value: float = 0.0) -> float:
    """Return the half-width of the 95 % interval of a mean of values that are all alike.

    With n alike, up to 3 / n of all may be others (rule of three, Hanley & Lippman-Hand 1983, JAMA
    249:1743). Differences between two rights or wrongs lie in [-1, 1], so each of those may be
    1 + |value| away.
    """
    return (1 + abs(value)) * 3 / units


def rule_of_three_p_value(value: float, units: float) -> float:
    """Return the p-value of `rule_of_three_half_width`: .05 where its interval just reaches 0."""
    reach = abs(value) / rule_of_three_half_width(units, value)
    return float(0.05 ** (reach * (1 - 1e-12)))  # above .05 where the bound is exactly 0


def classify_gain(interval: tuple[float, float] | None, margin: float) -> GainOutcome:
    """Return the verdict on a gain from its interval and the smallest gain that matters.

    Args:
        interval: (low, high) as from `mean_interval`, or None.
        margin: half-width of the equivalence region, in the interval's unit.

    Returns:
        'equivalent' when the interval lies inside (-margin, margin), even if it excludes zero;
        else 'positive' when low > 0, 'negative' when high < 0; else, and for None, 'undetermined'.

    Raises:
        ValueError: `margin` is negative or not finite, or the interval is not finite and ordered.
    """
    if not 0 <= margin < np.inf:
        raise ValueError(f"margin must be finite and not negative, got {margin}")
    if interval is None:
        return "undetermined"
    low, high = interval
    if not -np.inf < low <= high < np.inf:
        raise ValueError(f"interval must be finite with low <= high, got {interval}")
    if -margin < low and high < margin:
        return "equivalent"
    if low > 0:
        return "positive"
    return "negative" if high < 0 else "undetermined"


def select_within_one_standard_error(
    scores: Sequence[float], errors: Sequence[float], costs: Sequence[float]
) -> int:
    """Return the position of the least cost among the scores within one standard error of the best.

    The rule of Breiman et al. 1984 (CART, section 3.4.3). Of equal costs the better score wins, of
    equal scores the first.

    Args:
        scores: more is better.
        errors: the standard error of each.
        costs: less is better.

    Raises:
        ValueError: there are none, or their numbers differ, or one is not finite.
    """
    values = _as_finite_array(
        "scores, errors and costs", [list(scores), list(errors), list(costs)], 2
    )
    best = int(np.argmax(values[0]))
    near = np.flatnonzero(values[0] >= values[0, best] - values[1, best])
    return int(min(near, key=lambda i: (values[2, i], -values[0, i], i)))


def relative_error_reduction(own: float, baseline: float, best: float = 1.0) -> float | None:
    """Return the share of the baseline's error removed: 1 - |best - own| / |best - baseline|.

    Args:
        own: own arm's metric.
        baseline: baseline's metric, in the same unit.
        best: the metric's best value (1 for accuracy, 0 for an error).

    Returns:
        A number without unit, 1 for no error left and negative for more error than the baseline's,
        or None when the baseline makes no error or a value is not finite.
    """
    if not np.isfinite([own, baseline, best]).all() or baseline == best:
        return None
    return 1 - abs(best - own) / abs(best - baseline)


def _as_finite_array(name: str, values: object, dimensions: int) -> np.ndarray:
    """Return `values` as a float64 array of that many dimensions.

    Raises:
        ValueError: wrong dimensions, or the first value that is not finite and its place.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimensions, got shape {array.shape}")
    finite = np.isfinite(array)
    if not finite.all():
        place = np.argwhere(~finite)[0].tolist()
        raise ValueError(f"{name}{place if place else ''} is {array[tuple(place)]}, not finite")
    return array
