"""Read how a published folder makes scores and labels of logits, and make prediction sets.

A prediction set holds the truth as often as the coverage says, for inputs like those of validation;
see `measure.conformal`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hftl.errors import RecipeError
from hftl.inference.find_model import build_loading_error
from hftl.measure.conformal import (
    TASKS,
    count_rows_needed,
    estimate_spread,
    find_members,
    find_quantile,
    find_stored_rank,
)
from hftl.measure.facts import LabelCurve
from hftl.publish.published_metadata import PublishedConformal, PublishedMetadata
from hftl.publish.settings_files import THRESHOLDS_KEY


def read_label_curves(
    folder: Path, metadata: PublishedMetadata, task: str, names: Sequence[str]
) -> list[LabelCurve] | None:
    """Return the curve of each label's probability; None where the sigmoid is that.

    Raises:
        RunFolderError: if they are those of other labels.
    """
    calibration = metadata.calibration
    if task != "multi-label" or calibration is None or calibration.labels is None:
        return None
    if set(calibration.labels) != set(names):
        raise build_loading_error(
            folder,
            f"hftl.json calibrates {', '.join(calibration.labels)}, and the labels are "
            f"{', '.join(names)}",
        )
    return [calibration.labels[name] for name in names]


def read_thresholds(
    folder: Path, config: Any, task: str, names: Sequence[str]
) -> np.ndarray | None:
    """Return the threshold of each label's probability; None where it is .5.

    Raises:
        RunFolderError: if config.json holds anything but one between 0 and 1 for each label.
    """
    given = getattr(config, THRESHOLDS_KEY, None)
    if task != "multi-label" or given is None:
        return None
    if not isinstance(given, Mapping) or set(given) != set(names):
        why = f"{THRESHOLDS_KEY} in config.json gives no threshold for each label"
        raise build_loading_error(folder, why)
    for name, threshold in given.items():
        if not isinstance(threshold, (int, float)) or not 0 < threshold < 1:
            raise build_loading_error(
                folder,
                f"{THRESHOLDS_KEY} in config.json is {threshold!r} for {name!r}, expected a number "
                "between 0 and 1",
            )
    return np.array([given[name] for name in names], dtype=np.float64)


def find_set_quantile(
    conformal: PublishedConformal | None, task: str, coverage: float
) -> tuple[float, str]:
    """Return how far what is in a set may be from the input, and a line on what that rests on.

    Raises:
        RecipeError: if the coverage is no share, the task has no sets, the folder no scores, or the
            rows of validation are too few.
    """
    if not 0 < coverage < 1:
        raise RecipeError(f"coverage is {coverage:g}, expected a share between 0 and 1", "Give .9")
    if task not in TASKS:
        raise RecipeError(
            "coverage: the model tags words, and the words of a row depend on each other, so that "
            "no set of tags has a coverage",
            "Leave it out",
        )
    if conformal is None:
        raise RecipeError(
            "coverage: the model does not say how far the rows of validation were from their "
            "labels (hftl.json, conformal)",
            "Give a run or published folder that this version of hftl made; a run of an older one "
            "is trained again by `hftl run` with --restart",
        )
    quantile = find_quantile(conformal.rows, conformal.scores, coverage)
    rank = find_stored_rank(conformal.rows, len(conformal.scores), coverage)
    if quantile is None or rank is None:
        raise RecipeError(
            f"coverage {coverage:g} needs at least {count_rows_needed(coverage)} rows of "
            f"validation, and the model was measured on {conformal.rows}",
            "Give a smaller coverage, or train with a larger data.validation",
        )
    return quantile, _format_basis(conformal, task, coverage, rank)


def _format_basis(conformal: PublishedConformal, task: str, coverage: float, rank: int) -> str:
    low, high = estimate_spread(conformal.rows, rank)
    always = ""
    if task == "classification":
        always = "; the likeliest class is always in a set, so that coverage can be higher"
    rows = f"{conformal.rows:,} rows of validation"
    spread = f"{low:.3f} to {high:.3f} in 95 of 100 such splits"
    if conformal.groups is not None:
        rows += f" in {conformal.groups:,} groups"
        spread += " if rows of a group were independent"
    return (
        f"{coverage:g} for inputs like the {rows} ({spread}); approximate where validation also "
        f"chose the weights (an epoch, a seed){always}"
    )


def list_set_members(logits: np.ndarray, task: str, quantile: float) -> list[list[int]]:
    """Return the classes in the set of each row, by their position; see `find_members`."""
    return [np.flatnonzero(row).tolist() for row in find_members(logits, task, quantile)]
