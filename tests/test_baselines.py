"""The baselines: fair to scratch, right for the classical model, exact for the majority."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bench_of, sentences, write_csv
from scipy.special import softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from hftl.card.sections import describe_scratch_search
from hftl.config.measure import Search
from hftl.config.recipe import Recipe
from hftl.finetune import arm_files, baselines
from hftl.finetune.arm_files import ArmOutput
from hftl.finetune.baselines import solve_classical
from hftl.finetune.context import ExperimentContext
from hftl.measure.record import ScratchSearch

TRAINING = {"learning_rate": 1e-3, "num_train_epochs": 4}


@pytest.fixture
def bench(recipe_tree: dict[str, Any]) -> ExperimentContext:
    return bench_of(Recipe.parse(recipe_tree))


def test_scratch_has_the_architecture_and_none_of_the_weights(bench: ExperimentContext) -> None:
    source = dict(bench.build_model("mean", 0).model.named_parameters())
    scratch = dict(bench.build_model("mean", 0, scratch=True).model.named_parameters())
    assert {n: p.shape for n, p in source.items()} == {n: p.shape for n, p in scratch.items()}
    drawn = [n for n, p in source.items() if p.std() > 0 and not n.startswith("head.")]
    assert drawn and not [n for n in drawn if torch.equal(source[n], scratch[n])]
    other = dict(bench.build_model("mean", 1, scratch=True).model.named_parameters())
    assert not torch.equal(scratch[drawn[0]], other[drawn[0]])


def test_scratch_gets_its_longer_budget_and_the_search_a_third(
    bench: ExperimentContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def fit(
        bench: Any, built: Any, training: dict[str, Any], patience: Any, *_: Any, compared: bool
    ) -> ArmOutput:
        given.append(training)
        assert patience is None, "scratch starts slowly: it must not be stopped early"
        assert not compared, "it does not come from the source: it has nothing to forget"
        assert all(p.requires_grad for p in built.model.parameters())
        rows = {s: len(bench.prepared.rows[s]) for s in ("validation", "test")}
        right = np.eye(2)[bench.prepared.encode_targets(bench.prepared.rows["validation"])]
        # The second rate alone is right on validation.
        sign = 1 if training["learning_rate"] == 3e-3 else -1
        found = {"validation": sign * right, "test": np.zeros((rows["test"], 2))}
        return ArmOutput(found, {}, 0)

    monkeypatch.setattr(baselines, "train_model", fit)
    finetune = Recipe.parse(
        {"source": {"model": "a/b"}, "data": {"train": "x.csv"}, "finetune": {"training": TRAINING}}
    ).finetune
    search = Search(learning_rates=[1e-3, 3e-3, 1e-2], epochs_factor=3)
    found = baselines.search_rate(bench, finetune, search, 0)
    assert found["learning_rate"] == 3e-3 and len(found["tried"]) == 3
    assert [t["num_train_epochs"] for t in given] == pytest.approx([4, 4, 4])
    baselines.train_scratch(bench, finetune, search, found["learning_rate"], 0)
    assert given[-1]["num_train_epochs"] == 12 and given[-1]["learning_rate"] == 3e-3


@pytest.mark.parametrize(
    ("given", "best", "beyond", "chosen", "at_edge"),
    [
        ([1e-3, 3e-3, 1e-2], 3e-3, [], 3e-3, False),
        ([1e-3, 3e-3], 9e-3, [9e-3, 2.7e-2], 9e-3, False),
        ([1e-3, 3e-3], 1.0, [9e-3, 2.7e-2], 2.7e-2, True),
        ([1e-3, 3e-3, 6e-3], 1e-4, [1e-3 / 3, 1e-3 / 9], 1e-3 / 9, True),
        ([1e-3], 1.0, [], 1e-3, False),
    ],
    ids=["inside", "one step beyond", "always higher", "always lower", "one rate"],
)
def test_a_rate_at_the_edge_is_gone_beyond_a_few_times(
    bench: ExperimentContext, monkeypatch: pytest.MonkeyPatch, given: list[float], best: float,
    beyond: list[float], chosen: float, at_edge: bool,
) -> None:  # fmt: skip
    """Accuracy falls with the distance from the best rate."""

    def try_rate(bench: Any, finetune: Any, search: Any, rate: float, *_: Any) -> dict[str, Any]:
        far = abs(np.log(rate / best))
        return {"learning_rate": rate, "metrics": {"accuracy": 1 / (1 + far)}}

    monkeypatch.setattr(baselines, "_try_rate", try_rate)
    search = Search(learning_rates=given)
    found = baselines.search_rate(bench, None, search, 0)  # pyright: ignore
    assert found["beyond"] == pytest.approx(beyond, rel=1e-4)
    assert found["learning_rate"] == pytest.approx(chosen, rel=1e-4)
    assert found["at_edge"] is at_edge
    tried = [row["learning_rate"] for row in found["tried"]]
    assert tried == pytest.approx(given + beyond, rel=1e-4)
    words = describe_scratch_search(ScratchSearch.model_validate(found))
    assert ("at the edge of those tried" in words) is at_edge
    assert all(f"{rate:g}" in words for rate in found["beyond"])


def test_a_rate_beyond_that_diverges_is_not_chosen(
    bench: ExperimentContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def try_rate(bench: Any, finetune: Any, search: Any, rate: float, *_: Any) -> dict[str, Any]:
        metrics = None if rate > 3e-3 else {"accuracy": rate}
        return {"learning_rate": rate, "metrics": metrics}

    monkeypatch.setattr(baselines, "_try_rate", try_rate)
    search = Search(learning_rates=[1e-3, 3e-3])
    found = baselines.search_rate(bench, None, search, 0)  # pyright: ignore
    assert found["learning_rate"] == 3e-3 and not found["at_edge"]
    assert found["beyond"] == pytest.approx([9e-3])


def test_classical_is_tfidf_and_logistic_regression(bench: ExperimentContext) -> None:
    outcome = solve_classical(bench, 0)
    rows = bench.select_train_rows(0)
    vectors = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]"
    )
    x = vectors.fit_transform([row.content[0] for row in rows])
    oracle = LogisticRegression(C=outcome.facts["penalty"], max_iter=1000, tol=1e-8)
    oracle.fit(x, bench.prepared.encode_targets(rows))
    test = vectors.transform([row.content[0] for row in bench.prepared.rows["test"]])
    scores = softmax(outcome.logits["test"], axis=1)
    np.testing.assert_allclose(scores, oracle.predict_proba(test), atol=1e-3)


def test_majority_is_the_train_prior(bench: ExperimentContext) -> None:
    outcome = baselines.solve_majority(bench, 0)
    labels = bench.prepared.encode_targets(bench.select_train_rows(0))
    predictions, scores = outcome.logits["test"].argmax(1), softmax(outcome.logits["test"], axis=1)
    assert set(predictions) == {int(np.bincount(labels).argmax())}
    np.testing.assert_allclose(scores[0], np.bincount(labels) / len(labels))


def test_regression_baselines(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    rows = [(text, float(label == "positive")) for text, label in sentences(80)]
    table = write_csv(tmp_path / "v.csv", ["text", "label"], rows)
    data = {"task": "regression", "train": {"path": str(table)}}
    recipe = Recipe.parse({"source": {"model": str(tiny_model())}, "data": data})
    bench = bench_of(recipe)
    mean = bench.prepared.encode_targets(bench.select_train_rows(0)).mean()
    assert np.allclose(baselines.solve_majority(bench, 0).logits["test"], mean)
    found = solve_classical(bench, 0).logits["test"]
    labels = bench.prepared.encode_targets(bench.prepared.rows["test"])
    assert found.shape == (len(labels), 1)
    assert np.corrcoef(found[:, 0], labels)[0, 1] > 0.8, "the words say the label"


def test_classical_weights_of_many_classes_can_be_saved(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    rows = [
        (f"{text} {word}", word) for text, _ in sentences(30) for word in ("one", "two", "three")
    ]
    table = write_csv(tmp_path / "c.csv", ["text", "label"], rows)
    recipe = Recipe.parse({"source": {"model": str(tiny_model())}, "data": {"train": str(table)}})
    bench = bench_of(recipe)
    arm_files.write_arm(tmp_path, bench.prepared, solve_classical(bench, 0), "c", "c", 0)
    assert (
        arm_files.read_arm(tmp_path, bench.prepared).metrics_file["metrics"]["test"]["accuracy"]
        > 0.9
    )
