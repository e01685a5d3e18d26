"""Compare hftl with its peer on the same batches, before a clock counts.

    python benchmarks/speed_gate.py FOLDER      # prints {"difference": ...}

Trained jobs: 50 steps of both in fp32 without dropout, on the same rows in the same batches; the
largest difference of a loss, relative to the first. Solved jobs: the largest difference of a
feature, relative to the greatest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed_hftl import build_recipe
from speed_jobs import Inputs
from speed_peers import build_model, build_trainer, list_losses
from speed_solved import load_features
from torch import nn
from transformers.utils import logging

from hftl.train.samplers import SeededSampler

STEPS = 50


def build_settings(inputs: Inputs) -> dict[str, Any]:
    """Return the arguments of the steps that are compared, all of one epoch."""
    batch = max(2, min(8, inputs.job.train // STEPS))
    return {
        "bf16": False, "max_steps": min(STEPS, inputs.job.train // batch), "logging_steps": 1,
        "eval_strategy": "no", "logging_strategy": "steps", "per_device_train_batch_size": batch,
    }  # fmt: skip


def compare_losses(inputs: Inputs) -> float:
    """Return the largest difference of a loss between the peer's Trainer and hftl's."""
    model = build_model(inputs, dropout=0.0)
    peer: Any = build_trainer(inputs, model, **build_settings(inputs))[0]
    peer._get_train_sampler = lambda *_: SeededSampler(len(peer.train_dataset), peer.args.seed)
    # Built before the peer trains, so that both start from the same weights.
    trainers = [peer, build_hftl_trainer(inputs, peer)]
    losses = []
    for trainer in trainers:
        trainer.train()
        losses.append(list(list_losses(trainer)))
    return max(abs(a - b) for a, b in zip(*losses, strict=True)) / losses[0][0]


def build_hftl_trainer(inputs: Inputs, peer: Any) -> Any:
    """Return hftl's trainer of its own model, with the weights of the peer's and no dropout."""
    from hftl import KLToOriginal, TransferTrainer
    from hftl.config.recipe import Recipe
    from hftl.finetune.trainable import apply_strategy
    from hftl.pipeline.pipeline import open_recipe

    recipe = Recipe.parse(build_recipe(inputs))
    built = open_recipe(recipe).build_model("mean", 0)
    model = apply_strategy(built.model, recipe.finetune, built.fresh)
    copy_weights(peer.model, model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    kl = KLToOriginal(inputs.job.kl, "relational", anchors=0) if inputs.job.kl else None
    return TransferTrainer(
        model=model, args=peer.args, train_dataset=peer.train_dataset,
        data_collator=peer.data_collator, retain=kl,
    )  # fmt: skip


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy all parameters in order; hftl's model has the peer's structure under other names."""
    with torch.no_grad():
        for one, other in zip(source.parameters(), target.parameters(), strict=True):
            assert one.shape == other.shape
            other.copy_(one)


def compare_features(inputs: Inputs) -> float:
    """Return the largest difference of a feature between hftl's head and the peer's encoder."""
    from hftl.config.recipe import Recipe
    from hftl.pipeline.pipeline import open_recipe

    context = open_recipe(Recipe.parse(build_recipe(inputs)))
    rows = context.prepared.rows["test"]
    pooling = "native" if inputs.job.source == "vit-small" else "mean"
    ours, (others, _) = context.extract_features(pooling, 0, rows), load_features(inputs)["test"]
    others = others[[row.index for row in rows]]
    return float(np.abs(ours - others).max() / np.abs(others).max())


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    read = Inputs.read(Path(sys.argv[1]))
    compare = compare_features if read.job.strategy == "head" else compare_losses
    print(json.dumps({"difference": compare(read)}))
