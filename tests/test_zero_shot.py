"""Check zero-shot classification: the texts of classes, similarity, entailment, and its head."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bench_of, sentences, write_csv
from scipy.special import expit, softmax
from support.published_model import write_jsonl
from support.tiny import tiny_config, tiny_tokenizer
from support.training import perturb
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import hftl
from hftl.config.finetune import Finetune, ZeroShot
from hftl.config.recipe import Recipe
from hftl.errors import RecipeError
from hftl.finetune.arm import train_arm
from hftl.finetune.context import ExperimentContext
from hftl.finetune.solved_arms import solve_zero_shot
from hftl.finetune.strategies import STRATEGIES
from hftl.finetune.zero_shot import (
    build_start_model,
    build_zero_shot_model,
    check_zero_shot,
    list_prompts,
)
from hftl.models.features import predict_logits
from hftl.pipeline import pipeline as runs
from hftl.pipeline.cache_keys import build_arm_key
from hftl.pipeline.estimate import RowCosts, estimate_seconds
from hftl.pipeline.header import build_header

pytestmark = pytest.mark.usefixtures("fast_reload")

NUMBERED = [(text, int(label == "positive")) for text, label in sentences(120)]
WORDS = {0: "bad and dull", 1: "good"}
ENSEMBLE = {"templates": ["a {} film", "this is {}"], "temperature": 0.1}


@pytest.fixture(scope="module")
def entailment_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random BERT with an entailment head."""
    folder = tmp_path_factory.mktemp("nli")
    config = tiny_config("bert", num_labels=3)
    config.id2label = {0: "contradiction", 1: "ENTAILMENT", 2: "neutral"}
    config.label2id = {name: i for i, name in config.id2label.items()}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    perturb(model, 0.5)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def make_recipe(model: Path, folder: Path, **more: Any) -> Recipe:
    table = folder / "rows.csv"
    if not table.exists():
        write_csv(table, ["text", "label"], NUMBERED)
    data = {"train": {"path": str(table)}, "label_names": WORDS} | more.pop("data", {})
    finetune = {"pooling": "mean", "zero_shot": ENSEMBLE} | more.pop("finetune", {})
    measure = {"seeds": [0, 1], "arms": []} | more.pop("measure", {})
    return Recipe.parse({
        "source": {"model": str(model), "published_as": "org/tiny"}, "data": data,
        "finetune": finetune, "measure": measure, **more,
    })  # fmt: skip


@pytest.fixture(scope="module")
def context(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> ExperimentContext:
    return bench_of(make_recipe(bert, tmp_path_factory.mktemp("data")))


def embed(context: ExperimentContext, texts: list[str]) -> np.ndarray:
    """Return embeddings of length 1 by plain transformers: the mean over tokens."""
    tokenizer = AutoTokenizer.from_pretrained(context.source.folder)
    from transformers import AutoModel

    model = AutoModel.from_pretrained(context.source.folder).eval()
    rows = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=32)
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        rows.append(hidden[0].mean(0).numpy())
    return np.stack([row / np.linalg.norm(row) for row in rows])


@pytest.mark.parametrize(
    ("settings", "prompts"),
    [
        ({}, ["words"]),
        ({"templates": ["a {}", "{} b"]}, ["a words", "words b"]),
        ({"templates": ["a {}"], "descriptions": {0: "x"}}, ["x"]),
        ({"descriptions": {"0": ["x {}", "y"]}}, ["x {}", "y"]),
        ({"descriptions": {1: "x"}}, ["words"]),
    ],
)
def test_class_is_its_descriptions_or_every_template(
    settings: dict[str, Any], prompts: list[str]
) -> None:
    assert ZeroShot.model_validate(settings).list_prompts("0", "words", "{}") == prompts


def test_nearest_class_is_that_of_the_cosines(context: ExperimentContext) -> None:
    finetune = Finetune(pooling="mean", zero_shot=ZeroShot.model_validate(ENSEMBLE))
    prompts = [[f"a {words} film", f"this is {words}"] for words in WORDS.values()]
    assert list(list_prompts(context, finetune).values()) == prompts
    classes = np.stack([embed(context, texts).mean(0) for texts in prompts])
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    rows = context.prepared.rows["test"]
    texts = embed(context, [row.content[0] for row in rows])
    cosines = texts @ classes.T
    output = solve_zero_shot(context, finetune, 0)
    logits = output.logits["test"]
    np.testing.assert_array_equal(logits.argmax(1), cosines.argmax(1))
    # Each row is the cosines over the temperature, times the text's relative length.
    ratios = logits / cosines * ENSEMBLE["temperature"]
    np.testing.assert_allclose(ratios[:, 0], ratios[:, 1], rtol=1e-4)
    assert 0.5 < ratios.min() and ratios.max() < 2
    assert output.trainable_parameters == 0
    assert output.facts.prompts == {"0": prompts[0], "1": prompts[1]}
    built = build_zero_shot_model(context, finetune, 0)
    encoded = context.encode_rows(rows)
    np.testing.assert_allclose(
        predict_logits(built.model, encoded, context.inputs, "cpu"), logits, atol=1e-5
    )


def test_entailment_is_that_of_the_stock_pipeline(entailment_model: Path, tmp_path: Path) -> None:
    context = bench_of(make_recipe(entailment_model, tmp_path, finetune={"zero_shot": {}}))
    finetune = Finetune()
    output = solve_zero_shot(context, finetune, 0)
    classify: Any = pipeline("zero-shot-classification", model=str(entailment_model))
    rows = context.prepared.rows["test"]
    words = list(WORDS.values())
    results = classify([row.content[0] for row in rows], words)
    expected = [[dict(zip(r["labels"], r["scores"], strict=True))[w] for w in words]
                for r in results]  # fmt: skip
    np.testing.assert_allclose(softmax(output.logits["test"], axis=1), expected, atol=1e-5)
    assert np.std(expected) > 5e-3
    assert list_prompts(context, finetune)["1"] == ["This example is good."]
    assert solve_zero_shot(context, finetune, 1).logits is output.logits, "seeds share a pass"


def make_multi_label_recipe(model: Path, folder: Path, **more: Any) -> Recipe:
    rows = [{"text": text, "label": ["films", label][number % 3 == 0 :]}
            for number, (text, label) in enumerate(sentences(60))]  # fmt: skip
    write_jsonl(folder / "rows.jsonl", rows)
    return Recipe.parse({
        "source": {"model": str(model), "published_as": "org/tiny"},
        "data": {"train": {"path": str(folder / "rows.jsonl")}, "task": "multi-label"},
        "finetune": {"strategy": "head"}, "measure": {"seeds": [0], "arms": ["zero_shot"]}, **more,
    })  # fmt: skip


def test_several_labels_are_entailed_or_contradicted_as_in_the_stock_pipeline(
    entailment_model: Path, tmp_path: Path
) -> None:
    recipe = make_multi_label_recipe(entailment_model, tmp_path)
    context = bench_of(recipe)
    check_zero_shot(recipe, context)
    logits = solve_zero_shot(context, Finetune(), 0).logits["test"]
    classify: Any = pipeline("zero-shot-classification", model=str(entailment_model))
    names = context.prepared.names
    assert names == ["films", "negative", "positive"]
    texts = [row.content[0] for row in context.prepared.rows["test"]]
    expected = [[dict(zip(r["labels"], r["scores"], strict=True))[n] for n in names]
                for r in classify(texts, names, multi_label=True)]  # fmt: skip
    np.testing.assert_allclose(expit(logits), expected, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 5e-3
    record = runs.run(recipe, tmp_path / "run")
    assert record is not None and {row.arm for row in record.ladder} == {"head", "zero_shot"}


@pytest.mark.parametrize("names", [None, {0: "entailment", 1: "other", 2: "neutral"}])
def test_several_labels_need_a_head_that_contradicts(
    names: dict[int, str] | None, bert: Path, entailment_model: Path, tmp_path: Path
) -> None:
    model = bert
    if names is not None:
        model = copytree(entailment_model, tmp_path / "model")
        config = json.loads((model / "config.json").read_text("utf-8"))
        config |= {"id2label": names, "label2id": {name: i for i, name in names.items()}}
        (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    recipe = make_multi_label_recipe(model, tmp_path)
    with pytest.raises(RecipeError, match=r"measure\.arms\.zero_shot: .* has no head of both"):
        check_zero_shot(recipe, bench_of(recipe))


def test_time_and_header_count_each_hypothesis_and_name_the_labels(
    entailment_model: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(entailment_model, tmp_path, measure={"arms": ["zero_shot"]})
    context, costs = bench_of(recipe), RowCosts(1.0, 0.0, {"lora": 0.0})
    own, zero_shot = recipe.arms
    plain = estimate_seconds(context, [own], recipe, costs)
    both = estimate_seconds(context, [own, zero_shot, zero_shot], recipe, costs)
    measured = sum(len(context.prepared.rows[split]) for split in ("validation", "test"))
    assert both - plain == pytest.approx(measured * 4), "two templates of two classes, once"
    labels = build_header(recipe, context, [(zero_shot, 0)])["labels"]
    assert labels == "0 (bad and dull), 1 (good)"


def test_training_starts_from_the_zero_shot_head(context: ExperimentContext) -> None:
    training = {"num_train_epochs": 1, "learning_rate": 1e-9, "bf16": False, "weight_decay": 0.0}
    finetune = Finetune(
        pooling="mean", head_init="zero_shot", training=training,
        zero_shot=ZeroShot.model_validate(ENSEMBLE),
    )  # fmt: skip
    expected = solve_zero_shot(context, finetune, 0).logits["test"]
    trained = train_arm(context, finetune, 0).logits["test"]
    np.testing.assert_allclose(trained, expected, atol=1e-3)
    starts = {
        head_init: build_start_model(
            context, finetune.model_copy(update={"head_init": head_init}), 0
        ).last_linear.weight
        for head_init in ("probe", "random", "zero_shot")
    }
    assert not torch.equal(starts["probe"], starts["zero_shot"])
    assert not torch.equal(starts["random"], starts["zero_shot"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"data": {"label_names": None}, "measure": {"arms": ["zero_shot"]}},
         r"measure\.arms\.zero_shot: .*numbers without words: 0, 1\. .*label_names: \{0: \.\.\."),
        ({"data": {"label_names": {0: "bad"}}, "finetune": {"head_init": "zero_shot"}},
         r"numbers without words: 1\. "),
        ({"data": {"label_names": {0: "bad", 1: "bad"}}, "finetune": {"head_init": "zero_shot"}},
         "cannot tell the classes '0' and '1' apart: both are '"),
        ({"data": {"label_names": {2: "bad"}}}, r"data\.label_names: no row has the label '2'"),
        ({"finetune": {"head_init": "zero_shot", "zero_shot": {"descriptions": {"x": "y"}}}},
         r"zero_shot\.descriptions: no row has the label 'x'"),
        ({"finetune": {"head_init": "zero_shot", "pooling": "native"}},
         r"Set finetune\.pooling=mean"),
        ({"finetune": {"strategy": "zero_shot", "pooling": "native"}},
         r"Set finetune\.pooling=mean"),
        ({"finetune": {"zero_shot": {"templates": ["a film"]}}}, r"'a film' has 0 places \{\}"),
        ({"finetune": {"zero_shot": {"templates": ["{} {}"]}}}, r"'\{\} \{\}' has 2 places"),
        ({"finetune": {"zero_shot": {"descriptions": {0: []}}}}, "text of '0' is empty"),
        ({"data": {"task": "regression", "label_names": None}, "measure": {"arms": ["zero_shot"]}},
         r"measure\.arms\.zero_shot: .*task=regression asks for something else"),
        ({"data": {"task": "regression"}}, "label_names are words for classes"),
        ({"data": {"task": "token-classification"}, "finetune": {"pooling": "native"},
          "measure": {"arms": ["zero_shot"]}}, "task=token-classification asks"),
        ({"data": {"task": "multi-label"}, "finetune": {"head_init": "zero_shot"}},
         "do not say from where on a label of data.task=multi-label holds"),
        ({"data": {"train": {"path": "x.csv", "text": ["a", "b"]}},
          "finetune": {"strategy": "zero_shot"}}, r"data\.train\.text names two columns"),
        ({"finetune": {"head_init": "zero_shot"}, "retain": {"kl": {"on": "probe"}}},
         "starts from another head"),
    ],
)  # fmt: skip
def test_refusals(bert: Path, tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe = make_recipe(bert, tmp_path, **more)
        check_zero_shot(recipe, bench_of(recipe))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"finetune": {"strategy": "zero_shot"}}, "classifies by entailment, which reads a text"),
        ({"finetune": {"head_init": "zero_shot"}}, "is no head that could be trained"),
        ({"adapt": {"objective": "mlm"}, "measure": {"arms": ["zero_shot"]}},
         r"Write the arm as \{zero_shot: \{adapt: null\}\}"),
    ],
)  # fmt: skip
def test_refusals_of_an_entailment_head(
    entailment_model: Path, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    recipe = make_recipe(entailment_model, tmp_path, **more)
    with pytest.raises(RecipeError, match=message):
        check_zero_shot(recipe, bench_of(recipe))


def test_pictures_need_a_text_half(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from conftest import make_image_recipe, pictures

    recipe = make_image_recipe(pictures(tmp_path / "p", 12), tiny_model("vit"))
    recipe = recipe.model_copy(
        update={"measure": recipe.measure.model_copy(update={"arms": ["zero_shot"]})}
    )
    with pytest.raises(RecipeError, match=r"\(vit\) has none\. Use a CLIP, SigLIP or MetaCLIP"):
        check_zero_shot(recipe, bench_of(recipe))


@pytest.mark.parametrize(
    ("masked", "arms"), [(True, ["zero_shot"]), (True, []), (False, ["zero_shot"])]
)
def test_warns_of_an_encoder_that_predicts_words(
    masked: bool, arms: list[str], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = make_recipe(tiny_model("bert", masked), tmp_path, measure={"arms": arms})
    warnings = bench_of(recipe).run_preflight(recipe, recipe.arms).warnings
    named = [line for line in warnings if "trained to predict words (BertForMaskedLM)" in line]
    assert len(named) == (masked and bool(arms))


def test_only_arms_that_read_words_depend_on_them(bert: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        bert, tmp_path, finetune={"head_init": "zero_shot"},
        measure={"arms": ["scratch", "head", "zero_shot",
                          {"plain": {"finetune.head_init": "probe"}}]},
    )  # fmt: skip
    reads = {
        arm.name: any(
            key.startswith(("finetune.zero_shot", "data.label_names"))
            for key in build_arm_key(recipe, arm)
        )
        for arm in recipe.arms
    }
    assert reads == {
        "lora": True, "scratch": False, "classical": False, "head": False, "zero_shot": True,
        "plain": False,
    }  # fmt: skip
    zero_shot = next(arm for arm in recipe.arms if arm.name == "zero_shot")
    key = build_arm_key(recipe, zero_shot)
    assert not {"data.shots", "finetune.head_init", "finetune.training"} & set(key)
    assert not STRATEGIES["zero_shot"].reads_labels


def test_run_of_the_strategy_is_published_and_predicts(bert: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        bert, tmp_path, finetune={"strategy": "zero_shot"}, measure={"arms": ["classical", "head"]}
    )
    record = runs.run(recipe, tmp_path / "run")
    assert record is not None and record["reload_difference"] < 1e-5
    assert {row.arm for row in record.ladder} == {"zero_shot", "classical", "head"}
    card = (tmp_path / "run" / "publish" / "README.md").read_text("utf-8")
    assert "no label was used to make it; the published seed was chosen" in card
    assert "`0` is `a bad and dull film`, `this is bad and dull`" in card
    assert "`0` (bad and dull), `1` (good)" in card
    model = hftl.load(tmp_path / "run")
    texts = [text for text, _ in NUMBERED[:5]]
    predicted = [row["label"] for row in model.predict(texts)]
    context = bench_of(recipe)
    output = embed(context, texts) @ embed_classes(context).T
    assert [str(label) for label in predicted] == [str(i) for i in output.argmax(1)]


def embed_classes(context: ExperimentContext) -> np.ndarray:
    means = [
        embed(context, [f"a {words} film", f"this is {words}"]).mean(0) for words in WORDS.values()
    ]
    return np.stack([mean / np.linalg.norm(mean) for mean in means])


def test_run_from_the_zero_shot_head_beside_the_arm(bert: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        bert, tmp_path,
        finetune={"head_init": "zero_shot", "training": {"num_train_epochs": 1, "bf16": False}},
        measure={"arms": ["zero_shot", {"named": {"finetune.strategy": "zero_shot",
                                                  "finetune.zero_shot.templates": ["{}"]}}]},
        retain={"interpolate": [0, 0.5, 1]},
    )  # fmt: skip
    record = runs.run(recipe, tmp_path / "run")
    assert record is not None and record["reload_difference"] < 1e-5
    tree = json.loads((tmp_path / "run" / "record.json").read_text("utf-8"))
    prompts = {a["arm"]: a["training"].get("prompts") for a in tree["arms"]}
    assert prompts["lora"] is None and prompts["named"] == {"0": ["bad and dull"], "1": ["good"]}
    # The same words in another order of keys are the same arm; other words are another.
    again = runs.run(recipe, tmp_path / "run")
    assert again is not None
