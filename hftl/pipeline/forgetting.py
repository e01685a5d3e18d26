"""Measure what each arm has forgotten, against the source's embeddings, computed once a run."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from hftl.config.recipe import Arm, Recipe
from hftl.finetune.arm_files import read_embeddings, write_embeddings
from hftl.finetune.context import ExperimentContext
from hftl.finetune.pretraining_heads import embed_source, find_source_classes, select_compared_rows
from hftl.measure.forgetting import (
    Features,
    ForgettingSpec,
    build_forgetting_arms,
    measure_forgetting,
)
from hftl.measure.forgetting_facts import Control, ForgettingSection
from hftl.pipeline.cache_keys import build_arm_key, build_context_inputs, build_original_key
from hftl.pipeline.run import Run
from hftl.retain.kl import DEFAULT_TAU
from hftl.runtime import run_folder


def build_forgetting_section(
    run: Run, context: ExperimentContext, folders: dict[str, list[Path]]
) -> ForgettingSection | None:
    """Return the record's section; None where no arm's encoder comes from the source.

    Args:
        run: every arm of it is finished.
        context: of the source as it is.
        folders: of each arm, one a seed.
    """
    arms = {arm.name: arm for arm in run.arms if not arm.spec.is_baseline}
    stored = {name: [read_embeddings(folder) for folder in folders[name]] for name in arms}
    # A head on the source as it is leaves the encoder unchanged and stores nothing; other arms
    # without embeddings come from a version that stored none.
    stored = {n: e for n, e in stored.items() if all(e) or _keeps_source_encoder(arms[n])}
    if not stored:
        return None
    before = _load_source_embeddings(run, context)
    after: dict[str, list[Features]] = {
        name: [seed or before for seed in embeddings] for name, embeddings in stored.items()
    }
    compared = [arms[name] for name in stored]
    plain = {arm.name: _find_arm_without_retention(run.recipe, arm, compared) for arm in compared}
    spec, general = _build_spec(context), context.general
    rows = {part: len(selected) for part, selected in select_compared_rows(context).items()}
    headline, entries = build_forgetting_arms(measure_forgetting(before, after, spec), spec, plain)
    return ForgettingSection(
        rows=rows.get("general", 0),
        new_rows=rows["new"],
        documents=None if general is None else general.facts.documents,
        general=None if general is None else general.facts,
        controls=[
            Control(name=name, values=len(set(labels)), classes=name in spec.classes)
            for name, labels in spec.controls.items()
        ],
        tau=spec.tau,
        backward_control=_find_backward_control(context, before),
        headline=headline,
        arms=entries,
    )


def _build_spec(context: ExperimentContext) -> ForgettingSpec:
    """Return by which columns of general data, and at which temperature, forgetting is measured."""
    general, tau = context.general, DEFAULT_TAU[context.prepared.modality]
    if general is None:
        return ForgettingSpec({}, (), None, tau)
    controls = {name: general.get_control_values(name) for name in general.controls}
    return ForgettingSpec(controls, general.classes, general.get_document_ids(), tau)


def _find_backward_control(context: ExperimentContext, before: Features) -> str | None:
    """Return the column that holds the source's own classes, if its classifier was measured."""
    if context.general is None or "backward" not in before:
        return None
    classes = find_source_classes(context.source, context.general)
    return classes and classes[0]


def _keeps_source_encoder(arm: Arm) -> bool:
    return not arm.spec.changes_encoder and not arm.stages


def _find_arm_without_retention(recipe: Recipe, arm: Arm, others: list[Arm]) -> str | None:
    """Return the name of the arm that reads the same in all but retention."""
    if arm.retain is None:
        return None
    plain = build_arm_key(recipe, replace(arm, retain=None))
    return next((other.name for other in others if build_arm_key(recipe, other) == plain), None)


def _load_source_embeddings(run: Run, context: ExperimentContext) -> dict[str, np.ndarray]:
    """Return the source's embeddings; computed if no stage of these inputs has them."""
    stage = run.folder / "phases" / "original"
    reads = {
        "recipe": build_original_key(run.recipe),
        **build_context_inputs(context),
        "general": None if context.general is None else context.general.facts.fingerprint,
    }
    if run_folder.read_stage_inputs(stage) != reads:
        heads = {
            arm.finetune.pooling for arm in run.arms
            if arm.strategy == "head" and _keeps_source_encoder(arm)
        }  # fmt: skip
        embeddings = embed_source(context, run.recipe.data.seed, heads)
        with run_folder.commit_stage(stage, reads) as folder:
            write_embeddings(folder, embeddings)
    return read_embeddings(stage)
