"""Probe, sweep and predict as an expert's script does: the peers of the jobs that train nothing.

    python benchmarks/speed_solved.py FOLDER CONTENDER

prints {"train": seconds}, null for predictions. `sklearn` encodes every row once, sorted by length,
and fits scikit-learn's logistic regression; `frozen` is the Trainer on a frozen encoder.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from speed_jobs import HEADS, MAX_LENGTH, Inputs, Job
from speed_peers import Classifier, build_arguments, build_trainer, finish
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)
from transformers.utils import logging

ENCODE_BATCH = 64
C_GRID = np.logspace(-5, 2, 8)
"""The penalties that hftl's probe chooses from, too."""
FOLDS = 5


def encode_texts(inputs: Inputs, texts: list[str]) -> np.ndarray:
    """Return (texts, width): mean-pooled embeddings, texts of similar length side by side."""
    tokenizer = AutoTokenizer.from_pretrained(inputs.source)
    model = Classifier(inputs.source).eval()
    order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    embeddings: Any = None
    with torch.inference_mode():
        for start in range(0, len(order), ENCODE_BATCH):
            numbers = order[start : start + ENCODE_BATCH]
            batch = tokenizer(
                [texts[n] for n in numbers], truncation=True, max_length=MAX_LENGTH, padding=True,
                return_tensors="pt",
            )  # fmt: skip
            pooled = model.embed(batch["input_ids"], batch["attention_mask"]).numpy()
            if embeddings is None:
                embeddings = np.empty((len(texts), pooled.shape[1]), dtype=np.float32)
            embeddings[numbers] = pooled
    return embeddings


def load_pixels(inputs: Inputs, names: list[str]) -> Tensor:
    """Return (pictures, 3, height, width), decoded once."""
    processor = ViTImageProcessorPil.from_pretrained(inputs.source)
    pictures = [Image.open(inputs.folder / name).convert("RGB") for name in names]
    return processor(pictures, return_tensors="pt")["pixel_values"]


def encode_pictures(inputs: Inputs, names: list[str]) -> np.ndarray:
    """Return (pictures, width): the state of the class token."""
    model = ViTForImageClassification.from_pretrained(inputs.source).eval()
    with torch.inference_mode():
        parts = [
            model.vit(batch).last_hidden_state[:, 0]
            for batch in load_pixels(inputs, names).split(ENCODE_BATCH)
        ]
    return torch.cat(parts).numpy()


def load_features(inputs: Inputs) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return features and labels of every split, from one pass over all rows."""
    tables = {split: pd.read_csv(inputs.folder / f"{split}.csv") for split in inputs.job.rows}
    whole = pd.concat(tables.values())
    if inputs.job.source == "vit-small":
        features = encode_pictures(inputs, whole["image"].tolist())
    else:
        features = encode_texts(inputs, whole["text"].tolist())
    ends = np.cumsum([len(table) for table in tables.values()])[:-1]
    parts = np.split(features, ends)
    return {
        split: (part, table["label"].to_numpy())
        for (split, table), part in zip(tables.items(), parts, strict=True)
    }


def solve_probe(inputs: Inputs) -> float:
    """Encode every row once, choose the penalty by cross-validation, and predict."""
    started = time.perf_counter()
    features = load_features(inputs)
    solver: Any = LogisticRegressionCV  # Its types name the defaults alone.
    probe = make_pipeline(
        StandardScaler(),
        solver(
            Cs=C_GRID, cv=FOLDS, scoring="neg_log_loss", max_iter=1000, l1_ratios=(0.0,),
            use_legacy_attributes=False,
        ),  # pyright: ignore
    ).fit(*features["train"])  # fmt: skip
    predicted = pd.DataFrame(probe.predict_proba(features["test"][0]))
    seconds = time.perf_counter() - started
    predicted.to_csv(inputs.folder / "peer.csv", index=False)
    return seconds


def solve_heads(inputs: Inputs) -> float:
    """Encode every row once, and fit one logistic regression for each of the heads."""
    started = time.perf_counter()
    features = load_features(inputs)
    x, y = features["train"]
    scaler = StandardScaler().fit(x)
    x, held = scaler.transform(x), (scaler.transform(features["validation"][0]),)
    scores = []
    for number in range(HEADS):
        chosen = draw_rows(len(y), number // len(C_GRID))
        head = LogisticRegression(C=C_GRID[number % len(C_GRID)], max_iter=1000)
        scores.append(head.fit(x[chosen], y[chosen]).score(*held, features["validation"][1]))
    return time.perf_counter() - started


def draw_rows(count: int, seed: int) -> np.ndarray:
    """Return the rows that the heads of one draw are fitted on: four in five."""
    return np.random.default_rng(seed).permutation(count)[: count * 4 // 5]


def train_frozen(inputs: Inputs) -> float:
    """Train a head on a frozen encoder with the Trainer; return the seconds."""
    if inputs.job.source == "vit-small":
        trainer, test = build_picture_trainer(inputs)
    else:
        model = Classifier(inputs.source)
        model.encoder.requires_grad_(False)
        trainer, test = build_trainer(inputs, model, learning_rate=1e-2)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    finish(inputs, trainer, test)
    return seconds


def build_picture_trainer(inputs: Inputs) -> tuple[Trainer, Any]:
    """Return a Trainer of a frozen ViT, whose pictures are decoded once, and its test rows."""
    model = ViTForImageClassification.from_pretrained(inputs.source, num_labels=2)
    model.vit.requires_grad_(False)
    splits = {}
    for split in inputs.job.rows:
        table = pd.read_csv(inputs.folder / f"{split}.csv")
        pixels, names = load_pixels(inputs, table["image"].tolist()), sorted(set(table["label"]))
        splits[split] = [
            {"pixel_values": image, "labels": names.index(label)}
            for image, label in zip(pixels, table["label"], strict=True)
        ]
    trainer = Trainer(
        model=model, args=build_arguments(inputs, False, learning_rate=1e-2),
        train_dataset=splits["train"], eval_dataset=splits["validation"],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer, splits["test"]


def predict_merged(inputs: Inputs) -> None:
    """Predict a table with a merged adapter, texts of similar length side by side."""
    from peft import PeftModel

    table = pd.read_csv(inputs.folder / "train.csv")
    base = AutoModelForSequenceClassification.from_pretrained(inputs.source, num_labels=2)
    adapted: Any = PeftModel.from_pretrained(base, str(inputs.folder / "adapter"))
    model, tokenizer = adapted.merge_and_unload().eval(), load_tokenizer(inputs)
    encoded = tokenizer(table["text"].tolist(), truncation=True, max_length=MAX_LENGTH)["input_ids"]
    order = sorted(range(len(encoded)), key=lambda n: len(encoded[n]))
    shares = np.empty((len(encoded), 2))
    with torch.inference_mode():
        for start in range(0, len(order), ENCODE_BATCH):
            numbers = order[start : start + ENCODE_BATCH]
            batch = tokenizer.pad({"input_ids": [encoded[n] for n in numbers]}, return_tensors="pt")
            shares[numbers] = model(**batch).logits.softmax(-1).numpy()
    table[["negative", "positive"]] = shares
    table.to_csv(inputs.folder / "peer.csv", index=False)


def predict_by_pipeline(inputs: Inputs) -> None:
    """Predict a table with transformers' pipeline, as the libraries' pages show it."""
    from peft import PeftModel

    table = pd.read_csv(inputs.folder / "train.csv")
    base = AutoModelForSequenceClassification.from_pretrained(inputs.source, num_labels=2)
    model: Any = PeftModel.from_pretrained(base, str(inputs.folder / "adapter"))
    classify: Any = pipeline("text-classification", model=model, tokenizer=load_tokenizer(inputs))
    results = classify(table["text"].tolist(), batch_size=32, truncation=True)
    table.assign(**pd.DataFrame(results)).to_csv(inputs.folder / "pipeline.csv", index=False)


def load_tokenizer(inputs: Inputs) -> Any:
    """Return the adapter's tokenizer."""
    return AutoTokenizer.from_pretrained(inputs.folder / "adapter")


def run(inputs: Inputs, contender: str) -> float | None:
    """Return the seconds of a contender; None where it only predicts."""
    job: Job = inputs.job
    if job.kind == "predict":
        (predict_merged if contender == "tuned" else predict_by_pipeline)(inputs)
        return None
    if contender == "frozen":
        return train_frozen(inputs)
    return (solve_heads if job.kind == "heads" else solve_probe)(inputs)


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(json.dumps({"train": run(Inputs.read(Path(sys.argv[1])), sys.argv[2])}))
