"""From a recipe's `retain` to what the trainer is given: terms, another original, general rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hftl.analysis.drift import agreement
from hftl.config.finetune import Finetune
from hftl.config.recipe import Arm
from hftl.config.retain import KL, Replay, Retain
from hftl.data import labels as answers
from hftl.data.splits import content_key
from hftl.data.text import Examples
from hftl.errors import RecipeError
from hftl.finetune.context import Workbench
from hftl.finetune.pretraining_heads import check_head, embed_rows, head_term
from hftl.finetune.targets import target_scale
from hftl.measure.metrics import METRICS, SELECTION
from hftl.measure.statistics import jackknife, one_standard_error
from hftl.models.heads import Built
from hftl.models.parts import TOKENS
from hftl.models.source import SourceModel
from hftl.retain.kl import KLToOriginal
from hftl.retain.reference import Opinion, opinion_of
from hftl.retain.weights import EWC, L2SP, check_low_rank, check_unchanged_base
from hftl.runtime import distributed
from hftl.train.replay_batches import unlabelled

Fisher = tuple[dict[str, Tensor], dict[str, Any]]
OWN_HEADS = ("mlm", "zero_shot")
ANSWERS = {"classification": "classes", "multi-label": "labels", "regression": "target"}
"""What the logits of each task are of, see `fisher_information` and `opinion_of`; of words
classes."""
TAU = {"text": 0.05, "image": 0.07}
"""The temperature of cosines that sentence encoders (Reimers & Gurevych 2019) and self-distilled
image encoders (Caron et al. 2021) are trained with."""


@dataclass(frozen=True)
class Kept:
    """What keeps one training near its original.

    `trainer` are arguments of `TransferTrainer`; `alphas` are the shares of the way from the
    original to the trained weights that are tried; `look` is asked about the trained model, and
    what it says stands in the facts as `forgotten`; `facts` is what the record tells.
    """

    trainer: dict[str, Any] = field(default_factory=dict)
    alphas: tuple[float, ...] = ()
    look: Callable[[Built], float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def kept_near(
    bench: Workbench, retain: Retain | None, finetune: Finetune, seed: int,
    fisher: Callable[[], Fisher], original: Callable[[Workbench], nn.Module],
) -> Kept:  # fmt: skip
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
        return Kept()
    before = bench.original if retain.reference == "source" else None
    terms: list[Any] = [
        head_term(bench, kl, seed, before)
        if kl.on in OWN_HEADS
        else _kl_term(bench, kl, finetune, seed)
        for kl in retain.kls
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
    if before is not None and retain.kls:
        found["reference"] = original(before)
    if mixes_general(retain):
        replay = retain.replay or Replay()
        rows = general_examples(bench, replay.labelled)
        found |= {"general_dataset": rows, "general_ratio": replay.ratio}
        found |= {"general_weight": replay.weight} if replay.labelled else {}
        facts["general_rows"] = len(rows)
    return Kept(found, tuple(retain.interpolate or ()), None, facts)


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
    for kl in retain.kls:
        if kl.on in OWN_HEADS:
            adapted = any(stage.objective == "mlm" for stage in arm.stages)
            check_head(kl, source, adapted and retain.reference == "start", task)
    on_general = any(kl.inputs != "target" for kl in retain.kls)
    if retain.replay is not None and not retain.replay.labelled and not on_general:
        raise RecipeError(
            "retain.replay mixes in general data without labels, and no KL is taken on them",
            "Set retain.kl.inputs to general or both, or retain.replay.labelled",
        )
    if retain.ewc is not None and retain.ewc.fisher != "features" and task == TOKENS:
        raise RecipeError(
            f"retain.ewc.fisher={retain.ewc.fisher} is of one answer a row, and {task} has one a "
            "word",
            "Use features",
        )
    if task == "regression" and any(kl.on == "probe" and kl.temperature != 1 for kl in retain.kls):
        raise RecipeError(
            "retain.kl.temperature: the KL between two Gaussians has none", "Leave it at 1"
        )


def general_targets(bench: Workbench) -> np.ndarray:
    """(rows,) int64 class ids of the general rows that retention may look at."""
    assert bench.general is not None
    labels = bench.general.labels(bench.label)
    return answers.targets(labels, bench.prepared.task, bench.prepared.names)


def general_examples(bench: Workbench, labelled: bool = False) -> Examples:
    """The general rows that retention may look at, with labels that count for nothing, or with
    their own."""
    assert bench.general is not None
    rows = bench.general.used
    encoded = bench.encoded(rows)
    if labelled:
        labels = list(general_targets(bench))
        return Examples(encoded, labels, [content_key(row) for row in rows], None)
    like = bench.examples(bench.prepared.rows["train"][:1])[0]
    labels = [unlabelled(like, dict(row)) for row in encoded]
    return Examples(encoded, labels, [content_key(row) for row in rows], None)


def mixes_general(retain: Retain) -> bool:
    """Whether steps hold general rows; EWC looks at them before."""
    return retain.replay is not None or any(kl.inputs != "target" for kl in retain.kls)


def _kl_term(bench: Workbench, kl: KL, finetune: Finetune, seed: int) -> KLToOriginal:
    assert not isinstance(kl.weight, str)
    variance, scale = 1.0, target_scale(bench, seed)
    if kl.on == "probe" and scale is not None:
        variance = distributed.share(lambda: _residual_variance(bench, finetune.pooling, seed))
        # The heads compared are standardised while they train.
        variance /= scale.sd**2
    return KLToOriginal(
        kl.weight, kl.on, kl.temperature, kl.direction, kl.inputs,
        kl.tau or TAU[bench.prepared.modality], kl.anchors, variance, solved=True,
    )  # fmt: skip


def head_opinion(bench: Workbench, retain: Retain, finetune: Finetune, seed: int) -> Opinion | None:
    """What the probe that KL is taken on says of the rows it was fitted on; None without such KL.

    It is solved by construction, so a weak one ends no run: the other arms have their worth.
    """
    if not any(kl.on == "probe" and kl.weight for kl in retain.kls):
        return None
    before = bench.original if retain.reference == "source" else None
    return distributed.share(lambda: _opinion(before or bench, finetune.pooling, seed))


def _opinion(bench: Workbench, pooling: str, seed: int) -> Opinion | None:
    rows = bench.train_rows(seed)
    told = bench.probe(pooling, seed).logits(bench.features(pooling, seed, rows))
    # Words that were cut off have none.
    known = np.isfinite(told).all(1)
    labels = torch.from_numpy(bench.prepared.targets(rows)[known])
    kind = ANSWERS.get(bench.prepared.task, "classes")
    return opinion_of(torch.from_numpy(told[known]), labels, kind)


def _residual_variance(bench: Workbench, pooling: str, seed: int) -> float:
    """The variance of the target around the probe's prediction, on validation."""
    rows = bench.prepared.rows["validation"]
    told = bench.probe(pooling, seed).logits(bench.features(pooling, seed, rows))[:, 0]
    return float(np.mean((bench.prepared.targets(rows) - told) ** 2))


# The weight of KL, chosen: of a short grid the one that forgets least at an equal score.


GRID = (0.03, 0.1, 0.3, 1.0)
LOOKED = 1000
"""Rows whose neighbours tell what was forgotten, at most."""


def with_weight(retain: Retain, weight: float) -> Retain:
    """The section with a number for every weight that was to be chosen."""
    kls = [
        kl.model_copy(update={"weight": weight}) if kl.weight == "auto" else kl for kl in retain.kls
    ]
    return retain.model_copy(update={"kl": kls})


def is_open(retain: Retain | None) -> bool:
    """Whether a weight is still to be chosen."""
    return retain is not None and any(kl.weight == "auto" for kl in retain.kls)


def choose_weight(tried: Callable[[float], tuple[float, float, float]]) -> dict[str, Any]:
    """Tries the grid; the least forgetting within one standard error of the best score wins.

    Args:
        tried: of a weight the score on validation, more is better, its standard error, and how
            much was forgotten.

    Returns:
        `weight`, and what was `tried`: {weight, score, error, forgotten} each.
    """
    seen = [tried(weight) for weight in GRID]
    chosen = one_standard_error(*(list(column) for column in zip(*seen, strict=True)))
    return {
        "weight": GRID[chosen],
        "tried": [
            {"weight": weight, "score": score, "error": error, "forgotten": forgotten}
            for weight, (score, error, forgotten) in zip(GRID, seen, strict=True)
        ],
    }


def validation_score(bench: Workbench, logits: np.ndarray) -> tuple[float, float]:
    """The score on validation that arms are chosen by, more is better, and its standard error.

    Args:
        bench: the rows.
        logits: of the validation rows.
    """
    rows = bench.prepared.rows["validation"]
    metric = METRICS[bench.prepared.task][SELECTION[bench.prepared.task]]
    labels, told = bench.prepared.measured(rows), bench.told(rows, logits)
    groups = [str(i) if row.group is None else row.group for i, row in enumerate(rows)]
    units = np.unique(groups, return_inverse=True)[1].astype(np.int64)

    def score(kept: np.ndarray) -> float:
        return metric.sign * metric.score(labels[kept], told[kept])

    if len(np.unique(units)) < 2:
        return score(np.arange(len(rows))), 0.0
    values = jackknife(score, units)
    return score(np.arange(len(rows))), float(values.std(ddof=1) / len(values) ** 0.5)


def forgotten(bench: Workbench, before: np.ndarray, built: Built) -> float:
    """The share of nearest neighbours that the model has lost; every process must come here.

    Args:
        bench: whose general rows that may be used are looked at, or else its validation rows.
        before: their embeddings under the original, see `looked_at`.
        built: the trained model.
    """
    after = looked_at(bench, built)
    return distributed.share(lambda: 1 - agreement(before, after))


def looked_at(bench: Workbench, built: Built) -> np.ndarray:
    """(rows, width) embeddings of the rows that the choice of a weight looks at; the half of
    general data that is only measured is none of them."""
    general = bench.general
    rows = bench.prepared.rows["validation"] if general is None else general.used
    return embed_rows(bench, built, rows[:LOOKED])
