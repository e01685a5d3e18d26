"""Train as an expert's script with transformers and peft does: the peers of the trained jobs.

    python benchmarks/speed_peers.py FOLDER CONTENDER

prints {"train": seconds}. Nothing of hftl is imported here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from speed_jobs import LAYER_DECAYS, LORA, MAX_LENGTH, PHASES_FILE, TARGETS, Inputs, Job
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

EVAL_BATCH = 64
SHIPPED_EVAL_BATCH = 8
"""The default of TrainingArguments."""
KL_TEMPERATURE = 0.05


class Classifier(nn.Module):
    """Put mean pooling and a linear head on an encoder."""

    def __init__(self, source: str, dropout: float | None = None) -> None:
        super().__init__()
        config = AutoConfig.from_pretrained(source)
        if dropout is not None:
            config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
        self.encoder: Any = AutoModel.from_pretrained(
            source, config=config, add_pooling_layer=False
        )
        self.head = nn.Linear(config.hidden_size, 2)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (batch, width): the mean over a text's tokens."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        mask = attention_mask.unsqueeze(-1).to(states.last_hidden_state.dtype)
        return (states.last_hidden_state * mask).sum(1) / mask.sum(1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Return loss and logits."""
        self.pooled = self.embed(input_ids, attention_mask)
        logits = self.head(self.pooled)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # pyright: ignore


class KLTrainer(Trainer):
    """Add the KL between the original's similarities of a batch's rows and the model's."""

    kl_weight = 0.0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """Return the task's loss and, in training, the KL."""
        outputs = model(**inputs)
        loss = outputs.loss
        if model.training:
            pooled = model.pooled
            model.eval()
            with torch.no_grad(), model.encoder.disable_adapter():
                original = model.embed(inputs["input_ids"], inputs["attention_mask"])
            model.train()
            kl = F.kl_div(
                compare_rows(pooled), compare_rows(original), log_target=True,
                reduction="batchmean",
            )  # fmt: skip
            loss = loss + self.kl_weight * kl
        return (loss, outputs) if return_outputs else loss


def compare_rows(embeddings: Tensor) -> Tensor:
    """Return (batch, batch) logarithms of how similar each row is to the others."""
    normal = F.normalize(embeddings.float(), dim=-1)
    itself = torch.eye(len(normal), dtype=torch.bool, device=normal.device)
    return (normal @ normal.T / KL_TEMPERATURE).masked_fill(itself, -1e9).log_softmax(-1)


def build_model(inputs: Inputs, dropout: float | None = None) -> Any:
    """Return the encoder with its head, prepared for the job's strategy."""
    torch.manual_seed(0)
    job, model = inputs.job, Classifier(inputs.source, dropout)
    if job.strategy == "lora":
        chosen = {"layers_to_transform": list(job.lora_layers)} if job.lora_layers else {}
        config = LoraConfig(target_modules=TARGETS, **LORA, **chosen)  # pyright: ignore
        model.encoder = get_peft_model(model.encoder, config)
    elif job.strategy != "full":
        model.encoder.requires_grad_(False)
        top = model.encoder.encoder.layer[-job.blocks :] if job.strategy == "partial" else ()
        for block in top:
            block.requires_grad_(True)
    return model


def build_arguments(inputs: Inputs, is_shipped: bool, **settings: Any) -> TrainingArguments:
    """Return the TrainingArguments of a job."""
    job = inputs.job
    tuned: dict[str, Any] = {} if is_shipped else {"optim": "adamw_torch_fused"}
    arguments: dict[str, Any] = {
        "output_dir": str(inputs.folder / "peer"), "use_cpu": not torch.cuda.is_available(),
        "bf16": inputs.bf16, "eval_strategy": "epoch", "save_strategy": "no", "seed": 0,
        "report_to": "none", "disable_tqdm": True, "learning_rate": job.rate,
        "num_train_epochs": job.epochs,
        "per_device_train_batch_size": job.batch // job.processes,
        "per_device_eval_batch_size": SHIPPED_EVAL_BATCH if is_shipped else EVAL_BATCH,
    }  # fmt: skip
    if job.processes > 1 and not is_shipped:
        # DistributedDataParallel would walk the graph after every forward for nothing.
        arguments["ddp_find_unused_parameters"] = False
    return TrainingArguments(**arguments | tuned | settings)


def load_splits(inputs: Inputs, tokenizer: Any, is_shipped: bool) -> dict[str, Dataset]:
    """Return the tokenised rows; what is evaluated is sorted by length, unless it is `shipped`."""
    splits = {}
    for split in inputs.job.rows:
        table = pd.read_csv(inputs.folder / f"{split}.csv")
        encoded = tokenizer(
            table["text"].tolist(), truncation=True, max_length=MAX_LENGTH,
            padding="max_length" if is_shipped else False,
        )  # fmt: skip
        classes = sorted(table["label"].unique())
        columns = {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": [classes.index(label) for label in table["label"]],
            "length": [len(ids) for ids in encoded["input_ids"]],
        }
        rows = Dataset.from_dict(columns)
        rows = rows if split == "train" or is_shipped else rows.sort("length")
        splits[split] = rows.remove_columns("length")
    return splits


def build_trainer(
    inputs: Inputs, model: Any, is_shipped: bool = False, optimizer: Any = None, **settings: Any
) -> tuple[Trainer, Dataset]:
    """Return the peer's Trainer and its test rows."""
    tokenizer = AutoTokenizer.from_pretrained(inputs.source)
    splits = load_splits(inputs, tokenizer, is_shipped)
    trainer = (KLTrainer if inputs.job.kl else Trainer)(
        model=model, args=build_arguments(inputs, is_shipped, **settings),
        train_dataset=splits["train"], eval_dataset=splits["validation"],
        data_collator=DataCollatorWithPadding(tokenizer), optimizers=(optimizer, None),
    )  # fmt: skip
    if isinstance(trainer, KLTrainer):
        trainer.kl_weight = inputs.job.kl
    trainer.remove_callback(PrinterCallback)
    return trainer, splits["test"]


def train_once(inputs: Inputs, is_shipped: bool) -> float:
    """Train, save and predict; return the seconds of training."""
    model = build_model(inputs)
    trainer, test = build_trainer(inputs, model, is_shipped)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    finish(inputs, trainer, test, merges=not is_shipped)
    return seconds


def finish(inputs: Inputs, trainer: Trainer, test: Dataset, merges: bool = True) -> None:
    """Save the trained weights and predict the test rows, LoRA merged where it pays."""
    model: Any = trainer.model
    trained = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    if trainer.is_world_process_zero():
        save_file(trained, inputs.folder / "peer.safetensors")
    if merges and inputs.job.strategy == "lora":
        model.encoder = model.encoder.merge_and_unload()
    predictions: Any = trainer.predict(test).predictions  # pyright: ignore
    if not trainer.is_world_process_zero():
        return
    pd.DataFrame(predictions).to_csv(inputs.folder / "peer.csv", index=False)


def train_gradually(inputs: Inputs) -> float:
    """Open the head, then block after block from the top, with the lowest the embeddings.

    It ends after as many phases as hftl, whose stopping depends on the rows alone.
    """
    model = build_model(inputs)
    blocks = list(model.encoder.encoder.layer)
    phases: list[list[nn.Module]] = [[model.head], *([block] for block in reversed(blocks))]
    phases[-1].append(model.encoder.embeddings)
    seconds, trainer, test = 0.0, None, None
    count = json.loads((inputs.folder / PHASES_FILE).read_text(encoding="utf-8"))
    for opened in phases[:count]:
        for module in opened:
            module.requires_grad_(True)
        trainer, test = build_trainer(inputs, model)
        started = time.perf_counter()
        trainer.train()
        seconds += time.perf_counter() - started
    assert trainer is not None and test is not None
    finish(inputs, trainer, test)
    return seconds


def train_rates(inputs: Inputs, count: int) -> float:
    """Train once for each of the first layer-wise rates, the best model of all is predicted with.

    Returns:
        The seconds of all trainings.
    """
    seconds, best = 0.0, (float("inf"), None, None)
    for decay in LAYER_DECAYS[:count]:
        model = build_model(inputs)
        groups = build_rate_groups(inputs.job, model, decay)
        optimizer = torch.optim.AdamW(groups, lr=inputs.job.rate, weight_decay=0.0, fused=True)
        trainer, test = build_trainer(inputs, model, optimizer=optimizer)
        started = time.perf_counter()
        trainer.train()
        seconds += time.perf_counter() - started
        loss = trainer.state.log_history[-2].get("eval_loss", float("inf"))
        best = min(best, (loss, trainer, test), key=lambda entry: entry[0])
    assert best[1] is not None and best[2] is not None
    finish(inputs, best[1], best[2])
    return seconds


def build_rate_groups(job: Job, model: Any, decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups in which each block's rate is that of the one above times `decay`."""
    top = list(reversed(model.encoder.encoder.layer[-job.blocks :]))
    groups = [{"params": list(model.head.parameters()), "lr": job.rate}]
    return groups + [
        {"params": list(block.parameters()), "lr": job.rate * decay**depth}
        for depth, block in enumerate(top, 1)
    ]


def cut_blocks(texts: list[str], tokenizer: Any) -> Dataset:
    """Return blocks of MAX_LENGTH tokens of all texts one after the other, as run_mlm.py does."""
    ids = [i for row in tokenizer(texts)["input_ids"] for i in row]
    whole = len(ids) // MAX_LENGTH * MAX_LENGTH
    return Dataset.from_dict(
        {"input_ids": [ids[n : n + MAX_LENGTH] for n in range(0, whole, MAX_LENGTH)]}
    )


def adapt(inputs: Inputs) -> float:
    """Continue masked-language pre-training with ten evaluations; return the seconds."""
    tokenizer = AutoTokenizer.from_pretrained(inputs.source)
    texts = pd.read_csv(inputs.folder / "train.csv")["text"].sample(frac=1, random_state=0)
    held = round(0.1 * len(texts))
    trainer = Trainer(
        model=AutoModelForMaskedLM.from_pretrained(inputs.source, dtype=torch.float32),
        args=build_arguments(
            inputs, False, eval_strategy="steps", eval_steps=0.1, learning_rate=1e-4,
            weight_decay=0.01, prediction_loss_only=True,
        ),
        train_dataset=cut_blocks(texts[held:].tolist(), tokenizer),
        eval_dataset=cut_blocks(texts[:held].tolist(), tokenizer),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model(str(inputs.folder / "peer"))
    return seconds


def run(inputs: Inputs, contender: str) -> float:
    """Return the seconds of a contender's training."""
    job = inputs.job
    if job.kind == "adapt":
        return adapt(inputs)
    if job.kind == "rates":
        (share,) = (peer.share for peer in job.peers if peer.name == contender)
        return train_rates(inputs, round(share * len(LAYER_DECAYS)))
    if job.strategy == "gradual":
        return train_gradually(inputs)
    return train_once(inputs, contender == "shipped")


def list_losses(trainer: Any) -> Iterator[float]:
    """Yield the losses that a trained Trainer has logged."""
    return (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    seconds = run(Inputs.read(Path(sys.argv[1])), sys.argv[2])
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps({"train": seconds}))
