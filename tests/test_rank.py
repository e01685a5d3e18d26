"""Check the ranks of sources: their intervals in simulation, and the command."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import sentences
from support.command import Hftl
from support.coverage import is_covered
from support.tiny import save_tiny
from transformers import AutoModel

from hftl.analysis import feature_store, out_of_fold
from hftl.analysis.facts import RankAnalysis
from hftl.analysis.out_of_fold import assign_folds, predict_out_of_fold
from hftl.analysis.probe import find_axes
from hftl.analysis.rank import score_constant
from hftl.analysis.rank_intervals import (
    bootstrap_scores,
    compute_gap_interval,
    compute_rank_intervals,
)
from hftl.card.analysis_plots import plot_rank
from hftl.config.recipe import Recipe
from hftl.errors import DataError, NumericError
from hftl.measure.metrics import METRICS, Metric
from hftl.pipeline.analyses import write_winner


def score_rows(hits: np.ndarray, number: int, rows: np.ndarray) -> float:
    return float(hits[rows, number].mean())


def simulate_ranks(trials: int, draws_each: int, rows: int = 300) -> tuple[float, float, float]:
    """Return the shares of true ranks and of true gaps covered, and the mean width of intervals."""
    truth = np.array([0.80, 0.79, 0.79, 0.70, 0.60])
    covered, gaps, width = 0, 0, 0
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        # Sources err on the same hard rows.
        hardness = rng.normal(size=(rows, 1)) + rng.normal(size=(rows, 5))
        hits = (hardness < np.sqrt(2) * np.array([0.8416, 0.8064, 0.8064, 0.5244, 0.2533])).astype(
            float
        )
        points = hits.mean(0)
        score = partial(score_rows, hits)
        draws = bootstrap_scores(score, 5, np.arange(rows), draws_each, trial)
        intervals = compute_rank_intervals(points, draws)
        true_ranks = [(1, 1), (2, 3), (2, 3), (4, 4), (5, 5)]
        for (low, high), (best, worst) in zip(intervals, true_ranks, strict=True):
            covered += low <= best and worst <= high
            width += high - low + 1
        low, high = compute_gap_interval(0, 3, points, draws)
        gaps += low <= truth[0] - truth[3] <= high
    return covered / trials / 5, gaps / trials, width / trials / 5


def test_rank_intervals_hold_the_true_rank() -> None:
    covered, gaps, width = simulate_ranks(30, 200)
    assert covered > 0.9 and gaps > 0.85 and width < 3


@pytest.mark.slow
def test_rank_intervals_hold_the_true_rank_in_500() -> None:
    covered, gaps, width = simulate_ranks(500, 1000)
    assert covered >= 0.9 and is_covered(gaps) and width < 3, (covered, gaps, width)


def test_equal_scores_may_have_any_rank_and_a_clear_winner_has_one() -> None:
    rng = np.random.default_rng(0)
    hits = np.stack([rng.random(400) < p for p in (0.9, 0.5, 0.5)], 1).astype(float)
    hits[:, 2] = hits[:, 1]
    points = hits.mean(0)
    draws = bootstrap_scores(lambda i, rows: hits[rows, i].mean(), 3, np.arange(400), 200)
    assert compute_rank_intervals(points, draws) == [(1, 1), (2, 3), (2, 3)]
    assert compute_rank_intervals(points[:1], draws[:, :1]) == [(1, 1)]


def test_units_are_drawn_whole() -> None:
    units = np.array([7, 7, 3, 3, 3])
    seen: list[np.ndarray] = []
    bootstrap_scores(lambda _, rows: float(seen.append(rows) or 0), 1, units, 20)
    assert {tuple(rows) for rows in seen} == {(0, 1, 0, 1), (0, 1, 2, 3, 4), (2, 3, 4, 0, 1),
                                             (2, 3, 4, 2, 3, 4)}  # fmt: skip


def test_folds_deal_classes_and_hold_groups_together() -> None:
    labels = np.array([0] * 20 + [1] * 10)
    folds = assign_folds(labels, None)
    assert all(np.bincount(folds[labels == c]).tolist() == [len(folds[labels == c]) // 5] * 5
               for c in (0, 1))  # fmt: skip
    groups = np.repeat(np.arange(9).astype(str), 4)
    grouped = assign_folds(np.zeros(36), groups)
    assert all(len(set(grouped[groups == g])) == 1 for g in groups)
    assert np.bincount(grouped).max() <= 8
    with pytest.raises(DataError, match="train has 9 rows, fewer than 10"):
        assign_folds(np.arange(9), None)
    with pytest.raises(DataError, match="train has 1 group, fewer than 2"):
        assign_folds(np.arange(12), np.array(["a"] * 12))


def test_a_probe_does_not_see_the_row_that_it_predicts() -> None:
    """Noise wider than its rows fits train exactly, and held out is at chance."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(120, 200)).astype(np.float32), rng.integers(0, 2, 120)
    logits = predict_out_of_fold(features, labels, 2, None)
    assert 0.3 < np.mean(logits.argmax(1) == labels) < 0.7
    features[:, :20] += 3 * labels[:, None]
    assert np.mean(predict_out_of_fold(features, labels, 2, None).argmax(1) == labels) > 0.95


@pytest.mark.parametrize("width", [30, 200])
def test_probes_of_folds_are_the_same_on_the_axes_of_all_rows(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 150)
    features = (rng.normal(size=(150, width)) @ rng.normal(size=(width, width)) + 5).astype("f4")
    features[:, :4] += 3 * np.eye(3, 4)[labels]
    # One direction less than columns, as after a layer norm.
    features -= features.mean(1, keepdims=True)
    assert (find_axes(features) is None) == (width == 200), "fewer rows than columns span less"
    logits = predict_out_of_fold(features, labels, 3, None)
    monkeypatch.setattr(out_of_fold, "find_axes", lambda *_: None)
    # The solver stops at a gradient of 1e-6, of other variables on other axes.
    assert np.allclose(logits, predict_out_of_fold(features, labels, 3, None), atol=1e-3)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Save a tiny classifier with a whole head of its own."""
    import torch
    from support.tiny import tiny_config, tiny_tokenizer
    from transformers import BertForSequenceClassification

    torch.manual_seed(1)
    folder = tmp_path / "trained"
    BertForSequenceClassification(tiny_config("bert", num_labels=3)).save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def test_rank_lists_what_failed_and_goes_on(
    hftl: Hftl, recipe_file: Path, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_tiny("distilbert", tmp_path / "other")
    image = save_tiny("vit", tmp_path / "image")
    passes: list[int] = []
    compute: Callable[..., Any] = feature_store.compute_layer_features
    monkeypatch.setattr(
        feature_store, "compute_layer_features",
        lambda *words: (passes.append(1), compute(*words))[1],
    )  # fmt: skip
    run = tmp_path / "out"
    words = ["rank", recipe_file, "--source", trained, "--source", other, "--source", "./nowhere",
             "--source", image, "--output", run]  # fmt: skip
    outcome = hftl(*words, "--write", tmp_path / "winner.yaml")
    assert outcome.code == 0, outcome.err
    assert "./nowhere does not exist" in outcome.out and "reads images" in outcome.out
    assert "one source: name others" not in outcome.out
    assert "best at" in outcome.out and "rank" in outcome.out
    facts = RankAnalysis.model_validate_json((run / "analysis" / "rank.json").read_text())
    assert [one.rank for one in facts.sources] == [1, 2, 3] and len(facts.failed) == 2
    assert facts.constant == pytest.approx(0.5, abs=0.1), "as many rows of both classes"
    by_name = {one.source: one for one in facts.sources}
    own = by_name[str(trained)].scores
    assert own.leep is not None and own.nce is not None
    assert by_name[str(other)].scores.leep is None and by_name[str(other)].scores.nleep is not None
    encoder = AutoModel.from_pretrained(other)
    assert by_name[str(other)].parameters == sum(t.numel() for t in encoder.parameters())
    assert (run / "analysis" / "rank.png").read_bytes()[:4] == b"\x89PNG"
    assert passes == [1, 1, 1], "one pass a source"
    assert len({one.provenance.weights for one in facts.sources}) == 3
    assert len({one.provenance.data for one in facts.sources}) == 1
    assert Recipe.load(tmp_path / "winner.yaml").source.model == facts.sources[0].source

    again = hftl(*words)
    assert again.code == 0 and passes == [1, 1, 1], "a second call makes no pass"
    stored = RankAnalysis.model_validate_json((run / "analysis" / "rank.json").read_text())
    assert [s.scores for s in stored.sources] == [s.scores for s in facts.sources]
    assert all(one.pass_seconds == 0 for one in stored.sources)
    hftl(*words, "--write", tmp_path / "winner.yaml").assert_error(2, "winner.yaml exists")


def test_rank_of_targets_leaves_out_the_scores_of_classes(
    hftl: Hftl, recipe_tree: dict[str, Any], tmp_path: Path
) -> None:
    lines = [json.dumps({"text": t, "label": float(len(t))}) for t, _ in sentences(80)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    recipe_tree["data"] |= {"task": "regression", "train": {"path": str(tmp_path / "t.jsonl")}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe_tree))
    outcome = hftl("rank", tmp_path / "r.yaml", "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    facts = json.loads((tmp_path / "out" / "analysis" / "rank.json").read_text())
    (one,) = facts["sources"]
    assert "h_score" not in one["scores"] and np.isfinite(one["scores"]["logme"])
    assert f"one answer for all rows: {facts['metric']} {facts['constant']:.3f}" in outcome.out
    assert "one source: name others by --source MODEL" in outcome.out


def test_a_decoder_is_ranked_for_targets_where_a_head_of_them_trains(
    hftl: Hftl, recipe_tree: dict[str, Any], tmp_path: Path
) -> None:
    """The stock class has no bias for the mean of the targets, and its encoder is as good."""
    lines = [json.dumps({"text": t, "label": float(len(t))}) for t, _ in sentences(80)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    recipe_tree["source"]["model"] = str(save_tiny("llama", tmp_path / "llama"))
    recipe_tree["data"] |= {"task": "regression", "train": {"path": str(tmp_path / "t.jsonl")}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe_tree))
    outcome = hftl("rank", tmp_path / "r.yaml", "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    (one,) = json.loads((tmp_path / "out" / "analysis" / "rank.json").read_text())["sources"]
    assert one["best"]["pooling"] in ("mean", "last")


def test_rank_refuses_too_few_rows_and_no_source(
    hftl: Hftl, recipe_file: Path, tmp_path: Path
) -> None:
    run = ["--output", tmp_path / "out"]
    hftl("rank", recipe_file, "data.shots=4", *run).assert_error(3, "8 rows", "10")
    hftl("rank", recipe_file, "source.model=./gone", *run).assert_error(2, "./gone does not exist")
    hftl("rank", recipe_file, "data.task=null", "adapt={objective: mlm}", *run).assert_error(
        2, "data.task"
    )


def test_one_answer_for_all_rows_is_a_good_one_or_has_no_score() -> None:
    targets = np.array([0.0, 1.0, 2.0, 3.0, 50.0])
    errors = METRICS["regression"]
    assert score_constant(errors["mae"], "regression", targets) == pytest.approx(52 / 5)  # at 2
    assert score_constant(errors["rmse"], "regression", targets) == pytest.approx(targets.std())
    assert score_constant(errors["pearson"], "regression", targets) == 0
    classes = np.array([0, 1, 1, 2])
    accuracy = METRICS["classification"]["accuracy"]
    assert score_constant(accuracy, "classification", classes) == 0.5
    assert score_constant(accuracy, "multi-label", classes) is None

    def correlate(labels: np.ndarray, predictions: np.ndarray) -> float:
        raise NumericError("evaluate:pearsonr is nan", "Use a built-in metric")

    metric = Metric("evaluate:pearsonr", score=correlate)
    assert score_constant(metric, "regression", targets) is None


def make_ranking(source: str, layer: int, pooling: str) -> RankAnalysis:
    """Return the ranking of one source of three layers that is best at a site."""
    winner = {
        "source": source, "architecture": "bert", "parameters": 1, "layers": 3,
        "best": {"layer": layer, "pooling": pooling}, "probe": 0.7, "probe_ci95": (0.6, 0.8),
        "rank": 1, "rank_ci95": (1, 1), "scores": {"logme": -1.0, "knn": 0.5}, "pass_seconds": 1.0,
        "score_seconds": 1.0,
        "provenance": {
            "weights": "", "config": "", "preprocessing": "", "max_length": None, "pooling": "mean",
            "data": "", "seeds": [0],
        },
    }  # fmt: skip
    return RankAnalysis.model_validate({
        "metric": "accuracy", "lower_is_better": False, "rows": 9, "sources": [winner],
        "failed": [], "first_two": None,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "layer", "best", "before", "written"),
    [
        ("resnet", 3, "mean", "native", "native"),
        ("swin", 3, "mean", "cls", "native"),
        ("clip", 3, "mean", "embedding", "embedding"),
        ("vit", 3, "mean", "native", "mean"),
        ("vit", 2, "mean", "cls+mean", "cls+mean"),
        ("bert", 3, "cls", "mean", "cls"),
    ],
)
def test_the_winner_is_pooled_as_a_head_can_read_it(
    architecture: str, layer: int, best: str, before: str, written: str, tiny_model: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    recipe, model = tmp_path / "r.yaml", str(tiny_model(architecture))
    recipe.write_text(yaml.safe_dump({
        "source": {"model": "org/other"}, "data": {"train": {"path": "x"}},
        "finetune": {"pooling": before},
    }))  # fmt: skip
    write_winner(recipe, [], make_ranking(model, layer, best), tmp_path / "winner.yaml")
    winner = Recipe.load(tmp_path / "winner.yaml")
    assert (winner.source.model, winner.finetune.pooling) == (model, written)


def test_plot_of_a_name_with_dollars(tmp_path: Path) -> None:
    plot_rank(make_ranking("a$b$c", 2, "mean"), tmp_path / "rank.png")
    assert (tmp_path / "rank.png").stat().st_size > 1000
