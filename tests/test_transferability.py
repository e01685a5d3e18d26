"""Compare every transferability score with a brute force that shares no code with it."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KNeighborsClassifier

from hftl.analysis import transferability as module
from hftl.analysis.nearest import predict_by_neighbours, predict_left_out
from hftl.analysis.transferability import (
    CentredFeatures,
    apply_head,
    compute_cluster_probabilities,
    compute_gbc,
    compute_h_score,
    compute_leep,
    compute_logme,
    compute_nce,
    compute_transrate,
)


def draw(rows: int, width: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    centres = rng.normal(size=(classes, width))
    return rng.normal(size=(rows, width)) + 0.7 * centres[labels], labels


def centre(features: np.ndarray) -> CentredFeatures:
    return CentredFeatures.compute(features)


def maximize_gaussian_process(features: np.ndarray, target: np.ndarray) -> float:
    """Return the largest log density of the targets under the process's dense covariance."""
    rows = len(features)

    def negative(logs: np.ndarray) -> float:
        alpha, beta = np.exp(np.clip(logs, -40, 40))
        covariance = features @ features.T / alpha + np.eye(rows) / beta
        return -multivariate_normal(np.zeros(rows), covariance, allow_singular=True).logpdf(target)

    starts = [(-2.0, 2.0), (2.0, -1.0), (8.0, 2.0)]
    options = {"xatol": 1e-8, "fatol": 1e-10, "maxiter": 4000}
    fits = [minimize(negative, s, method="Nelder-Mead", options=options) for s in starts]
    return -min(fit.fun for fit in fits) / rows


@pytest.mark.parametrize(
    ("rows", "width"), [(60, 8), (30, 80), (40, 40), pytest.param(100, 384, marks=pytest.mark.slow)]
)
def test_logme_is_the_marginal_likelihood_of_a_gaussian_process(rows: int, width: int) -> None:
    features, labels = draw(rows, width, 2)
    columns = np.eye(2)[labels]
    expected = np.mean([maximize_gaussian_process(features, c) for c in columns.T])
    assert compute_logme(features, columns) == pytest.approx(expected, abs=1e-6)
    values = features[:, 0] + np.random.default_rng(1).normal(size=rows)
    expected = maximize_gaussian_process(features, values)
    assert compute_logme(features, values) == pytest.approx(expected, abs=1e-6)


def test_logme_of_noise_wider_than_its_rows_is_that_of_no_signal() -> None:
    """The public code is at +5 here: its log |A| lacks 284 zero singular values."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(100, 384)), rng.integers(0, 2, 100)
    second_moments = [(labels == c).mean() for c in (0, 1)]
    nothing = np.mean([-(math.log(2 * math.pi * m) + 1) / 2 for m in second_moments])
    value = compute_logme(features, np.eye(2)[labels])
    assert nothing <= value < nothing + 0.02
    assert value == pytest.approx(-1.0683332, abs=1e-6)


def test_logme_grows_with_the_signal_and_not_with_the_width() -> None:
    scores = []
    for strength in (0.0, 0.3, 1.0):
        rng = np.random.default_rng(2)
        labels = np.arange(200) % 2
        features = rng.normal(size=(200, 300))
        features[:, 0] += 4 * strength * labels
        scores.append(compute_logme(features, np.eye(2)[labels]))
    assert scores[0] < scores[1] < scores[2]


@pytest.mark.parametrize(("rows", "width"), [(90, 5), (40, 60)])
def test_h_score_is_the_trace_of_two_covariances(rows: int, width: int) -> None:
    features, labels = draw(rows, width, 3)
    fitted = LedoitWolf().fit(features)
    means = np.stack([features[labels == c].mean(0) for c in labels])
    between = np.cov(means.T, bias=True) * (1 - fitted.shrinkage_)
    expected = np.trace(np.linalg.inv(fitted.covariance_) @ between)
    assert compute_h_score(centre(features), labels) == pytest.approx(expected, rel=1e-6)


def test_h_score_without_shrinkage_says_nothing_of_wide_features() -> None:
    """It is the number of classes less one for any of them, and with shrinkage near 0 for noise."""
    features = np.random.default_rng(0).normal(size=(40, 60))
    labels = np.arange(40) % 3
    centred = features - features.mean(0)
    means = np.stack([centred[labels == c].mean(0) for c in labels])
    plain = np.trace(np.linalg.pinv(np.cov(centred.T)) @ np.cov(means.T))
    assert plain == pytest.approx(2.0)
    assert compute_h_score(centre(features), labels) < 0.5


def test_leep_and_nce_are_sums_over_rows_and_classes() -> None:
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 3, 50), rng.dirichlet(np.ones(4), 50)
    total = 0.0
    for x in range(50):
        inside = 0.0
        for z in range(4):
            joint = sum(probabilities[i, z] for i in range(50) if labels[i] == labels[x]) / 50
            marginal = sum(probabilities[i, z] for i in range(50)) / 50
            inside += joint / marginal * probabilities[x, z]
        total += math.log(inside) / 50
    assert compute_leep(probabilities, labels) == pytest.approx(total, abs=1e-12)
    source = probabilities.argmax(1)
    entropy = 0.0
    for x in range(50):
        same = [labels[i] for i in range(50) if source[i] == source[x]]
        entropy -= math.log(same.count(labels[x]) / len(same)) / 50
    assert compute_nce(source, labels) == pytest.approx(-entropy, abs=1e-12)
    hard = np.eye(4)[source]
    assert compute_leep(hard, labels) == pytest.approx(compute_nce(source, labels), abs=1e-12)
    assert compute_nce(labels, labels) == pytest.approx(0.0)


def test_nleep_is_leep_of_a_mixture_of_principal_components() -> None:
    features, labels = draw(120, 30, 2)
    wide = PCA(svd_solver="full").fit(features)
    count = int(np.searchsorted(np.cumsum(wide.explained_variance_ratio_), 0.8)) + 1
    reduced = wide.transform(features)[:, :count]
    mixture = GaussianMixture(10, covariance_type="diag", reg_covar=1e-4, random_state=0)
    mixture.fit(reduced)
    joint = np.stack([
        np.log(weight) + multivariate_normal(mean, np.diag(variance)).logpdf(reduced)
        for weight, mean, variance in zip(
            mixture.weights_, mixture.means_, mixture.covariances_, strict=True
        )
    ], 1)  # fmt: skip
    posteriors = np.exp(joint - np.logaddexp.reduce(joint, 1, keepdims=True))
    own = compute_cluster_probabilities(centre(features), 2)
    np.testing.assert_allclose(own, posteriors, atol=1e-6)


def test_clusters_separate_what_lies_apart() -> None:
    features, labels = draw(300, 20, 2)
    apart = features + 20 * labels[:, None]
    posteriors = compute_cluster_probabilities(centre(apart), 2)
    assert posteriors.shape == (300, 10) and np.allclose(posteriors.sum(1), 1)
    assert compute_leep(posteriors, labels) > -1e-6
    noise = np.random.default_rng(3).normal(size=features.shape)
    assert compute_leep(compute_cluster_probabilities(centre(noise), 2), labels) < -0.5


def coding_rate(features: np.ndarray) -> float:
    matrix = np.eye(features.shape[1]) + features.T @ features / (len(features) * 1e-4)
    return float(np.linalg.slogdet(matrix)[1] / 2)


def test_transrate_in_both_weightings() -> None:
    features, labels = draw(60, 7, 2)
    labels[:50] = 0
    labels[50:] = 1
    centred = features - features.mean(0)
    scaled = centred / np.sqrt(np.mean(np.linalg.norm(centred, axis=1) ** 2))
    inside = [coding_rate(scaled[labels == c]) for c in (0, 1)]
    by_rows = coding_rate(scaled) - (50 * inside[0] + 10 * inside[1]) / 60
    by_class = coding_rate(scaled) - sum(inside) / 2
    expected = pytest.approx((by_rows, by_class), rel=1e-9)
    assert compute_transrate(centre(features), labels) == expected
    assert abs(by_rows - by_class) > 0.01
    assert compute_transrate(centre(9 * features), labels) == expected


@pytest.mark.parametrize("spherical", [True, False])
def test_gbc_is_the_overlap_of_the_classes_gaussians(spherical: bool) -> None:
    features, labels = draw(80, 3, 3)
    values, vectors = np.linalg.eigh(np.cov(features.T))
    rotated = (features - features.mean(0)) @ vectors[:, np.argsort(-values)]
    expected = 0.0
    for i in range(3):
        for j in range(3):
            if i != j:
                means = [rotated[labels == c].mean(0) for c in (i, j)]
                spreads = [np.diag(rotated[labels == c].var(0)) for c in (i, j)]
                if spherical:
                    spreads = [np.eye(3) * np.trace(s) / 3 for s in spreads]
                middle, gap = sum(spreads) / 2, means[0] - means[1]
                dets = [np.linalg.det(s) for s in (middle, *spreads)]
                distance = gap @ np.linalg.inv(middle) @ gap / 8
                distance += math.log(dets[0] / math.sqrt(dets[1] * dets[2])) / 2
                expected -= math.exp(-distance)
    assert compute_gbc(centre(features), labels, spherical) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(90, 12), (30, 50)])
def test_principal_components_are_those_of_scikit_learn(shape: tuple[int, int]) -> None:
    features = np.random.default_rng(0).normal(size=shape) * np.geomspace(5, 0.1, shape[1])
    reduced, reference = centre(features).reduce(7), PCA(7, svd_solver="full").fit(features)
    np.testing.assert_allclose(abs(reduced), abs(reference.transform(features)), atol=1e-8)
    held = np.cumsum(reference.explained_variance_ratio_)
    assert centre(features).reduce(7, 0.6).shape[1] == int(np.searchsorted(held, 0.6)) + 1
    alike = centre(np.ones(shape, dtype=np.float32))
    assert not alike.reduce(7).any() and compute_h_score(alike, np.arange(shape[0]) % 2) == 0
    assert compute_transrate(alike, np.arange(shape[0]) % 2) == (0, 0)


def test_apply_head_is_the_softmax_of_the_layer() -> None:
    features = np.array([[1.0, 2.0], [0.0, -800.0]], dtype=np.float32)
    weight, bias = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0.0, 1.0])
    probabilities = apply_head(features, weight, bias)
    assert probabilities[0] == pytest.approx([1 / (1 + math.e**2), 1 - 1 / (1 + math.e**2)])
    assert probabilities[1] == pytest.approx([1.0, 0.0])


def test_neighbours_are_those_of_scikit_learn() -> None:
    features, labels = draw(90, 6, 3)
    queries = features[60:]
    reference = KNeighborsClassifier(
        20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07), algorithm="brute"
    ).fit(features[:60], labels[:60])
    predicted = predict_by_neighbours(features[:60], np.eye(3)[labels[:60]], queries)
    np.testing.assert_allclose(predicted, reference.predict_proba(queries), atol=1e-9)


def test_a_row_is_not_predicted_from_its_own_group() -> None:
    features, labels = draw(40, 6, 2)
    groups = np.repeat(np.arange(20), 2)
    columns = np.eye(2)[labels]
    left_out = predict_left_out(features, columns, groups, k=5)
    for row in (0, 17):
        others = groups != groups[row]
        alone = predict_by_neighbours(features[others], columns[others], features[[row]], k=5)
        np.testing.assert_allclose(left_out[[row]], alone, atol=1e-12)
    assert module.PCA_WIDTH == 64
