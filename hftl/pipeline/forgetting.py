"""The original beside the arms: its embeddings, kept once, and what each arm has forgotten."""

from pathlib import Path
from typing import Any

import numpy as np

from hftl.config.recipe import Arm
from hftl.finetune.arm_files import read_embeddings, write_embeddings
from hftl.finetune.context import ExperimentContext
from hftl.finetune.pretraining_heads import embed_source, find_source_classes, select_compared_rows
from hftl.finetune.retention import DEFAULT_TAU
from hftl.measure.forgetting import (
    Features,
    ForgettingSpec,
    build_forgetting_arms,
    measure_forgetting,
)
from hftl.pipeline.arms import Run
from hftl.runtime import run_folder

COMPARED_STRATEGIES = ("head", "partial", "gradual", "lora", "full")
"""The strategies whose encoder comes from the source."""


def build_forgetting_section(
    this: Run, bench: ExperimentContext, folders: dict[str, list[Path]]
) -> dict[str, Any] | None:
    """What the record tells of forgetting; None where no arm's encoder comes from the source.

    Args:
        this: the run, every arm finished.
        bench: the source as it is, and the rows.
        folders: for each arm its folders, one a seed.
    """
    arms = {arm.name: arm for arm in this.arms if arm.strategy in COMPARED_STRATEGIES}
    stored = {name: [read_embeddings(folder) for folder in folders[name]] for name in arms}
    # A head on the source as it is leaves the encoder alone; other arms without embeddings are of
    # a version that kept none.
    kept = {n: s for n, s in stored.items() if all(s) or _keeps_source_encoder(arms[n])}
    if not kept:
        return None
    before = _load_source_embeddings(this, bench)
    after: dict[str, list[Features]] = {
        name: [told or before for told in found] for name, found in kept.items()
    }
    general = bench.general
    asked = ForgettingSpec(
        {}
        if general is None
        else {name: general.get_control_values(name) for name in general.controls},
        () if general is None else general.classes,
        None if general is None else general.get_document_ids(),
        DEFAULT_TAU[bench.prepared.modality],
    )
    plain = {
        name: _find_arm_without_retention(arms[name], [arms[n] for n in kept]) for name in kept
    }
    rows = {part: len(found) for part, found in select_compared_rows(bench).items()}
    return {
        "rows": rows.get("general", 0),
        "new_rows": rows["new"],
        "documents": None if general is None else general.facts["documents"],
        "general": None if general is None else general.facts,
        "controls": [
            {"name": name, "values": len(set(labels)), "classes": name in asked.classes}
            for name, labels in asked.controls.items()
        ],
        "tau": asked.tau,
        "backward_control": _find_backward_control(bench, before),
        **build_forgetting_arms(measure_forgetting(before, after, asked), asked, plain),
    }


def _find_backward_control(bench: ExperimentContext, before: Features) -> str | None:
    """The control that holds the source's own classes, where it was asked for them."""
    if bench.general is None or "backward" not in before:
        return None
    known = find_source_classes(bench.source, bench.general)
    return known and known[0]


def _keeps_source_encoder(arm: Arm) -> bool:
    return arm.strategy == "head" and not arm.stages


def _find_arm_without_retention(arm: Arm, others: list[Arm]) -> str | None:
    """The name of the same arm without retention."""
    if arm.retain is None:
        return None
    like = (arm.strategy, arm.stages, None)
    return next((o.name for o in others if (o.strategy, o.stages, o.retain) == like), None)


def _load_source_embeddings(this: Run, bench: ExperimentContext) -> dict[str, np.ndarray]:
    """The source's embeddings, computed where they do not stand."""
    folder = this.folder / "phases" / "original"
    reads = {
        "weights": bench.weights_hash,
        "data": bench.prepared.facts["fingerprint"],
        "general": None if bench.general is None else bench.general.facts["fingerprint"],
    }
    if run_folder.read_stage_inputs(folder) != reads:
        found = embed_source(bench, this.recipe.data.seed)
        with run_folder.commit_stage(folder, reads) as aside:
            write_embeddings(aside, found)
    return read_embeddings(folder)
