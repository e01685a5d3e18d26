"""Say whether test and unlabelled inputs are as train: shares of classes, and inputs themselves.

Label shift is other shares of classes with the same inputs in each of them, and can be corrected;
covariate shift is other inputs, and cannot. Train is compared with each set as it is, and again
with its classes drawn in the other set's shares: what differs still is not label shift.
"""

from pathlib import Path

import numpy as np
from scipy.special import softmax

from hftl.analysis.distance import compute_mmd
from hftl.analysis.domains import (
    Domain,
    collect_domains,
    name_groups,
    refuse_too_few,
    refuse_words,
)
from hftl.analysis.facts import (
    ClassShare,
    Estimate,
    Interval,
    SetShift,
    ShiftAnalysis,
    ShiftOutcome,
    SiteFacts,
)
from hftl.analysis.feature_store import describe_provenance
from hftl.analysis.out_of_fold import predict_out_of_fold
from hftl.analysis.probe import fit_probe
from hftl.analysis.row_faults import compare_shares, compute_worth
from hftl.analysis.two_sample import compare_by_classifier
from hftl.config.recipe import Recipe
from hftl.errors import RecipeError
from hftl.finetune.context import ExperimentContext
from hftl.measure.calibration import fit_temperature
from hftl.measure.shift import (
    MIN_SINGULAR_VALUE,
    ShareEstimate,
    estimate_bbse,
    estimate_by_counts,
    estimate_rlls,
    estimate_shares,
    measure_separability,
)

LEVEL = 0.01
"""Significance of each test; several sets and tests are looked at."""
MIN_MATCHED = 40
"""Rows of train in another set's shares from which on they are compared with it."""


class TrainClasses:
    """Predict classes by a probe of train's rows, and hold what it confuses out of fold."""

    def __init__(self, train: Domain, context: ExperimentContext) -> None:
        self.labels = context.prepared.encode_targets(train.rows)
        self.names = context.prepared.names
        self.worth = compute_worth(train.rows)
        groups = context.group_outputs(train.rows)
        outputs = len(self.names)
        logits = predict_out_of_fold(train.features, self.labels, outputs, groups)
        self.predicted = np.bincount(logits.argmax(1), minlength=outputs)
        self.confusion = np.zeros((outputs, outputs))
        np.add.at(self.confusion, (self.labels, logits.argmax(1)), 1)
        self._temperature = fit_temperature(logits, self.labels) or 1.0
        self._probe = fit_probe(train.features, self.labels, outputs, groups)

    @property
    def shares(self) -> np.ndarray:
        """Return the shares of the classes in train, (classes,)."""
        return self.confusion.sum(1) / self.confusion.sum()

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities, (rows, classes)."""
        return softmax(self._probe.logits(features) / self._temperature, axis=1)

    def estimate(self, probabilities: np.ndarray) -> ShareEstimate | None:
        """Return the shares of unlabelled rows; None where predictions do not determine them."""
        if not self.shares.all() or measure_separability(self.confusion) < MIN_SINGULAR_VALUE:
            return None
        return estimate_shares(self.confusion, probabilities)


def compare_sets(
    recipe: Recipe, context: ExperimentContext, root: Path, most_rows: int
) -> ShiftAnalysis:
    """Compare test and the unlabelled inputs with train on the features that the head reads.

    Args:
        recipe: its data and pooling.
        context: source and rows.
        root: where features are stored.
        most_rows: of each set, at most.

    Raises:
        DataError: if a table cannot be read, or train or all others have too few rows.
        RecipeError: if the task has a label a word, or train is the only set.
    """
    refuse_words(context, "shift compares")
    own_data = recipe.data.model_copy(update={"general": None})
    own_recipe = recipe.model_copy(update={"data": own_data})
    domains, left_out, site, _ = collect_domains(own_recipe, context, root, [], most_rows)
    is_train_there = bool(domains) and domains[0].name == "train"
    refuse_too_few(left_out, len(domains) if is_train_there else 0)
    if site is None or len(domains) < 2:
        raise RecipeError("train is the only set of rows", "Give data.unlabeled")
    train, *others = domains
    classes = TrainClasses(train, context) if context.prepared.task == "classification" else None
    return ShiftAnalysis(
        source=context.source.name,
        site=SiteFacts(layer=site.layer, pooling=site.pooling),
        train_rows=len(train.rows),
        separability=None if classes is None else measure_separability(classes.confusion),
        sets=[_compare(train, other, classes, context) for other in others],
        left_out=left_out,
        provenance=describe_provenance(context, recipe.finetune.pooling, []),
    )


def _compare(
    train: Domain, other: Domain, classes: TrainClasses | None, context: ExperimentContext
) -> SetShift:
    """Compare one set with train: the shares of its classes, and its inputs."""
    groups = name_groups(train.rows, other.rows)
    whole = compare_by_classifier(train.features, other.features, groups)
    count = min(len(train.rows), len(other.rows))
    mmd_groups = name_groups(train.rows[:count], other.rows[:count])
    mmd = compute_mmd(train.features[:count], other.features[:count], groups=mmd_groups)
    shares: list[ClassShare] = []
    label_p_value = matched_p_value = None
    if classes is not None:
        label_p_value, estimate, shares = _compare_classes(other, classes, context)
        if estimate is not None:
            matched_p_value = _compare_matched(train, other, classes.labels, estimate.shares)
    return SetShift(
        name=other.name,
        rows=len(other.rows),
        shares=shares,
        label_p_value=label_p_value,
        mmd=Estimate(value=mmd.distance.value, ci95=(mmd.distance.low, mmd.distance.high)),
        mmd_p_value=mmd.p_value,
        auc=whole.auc,
        auc_p_value=whole.p_value,
        matched_p_value=matched_p_value,
        outcome=decide_outcome(label_p_value, whole.p_value, matched_p_value),
    )


def decide_outcome(
    label_p_value: float | None, input_p_value: float, matched_p_value: float | None
) -> ShiftOutcome:
    """Return what differs, by the p-values of the classes, of the inputs, and of the inputs once
    the classes have the same shares.

    Other shares alone make other inputs, so that without the last p-value a difference of the
    classes is label shift, and whether more differs is not known.
    """
    if label_p_value is not None and label_p_value < LEVEL:
        is_both = matched_p_value is not None and matched_p_value < LEVEL
        return "both" if is_both else "label shift"
    other_inputs = (input_p_value if matched_p_value is None else matched_p_value) < LEVEL
    return "covariate shift" if other_inputs else "none"


def _compare_classes(
    other: Domain, classes: TrainClasses, context: ExperimentContext
) -> tuple[float, ShareEstimate | None, list[ClassShare]]:
    """Return the p-value of equal predicted classes (BBSDh of Rabanser et al. 2019,
    arXiv:1810.11953), the estimated shares, and all shares by class."""
    probabilities = classes.predict(other.features)
    predicted = np.bincount(probabilities.argmax(1), minlength=len(classes.names))
    estimate = classes.estimate(probabilities)
    bbse = rlls = None
    if estimate is not None:
        bbse = estimate_by_counts(estimate_bbse, classes.confusion, predicted)
        rlls = estimate_by_counts(estimate_rlls, classes.confusion, predicted)
    labelled = None
    if other.name == "test":
        targets = context.prepared.encode_targets(other.rows)
        labelled = np.bincount(targets, minlength=len(classes.names)) / len(targets)
    shares = [
        ClassShare(
            label=name,
            train=float(classes.shares[i]),
            estimated=estimate
            and Estimate(value=float(estimate.shares[i]), ci95=_get_interval(estimate, i)),
            bbse=bbse and float(bbse.shares[i]),
            bbse_ci95=bbse and _get_interval(bbse, i),
            rlls=rlls and float(rlls.shares[i]),
            rlls_ci95=rlls and _get_interval(rlls, i),
            labelled=None if labelled is None else float(labelled[i]),
        )
        for i, name in enumerate(classes.names)
    ]
    p_value = compare_shares(classes.predicted, predicted, classes.worth, compute_worth(other.rows))
    return p_value, estimate, shares


def _get_interval(estimate: ShareEstimate, number: int) -> Interval:
    low, high = estimate.interval[number]
    return float(low), float(high)


def _compare_matched(
    train: Domain, other: Domain, labels: np.ndarray, shares: np.ndarray
) -> float | None:
    """Return the p-value of equal inputs where train's classes have the other set's shares."""
    picked = match_shares(labels, shares)
    if len(picked) < MIN_MATCHED:
        return None
    rows = [train.rows[i] for i in picked]
    groups = name_groups(rows, other.rows)
    return compare_by_classifier(train.features[picked], other.features, groups).p_value


def match_shares(labels: np.ndarray, shares: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the positions of as many rows as can be drawn with these shares of classes."""
    counts = np.bincount(labels, minlength=len(shares))
    needed = shares > 0
    total = float((counts[needed] / shares[needed]).min())
    rng = np.random.default_rng(seed)
    parts = [
        rng.permutation(np.flatnonzero(labels == i))[: int(share * total + 1e-9)]
        for i, share in enumerate(shares)
    ]
    return np.sort(np.concatenate(parts))
