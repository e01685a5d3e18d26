"""Check the baselines: fair to scratch, right for the classical model, exact for the majority."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bench_of, sentences, write_csv
from scipy.special import softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from hftl.analysis.out_of_fold import assign_folds
from hftl.card.sections import describe_scratch_search
from hftl.config.finetune import Finetune
from hftl.config.measure import Search
from hftl.config.recipe import Recipe
from hftl.errors import NumericError
from hftl.finetune import arm_files, baselines, classical, pretraining_heads
from hftl.finetune.arm import TrainedModel
from hftl.finetune.baselines import Trial, solve_majority
from hftl.finetune.classical import solve_classical
from hftl.finetune.context import ExperimentContext
from hftl.models.features import predict_with_features
from hftl.train.facts import TrainingFacts, TriedRate


@pytest.fixture(scope="module")
def context(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> ExperimentContext:
    return build_context(bert, tmp_path_factory.mktemp("data"), sentences(160))


def build_context(model: Path, folder: Path, rows: list[Any], **data: Any) -> ExperimentContext:
    table = write_csv(folder / "rows.csv", ["text", "label"], rows)
    return bench_of(Recipe.parse({
        "source": {"model": str(model)}, "data": {"train": {"path": str(table)}} | data,
    }))  # fmt: skip


@pytest.mark.parametrize(
    ("whole", "words"),
    [
        ("as good", None),
        ("worse", "over the whole budget it scored less, and each seed trains for a third"),
        ("diverged", "over the whole budget it diverged, and each seed trains for a third"),
    ],
)
def test_scratch_trains_as_long_as_validation_prefers_at_its_own_rate(
    context: ExperimentContext, monkeypatch: pytest.MonkeyPatch, whole: str, words: str | None
) -> None:
    trainings: list[dict[str, Any]] = []
    predicted: list[str] = []

    def fit_model(
        context: Any, built: Any, finetune: Finetune, *_: Any, checkpoints: Any
    ) -> TrainedModel:
        trainings.append(training := finetune.training)
        assert finetune.patience is None, "scratch starts slowly: it must not be stopped early"
        assert all(p.requires_grad for p in built.model.parameters())
        if training["num_train_epochs"] == 12 and whole == "diverged":
            raise NumericError("NaN", "Lower it")
        return TrainedModel(built, None, TrainingFacts(), {})

    def predict_split(context: Any, built: Any, scale: Any, split: str) -> np.ndarray:
        predicted.append(split)
        right = np.eye(2)[context.prepared.encode_targets(context.prepared.rows[split])]
        # The second rate alone is right on validation, and over the whole budget as `whole` says.
        is_whole = trainings[-1]["num_train_epochs"] == 12
        is_right = trainings[-1]["learning_rate"] == 3e-3 and (whole == "as good" or not is_whole)
        return right if is_right else -right

    monkeypatch.setattr(baselines, "fit_model", fit_model)
    monkeypatch.setattr(baselines, "predict_split", predict_split)
    monkeypatch.setattr(baselines, "predict_trained", lambda *_, compared: predicted.append("all"))
    section = Finetune(training={"learning_rate": 1e-3, "num_train_epochs": 4})
    search = Search(learning_rates=[1e-3, 3e-3, 1e-2], epochs_factor=3)
    result = baselines.search_rate(context, section, search, 0)
    assert result["learning_rate"] == 3e-3 and len(result["tried"]) == 3
    assert [t["num_train_epochs"] for t in trainings] == pytest.approx([4, 4, 4, 12])
    assert [t["learning_rate"] for t in trainings] == [1e-3, 3e-3, 1e-2, 3e-3]
    assert set(predicted) == {"validation"}, "rate and length are chosen on validation alone"
    said = describe_scratch_search(result)
    assert words in said if words else "whole budget" not in said
    baselines.train_scratch(context, section, search, result, 0)
    assert predicted[-1] == "all"
    assert trainings[-1]["num_train_epochs"] == pytest.approx(4 if words else 12)
    assert trainings[-1]["learning_rate"] == 3e-3


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_chosen_trial_is_what_scratch_would_train(bert: Path, tmp_path: Path, task: str) -> None:
    """A regression's head stays one of standardised targets until all is predicted."""
    rows = [
        (text, label if task == "classification" else f"{70 + 9 * len(text)}")
        for text, label in sentences(40)
    ]
    context = build_context(bert, tmp_path, rows, task=task)
    training = {"learning_rate": 1e-3, "num_train_epochs": 1, "per_device_train_batch_size": 8}
    section, search = Finetune(training=training), Search(learning_rates=[1e-3], epochs_factor=3)

    def keep(rate: float, share: float, make: Any) -> TriedRate:
        (folder := tmp_path / f"{share:.1f}").mkdir()
        baselines.write_trial(folder, make(None), {"energy_kwh": 0.5})
        return baselines.read_trial_score(folder)

    chosen = baselines.search_rate(context, section, search, 0, attempt=keep)
    trial = baselines.predict_trial(context, section, 0, tmp_path / f"{chosen.share:.1f}")
    trained = baselines.train_scratch(context, section, search, chosen, 0)
    assert trial.weights.keys() == trained.weights.keys()
    assert all(torch.equal(trial.weights[name], trained.weights[name]) for name in trial.weights)
    assert all((trial.logits[split] == trained.logits[split]).all() for split in trial.logits)
    assert trial.facts == trained.facts
    assert trial.trainable_parameters == trained.trainable_parameters


@pytest.mark.parametrize(
    ("rates", "best", "beyond", "chosen", "at_edge"),
    [
        ([1e-3, 3e-3, 1e-2], 3e-3, [], 3e-3, False),
        ([1e-3, 3e-3], 9e-3, [9e-3, 2.7e-2], 9e-3, False),
        ([1e-3, 3e-3], 1.0, [9e-3, 2.7e-2], 2.7e-2, True),
        ([1e-3, 3e-3, 6e-3], 1e-4, [1e-3 / 3, 1e-3 / 9], 1e-3 / 9, True),
        ([1e-3], 1.0, [], 1e-3, False),
        ([1e-3, 3e-3], "below 5e-3", [9e-3], 3e-3, False),
    ],
    ids=["inside", "one step beyond", "always higher", "always lower", "one rate", "diverges"],
)
def test_search_goes_a_few_rates_beyond_its_edge(
    context: ExperimentContext, monkeypatch: pytest.MonkeyPatch, rates: list[float], best: Any,
    beyond: list[float], chosen: float, at_edge: bool,
) -> None:  # fmt: skip
    """Let accuracy fall with the distance from the best rate, or every rate above 5e-3 diverge."""

    def try_rate(context: Any, section: Any, search: Any, rate: float, *_: Any) -> Trial:
        if isinstance(best, str):
            metrics = None if rate > 5e-3 else {"accuracy": rate}
        else:
            metrics = {"accuracy": 1 / (1 + abs(np.log(rate / best)))}
        return Trial(TriedRate(learning_rate=rate, metrics=metrics))

    monkeypatch.setattr(baselines, "_score_rate", try_rate)
    section: Any = None
    lines: list[str] = []
    search = Search(learning_rates=rates)
    result = baselines.search_rate(context, section, search, 0, lines.append)
    assert len(lines) == len(rates) + len(beyond) + 1
    assert lines[0].startswith(f"  scratch: rate {rates[0]:.3g} (1 of {len(rates)}): validation ac")
    assert all(line.endswith(", 0 s") for line in lines)
    assert any(": diverged, " in line for line in lines) == isinstance(best, str)
    assert result["beyond"] == pytest.approx(beyond, rel=1e-4)
    assert result["learning_rate"] == pytest.approx(chosen, rel=1e-4)
    assert result["at_edge"] is at_edge
    tried = [row["learning_rate"] for row in result["tried"]]
    assert tried == pytest.approx(rates + beyond, rel=1e-4)
    words = describe_scratch_search(result)
    assert ("still at the end of the rates tried" in words) is at_edge
    assert all(f"{rate:.3g}" in words for rate in result["beyond"])


def test_classical_is_tfidf_and_logistic_regression(context: ExperimentContext) -> None:
    outcome = solve_classical(context, 0)
    rows = context.select_train_rows(0)
    vectors = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]"
    )
    x = vectors.fit_transform([row.content[0] for row in rows])
    oracle = LogisticRegression(C=outcome.facts["penalty"], max_iter=1000, tol=1e-8)
    oracle.fit(x, context.prepared.encode_targets(rows))
    test = vectors.transform([row.content[0] for row in context.prepared.rows["test"]])
    scores = softmax(outcome.logits["test"], axis=1)
    np.testing.assert_allclose(scores, oracle.predict_proba(test), atol=1e-3)


def test_majority_is_the_train_prior(context: ExperimentContext) -> None:
    logits = solve_majority(context, 0).logits["test"]
    labels = context.prepared.encode_targets(context.select_train_rows(0))
    assert set(logits.argmax(1)) == {int(np.bincount(labels).argmax())}
    np.testing.assert_allclose(softmax(logits, axis=1)[0], np.bincount(labels) / len(labels))


def test_regression_baselines_are_the_mean_and_a_ridge(bert: Path, tmp_path: Path) -> None:
    rows = [(text, float(label == "positive")) for text, label in sentences(80)]
    context = build_context(bert, tmp_path, rows, task="regression")
    mean = context.prepared.encode_targets(context.select_train_rows(0)).mean()
    assert np.allclose(solve_majority(context, 0).logits["test"], mean)
    predictions = solve_classical(context, 0).logits["test"]
    labels = context.prepared.encode_targets(context.prepared.rows["test"])
    assert predictions.shape == (len(labels), 1)
    assert np.corrcoef(predictions[:, 0], labels)[0, 1] > 0.8, "the words say the label"


def test_classical_weights_of_many_classes_can_be_saved(bert: Path, tmp_path: Path) -> None:
    words = ("one", "two", "three")
    rows = [(f"{text} {word}", word) for text, _ in sentences(30) for word in words]
    context = build_context(bert, tmp_path, rows)
    arm_files.write_arm(tmp_path, context.prepared, solve_classical(context, 0), "c", "c", 0)
    metrics = arm_files.read_metrics_file(tmp_path).metrics
    assert metrics.test["accuracy"] > 0.9


@pytest.mark.parametrize(("pooling", "passes"), [("mean", 0), ("cls", 1), ("native", 1)])
def test_test_rows_are_embedded_by_the_pass_that_predicts_them(
    pooling: str, passes: int, context: ExperimentContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under another pooling the head reads something else than the mean over tokens."""
    built = context.build_model(pooling, 0)
    encoded = context.encode_rows(context.prepared.rows["test"])
    arguments = (built.model, built.last_linear, encoded, context.inputs, "cpu")
    _, features = predict_with_features(*arguments)
    expected = pretraining_heads.embed_compared_rows(context, built)["new"]
    calls: list[int] = []
    compute = pretraining_heads.compute_frozen_features

    def count(*args: Any) -> list[np.ndarray]:
        calls.append(1)
        return compute(*args)

    monkeypatch.setattr(pretraining_heads, "compute_frozen_features", count)
    embeddings = pretraining_heads.embed_compared_rows(context, built, features)
    np.testing.assert_allclose(embeddings["new"], expected, atol=1e-6)
    assert len(calls) == passes


@pytest.mark.parametrize("grouped", [False, True])
def test_classical_out_of_fold_is_that_of_a_vectorizer_fitted_without_the_fold(
    grouped: bool, context: ExperimentContext
) -> None:
    rows = context.select_train_rows(0)
    if grouped:
        rows = [replace(row, group=f"g{i // 5}") for i, row in enumerate(rows)]
    targets, groups = context.prepared.encode_targets(rows), context.group_outputs(rows)
    ours = classical.predict_classical_out_of_fold(context, rows)
    folds = assign_folds(targets, groups)
    for fold in np.unique(folds):
        vectors = TfidfVectorizer(
            ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]"
        )
        texts = np.array([row.content[0] for row in rows], dtype=object)
        x = vectors.fit_transform(texts[folds != fold])
        oracles = [
            LogisticRegression(C=c, max_iter=1000, tol=1e-8).fit(x, targets[folds != fold])
            for c in classical.CS
        ]
        held = vectors.transform(texts[folds == fold])
        gaps = [
            np.abs(oracle.predict_proba(held) - softmax(ours[folds == fold], axis=1)).max()
            for oracle in oracles
        ]
        assert min(gaps) < 1e-3
