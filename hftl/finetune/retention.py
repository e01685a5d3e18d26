"""From a recipe's `retain` to what the trainer is given: terms, another original, general rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hftl.analysis.neighbours import mean_shared_neighbours
from hftl.config.finetune import Finetune
from hftl.config.recipe import Arm
from hftl.config.retain import KL, Replay, Retain
from hftl.data import labels as answers
from hftl.data.splits import hash_row
from hftl.data.text import EncodedDataset
from hftl.errors import RecipeError
from hftl.finetune.context import ExperimentContext
from hftl.finetune.pretraining_heads import (
    build_head_regularizer,
    check_pretraining_head,
    embed_rows,
)
from hftl.finetune.targets import compute_target_scale
from hftl.measure.metrics import METRICS, SELECTION_METRICS
from hftl.measure.statistics import jackknife, select_within_one_standard_error
from hftl.models.architectures import TOKEN_CLASSIFICATION
from hftl.models.heads import LoadedModel
from hftl.models.source import SourceModel
from hftl.retain.kl import KLToOriginal
from hftl.retain.reference import HeadQuality, measure_head_quality
from hftl.retain.weights import EWC, L2SP, check_low_rank, check_unchanged_base
from hftl.runtime import distributed
from hftl.train.replay_batches import build_ignored_labels

FisherResult = tuple[dict[str, Tensor], dict[str, Any]]
PRETRAINING_HEADS = ("mlm", "zero_shot")
LOGIT_KIND_OF_TASK = {"classification": "classes", "multi-label": "labels", "regression": "target"}
"""What the logits of each task are of, see `fisher_information` and `opinion_of`; of words
classes."""
DEFAULT_TAU = {"text": 0.05, "image": 0.07}
"""The temperature of cosines that sentence encoders (Reimers & Gurevych 2019) and self-distilled
image encoders (Caron et al. 2021) are trained with."""


@dataclass(frozen=True)
class RegularizerSetup:
    """What keeps one training near its original.

    `trainer` are arguments of `TransferTrainer`; `alphas` are the shares of the way from the
    original to the trained weights that are tried; `look` is asked about the trained model, and
    what it says stands in the facts as `measure_lost_neighbours`; `facts` is what the record tells.
    """

    trainer: dict[str, Any] = field(default_factory=dict)
    alphas: tuple[float, ...] = ()
    look: Callable[[LoadedModel], float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def build_regularizers(
    bench: ExperimentContext, retain: Retain | None, finetune: Finetune, seed: int,
    fisher: Callable[[], FisherResult], original: Callable[[ExperimentContext], nn.Module],
) -> RegularizerSetup:  # fmt: skip
    """The trainer's arguments for a `retain` section whose weights are numbers.

    Args:
        bench: the rows, and the general ones.
        retain: the section, or None.
        finetune: how the model is trained.
        seed: of the arm.
        fisher: the Fisher information, where EWC needs it, and what the record tells of it.
        original: the model before adaptation with its own probe, on that workbench.
    """
    if retain is None:
        return RegularizerSetup()
    before = bench.original if retain.reference == "source" else None
    terms: list[Any] = [
        build_head_regularizer(bench, kl, seed, before)
        if kl.on in PRETRAINING_HEADS
        else _build_kl(bench, kl, finetune, seed)
        for kl in retain.kl_terms
        if kl.weight
    ]
    if retain.l2sp is not None:
        given = retain.l2sp
        terms.append(L2SP(given.weight, given.head, given.decoupled))
    facts: dict[str, Any] = {"general_rows": 0}
    if retain.ewc is not None:
        information, facts["fisher"] = fisher()
        terms.append(EWC(retain.ewc.weight, information))
    found: dict[str, Any] = {"retain": terms}
    if before is not None and retain.kl_terms:
        found["reference"] = original(before)
    if mixes_general(retain):
        replay = retain.replay or Replay()
        rows = build_general_dataset(bench, replay.labelled)
        found |= {"general_dataset": rows, "general_ratio": replay.ratio}
        found |= {"general_weight": replay.weight} if replay.labelled else {}
        facts["general_rows"] = len(rows)
    return RegularizerSetup(found, tuple(retain.interpolate or ()), None, facts)


def check_retention(arm: Arm, source: SourceModel, task: str) -> None:
    """Refuses what cannot keep an arm near its original, before a row is read.

    Raises:
        RecipeError: for a form of KL that the source has no head for, an adapter that changes the
            weights under it, or replay that nothing looks at.
    """
    retain = arm.retain
    if retain is None:
        return
    if arm.strategy == "lora":
        check_unchanged_base(arm.finetune.lora, "finetune.lora")
        if retain.l2sp is not None or retain.ewc is not None or retain.interpolate is not None:
            check_low_rank(arm.finetune.lora, "finetune.lora")
        if retain.l2sp is not None and retain.l2sp.decoupled:
            raise RecipeError(
                "retain.l2sp.decoupled moves weights, and under LoRA the base does not move",
                "Set it to false",
            )
    for kl in retain.kl_terms:
        if kl.on in PRETRAINING_HEADS:
            adapted = any(stage.objective == "mlm" for stage in arm.stages)
            check_pretraining_head(kl, source, adapted and retain.reference == "start", task)
    on_general = any(kl.inputs != "target" for kl in retain.kl_terms)
    if retain.replay is not None and not retain.replay.labelled and not on_general:
        raise RecipeError(
            "retain.replay mixes in general data without labels, and no KL is taken on them",
            "Set retain.kl.inputs to general or both, or retain.replay.labelled",
        )
    if retain.ewc is not None and retain.ewc.fisher != "features" and task == TOKEN_CLASSIFICATION:
        raise RecipeError(
            f"retain.ewc.fisher={retain.ewc.fisher} is of one answer a row, and {task} has one a "
            "word",
            "Use features",
        )
    if task == "regression" and any(
        kl.on == "probe" and kl.temperature != 1 for kl in retain.kl_terms
    ):
        raise RecipeError(
            "retain.kl.temperature: the KL between two Gaussians has none", "Leave it at 1"
        )


def encode_general_labels(bench: ExperimentContext) -> np.ndarray:
    """(rows,) int64 class ids of the general rows that retention may look at."""
    assert bench.general is not None
    labels = bench.general.get_control_labels(bench.label_column)
    return answers.encode_targets(labels, bench.prepared.task, bench.prepared.names)


def build_general_dataset(bench: ExperimentContext, labelled: bool = False) -> EncodedDataset:
    """The general rows that retention may look at, with labels that count for nothing, or with
    their own."""
    assert bench.general is not None
    rows = bench.general.train_rows
    encoded = bench.encode_rows(rows)
    if labelled:
        labels = list(encode_general_labels(bench))
        return EncodedDataset(encoded, labels, [hash_row(row) for row in rows], None)
    like = bench.build_dataset(bench.prepared.rows["train"][:1])[0]
    labels = [build_ignored_labels(like, dict(row)) for row in encoded]
    return EncodedDataset(encoded, labels, [hash_row(row) for row in rows], None)


def mixes_general(retain: Retain) -> bool:
    """Whether steps hold general rows; EWC looks at them before."""
    return retain.replay is not None or any(kl.inputs != "target" for kl in retain.kl_terms)


def _build_kl(bench: ExperimentContext, kl: KL, finetune: Finetune, seed: int) -> KLToOriginal:
    assert not isinstance(kl.weight, str)
    variance, scale = 1.0, compute_target_scale(bench, seed)
    if kl.on == "probe" and scale is not None:
        variance = distributed.broadcast_from_main(
            lambda: _measure_residual_variance(bench, finetune.pooling, seed)
        )
        # The heads compared are standardised while they train.
        variance /= scale.sd**2
    return KLToOriginal(
        kl.weight, kl.on, kl.temperature, kl.direction, kl.inputs,
        kl.tau or DEFAULT_TAU[bench.prepared.modality], kl.anchors, variance, solved=True,
    )  # fmt: skip


def measure_probe_quality(
    bench: ExperimentContext, retain: Retain, finetune: Finetune, seed: int
) -> HeadQuality | None:
    """What the probe that KL is taken on says of the rows it was fitted on; None without such KL.

    It is solved by construction, so a weak one ends no run: the other arms have their worth.
    """
    if not any(kl.on == "probe" and kl.weight for kl in retain.kl_terms):
        return None
    before = bench.original if retain.reference == "source" else None
    return distributed.broadcast_from_main(
        lambda: _measure_probe_quality(before or bench, finetune.pooling, seed)
    )


def _measure_probe_quality(bench: ExperimentContext, pooling: str, seed: int) -> HeadQuality | None:
    rows = bench.select_train_rows(seed)
    told = bench.get_probe(pooling, seed).logits(bench.extract_features(pooling, seed, rows))
    # Words that were cut off have none.
    known = np.isfinite(told).all(1)
    labels = torch.from_numpy(bench.prepared.encode_targets(rows)[known])
    kind = LOGIT_KIND_OF_TASK.get(bench.prepared.task, "classes")
    return measure_head_quality(torch.from_numpy(told[known]), labels, kind)


def _measure_residual_variance(bench: ExperimentContext, pooling: str, seed: int) -> float:
    """The variance of the target around the probe's prediction, on validation."""
    rows = bench.prepared.rows["validation"]
    told = bench.get_probe(pooling, seed).logits(bench.extract_features(pooling, seed, rows))[:, 0]
    return float(np.mean((bench.prepared.encode_targets(rows) - told) ** 2))


# The weight of KL, chosen: of a short grid the one that forgets least at an equal score.


WEIGHT_GRID = (0.03, 0.1, 0.3, 1.0)
MAX_SELECTION_ROWS = 1000
"""Rows whose neighbours tell what was forgotten, at most."""


def set_kl_weight(retain: Retain, weight: float) -> Retain:
    """The section with a number for every weight that was to be chosen."""
    kls = [
        kl.model_copy(update={"weight": weight}) if kl.weight == "auto" else kl
        for kl in retain.kl_terms
    ]
    return retain.model_copy(update={"kl": kls})


def has_auto_weight(retain: Retain | None) -> bool:
    """Whether a weight is still to be chosen."""
    return retain is not None and any(kl.weight == "auto" for kl in retain.kl_terms)


def select_kl_weight(tried: Callable[[float], tuple[float, float, float]]) -> dict[str, Any]:
    """Tries the grid; the least forgetting within one standard error of the best score wins.

    Args:
        tried: of a weight the score on validation, more is better, its standard error, and how
            much was forgotten.

    Returns:
        `weight`, and what was `tried`: {weight, score, error, forgotten} each.
    """
    seen = [tried(weight) for weight in WEIGHT_GRID]
    chosen = select_within_one_standard_error(*(list(column) for column in zip(*seen, strict=True)))
    return {
        "weight": WEIGHT_GRID[chosen],
        "tried": [
            {"weight": weight, "score": score, "error": error, "forgotten": forgotten}
            for weight, (score, error, forgotten) in zip(WEIGHT_GRID, seen, strict=True)
        ],
    }


def score_validation(bench: ExperimentContext, logits: np.ndarray) -> tuple[float, float]:
    """The score on validation that arms are chosen by, more is better, and its standard error.

    Args:
        bench: the rows.
        logits: of the validation rows.
    """
    rows = bench.prepared.rows["validation"]
    metric = METRICS[bench.prepared.task][SELECTION_METRICS[bench.prepared.task]]
    labels, told = bench.prepared.encode_for_metrics(rows), bench.decode_logits(rows, logits)
    groups = [str(i) if row.group is None else row.group for i, row in enumerate(rows)]
    units = np.unique(groups, return_inverse=True)[1].astype(np.int64)

    def score(kept: np.ndarray) -> float:
        return metric.sign * metric.score(labels[kept], told[kept])

    if len(np.unique(units)) < 2:
        return score(np.arange(len(rows))), 0.0
    values = jackknife(score, units)
    return score(np.arange(len(rows))), float(values.std(ddof=1) / len(values) ** 0.5)


def measure_lost_neighbours(
    bench: ExperimentContext, before: np.ndarray, built: LoadedModel
) -> float:
    """The share of nearest neighbours that the model has lost; every process must come here.

    Args:
        bench: whose general rows that may be used are looked at, or else its validation rows.
        before: their embeddings under the original, see `embed_selection_rows`.
        built: the trained model.
    """
    after = embed_selection_rows(bench, built)
    return distributed.broadcast_from_main(lambda: 1 - mean_shared_neighbours(before, after))


def embed_selection_rows(bench: ExperimentContext, built: LoadedModel) -> np.ndarray:
    """(rows, width) embeddings of the rows that the choice of a weight looks at; the half of
    general data that is only measured is none of them."""
    general = bench.general
    rows = bench.prepared.rows["validation"] if general is None else general.train_rows
    return embed_rows(bench, built, rows[:MAX_SELECTION_ROWS])
