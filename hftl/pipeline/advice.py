"""Build the advice on a recipe from its training rows, and the record's section on it."""

from collections.abc import Sequence

import numpy as np

from hftl.analysis.advice import advise
from hftl.analysis.advice_facts import AdviceSection, TaskFeatures
from hftl.analysis.facts import AnalysisSection
from hftl.analysis.forecast import MIN_ROWS, load_forecast_model
from hftl.analysis.out_of_fold import predict_out_of_fold
from hftl.config.recipe import Arm, Recipe
from hftl.data.rows import Row
from hftl.data.splits import TASKS_WITHOUT_CLASS_SHOTS, take_stratified
from hftl.finetune.classical import predict_classical_out_of_fold
from hftl.finetune.context import ExperimentContext
from hftl.measure.advice_outcome import judge_advice
from hftl.train.facts import ArmEntry

MAX_ROWS = 1000
"""Training rows of a draw that are read, at most."""
MAX_DRAWS = 2
"""Draws of labelled rows that are read, at most."""


def build_advice(
    recipe: Recipe, context: ExperimentContext, analysis: AnalysisSection | None = None,
    draws: int = MAX_DRAWS,
) -> AdviceSection:  # fmt: skip
    """Return the advice for a recipe, from its training rows and what the source says of them.

    Args:
        recipe: it names the task and its own strategy.
        context: the source as it is, and the rows.
        analysis: what was measured of the source's features.
        draws: of labelled rows that are read, at most.
    """
    rows = len(context.select_train_rows(recipe.measure.seeds[0]))
    in_all = context.prepared.task in TASKS_WITHOUT_CLASS_SHOTS
    labels = float(rows) if in_all else rows / context.num_outputs
    if not recipe.finetune.spec.reads_labels:
        labels = 0.0
    task = measure_task_features(recipe, context, draws)
    return advise(
        round(labels, 1), "in all" if in_all else "a class", task, load_forecast_model(),
        recipe.finetune.strategy, analysis,
    )  # fmt: skip


def build_advice_section(
    recipe: Recipe, context: ExperimentContext, arms: Sequence[Arm], entries: Sequence[ArmEntry],
    analysis: AnalysisSection | None,
) -> AdviceSection:  # fmt: skip
    """Return the record's section: the advice from training rows alone, and how right it was.

    How right is a matter of points of accuracy, which the forecast is of: other tasks have none
    that is worth the name, such as the share of words, most of which are outside of any entity.
    """
    section = build_advice(recipe, context, analysis)
    if context.prepared.task != "classification":
        return section
    outcome = judge_advice(section, arms, entries)
    return section if outcome is None else section.model_copy(update={"outcome": outcome})


def measure_task_features(
    recipe: Recipe, context: ExperimentContext, draws: int = MAX_DRAWS
) -> TaskFeatures | str:
    """Return the features of the recipe's task, means over draws of its first seeds.

    A draw with the rows of an earlier one is not read again. Where a forecast has nothing to read,
    the reason is returned instead.
    """
    prepared = context.prepared
    if prepared.task != "classification":
        return f"the forecast is of classification, and data.task is {prepared.task}"
    if not recipe.finetune.spec.reads_labels:
        return "the recipe reads no labels"
    drawn: dict[frozenset[str], tuple[int, list[Row]]] = {}
    for seed in recipe.measure.seeds[:draws]:
        rows = context.select_train_rows(seed)
        drawn.setdefault(frozenset(str(row.content) for row in rows), (seed, rows))
    train_rows = len(next(iter(drawn.values()))[1])
    if train_rows < MIN_ROWS:
        return f"{train_rows} training rows are fewer than the {MIN_ROWS} that it needs"
    scored = [_score_draw(recipe, context, seed, rows) for seed, rows in drawn.values()]
    scores = [score for score in scored if score is not None]
    if len(scores) < len(scored):
        return "train has fewer than two groups, which cross-validation needs"
    right = np.concatenate(scores, axis=1)
    return TaskFeatures(
        modality=prepared.modality,
        train_rows=train_rows,
        read_rows=right.shape[1],
        classes=context.num_outputs,
        probe=float(right[0].mean()),
        classical=float(right[1].mean()),
        encoder=context.source.model_type,
    )


def _score_draw(
    recipe: Recipe, context: ExperimentContext, seed: int, rows: list[Row]
) -> np.ndarray | None:
    """Return whether probe and classical model are right on each row, (2, rows); None with one
    group."""
    prepared, pooling = context.prepared, recipe.finetune.pooling
    if len(rows) > MAX_ROWS:
        rows = take_stratified(rows, MAX_ROWS, prepared.task, 0, "forecast", leave=1)[0]
    targets, groups = prepared.encode_targets(rows), context.group_outputs(rows)
    if groups is not None and len(np.unique(groups)) < 2:
        return None
    features = context.extract_features(pooling, seed, rows)
    probe = predict_out_of_fold(features, targets, context.num_outputs, groups)
    classical = predict_classical_out_of_fold(context, rows)
    return np.stack([logits.argmax(1) == targets for logits in (probe, classical)])
