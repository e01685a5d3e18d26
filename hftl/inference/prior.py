"""Correct predictions for other class shares than those the model was fitted under."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hftl.errors import DataError, RecipeError, suggest_closest
from hftl.inference.predict import Prediction, Predictor
from hftl.measure.shift import (
    MIN_SINGULAR_VALUE,
    correct_probabilities,
    estimate_by_counts,
    estimate_rlls,
    measure_separability,
)
from hftl.runtime.run_folder import UnreadableJsonError, read_json

AUTO = "auto"
MAX_SHARE = 1e12
"""Of a file, whose shares need not add up to 1."""
MIN_ROWS = 50
"""Inputs from which on their class shares are estimated."""


def correct_predictions(
    predictor: Predictor, predictions: list[Prediction], prior: str
) -> tuple[list[Prediction], str]:
    """Return predictions under other shares of classes, and by how much that changed them.

    Args:
        predictor: of a classifier that says what it confused on validation.
        predictions: of all inputs.
        prior: `auto` to estimate the shares from the predicted labels (`estimate_rlls`), or a file
            of JSON, a share by label.

    Raises:
        RecipeError: if the model has no such counts, or the file does not give every label a share.
        DataError: if the inputs are too few, or the classes too much confused to estimate shares.
    """
    if predictor.task != "classification":
        raise RecipeError(
            f"--prior corrects for shares of classes, one an input, and the model's task is "
            f"{predictor.task}",
            "Predict without it",
        )
    if predictor.confusion is None:
        raise RecipeError(
            "--prior: the model does not say what it confused on validation, or was trained under "
            "other shares of classes than validation's (class_weight, data.shots)",
            "Give a run or published folder of classification that this version of hftl made "
            "without them",
        )
    names, confusion = predictor.class_names, predictor.confusion.astype(np.float64)
    source = confusion.sum(1) / confusion.sum()
    probabilities = np.array([[p["scores"][name] for name in names] for p in predictions])  # pyright: ignore[reportTypedDictNotRequiredAccess]
    if not source.all():
        absent = names[int(source.argmin())]
        raise DataError(
            f"--prior: validation held no row of {absent!r}, so that its share there is not known",
            "Train again with more rows of it, or predict without --prior",
        )
    if prior == AUTO:
        _check_separability(confusion, len(predictions))
        # Counts of labels need no probabilities that are calibrated class by class, which one
        # temperature does not make them: EM follows their lean, and overshoots by it.
        predicted = np.bincount(probabilities.argmax(1), minlength=len(names))
        estimate = estimate_by_counts(estimate_rlls, confusion, predicted)
        shares, intervals = estimate.shares, estimate.interval
    else:
        shares, intervals = _read_shares(Path(prior), names), None
    corrected = correct_probabilities(probabilities, source, shares)
    changed = int((corrected.argmax(1) != probabilities.argmax(1)).sum())
    moved = [
        _format_share(name, shares[i], source[i], None if intervals is None else intervals[i])
        for i, name in enumerate(names)
    ]
    note = f"shares {', '.join(moved)}; {changed} of {len(predictions)} labels changed"
    return [predictor.format_scores(row.tolist()) for row in corrected], note


def _format_share(name: str, share: float, before: float, interval: np.ndarray | None) -> str:
    spread = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
    return f"{name} {share:.3f}{spread} for {before:.3f}"


def _check_separability(confusion: np.ndarray, rows: int) -> None:
    """Refuse to estimate shares that the model's predictions do not determine.

    Raises:
        DataError: saying why.
    """
    if rows < MIN_ROWS:
        raise DataError(
            f"--prior auto: {rows} inputs are too few to estimate the shares of classes",
            f"Give at least {MIN_ROWS} inputs, or a file of shares",
        )
    value = measure_separability(confusion)
    if value < MIN_SINGULAR_VALUE:
        raise DataError(
            "--prior auto: the model confuses classes so much that their shares cannot be "
            f"estimated (the least singular value of its confusion matrix is {value:.2g}, below "
            f"{MIN_SINGULAR_VALUE})",
            "Give a file of shares",
        )


def _read_shares(path: Path, names: list[str]) -> np.ndarray:
    """Return the shares of a file in the order of the classes, adding up to 1.

    Raises:
        RecipeError: naming what is wrong.
    """
    try:
        tree = read_json(path)
    except OSError as error:
        raise RecipeError(
            f"--prior {path}: {error.strerror}", "Give auto, or the path of a file of shares"
        ) from error
    except UnreadableJsonError as error:
        raise RecipeError(
            f"--prior {path} does not read as JSON",
            'Give auto, or a file such as {"a": 0.2, "b": 0.8}',
        ) from error
    fix = "Give every label a share, at least 0, and one above it"
    if not isinstance(tree, Mapping) or not all(
        isinstance(v, (int, float)) and 0 <= v <= MAX_SHARE for v in tree.values()
    ):
        raise RecipeError(f"--prior {path} is no mapping of labels to shares", fix)
    for name in tree:
        if name not in names:
            raise RecipeError(
                f"--prior {path}: no label {name!r}{suggest_closest(name, names)}", fix
            )
    missing = [name for name in names if name not in tree]
    if missing or sum(tree.values()) <= 0:
        raise RecipeError(
            f"--prior {path} gives {missing[0] if missing else 'no label'!r} no share", fix
        )
    shares = np.array([tree[name] for name in names], dtype=np.float64)
    return shares / shares.sum()
