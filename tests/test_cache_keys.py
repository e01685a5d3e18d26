"""Check which changed recipe keys stop a run that goes on, and which only add to it."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from hftl.config.overrides import apply_overrides
from hftl.config.recipe import Arm, Recipe
from hftl.errors import RecipeError, RunFolderError
from hftl.pipeline import pipeline
from hftl.pipeline.cache_keys import (
    ADAPT_RULES,
    DATA_RULES,
    GENERAL_RULES,
    ORIGINAL_RULES,
    SEMANTICS,
    CacheRules,
    build_adapt_key,
    build_arm_key,
    build_data_key,
    build_general_key,
    build_original_key,
    flatten_recipe,
    get_arm_rules,
    select_recipe_values,
)
from hftl.pipeline.changed_inputs import describe_changes, refuse_changed
from hftl.runtime import run_folder

pytestmark = pytest.mark.usefixtures("fast_reload")

PLACES = ("path", "format", "split", "revision", "name")
FULL = {"full": {"finetune.training.learning_rate": 5e-5}}


def recipe(*overrides: str) -> Recipe:
    tree: dict[str, Any] = {
        "source": {"model": "org/model"},
        "data": {"train": {"path": "a.csv"}},
        "measure": {"seeds": [0, 1], "arms": ["scratch", "head", FULL]},
    }
    return Recipe.parse(apply_overrides(tree, list(overrides)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Make a folder where the data and every arm of `recipe()` stand."""
    made = recipe()
    with run_folder.commit_stage(tmp_path / "phases" / "data", {"recipe": build_data_key(made)}):
        pass
    for arm in made.arms:
        for seed in made.measure.seeds:
            commit_arm(tmp_path / "arms" / f"{arm.name}-seed{seed}", made, arm)
    return tmp_path


def commit_arm(folder: Path, made: Recipe, arm: Arm) -> None:
    key = build_arm_key(made, arm)
    inputs = {"recipe": key, "asked": select_recipe_values(made, key), "semantics": SEMANTICS}
    with run_folder.commit_stage(folder, inputs):
        pass


WHOLE: dict[str, Any] = {
    "source": {"model": "org/model"},
    "data": {
        "train": {"path": "a.csv"}, "unlabeled": {"path": "u.csv"},
        "general": {"path": "g.csv", "label": "label"},
    },
    "adapt": {"objective": "mlm"},
    "finetune": {"lr": {"head": 1e-3}},
    "retain": {
        "kl": {"weight": 0.3}, "l2sp": {"weight": 0.1}, "ewc": {"weight": 1.0},
        "replay": {"ratio": 0.5, "labelled": True, "weight": 0.5}, "interpolate": [0.5, 1.0],
    },
    "measure": {"arms": ["scratch", "head", "majority", "partial", "gradual", "full",
                         "zero_shot"]},
}  # fmt: skip
"""A recipe in which every section is given, so that every key of the schema has a value."""
OTHER_VALUES: dict[str, Any] = {
    "data.task": "multi-label", "data.bad_rows": "skip", "data.augment": "light",
    "data.group": "who", "data.shots": 4, "data.image_size": 64,
    "finetune.strategy": "head", "finetune.pooling": "mean", "finetune.head_init": "random",
    "finetune.patience": 2, "finetune.class_weight": "balanced", "finetune.cache": "never",
    "finetune.layer_decay": 0.9, "finetune.lr.embeddings": 1e-5,
    "finetune.lr.blocks": [1e-5],
    "measure.metric": "f1", "measure.arms": ["head"],
    "data.train.format": "csv", "data.unlabeled.format": "csv", "data.general.format": "csv",
    "publish.license": "mit", "publish.language": "en",
    "publish.benchmark": {"dataset": "o/d", "task_id": "t"},
    "publish.emissions": {"grams_per_kwh": 30, "location": "x"},
    "adapt.objective": "mae", "adapt.corpus": "task", "adapt.method": "lora",
    "adapt.guard": "general", "adapt.tolerance": 0.3,
    "retain.reference": "source", "retain.kl.on": "probe", "retain.kl.direction": "reverse",
    "retain.kl.inputs": "both", "retain.kl.tau": 0.1, "retain.ewc.fisher": "empirical",
}  # fmt: skip
"""Of keys whose type does not say what another value could be."""


MADE = Recipe.parse(WHOLE)
FLAT = flatten_recipe(MADE)


def change_value(key: str, value: Any) -> Any:
    """Return another value of a recipe key."""
    if key in OTHER_VALUES:
        return OTHER_VALUES[key]
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value / 2 or 0.25
        case list():
            return value[:1]
        case _:
            return f"{value or 'x'}2"


RULES: dict[str, CacheRules] = {
    "data": DATA_RULES, "general": GENERAL_RULES, "adapt": ADAPT_RULES,
    "original": ORIGINAL_RULES,
    **{f"arm {arm.name}": get_arm_rules(arm) for arm in MADE.arms},
}  # fmt: skip


def _format(value: object) -> str:
    """Return a value as a refusal shows it: 5.0 is 5."""
    return f"{value:g}" if isinstance(value, float) else str(value)


@pytest.mark.parametrize("key", FLAT)
def test_each_key_is_read_or_named_as_irrelevant_with_a_reason(key: str) -> None:
    """A changed key changes the cache key of every part that does not name it as irrelevant."""
    before, after = {key: FLAT[key]}, {key: change_value(key, FLAT[key])}
    reasons = {part: rule.explain(key) for part, rule in RULES.items()}
    for part, rule in RULES.items():
        changes = describe_changes(rule.select(before), rule.select(after))
        line = f"{key}: {_format(before[key])} -> {_format(after[key])}"
        assert changes == ([line] if reasons[part] is None else []), part
        assert reasons[part] != "", f"{part} ignores {key} without a reason"
    section, _, name = key.partition(".")
    by_hash = section == "source" or name.rpartition(".")[2] in PLACES
    by_hash |= key == "data.unlabeled.label"
    changes_speed_alone = key == "finetune.cache"
    if section not in ("measure", "publish") and not by_hash and not changes_speed_alone:
        assert None in reasons.values(), f"no part reads {key}"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder in which every part of WHOLE is finished."""
    folder = tmp_path_factory.mktemp("run")
    parts = {"data": build_data_key(MADE), "adapt-1": build_adapt_key(MADE, MADE.stages, 1)}
    for name, key in parts.items():
        inputs = {"recipe": key, "semantics": SEMANTICS}
        with run_folder.commit_stage(folder / "phases" / name, inputs):
            pass
    for arm in MADE.arms:
        commit_arm(folder / "arms" / f"{arm.name}-seed0", MADE, arm)
    return folder


@pytest.mark.parametrize("key", FLAT)
def test_each_changed_key_is_refused_or_runs_again_or_changes_nothing(
    whole_run: Path, key: str
) -> None:
    value = change_value(key, FLAT[key])
    try:
        other = Recipe.parse(apply_overrides(deepcopy(WHOLE), [f"{key}={json.dumps(value)}"]))
    except RecipeError:
        # The recipe itself is refused, so that no run goes on under it.
        return
    readers = {part for part, rule in RULES.items() if rule.explain(key) is None}
    if key.startswith("measure.") or not readers - {"general", "original"}:
        refuse_changed(other, whole_run, other.arms)
        return
    with pytest.raises(RunFolderError, match=f"{re.escape(key)}: .* -> "):
        refuse_changed(other, whole_run, other.arms)


def test_the_keys_of_the_schema_are_all_tried() -> None:
    """A section that WHOLE leaves out would hide its keys from the test above."""
    schema = Recipe.model_json_schema()
    names = {name for part in [schema, *schema["$defs"].values()] for name in part["properties"]}
    tried = {part for key in FLAT for part in key.split(".")}
    tried |= {name for value in OTHER_VALUES.values() if isinstance(value, dict) for name in value}
    assert names <= tried, f"give {sorted(names - tried)} in WHOLE"


def test_the_keys_are_selected_by_the_rules() -> None:
    assert build_data_key(MADE) == DATA_RULES.select(FLAT)
    assert build_general_key(MADE) == GENERAL_RULES.select(FLAT)
    assert build_original_key(MADE) == ORIGINAL_RULES.select(FLAT)
    assert build_adapt_key(MADE, MADE.stages, 1) == ADAPT_RULES.select(
        {key: value for key, value in FLAT.items() if not key.startswith("retain.")}
    )
    assert build_arm_key(MADE, MADE.arms[0]) == get_arm_rules(MADE.arms[0]).select(FLAT)


@pytest.mark.parametrize(
    "assignment",
    [
        "measure.seeds=[0, 1, 2]", "measure.arms=[scratch, head, majority]", "measure.arms=[]",
        "measure.arms=[{full: {finetune.training.learning_rate: 1e-5}}]", "measure.metric=f1",
        "measure.scratch.epochs_factor=1", "publish.private=false", "data.train.path=moved/b.csv",
        "finetune.blocks=3", "finetune.lora={r: 8, lora_alpha: 16}",
        "source.published_as=org/model",
    ],
)  # fmt: skip
def test_a_key_that_no_finished_part_has_read_may_change(run: Path, assignment: str) -> None:
    made = recipe(assignment)
    refuse_changed(made, run, made.arms)


@pytest.mark.parametrize(
    ("assignment", "change"),
    [
        ("finetune.lora.r=16", "finetune.lora.r: 8 -> 16"),
        ("finetune.lora.lora_dropout=0.1", "finetune.lora.lora_dropout: unset -> 0.1"),
        ("data.shots=4", "data.shots: None -> 4"),
        ("data.test={fraction: 0.3}", "data.test.fraction: 0.2 -> 0.3"),
    ],
)
def test_a_key_that_a_finished_part_has_read_may_not_change(
    run: Path, assignment: str, change: str
) -> None:
    made = recipe(assignment)
    with pytest.raises(RunFolderError) as caught:
        refuse_changed(made, run, made.arms)
    assert change in str(caught.value)
    assert "--restart" in caught.value.fix
    assert caught.value.exit_code == 4


def test_a_key_that_no_planned_arm_reads_may_change(run: Path, tmp_path: Path) -> None:
    made = recipe("finetune.strategy=head", "finetune.lora.r=4", "measure.arms=[]")
    refuse_changed(made, run, made.arms)
    refuse_changed(recipe("data.seed=1"), tmp_path / "new", made.arms)


def test_an_arm_may_be_named_as_the_folder_of_another(run: Path) -> None:
    made = recipe("measure.arms=[{lora-seed1: {finetune.lora.r: 2}}]")
    commit_arm(run / "arms" / "lora-seed1-seed0", made, made.arms[1])
    refuse_changed(made, run, made.arms)


def test_an_adaptation_of_an_older_version_is_refused(tmp_path: Path) -> None:
    inputs = {"recipe": build_adapt_key(MADE, MADE.stages, 1), "semantics": SEMANTICS - 1}
    with run_folder.commit_stage(tmp_path / "phases" / "adapt-1", inputs):
        pass
    with pytest.raises(RunFolderError, match="an older hftl, which trained otherwise: adapt-1"):
        refuse_changed(MADE, tmp_path, [])


def test_a_damaged_part_is_not_passed_over(run: Path) -> None:
    (run / "arms" / "head-seed1" / run_folder.MANIFEST).write_text("{", encoding="utf-8")
    made = recipe()
    with pytest.raises(RunFolderError, match="head-seed1"):
        refuse_changed(made, run, made.arms)


def test_an_arm_reads_the_keys_that_its_strategy_uses() -> None:
    keys = {arm.name: build_arm_key(recipe(), arm) for arm in recipe().arms}
    assert set(keys["head"]) == {
        "finetune.strategy", "finetune.pooling", "finetune.class_weight", "data.max_length",
        "data.image_size", "data.shots",
    }  # fmt: skip
    assert "finetune.lora.r" in keys["lora"] and "finetune.lora.r" not in keys["full"]
    assert keys["full"]["finetune.training.learning_rate"] == 5e-5
    assert keys["classical"] == {
        "data.shots": None, "data.image_size": None, "finetune.class_weight": None,
    }  # fmt: skip
    assert keys["scratch"]["finetune.focal_gamma"] == 0
    majority = recipe("measure.arms=[majority]")
    assert "finetune.class_weight" not in build_arm_key(majority, majority.arms[1])
    assert keys["scratch"]["measure.scratch.epochs_factor"] == 3
    data = build_data_key(recipe())
    assert not {"data.train.path", "data.train.format", "data.max_length"} & data.keys()
    top = recipe("measure.arms=[{top: {finetune.strategy: partial}}]")
    assert build_arm_key(top, top.arms[1])["finetune.strategy"] == "partial"


def test_gradual_unfreezing_counts_its_own_epochs(tmp_path: Path) -> None:
    words = ("finetune.strategy=gradual", "measure.arms=[]")
    made = recipe(*words)
    commit_arm(tmp_path / "arms" / "gradual-seed0", made, made.arms[0])
    other = recipe(*words, "finetune.training.num_train_epochs=9")
    refuse_changed(other, tmp_path, other.arms)
    other = recipe(*words, "finetune.gradual.epochs=2", "finetune.training.learning_rate=0.1")
    with pytest.raises(RunFolderError, match="finetune.gradual.epochs: 1") as caught:
        refuse_changed(other, tmp_path, other.arms)
    assert str(caught.value).count("->") == 2, "all changes are named once"


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 20.0}, {"a": 5.0}, ["a: 20 -> 5"]),
        ({"a": 0.5}, {"a": 1e300}, ["a: 0.5 -> 1e+300"]),
        ({"a": 1, "b": 2}, {"a": 2, "b": 2}, ["a: 1 -> 2"]),
        ({"b": 1}, {"a": None, "b": 1}, []),
        ({"a": 1}, {}, ["a: 1 -> unset"]),
        ({}, {"b": 0, "a": []}, ["a: unset -> []", "b: unset -> 0"]),
    ],
)
def test_changes_are_described_line_by_line(
    old: dict[str, Any], new: dict[str, Any], lines: list[str]
) -> None:
    assert describe_changes(old, new) == lines


def test_arms_that_another_version_trained_are_never_averaged_with_new_ones(
    recipe_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old and new seeds of one regression gave an rmse of 66.8, of 99.7, 99.7 and 1.1."""
    recipe_tree["finetune"]["strategy"] = "head"
    recipe_tree["measure"] |= {"arms": [], "seeds": [0]}
    pipeline.run(Recipe.parse(recipe_tree), tmp_path / "run", until="finetune")
    pipeline.run(Recipe.parse(recipe_tree), tmp_path / "run", until="finetune")
    monkeypatch.setattr("hftl.pipeline.changed_inputs.SEMANTICS", SEMANTICS + 1)
    recipe_tree["measure"]["seeds"] = [0, 1]
    with pytest.raises(RunFolderError, match="an older hftl, which trained otherwise.*restart"):
        pipeline.run(Recipe.parse(recipe_tree), tmp_path / "run", until="finetune")
