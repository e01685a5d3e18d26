"""Check the sweep of learning rates: halving, parts, what is measured where, and the command."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import yaml
from conftest import bench_of, sentences, write_csv
from support.command import Hftl

from hftl.analysis import sweep as sweep_module
from hftl.analysis.layer_rates import (
    apply_setting,
    change_parts,
    compute_mean_rate,
    group_parts,
    list_settings,
    select_factors,
)
from hftl.analysis.sweep import CHOOSING, HELD, SweepOptions, halve_validation, sweep_rates
from hftl.analysis.sweep_facts import PartEffect, RateSetting, SweepAnalysis
from hftl.card.analysis_plots import plot_sweep
from hftl.config.finetune import Finetune
from hftl.config.recipe import Recipe
from hftl.errors import DataError, NumericError
from hftl.pipeline import sweep as pipeline_sweep
from hftl.train.optimizer import LayerLearningRates

pytestmark = pytest.mark.usefixtures("fast_reload", "fewer_folds")


def test_settings_are_all_pairs_and_the_recipes_own() -> None:
    finetune = Finetune.model_validate(
        {"strategy": "full", "layer_decay": 0.9, "lr": {"head": 1e-2, "blocks": [0.0, 1e-5]},
         "training": {"learning_rate": 1e-4, "num_train_epochs": 4, "max_steps": 30}}
    )  # fmt: skip
    settings = list_settings(finetune, (), (0.5,))
    assert [one.name for one in settings] == [
        "one rate 3.33e-05", "one rate 0.0001", "one rate 0.0003", "3.33e-05, decay 0.5",
        "0.0001, decay 0.5", "0.0003, decay 0.5", "the recipe's",
    ]  # fmt: skip
    assert len(list_settings(finetune, (), ())) == 3 * 5 + 1
    assert [one.is_single for one in settings] == [True] * 3 + [False] * 4
    assert apply_setting(finetune, settings[-1]) == finetune
    quarter = apply_setting(finetune, settings[1], 0.25)
    assert quarter.lr is None and quarter.layer_decay is None
    assert quarter.training["num_train_epochs"] == 1 and quarter.training["max_steps"] == 8
    assert quarter.gradual.epochs == 0.25
    parts = ["embeddings", "block 1", "block 2"]
    assert compute_mean_rate(settings[4], parts, 2) == pytest.approx(1e-4 * 0.875 / 3)
    assert compute_mean_rate(settings[-1], ["block 1", "block 2"], 2) == pytest.approx(5e-6)


def test_many_blocks_are_searched_by_neighbours() -> None:
    names = ["embeddings", *(f"block {n}" for n in range(1, 8)), "head"]
    assert list(group_parts(names)) == names[:-1]
    parts = group_parts(names, 3)
    assert list(parts) == ["embeddings", "blocks 1-3", "blocks 4-6", "block 7"]
    single = RateSetting(name="one", learning_rate=2.0)
    changed = change_parts(single, {"blocks 4-6": 3.0, "embeddings": 0.0}, parts, 7, "x")
    assert changed.blocks == (2, 2, 2, 6, 6, 6, 2) and changed.embeddings == 0
    assert change_parts(single, {}, group_parts(["block 2", "head"]), 2, "x").embeddings is None


def make_effect(part: str, factor: float, gain: float | None, error: float = 0.01) -> PartEffect:
    return PartEffect(part=part, factor=factor, gain=gain, error=error, ci95=None)


def test_a_part_changes_where_that_gains_more_than_its_error() -> None:
    effects = [
        make_effect("block 1", 0.0, 0.02), make_effect("block 1", 3.0, 0.03),
        make_effect("block 2", 0.0, 0.009), make_effect("block 2", 3.0, None),
        make_effect("block 3", 0.0, -0.2),
    ]  # fmt: skip
    assert select_factors(effects) == {"block 1": 3.0}


@pytest.mark.parametrize(
    ("outcome", "winner"),
    [("positive", "two"), ("equivalent", "two"), ("undetermined", "two"), ("negative", "one")],
)
def test_rates_by_layer_win_unless_they_lose_where_nothing_was_chosen(
    outcome: str, winner: str
) -> None:
    one, two = (RateSetting(name=name, learning_rate=1.0) for name in ("one", "two"))
    rungs: Any = {
        name: [SimpleNamespace(share=1.0, score=score)]
        for name, score in (("one", 0.7), ("two", 0.8))
    }
    search: Any = SimpleNamespace(rank=lambda score: score)
    held: Any = SimpleNamespace(outcome=outcome)
    assert sweep_module._choose_winner(search, rungs, one, two, held).name == winner


@pytest.fixture
def swept(recipe_tree: dict[str, Any], tmp_path: Path) -> Recipe:
    """Return a recipe with groups, so that halves are cut between them."""
    rows = [(text, label, f"d{i // 2}") for i, (text, label) in enumerate(sentences(300))]
    table = write_csv(tmp_path / "grouped.csv", ["text", "label", "doc"], rows)
    recipe_tree["data"] |= {
        "train": {"path": str(table)}, "group": "doc", "validation": {"fraction": 0.4}
    }  # fmt: skip
    recipe_tree["finetune"]["strategy"] = "full"
    return Recipe.parse(recipe_tree)


def test_halves_share_no_group_and_are_neither_train_nor_test(swept: Recipe) -> None:
    context = bench_of(swept)
    halves = halve_validation(context).prepared.rows
    groups = [{row.group for row in halves[name]} for name in (CHOOSING, HELD)]
    assert not groups[0] & groups[1] and min(map(len, groups)) > 20
    whole = {row.index for row in context.prepared.rows["validation"]}
    assert {r.index for name in (CHOOSING, HELD) for r in halves[name]} == whole


class Simulation:
    """Predict with a known accuracy in place of training, and record what is trained."""

    def __init__(self, quality: dict[str, float]) -> None:
        self.quality, self.trained = quality, []

    def __call__(
        self, context: Any, setting: RateSetting, share: float, seed: int
    ) -> dict[str, np.ndarray] | None:
        self.trained.append((setting.name, share, seed))
        quality = self.quality.get(setting.name, 0.7)
        if quality == 0:
            return None
        logits = {}
        for half in (CHOOSING, HELD):
            targets = context.prepared.encode_targets(context.prepared.rows[half])
            ease = np.random.default_rng(half == HELD).random(len(targets))
            rng = np.random.default_rng([seed, crc32(setting.name.encode()), half == HELD])
            ease = np.where(rng.random(len(targets)) < 0.3, rng.random(len(targets)), ease)
            logits[half] = np.eye(2)[np.where(ease < quality, targets, 1 - targets)]
        return logits


def test_the_best_goes_on_and_is_measured_on_other_rows_and_seeds(
    swept: Recipe, tmp_path: Path
) -> None:
    context = bench_of(swept)
    train = Simulation({"0.005, decay 0.5": 0.99, "one rate 0.05": 0.0, "block 2 x 3": 1.0,
                        "by part": 0.75})  # fmt: skip
    options = SweepOptions((0.005, 0.05), (0.5, 0.9), 3)
    facts = sweep_rates(swept, context, options, train)
    assert facts.single == "one rate 0.005" and facts.winner == "0.005, decay 0.5"
    assert facts.layerwise == facts.winner and facts.held.seeds == [1, 2, 3]
    assert facts.held.gain.value > 0.1 and facts.held.outcome == "positive"
    search = [(name, share) for name, share, seed in train.trained if seed == 0]
    assert len(search) == len(set(search)), "a setting trains once at a share"
    assert [name for name, _, seed in train.trained if seed != 0] == [facts.winner] * 3 + [
        facts.single
    ] * 3
    assert facts.trainings == len(train.trained)
    rungs = {trial.setting.name: trial.rungs for trial in facts.trials}
    assert [r.share for r in rungs[facts.single]] == [0.25, 0.5, 1.0], "one rate always goes on"
    assert rungs["one rate 0.05"][0].score is None and len(rungs["one rate 0.05"]) == 1
    by_part = {(e.part, e.factor): e for e in facts.parts}
    assert len(by_part) == 2 * 4 and by_part["block 2", 3.0].is_clear
    assert facts.get_setting("by part").blocks is not None
    plot_sweep(facts, tmp_path / "sweep.png")
    assert SweepAnalysis.model_validate(json.loads(json.dumps(facts.to_dict()))) == facts
    with pytest.raises(NumericError, match="diverged at every rate"):
        sweep_rates(swept, context, options, Simulation(
            dict.fromkeys(("one rate 0.005", "one rate 0.05"), 0.0)))  # fmt: skip


def cover_null(trials: int, context: Any, recipe: Recipe) -> tuple[float, float]:
    """Return how often a gain that is none is found, on held rows and on those that choose."""
    positives = optimistic = 0
    for trial in range(trials):
        offset = Simulation({})

        def train(context: Any, setting: Any, share: float, seed: int) -> Any:
            return offset(context, setting, share, 1000 * trial + seed)  # noqa: B023

        facts = sweep_rates(recipe, context, SweepOptions((0.005, 0.05), (0.5, 0.9), 2), train)
        positives += facts.held.outcome in ("positive", "negative")
        scores = {t.setting.name: t.rungs[-1].score for t in facts.trials}
        optimistic += (scores[facts.layerwise] or 0) > (scores[facts.single] or 0)
    return positives / trials, optimistic / trials


@pytest.mark.slow
def test_a_search_among_equals_finds_a_gain_in_one_of_20(
    swept: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = bench_of(swept)
    rates = context.list_learning_rates(swept.finetune, LayerLearningRates())
    monkeypatch.setattr(type(context), "list_learning_rates", lambda *_: rates)
    positives, optimistic = cover_null(300, context, swept)
    assert positives <= 0.08 and optimistic > 0.6, (positives, optimistic)


def test_sweep_command(
    hftl: Hftl, recipe_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_tree["data"]["validation"] = {"fraction": 0.3}
    recipe_tree["finetune"] |= {"strategy": "partial", "blocks": 1, "layer_decay": 0.8}
    path, run, target = tmp_path / "r.yaml", tmp_path / "out", tmp_path / "rates.yaml"
    path.write_text(yaml.safe_dump(recipe_tree))
    calls: list[int] = []
    train = pipeline_sweep.train_arm
    monkeypatch.setattr(
        pipeline_sweep, "train_arm", lambda *a, **k: (calls.append(1), train(*a, **k))[1]
    )
    words = ["sweep", path, "finetune.training.num_train_epochs=1", "--rates", "0.005",
             "--decays", "0.5", "--seeds", 2, "--output", run]  # fmt: skip
    outcome = hftl(*words, "--write", target)
    assert outcome.code == 0, outcome.err
    facts = SweepAnalysis.model_validate_json((run / "analysis" / "sweep.json").read_text())
    assert len(calls) == facts.trainings and "gain by layer" in outcome.out
    assert {trial.setting.name for trial in facts.trials} >= {
        "one rate 0.005", "0.005, decay 0.5", "the recipe's"
    }  # fmt: skip
    assert (run / "analysis" / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    written, setting = Recipe.load(target), facts.get_setting(facts.winner)
    assert written.finetune.training["learning_rate"] == setting.learning_rate
    assert written.finetune.layer_decay == setting.layer_decay
    assert (written.finetune.lr is None) == (setting.blocks is None)
    count = len(calls)
    assert hftl(*words).code == 0 and len(calls) == count, "what was trained is not trained again"
    more = [*words[:-4], "--seeds", 3, "--output", run]
    assert hftl(*more).code == 0 and len(calls) == count + 2

    hftl(*words, "--write", target).assert_error(2, "rates.yaml exists")
    hftl("sweep", path, "--rates", "x").assert_error(2, "--rates x")
    hftl("sweep", path, "--decays", "1.5").assert_error(2, "below 1")
    head = ["finetune.strategy=head", "finetune.layer_decay=null"]
    hftl("sweep", path, *head, "--output", run).assert_error(2, "is solved")
    hftl("sweep", path, "retain={kl: {weight: 0.1}}", "--output", run).assert_error(2, "retain")
    few = "data.validation={fraction: 0.1}"
    hftl("sweep", path, few, "--output", run).assert_error(3, "validation has 16 rows")


def test_sweep_and_probe_are_of_one_process(
    hftl: Hftl, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    hftl("sweep", recipe_file).assert_error(2, "one process", "2 were launched")
    hftl("probe", recipe_file).assert_error(2, "one process")


def test_too_few_rows_to_halve(recipe_tree: dict[str, Any]) -> None:
    recipe_tree["data"]["validation"] = {"fraction": 0.1}
    with pytest.raises(DataError, match="halves of 8 and 8"):
        halve_validation(bench_of(Recipe.parse(recipe_tree)))
