"""Parse recipes: defaults, messages of what is refused, planned arms, and the recipes shipped."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hftl.config.overrides import apply_overrides, flatten
from hftl.config.recipe import Recipe
from hftl.errors import RecipeError
from hftl.runtime.run_folder import to_json

ROOT = Path(__file__).parent.parent / "recipes"
SHIPPED = sorted(p for p in ROOT.rglob("*.yaml") if p.parent.name != "accelerate")
SMALLEST: dict[str, Any] = {"source": {"model": "org/model"}, "data": {"train": {"path": "a.csv"}}}
FROM_CONTRACT = {
    "source": {"revision": None, "published_as": None},
    "data": {
        "task": "classification",
        "train": {"format": None, "name": None, "split": None, "revision": None, "text": "text",
                  "image": "image", "label": "label"},
        "validation": {"fraction": 0.2},
        "test": {"fraction": 0.2},
        "unlabeled": None, "general": None, "group": None, "shots": None, "seed": 0,
        "bad_rows": "refuse", "max_length": 128, "image_size": None, "augment": "none",
        "max_pixels": 40_000_000, "prompt": None, "label_names": None,
    },
    "adapt": None,
    "finetune": {
        "strategy": "lora", "pooling": "native", "head_init": "probe", "blocks": 2,
        "lora": {"r": 8, "lora_alpha": 16},
        "training": {"learning_rate": 5e-4, "num_train_epochs": 5},
    },
    "retain": None,
    "measure": {
        "metric": "accuracy", "seeds": [0, 1, 2], "arms": ["scratch", "head"],
        "scratch": {"learning_rates": [1e-4, 3e-4, 1e-3], "epochs_factor": 3},
    },
    "publish": {
        "repo_id": None, "private": True, "license": None, "license_name": None,
        "license_link": None, "language": None, "examples": False,
    },
}  # fmt: skip


def recipe(*overrides: str, **sections: Any) -> Recipe:
    tree = json.loads(json.dumps(SMALLEST | sections))
    return Recipe.parse(apply_overrides(tree, list(overrides)), "my.yaml")


def assert_refused(message: str, *overrides: str, **sections: Any) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        recipe(*overrides, **sections)
    assert caught.value.fix
    assert str(caught.value).startswith("my.yaml: ")


def test_the_defaults_are_those_of_the_contract() -> None:
    defaults, contract = flatten(recipe().to_dict()), flatten(FROM_CONTRACT)
    assert {key: defaults[key] for key in contract} == contract
    assert recipe(finetune=None, measure=None, publish=None, adapt=None, retain=None) == recipe()
    assert recipe("data.task=regression").measure.metric == "pearson"
    finetune = recipe("finetune.training.warmup_steps=3", "finetune.lora.r=4").finetune
    assert finetune.training == {"learning_rate": 5e-4, "num_train_epochs": 5, "warmup_steps": 3}
    assert finetune.lora == {"r": 4, "lora_alpha": 16}


@pytest.mark.parametrize("language", ["no", "de", ["en", "multilingual"]])
def test_a_recipe_written_out_is_the_same_recipe(language: Any) -> None:
    made = recipe(
        "data.task=regression", "measure.metric=mae", "finetune.lora.r=4",
        "measure.arms=[head, {full: {finetune.blocks: 3}}]",
        publish={"language": language, "license": "cc-by-4.0"},
    )  # fmt: skip
    assert made.measure.metric == "mae" and made.publish.language == language
    assert Recipe.parse(made.to_dict()) == made


@pytest.mark.parametrize("rate", ["1e-4", "1.0e-4", "0.0001"])
def test_a_file_has_short_tables_rates_without_a_point_and_overrides(
    rate: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "source: {model: org/model}\ndata: {train: a.csv}\n"
        f"finetune: {{training: {{learning_rate: {rate}}}}}\n",
        encoding="utf-8",
    )
    loaded = Recipe.load(path, ["data.train.text=[a, b]", "data.test=b.csv", "data.shots=3"])
    assert loaded.finetune.training["learning_rate"] == 1e-4
    assert (loaded.data.train.path, loaded.data.shots) == ("a.csv", 3)
    assert loaded.data.train.text_columns == ["a", "b"]
    assert loaded.data.test.model_dump()["path"] == "b.csv"


def test_other_tables_take_their_columns_from_train() -> None:
    data = recipe(
        "data.train={path: a.dat, format: csv, text: t, label: y}",
        "data.test={path: b.jsonl}",
        "data.validation={path: a.dat, split: dev, label: z}",
    ).to_dict()["data"]
    assert (data["test"]["text"], data["test"]["label"], data["test"]["format"]) == ("t", "y", None)
    assert (data["validation"]["format"], data["validation"]["label"]) == ("csv", "z")


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"source": None}, "source"), ({"source": {}}, "source.model"), ({"data": None}, "data"),
        ({"data": {}}, "data.train"), ({"data": {"train": {}}}, "data.train.path"),
        ({"data": {"train": None}}, "data.train"),
    ],
)  # fmt: skip
def test_a_missing_key_is_named(sections: dict[str, Any], key: str) -> None:
    assert_refused(rf"'{re.escape(key)}'(:| is missing)", **sections)


MISSPELT = {
    "sorce.model=x": ("sorce", "source"), "source.modell=x": ("source.modell", "source.model"),
    "data.shot=3": ("data.shot", "data.shots"),
    "data.train.lable=x": ("data.train.lable", "data.train.label"),
    "data.test={fractoin: 0.1}": ("data.test.fractoin", "data.test.fraction"),
    "data.test={paht: b.csv}": ("data.test.paht", "data.test.path"),
    "data.test={path: b.csv, lable: y}": ("data.test.lable", "data.test.label"),
    "finetune.strateggy=full": ("finetune.strateggy", "finetune.strategy"),
    "finetune.lora.lora_alfa=2": ("finetune.lora.lora_alfa", "finetune.lora.lora_alpha"),
    "finetune.training.lerning_rate=1":
        ("finetune.training.lerning_rate", "finetune.training.learning_rate"),
    "measure.sedes=[1]": ("measure.sedes", "measure.seeds"),
    "measure.scratch.epoch_factor=1":
        ("measure.scratch.epoch_factor", "measure.scratch.epochs_factor"),
}  # fmt: skip


@pytest.mark.parametrize("assignment", MISSPELT)
def test_a_misspelt_key_is_named_with_its_closest_match(assignment: str) -> None:
    wrong, right = map(re.escape, MISSPELT[assignment])
    assert_refused(rf"unknown key '{wrong}'; did you mean '{right}'\?", assignment)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"full": {"finetune.training.lerning_rate": 1e-4}},
         r"arms\.full: unknown key 'finetune\.training\.lerning_rate'; did you mean "
         r"'finetune\.training\.learning_rate'\?"),
        ({"small": {"finetune": {"lora": {"lora_alfa": 4}}}},
         r"arms\.small: unknown key 'finetune\.lora\.lora_alfa'; did you mean "
         r"'finetune\.lora\.lora_alpha'\?"),
        ({"full": {"finetune.poling": "cls"}},
         r"arms\.full: unknown key 'finetune\.poling'; did you mean 'finetune\.pooling'\?"),
        ({"full": {"fintune.pooling": "cls"}},
         r"arms\.full: .*fintune\.pooling.*; did you mean 'finetune'\?"),
        ({"full": {"data.shots": 3}}, r"arms\.full: data\.shots cannot differ between arms"),
        ("ful", r"unknown arm 'ful' in measure\.arms; did you mean 'full'\?"),
        ("no_kl", r"unknown arm 'no_kl' in measure\.arms\. Known: head"),
        ({"a": {"finetune.blocks": 1}, "b": {}}, r"an entry of measure\.arms is a name or one"),
        ({"a/b": {"finetune.blocks": 1}}, r"'a/b' cannot name a folder"),
        ({"..": {"finetune.blocks": 1}}, r"'\.\.' cannot name a folder"),
        ({"majority": {"finetune.blocks": 1}}, r"the arm 'majority' takes no changes"),
        ({"full": {"finetune.training.learning_rate": "high"}},
         r"arms\.full: finetune\.training\.learning_rate must be a number, got 'high'"),
        ({"full": {"finetune.training.seed": 3}}, r"arms\.full: .*training\.seed belongs to hftl"),
        ({"kl": {"retain": {"kl": {"wight": 1}}}}, r"arms\.kl: .*mean 'retain\.kl\.weight'"),
        ({"kl": {"retain": {"kl": {"weight": -1}}}}, r"arms\.kl: .*would drive the model away"),
        ({"replay": {"retain": {"replay": {}}}}, "but data.general is null"),
        ({"head": {"finetune.blocks": 1}}, "two arms named 'head'"),
        ({"lora": {"finetune.lora.r": 4}}, "two arms named 'lora'"),
        ("source", "goes without adaptation, and so does the recipe"),
        ({"full": 3}, r"'measure\.arms"),
        (3, r"'measure\.arms"),
    ],
)  # fmt: skip
def test_arms_that_are_refused(entry: Any, message: str) -> None:
    assert_refused(message, measure={"arms": ["head", entry]})


@pytest.mark.parametrize(
    "assignment",
    "training.seed=1 training.data_seed=1 training.output_dir=x training.push_to_hub=true "
    "training.hub_model_id=org/name training.hub_token=x training.resume_from_checkpoint=x "
    "lora.task_type=SEQ_CLS lora.peft_type=LORA lora.inference_mode=true lora.revision=main "
    "lora.base_model_name_or_path=org/model lora.auto_mapping={} lora.peft_version=x".split(),
)
def test_keys_that_belong_to_hftl_are_refused(assignment: str) -> None:
    key = re.escape(assignment.partition("=")[0])
    assert_refused(rf"finetune\.{key} belongs to hftl", f"finetune.{assignment}")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        *((f"finetune.lora.init_lora_weights={start}", "changes the base's own weights")
          for start in ("pissa", "pissa_niter_4", "olora", "loftq", "eva", "corda")),
        ("publish.license=Apache-2.0", "no license 'Apache-2.0'; did you mean 'apache-2.0'"),
        ("publish.license=other", "license_name belongs to license: other, and is needed there"),
        ("publish.license_name=ours", "license_name belongs to license: other"),
        ("publish.license_link=javascript:x", r"publish\.license_link"),
        ("publish.language=english", "'english' is no ISO 639 code"),
        ("publish.language=[en, EN]", "'EN' is no ISO 639 code"),
        ("publish.examples=maybe", r"publish\.examples"),
        ("data.unlabeled=a.txt", "data.unlabeled is read by adapt, which is null"),
        ("data.task=null", "adapts only, and adapt is null"),
        ("adapt=[{objective: mae}, {objective: mae, decoder: {depth: 1}}]", "decoders of two"),
        ("finetune.training.learning_rate=high", r"learning_rate must be a number, got 'high'"),
        ("finetune.training.learning_rate=0", r"learning_rate must be a number above 0"),
        ("finetune.training.learning_rate=-1", r"learning_rate must be a number above 0"),
        ("finetune.training.learning_rate=.nan", r"rate' must be a finite number, got nan"),
        ("finetune.training.learning_rate=.inf", r"rate' must be a finite number, got inf"),
        ("finetune.training.max_grad_norm=.inf",
         r"'finetune\.training\.max_grad_norm' must be a finite number, got inf"),
        ("finetune.lora.lora_dropout=.nan",
         r"'finetune\.lora\.lora_dropout' must be a finite number, got nan"),
        ("finetune.lr.blocks=[1, -.inf]", r"'finetune\.lr\.blocks\.1' must be a finite number"),
        ("measure.arms=[head, {full: {finetune.training.weight_decay: .nan}}]",
         r"'measure\.arms\.1\.full\.finetune\.training\.weight_decay' must be a finite"),
        ("finetune.training.num_train_epochs=0", r"num_train_epochs must be a number above 0"),
        ("finetune.training.bf16=perhaps", r"finetune\.training\.bf16 must be .*, got 'perhaps'"),
        ("finetune.training=5", r"'finetune\.training'"),
        ("finetune.lora=null", r"'finetune\.lora'"),
        ("finetune.lora.r=0", r"finetune\.lora\.r must be a whole number above 0"),
        ("finetune.lora.r=eight", r"finetune\.lora\.r must be a whole number, got 'eight'"),
        ("finetune.lora.use_qalora=true", r"use_qalora does not fit"),
        ("finetune.blocks=0", r"'finetune\.blocks'.* got 0"),
        ("finetune.blocks=two", r"'finetune\.blocks'.* got 'two'"),
        ("finetune.pooling=max", r"'finetune\.pooling'.* got 'max'"),
        ("finetune.strategy=lorra", r"'finetune\.strategy'.* got 'lorra'"),
        ("finetune=lora", r"'finetune'"),
        ("data.shots=0", r"'data\.shots'.* got 0"),
        ("data.seed=-1", r"'data\.seed'.* got -1"),
        ("data.seed=4294967296", r"'data\.seed'.* got 4294967296"),
        ("data.max_length=1", r"'data\.max_length'.* got 1"),
        ("data.bad_rows=ignore", r"'data\.bad_rows'.* got 'ignore'"),
        ("data.test={fraction: 0}", r"'data\.test\.fraction'.* got 0"),
        ("data.test={fraction: 1}", r"'data\.test\.fraction'.* got 1"),
        ("data.test={fraction: .nan}", r"'data\.test\.fraction'"),
        ("data.test={fraction: 0.8}", "fractions of validation and test add up to 1"),
        ("data.test=0.2", r"'data\.test'.* got 0\.2"),
        ("data.train.text=[]", "text is one column or two"),
        ("data.train.text=[a, b, c]", "text is one column or two"),
        ("data.train.format=xml", r"'data\.train\.format'.* got 'xml'"),
        ("measure.seeds=[]", r"'measure\.seeds'"),
        ("measure.seeds=[true]", r"'measure\.seeds': a seed must be a number, got true"),
        ("measure.seeds=[-1]", r"'measure\.seeds\.0'.* got -1"),
        ("measure.seeds=[1, 2, 1]", "seed 1 is given twice"),
        ("measure.seeds=[4294967295, 4294967296]", r"'measure\.seeds\.1'.* got 4294967296"),
        ("measure.scratch.learning_rates=[0.0]", r"'measure\.scratch\.learning_rates\.0'.* got 0"),
        ("measure.scratch.learning_rates=[1, -0.001]", r"learning_rates\.1'.* got -0\.001"),
        (f"measure.arms=[{{{'a' * 101}: {{finetune.blocks: 1}}}}]", "has 101 letters, and 100 are"),
        ("finetune.class_weight={a: 1.0e+300}", r"'a' weighs 1e\+300, expected a number from 0 to"),
        ("retain={replay: {ratio: 1000}}", r"'retain\.replay\.ratio'.* got 1000"),
        ("data={task: multi-label, train: {path: a.csv, label: [p, q, p]}}",
         "label names the column 'p' twice"),
        ("data.train.text=[a, a]", "text names the column 'a' twice"),
        ("data.general={path: a.csv, label: [p, p]}", "label names the column 'p' twice"),
        ("measure.scratch.learning_rates=[]", r"'measure\.scratch\.learning_rates'"),
        ("measure.scratch.learning_rates=[high]", r"'measure\.scratch\.learning_rates\.0'"),
        ("measure.scratch.epochs_factor=0", r"'measure\.scratch\.epochs_factor'.* got 0"),
    ],
)  # fmt: skip
def test_values_that_are_refused(assignment: str, message: str) -> None:
    assert_refused(message, assignment)


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        (["scratch", "head"], "lora scratch classical head"), ([], "lora"),
        (["lora", "head"], "lora head"), (["head", "majority"], "lora head majority"),
        (["scratch", "classical"], "lora scratch classical"),
        (["classical", "scratch"], "lora classical scratch"),
        ([{"classical": None}, "scratch"], "lora classical scratch"),
        (["scratch", {"classical": None}], "lora scratch classical"),
        ([{"scratch": {"finetune.pooling": "cls"}}], "lora scratch classical"),
    ],
)  # fmt: skip
def test_the_own_arm_comes_first_and_scratch_brings_classical(
    listed: list[Any], names: str
) -> None:
    arms = recipe(measure={"arms": listed}).arms
    assert [(arm.name, arm.strategy) for arm in arms] == [(name, name) for name in names.split()]


def test_an_arm_starts_as_the_recipe_and_takes_its_changes() -> None:
    entries = [
        "head",
        {"full": {"finetune.training.learning_rate": 5e-5}},
        {"small": {"finetune": {"lora": {"r": 2}}, "retain": None}},
        {"no_kl": {"retain": None}},
        {"top": {"finetune.strategy": "partial", "finetune.blocks": 1}},
    ]
    made = recipe("finetune.pooling=mean", "finetune.training.warmup_steps=3",
                  measure={"arms": entries})  # fmt: skip
    own, head, full, small, no_kl, top = made.arms
    assert {arm.finetune.pooling for arm in made.arms} == {"mean"}
    assert (own.strategy, head.strategy, full.strategy) == ("lora", "head", "full")
    assert full.finetune.training == own.finetune.training | {"learning_rate": 5e-5}
    assert (small.strategy, small.finetune.lora) == ("lora", {"r": 2, "lora_alpha": 16})
    assert no_kl.finetune == own.finetune
    assert (top.strategy, top.finetune.blocks) == ("partial", 1)
    assert made.finetune.lora["r"] == 8, "an arm's change must not reach the recipe"


def test_the_json_schema_names_every_section() -> None:
    schema = json.loads(to_json(Recipe.model_json_schema()))
    assert set(schema["properties"]) == set(FROM_CONTRACT)
    assert set(schema["required"]) == {"source", "data"}
    assert schema["additionalProperties"] is False
    assert set(FROM_CONTRACT["data"]) == set(schema["$defs"]["Data"]["properties"])


@pytest.mark.parametrize(
    ("retain", "more", "message"),
    [
        ("{kl: {weight: -0.1}}", [], "would drive the model away"),
        ("{l2sp: {weight: -1}}", [], r"retain\.l2sp\.weight"),
        ("{l2sp: {weight: 1.0e+300}}", [], r"retain\.l2sp\.weight.* got 1e\+300"),
        ("{kl: {weight: 1.0e+300}}", [], "would overflow"),
        ("{kl: {tau: 1.0e-300}}", [], r"retain\.kl\.tau.* got 1e-300"),
        ("{ewc: {}}", [], "reads general data .* but data.general is null"),
        ("{replay: {ratio: 0.2}}", [], "but data.general is null"),
        ("{kl: {inputs: both}}", [], "but data.general is null"),
        ("{kl: {on: probe}}", ["finetune.head_init=random"], "nobody has trained it"),
        ("{interpolate: [0, 0.5, 1]}", ["finetune.head_init=random"], "the original has no head"),
        ("{kl: {on: head}}", [], r"retain\.kl.*on"),
        ("{kl: []}", [], r"retain\.kl"),
        ("{interpolate: [2]}", [], r"retain\.interpolate"),
        ("{kl: {}}", ["finetune.strategy=head"], "the strategy head trains nothing"),
        ("{kl: {}}", ["data.task=null", "adapt={objective: mlm}"], "data.task=null adapts only"),
    ],
)
def test_retention_that_makes_no_sense_is_refused(
    retain: str, more: list[str], message: str
) -> None:
    assert_refused(message, f"retain={retain}", *more)


def test_kl_is_one_or_several_and_an_arm_may_have_its_own() -> None:
    made = recipe(
        "retain={kl: [{on: probe}, {weight: 0.3}]}", "finetune.strategy=lora",
        measure={"arms": [
            "head", {"no_kl": {"retain": None}}, {"far": {"retain": {"l2sp": {"weight": 0.5}}}},
            {"strong": {"retain.kl.0.weight": 1.0}}, "full",
        ]},
    )  # fmt: skip
    own, head, no_kl, far, strong, full = made.arms
    assert own.retain is not None and [kl.on for kl in own.retain.kl_terms] == [
        "probe",
        "relational",
    ]
    assert head.retain is None and no_kl.retain is None
    assert far.retain is not None and far.retain.kl is None and far.retain.l2sp is not None
    assert strong.retain is not None and [kl.weight for kl in strong.retain.kl_terms] == [1.0, 0.3]
    assert full.retain == own.retain


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_shipped_recipe_parses_and_stands_in_the_index(path: Path) -> None:
    shipped = Recipe.load(path)
    assert shipped.arms
    assert path.read_text(encoding="utf-8").startswith("# "), "a header says what it is"
    again = Recipe.parse(yaml.safe_load(yaml.safe_dump(shipped.to_dict())))
    assert again.to_dict() == shipped.to_dict(), "the resolved recipe means the same"
    assert path.relative_to(ROOT).as_posix() in (ROOT / "README.md").read_text(encoding="utf-8")
