"""Compare masked-language adaptation with a plain Trainer: tokens per second and peak memory.

    python benchmarks/adapt_mlm.py                    # both shapes, under 8 minutes on 2 idle cores
    python benchmarks/adapt_mlm.py --shapes minilm --pairs 1

`hftl` is what an adaptation trains with: `load_mlm`, `set_trainable`, `TransferTrainer`. `trainer`
is what transformers' examples/pytorch/language-modeling/run_mlm.py does: `AutoModelForMaskedLM`
with its own loss in a `Trainer`. Both read the same weights, random ones, and the same batches:
full blocks of random tokens, 15 % hidden, in one order, without a padding mask; and they have the
same arguments: bf16, the fused AdamW, clipped gradients, no evaluation, saving or logging.

Before anything is timed, their losses over a few steps must agree in fp32 without dropout.

Every measurement is a process of its own, hftl and trainer in turn, in the order ABBA; the ratios
are taken within a pair. Peak memory is the process's greatest resident set, above what it was with
model and data loaded. It holds the optimizer's state and the gradients, which are the same for
both and told apart, activations, logits and the libraries' own buffers. It is measured twice: in
the timed processes, where glibc keeps much of what was freed (`kept`), and in one more of each that
gives freed memory back at once (`live`), which is slower. Linux only.

Results: benchmarks/results/adapt_mlm.json.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, BertConfig, Trainer, TrainerCallback

from hftl.adapt.encoder_io import set_trainable
from hftl.adapt.language_model import load_mlm
from hftl.config.section import Source
from hftl.data.corpus import SPECIAL_TOKENS_FILE, STARTS_WORD, TokenBlocks
from hftl.data.masking import MaskedBlocks, MaskingSpec
from hftl.data.text_inputs import IGNORE_INDEX
from hftl.models.source import find_source
from hftl.runtime.hardware import has_fast_bf16
from hftl.train.arguments import build_training_arguments
from hftl.train.samplers import SeededSampler
from hftl.train.trainer import TransferTrainer

RESULT = Path(__file__).parent / "results" / "adapt_mlm.json"
CONTENDERS = ("hftl", "trainer")
SEED = 0
PAD, FIRST, LAST, MASK, WORDS = 0, 101, 102, 103, 999
"""Token ids of BERT's vocabulary; its words begin at the last."""
RATIO = 0.15
MALLOC_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""glibc's settings for every larger piece of memory to return to the system when it is freed."""
CHECK_ROWS, CHECK_STEPS, LOSS_TOLERANCE = 4, 3, 1e-5
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """Describe a model's shape, a batch, and how long it is measured.

    `speed` and `memory` are the goals: tokens per second at least that multiple of the trainer's,
    peak memory above the loaded model at most that share.
    """

    width: int
    layers: int
    heads: int
    inner: int
    speed: float
    memory: float
    steps: int
    vocabulary: int = 30522
    rows: int = 32
    length: int = 128
    warm_up: int = 2


SHAPES = {
    "minilm": Shape(384, 6, 12, 1536, speed=1.75, memory=0.5, steps=12),
    "bert-base": Shape(768, 12, 12, 3072, speed=1.17, memory=0.5, steps=4),
}


class OrderedTrainer(Trainer):
    """Run transformers' Trainer on the rows in hftl's order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SeededSampler(len(self.train_dataset), SEED)  # pyright: ignore[reportArgumentType]


class StepTimer(TrainerCallback):
    """Record when every step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Record the time."""
        self.ends.append(time.perf_counter())


def write_inputs(shape: Shape, folder: Path) -> None:
    """Write a random model, and blocks enough for all steps."""
    config = BertConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.inner,
        max_position_embeddings=max(512, shape.length),
    )  # fmt: skip
    torch.manual_seed(SEED)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    payload, blocks = shape.length - 2, shape.rows * (shape.steps + shape.warm_up)
    draw = np.random.default_rng(SEED)
    draw.integers(WORDS, shape.vocabulary, blocks * payload).astype("uint32").tofile(
        folder / "train.ids"
    )
    np.full(blocks * payload, STARTS_WORD, np.uint8).tofile(folder / "train.flags")
    np.save(folder / "train.npy", np.arange(blocks + 1) * payload)
    frame = {"prefix": [FIRST], "suffix": [LAST], "dtype": "uint32"}
    (folder / SPECIAL_TOKENS_FILE).write_text(json.dumps(frame), encoding="utf-8")


def load_masked_blocks(shape: Shape, folder: Path) -> MaskedBlocks:
    """Return the blocks with their masks."""
    special = np.arange(shape.vocabulary) < WORDS
    words = np.arange(WORDS, shape.vocabulary)
    return MaskedBlocks(
        TokenBlocks(folder, "train"), MaskingSpec(RATIO, True, MASK, special, words), SEED, PAD
    )


def build_stock_collator(data: MaskedBlocks) -> Callable[[list[Any]], dict[str, Tensor]]:
    """Return a collator of the same batches in the form of a stock masked-LM model.

    Its `labels` are (batch, length), -100 where nothing is hidden.
    """

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        batch = data.collate(rows)
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        labels.view(-1)[batch["flat"]] = batch["labels"].view(-1)[batch["slots"]]
        return {"input_ids": batch["input_ids"], "labels": labels}

    return collate


def build_trainer(who: str, shape: Shape, folder: Path, training: dict[str, Any]) -> Trainer:
    """Return a trainer with its model and data loaded.

    Args:
        who: hftl or trainer.
        shape: of the model.
        folder: what `make` wrote.
        training: fields of `TrainingArguments` beside those that both share.
    """
    data = load_masked_blocks(shape, folder)
    shared = {
        "per_device_train_batch_size": shape.rows, "optim": "adamw_torch_fused",
        "learning_rate": 1e-4, "weight_decay": 0.01, "lr_scheduler_type": "constant",
        "save_strategy": "no", "logging_strategy": "no", "report_to": "none",
        "logging_nan_inf_filter": False,
    }  # fmt: skip
    args = build_training_arguments("adapt", training, shared, str(folder / "out"), SEED, "cpu")
    if who == "trainer":
        model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)
        return OrderedTrainer(
            model=model, args=args, train_dataset=data, data_collator=build_stock_collator(data)
        )
    source = find_source(Source(model=str(folder)))
    model, fresh = load_mlm(source, SEED)
    assert not fresh, fresh
    set_trainable(model, source.architecture_spec, "full", 0, {})
    return TransferTrainer(model=model, args=args, train_dataset=data, data_collator=data.collate)


def compute_losses(who: str, shape: Shape, folder: Path) -> list[float]:
    """Return the losses of the first steps, of a few rows, in fp32 and without dropout."""
    few = {"max_steps": CHECK_STEPS, "per_device_train_batch_size": CHECK_ROWS, "bf16": False}
    trainer, losses_ = build_trainer(who, shape, folder, few), []
    for module in trainer.model.modules():  # pyright: ignore[reportOptionalMemberAccess]
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    step = trainer.training_step

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        loss = step(*args, **kwargs)
        losses_.append(float(loss))
        return loss

    trainer.training_step = noted
    train(trainer)
    return losses_


def measure(who: str, shape: Shape, folder: Path) -> dict[str, Any]:
    """Measure one contender's speed and memory; call it in a fresh process.

    Returns:
        `tokens_per_second` after the steps of warming up; in MiB `loaded`, the resident set before
        the first step, `peak`, the greatest one since the process began, `above`, their difference;
        `state` and `gradients`, what those tensors take; and the `threads` that it ran on.
    """
    trainer, watch = build_trainer(who, shape, folder, build_timed_training(shape)), StepTimer()
    trainer.add_callback(watch)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]  # pyright: ignore
    for parameter in trained:  # What is mapped from the file counts as loaded once it was read.
        parameter.detach().sum()
    gc.collect()
    loaded = read_resident_memory("VmRSS")
    train(trainer)
    peak = read_resident_memory("VmHWM")
    state = [t for buffers in trainer.optimizer.state.values() for t in buffers.values()]  # pyright: ignore
    seconds = watch.ends[-1] - watch.ends[shape.warm_up - 1]
    return {
        "tokens_per_second": shape.rows * shape.length * shape.steps / seconds,
        "loaded": loaded,
        "peak": peak,
        "above": peak - loaded,
        "state": sum(t.nbytes for t in state if isinstance(t, Tensor)) / MIB,
        "gradients": sum(p.nbytes for p in trained) / MIB,
        "threads": torch.get_num_threads(),
    }


def build_timed_training(shape: Shape) -> dict[str, Any]:
    """Return the training arguments of a measurement."""
    return {"max_steps": shape.warm_up + shape.steps, "bf16": has_fast_bf16("cpu")}


def train(trainer: Trainer) -> None:
    """Train without the summary that transformers prints at the end."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer.train()


def read_resident_memory(field: str) -> float:
    """Return VmRSS, the resident set now, or VmHWM, its maximum so far, of this process in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux")


def run_alone(task: Callable[..., Any], *given: Any, **settings: str) -> Any:
    """Return the result of a function in a fresh process, with these environment variables."""
    os.environ.update(settings)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(task, *given).result()
    finally:
        for name in settings:
            del os.environ[name]


def compare(shape: Shape, pairs: int) -> dict[str, Any]:
    """Check that both contenders train alike, then measure them in turn.

    Returns:
        The shape, the check's greatest difference, every measurement, and hftl over trainer:
        `speed` and `kept`, as median, least and greatest of the pairs, and `live`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(shape, folder)
        first = {who: run_alone(compute_losses, who, shape, folder) for who in CONTENDERS}
        apart = np.abs(np.subtract(*first.values())).max()
        if not apart < LOSS_TOLERANCE:
            raise SystemExit(f"the contenders do not train alike: losses {first}; nothing is timed")
        measured: list[dict[str, Any]] = []
        for pair in range(pairs):
            order = CONTENDERS if pair % 2 == 0 else CONTENDERS[::-1]
            measured.append({who: run_alone(measure, who, shape, folder) for who in order})
        live = {
            who: run_alone(measure, who, shape, folder, **MALLOC_SETTINGS) for who in CONTENDERS
        }
    return {
        "shape": asdict(shape),
        "loss_difference": float(apart),
        "speed": summarize_ratios([
            p["hftl"]["tokens_per_second"] / p["trainer"]["tokens_per_second"]
                         for p in measured]),
        "kept": summarize_ratios([p["hftl"]["above"] / p["trainer"]["above"] for p in measured]),
        "live": live["hftl"]["above"] / live["trainer"]["above"],
        "pairs": measured,
        "giving_back": live,
    }  # fmt: skip


def summarize_ratios(ratios: list[float]) -> dict[str, float]:
    """Return median, least and greatest."""
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def describe_machine() -> dict[str, Any]:
    """Return the machine and versions that the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0].split(":", 1)[1].strip() if names else platform.machine(),
        "cores": os.cpu_count(),
        "bf16": has_fast_bf16("cpu"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def format_table(shapes: dict[str, Any]) -> list[str]:
    """Return the figures as lines: each contender's, then the ratios against the goals."""
    rows = [f"{'':22}tokens/s  above loaded, MiB: kept   live = optimizer + gradients + rest"]
    for name, result in shapes.items():
        for who in CONTENDERS:
            speed, retained = (median(pair[who][key] for pair in result["pairs"])
                           for key in ("tokens_per_second", "above"))  # fmt: skip
            live = result["giving_back"][who]
            rest = live["above"] - live["state"] - live["gradients"]
            rows.append(
                f"{name:12}{who:10}{speed:8.0f}{retained:25.0f}{live['above']:7.0f}"
                f"{live['state']:12.0f}{live['gradients']:12.0f}{rest:7.0f}"
            )
        goal = result["shape"]
        rows += [
            f"  speed        {format_ratio(result['speed'])}, goal: at least {goal['speed']}x",
            f"  memory kept  {format_ratio(result['kept'])}, goal: at most {goal['memory']}x",
            f"         live  {result['live']:.2f}x",
        ]
    return rows


def format_ratio(summary: dict[str, float]) -> str:
    """Return a ratio in words."""
    return f"{summary['median']:.2f}x ({summary['min']:.2f} to {summary['max']:.2f})"


def main() -> None:
    """Measure, print the table and store the figures."""
    parser = argparse.ArgumentParser(description="Masked-language adaptation against a Trainer.")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--pairs", type=int, default=4, help="measurements of each; default: 4")
    parser.add_argument("--into", type=Path, default=RESULT, help="default: %(default)s")
    given = parser.parse_args()
    results = {name: compare(SHAPES[name], given.pairs) for name in given.shapes}
    lines = format_table(results)
    print("\n".join(lines))
    output = {"machine": describe_machine(), "table": lines, "shapes": results}
    given.into.parent.mkdir(exist_ok=True)
    given.into.write_text(json.dumps(output, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    # The children inherit it: nothing here is on a hub.
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main())
