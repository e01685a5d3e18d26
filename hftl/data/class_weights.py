"""Weigh classes against imbalance: by the frequencies of the training rows, or by the recipe.

`balanced` is scikit-learn's n / (classes * count) (King & Zeng 2001,
doi:10.1093/oxfordjournals.pan.a004868): every class weighs the same in sum, and an element 1 on
average. Of several labels a row, each label's positives and negatives are two such classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hftl.config.finetune import ClassWeight
from hftl.data.labels import check_label_keys
from hftl.errors import RecipeError
from hftl.train.facts import ClassWeightFacts, TrainingFacts


@dataclass(frozen=True)
class ClassWeights:
    """Hold the weight of each class, (classes,) float64.

    With several labels a row, `positive` weighs the rows that have a label and `negative` those
    that have it not; else `negative` is None.
    """

    positive: np.ndarray
    negative: np.ndarray | None = None

    def weigh(self, targets: np.ndarray) -> np.ndarray:
        """Return the weight of every element: of (rows,) class ids, or (rows, classes) of 0, 1."""
        if self.negative is None:
            return self.positive[targets]
        return np.where(targets > 0, self.positive, self.negative)


def check_class_weight(class_weight: ClassWeight, names: Sequence[str], key: str) -> None:
    """Refuse weights of classes that do not exist, and weights that leave no class.

    Args:
        class_weight: as in the recipe.
        names: the task's classes.
        key: of the recipe, or the argument, for the message.

    Raises:
        RecipeError: naming the class.
    """
    if not isinstance(class_weight, Mapping):
        return
    check_label_keys(class_weight, names, key)
    if not any(class_weight.get(name, 1.0) for name in names):
        raise RecipeError(f"{key}: every class weighs 0", "Give one a weight above 0")


def compute_class_weights(
    class_weight: ClassWeight, targets: np.ndarray, names: Sequence[str]
) -> ClassWeights | None:
    """Return the weight of each class; None where all weigh the same.

    A class without rows weighs 1: it has no frequency.

    Args:
        class_weight: as in the recipe, its names checked.
        targets: of the training rows: (elements,) class ids, or (rows, classes) of 0 and 1.
        names: the classes in the order of their ids.
    """
    if class_weight is None:
        return None
    several = targets.ndim == 2
    if class_weight == "balanced":
        counts = count_classes(targets, len(names))
        if not several:
            return ClassWeights(_balance(counts[None])[0])
        pairs = _balance(np.stack([counts, len(targets) - counts], axis=1))
        return ClassWeights(pairs[:, 0], pairs[:, 1])
    weights = np.array([float(class_weight.get(name, 1.0)) for name in names])
    return ClassWeights(weights, np.ones(len(names)) if several else None)


def describe_class_weights(
    class_weight: ClassWeight, targets: np.ndarray, names: Sequence[str]
) -> TrainingFacts:
    """Return the weights of `compute_class_weights` as facts, none where all weigh the same."""
    weights = compute_class_weights(class_weight, targets, names)
    if weights is None:
        return TrainingFacts()

    def by_name(values: np.ndarray) -> dict[str, Any]:
        return dict(zip(names, values.tolist(), strict=True))

    facts = ClassWeightFacts(
        weights=by_name(weights.positive),
        negative=None if weights.negative is None else by_name(weights.negative),
        counts=by_name(count_classes(targets, len(names))),
    )
    return TrainingFacts(class_weights=facts)


def count_classes(targets: np.ndarray, classes: int) -> np.ndarray:
    """Return the number of elements of each class: (classes,) int64."""
    if targets.ndim == 2:
        return (targets > 0).sum(0)
    return np.bincount(targets, minlength=classes)


def _balance(counts: np.ndarray) -> np.ndarray:
    """Return n / (present classes * count), and 1 for absent ones; (problems, classes) both."""
    present = counts > 0
    share = counts.sum(1, keepdims=True) / np.maximum(present.sum(1, keepdims=True), 1)
    return np.where(present, share / np.maximum(counts, 1), 1.0)
