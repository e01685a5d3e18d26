"""Check few-shot curves: fits and intervals where the truth is known, draws, and the command."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import bench_of, sentences
from scipy.optimize import curve_fit
from scipy.stats import norm
from sklearn.isotonic import isotonic_regression
from support.command import Hftl
from support.coverage import is_covered
from test_feature_store import forwards

from hftl.analysis.curve import CurveOptions, compute_curve
from hftl.analysis.curve_figures import (
    compare_labels,
    compute_area,
    extrapolate,
    find_crossing,
    make_monotone,
)
from hftl.analysis.estimates import draw_points
from hftl.analysis.facts import CurveAnalysis
from hftl.analysis.feature_store import FeatureStore
from hftl.analysis.power_law import fit_power_law
from hftl.analysis.probe import fit_probe
from hftl.analysis.tables import format_curve
from hftl.card.analysis_plots import plot_curve
from hftl.card.evidence import describe_curve
from hftl.config.recipe import Recipe
from hftl.finetune.baselines import solve_majority
from hftl.finetune.classical import solve_classical
from hftl.measure.statistics import mean_interval
from hftl.pipeline.analyses import find_curve_arm

pytestmark = pytest.mark.usefixtures("fast_reload", "fewer_folds")

__all__ = ["forwards"]
SIZES = np.array([5.0, 10.0, 20.0, 40.0, 80.0, 160.0])


def test_a_power_law_is_recovered_and_as_near_as_a_general_optimizer() -> None:
    errors = 0.9 * SIZES**-0.5 + 0.1
    fit = fit_power_law(SIZES, errors[None], np.ones(6))
    assert (fit.a[0], fit.b[0], fit.c[0]) == pytest.approx((0.9, 0.5, 0.1), rel=0.02)
    assert fit.predict(320)[0] == pytest.approx(0.9 * 320**-0.5 + 0.1, abs=1e-4)
    assert fit.solve(np.array([0.2]))[0] == pytest.approx(81, rel=0.02)
    assert fit.solve(np.array([0.05]))[0] == np.inf
    rng = np.random.default_rng(0)
    noisy = errors + rng.normal(0, 0.01, 6)
    weights = rng.uniform(0.5, 2, 6)

    def law(n: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
        return a * n**-b + c

    best, _ = curve_fit(law, SIZES, noisy, (0.5, 0.4, 0.1), weights**-0.5,
                        bounds=([0, 0.02, 0], [9, 2, 1]))  # fmt: skip
    fit = fit_power_law(SIZES, noisy[None], weights)
    losses = [weights @ (law(SIZES, *p) - noisy) ** 2
              for p in (best, (fit.a[0], fit.b[0], fit.c[0]))]  # fmt: skip
    assert losses[1] < losses[0] * 1.01
    flat = fit_power_law(SIZES, np.full((1, 6), 0.3), np.ones(6))
    assert flat.predict(1000)[0] == pytest.approx(0.3)
    rising = fit_power_law(SIZES, np.linspace(0.1, 0.3, 6)[None], np.ones(6))
    assert rising.a[0] == 0 and rising.predict(1000)[0] == pytest.approx(0.2)
    to_zero = fit_power_law(SIZES, (2 * SIZES**-1.0)[None], np.ones(6))
    assert to_zero.c[0] == pytest.approx(0, abs=1e-6)


def test_labels_are_compared_by_hand() -> None:
    own, other = np.array([0.6, 0.7, 0.8]), np.array([0.5, 0.6, 0.7])
    sizes = np.array([10.0, 20.0, 40.0])
    draws = [np.repeat(curve[None], 3, axis=0) for curve in (own, other)]
    ratios = compare_labels(sizes, own, other, *draws)
    assert [r.value for r in ratios] == [pytest.approx(2.0), pytest.approx(2.0), np.inf]
    assert ratios[2].low == np.inf
    assert find_crossing(sizes, own, other, *draws).value == np.inf
    later = np.array([0.5, 0.6, 0.9])
    crossing = find_crossing(sizes, own, later, draws[0], np.repeat(later[None], 3, axis=0))
    assert crossing.value == pytest.approx(20 * 2**0.5)
    assert find_crossing(sizes, own, own, draws[0], draws[0]).value == 10
    assert compute_area(sizes, own) == pytest.approx(0.7)
    assert not any(ratio.is_at_most for ratio in ratios) and not crossing.is_at_most
    (first, *_) = compare_labels(sizes, other, own, draws[1], draws[0])
    assert first.value == 1 and first.is_at_most, "its fewest labels are more than enough"
    assert find_crossing(sizes, other, own, draws[1], draws[0]).is_at_most
    # A curve that falls once is taken as monotone.
    uneven = np.array([0.5, 0.62, 0.60])
    (first, *_) = compare_labels(sizes, own, uneven, draws[0], np.repeat(uneven[None], 3, axis=0))
    assert first.value == pytest.approx(2 * 2 ** (-0.01 / 0.11), rel=0.01)


@pytest.mark.parametrize(
    ("curve", "first"),
    [
        ([0.1, 0.135, 0.51, 0.645, 0.945], [0, 1, 2, 3, 4]),
        ([0.5, 0.7, 0.7, 0.7, 0.8], [0, 1, 1, 1, 4]),
    ],
)
def test_equal_score_is_reached_where_the_other_curve_has_it(
    curve: list[float], first: list[int]
) -> None:
    sizes, points = np.array([5.0, 10.0, 20.0, 40.0, 80.0]), np.array(curve)
    draws = np.repeat(points[None], 3, axis=0)
    ratios = compare_labels(sizes, points, points, draws, draws)
    expected = sizes[first] / sizes
    for quantity in ("value", "low", "high"):
        values = [getattr(ratio, quantity) for ratio in ratios]
        assert values == pytest.approx(list(expected), rel=1e-6)
    assert not any(ratio.is_at_most for ratio in ratios)


def test_monotone_curves_are_those_of_scikit_learn() -> None:
    points = np.random.default_rng(0).normal(size=(50, 6)) + np.linspace(0, 2, 6)
    expected = np.stack([isotonic_regression(curve) for curve in points])
    np.testing.assert_allclose(make_monotone(points), expected, atol=1e-12)


def simulate_curves(
    rng: np.random.Generator, draws: int = 5, items: int = 400
) -> tuple[np.ndarray, np.ndarray]:
    """Return hits (2 curves x sizes, draws, items) and the true accuracies of two curves.

    A draw of labels is lucky at every size, for it is nested; an item is hard for all.
    """
    errors = np.stack([0.8 * SIZES**-0.4 + 0.1, 1.0 * SIZES**-0.3 + 0.1])
    errors = np.minimum(errors, 0.49)
    hardness = rng.normal(size=items)
    luck = rng.normal(0, 0.15, (draws, 1, 1)) / np.sqrt(SIZES[:, None] / 5)
    noise = rng.normal(size=(2, draws, len(SIZES), items))
    spread = np.sqrt(2 + (0.15 / np.sqrt(SIZES / 5)) ** 2)
    threshold = norm.ppf(1 - errors) * spread
    hits = hardness + noise + luck < threshold[:, None, :, None]
    return hits.swapaxes(1, 2).reshape(-1, draws, items).astype(float), 1 - errors


def cover_truth(trials: int, draws: int = 1000) -> dict[str, float]:
    """Return how often intervals of points, ratios and forecasts hold the truth."""
    covered: dict[str, list[bool]] = {name: [] for name in ("point", "ratio", "forecast", "held")}
    for seed in range(10**6, 10**6 + trials):
        hits, truth = simulate_curves(np.random.default_rng(seed))
        points = hits.mean((1, 2))
        for value, values in zip(truth.ravel(), hits, strict=True):
            low, high = mean_interval(values) or (1.0, 0.0)
            covered["point"].append(low <= value <= high)
        drawn = draw_points(hits, points, draws=draws, seed=seed)
        own, other = points.reshape(2, -1)
        pairs = drawn.reshape(draws, 2, -1)
        ratios = compare_labels(SIZES, own, other, pairs[:, 0], pairs[:, 1])
        expected = compare_labels(SIZES, *truth, truth[:1], truth[1:])
        covered["ratio"] += [
            ratio.low <= right.value <= ratio.high
            for ratio, right in zip(ratios, expected, strict=True)
            if np.isfinite(right.value)
        ]
        fit = extrapolate(SIZES, own, pairs[:, 0], 1.0, 0.01)
        assert fit is not None
        ahead = 1 - (0.8 * 320**-0.4 + 0.1)
        covered["forecast"].append(fit.predicted.low <= ahead <= fit.predicted.high)
        covered["held"].append(fit.held_out.low <= truth[0, -1] <= fit.held_out.high)
    return {name: float(np.mean(hits)) for name, hits in covered.items()}


def test_intervals_hold_the_truth() -> None:
    covered = cover_truth(10, 200)
    assert min(covered.values()) > 0.8, covered


@pytest.mark.slow
def test_intervals_hold_the_truth_in_1000() -> None:
    covered = cover_truth(1000)
    assert is_covered(covered["point"]) and is_covered(covered["ratio"]), covered
    assert covered["forecast"] >= 0.93, covered


def test_few_sizes_have_no_forecast() -> None:
    assert extrapolate(SIZES[:3], np.ones(3), np.ones((9, 3)), 1.0, 0.01) is None
    assert extrapolate(SIZES, np.ones(6), np.ones((9, 6)), np.inf, 0.01) is None


@pytest.fixture
def recipe(recipe_tree: dict[str, Any]) -> Recipe:
    recipe_tree["measure"]["arms"] = [{"full": {"finetune.training.num_train_epochs": 1}}]
    return Recipe.parse(recipe_tree)


def test_points_are_those_of_the_arms_on_nested_draws(recipe: Recipe, tmp_path: Path) -> None:
    context = bench_of(recipe)
    store = FeatureStore(context, tmp_path / "features")
    options = CurveOptions((4, 8), 2, ("head", "classical", "full"))
    facts = compute_curve(recipe, context, store, options, partial(find_curve_arm, recipe, store))
    assert [arm.arm for arm in facts.arms] == ["head", "classical", "full"]
    test = context.prepared.rows["test"]
    labels = context.prepared.encode_for_metrics(test)
    for place, size in enumerate((4, 8)):
        scores: dict[str, list[float]] = {"head": [], "classical": []}
        for seed in (0, 1):
            rows = context.prepared.draw_train_rows(size, seed)
            assert {r.index for r in context.prepared.draw_train_rows(4, seed)} <= {
                r.index for r in rows
            }
            features = [context.extract_features("mean", 0, part) for part in (rows, test)]
            probe = fit_probe(features[0], context.prepared.encode_targets(rows), 2, None)
            logits = {"head": probe.logits(features[1])}
            changed = bench_of(recipe.model_copy(
                update={"data": recipe.data.model_copy(update={"shots": size})}
            ))  # fmt: skip
            logits["classical"] = solve_classical(changed, seed).logits["test"]
            for name, values in logits.items():
                scores[name].append(
                    np.mean(context.prepared.decode_for_metrics(test, values) == labels)
                )
        for number, name in enumerate(scores):
            point = facts.arms[number].points[place]
            assert point.labels == size
            assert point.score.value == pytest.approx(np.mean(scores[name])), (name, size)
    assert [one.baseline for one in facts.labels] == ["classical", "full"]
    assert facts.arms[0].forecast is None


def test_rows_of_one_unit_give_no_interval(recipe: Recipe, tmp_path: Path) -> None:
    context = bench_of(recipe)
    rows = context.prepared.rows
    one = {**rows, "test": [replace(row, group="a") for row in rows["test"]]}
    context = replace(context, prepared=replace(context.prepared, rows=one))
    store = FeatureStore(context, tmp_path / "features")
    options = CurveOptions((3, 5, 8, 12), 2)
    facts = compute_curve(recipe, context, store, options, partial(find_curve_arm, recipe, store))
    forecast = facts.arms[0].forecast
    assert forecast is not None and forecast.predicted.ci95 is None
    assert forecast.held_out_covered is None and facts.labels[0].catches_up.ci95 is None
    assert "by its curve's shape" in format_curve(facts) and describe_curve(facts)
    plot_curve(facts, tmp_path / "curve.png")


def test_a_solved_arm_is_solved_and_not_trained(recipe_tree: dict[str, Any]) -> None:
    recipe_tree["measure"]["arms"] = ["majority"]
    recipe = Recipe.parse(recipe_tree)
    context = bench_of(recipe)
    predict = find_curve_arm(recipe, FeatureStore(context, Path("unread")), "majority", context)
    expected = solve_majority(context, 0).logits["test"]
    assert predict(context, 0).tolist() == expected.tolist()


def read(run: Path) -> CurveAnalysis:
    return CurveAnalysis.model_validate_json((run / "analysis" / "curve.json").read_text())


def test_curve_command(hftl: Hftl, recipe_file: Path, tmp_path: Path, forwards: list[int]) -> None:
    run = tmp_path / "out"
    outcome = hftl("curve", recipe_file, "--draws", 2, "--output", run)
    assert outcome.code == 0, outcome.err
    facts = read(run)
    assert facts.sizes == [5, 10, 20, 40] and facts.draws == 2 and facts.per_class
    assert "labels a class" in outcome.out and "labels classical needs" in outcome.out
    assert all(arm.forecast is not None for arm in facts.arms)
    assert (run / "analysis" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    passes = len(forwards)
    more = hftl("curve", recipe_file, "--draws", 3, "--sizes", "3,9", "--output", run)
    assert more.code == 0 and len(forwards) == passes, "other sizes and more draws make no pass"
    assert read(run).sizes == [3, 9] and read(run).draws == 3


def test_curve_of_targets_counts_labels_in_all(
    hftl: Hftl, recipe_tree: dict[str, Any], tmp_path: Path
) -> None:
    lines = [json.dumps({"text": t, "label": float(len(t))}) for t, _ in sentences(160)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    recipe_tree["data"] |= {"task": "regression", "train": {"path": str(tmp_path / "t.jsonl")}}
    recipe_tree["measure"]["metric"] = "rmse"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe_tree))
    words = ["curve", tmp_path / "r.yaml", "--draws", 2, "--sizes", "10,20,40,80"]
    outcome = hftl(*words, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    facts = read(tmp_path / "out")
    assert not facts.per_class and facts.lower_is_better
    forecast = facts.arms[0].forecast
    assert forecast is not None and forecast.predicted.value > 0
    assert forecast.predicted.ci95 is not None
    assert forecast.predicted.ci95[0] <= forecast.predicted.value <= forecast.predicted.ci95[1]


def test_curve_refuses_what_cannot_be_drawn(hftl: Hftl, recipe_file: Path, tmp_path: Path) -> None:
    run = ["--output", tmp_path / "out"]
    hftl("curve", recipe_file, "--sizes", "5,5000", *run).assert_error(
        3, "the class 'negative' has 48 rows left", "fewer than --sizes 5000", "smaller --sizes"
    )
    hftl("curve", recipe_file, "--sizes", "5", *run).assert_error(2, "no curve")
    hftl("curve", recipe_file, "--sizes", "a,b", *run).assert_error(2, "no list of numbers")
    hftl("curve", recipe_file, "--arms", "clasical", *run).assert_error(2, "clasical", "classical")
