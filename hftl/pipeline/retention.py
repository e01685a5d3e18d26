"""Turn a recipe's section `retain` into what a training receives, and check it beforehand.

From here on there are the regularizers, the original that KL compares to, and general rows:
`Retention` holds them, and the trainer adds their terms to the loss. A weight that is to be chosen
is a number already (`pipeline/kl_weight.py`).
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hftl.config.finetune import Finetune
from hftl.config.recipe import Arm, Recipe
from hftl.config.retain import Replay, Retain
from hftl.data.general import check_general_labels
from hftl.errors import RecipeError
from hftl.finetune.context import ExperimentContext
from hftl.finetune.pretraining_heads import (
    check_pretraining_head,
    load_causal_lm,
    load_masked_lm,
)
from hftl.finetune.zero_shot import load_zero_shot_head
from hftl.models.source import SourceModel
from hftl.pipeline.fisher_stage import prepare_fisher
from hftl.retain.kl import DEFAULT_TAU
from hftl.retain.original import LOGIT_KIND_OF_TASK, HeadQuality, measure_head_quality
from hftl.retain.regularizer import Regularizer, RegularizerContext, Retention
from hftl.retain.weights import check_low_rank, check_unchanged_base
from hftl.runtime import distributed
from hftl.train.facts import HeadFacts, TrainingFacts


def build_retention(context: ExperimentContext, arm: Arm, seed: int, folder: Path) -> Retention:
    """Return what keeps a training near its original, where every weight is a number. Collective.

    Args:
        context: the arm's.
        arm: with its `retain`.
        seed: of the training.
        folder: of the run, whose stage the Fisher information is.
    """
    retain, pooling = arm.retain, arm.finetune.pooling
    if retain is None:
        return Retention()
    original = _get_original_context(context, retain)
    is_start = original is context
    regularizers = build_regularizers(
        retain,
        RegularizerContext(
            seed=seed,
            tau=DEFAULT_TAU[context.prepared.modality],
            original_is_start=is_start,
            measure_target_variance=lambda: _measure_target_variance(context, pooling, seed),
            load_masked_lm=lambda: load_masked_lm(original, context, seed),
            load_causal_lm=lambda: load_causal_lm(original, seed),
            load_zero_shot_head=lambda: load_zero_shot_head(context, arm.finetune),
            load_fisher=lambda ewc: prepare_fisher(context, arm, ewc, seed, folder),
        ),
    )
    replay = retain.replay or Replay()
    general = context.build_general_dataset(replay.labelled) if retain.mixes_general else None
    facts = TrainingFacts(general_rows=0 if general is None else len(general))
    quality = _measure_compared_probe(original, retain, arm.finetune, seed)
    if quality is not None:
        facts = facts.merge(TrainingFacts(head_opinion=quality))
    for regularizer in regularizers:
        facts = facts.merge(regularizer.facts)
    reference = None
    if retain.kl_terms and not is_start:
        weights = arm.finetune.class_weight
        reference = original.build_probed_model(pooling, seed, class_weight=weights)
    return Retention(
        regularizers,
        reference=reference.model if reference else None,
        general=general,
        ratio=replay.ratio,
        general_weight=replay.weight,
        alphas=tuple(retain.interpolate or ()),
        facts=facts,
    )


def build_regularizers(retain: Retain, context: RegularizerContext) -> list[Regularizer[Any]]:
    """Return the regularizers of a recipe's section in its order, without those that add nothing.

    Args:
        retain: the section; every weight is a number.
        context: what regularizers read beside it.
    """
    regularizers = []
    for section in retain.regularizers:
        if section.is_active:
            module, _, name = section.implementation.partition(":")
            kind: type[Regularizer[Any]] = getattr(import_module(module), name)
            regularizers.append(kind.from_config(section, context))
    return regularizers


def _get_original_context(context: ExperimentContext, retain: Retain) -> ExperimentContext:
    """Return the context of the original: before any adaptation, or that of the start itself."""
    is_source = retain.reference == "source" and context.original is not None
    return context.original if is_source else context  # pyright: ignore[reportReturnType]


def _measure_target_variance(context: ExperimentContext, pooling: str, seed: int) -> float:
    """Return the variance of standardized targets around the probe; 1 for classes. Collective."""
    scale = context.compute_target_scale(seed)
    if scale is None:
        return 1.0

    def measure() -> float:
        rows = context.prepared.rows["validation"]
        features = context.extract_features(pooling, seed, rows)
        predictions = context.solve_probe(pooling, seed).logits(features)[:, 0]
        return float(np.mean((context.prepared.encode_targets(rows) - predictions) ** 2))

    # The heads compared are standardized while they train.
    return distributed.broadcast_from_main(measure) / scale.sd**2


def _measure_compared_probe(
    original: ExperimentContext, retain: Retain, finetune: Finetune, seed: int
) -> HeadFacts | None:
    """Return how well the probe that KL compares predicts; None where none is. Collective."""
    if not any(section.reads_task_head for section in retain.regularizers if section.is_active):
        return None
    quality = distributed.broadcast_from_main(lambda: _measure_probe(original, finetune, seed))
    if quality is None:
        return None
    return HeadFacts(loss=quality.loss, shares=quality.shares, weak=quality.is_weak)


def _measure_probe(context: ExperimentContext, finetune: Finetune, seed: int) -> HeadQuality | None:
    """Return how well the probe predicts the rows it was fitted on; None where none has a label."""
    rows = context.select_train_rows(seed)
    features = context.extract_features(finetune.pooling, seed, rows)
    probe = context.solve_probe(finetune.pooling, seed, finetune.class_weight)
    logits = probe.logits(features)
    # Words that were truncated have no logits.
    is_known = np.isfinite(logits).all(1)
    labels = torch.from_numpy(context.prepared.encode_targets(rows)[is_known])
    kind = LOGIT_KIND_OF_TASK[context.prepared.task]
    return measure_head_quality(torch.from_numpy(logits[is_known]), labels, kind)


def warn_of_weak_probe(
    retention: Retention, arm: Arm, seed: int, say: Callable[[str], None]
) -> None:
    """Report a probe that KL compares and that hardly predicts; it stops no run.

    The probe is solved, so a weak one says that the features do not separate the labels.
    """
    quality = retention.facts.head_opinion
    if quality is not None and quality.weak:
        say(
            f"  warning: {arm.name} seed {seed}: kl.on=probe compares a head that hardly predicts "
            f"the labels (loss {quality.loss:.3f} on train, {quality.shares:.3f} by label "
            "frequencies alone); consider retain.kl.on=relational"
        )


# Before a row is read, and before anything trains.


def check_recipe_retention(recipe: Recipe, source: SourceModel) -> None:
    """Refuse what cannot keep an arm near its original, before a row is read.

    Raises:
        RecipeError: see `check_retention`; it names an arm that is not the recipe's own.
    """
    for number, arm in enumerate(recipe.arms):
        try:
            check_retention(arm, source, str(recipe.data.task))
        except RecipeError as error:
            if number == 0:
                raise
            # The section may fit the recipe's own arm, and not one that inherits it.
            raise RecipeError(f"measure.arms.{arm.name}: {error.what}", error.fix) from None


def check_retention(arm: Arm, source: SourceModel, task: str) -> None:
    """Refuse what cannot keep an arm near its original.

    Raises:
        RecipeError: for a form of KL that the source has no head for, an adapter that changes the
            base weights, or replay of rows that no term reads.
    """
    retain = arm.retain
    if retain is None:
        return
    if arm.spec.trains_adapter:
        check_unchanged_base(arm.finetune.lora, "finetune.lora")
        if retain.needs_plain_lora:
            check_low_rank(arm.finetune.lora, "finetune.lora")
    for section in retain.regularizers:
        section.check_arm(arm.strategy, task)
    for kl in retain.kl_terms:
        if kl.on_pretraining_head:
            is_adapted = any(stage.objective == kl.on for stage in arm.stages)
            has_head = is_adapted and retain.reference == "start"
            check_pretraining_head(kl, source, has_head, task)
    reads_general = any(section.mixes_general for section in retain.regularizers)
    if retain.replay is not None and not retain.replay.labelled and not reads_general:
        raise RecipeError(
            "retain.replay mixes in general data without labels, and no KL is taken on them",
            "Set retain.kl.inputs to general or both, or retain.replay.labelled",
        )


def reads_general_labels(recipe: Recipe) -> bool:
    """Return True if an arm reads the task's labels of general data."""
    sections = [arm.retain for arm in recipe.arms]
    return any(retain is not None and retain.reads_general_labels for retain in sections)


def check_replay_labels(recipe: Recipe, context: ExperimentContext) -> None:
    """Refuse general data that an arm reads by labels which are not the task's.

    Raises:
        DataError: see `check_general_labels`.
    """
    if reads_general_labels(recipe):
        assert context.general is not None
        check_general_labels(context.general, context.label_column, context.prepared.names)
