"""Solve one arm for one seed: a head on frozen features, which no step trains."""

import time

import numpy as np

from hftl.config.finetune import Finetune
from hftl.data.splits import MEASURED_SPLITS
from hftl.finetune.arm_files import ArmOutput, collect_trained_tensors
from hftl.finetune.context import ExperimentContext
from hftl.finetune.pretraining_heads import embed_compared_rows
from hftl.finetune.trainable import count_trainable_parameters
from hftl.finetune.zero_shot import (
    build_zero_shot_model,
    list_prompts,
    score_classes,
    scores_every_class,
)
from hftl.models.heads import LoadedModel
from hftl.train.facts import TrainingFacts


def solve_head(context: ExperimentContext, finetune: Finetune, seed: int) -> ArmOutput:
    """Solve the strategy `head`: the probe, copied into the model's last layer."""
    started = time.perf_counter()
    pooling, rows = finetune.pooling, context.prepared.rows
    context.extract_features(pooling, seed, context.select_train_rows(seed))
    features = {s: context.extract_features(pooling, seed, rows[s]) for s in MEASURED_SPLITS}
    features_seconds = time.perf_counter() - started
    probe = context.solve_probe(pooling, seed, finetune.class_weight)
    logits = {split: probe.logits(features[split]) for split in MEASURED_SPLITS}
    built = context.build_probed_model(pooling, seed, class_weight=finetune.class_weight)
    facts = context.describe_class_weights(finetune.class_weight, seed)
    facts = facts.merge(TrainingFacts(penalty=probe.penalty))
    output = _collect_head(context, built, logits, facts, started)
    output.trainable_parameters = count_trainable_parameters(built.model)
    output.timings["features_seconds"] = features_seconds
    return output


def solve_zero_shot(context: ExperimentContext, finetune: Finetune, seed: int) -> ArmOutput:
    """Solve the strategy `zero_shot`: no label and no training row is read."""
    started = time.perf_counter()
    prompts = list_prompts(context, finetune)
    facts = TrainingFacts(prompts=prompts)
    if scores_every_class(context.source):
        logits = score_classes(context, prompts)
        return ArmOutput(logits, {}, 0, facts, {"train_seconds": time.perf_counter() - started})
    built = build_zero_shot_model(context, finetune, seed)
    weight, bias = (tensor.detach().numpy() for tensor in built.last_linear.parameters())
    rows = context.prepared.rows
    logits = {
        split: context.extract_features(built.pooling, seed, rows[split]) @ weight.T + bias
        for split in MEASURED_SPLITS
    }
    return _collect_head(context, built, logits, facts, started)


def _collect_head(
    context: ExperimentContext, built: LoadedModel, logits: dict[str, np.ndarray],
    facts: TrainingFacts, started: float,
) -> ArmOutput:  # fmt: skip
    """Return the output of an arm whose head was solved, and whose encoder was not changed."""
    built.model.requires_grad_(False)
    built.last_linear.requires_grad_(True)
    tensors = collect_trained_tensors(built)
    timings = {"train_seconds": time.perf_counter() - started}
    # Of an encoder that is the source as it is there is nothing to compare.
    embeddings = embed_compared_rows(context, built) if context.base else {}
    return ArmOutput(logits, tensors, 0, facts, timings, embeddings)
