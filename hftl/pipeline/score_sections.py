"""Build the record's sections on what the scores of the published weights mean.

All is fitted on validation and measured on test.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hftl.config.recipe import Recipe
from hftl.data.splits import MEASURED_SPLITS
from hftl.finetune.arm_files import read_logits
from hftl.finetune.context import ExperimentContext
from hftl.measure.abstention import measure_abstention
from hftl.measure.calibration import measure_calibration
from hftl.measure.conformal import TASKS
from hftl.measure.coverage import measure_conformal
from hftl.measure.facts import (
    AbstentionSection,
    CalibrationSection,
    ConformalSection,
    ThresholdSection,
)
from hftl.measure.gain import assign_units
from hftl.measure.label_calibration import measure_label_calibration
from hftl.measure.thresholds import fit_thresholds, measure_thresholds


@dataclass(frozen=True)
class ScoreSections:
    """Hold the sections; None where the task has no such scores."""

    calibration: CalibrationSection | None = None
    thresholds: ThresholdSection | None = None
    conformal: ConformalSection | None = None
    abstention: AbstentionSection | None = None


def build_score_sections(recipe: Recipe, context: ExperimentContext, folder: Path) -> ScoreSections:
    """Return the sections of an arm and seed.

    Args:
        recipe: says which thresholds.
        context: the rows.
        folder: the arm's, whose weights are published.
    """
    prepared = context.prepared
    if prepared.task not in TASKS:
        return ScoreSections()
    validation, test = (_read_split(context, folder, split) for split in MEASURED_SPLITS)
    units = assign_units(prepared.rows["test"])
    calibration = thresholds = abstention = None
    if prepared.task == "classification":
        calibration = measure_calibration(validation, test, units)
        abstention = measure_abstention(*test, calibration.temperature, units)
    if prepared.task == "multi-label":
        calibration = measure_label_calibration(validation, test, prepared.names, units)
    if recipe.measure.thresholds is not None:
        fitted = fit_thresholds(*validation, recipe.measure.thresholds)
        thresholds = measure_thresholds(
            fitted, recipe.measure.thresholds, *test, prepared.names, units
        )
    groups = _count_groups(context)
    conformal = measure_conformal(validation, test, prepared.task, units, groups)
    return ScoreSections(calibration, thresholds, conformal, abstention)


def fit_published_thresholds(
    recipe: Recipe, context: ExperimentContext, folder: Path
) -> dict[str, float]:
    """Return the threshold of each label as config.json holds it; none where the recipe says none.

    Args:
        recipe: names the metric.
        context: the rows.
        folder: the arm's, whose weights are published.
    """
    if recipe.measure.thresholds is None:
        return {}
    validation = _read_split(context, folder, "validation")
    fitted = fit_thresholds(*validation, recipe.measure.thresholds)
    return dict(zip(context.prepared.names, fitted.tolist(), strict=True))


def _read_split(
    context: ExperimentContext, folder: Path, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits and the labels of a split."""
    labels = context.prepared.encode_for_metrics(context.prepared.rows[split])
    return read_logits(folder, split), labels


def _count_groups(context: ExperimentContext) -> int | None:
    """Return how many groups the rows of validation come in; None where none are named."""
    rows = context.prepared.rows["validation"]
    return None if rows[0].group is None else len(np.unique(assign_units(rows)))
