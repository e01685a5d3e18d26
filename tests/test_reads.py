"""Which changed keys stop a run that goes on, and which only add to it."""

from pathlib import Path
from typing import Any

import pytest

from hftl.config.overrides import apply_overrides
from hftl.config.recipe import Recipe
from hftl.errors import RunFolderError
from hftl.pipeline import pipeline
from hftl.pipeline.cache_keys import (
    build_arm_key,
    build_data_key,
    describe_changes,
    refuse_changed,
    select_recipe_values,
)
from hftl.runtime import run_folder

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
    """A folder where the data and every arm of `recipe()` stand."""
    made = recipe()
    with run_folder.commit_stage(tmp_path / "phases" / "data", {"recipe": build_data_key(made)}):
        pass
    for arm in made.arms:
        for seed in made.measure.seeds:
            read = build_arm_key(made, arm)
            reads = {"recipe": read, "asked": select_recipe_values(made, read), "weights": "w"}
            with run_folder.commit_stage(tmp_path / "arms" / f"{arm.name}-seed{seed}", reads):
                pass
    return tmp_path


@pytest.mark.parametrize(
    "assignment",
    [
        "measure.seeds=[0, 1, 2]",
        "measure.arms=[scratch, head, majority]",
        "measure.arms=[]",
        "measure.arms=[{full: {finetune.training.learning_rate: 1e-5}}]",
        "measure.metric=f1",
        "measure.scratch.epochs_factor=1",
        "publish.private=false",
        "data.train.path=moved/b.csv",
        "finetune.blocks=3",
        "finetune.lora={r: 8, lora_alpha: 16}",
        "source.published_as=org/model",
    ],
)
def test_what_may_change(run: Path, assignment: str) -> None:
    made = recipe(assignment)
    refuse_changed(made, run, made.arms)


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("finetune.lora.r=16", "finetune.lora.r: 8 -> 16"),
        ("finetune.lora.lora_dropout=0.1", "finetune.lora.lora_dropout: unset -> 0.1"),
        ("finetune.training.num_train_epochs=9", "finetune.training.num_train_epochs: 5 -> 9"),
        ("finetune.training.learning_rate=1e-4", "training.learning_rate: 0.0005 -> 0.0001"),
        ("finetune.pooling=mean", "finetune.pooling: native -> mean"),
        ("finetune.head_init=random", "finetune.head_init: probe -> random"),
        ("data.seed=1", "data.seed: 0 -> 1"),
        ("data.shots=4", "data.shots: None -> 4"),
        ("data.test={fraction: 0.3}", "data.test.fraction: 0.2 -> 0.3"),
        ("data.train.text=review", "data.train.text: text -> review"),
        ("data.max_length=64", "data.max_length: 128 -> 64"),
        ("data.group=who", "data.group: None -> who"),
    ],
)  # fmt: skip
def test_what_a_finished_part_has_read_may_not(run: Path, assignment: str, told: str) -> None:
    made = recipe(assignment)
    with pytest.raises(RunFolderError) as caught:
        refuse_changed(made, run, made.arms)
    assert told in str(caught.value)
    assert "--restart" in caught.value.fix
    assert caught.value.exit_code == 4


def test_all_changes_are_named_once(run: Path) -> None:
    made = recipe("data.seed=1", "finetune.lora.r=4")
    with pytest.raises(RunFolderError) as caught:
        refuse_changed(made, run, made.arms)
    assert str(caught.value).count("->") == 2


def test_what_no_wanted_arm_has_read_may_change(run: Path) -> None:
    made = recipe("finetune.strategy=head", "finetune.lora.r=4", "measure.arms=[]")
    refuse_changed(made, run, made.arms)


def test_a_new_folder_refuses_nothing(tmp_path: Path) -> None:
    made = recipe("data.seed=1")
    refuse_changed(made, tmp_path, made.arms)


def test_a_damaged_part_is_not_passed_over(run: Path) -> None:
    (run / "arms" / "head-seed1" / run_folder.MANIFEST).write_text("{", encoding="utf-8")
    made = recipe()
    with pytest.raises(RunFolderError, match="head-seed1"):
        refuse_changed(made, run, made.arms)


def test_the_data_read_neither_the_path_nor_the_length_in_tokens() -> None:
    read = build_data_key(recipe())
    assert not {"data.train.path", "data.train.format", "data.max_length"} & read.keys()
    assert {"data.train.text", "data.train.label", "data.seed", "data.shots"} <= read.keys()


def test_an_arm_reads_what_its_strategy_uses() -> None:
    found = {arm.name: build_arm_key(recipe(), arm) for arm in recipe().arms}
    assert set(found["head"]) == {"finetune.pooling", "data.max_length", "data.shots"}
    assert "finetune.lora.r" in found["lora"]
    assert "finetune.lora.r" not in found["full"]
    assert found["full"]["finetune.training.learning_rate"] == 5e-5
    assert found["classical"] == {"data.shots": None}
    assert found["scratch"]["measure.scratch.epochs_factor"] == 3


def test_gradual_unfreezing_counts_its_own_epochs(tmp_path: Path) -> None:
    made = recipe("finetune.strategy=gradual", "measure.arms=[]")
    (arm,) = made.arms
    read = build_arm_key(made, arm)
    assert "finetune.training.learning_rate" in read and "finetune.gradual.epochs" in read
    with run_folder.commit_stage(tmp_path / "arms" / "gradual-seed0", {
        "recipe": read, "asked": select_recipe_values(made, read), "weights": "w",
    }):  # fmt: skip
        pass
    unread = "finetune.training.num_train_epochs=9"
    other = recipe("finetune.strategy=gradual", "measure.arms=[]", unread)
    refuse_changed(other, tmp_path, other.arms)
    other = recipe("finetune.strategy=gradual", "measure.arms=[]", "finetune.gradual.epochs=2")
    with pytest.raises(RunFolderError, match="finetune.gradual.epochs: 1"):
        refuse_changed(other, tmp_path, other.arms)


def test_the_strategy_counts_where_the_name_does_not_say_it() -> None:
    made = recipe("measure.arms=[{top: {finetune.strategy: partial}}]")
    assert build_arm_key(made, made.arms[1])["finetune.strategy"] == "partial"


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1, "b": 2}, {"a": 2, "b": 2}, ["a: 1 -> 2"]),
        ({"b": 1}, {"a": None, "b": 1}, []),
        ({"a": 1}, {}, ["a: 1 -> unset"]),
        ({}, {"b": 0, "a": []}, ["a: unset -> []", "b: unset -> 0"]),
    ],
)
def test_changed(old: dict[str, Any], new: dict[str, Any], lines: list[str]) -> None:
    assert describe_changes(old, new) == lines


def test_arms_that_another_version_trained_are_never_averaged_with_new_ones(
    recipe_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old and new seeds of one regression gave an rmse of 66.8, of 99.7, 99.7 and 1.1."""
    recipe_tree["finetune"]["strategy"] = "head"
    recipe_tree["measure"] |= {"arms": [], "seeds": [0]}
    pipeline.run(Recipe.parse(recipe_tree), tmp_path / "run", until="finetune")
    pipeline.run(Recipe.parse(recipe_tree), tmp_path / "run", until="finetune")
    monkeypatch.setattr("hftl.pipeline.arms.SEMANTICS", 3)
    recipe_tree["measure"]["seeds"] = [0, 1]
    with pytest.raises(RunFolderError, match="an older hftl, which trained otherwise.*restart"):
        pipeline.run(Recipe.parse(recipe_tree), tmp_path / "run", until="finetune")
