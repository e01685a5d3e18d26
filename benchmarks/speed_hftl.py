"""Run hftl on a job of the benchmark of speed: its recipe, its command, and what it took.

    python benchmarks/speed_hftl.py FOLDER      # the jobs without a command of hftl: 64 heads

prints {"train": seconds}.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from speed_jobs import HEADS, LAYER_DECAYS, LORA, PHASES_FILE, Inputs, Job

HERE = Path(__file__).parent
STEP_LINE = re.compile(r"^ +adapt mlm full: ")
ADAPTED_LINE = re.compile(r"^ +adapt mlm full, ")
HEADER_LINE = re.compile(r"^ +time ")
LAST_ARM_LINE = re.compile(r"^ +\[(\d+)/\1\] ")
"""As many are done as there are."""


def build_recipe(inputs: Inputs, shards: int = 1) -> dict[str, Any]:
    """Return hftl's recipe of a job; processes share a batch in as many `shards`."""
    job, folder = inputs.job, inputs.folder
    source = {"model": inputs.source}
    if job.kind == "adapt":
        training = {
            "num_train_epochs": job.epochs, "per_device_train_batch_size": job.batch,
            "learning_rate": 1e-4, "bf16": inputs.bf16,
        }  # fmt: skip
        adapt = {
            "objective": "mlm", "guard": "off", "patience": None, "whole_words": False,
            "training": training,
        }  # fmt: skip
        table = {"path": str(folder / "train.csv"), "text": "text"}
        return {"source": source, "data": {"task": None, "train": table}, "adapt": adapt}
    lora = LORA | ({"layers_to_transform": list(job.lora_layers)} if job.lora_layers else {})
    epochs = {"num_train_epochs": job.epochs} if job.strategy != "gradual" else {}
    return {
        "source": source,
        "data": {split: {"path": str(folder / f"{split}.csv")} for split in job.rows},
        "finetune": {
            "strategy": job.strategy, "head_init": "random", "lora": lora, "blocks": job.blocks,
            "pooling": "native" if job.source == "vit-small" else "mean",
            "gradual": {"epochs": job.epochs},
            "training": {
                "learning_rate": job.rate, "per_device_train_batch_size": job.batch // shards,
                "bf16": inputs.bf16, **epochs,
            },
        },
        "retain": {"kl": {"weight": job.kl, "on": "relational"}} if job.kl else None,
        "measure": {"seeds": list(range(job.seeds)), "arms": list_arms(job)},
    }  # fmt: skip


def list_arms(job: Job) -> list[dict[str, Any]]:
    """Return the arms beside the recipe's own: the other layer-wise rates of a sweep."""
    if job.kind != "rates":
        return []
    others = LAYER_DECAYS[1:]
    return [{f"decay-{100 * decay:.0f}": {"finetune.layer_decay": decay}} for decay in others]


def find_run(inputs: Inputs, contender: str) -> Path:
    """Return the run folder of a contender, beside the rows."""
    return inputs.folder / f"run-{contender}"


def build_command(inputs: Inputs, contender: str) -> list[str]:
    """Return the words of hftl's command of a job, the recipe written beside the rows.

    Args:
        inputs: of the job.
        contender: `hftl`, or `one-process`, which is hftl too.
    """
    job, folder = inputs.job, inputs.folder
    processes = job.processes if contender == "hftl" else 1
    if job.kind in ("heads", "steps"):
        script = "speed_steps.py" if job.kind == "steps" else "speed_hftl.py"
        return [sys.executable, str(HERE / script), str(folder), "hftl"]
    launch = [sys.executable, "-m", "hftl"]
    if processes > 1:
        count = ["--nproc_per_node", str(processes)]
        launch = [sys.executable, "-m", "torch.distributed.run", *count, "-m", "hftl"]
    shards = processes if job.seeds == 1 else 1
    if job.kind == "predict":
        table, output = str(folder / "train.csv"), str(folder / "hftl.csv")
        adapter = [str(folder / "adapter"), table, "--output", output, "--base", inputs.source]
        return [*launch, "predict", *adapter]
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(build_recipe(inputs, shards)), encoding="utf-8")
    verb = "adapt" if job.kind == "adapt" else "finetune"
    command = [*launch, verb, str(recipe), "--output"]
    command += [str(find_run(inputs, contender)), "--restart"]
    if processes > 1:
        command.append(f"measure.parallel={'arms' if job.seeds > 1 else 'data'}")
    return command


def read_train_seconds(
    inputs: Inputs, contender: str, lines: list[tuple[float, str]]
) -> float | None:
    """Return the seconds of hftl's training after its command; None where it only predicts.

    Args:
        inputs: of the job.
        contender: see `build_command`.
        lines: what it printed, each with the seconds since its start.
    """
    job = inputs.job
    if job.kind == "predict":
        return None
    if job.kind in ("heads", "steps"):
        return json.loads(lines[-1][1])["train"]
    if job.kind == "adapt":
        return find_line(lines, ADAPTED_LINE) - find_line(lines, STEP_LINE)
    if job.seeds > 1 or job.kind == "rates":
        return find_line(lines, LAST_ARM_LINE) - find_line(lines, HEADER_LINE)
    name = f"{job.strategy}-seed0"
    arm = find_run(inputs, contender) / "arms" / name
    metrics = json.loads((arm / "metrics.json").read_text("utf-8"))
    if job.strategy == "gradual":
        phases = json.dumps(count_phases(metrics))
        (inputs.folder / PHASES_FILE).write_text(phases, encoding="utf-8")
    return metrics["timings"]["train_seconds"]


def find_line(lines: list[tuple[float, str]], pattern: re.Pattern[str]) -> float:
    """Return when the first line of a pattern was printed.

    Raises:
        SystemExit: if none was.
    """
    for seconds, line in lines:
        if pattern.match(line):
            return seconds
    raise SystemExit(f"hftl printed no line like {pattern.pattern!r}: {lines}")


def count_phases(metrics: dict[str, Any]) -> int:
    """Return how many phases a gradual training ran, before one was no better."""
    return len({row["phase"] for row in metrics["training"]["history"]})


def solve_heads(inputs: Inputs) -> float:
    """Fit the heads of the sweep on features of one pass; return the seconds."""
    from speed_solved import C_GRID, draw_rows

    from hftl.analysis.logistic import fit_path, turn_rows
    from hftl.config.recipe import Recipe
    from hftl.pipeline.pipeline import open_recipe

    context = open_recipe(Recipe.parse(build_recipe(inputs)))
    started = time.perf_counter()
    rows = context.prepared.rows
    features = {split: context.extract_features("mean", 0, rows[split]) for split in rows}
    labels = {split: context.prepared.encode_targets(rows[split]) for split in rows}
    for draw in range(HEADS // len(C_GRID)):
        chosen = draw_rows(len(rows["train"]), draw)
        x = features["train"][chosen].astype(np.float64)
        mean, scale = x.mean(0), np.maximum(x.std(0), 1e-6)
        turned, axes = turn_rows((x - mean) / scale) or sys.exit("too many rows")
        held = (features["validation"] - mean) / scale @ axes.matrix.T
        for weight, bias in fit_path(turned, labels["train"][chosen], 2, C_GRID):
            ((held @ weight.T + bias).argmax(1) == labels["validation"]).mean()
    return time.perf_counter() - started


SCRIPTS: dict[str, Callable[[Inputs], float]] = {"heads": solve_heads}

if __name__ == "__main__":
    read = Inputs.read(Path(sys.argv[1]))
    print(json.dumps({"train": SCRIPTS[read.job.kind](read)}))
