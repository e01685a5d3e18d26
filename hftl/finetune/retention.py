"""From a recipe's `retain` to what the trainer is given: terms, another original, general rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hftl import processes
from hftl.data import answers
from hftl.data.examples import Examples
from hftl.data.split import content_key
from hftl.errors import RecipeError
from hftl.finetune.heads import check_head, head_term
from hftl.finetune.targets import target_scale
from hftl.finetune.workbench import Workbench
from hftl.model.head import Built
from hftl.model.parts import TOKENS
from hftl.model.source import SourceModel
from hftl.recipe import Arm
from hftl.retain.base import check_low_rank, check_unchanged_base
from hftl.retain.kl import KLToOriginal
from hftl.retain.opinion import Opinion, opinion_of
from hftl.retain.weights import EWC, L2SP
from hftl.sections.finetune import Finetune
from hftl.sections.retain import KL, Replay, Retain
from hftl.train.mixing import unlabelled

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
        variance = processes.share(lambda: _residual_variance(bench, finetune.pooling, seed))
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
    return processes.share(lambda: _opinion(before or bench, finetune.pooling, seed))


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
