"""Measure how often intervals, p-values and verdicts are right, in simulations of known truth.

    python benchmarks/calibration.py              # minutes on one core
    python benchmarks/calibration.py p_values     # one part; the others stay as they were

Items have a difficulty that arms and seeds share; each seed of an arm has an accuracy of its own
over all items there could be. Rows of a group (of 1 to 11) share six tenths of the variance of
their difficulty. What is estimated is estimated by the functions that a run uses.

- `p_values`: two arms that are equally good; how often p is at most .05 and .01.
- `positive`: a run in which the own arm is as good as the better of scratch and classical, as
  scratch's epochs, own's epochs and scratch's rate are chosen on validation; how often it is called
  positive, and how often negative transfer, over the lesser gain on test, and, to compare, positive
  over the baseline that is better on validation.
- `forgetting`: documents of one to three rows whose features are turned and blurred by each seed,
  by amounts that are skewed; how often a figure's interval holds the mean of its change.

Results: benchmarks/results/calibration.json.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special
from simulations import Part, run_parts

from hftl.measure.forgetting import ForgettingSpec, measure_forgetting
from hftl.measure.gain import MARGIN, select_lesser_gain
from hftl.measure.record import Gain
from hftl.measure.statistics import MeanError, assign_blocks, classify_gain, estimate_mean_error

RESULT = Path(__file__).parent / "results" / "calibration.json"
REPLICATES = 4000
SPREAD, SHARED, GROUP_SHARE = 3.0, 0.9, 0.6
"""Of the log-odds over items; what arms share of it; what rows of a group share of its variance."""
VALUES_AT_ONCE = 2_000_000
WIDTH = 16
"""Of the features that are forgotten."""


def build_groups(rows: int) -> np.ndarray:
    """Return a group id a row, (about `rows`,) int64; groups have 1 to 11 rows."""
    count = max(2, rows // 6)
    return np.repeat(np.arange(count), 1 + np.arange(count) % 11)


def draw_difficulty(
    rng: np.random.Generator, replicates: int, units: np.ndarray, arms: int
) -> list[np.ndarray]:
    """Draw each arm's log-odds of the items, (replicates, items) float32, without their mean."""

    def draw() -> np.ndarray:
        own = rng.standard_normal((replicates, len(units)), dtype=np.float32)
        if units.max() + 1 == len(units):
            return own
        group = rng.standard_normal((replicates, units.max() + 1), dtype=np.float32)[:, units]
        return GROUP_SHARE**0.5 * group + (1 - GROUP_SHARE) ** 0.5 * own

    shared = draw()
    return [SPREAD * (SHARED * shared + (1 - SHARED**2) ** 0.5 * draw()) for _ in range(arms)]


SHIFTS = np.linspace(-10, 14, 2401)
ACCURACIES = special.expit(
    SHIFTS[:, None] + SPREAD * special.ndtri((np.arange(500) + 0.5) / 500)
).mean(1)


def find_odds_shift(accuracy: np.ndarray) -> np.ndarray:
    """Return the shift of the log-odds with which an arm has this accuracy over all items."""
    return np.interp(accuracy, ACCURACIES, SHIFTS).astype(np.float32)


def draw_correct(
    rng: np.random.Generator, difficulty: np.ndarray, accuracy: np.ndarray
) -> np.ndarray:
    """Draw which items are right, (replicates, seeds, items) bool.

    Args:
        rng: of the draws.
        difficulty: (replicates, items), see `draw_difficulty`.
        accuracy: (replicates, seeds) over all items.
    """
    odds = find_odds_shift(accuracy)[:, :, None] + difficulty[:, None]
    return rng.random(odds.shape, dtype=np.float32) < special.expit(odds)


def compute_block_values(differences: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Return what `jackknife` makes of a mean, (..., blocks), for (..., rows) at once."""
    block = assign_blocks(units)
    sizes = np.bincount(block)
    starts = np.r_[0, np.cumsum(sizes)[:-1]]
    ordered = np.take(differences, np.argsort(block, kind="stable"), axis=-1)
    sums = np.add.reduceat(ordered.astype(np.float64), starts, axis=-1)
    mean = differences.mean(-1, dtype=np.float64, keepdims=True)
    return mean + len(sizes) / len(units) * (sums - sizes * mean)


def compute_error(values: np.ndarray, units: np.ndarray) -> MeanError:
    """Return the error of one replicate's (seeds, blocks) values."""
    error = estimate_mean_error(values, np.bincount(assign_blocks(units)))
    assert error is not None
    return error


def split_replicates(replicates: int, values: int) -> list[int]:
    """Return how many replicates to draw at once, so that memory stays small."""
    step = max(1, VALUES_AT_ONCE // values)
    return [min(step, replicates - start) for start in range(0, replicates, step)]


def simulate_p_values(
    rng: np.random.Generator, seeds: int, units: np.ndarray, sd: float, replicates: int
) -> np.ndarray:
    """Return p of two equally good arms, (replicates,), as a run computes it."""
    p = []
    for size in split_replicates(replicates, seeds * len(units)):
        rights = [
            draw_correct(rng, difficulty, 0.7 + sd * rng.standard_normal((size, seeds)))
            for difficulty in draw_difficulty(rng, size, units, 2)
        ]
        differences = rights[0].astype(np.int8) - rights[1]
        values = compute_block_values(differences, units)
        means = differences.mean((1, 2))
        p += [
            compute_error(value, units).p_value(float(mean))
            for value, mean in zip(values, means, strict=True)
        ]
    return np.array(p)


def judge_p_values(replicates: int) -> list[dict[str, Any]]:
    """Count p of at most .05 and .01 in every setting, and how many standard errors off."""
    rows = []
    for grouped, seeds, items, sd in itertools.product(
        (False, True), (6, 8), (100, 400), (0.0, 0.01, 0.03)
    ):
        units = build_groups(items) if grouped else np.arange(items)
        rng = np.random.default_rng([seeds, grouped, items, round(1000 * sd)])
        p = simulate_p_values(rng, seeds, units, sd, replicates)
        row: dict[str, Any] = {
            "seeds": seeds, "groups": int(units.max()) + 1 if grouped else None,
            "items": len(units), "seed_sd": sd, "replicates": replicates,
        }  # fmt: skip
        for level in (0.05, 0.01):
            row[f"at_{level}"] = float(np.mean(p <= level))
            off = (row[f"at_{level}"] - level) / (level * (1 - level) / replicates) ** 0.5
            row[f"standard_errors_{level}"] = round(float(off), 2)
        rows.append(row)
    return rows


def select_epoch(
    rng: np.random.Generator, difficulty: np.ndarray, accuracy: np.ndarray, candidates: int
) -> np.ndarray:
    """Return the score on validation of the best of equally good epochs, (replicates, seeds)."""
    rights = [
        draw_correct(rng, difficulty, accuracy).mean(2, dtype=np.float64) for _ in range(candidates)
    ]
    return np.max(rights, axis=0)


def simulate_null_outcomes(
    rng: np.random.Generator, seeds: int, items: int, sd: float, behind: float, replicates: int
) -> dict[str, np.ndarray]:
    """Return of runs without a gain the outcomes, and the baselines named, by both rules.

    The better of scratch and classical is as good as the own arm; the other is `behind`, scratch
    where it is positive.
    """
    epochs, rows = {"own": 5, "scratch": 15, "classical": 1}, max(100, items // 2)
    lag = {"own": 0.0, "scratch": max(behind, 0.0), "classical": max(-behind, 0.0)}
    # A linear model that is solved varies by its shots alone.
    sds = {"own": sd, "scratch": 2 * sd, "classical": sd / 2}
    outcomes: dict[str, list[Any]] = {
        key: [] for key in ("lesser", "validation", "named", "scratch")
    }
    for size in split_replicates(replicates, seeds * (items + rows)):
        accuracy = {
            arm: 0.7 - lag[arm] + sds[arm] * rng.standard_normal((size, seeds)) for arm in epochs
        }
        held = draw_difficulty(rng, size, np.arange(rows), 3)
        scores = {
            arm: select_epoch(rng, difficulty, accuracy[arm], epochs[arm])
            for arm, difficulty in zip(epochs, held, strict=True)
        }
        test = draw_difficulty(rng, size, np.arange(items), 3)
        rights = {
            arm: draw_correct(rng, difficulty, accuracy[arm]).astype(np.int8)
            for arm, difficulty in zip(epochs, test, strict=True)
        }
        for i in range(size):
            gains = {
                arm: compute_row_gain(rights["own"][i] - rights[arm][i])
                for arm in ("scratch", "classical")
            }
            least = select_lesser_gain(gains)
            by_validation = max(gains, key=lambda arm: scores[arm][i].mean())
            outcomes["lesser"].append(least.outcome)
            outcomes["named"].append(least.baseline == "scratch")
            outcomes["validation"].append(gains[by_validation].outcome)
            outcomes["scratch"].append(by_validation == "scratch")
    return {key: np.array(values) for key, values in outcomes.items()}


def compute_row_gain(differences: np.ndarray) -> Gain:
    """Return the gain of (seeds, items) differences of rights and wrongs."""
    units = np.arange(differences.shape[1])
    value = float(differences.mean())
    interval = compute_error(compute_block_values(differences, units), units).interval(value)
    return Gain(
        metric="accuracy", value=value, ci95=interval, seeds=len(differences), p_value=None,
        relative_error_reduction=None, outcome=classify_gain(interval, MARGIN),
    )  # fmt: skip


def judge_positive(replicates: int) -> list[dict[str, Any]]:
    """Count what null runs are called, by the lesser gain and by the better on validation."""
    rows = []
    for seeds, items, sd, behind in itertools.product(
        (3, 8), (400, 1500), (0.005, 0.02), (-0.03, 0.0, 0.02, 0.05)
    ):
        rng = np.random.default_rng([seeds, items, round(1000 * sd), round(1000 * behind + 100)])
        outcomes = simulate_null_outcomes(rng, seeds, items, sd, behind, replicates)
        rows.append(
            {
                "seeds": seeds,
                "items": items,
                "seed_sd": sd,
                "scratch_behind": behind,
                "replicates": replicates,
                "positive": float(np.mean(outcomes["lesser"] == "positive")),
                "negative": float(np.mean(outcomes["lesser"] == "negative")),
                "scratch_named": float(np.mean(outcomes["named"])),
                "positive_by_validation": float(np.mean(outcomes["validation"] == "positive")),
                "scratch_named_by_validation": float(np.mean(outcomes["scratch"])),
            }  # fmt: skip
        )
    return rows


def simulate_changes(
    rng: np.random.Generator, seeds: int, documents: int, skew: float, probes: bool
) -> dict[str, tuple[float, float, float]]:
    """Return the change and the interval of each figure of one run."""
    units = np.repeat(np.arange(documents), 1 + np.arange(documents) % 3)
    centres = rng.normal(size=(documents, WIDTH))
    tone = (centres[:, 0] + 0.5 * rng.normal(size=documents) > 0)[units]
    old = centres[units] + 0.7 * rng.normal(size=(len(units), WIDTH))
    after = []
    for _ in range(seeds):
        far = 0.35 * np.exp(skew * rng.standard_normal())
        turn = rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5
        new = old + far * (old @ turn + rng.normal(size=old.shape))
        after.append({"general": new, "new": new[:1]})
    controls = {"document": units.astype(str), "tone": tone.astype(str)}
    spec = ForgettingSpec(controls, ("tone",) if probes else (), units, 0.2)
    forgetting = measure_forgetting({"general": old, "new": old[:1]}, {"own": after}, spec)["own"]
    figures = {name: getattr(forgetting, name) for name in ("neighbours", "cosine", "kl", "cka")}
    for control, of_control in forgetting.controls.items():
        figures |= {f"{control} {name}": figure for name, figure in of_control if figure}
    return {name: (figure.change, *figure.ci95) for name, figure in figures.items()}


def judge_forgetting(replicates: int) -> list[dict[str, Any]]:
    """Count how often the interval of each figure holds the mean of its change over all runs."""
    rows = []
    settings = [(s, d, k, False) for s in (3, 8) for d in (40, 80) for k in (0.15, 0.5)]
    for seeds, documents, skew, probes in [*settings, (3, 40, 0.3, True)]:
        rng = np.random.default_rng([seeds, documents, round(100 * skew)])
        count = replicates // (40 if probes else 13)
        drawn = [simulate_changes(rng, seeds, documents, skew, probes) for _ in range(count)]
        row: dict[str, Any] = {
            "seeds": seeds, "documents": documents, "seed_sd_of_log": skew, "replicates": count,
        }  # fmt: skip
        for name in drawn[0]:
            change, low, high = np.array([figures[name] for figures in drawn]).T
            truth = change.mean()
            row[name] = float(np.mean((low <= truth) & (truth <= high)))
        rows.append(row)
    return rows


PARTS: dict[str, Part] = {
    "p_values": judge_p_values,
    "positive": judge_positive,
    "forgetting": judge_forgetting,
}


def format_table(result: dict[str, Any]) -> list[str]:
    """Return a line for each part: the extremes over its settings."""
    lines = []
    for row in _format_extremes(result.get("p_values", []), "at_0.05", "at_0.01"):
        lines.append(f"p of equal arms: {row}")
    keys = ("positive", "negative", "positive_by_validation")
    for row in _format_extremes(result.get("positive", []), *keys):
        lines.append(f"null runs: {row}")
    forgetting = result.get("forgetting", [])
    for name in [key for key in forgetting[-1] if key not in SETTING_KEYS] if forgetting else []:
        shares = [row[name] for row in forgetting if name in row]
        lines.append(
            f"forgetting, {name}: covered {min(shares):.3f} to {max(shares):.3f}, mean "
            f"{np.mean(shares):.3f} ({len(shares)} settings)"
        )
    return lines


SETTING_KEYS = ("seeds", "documents", "seed_sd_of_log", "replicates")


def _format_extremes(rows: Sequence[dict[str, Any]], *keys: str) -> list[str]:
    return [
        f"{key} {min(row[key] for row in rows):.4f} to {max(row[key] for row in rows):.4f} "
        f"({len(rows)} settings, {rows[0]['replicates']:,} runs each)"
        for key in keys
        if rows
    ]


if __name__ == "__main__":
    run_parts(__doc__, PARTS, REPLICATES, RESULT, format_table)
