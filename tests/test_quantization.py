"""Check sources whose frozen weights are held in 4 bits: what is refused, and a run on a CPU."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import bench_of, sentences, write_csv
from support.tiny import save_tiny, tiny_config
from transformers import AutoModel
from typer.testing import CliRunner

import hftl
from hftl.analysis import own_labels
from hftl.card.snippets import ModelFolder, render_plain_snippet
from hftl.cli import app
from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.errors import RecipeError, RunFolderError
from hftl.finetune.trainable import apply_strategy
from hftl.inference import load
from hftl.models import heads, quantization
from hftl.models.source import find_source, hash_source_config
from hftl.pipeline import pipeline
from hftl.pipeline.cache_keys import build_arm_inputs
from hftl.pipeline.changed_inputs import is_stage_finished
from hftl.publish import reload_check
from hftl.runtime import run_folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "t.csv", ["text", "label"], sentences(60)) or tmp_path / "t.csv"


def make_recipe(model: Path, table: Path, **more: Any) -> Recipe:
    training = {"num_train_epochs": 1, "learning_rate": 1e-2, "bf16": False}
    return Recipe.parse({
        "source": {"model": str(model), "quantization": "4bit", "published_as": "org/base"},
        "data": {"train": {"path": str(table)}},
        "finetune": {"training": training} | more.pop("finetune", {}),
        "measure": {"seeds": [0], "arms": []} | more.pop("measure", {}), **more,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cpu", "source.quantization=4bit needs a CUDA GPU, and the device here is cpu"),
        ("cuda", "needs bitsandbytes, which is not installed. pip install 'hftl"),
    ],
)
def test_what_is_missing_here_is_one_line(
    device: str, message: str, bert: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "get_device", lambda: device)
    monkeypatch.setattr(quantization, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=message):
        find_source(make_recipe(bert, table).source)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"finetune": {"strategy": "full"}}, "cannot train, and finetune.strategy=full trains"),
        ({"finetune": {"strategy": "head"}}, "published as an adapter .*strategy=head makes none"),
        ({"measure": {"arms": [{"top": {"finetune.strategy": "partial"}}]}},
         r"measure\.arms\.top: .*finetune.strategy=partial trains them"),
        ({"adapt": {"objective": "mlm"}}, "and adapt reads or changes them in fp32"),
        ({"retain": {"kl": {"on": "relational"}}}, "and retain reads or changes them in fp32"),
        ({"finetune": {"pooling": "embedding"}}, "4bit: finetune.pooling=embedding reads weights"),
        ({"finetune": {"head_init": "zero_shot"}}, "4bit: finetune.head_init=zero_shot reads"),
        ({"measure": {"arms": ["zero_shot"]}},
         r"measure\.arms\.zero_shot: .*4bit: the arm zero_shot reads weights in fp32 alone"),
    ],
)  # fmt: skip
def test_only_adapters_train_on_quantized_weights(
    more: dict[str, Any], message: str, bert: Path, table: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(bert, table, **more)
    recipe = make_recipe(bert, table, measure={"arms": ["scratch", "head"]})
    assert [arm.name for arm in recipe.arms] == ["lora", "scratch", "classical", "head"]


def test_schema_names_the_key_and_other_values_are_refused(bert: Path, table: Path) -> None:
    schema = json.loads(CliRunner().invoke(app, ["schema", "recipe"]).output)
    key = schema["$defs"]["Source"]["properties"]["quantization"]
    assert {"const": "4bit", "type": "string"} in key["anyOf"] and key["default"] is None
    tree = make_recipe(bert, table).to_dict() | {"source": {"model": "x", "quantization": "8bit"}}
    with pytest.raises(RecipeError, match="'source.quantization' must be 4bit, or null"):
        Recipe.parse(tree)


def test_another_quantization_is_refused_by_its_name(
    bert: Path, table: Path, tmp_path: Path
) -> None:
    tree: Any = make_recipe(bert, table).to_dict()
    tree["source"]["quantization"] = None
    whole = bench_of(Recipe.parse(tree))
    source = replace(whole.source, quantization="4bit")
    held = replace(whole, source=source, config_hash=hash_source_config(source))
    (arm,) = Recipe.parse(tree).arms
    before, now = (build_arm_inputs(Recipe.parse(tree), each, arm) for each in (whole, held))
    for first, second, change in ((before, now, "None -> 4bit"), (now, before, "4bit -> None")):
        with run_folder.commit_stage(tmp_path / "arms" / "lora-seed0", first):
            pass
        assert is_stage_finished(tmp_path, tmp_path / "arms" / "lora-seed0", first)
        with pytest.raises(RunFolderError, match=f"recipe: source.quantization: {change}"):
            is_stage_finished(tmp_path, tmp_path / "arms" / "lora-seed0", second)
        shutil.rmtree(tmp_path / "arms")


@pytest.mark.parametrize(
    ("task", "whole"), [("classification", ["pooler", "classifier"]),
                        ("token-classification", ["classifier"])]
)  # fmt: skip
def test_the_base_is_held_as_the_tasks_class_was(
    task: str, whole: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config("bert").save_pretrained(tmp_path)
    content = {"recipe": {"source": {"quantization": "4bit"}}, "data": {"task": task}}
    (tmp_path / "hftl.json").write_text(json.dumps(content), "utf-8")
    monkeypatch.setattr(load, "check_quantization", lambda: None)
    monkeypatch.setattr(load, "build_quantization_config", quantization.list_whole_modules)
    names = {name.rsplit(".", 1)[-1] for name in load._read_quantization(tmp_path)}
    assert names == set(whole)


def test_the_sources_own_classifier_is_held_in_4_bits(
    bert: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(heads, "build_quantization_config", lambda spec: spec.encoder)
    monkeypatch.setattr(own_labels, "load_class", lambda *a: (None, given.append(a[3]) or {"x"}))
    source = replace(find_source(Source(model=str(bert))), quantization="4bit")
    examined: Any = SimpleNamespace(context=SimpleNamespace(source=source))
    assert own_labels.predict_own(examined, 5) is None
    assert given[0]["quantization_config"] == "bert" and "device_map" in given[0]


@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_card_loads_the_base_as_it_was_trained_on(pooling: str) -> None:
    folder = ModelFolder(
        "publish", "org/base", "0123", pooling, 2, True, "text", '"A text."', architecture="llama",
        is_quantized=True,
    )  # fmt: skip
    code = render_plain_snippet(folder)
    compile(code, "snippet", "exec")
    assert 'bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["score"]' in code
    assert (
        "AutoTokenizer, BitsAndBytesConfig\n" in code and 'return_tensors="pt").to("cuda")' in code
    )
    assert (', "cuda")' in code) == (pooling == "mean")


def reload_here(folder: Path, base: Path, sample: Path, device: str) -> float:
    """Reload in this process, whose kernels are set."""
    content = json.loads(sample.read_text("utf-8"))
    model = reload_check.load_folder(folder, base, content["quantization"]).to(device)
    batches = reload_check.build_sample_batches(folder, sample, alone=True)
    logits = reload_check.compute_sample_logits(model, batches, device)
    expected = torch.tensor(content["logits"])
    return float((logits - expected).abs().max()) / max(1.0, float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pooling"), [("llama", "native"), ("bert", "mean"), ("bert", "native")]
)
def test_run_on_quantized_weights_reloads(
    name: str, pooling: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run bitsandbytes' kernels for CPUs, in the place of a GPU's."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs pip install 'hftl[quantization]'")
    # On some CPUs evaluation packs the weights anew, so that they cannot train any more.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    monkeypatch.setattr("hftl.pipeline.evaluate.measure_reload_difference", reload_here)
    monkeypatch.setattr("hftl.models.source.check_quantization", lambda: None)
    monkeypatch.setattr("hftl.inference.load.check_quantization", lambda: None)
    # The kernels take widths that 32 divides.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    save_tiny(name, tmp_path / name)
    AutoModel.from_config(tiny_config(name, **sizes)).save_pretrained(tmp_path / name)
    recipe = make_recipe(
        tmp_path / name, table, finetune={"pooling": pooling}, measure={"arms": ["scratch", "head"]}
    )
    context = bench_of(recipe)
    built = context.build_model(pooling, 0)
    model = apply_strategy(built.model, recipe.finetune, built.fresh)
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 3 * (7 if name == "llama" else 6)
    assert all(layer.weight.dtype == torch.uint8 for layer in layers)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    record = pipeline.run(recipe, tmp_path / "run")
    assert record is not None and record["reload_difference"] < 1e-5
    card = (tmp_path / "run" / "publish" / "README.md").read_text("utf-8")
    assert "held in 4 bits" in card and "BitsAndBytesConfig(" in card
    config = json.loads((tmp_path / "run" / "publish" / "config.json").read_text("utf-8"))
    assert "quantization_config" not in config
    assert hftl.load(tmp_path / "run", tmp_path / name).predict(["a good film"])
