"""Read the `adapt` section of a recipe: its defaults, its arms, and its refusals in one line."""

import copy
from typing import Any

import pytest
import yaml

from hftl.adapt.guard import AdaptationEvaluation
from hftl.config.adapt import DEFAULT_ADAPT_RATES, DEFAULT_TOLERANCES
from hftl.config.overrides import apply_overrides
from hftl.config.recipe import Arm, Recipe
from hftl.errors import RecipeError
from hftl.pipeline.cache_keys import build_adapt_key, flatten_stages
from hftl.pipeline.objectives import build_guard_rule

BARE: dict[str, Any] = {"source": {"model": "org/model"}, "data": {"train": {"path": "a.csv"}}}
MLM = "adapt={objective: mlm}"


def parse(*overrides: str, **sections: Any) -> Recipe:
    return Recipe.parse(apply_overrides(copy.deepcopy(BARE | sections), list(overrides)), "a.yaml")


def assert_refused(message: str, *overrides: str, **sections: Any) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        parse(*overrides, **sections)
    assert str(caught.value).startswith("a.yaml") and "\n" not in str(caught.value)


def arms_of(recipe: Recipe) -> dict[str, Arm]:
    return {arm.name: arm for arm in recipe.arms}


def test_every_default_is_written_out() -> None:
    assert parse(MLM).to_dict()["adapt"] == {
        "objective": "mlm", "corpus": None, "method": "full", "mask_ratio": 0.15,
        "whole_words": True, "pack": True, "norm_pix_loss": True,
        "decoder": {"width": 192, "depth": 2}, "distill": 0.0,
        "lora": {"r": 16, "lora_alpha": 32}, "blocks": 1, "held_out": 0.1, "transductive": False,
        "guard": None, "tolerance": None, "patience": 3,
        "training": {"num_train_epochs": 10, "warmup_steps": 0.06, "weight_decay": 0.01,
                     "learning_rate": 1e-4},
    }  # fmt: skip
    nulls = "adapt={objective: mae, mask_ratio: null, guard: null, decoder: null, lora: null}"
    assert parse(nulls).adapt == parse("adapt={objective: mae}").adapt


@pytest.mark.parametrize(("objective", "method"), DEFAULT_ADAPT_RATES)
def test_rate_follows_objective_and_method(objective: str, method: str) -> None:
    (stage,) = parse(f"adapt={{objective: {objective}, method: {method}}}").stages
    assert stage.training["learning_rate"] == DEFAULT_ADAPT_RATES[objective, method]
    assert stage.mask_ratio == {"mlm": 0.15, "mae": 0.75, "clm": None}[objective]


@pytest.mark.parametrize(
    ("objective", "guard", "task", "relative"),
    [
        ("mae", "general", "classification", True), ("mlm", "general", "classification", False),
        ("mae", "probe", "classification", False), ("mae", "neighbours", "regression", False),
        ("mlm", "probe", "regression", True),
    ],
)  # fmt: skip
def test_tolerance_is_a_share_where_the_unit_has_no_scale(
    objective: str, guard: str, task: str, relative: bool
) -> None:
    """Take a share of an error of pixels, of which a tenth is more than it starts at."""
    recipe = parse(
        f"adapt={{objective: {objective}, guard: {guard}}}", "data.general=g", f"data.task={task}"
    )
    rule = build_guard_rule(recipe, recipe.stages[0], None)
    assert rule.relative == relative and rule.tolerance == DEFAULT_TOLERANCES[guard]
    start = AdaptationEvaluation(0, 1.0, 0.05, -0.05)
    if (objective, guard) == ("mae", "general"):
        assert rule.allows(AdaptationEvaluation(1, 0.9, 0.0549, -0.0549), start)
        assert not rule.allows(AdaptationEvaluation(1, 0.9, 0.0551, -0.0551), start)


@pytest.mark.parametrize(
    ("adapt", "changes", "rate", "ratio"),
    [
        (MLM, "adapt.method: lora", 5e-4, 0.15),
        ("adapt=[{objective: mlm}]", "adapt.0.method: lora", 5e-4, 0.15),
        ("adapt=[{objective: mlm}]", "adapt.0: {method: lora}", 5e-4, 0.15),
        (MLM, "adapt.objective: mae", 5e-5, 0.75),
        (MLM, "adapt.objective: mae, adapt.mask_ratio: 0.5", 5e-5, 0.5),
        (MLM, "adapt.method: lora, adapt.training.learning_rate: 1.0e-4", 1e-4, 0.15),
        ("adapt={objective: mlm, mask_ratio: 0.3, training: {learning_rate: 1}}",
         "adapt.objective: mae", 1, 0.3),
    ],
)  # fmt: skip
def test_an_arm_of_another_method_has_the_defaults_of_that(
    adapt: str, changes: str, rate: float, ratio: float
) -> None:
    recipe = parse(adapt, f"measure.arms=[{{other: {{{changes}}}}}]")
    (stage,) = arms_of(recipe)["other"].stages
    assert (stage.training["learning_rate"], stage.mask_ratio) == (rate, ratio)


def test_values_and_overrides_stand_beside_the_defaults() -> None:
    (stage,) = parse(
        "adapt={objective: mlm, mask_ratio: 0.3, lora: {r: 4}, training: {max_steps: 7}}",
        "adapt.training.weight_decay=0.5",
    ).stages
    assert stage.mask_ratio == 0.3 and stage.lora == {"r": 4, "lora_alpha": 32}
    assert stage.training["max_steps"] == 7 and stage.training["learning_rate"] == 1e-4
    assert stage.training["weight_decay"] == 0.5
    unlabeled = parse(MLM, "data.unlabeled=a.txt", "data.train.text=t").to_dict()["data"][
        "unlabeled"
    ]
    assert (unlabeled["path"], unlabeled["text"]) == ("a.txt", "t")


def test_recipe_written_out_is_the_same_recipe() -> None:
    recipe = parse(
        "adapt=[{objective: mlm}, {objective: mlm, method: lora, corpus: task}]",
        "data.unlabeled=a.txt", "data.general=b.txt",
        "measure.arms=[source, {tapt: {adapt: [{objective: mlm, guard: off}]}}]",
    )  # fmt: skip
    assert Recipe.parse(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
    assert [stage.method for stage in recipe.stages] == ["full", "lora"]


REFUSED: dict[str, tuple[str, str]] = {
    "no objective": ("adapt={method: lora}", r"'adapt\.objective' is missing"),
    "no objective, several": ("adapt=[{}]", r"'adapt\.0\.objective' is missing"),
    "unknown objective": ("adapt={objective: dlm}", r"'adapt\.objective' must be mlm, .*'dlm'"),
    "no stage": ("adapt=[]", r"'adapt' must be .*got \[\]"),
    "mae's key with mlm": (
        "adapt={objective: mlm, norm_pix_loss: false}",
        r"adapt\.norm_pix_loss is read by the objective mae, and adapt\.objective is mlm",
    ),
    "masking with clm": (
        "adapt={objective: clm, mask_ratio: 0.3}",
        r"adapt\.mask_ratio is read by the objective mlm and mae, and adapt\.objective is clm",
    ),
    "no section": ("adapt=mlm", r"'adapt' must be .*'mlm'"),
    "unknown key in a list": (
        "adapt=[{objective: mlm}, {objective: mlm, gaurd: off}]",
        r"unknown key 'adapt\.1\.gaurd'; did you mean 'adapt\.1\.guard'\?",
    ),
    "unlabeled, no adapt": (
        "data.unlabeled=a.txt", r"data\.unlabeled is read by adapt, which is null",
    ),
    "no task, nothing to do": ("data.task=null", r"data\.task=null adapts only"),
}  # fmt: skip
REFUSED_OF_MLM: list[tuple[str, str]] = [
    ("method: ia3", r"'adapt\.method' must be .*'ia3'"),
    ("mask_ration: 0.2", r"unknown key 'adapt\.mask_ration'; did you mean 'adapt\.mask_ratio'\?"),
    ("decoder: {widht: 8}",
     r"unknown key 'adapt\.decoder\.widht'; did you mean 'adapt\.decoder\.width'\?"),
    ("training: {lerning_rate: 1}",
     r"unknown key 'adapt\.training\.lerning_rate'; did you mean 'adapt\.training\.learning_rate'"),
    ("lora: {lora_alfa: 1}",
     r"unknown key 'adapt\.lora\.lora_alfa'; did you mean 'adapt\.lora\.lora_alpha'\?"),
    ("mask_ratio: 0", r"'adapt\.mask_ratio' must be a number above 0"),
    ("mask_ratio: 1", r"'adapt\.mask_ratio' must be .*below 1.* got 1"),
    ("held_out: 0", r"'adapt\.held_out' must be a number above 0"),
    ("held_out: 1", r"'adapt\.held_out' must be .*below 1, got 1"),
    ("patience: 0", r"'adapt\.patience'"),
    ("tolerance: -1", r"'adapt\.tolerance'"),
    ("tolerance: .nan", r"'adapt\.tolerance'"),
    ("blocks: 0", r"'adapt\.blocks'"),
    ("corpus: unlabeled", r"adapt\.corpus=unlabeled, but data\.unlabeled is null"),
    ("guard: general", r"adapt\.guard=general, but data\.general is null"),
    ("training: {output_dir: x}", r"adapt\.training\.output_dir belongs to hftl"),
    ("training: {seed: 1}", r"adapt\.training\.seed belongs to hftl"),
    ("training: {hub_model_id: x}", r"adapt\.training\.hub_model_id belongs to hftl"),
    ("training: {gradient_checkpointing: true}",
     r"adapt\.training\.gradient_checkpointing is not built yet"),
    ("training: {learning_rate: high}", r"adapt\.training\.learning_rate must be .*'high'"),
    ("training: {learning_rate: 0}", r"adapt\.training\.learning_rate must be a number above 0"),
    ("training: [1]", r"must be a mapping"),
    ("lora: {task_type: SEQ_CLS}", r"adapt\.lora\.task_type belongs to hftl"),
    ("lora: {init_lora_weights: pissa}",
     r"adapt\.lora\.init_lora_weights=pissa changes the base's own weights"),
    ("lora: {r: 0}", r"adapt\.lora\.r must be a whole number above"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_names_the_key(case: str) -> None:
    override, message = REFUSED[case]
    assert_refused(message, override)


@pytest.mark.parametrize(("key", "message"), REFUSED_OF_MLM)
def test_refusal_names_the_key_of_a_stage(key: str, message: str) -> None:
    assert_refused(message, f"adapt={{objective: mlm, {key}}}")


def test_probe_without_a_task_is_refused() -> None:
    message = r"adapt\.guard=probe needs labels, and data\.task is null"
    assert_refused(message, "adapt={objective: mlm, guard: probe}", "data.task=null")


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
def test_refusal_names_the_arm(entry: Any, message: str) -> None:
    assert_refused(message, MLM, measure={"arms": [entry]})


# Arms


@pytest.mark.parametrize("arms", [[], ["source"], ["scratch", "head", "majority"]])
def test_source_runs_beside_an_adapted_recipe(arms: list[str]) -> None:
    by_name = arms_of(parse(MLM, measure={"arms": arms}))
    assert next(iter(by_name)) == "lora" and len(by_name["lora"].stages) == 1
    assert by_name["source"].strategy == "lora" and by_name["source"].stages == ()
    assert by_name["source"].finetune == by_name["lora"].finetune


def test_arms_without_an_adaptation_or_a_task() -> None:
    assert "source" not in arms_of(parse())
    assert parse("data.task=null", MLM).arms == []
    assert_refused(
        "the arm 'source' goes without adaptation, and so does the recipe",
        measure={"arms": ["source"]},
    )


def test_baselines_are_not_adapted_and_strategies_are() -> None:
    recipe = parse(MLM, "measure.arms=[scratch, head, majority, full]")
    assert {name: len(arm.stages) for name, arm in arms_of(recipe).items()} == {
        "lora": 1, "source": 0, "scratch": 0, "classical": 0, "head": 1, "majority": 0, "full": 1,
    }  # fmt: skip


def test_arm_may_change_the_adaptation_or_leave_it_out() -> None:
    arms = "measure.arms=[{off: {adapt.guard: off}}, {plain: {adapt: null, finetune.lora.r: 2}}]"
    by_name = arms_of(parse(MLM, arms))
    assert by_name["off"].stages[0].guard == "off" and by_name["lora"].stages[0].guard is None
    assert by_name["plain"].stages == () and by_name["plain"].finetune.lora["r"] == 2
    once = "measure.arms=[{once: {adapt: [{objective: mlm, guard: off}]}}]"
    by_name = arms_of(parse("adapt=[{objective: mlm}, {objective: mlm}]", once))
    assert [stage.guard for stage in by_name["lora"].stages] == [None, None]
    assert [stage.guard for stage in by_name["once"].stages] == ["off"]


# Cache keys


def test_key_of_an_adaptation_holds_itself_and_those_before_it() -> None:
    one, listed = parse(MLM), parse("adapt=[{objective: mlm}]")
    assert one.stages == listed.stages
    assert build_adapt_key(one, one.stages, 1) == build_adapt_key(listed, listed.stages, 1)
    recipe = parse("adapt=[{objective: mlm}, {objective: mlm, method: lora}]")
    first, second = (build_adapt_key(recipe, recipe.stages, number) for number in (1, 2))
    assert first["adapt.method"] == "full"
    assert (second["adapt.0.method"], second["adapt.1.method"]) == ("full", "lora")
    assert first["data.seed"] == 0 and not [key for key in first if key.startswith("adapt.1")]
    assert flatten_stages([]) == {}
