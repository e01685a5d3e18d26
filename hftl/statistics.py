"""Intervals, p-values and verdicts for a transfer gain measured over several seeds.

A transfer gain is the mean over seeds of (own arm's metric - baseline's metric) on the same test
items. Two things make it uncertain: which seeds were run and which items were drawn. The functions
here keep both in view; `jackknife` turns any metric into per-item values that can be averaged.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import special

_LEAST_SEEDS_FOR_P = 6  # 2 / 2**5 > .05: with five seeds no result could be significant
_MOST_SEEDS_ENUMERATED = 16
_MONTE_CARLO_FLIPS = 20_000


def jackknife(
    score: Callable[[np.ndarray], float], units: np.ndarray, blocks: int = 400
) -> np.ndarray:
    """Delete-one-block pseudo-values of a statistic, ready to be averaged with equal weights.

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
    units = np.asarray(units)
    if units.ndim != 1 or not np.issubdtype(units.dtype, np.integer):
        raise ValueError(f"units must be (rows,) integers, got {units.shape} {units.dtype}")
    distinct, rank = np.unique(units, return_inverse=True)
    count = min(blocks, len(distinct))
    if count < 2:
        raise ValueError(f"jackknife needs 2 blocks, got {len(distinct)} units, blocks={blocks}")
    block = rank % count
    whole = _finite("score of all rows", score(np.arange(len(units))), 0)
    without = _finite(
        "score without block",
        [score(np.flatnonzero(block != j)) for j in range(count)],
        1,
    )
    kept_share = 1 - np.bincount(block) / len(units)
    return whole + count * kept_share * (whole - without)


def mean_squares(values: np.ndarray) -> tuple[float, float, float]:
    """Mean squares (seeds, units, error) of a two-way table with one value a cell.

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


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """Interval of a mean over random seeds and random units (two-way variance components).

    Model d[s, i] = mu + a_s + b_i + e_si, all three random. The variance of the grand mean is
    estimated from the mean squares as

        V = V_seed + V_unit,  V_seed = MS_seed / (S N),  V_unit = max(MS_unit - MS_error, 0) / (S N)

    and the interval is mean -+ t_f sqrt(V) with the share-weighted degrees of freedom

        1 / f = (V_seed / V) / (S - 1) + (V_unit / V) / (N - 1).

    Satterthwaite (1946, Biometrics Bulletin 2:110-114) squares the shares, as if they were known;
    with 2 degrees of freedom for seeds they are not, a small MS_seed shrinks V and t together, and
    coverage falls to .92. Cochran's rule (1964, Biometrics 20:191-195) averages the critical
    values, sum_j (V_j / V) t_{f_j}, and errs to the safe side. As t_f = z + z (z^2 + 1) / (4 f) +
    O(f^-2), averaging 1 / f is Cochran's rule to first order; it lies between the two. Without a
    unit effect this is the one-sample t interval over seeds, without a seed effect the one over
    units. In theory coverage at .95 stays in .94-.965 from 3 seeds on, whatever the shares; with 2
    seeds it can fall to .905.

    Args:
        values: (seeds, units) contributions to the gain; their mean over everything is the gain.
        level: nominal coverage, in (0, 1).

    Returns:
        (low, high) in the unit of `values`, or None with one seed (it cannot tell gain from luck)
        or under two units.

    Raises:
        ValueError: `values` is not two-dimensional or not finite, or `level` is outside (0, 1).
    """
    values = _finite("values", values, 2)
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    seeds, units = values.shape
    if seeds < 2 or units < 2:
        return None
    origin = values[0, 0]  # equal values then centre to exact zeros, not to rounding noise
    values = values - origin
    mean = float(origin + values.mean())
    from_seeds, unit_square, error_square = mean_squares(values)
    from_units = max(unit_square - error_square, 0.0)
    total = from_seeds + from_units
    if total == 0:
        return mean, mean
    seed_share = from_seeds / total
    freedom = 1 / (seed_share / (seeds - 1) + (1 - seed_share) / (units - 1))
    critical = float(special.stdtrit(freedom, (1 + level) / 2))
    half = critical * (total / values.size) ** 0.5
    return mean - half, mean + half


def item_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """Interval of a mean over random items, for one model: the one-sample t interval.

    mean -+ t_{N-1} sd / sqrt(N), sd with N - 1 degrees of freedom (Student 1908, Biometrika 6:1).

    Args:
        values: (units,) contributions to the statistic, as from `jackknife`.
        level: nominal coverage, in (0, 1).

    Returns:
        (low, high) in the unit of `values`, or None under two units.

    Raises:
        ValueError: `values` is not one-dimensional or not finite, or `level` is outside (0, 1).
    """
    values = _finite("values", values, 1)
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    if len(values) < 2:
        return None
    mean = float(values.mean())
    critical = float(special.stdtrit(len(values) - 1, (1 + level) / 2))
    half = critical * float(values.std(ddof=1)) / len(values) ** 0.5
    return mean - half, mean + half


def sign_flip_p(deltas: np.ndarray) -> float | None:
    """Two-sided sign-flip permutation p-value of the mean of per-seed gains.

    p is the share of the 2^S sign patterns whose |sum| reaches the observed one (Fisher 1935, The
    Design of Experiments, ch. 3). Above 16 seeds 20000 patterns are drawn from a fixed seed and
    p = (k + 1) / (20000 + 1) (Phipson & Smyth 2010, SAGMB 9:39).

    Args:
        deltas: (seeds,) own arm minus baseline, one per seed.

    Returns:
        p in (0, 1], or None under 6 seeds, where it could not reach .05.

    Raises:
        ValueError: `deltas` is not one-dimensional or not finite.
    """
    deltas = _finite("deltas", deltas, 1)
    seeds = len(deltas)
    if seeds < _LEAST_SEEDS_FOR_P:
        return None
    # Only sizes matter under the null; sorted, the drawn patterns do not depend on seed order.
    sizes = np.sort(np.abs(deltas))
    exact = seeds <= _MOST_SEEDS_ENUMERATED
    if exact:
        bits = (np.arange(2**seeds)[:, None] >> np.arange(seeds)) & 1
    else:
        bits = np.random.default_rng(0).integers(2, size=(_MONTE_CARLO_FLIPS, seeds))
    # Summation order must not decide a tie with the observed pattern.
    reach = abs(deltas.sum()) - 1e-12 * sizes.sum()
    extreme = int(np.sum(np.abs((2.0 * bits - 1) @ sizes) >= reach))
    return extreme / len(bits) if exact else (extreme + 1) / (len(bits) + 1)


def outcome(interval: tuple[float, float] | None, margin: float) -> str:
    """Verdict on a gain from its interval and the smallest gain that matters.

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


def one_standard_error(
    scores: Sequence[float], errors: Sequence[float], costs: Sequence[float]
) -> int:
    """The position of the least cost among the scores within one standard error of the best.

    The rule of Breiman et al. 1984 (CART, section 3.4.3). Of equal costs the better score wins, of
    equal scores the first.

    Args:
        scores: more is better.
        errors: the standard error of each.
        costs: less is better.

    Raises:
        ValueError: there are none, or their numbers differ, or one is not finite.
    """
    told = _finite("scores, errors and costs", [list(scores), list(errors), list(costs)], 2)
    best = int(np.argmax(told[0]))
    near = np.flatnonzero(told[0] >= told[0, best] - told[1, best])
    return int(min(near, key=lambda i: (told[2, i], -told[0, i], i)))


def relative_error_reduction(own: float, baseline: float, best: float = 1.0) -> float | None:
    """Share of the baseline's error that the own arm removes: 1 - |best - own| / |best - baseline|.

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


def _finite(name: str, values: object, dimensions: int) -> np.ndarray:
    """`values` as a float64 array of the wanted dimensions.

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
