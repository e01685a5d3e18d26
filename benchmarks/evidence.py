"""Ask whether the numbers before training predict what training gives.

    python benchmarks/assets.py movies tweets amazon nyt bbc clipart fashion
    python benchmarks/assets.py smollm2 vit efficientnet    # these with pip install "hftl[timm]"
    python benchmarks/evidence.py zoo --budget 180      # again until it says that all is there
    python benchmarks/evidence.py report

`zoo` makes sources out of MiniLM and of a small DINOv2: layers cut off, shuffled, noisy and random
weights, wrong preprocessing, siblings that were fine-tuned on other rows of each target, and on
labels that mean nothing. Beside them stand a decoder and a convolutional network, which are of
another size. Every source is scored from its frozen features on each target that it can read, and
then fine-tuned with few labels; the weighted Kendall's tau of each score with the accuracy on test
says whether the score ranks sources. Of the domains that the siblings come from the distances to
the targets are compared with what the siblings gained. Every step leaves a file in the work folder,
so a stopped job goes on; `report` takes what is finished. Results:
benchmarks/results/evidence.json and evidence.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from evidence_images import IMAGE_TARGETS, list_image_zoo, write_image_tables
from evidence_zoo import (
    DOMAINS,
    MINILM,
    list_text_zoo,
    make_context,
    make_recipe,
    write_tables,
)
from scipy.stats import spearmanr, weightedtau

from hftl.analysis.domains import compare_domains
from hftl.analysis.rank import rank_sources
from hftl.config.recipe import Recipe
from hftl.finetune.arm import train_arm
from hftl.pipeline.pipeline import silence_libraries
from hftl.runtime.run_folder import to_json, write_text

TEST_SHARE, SHOTS = 0.5, 60
FEWER_SHOTS = {"bbc": 40, "clipart": 12, "garments": 12}
RATES = {"smollm2": 1e-4, "efficientnet": 1e-3, "dinov2": 1e-4}
"""Of fine-tuning the top blocks, by the first word of a source; of MiniLM and its like 5e-4."""
SCORES = ("logme", "h_score", "nleep", "nce", "transrate", "gbc", "knn", "probe", "parameters")
DISTANCES = ("a_distance", "mmd", "frechet", "word_divergence")
KINDS: dict[str, Callable[[str, str], bool]] = {
    "all": lambda target, source: True,
    "texts": lambda target, source: target in DOMAINS,
    "pictures": lambda target, source: target in IMAGE_TARGETS,
    "MiniLM, siblings": lambda target, source: source == "minilm" or source.startswith("on-"),
}
"""Pairs of a target and a source that a column of the report takes."""
DRAWS = 1000
RESULTS = Path(__file__).parent / "results" / "evidence.json"
Step = tuple[Path, Callable[[], object]]
"""A file, and what is written to it."""


def make_target_recipe(work: Path, source: str, target: str) -> Recipe:
    """Return the recipe of a source on a target: the top two blocks train on few labels."""
    folder = work / "zoo" / source
    layers = json.loads((folder / "config.json").read_text("utf-8")).get("num_hidden_layers", 2)
    training = {"learning_rate": RATES.get(source.partition("-")[0], 5e-4), "num_train_epochs": 4,
                "per_device_train_batch_size": 16, "warmup_steps": 0.1}  # fmt: skip
    (table,) = (work / "targets").glob(f"{target}.*")
    return make_recipe(str(folder), table, TEST_SHARE, FEWER_SHOTS.get(target, SHOTS), {
        "strategy": "partial", "blocks": min(2, layers), "training": training,
    })  # fmt: skip


def score_source(work: Path, source: str, target: str) -> dict[str, object]:
    """Return the scores of a source's frozen features on a target's labelled rows."""
    recipe = make_target_recipe(work, source, target)
    (ranked,) = rank_sources(recipe, [recipe.source.model], work / "features", 1000).sources
    return {"scores": ranked.to_dict()["scores"], "probe": ranked.probe,
            "parameters": ranked.parameters, "best": str(ranked.best),
            "pass_seconds": ranked.pass_seconds, "score_seconds": ranked.score_seconds}  # fmt: skip


def finetune_source(work: Path, source: str, target: str) -> dict[str, object]:
    """Return the accuracy on test of a source that was fine-tuned on a target's labelled rows."""
    recipe = make_target_recipe(work, source, target)
    context = make_context(recipe)
    logits = train_arm(context, recipe.finetune, 0, compared=False, splits=("test",)).logits["test"]
    rows = context.prepared.rows["test"]
    hits = context.prepared.decode_for_metrics(rows, logits) == (
        context.prepared.encode_for_metrics(rows)
    )
    return {"accuracy": float(hits.mean()), "test_rows": len(rows)}


def measure_distances(work: Path) -> dict[str, object]:
    """Return the distances between the rows of siblings and of targets, on MiniLM."""
    recipe = make_recipe(MINILM, work / "targets" / "movies.csv", TEST_SHARE, None, {})
    tables = [str(work / kind / f"{name}.csv") for kind in ("siblings", "targets")
              for name in DOMAINS]  # fmt: skip
    context = make_context(recipe)
    return compare_domains(recipe, context, work / "features", tables, 200).to_dict()


def list_steps(assets: Path, work: Path) -> Iterator[Step]:
    """Yield every step of the zoo, what others need first, the slow decoder last."""
    yield work / "tables.json", lambda: write_tables(assets, work)
    yield work / "image-tables.json", lambda: write_image_tables(assets, work)
    zoos = (list_text_zoo(assets, work), list_image_zoo(assets, work))
    for zoo in zoos:
        for name, build in zoo.items():
            yield work / "zoo" / f"{name}.json", partial(build, work / "zoo" / name)
    yield work / "distances.json", lambda: measure_distances(work)
    pairs = [
        (target, name)
        for zoo, targets in zip(zoos, (DOMAINS, IMAGE_TARGETS), strict=True)
        for target in targets
        for name in zoo
    ]
    for target, name in sorted(pairs, key=lambda pair: pair[1] == "smollm2"):
        path = work / "pairs" / target
        yield path / f"{name}-scores.json", partial(score_source, work, name, target)
        yield path / f"{name}-tuned.json", partial(finetune_source, work, name, target)


def run_steps(steps: Iterator[Step], seconds: float) -> bool:
    """Do the steps that are missing until the time is over; return whether none is left."""
    started, longest = time.monotonic(), 0.0
    for path, compute in steps:
        if path.exists():
            continue
        begun = time.monotonic()
        if begun - started + longest > seconds:
            print(f"stopped before {path}: run the same again")
            return False
        value = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, to_json(value))
        longest = max(longest, time.monotonic() - begun)
        print(f"{path.parent.name}/{path.stem} {time.monotonic() - begun:.1f} s", flush=True)
    return True


# The report.


def read_pairs(work: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return score and accuracy of every finished pair: by target, source and name."""
    pairs: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for path in sorted((work / "pairs").glob("*/*-tuned.json")):
        scores = path.with_name(path.name.replace("-tuned", "-scores"))
        if not scores.exists():
            continue
        tree, tuned = (json.loads(p.read_text("utf-8")) for p in (scores, path))
        values = {**tree["scores"], "probe": tree["probe"], "parameters": tree["parameters"]}
        source = path.name.removesuffix("-tuned.json")
        pairs[path.parent.name][source] = values | {"accuracy": tuned["accuracy"]}
    return pairs


def correlate_scores(
    pairs: dict[str, dict[str, dict[str, float]]], only: Callable[[str, str], bool]
) -> dict[str, dict[str, Any]]:
    """Return the weighted Kendall's tau of every score, mean over targets, with its interval.

    The bootstrap draws targets, and sources within each.
    """
    tables = [
        [values for source, values in by_source.items() if only(target, source)]
        for target, by_source in pairs.items()
    ]
    tables = [table for table in tables if len(table) >= 4]
    results: dict[str, dict[str, Any]] = {}
    for score in SCORES:
        columns = [
            np.array([[row[score], row["accuracy"]] for row in table if score in row])
            for table in tables
        ]
        rng = np.random.default_rng(0)
        drawn = []
        for _ in range(DRAWS):
            chosen = [columns[i] for i in rng.integers(0, len(columns), len(columns))]
            taus = [compute_tau(c[rng.integers(0, len(c), len(c))]) for c in chosen]
            drawn.append(np.nanmean(taus))
        taus = [compute_tau(column) for column in columns]
        low, high = np.nanquantile(drawn, (0.025, 0.975))
        results[score] = {"tau": float(np.nanmean(taus)), "ci95": [float(low), float(high)],
                          "by_target": taus}  # fmt: skip
    return results


def compute_tau(column: np.ndarray) -> float:
    """Return the weighted Kendall's tau of (sources, 2); nan where all scores are alike."""
    if min(len(np.unique(side)) for side in column.T) < 2:
        return float("nan")
    result: Any = weightedtau(column[:, 0], column[:, 1])
    return float(result.statistic)


def correlate_ranks(column: np.ndarray) -> float:
    """Return Spearman's rho of (pairs, 2)."""
    result: Any = spearmanr(column)
    return float(result.statistic)


def correlate_distances(
    work: Path, pairs: dict[str, dict[str, dict[str, float]]]
) -> dict[str, dict[str, Any]]:
    """Return Spearman's correlation of distances with what siblings gain over MiniLM.

    The bootstrap draws the pairs of a sibling and another domain's target.
    """
    facts = json.loads((work / "distances.json").read_text("utf-8"))
    between: dict[tuple[str, str], dict[str, float]] = {}
    for pair in facts["pairs"]:
        places = [Path(pair[side]) for side in ("first", "second")]
        if [place.parent.name for place in places] == ["siblings", "targets"]:
            values = {name: pair[name]["value"] for name in DISTANCES}
            between[places[0].stem, places[1].stem] = values
    rows = [
        {**values, "gain": pairs[target][f"on-{domain}"]["accuracy"]
         - pairs[target]["minilm"]["accuracy"]}
        for (domain, target), values in between.items()
        if domain != target and {f"on-{domain}", "minilm"} <= set(pairs.get(target, {}))
    ]  # fmt: skip
    results: dict[str, dict[str, Any]] = {}
    rng = np.random.default_rng(0)
    for name in DISTANCES:
        column = np.array([[row[name], row["gain"]] for row in rows])
        drawn = [
            correlate_ranks(column[rng.integers(0, len(rows), len(rows))])
            for _ in range(DRAWS)
        ]  # fmt: skip
        low, high = np.nanquantile(drawn, (0.025, 0.975))
        results[name] = {"rho": correlate_ranks(column), "ci95": [low, high],
                         "pairs": len(rows)}  # fmt: skip
    return results


def write_report(work: Path) -> None:
    """Write the results of what is finished, print their tables and draw them."""
    pairs = read_pairs(work)
    counts = {target: len(by_source) for target, by_source in pairs.items()}
    tau = {kind: correlate_scores(pairs, only) for kind, only in KINDS.items()}
    distances = correlate_distances(work, pairs) if (work / "distances.json").exists() else {}
    lines = [
        f"weighted tau of a score with accuracy after fine-tuning: {sum(counts.values())} pairs, "
        f"{len(counts)} targets of {min(counts.values())} to {max(counts.values())} sources",
        "  score        " + "".join(f"{kind:<21}" for kind in KINDS).rstrip(),
    ]
    for score in SCORES:
        cells = [_format_interval(tau[kind][score], "tau") for kind in KINDS]
        lines.append(f"  {score:<13}" + "".join(f"{cell:<21}" for cell in cells).rstrip())
    if distances:
        number = next(iter(distances.values()))["pairs"]
        lines.append("Spearman's rho of a distance with a sibling's gain elsewhere: "
                     f"{number} pairs")  # fmt: skip
        lines += [f"  {name:<15} {_format_interval(value, 'rho')}"
                  for name, value in distances.items()]  # fmt: skip
    result = {"pairs": pairs, "tau": tau, "distances": distances, "table": lines}
    write_text(RESULTS, to_json(result))
    draw_figure(tau, distances, RESULTS.with_suffix(".png"))
    print("\n".join(lines))


def _format_interval(value: dict[str, Any], name: str) -> str:
    low, high = value["ci95"]
    if not np.isfinite([value[name], low, high]).all():
        return "-"
    return f"{value[name]:+.2f} [{low:+.2f}, {high:+.2f}]"


def draw_figure(tau: dict[str, Any], distances: dict[str, Any], path: Path) -> None:
    """Draw every coefficient with its interval: scores on the left, distances on the right."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 5.5), width_ratios=(2, 1), constrained_layout=True
    )
    for shift, (kind, values) in zip((-0.27, -0.09, 0.09, 0.27), tau.items(), strict=True):
        _draw_intervals(left, [values[score] for score in SCORES], "tau", shift, kind)
    left.set_yticks(range(len(SCORES)), SCORES)
    left.set_xlabel("weighted Kendall's tau with accuracy after fine-tuning")
    left.legend(loc="upper left")
    _draw_intervals(right, list(distances.values()), "rho", 0.0, "")
    right.set_yticks(range(len(distances)), list(distances))
    right.set_xlabel("Spearman's rho with a sibling's gain")
    for axis in (left, right):
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_xlim(-1, 1)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_intervals(
    axis: Any, values: list[dict[str, Any]], name: str, shift: float, label: str
) -> None:
    points = np.array([value[name] for value in values])
    ends = np.array([value["ci95"] for value in values]).reshape(-1, 2)
    reach = np.maximum([points - ends[:, 0], ends[:, 1] - points], 0)
    axis.errorbar(points, np.arange(len(points)) + shift, xerr=reach, fmt="o", label=label)


def main() -> int:
    """Run a job; exit with 3 where steps are left."""
    parser = argparse.ArgumentParser(description="Do scores before training predict training?")
    parser.add_argument("job", choices=("zoo", "report"))
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    options = parser.parse_args()
    silence_libraries()
    if options.job == "report":
        write_report(options.work)
        return 0
    finished = run_steps(list_steps(options.assets, options.work), options.budget)
    print("all is there" if finished else "not all is there")
    return 0 if finished else 3


if __name__ == "__main__":
    sys.exit(main())
