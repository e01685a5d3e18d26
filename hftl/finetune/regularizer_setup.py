"""Build what keeps one training near its original, from the recipe's `retain`.

Regularizers, another reference, general rows; and the choice of KL's weight, by the least
forgetting at an equal score.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hftl.analysis.neighbours import mean_shared_neighbours
from hftl.config.finetune import Finetune
from hftl.config.recipe import Arm
from hftl.config.retain import EWC, Replay, Retain
from hftl.data.labels import encode_targets
from hftl.data.splits import hash_row
from hftl.data.text_inputs import EncodedDataset
from hftl.errors import RecipeError
from hftl.finetune.context import ExperimentContext, RegularizerSetup
from hftl.finetune.pretraining_heads import (
    check_pretraining_head,
    embed_rows,
    load_masked_lm,
    load_zero_shot_head,
)
from hftl.measure.statistics import select_within_one_standard_error
from hftl.models.heads import LoadedModel
from hftl.models.source import SourceModel
from hftl.retain.build import build_regularizers
from hftl.retain.kl import DEFAULT_TAU
from hftl.retain.reference import HeadQuality, measure_head_quality
from hftl.retain.weights import check_low_rank, check_unchanged_base
from hftl.runtime import distributed
from hftl.train.facts import ChosenKLWeight, FisherFacts, TrainingFacts, TriedKLWeight
from hftl.train.samplers import build_ignored_labels

FisherResult = tuple[dict[str, Tensor], FisherFacts]
LOGIT_KIND_OF_TASK = {"classification": "classes", "multi-label": "labels", "regression": "target"}
"""See `compute_fisher` and `measure_head_quality`; words have classes."""
WEIGHT_GRID = (0.03, 0.1, 0.3, 1.0)
MAX_SELECTION_ROWS = 1000
"""Rows whose neighbours measure forgetting where a weight is chosen, at most."""


@dataclass(frozen=True)
class ArmRegularizerContext:
    """Provide what regularizers read of an arm; see `RegularizerContext`.

    Args:
        experiment: what fine-tuning starts from, and the rows.
        before: what the source was before adaptation, where that is the reference.
        pooling: of the probe.
        seed: of the arm.
        compute_fisher: the Fisher information at the original, and its facts.
    """

    experiment: ExperimentContext
    before: ExperimentContext | None
    pooling: str
    seed: int
    compute_fisher: Callable[[EWC], FisherResult]

    def get_tau(self) -> float:
        """Return the temperature of cosines for texts or images."""
        return DEFAULT_TAU[self.experiment.prepared.modality]

    def measure_target_variance(self) -> float:
        """Return the variance of standardized targets around the probe; 1 for classes."""
        scale = self.experiment.compute_target_scale(self.seed)
        if scale is None:
            return 1.0
        variance = distributed.broadcast_from_main(self._measure_residual_variance)
        # The heads compared are standardized while they train.
        return variance / scale.sd**2

    def load_masked_lm(self) -> tuple[Any, Any, bool]:
        """Return the original's masked-LM model, its masking, and True if it is not the start."""
        original = self.before or self.experiment
        masked_lm, masking = load_masked_lm(original, self.experiment, self.seed)
        return masked_lm, masking, self.before is not None

    def load_zero_shot_head(self) -> Any:
        """Return CLIP's classifier of the task's class names."""
        return load_zero_shot_head(self.experiment.source, self.experiment.prepared.names)

    def load_fisher(self, config: EWC) -> FisherResult:
        """Return the Fisher information by parameter name, and what the record says of it."""
        return self.compute_fisher(config)

    def _measure_residual_variance(self) -> float:
        experiment = self.experiment
        rows = experiment.prepared.rows["validation"]
        features = experiment.extract_features(self.pooling, self.seed, rows)
        predictions = experiment.solve_probe(self.pooling, self.seed).logits(features)[:, 0]
        return float(np.mean((experiment.prepared.encode_targets(rows) - predictions) ** 2))


def build_setup(
    context: ExperimentContext, retain: Retain | None, finetune: Finetune, seed: int,
    compute_fisher: Callable[[EWC], FisherResult],
    build_original: Callable[[ExperimentContext], nn.Module],
) -> RegularizerSetup:  # fmt: skip
    """Return the setup of a `retain` section whose weights are numbers.

    Args:
        context: what fine-tuning starts from, and the rows.
        retain: the section, or None.
        finetune: how the model is trained.
        seed: of the arm.
        compute_fisher: called for EWC; returns the information, and what the record says of it.
        build_original: returns the model before adaptation with its own probe, in that context.
    """
    if retain is None:
        return RegularizerSetup()
    before = context.original if retain.reference == "source" else None
    regularizers = build_regularizers(
        retain, ArmRegularizerContext(context, before, finetune.pooling, seed, compute_fisher)
    )
    reference = build_original(before) if before is not None and retain.kl_terms else None
    replay, general = retain.replay or Replay(), None
    if retain.mixes_general:
        general = build_general_dataset(context, replay.labelled)
    facts = TrainingFacts(general_rows=0 if general is None else len(general))
    for regularizer in regularizers:
        facts = facts.merge(regularizer.facts)
    return RegularizerSetup(
        regularizers, reference, general, replay, tuple(retain.interpolate or ()), facts=facts
    )


def check_retention(arm: Arm, source: SourceModel, task: str) -> None:
    """Refuse what cannot keep an arm near its original, before a row is read.

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
            is_adapted = any(stage.objective == "mlm" for stage in arm.stages)
            has_head = is_adapted and retain.reference == "start"
            check_pretraining_head(kl, source, has_head, task)
    reads_general = any(section.mixes_general for section in retain.regularizers)
    if retain.replay is not None and not retain.replay.labelled and not reads_general:
        raise RecipeError(
            "retain.replay mixes in general data without labels, and no KL is taken on them",
            "Set retain.kl.inputs to general or both, or retain.replay.labelled",
        )


def encode_general_labels(context: ExperimentContext) -> np.ndarray:
    """Return class ids of the general rows that training may read, (rows,) int64."""
    assert context.general is not None
    labels = context.general.get_control_labels(context.label_column)
    return encode_targets(labels, context.prepared.task, context.prepared.names)


def build_general_dataset(context: ExperimentContext, labelled: bool = False) -> EncodedDataset:
    """Return the general rows that training may read, with labels that count only if `labelled`."""
    assert context.general is not None
    rows = context.general.train_rows
    encoded = context.encode_rows(rows)
    if labelled:
        labels = list(encode_general_labels(context))
    else:
        target_row = context.build_dataset(context.prepared.rows["train"][:1])[0]
        labels = [build_ignored_labels(target_row, dict(row)) for row in encoded]
    return EncodedDataset(encoded, labels, [hash_row(row) for row in rows], None)


def measure_probe_quality(
    context: ExperimentContext, retain: Retain, finetune: Finetune, seed: int
) -> HeadQuality | None:
    """Return how well the probe predicts the rows it was fitted on; None if no KL compares it.

    The probe is solved, so a weak one says that the features do not separate the labels: it is
    reported, and stops no run.
    """
    if not any(section.reads_task_head for section in retain.regularizers if section.is_active):
        return None
    before = context.original if retain.reference == "source" else None
    return distributed.broadcast_from_main(
        lambda: _measure_probe_quality(before or context, finetune.pooling, seed)
    )


def _measure_probe_quality(
    context: ExperimentContext, pooling: str, seed: int
) -> HeadQuality | None:
    rows = context.select_train_rows(seed)
    features = context.extract_features(pooling, seed, rows)
    logits = context.solve_probe(pooling, seed).logits(features)
    # Words that were truncated have no logits.
    is_known = np.isfinite(logits).all(1)
    labels = torch.from_numpy(context.prepared.encode_targets(rows)[is_known])
    kind = LOGIT_KIND_OF_TASK.get(context.prepared.task, "classes")
    return measure_head_quality(torch.from_numpy(logits[is_known]), labels, kind)


def has_auto_weight(retain: Retain | None) -> bool:
    """Return True if a weight of KL is still to be chosen."""
    return retain is not None and any(kl.weight == "auto" for kl in retain.kl_terms)


def set_kl_weight(retain: Retain, weight: float) -> Retain:
    """Return the section with a number for every weight that was to be chosen."""
    terms = [
        kl.model_copy(update={"weight": weight}) if kl.weight == "auto" else kl
        for kl in retain.kl_terms
    ]
    return retain.model_copy(update={"kl": terms})


def select_kl_weight(try_weight: Callable[[float], tuple[float, float, float]]) -> ChosenKLWeight:
    """Try the grid, and select the least forgetting within one standard error of the best score.

    Args:
        try_weight: returns the score on validation, more is better, its standard error, and how
            much was forgotten.
    """
    results = [try_weight(weight) for weight in WEIGHT_GRID]
    columns = [list(column) for column in zip(*results, strict=True)]
    selected = select_within_one_standard_error(*columns)
    return ChosenKLWeight(
        weight=WEIGHT_GRID[selected],
        tried=[
            TriedKLWeight(weight=weight, score=score, error=error, forgotten=forgotten)
            for weight, (score, error, forgotten) in zip(WEIGHT_GRID, results, strict=True)
        ],
    )


def measure_lost_neighbours(
    context: ExperimentContext, original: np.ndarray, trained: LoadedModel
) -> float:
    """Return the share of nearest neighbours that a model has lost. Collective.

    Args:
        context: the rows.
        original: their embeddings under the original, see `embed_selection_rows`.
        trained: the model.
    """
    embeddings = embed_selection_rows(context, trained)
    return distributed.broadcast_from_main(lambda: 1 - mean_shared_neighbours(original, embeddings))


def embed_selection_rows(context: ExperimentContext, loaded: LoadedModel) -> np.ndarray:
    """Return embeddings of the rows by which a weight is chosen, (rows, width). Collective.

    These are general rows that training may read, or else the validation rows: the general rows
    that measure forgetting must choose nothing.
    """
    general = context.general
    rows = context.prepared.rows["validation"] if general is None else general.train_rows
    return embed_rows(context, loaded, rows[:MAX_SELECTION_ROWS])
