"""Read the class weights of a user's trainer: by name or in order, or by its rows' frequencies."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from hftl.data.class_weights import ClassWeights, check_class_weight, compute_class_weights
from hftl.errors import RecipeError
from hftl.models.model_parts import unwrap_adapter
from hftl.train.weighted_loss import LossWeighting

LABEL_COLUMNS = ("labels", "label")
"""Columns of a dataset that collators of transformers read labels from."""


def build_weighting(
    class_weight: Any, focal_gamma: float, dataset: Any, model: nn.Module
) -> LossWeighting | None:
    """Return how a trainer weighs elements; None where every element counts the same.

    Args:
        class_weight: `balanced`, a weight by label or class id, a weight for each class in order,
            or `ClassWeights`; None: all weigh the same.
        focal_gamma: exponent of focal loss; 0: none.
        dataset: training rows, whose labels `balanced` counts.
        model: whose config names the classes.

    Raises:
        RecipeError: naming the argument and the class.
    """
    check_focal_gamma(focal_gamma)
    if class_weight is None:
        return LossWeighting(None, None, focal_gamma) if focal_gamma else None
    if not isinstance(class_weight, ClassWeights):
        class_weight = _read_class_weight(class_weight, dataset, model)
    positive, negative = (
        None if weights is None else torch.tensor(weights, dtype=torch.float32)
        for weights in (class_weight.positive, class_weight.negative)
    )
    return LossWeighting(positive, negative, focal_gamma)


def check_focal_gamma(gamma: float) -> None:
    """Refuse an exponent below 0 or not finite.

    Raises:
        RecipeError: naming the argument.
    """
    if not 0 <= gamma < float("inf"):
        raise RecipeError(
            f"focal_gamma={gamma}, expected a number of at least 0", "The paper's choice is 2"
        )


def _read_class_weight(class_weight: Any, dataset: Any, model: nn.Module) -> ClassWeights:
    """Return the weights of a user's argument, by the model's own names of its classes."""
    config: Any = getattr(unwrap_adapter(model), "config", None)
    id2label = getattr(config, "id2label", None) or {}
    several = getattr(config, "problem_type", None) == "multi_label_classification"
    names = [str(id2label[i]) for i in sorted(id2label)]
    if isinstance(class_weight, str):
        if class_weight != "balanced":
            raise RecipeError(
                f"class_weight={class_weight!r} is not known",
                "Use 'balanced', or a weight for each class",
            )
        targets = _collect_labels(dataset)
        classes = targets.shape[1] if targets.ndim == 2 else int(targets.max(initial=0)) + 1
        names += [f"class {i}" for i in range(len(names), classes)]
        weights = compute_class_weights("balanced", targets, names)
        assert weights is not None
        return weights
    if isinstance(class_weight, Mapping):
        if not names:
            raise RecipeError(
                "class_weight names classes, and the model's config has no id2label",
                "Give a weight for each class, in order",
            )
        by_name = {
            names[key] if isinstance(key, int) and 0 <= key < len(names) else str(key): value
            for key, value in class_weight.items()
        }
        check_class_weight(by_name, names, "class_weight")
        values = [by_name.get(name, 1.0) for name in names]
    else:
        values = list(class_weight)
    if names and len(values) != len(names):
        raise RecipeError(
            f"class_weight holds {len(values)} weights, and the model has {len(names)} classes",
            "Give a weight for each class",
        )
    positive = np.array(values, dtype=np.float64)
    if not (np.isfinite(positive).all() and (positive >= 0).all() and positive.any()):
        raise RecipeError(
            f"class_weight={positive.tolist()}, expected finite weights of at least 0, and one "
            "above it",
            "Correct it",
        )
    return ClassWeights(positive, np.ones(len(positive)) if several else None)


def _collect_labels(dataset: Any) -> np.ndarray:
    """Return the labels of a dataset: (elements,) class ids, or (rows, classes) floats.

    Raises:
        RecipeError: where the rows cannot be counted, or have no labels of classes.
    """
    if dataset is None or not hasattr(dataset, "__len__"):
        raise RecipeError(
            "class_weight='balanced' counts the labels of train_dataset, which has no length",
            "Give the weights themselves",
        )
    rows: Sequence[Any] = dataset
    if columns := getattr(dataset, "column_names", None):
        column = next((name for name in LABEL_COLUMNS if name in columns), None)
        values = [] if column is None else list(dataset[column])
    else:
        row = rows[0] if len(rows) else {}
        column = next((name for name in LABEL_COLUMNS if name in row), None)
        values = [] if column is None else [rows[i][column] for i in range(len(rows))]
    if not values:
        raise RecipeError(
            "class_weight='balanced' counts the labels of train_dataset, whose rows have none",
            "Name their labels `labels`, or give the weights themselves",
        )
    arrays = [np.asarray(value) for value in values]
    if np.issubdtype(arrays[0].dtype, np.floating) and arrays[0].ndim:
        return np.stack(arrays)
    flat = np.concatenate([array.reshape(-1) for array in arrays])
    if np.issubdtype(flat.dtype, np.floating):
        raise RecipeError("class_weight weighs classes, and the labels are numbers", "Remove it")
    return flat[flat >= 0]
