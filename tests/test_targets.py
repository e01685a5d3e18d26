"""Check that the unit of regression targets changes neither training nor what is published."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import BAD, FILLER, GOOD, bench_of, write_csv

from hftl.config.measure import Search
from hftl.config.recipe import Recipe
from hftl.config.retain import Retain
from hftl.data.labels import check_targets
from hftl.data.rows import Row
from hftl.errors import DataError, RecipeError
from hftl.finetune import gradual
from hftl.finetune.arm import (
    RegularizerSetup,
    build_finetune_arguments,
    init_head_from_probe,
    solve_head,
    train_arm,
)
from hftl.finetune.baselines import solve_classical, train_scratch
from hftl.finetune.context import ExperimentContext
from hftl.finetune.gradual import GradualCheckpoint
from hftl.finetune.retention import build_setup
from hftl.finetune.targets import compute_target_scale
from hftl.measure.metrics import compute_all_metrics
from hftl.models.heads import get_last_linear_copies
from hftl.pipeline import pipeline
from hftl.retain.kl import KLToOriginal

Change = Callable[[float], float]
UNITS: dict[str, tuple[float, float]] = {"shifted": (1.0, 100.0), "scaled": (1000.0, 0.0)}
"""Factor and shift of the targets."""


def values(rows: int) -> list[tuple[str, float]]:
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


def recipe_of(
    model: Path, folder: Path, factor: float, shift: float, finetune: dict[str, Any], **more: Any
) -> Recipe:
    """Return a recipe of 100 texts whose targets are in this unit."""
    rows = [(text, repr(factor * value + shift)) for text, value in values(100)]
    table = write_csv(folder / f"v-{factor}-{shift}.csv", ["text", "label"], rows)
    training = {"num_train_epochs": 3, "learning_rate": 5e-3, "bf16": False}
    return Recipe.parse({
        "source": {"model": str(model), "published_as": "org/tiny"},
        "data": {"task": "regression", "train": {"path": str(table)}, "max_length": 16},
        "finetune": {"pooling": "mean", "training": training} | finetune,
        **more,
    })  # fmt: skip


def scores(bench: ExperimentContext, outcome: Any) -> dict[str, float]:
    rows = bench.prepared.rows["test"]
    predictions = bench.decode_logits(rows, outcome.logits["test"])
    return compute_all_metrics("regression", bench.prepared.encode_for_metrics(rows), predictions)


def same_scores(run: Callable[[ExperimentContext, Recipe], Any], model: Path, folder: Path,
                finetune: dict[str, Any]) -> None:  # fmt: skip
    """Check that an arm's scores do not depend on the unit, but for those in it, which scale."""
    results = {}
    for name, (factor, shift) in {"plain": (1.0, 0.0), **UNITS}.items():
        recipe = recipe_of(model, folder, factor, shift, finetune)
        bench = bench_of(recipe)
        results[name] = scores(bench, run(bench, recipe))
    for name, (factor, _) in UNITS.items():
        in_unit = {key: value * (factor if key in ("rmse", "mae") else 1)
                   for key, value in results["plain"].items()}  # fmt: skip
        assert results[name] == pytest.approx(in_unit, rel=0.01, abs=1e-3)


def trained(bench: ExperimentContext, recipe: Recipe) -> Any:
    return train_arm(bench, recipe.finetune, 0)


SEARCH = Search(learning_rates=[5e-3], epochs_factor=1)
ARMS: dict[str, tuple[Callable[[ExperimentContext, Recipe], Any], dict[str, Any]]] = {
    "head": (lambda bench, recipe: solve_head(bench, recipe.finetune, 0), {}),
    "classical": (lambda bench, recipe: solve_classical(bench, 0), {}),
    "scratch": (lambda bench, recipe: train_scratch(bench, recipe.finetune, SEARCH, 5e-3, 0), {}),
    "full": (trained, {"strategy": "full"}),
    "random": (trained, {"strategy": "full", "head_init": "random", "pooling": "native"}),
    "partial": (trained, {"strategy": "partial", "blocks": 1}),
    "gradual": (trained, {"strategy": "gradual", "gradual": {"epochs": 1, "final_epochs": 1}}),
    "lora": (trained, {"strategy": "lora", "head_init": "random", "pooling": "native"}),
}


@pytest.mark.parametrize("arm", ARMS)
def test_unit_changes_no_arm(arm: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    run, finetune = ARMS[arm]
    same_scores(run, tiny_model(), tmp_path, finetune)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [(None, False), ("rmse", False), ("eval_mae", False), ("r2", True), ("loss", False)],
)
def test_best_epoch_is_restored(
    metric: str | None, greater: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Less is better of an error."""
    training: dict[str, Any] = {"num_train_epochs": 4, "learning_rate": 2e-2, "bf16": False}
    if metric is not None:
        training["metric_for_best_model"] = metric
    finetune = {"strategy": "full", "head_init": "random", "training": training}
    recipe = recipe_of(tiny_model(), tmp_path, 1.0, 0.0, finetune)
    facts = trained(bench_of(recipe), recipe).facts
    key = "eval_" + (metric or "rmse").removeprefix("eval_")
    values = {row["epoch"]: row[key] for row in facts["history"] if key in row}
    assert facts["best_epoch"] == (max if greater else min)(values, key=values.__getitem__)
    assert len(set(values.values())) == 4


def test_refuses_the_wrong_direction_of_a_metric(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    training = {"metric_for_best_model": "rmse", "greater_is_better": True}
    with pytest.raises(RecipeError, match="of rmse less is better.*Leave it out"):
        build_finetune_arguments(training, "regression", str(tmp_path), 0, "cpu")


TERMS: dict[str, dict[str, Any]] = {
    "kl": {"kl": {"weight": 1.0, "on": "probe"}},
    "l2sp": {"l2sp": {"weight": 0.1, "head": 0.1}},
    "interpolated": {"interpolate": [0.0, 0.5, 1.0]},
}


@pytest.mark.parametrize("strategy", ["full", "lora"])
@pytest.mark.parametrize("term", TERMS)
def test_unit_changes_no_regularizer(
    term: str, strategy: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    def run(bench: ExperimentContext, recipe: Recipe) -> Any:
        retain = Retain.model_validate(TERMS[term])
        setup = build_setup(
            bench, retain, recipe.finetune, 0, lambda _: ({}, {}), lambda b: torch.nn.Module()
        )  # noqa: E501
        return train_arm(bench, recipe.finetune, 0, setup)

    same_scores(run, tiny_model(), tmp_path, {"strategy": strategy, "pooling": "native"})


def test_unit_changes_no_given_reference(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """As the source before adaptation."""

    def run(bench: ExperimentContext, recipe: Recipe) -> Any:
        built = bench.build_model("mean", 0)
        init_head_from_probe(bench, built, "mean", 0)
        variance = float(bench.prepared.encode_targets(bench.select_train_rows(0)).var())
        scale = compute_target_scale(bench, 0)
        assert scale is not None and scale.sd**2 == pytest.approx(variance)
        terms = [KLToOriginal(10.0, "probe", solved=True)]
        return train_arm(bench, recipe.finetune, 0, RegularizerSetup(terms, built.model))

    same_scores(run, tiny_model(), tmp_path, {"strategy": "full"})


def test_interpolation_at_zero_is_the_solved_head(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """It is the model that training starts from, in the label's unit."""
    recipe = recipe_of(tiny_model(), tmp_path, 10.0, 2000.0, {"strategy": "full"})
    bench = bench_of(recipe)
    results = train_arm(bench, recipe.finetune, 0, RegularizerSetup(alphas=(0.0,)))
    solved = solve_head(bench, recipe.finetune, 0)
    np.testing.assert_allclose(results.logits["test"], solved.logits["test"], atol=5e-3)
    assert results.facts["target_scale"]["mean"] == pytest.approx(2000, abs=10)


def test_resumed_gradual_unfreezing_has_the_same_unit(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune = {"strategy": "gradual", "gradual": {"epochs": 1, "final_epochs": 1}}
    recipe = recipe_of(tiny_model(), tmp_path, 10.0, 2000.0, finetune)
    bench, state = bench_of(recipe), GradualCheckpoint(tmp_path / "state", {"of": "this"})
    whole = trained(bench, recipe)
    write = gradual._save_progress

    def stop(*args: Any) -> None:
        write(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gradual, "_save_progress", stop)
        train_arm(bench, recipe.finetune, 0, state=state)
    again = train_arm(bench, recipe.finetune, 0, state=state)
    np.testing.assert_array_equal(again.logits["test"], whole.logits["test"])
    assert all(torch.equal(again.weights[name], whole.weights[name]) for name in whole.weights)


def test_a_small_spread_far_from_zero(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """A spread of 1 around a million: float32 rounds to a sixteenth there, which costs little."""
    results = {}
    for shift in (0.0, 1e6):
        recipe = recipe_of(tiny_model(), tmp_path, 1.0, shift, {"strategy": "full"})
        bench = bench_of(recipe)
        results[shift] = scores(bench, trained(bench, recipe))["rmse"]
    assert results[1e6] == pytest.approx(results[0.0], rel=0.05)


@pytest.mark.parametrize(
    ("strategy", "pooling"), [("lora", "native"), ("lora", "mean"), ("full", "native")]
)
def test_a_run_far_from_zero_is_published_in_the_label_s_unit(
    strategy: str, pooling: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Targets 2000 + 10 v: scratch missed by 199 spreads, LoRA from a random head by 200."""
    finetune = {"strategy": strategy, "head_init": "random", "pooling": pooling}
    finetune["training"] = {"num_train_epochs": 10, "learning_rate": 5e-3, "bf16": False}
    measure = {"seeds": [0], "metric": "rmse", "arms": ["scratch", "head", "majority"],
               "scratch": {"learning_rates": [5e-3], "epochs_factor": 1}}  # fmt: skip
    recipe = recipe_of(tiny_model(), tmp_path, 10.0, 2000.0, finetune, measure=measure)
    run = tmp_path / "run"
    record = pipeline.run(recipe, run)
    assert record is not None and record["reload_difference"] < 1e-6
    rmse = {row["arm"]: row["test"] for row in record["ladder"]}
    assert rmse["majority"] == pytest.approx(10, rel=0.3)
    assert rmse[strategy] < 1.5 * rmse["head"] and rmse["scratch"] < 1.5 * rmse["head"]
    table = pq.read_table(run / "arms" / f"{strategy}-seed0" / "predictions.parquet",
                          filters=[("split", "=", "test")])  # fmt: skip
    errors = np.subtract(table["prediction"].to_pylist(), table["label"].to_pylist())
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(rmse[strategy])
    sample = json.loads((run / "phases" / "package" / "sample.json").read_text("utf-8"))
    import hftl

    predictions = hftl.load(run).predict([text for (text,) in sample["texts"]])
    np.testing.assert_allclose(
        [row["label"] for row in predictions], np.ravel(sample["logits"]), rtol=1e-6
    )
    assert 1900 < np.mean([row["label"] for row in predictions]) < 2100
    # The history is in the label's unit, too.
    own = next(arm for arm in record["arms"] if arm["arm"] == strategy)
    assert min(row["eval_rmse"] for row in own["training"]["history"] if "eval_rmse" in row) > 1


def test_wrapped_head_has_the_same_unit(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from hftl.finetune.trainable import prepare

    recipe = recipe_of(tiny_model(), tmp_path, 10.0, 2000.0, {"pooling": "native"})
    bench = bench_of(recipe)
    built = bench.build_model("native", 0)
    init_head_from_probe(bench, built, "native", 0)
    model = prepare(built.model, "lora", fresh=built.fresh)
    copies = get_last_linear_copies(model, built.architecture)
    before = [copy.bias.item() for copy in copies]
    assert len(copies) == 2 and before[0] == before[1] != 0
    scale = compute_target_scale(bench, 0)
    assert scale is not None
    scale.standardize_head(model)
    assert [copy.bias.item() for copy in copies] == pytest.approx(
        [(before[0] - scale.mean) / scale.sd] * 2
    )
    scale.restore_head(model)
    assert [copy.bias.item() for copy in copies] == pytest.approx(before)


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


def test_shots_of_one_value_give_that_value(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_model(), tmp_path, 1000.0, 70.0, {"strategy": "full"})
    tree = recipe.to_dict()
    tree["data"]["shots"] = 1
    bench = bench_of(Recipe.parse(tree))
    (row,) = bench.select_train_rows(0)
    results = trained(bench, recipe).logits["test"][:, 0]
    assert np.ptp(results) < abs(row.label) / 10  # pyright: ignore
    assert results == pytest.approx(row.label, rel=0.1)
