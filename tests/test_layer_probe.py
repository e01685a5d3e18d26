"""Check the probes of every layer, and the command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import bench_of, make_image_recipe, pictures
from scipy.stats import binomtest, norm
from support.command import Hftl
from support.coverage import is_covered
from test_feature_store import forwards

from hftl.analysis.drift import compute_cka
from hftl.analysis.estimates import (
    compute_item_values,
    compute_simultaneous_intervals,
    estimate_score,
)
from hftl.analysis.facts import ProbeAnalysis
from hftl.analysis.feature_store import FeatureStore
from hftl.analysis.layer_probe import probe_layers
from hftl.config.recipe import Recipe
from hftl.errors import DataError
from hftl.measure.metrics import METRICS
from hftl.measure.statistics import assign_blocks, mean_interval
from hftl.models.layer_features import LayerSite

pytestmark = pytest.mark.usefixtures("fast_reload", "fewer_folds")

__all__ = ["forwards"]
ACCURACY = METRICS["classification"]["accuracy"]


def read(run: Path) -> ProbeAnalysis:
    return ProbeAnalysis.model_validate_json((run / "analysis" / "probe.json").read_text())


def test_the_probe_of_the_recipes_site_is_the_arm_head(
    recipe_tree: dict[str, Any], tmp_path: Path
) -> None:
    recipe_tree["data"]["shots"] = 20
    recipe = Recipe.parse(recipe_tree)
    context = bench_of(recipe)
    store = FeatureStore(context, tmp_path / "features")
    facts = probe_layers(recipe, context, store, 500)
    held = context.prepared.rows["validation"]
    labels = context.prepared.encode_for_metrics(held)
    scores = []
    for seed in (0, 1):
        logits = context.solve_probe("mean", seed).logits(
            context.extract_features("mean", seed, held)
        )
        scores.append(np.mean(context.prepared.decode_for_metrics(held, logits) == labels))
    own = next(score for score in facts.sites if score.site == facts.own)
    assert str(facts.own) == "layer 3 mean" and facts.seeds == 2 and facts.train_rows == 40
    assert own.probe.value == pytest.approx(np.mean(scores))
    assert len(facts.sites) == 4 * 2 + 1, "two poolings a layer, and the stock class's"
    best = max(facts.sites, key=lambda score: score.probe.value)
    assert facts.best == best.site and facts.over_own is not None
    assert facts.over_own.value == pytest.approx(best.probe.value - own.probe.value)
    layers = [store.get([*held, *context.select_train_rows(0)][:500], LayerSite(n, "mean"))
              for n in range(4)]  # fmt: skip
    if facts.similarity.pooling == "mean":
        assert facts.similarity.cka[1][3] == pytest.approx(compute_cka(layers[1], layers[3]))


def test_hardly_any_row_is_refused(recipe_tree: dict[str, Any], tmp_path: Path) -> None:
    recipe_tree["data"]["shots"] = 2
    recipe = Recipe.parse(recipe_tree)
    context = bench_of(recipe)
    with pytest.raises(DataError, match=r"probe: train has 4 rows, fewer than 10"):
        probe_layers(recipe, context, FeatureStore(context, tmp_path / "features"), 500)


def simulate_estimates(trials: int) -> tuple[float, float]:
    """Return how often intervals hold the true score and the true gap, of 3 draws, 300 items."""
    held = gaps = 0
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        ease = rng.normal(size=300)

        def draw(mean: float) -> list[np.ndarray]:
            luck = rng.normal(0, 0.1, 3)  # noqa: B023
            noise = rng.normal(size=(3, 300))  # noqa: B023
            return list((ease + noise + mean + luck[:, None] > 0).astype(int))  # noqa: B023

        labels, units = np.ones(300, dtype=int), np.arange(300)
        truth = [norm.cdf(m / np.sqrt(2.01)) for m in (1.0, 0.8)]
        first, second = draw(1.0), draw(0.8)
        low, high = estimate_score(ACCURACY, labels, first, units).ci95
        held += low <= truth[0] <= high
        values = [compute_item_values(ACCURACY, labels, side, units) for side in (first, second)]
        sizes = np.bincount(assign_blocks(units))
        low, high = mean_interval(values[0] - values[1], sizes=sizes) or (1, -1)
        gaps += low <= truth[0] - truth[1] <= high
    return held / trials, gaps / trials


def test_intervals_hold_the_truth() -> None:
    held, gaps = simulate_estimates(60)
    assert held > 0.88 and gaps > 0.88


def test_seeds_that_score_alike_leave_the_interval_of_one() -> None:
    labels, units = np.ones(40, dtype=int), np.arange(40)
    first, second = labels.copy(), labels.copy()
    first[:4], second[4:8] = 0, 0
    for seeds in ([first, second], [first, first], [labels] * 2, [labels] * 5, [1 - labels] * 3):
        estimate = estimate_score(ACCURACY, labels, seeds, units)
        assert estimate.ci95 is not None and estimate.ci95[1] - estimate.ci95[0] > 0.05
        right = int((seeds[0] == labels).sum())
        wilson = binomtest(right, 40).proportion_ci(method="wilson")
        if seeds[1] is not first:
            assert estimate.ci95 == pytest.approx((wilson.low, wilson.high), abs=1e-9)


@pytest.mark.slow
def test_intervals_hold_the_truth_in_1000() -> None:
    held, gaps = simulate_estimates(1000)
    assert is_covered(held) and is_covered(gaps), (held, gaps)


def choose_best(trials: int, sites: int = 9, seeds: int = 3) -> tuple[float, float]:
    """Return how often the simultaneous and the plain interval hold the true gap of the best, 0."""
    simultaneous = plain = 0
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        values = rng.normal(size=(sites, seeds, 100)) + rng.normal(size=(sites, seeds, 1)) / 10
        values += rng.normal(size=(sites, 1, 100))
        values -= values[0]
        points = values.mean((1, 2))
        best = int(points.argmax())
        low, high = compute_simultaneous_intervals(values, points)[best]
        simultaneous += low <= 0 <= high
        low, high = mean_interval(values[best]) or (1, -1)
        plain += low <= 0 <= high
    return simultaneous / trials, plain / trials


def test_the_interval_of_the_best_counts_the_choice() -> None:
    simultaneous, plain = choose_best(60)
    assert simultaneous > 0.93 > plain, (simultaneous, plain)


@pytest.mark.slow
def test_the_interval_of_the_best_counts_the_choice_in_1000() -> None:
    simultaneous, plain = choose_best(1000)
    assert simultaneous >= 0.94 > plain, (simultaneous, plain)


@pytest.mark.slow
def test_layers_are_compared_before_with_after_training(
    hftl: Hftl, recipe_tree: dict[str, Any], tmp_path: Path
) -> None:
    recipe_tree["finetune"] |= {"strategy": "full", "lr": {"embeddings": 0.0}}
    recipe_tree["measure"] = {"seeds": [3], "arms": ["head", "lora"]}
    path, run = tmp_path / "r.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe_tree))
    short = ["finetune.training.num_train_epochs=1", "--output", run]
    assert hftl("probe", path, *short).code == 0 and read(run).trained == []
    assert hftl("finetune", path, *short).code == 0
    outcome = hftl("probe", path, *short)
    assert outcome.code == 0, outcome.err
    trained = {one.arm: one.cka for one in read(run).trained}
    assert set(trained) == {"full", "lora"} and "before with after training" in outcome.out
    assert trained["full"][0] == pytest.approx(1.0) and len(trained["full"]) == 4
    assert trained["full"][3] < 0.999 and trained["lora"][3] < 1 - 1e-6


def test_probe_command(hftl: Hftl, recipe_file: Path, tmp_path: Path, forwards: list[int]) -> None:
    run = tmp_path / "out"
    outcome = hftl("probe", recipe_file, "--output", run)
    assert outcome.code == 0, outcome.err
    facts = read(run)
    assert facts.provenance.pooling == "mean" and facts.provenance.seeds == [0, 1]
    assert facts.seeds == 1 and all(score.probe.ci95 is not None for score in facts.sites)
    assert "neighbours" in outcome.out and f"chosen on these rows: {facts.best}" in outcome.out
    assert (run / "analysis" / "probe.png").read_bytes()[:4] == b"\x89PNG"
    passes = len(forwards)
    again = hftl("probe", recipe_file, "--output", run)
    assert again.code == 0 and len(forwards) == passes and read(run) == facts
    hftl("rank", recipe_file, "--output", run)
    assert len(forwards) == passes, "another question about the same rows makes no pass"


def test_probe_of_images_words_and_targets(
    hftl: Hftl, tmp_path: Path, tiny_model: Any, recipe_tree: dict[str, Any]
) -> None:
    recipe = make_image_recipe(pictures(tmp_path / "images", 30), tiny_model("swin"))
    context = bench_of(recipe)
    facts = probe_layers(recipe, context, FeatureStore(context, tmp_path / "f"), 500)
    assert {score.width for score in facts.sites} == {8, 16}, "stages have widths of their own"
    path = tmp_path / "words.jsonl"
    words = [[("bad", "good")[i % 2], f"film{i}"] for i in range(60)]
    lines = [json.dumps({"text": w, "label": ["AB"[i % 2], "O"]}) for i, w in enumerate(words)]
    path.write_text("\n".join(lines))
    recipe_tree["data"] |= {"task": "token-classification", "train": {"path": str(path)}}
    recipe_tree["finetune"]["pooling"] = "native"
    recipe_tree["measure"]["metric"] = "accuracy"
    (tmp_path / "w.yaml").write_text(yaml.safe_dump(recipe_tree))
    outcome = hftl("probe", tmp_path / "w.yaml", "--output", tmp_path / "words")
    assert outcome.code == 0, outcome.err
    assert read(tmp_path / "words").sites[-1].probe.value > 0.9
