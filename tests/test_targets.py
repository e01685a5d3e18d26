"""Check that the unit of regression targets changes neither training nor what is published."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import BAD, FILLER, GOOD, bench_of, write_csv

import hftl
from hftl.config.measure import Search
from hftl.config.recipe import Recipe
from hftl.config.retain import Retain
from hftl.data.labels import check_targets
from hftl.data.rows import Row
from hftl.errors import DataError, RecipeError
from hftl.finetune.arm import train_arm
from hftl.finetune.baselines import train_scratch
from hftl.finetune.classical import solve_classical
from hftl.finetune.context import ExperimentContext
from hftl.finetune.solved_arms import solve_head
from hftl.finetune.trainable import prepare
from hftl.measure.metrics import compute_all_metrics
from hftl.models.model_parts import get_last_linear_copies
from hftl.pipeline import pipeline
from hftl.pipeline.retention import build_retention
from hftl.retain.kl import KLToOriginal
from hftl.retain.regularizer import Retention
from hftl.train.arguments import build_finetune_arguments
from hftl.train.facts import ScratchSearch

pytestmark = pytest.mark.usefixtures("fast_reload")

FACTOR, SHIFT = 1000.0, 100_000.0
"""Another unit of the targets, far from 0."""
slow = pytest.mark.slow


def draw_values(rows: int) -> list[tuple[str, float]]:
    """Return distinct texts with a number that their words add up to, of standard deviation 1."""
    draw = random.Random(0)
    worth = {word: draw.gauss(0, 0.1) for word in FILLER}
    worth |= {word: 0.5 for word in GOOD} | {word: -0.5 for word in BAD}
    labels: dict[str, float] = {}
    while len(labels) < rows:
        words = draw.sample(FILLER, 3) + draw.sample(GOOD + BAD, 4)
        labels[" ".join(words)] = sum(worth[word] for word in words)
    sd = float(np.std(list(labels.values())))
    return [(text, value / sd) for text, value in labels.items()]


@pytest.fixture
def make_recipe(bert: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Return a function that makes a recipe of texts whose targets are factor * value + shift."""

    def make(factor: float, shift: float, finetune: dict[str, Any], **more: Any) -> Recipe:
        rows = [(text, repr(factor * value + shift)) for text, value in draw_values(80)]
        table = write_csv(tmp_path / f"values-{factor}-{shift}.csv", ["text", "label"], rows)
        training = {"num_train_epochs": 2, "learning_rate": 5e-3, "bf16": False}
        return Recipe.parse({
            "source": {"model": str(bert), "published_as": "org/tiny"},
            "data": {"task": "regression", "train": {"path": str(table)}, "max_length": 16},
            "finetune": {"pooling": "mean", "training": training} | finetune,
            **more,
        })  # fmt: skip

    return make


Run = Callable[[ExperimentContext, Recipe], Any]


def measure_scores(run: Run, recipe: Recipe) -> dict[str, float]:
    context = bench_of(recipe)
    rows = context.prepared.rows["test"]
    predictions = context.prepared.decode_for_metrics(rows, run(context, recipe).logits["test"])
    return compute_all_metrics("regression", context.prepared.encode_for_metrics(rows), predictions)


def assert_same_scores(run: Run, make_recipe: Any, finetune: dict[str, Any]) -> None:
    """Check that an arm's scores do not depend on the unit, but for those in it, which scale."""
    plain = measure_scores(run, make_recipe(1.0, 0.0, finetune))
    scores = measure_scores(run, make_recipe(FACTOR, SHIFT, finetune))
    in_unit = {key: value * (FACTOR if key in ("rmse", "mae") else 1)
               for key, value in plain.items()}  # fmt: skip
    assert scores == pytest.approx(in_unit, rel=0.01, abs=1e-3)


def train(context: ExperimentContext, recipe: Recipe) -> Any:
    return train_arm(context, recipe.finetune, 0)


# Arms


SEARCH, CHOSEN = Search(epochs_factor=1), ScratchSearch(learning_rate=5e-3)
ARMS: dict[str, tuple[Run, dict[str, Any]]] = {
    "head": (lambda context, recipe: solve_head(context, recipe.finetune, 0), {}),
    "classical": (lambda context, recipe: solve_classical(context, 0), {}),
    "scratch": (
        lambda context, recipe: train_scratch(context, recipe.finetune, SEARCH, CHOSEN, 0), {},
    ),
    "full": (train, {"strategy": "full"}),
    "gradual": (train, {"strategy": "gradual", "gradual": {"epochs": 1, "final_epochs": 1}}),
    "lora": (train, {"strategy": "lora", "head_init": "random", "pooling": "native"}),
}  # fmt: skip


@pytest.mark.parametrize("arm", ARMS)
def test_unit_changes_no_arm(arm: str, make_recipe: Any) -> None:
    run, finetune = ARMS[arm]
    assert_same_scores(run, make_recipe, finetune)


@pytest.mark.parametrize(
    ("retain", "strategy"),
    [
        ({"kl": {"weight": 1.0, "on": "probe"}}, "full"),
        ({"l2sp": {"weight": 0.1, "head": 0.1}}, "lora"),
        ({"interpolate": [0.0, 0.5, 1.0]}, "full"),
        (None, "full"),
    ],
    ids=["kl", "l2sp", "interpolated", "given reference"],
)
def test_unit_changes_no_regularizer(
    retain: Any, strategy: str, make_recipe: Any, tmp_path: Path
) -> None:
    def run(context: ExperimentContext, recipe: Recipe) -> Any:
        if retain is None:  # The reference is a model, as of the source before adaptation.
            built = context.build_probed_model("native", 0)
            retention = Retention([KLToOriginal(10.0, "probe", solved=True)], built.model)
        else:
            section = Retain.model_validate(retain)
            arm = replace(recipe.arms[0], retain=section)
            retention = build_retention(context, arm, 0, tmp_path)
        return train_arm(context, recipe.finetune, 0, retention)

    assert_same_scores(run, make_recipe, {"strategy": strategy, "pooling": "native"})


def test_wrapped_head_and_interpolation_at_zero_have_the_labels_unit(make_recipe: Any) -> None:
    recipe = make_recipe(10.0, 2000.0, {"strategy": "full", "pooling": "native"})
    context = bench_of(recipe)
    results = train_arm(context, recipe.finetune, 0, Retention(alphas=(0.0,)))
    solved = solve_head(context, recipe.finetune, 0)
    np.testing.assert_allclose(results.logits["test"], solved.logits["test"], atol=5e-3)
    assert results.facts["target_scale"]["mean"] == pytest.approx(2000, abs=10)
    built = context.build_probed_model("native", 0)
    model = prepare(built.model, "lora", fresh=built.fresh)
    copies = get_last_linear_copies(model, built.architecture)
    before = [copy.bias.item() for copy in copies]
    assert len(copies) == 2 and before[0] == before[1] != 0
    scale = context.compute_target_scale(0)
    assert scale is not None
    scale.standardize_head(model)
    standardized = (before[0] - scale.mean) / scale.sd
    assert [copy.bias.item() for copy in copies] == pytest.approx([standardized] * 2)
    scale.restore_head(model)
    assert [copy.bias.item() for copy in copies] == pytest.approx(before)


def test_shots_of_one_value_give_that_value(make_recipe: Any) -> None:
    tree = make_recipe(1000.0, 70.0, {"strategy": "full"}).to_dict()
    tree["data"]["shots"] = 1
    recipe = Recipe.parse(tree)
    context = bench_of(recipe)
    (row,) = context.select_train_rows(0)
    results = train(context, recipe).logits["test"][:, 0]
    assert np.ptp(results) < abs(row.label) / 10  # pyright: ignore
    assert results == pytest.approx(row.label, rel=0.1)


# The best epoch


@pytest.mark.parametrize(("metric", "greater"), [(None, False), ("eval_mae", False), ("r2", True)])
def test_best_epoch_is_that_of_the_least_error(
    metric: str | None, greater: bool, make_recipe: Any
) -> None:
    training: dict[str, Any] = {"num_train_epochs": 3, "learning_rate": 2e-2, "bf16": False}
    if metric is not None:
        training["metric_for_best_model"] = metric
    section = {"strategy": "full", "head_init": "random", "training": training}
    recipe = make_recipe(1.0, 0.0, section)
    facts = train(bench_of(recipe), recipe).facts
    key = "eval_" + (metric or "rmse").removeprefix("eval_")
    values = {row["epoch"]: row[key] for row in facts["history"] if key in row}
    assert facts["best_epoch"] == (max if greater else min)(values, key=values.__getitem__)
    assert len(set(values.values())) == 3


def test_refuses_the_wrong_direction_of_a_metric(tmp_path: Path) -> None:
    training = {"metric_for_best_model": "rmse", "greater_is_better": True}
    with pytest.raises(RecipeError, match="of rmse less is better.*Leave it out"):
        build_finetune_arguments(training, "regression", str(tmp_path), 0, "cpu")


# Runs


@pytest.mark.parametrize(
    ("strategy", "pooling"), [("lora", "native"), pytest.param("full", "mean", marks=slow)]
)
def test_run_far_from_zero_is_published_in_the_labels_unit(
    strategy: str, pooling: str, make_recipe: Any, tmp_path: Path
) -> None:
    """Predict 2000 + 10 v from random heads, which without a scale miss by 200 spreads."""
    finetune = {"strategy": strategy, "head_init": "random", "pooling": pooling}
    finetune["training"] = {"num_train_epochs": 6, "learning_rate": 5e-3, "bf16": False}
    measure = {"seeds": [0], "metric": "rmse", "arms": ["scratch", "head", "majority"],
               "scratch": {"learning_rates": [5e-3], "epochs_factor": 1}}  # fmt: skip
    run = tmp_path / "run"
    record = pipeline.run(make_recipe(10.0, 2000.0, finetune, measure=measure), run)
    assert record is not None and record["reload_difference"] < 1e-6
    rmse = {row["arm"]: row["test"] for row in record["ladder"]}
    assert rmse["majority"] == pytest.approx(10, rel=0.3)
    assert rmse[strategy] < 1.5 * rmse["head"] and rmse["scratch"] < 1.5 * rmse["head"]
    table = pq.read_table(run / "arms" / f"{strategy}-seed0" / "predictions.parquet",
                          filters=[("split", "=", "test")])  # fmt: skip
    errors = np.subtract(table["prediction"].to_pylist(), table["label"].to_pylist())
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(rmse[strategy])
    sample = json.loads((run / "phases" / "package" / "sample.json").read_text("utf-8"))
    predictions = hftl.load(run).predict([text for (text,) in sample["texts"]])
    values = [row["label"] for row in predictions]
    np.testing.assert_allclose(values, np.ravel(sample["logits"]), rtol=1e-6)
    assert 1900 < np.mean(values) < 2100
    # The history is in the label's unit, too.
    own = next(arm for arm in record["arms"] if arm["arm"] == strategy)
    assert min(row["eval_rmse"] for row in own["training"]["history"] if "eval_rmse" in row) > 1


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([5.0] * 9, r"every target of train is 5, and there is nothing to learn"),
        ([1e6 + 0.01 * i for i in range(9)], r"near 1e\+06 float32 tells numbers 0\.0625 apart"),
        ([1e38, -1e38], r"which float32 cannot hold"),
        ([1e-40 * i for i in range(9)], r"which float32 cannot hold"),
    ],
)
def test_refuses_targets_that_float32_cannot_represent(targets: list[float], message: str) -> None:
    rows = [Row((str(i),), target, None, i, "x") for i, target in enumerate(targets)]
    with pytest.raises(DataError, match=message):
        check_targets(rows)
