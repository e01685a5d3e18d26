"""The `adapt` section of a recipe: its defaults, its arms, and every refusal in one clear line."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from hftl.adapt.guard import GuardEvaluation
from hftl.config.adapt import DEFAULT_ADAPT_RATES, DEFAULT_TOLERANCES
from hftl.config.overrides import apply_overrides
from hftl.config.recipe import Arm, Recipe
from hftl.errors import RecipeError
from hftl.pipeline.cache_keys import build_adapt_key, flatten_stages
from hftl.pipeline.objectives import build_guard_rule

BARE: dict[str, Any] = {"source": {"model": "org/model"}, "data": {"train": {"path": "a.csv"}}}


def recipe(*overrides: str, **sections: Any) -> Recipe:
    return Recipe.parse(apply_overrides(copy.deepcopy(BARE | sections), list(overrides)), "a.yaml")


def refused(message: str, *overrides: str, **sections: Any) -> None:
    with pytest.raises(RecipeError, match=message) as found:
        recipe(*overrides, **sections)
    assert str(found.value).startswith("a.yaml") and "\n" not in str(found.value)


def by_name(made: Recipe) -> dict[str, Arm]:
    return {arm.name: arm for arm in made.arms}


def test_every_default_is_spelt_out() -> None:
    assert recipe("adapt={objective: mlm}").to_dict()["adapt"] == {
        "objective": "mlm", "corpus": None, "method": "full", "mask_ratio": 0.15,
        "whole_words": True, "pack": True, "norm_pix_loss": True,
        "decoder": {"width": 192, "depth": 2}, "distill": 0.0,
        "lora": {"r": 16, "lora_alpha": 32}, "blocks": 1, "held_out": 0.1, "transductive": False,
        "guard": None, "tolerance": None, "patience": 3,
        "training": {"num_train_epochs": 10, "warmup_steps": 0.06, "weight_decay": 0.01,
                     "learning_rate": 1e-4},
    }  # fmt: skip


@pytest.mark.parametrize(("objective", "method"), DEFAULT_ADAPT_RATES)
def test_the_rate_follows_objective_and_method(objective: str, method: str) -> None:
    (stage,) = recipe(f"adapt={{objective: {objective}, method: {method}}}").stages
    assert stage.training["learning_rate"] == DEFAULT_ADAPT_RATES[objective, method]
    assert stage.mask_ratio == {"mlm": 0.15, "mae": 0.75}[objective]


@pytest.mark.parametrize(
    ("objective", "guard", "task", "relative"),
    [
        ("mae", "general", "classification", True), ("mlm", "general", "classification", False),
        ("mae", "probe", "classification", False), ("mae", "neighbours", "regression", False),
        ("mlm", "probe", "regression", True),
    ],
)  # fmt: skip
def test_a_tolerance_is_a_share_where_the_unit_says_nothing(
    objective: str, guard: str, task: str, relative: bool
) -> None:
    """A tenth of an error of pixels that starts at 0.05 would allow everything."""
    made = recipe(
        f"adapt={{objective: {objective}, guard: {guard}}}", "data.general=g", f"data.task={task}"
    )
    rule = build_guard_rule(made, made.stages[0], None)
    assert rule.relative == relative and rule.tolerance == DEFAULT_TOLERANCES[guard]
    start = GuardEvaluation(0, 1.0, 0.05, -0.05)
    if (objective, guard) == ("mae", "general"):
        assert rule.allows(GuardEvaluation(1, 0.9, 0.0549, -0.0549), start)
        assert not rule.allows(GuardEvaluation(1, 0.9, 0.0551, -0.0551), start)


def test_what_is_given_stands_beside_the_defaults() -> None:
    (stage,) = recipe(
        "adapt={objective: mlm, mask_ratio: 0.3, lora: {r: 4}, training: {max_steps: 7}}"
    ).stages
    assert stage.mask_ratio == 0.3 and stage.lora == {"r": 4, "lora_alpha": 32}
    assert stage.training["max_steps"] == 7 and stage.training["learning_rate"] == 1e-4


def test_null_is_the_default_where_it_has_no_meaning_of_its_own() -> None:
    nulls = "adapt={objective: mae, mask_ratio: null, guard: null, decoder: null, lora: null}"
    assert recipe(nulls).adapt == recipe("adapt={objective: mae}").adapt


def test_a_recipe_written_out_is_the_same_recipe() -> None:
    made = recipe(
        "adapt=[{objective: mlm}, {objective: mlm, method: lora, corpus: task}]",
        "data.unlabeled=a.txt", "data.general=b.txt",
        "measure.arms=[source, {tapt: {adapt: [{objective: mlm, guard: off}]}}]",
    )  # fmt: skip
    assert Recipe.parse(yaml.safe_load(yaml.safe_dump(made.to_dict()))) == made
    assert [stage.method for stage in made.stages] == ["full", "lora"]


def test_short_tables_are_tables() -> None:
    made = recipe("adapt={objective: mlm}", "data.unlabeled=a.txt", "data.train.text=t")
    assert made.to_dict()["data"]["unlabeled"]["path"] == "a.txt"
    assert made.to_dict()["data"]["unlabeled"]["text"] == "t"


def test_overrides_reach_keys_that_the_recipe_does_not_spell_out(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(BARE | {"adapt": {"objective": "mlm"}}), encoding="utf-8")
    made = Recipe.load(path, ["adapt.training.learning_rate=1e-4", "adapt.lora.r=2"])
    assert made.stages[0].training["learning_rate"] == 1e-4
    assert made.stages[0].lora["r"] == 2


REFUSED: dict[str, tuple[list[str], str]] = {
    "no objective": (["adapt={method: lora}"], r"'adapt\.objective' is missing"),
    "no objective, several": (["adapt=[{}]"], r"'adapt\.0\.objective' is missing"),
    "unknown objective": (["adapt={objective: clm}"], r"'adapt\.objective': .*'clm'"),
    "unknown method": (["adapt={objective: mlm, method: ia3}"], r"'adapt\.method': .*'ia3'"),
    "no stage": (["adapt=[]"], r"'adapt': .*at least 1"),
    "no section": (["adapt=mlm"], r"'adapt': .*'mlm'"),
    "unknown key": (
        ["adapt={objective: mlm, mask_ration: 0.2}"],
        r"unknown key 'adapt\.mask_ration'; did you mean 'adapt\.mask_ratio'\?",
    ),
    "unknown key in a list": (
        ["adapt=[{objective: mlm}, {objective: mlm, gaurd: off}]"],
        r"unknown key 'adapt\.1\.gaurd'; did you mean 'adapt\.1\.guard'\?",
    ),
    "unknown decoder key": (
        ["adapt={objective: mae, decoder: {widht: 8}}"],
        r"unknown key 'adapt\.decoder\.widht'; did you mean 'adapt\.decoder\.width'\?",
    ),
    "unknown training key": (
        ["adapt={objective: mlm, training: {lerning_rate: 1}}"],
        r"unknown key 'adapt\.training\.lerning_rate'; "
        r"did you mean 'adapt\.training\.learning_rate'\?",
    ),
    "unknown lora key": (
        ["adapt={objective: mlm, lora: {lora_alfa: 1}}"],
        r"unknown key 'adapt\.lora\.lora_alfa'; did you mean 'adapt\.lora\.lora_alpha'\?",
    ),
    "mask nothing": (["adapt={objective: mlm, mask_ratio: 0}"], r"'adapt\.mask_ratio': .*than 0"),
    "mask all": (["adapt={objective: mae, mask_ratio: 1}"], r"'adapt\.mask_ratio': .*than 1"),
    "hold out nothing": (["adapt={objective: mlm, held_out: 0}"], r"'adapt\.held_out': .*than 0"),
    "hold out all": (["adapt={objective: mlm, held_out: 1}"], r"'adapt\.held_out': .*than 1"),
    "no patience": (["adapt={objective: mlm, patience: 0}"], r"'adapt\.patience'"),
    "negative tolerance": (["adapt={objective: mlm, tolerance: -1}"], r"'adapt\.tolerance'"),
    "not finite": (["adapt={objective: mlm, tolerance: .nan}"], r"'adapt\.tolerance'"),
    "no block": (["adapt={objective: mlm, blocks: 0}"], r"'adapt\.blocks'"),
    "unlabeled corpus": (
        ["adapt={objective: mlm, corpus: unlabeled}"],
        r"adapt\.corpus=unlabeled, but data\.unlabeled is null",
    ),
    "general guard": (
        ["adapt={objective: mlm, guard: general}"],
        r"adapt\.guard=general, but data\.general is null",
    ),
    "probe without a task": (
        ["adapt={objective: mlm, guard: probe}", "data.task=null"],
        r"adapt\.guard=probe needs labels, and data\.task is null",
    ),
    "no task, nothing to do": (["data.task=null"], r"data\.task=null adapts only"),
    "unlabeled, no adapt": (
        ["data.unlabeled=a.txt"], r"data\.unlabeled is read by adapt, which is null",
    ),
    "the output": (
        ["adapt={objective: mlm, training: {output_dir: x}}"],
        r"adapt\.training\.output_dir belongs to hftl",
    ),
    "the seed": (
        ["adapt={objective: mlm, training: {seed: 1}}"], r"adapt\.training\.seed belongs to hftl",
    ),
    "the hub": (
        ["adapt={objective: mlm, training: {hub_model_id: x}}"],
        r"adapt\.training\.hub_model_id belongs to hftl",
    ),
    "not built": (
        ["adapt={objective: mlm, training: {gradient_checkpointing: true}}"],
        r"adapt\.training\.gradient_checkpointing is not built yet",
    ),
    "a rate of words": (
        ["adapt={objective: mlm, training: {learning_rate: high}}"],
        r"adapt\.training\.learning_rate must be .*'high'",
    ),
    "a rate of nothing": (
        ["adapt={objective: mlm, training: {learning_rate: 0}}"],
        r"adapt\.training\.learning_rate must be a number above 0",
    ),
    "no training section": (["adapt={objective: mlm, training: [1]}"], r"must be a mapping"),
    "an owned lora key": (
        ["adapt={objective: mlm, lora: {task_type: SEQ_CLS}}"],
        r"adapt\.lora\.task_type belongs to hftl",
    ),
    "a start that changes the base": (
        ["adapt={objective: mlm, lora: {init_lora_weights: pissa}}"],
        r"adapt\.lora\.init_lora_weights=pissa changes the base's own weights",
    ),
    "no rank": (["adapt={objective: mlm, lora: {r: 0}}"], r"adapt\.lora\.r must be a number above"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_one_line_names_the_key(case: str) -> None:
    overrides, message = REFUSED[case]
    refused(message, *overrides)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"source": {"adapt.guard": "off"}}, "the arm 'source' takes no changes"),
        ({"off": {"adapt.gaurd": "off"}},
         r"measure\.arms\.off: unknown key 'adapt\.gaurd'; did you mean 'adapt\.guard'\?"),
        ({"off": {"adapt.mask_ratio": 1}}, r"measure\.arms\.off: 'adapt\.mask_ratio'"),
        ({"off": {"adapt.training.seed": 1}}, r"measure\.arms\.off: adapt\.training\.seed belongs"),
        ({"general": {"adapt.guard": "general"}},
         r"measure\.arms\.general: adapt\.guard=general, but data\.general is null"),
    ],
)  # fmt: skip
def test_arms_that_are_refused(entry: Any, message: str) -> None:
    refused(message, "adapt={objective: mlm}", measure={"arms": [entry]})


def test_the_arm_source_needs_an_adaptation_to_go_without() -> None:
    refused("the arm 'source' goes without adaptation, and so does the recipe",
            measure={"arms": ["source"]})  # fmt: skip


@pytest.mark.parametrize("asked", [[], ["source"], ["scratch", "head", "majority"]])
def test_source_runs_beside_an_adapted_recipe(asked: list[str]) -> None:
    found = by_name(recipe("adapt={objective: mlm}", measure={"arms": asked}))
    assert next(iter(found)) == "lora" and len(found["lora"].stages) == 1
    assert found["source"].strategy == "lora" and found["source"].stages == ()
    assert found["source"].finetune == found["lora"].finetune


def test_without_an_adaptation_there_is_no_source() -> None:
    assert "source" not in by_name(recipe())


def test_baselines_are_not_adapted_and_strategies_are() -> None:
    made = recipe("adapt={objective: mlm}", "measure.arms=[scratch, head, majority, full]")
    stages = {name: len(arm.stages) for name, arm in by_name(made).items()}
    assert stages == {
        "lora": 1, "source": 0, "scratch": 0, "classical": 0, "head": 1, "majority": 0, "full": 1,
    }  # fmt: skip


def test_an_arm_may_change_the_adaptation_or_leave_it_out() -> None:
    made = recipe(
        "adapt={objective: mlm}",
        "measure.arms=[{off: {adapt.guard: off}}, {plain: {adapt: null, finetune.lora.r: 2}}]",
    )
    found = by_name(made)
    assert found["off"].stages[0].guard == "off" and found["lora"].stages[0].guard is None
    assert found["plain"].stages == () and found["plain"].finetune.lora["r"] == 2


def test_an_arm_may_have_another_number_of_adaptations() -> None:
    once = "measure.arms=[{once: {adapt: [{objective: mlm, guard: off}]}}]"
    found = by_name(recipe("adapt=[{objective: mlm}, {objective: mlm}]", once))
    assert [stage.guard for stage in found["lora"].stages] == [None, None]
    assert [stage.guard for stage in found["once"].stages] == ["off"]


def test_without_a_task_there_are_no_arms() -> None:
    assert recipe("data.task=null", "adapt={objective: mlm}").arms == []


def test_a_list_of_one_is_the_section_itself() -> None:
    one, listed = recipe("adapt={objective: mlm}"), recipe("adapt=[{objective: mlm}]")
    assert one.stages == listed.stages
    assert build_adapt_key(one, one.stages, 1) == build_adapt_key(listed, listed.stages, 1)


def test_what_an_adaptation_reads_is_itself_and_those_before_it() -> None:
    made = recipe("adapt=[{objective: mlm}, {objective: mlm, method: lora}]")
    first, second = (build_adapt_key(made, made.stages, number) for number in (1, 2))
    assert first["adapt.method"] == "full"
    assert (second["adapt.0.method"], second["adapt.1.method"]) == ("full", "lora")
    assert first["data.seed"] == 0 and not [key for key in first if key.startswith("adapt.1")]
    assert flatten_stages([]) == {}
