"""Train a tiny model for 500 steps: what a step costs beside its arithmetic.

    python benchmarks/speed_steps.py FOLDER CONTENDER

prints {"train": seconds}. `loop` is a bare loop of PyTorch, `trainer` transformers' Trainer, `hftl`
TransferTrainer in a script of one's own; all train the same model in fp32 on batches of 8 rows.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from speed_jobs import Inputs
from speed_peers import build_arguments, load_splits
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    get_linear_schedule_with_warmup,
)
from transformers.utils import logging


def train_in_loop(inputs: Inputs, model: Any, rows: Any, collate: Any) -> None:
    """Train in a bare loop: forward, backward, clip, step."""
    torch.manual_seed(0)
    rows.set_format("torch")
    batches = DataLoader(rows, batch_size=inputs.job.batch, shuffle=True, collate_fn=collate)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=inputs.job.rate, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(batches))
    model.train()
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def train_by_trainer(inputs: Inputs, model: Any, rows: Any, collate: Any, is_hftl: bool) -> None:
    """Train with transformers' Trainer, or with hftl's."""
    kind: Any = Trainer
    if is_hftl:
        from hftl import TransferTrainer, prepare

        kind, model = TransferTrainer, prepare(model, strategy="full")
    args = build_arguments(inputs, False, eval_strategy="no", logging_strategy="no")
    trainer = kind(model=model, args=args, train_dataset=rows, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def run(inputs: Inputs, contender: str) -> float:
    """Return the seconds of a contender's training."""
    tokenizer = AutoTokenizer.from_pretrained(inputs.source)
    rows = load_splits(inputs, tokenizer, False)["train"]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(inputs.source, num_labels=2)
    collate = DataCollatorWithPadding(tokenizer)
    started = time.perf_counter()
    if contender == "loop":
        train_in_loop(inputs, model, rows, collate)
    else:
        train_by_trainer(inputs, model, rows, collate, contender == "hftl")
    return time.perf_counter() - started


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(json.dumps({"train": run(Inputs.read(Path(sys.argv[1])), sys.argv[2])}))
