"""Check that plain transformers reads a published folder to the same outputs, or refuses it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sentences, write_csv
from peft import PeftModel
from support.published_model import open_context, publish_model
from support.tiny import TEXT_MODELS
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline

from hftl import load
from hftl.card.snippets import ModelFolder, render_pipeline_snippet
from hftl.models.lora import build_path_pattern
from hftl.publish.checks import measure_reload_difference

Tiny = Callable[..., Path]
USUAL = ("bert", "roberta", "distilbert", "albert", "electra", "mpnet", "deberta-v2", "modernbert")
MODELS = [
    *USUAL,
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in TEXT_MODELS if kind not in USUAL),
]
TEXTS = ["a good film", "the plot is dull", "fresh music and a bitter story"]
CANNOT = (RuntimeError, ValueError, OSError, KeyError)
"""What transformers and peft raise on weights or layers that do not fit."""


def folder_of(model: Path, folder: Path, pooling: str, strategy: str, base: bool = True) -> Path:
    """Return a published folder whose adapter names a local base folder; without a config.json of
    its own transformers reads the base's, as it does for every adapter on a hub."""
    bench, recipe = open_context(model, folder, pooling, strategy)
    publish_model(bench, recipe, folder)
    made = folder / "publish"
    if strategy == "lora" and base:
        file = made / "adapter_config.json"
        settings = json.loads(file.read_text()) | {"base_model_name_or_path": str(model)}
        file.write_text(json.dumps(settings))
    return made


@pytest.mark.parametrize("kind", MODELS)
def test_stock_class_refuses_a_pooled_model_and_its_encoder_loads(
    kind: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    made = folder_of(tiny_model(kind), tmp_path, "mean", "full")
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForSequenceClassification.from_pretrained(made)
    with pytest.raises(CANNOT):
        pipeline("text-classification", model=str(made))(TEXTS)
    ours: Any = load(made).model
    encoder = AutoModel.from_pretrained(made)
    for name, tensor in encoder.state_dict().items():
        # No pooler is published: pooling is hftl's own.
        assert name.startswith("pooler") or torch.equal(tensor, ours.model.state_dict()[name]), name


@pytest.mark.parametrize("kind", MODELS)
def test_stock_class_refuses_a_pooled_adapter_and_auto_model_loads_it(
    kind: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    base = tiny_model(kind)
    made = folder_of(base, tmp_path, "cls", "lora")
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(base), made)
    ours: Any = load(made, base=base).model
    layers = [name for name, part in ours.model.named_modules() if hasattr(part, "lora_A")]
    assert layers == [name for name, part in adapted.named_modules() if hasattr(part, "lora_A")]
    for _ in range(2):
        with pytest.raises(CANNOT):
            AutoModelForSequenceClassification.from_pretrained(made)
        with pytest.raises(CANNOT):
            pipeline("text-classification", model=str(made))(TEXTS)
        # Without its config.json, as on a hub, the base's is read.
        (made / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("strategy", ["full", "head"])
def test_native_model_predicts_the_same_in_a_pipeline(
    strategy: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    made = folder_of(tiny_model("bert"), tmp_path, "native", strategy)
    assert_same(pipeline("text-classification", model=str(made), top_k=None), load(made))


def assert_same(stock: Any, ours: Any) -> None:
    for theirs, answer in zip(stock(TEXTS), ours.predict(TEXTS), strict=True):
        scores = {one["label"]: one["score"] for one in theirs}
        assert scores.keys() == answer["scores"].keys() == {"negative", "positive"}
        np.testing.assert_allclose([scores[n] for n in scores],
                                   [answer["scores"][n] for n in scores], atol=1e-5)  # fmt: skip


@pytest.mark.parametrize(("kind", "classes"), [("bert", 2), ("roberta", 3), ("distilbert", 3)])
def test_pipeline_snippet_of_the_card_gives_labels_and_scores(
    kind: str, classes: int, tiny_model: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["negative", "positive", "neither"][:classes]
    rows = [(text, names[n % classes]) for n, (text, _) in enumerate(sentences(60))]
    table = write_csv(tmp_path / "t.csv", ["text", "label"], rows)
    data = {"task": "classification", "train": {"path": str(table)}, "max_length": 16}
    base = tiny_model(kind)
    bench, recipe = open_context(base, tmp_path, "native", "lora", data)
    publish_model(bench, recipe, tmp_path)
    made = tmp_path / "publish"
    file = made / "adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)})
    )
    # Words beyond the cut change nothing.
    predictor = load(made, base=base)
    cut = predictor.inputs.max_length  # pyright: ignore
    text = f"{TEXTS[2]} " * cut
    (expected,) = predictor.predict([text])
    folder = ModelFolder(
        str(made), "org/base", None, "native", classes, True, "text", f'"{text}"', max_tokens=cut
    )
    code = render_pipeline_snippet(folder)
    assert code is not None
    exec(compile(code, "card", "exec"), {"__name__": "card"})  # noqa: S102
    printed = capsys.readouterr().out
    ((label, score),) = re.findall(r"'label': '(\w+)', 'score': ([\d.]+)", printed)
    assert label == expected["label"]
    assert float(score) == pytest.approx(expected["score"], abs=1e-5)


@pytest.mark.usefixtures("fast_reload")
@pytest.mark.parametrize("pooling", ["mean", pytest.param("native", marks=pytest.mark.slow)])
def test_folder_of_an_older_version_still_loads(
    pooling: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    # It has no empty tensor, and its layers as a list.
    base = tiny_model("bert")
    bench, recipe = open_context(base, tmp_path, pooling, "lora")
    sample = publish_model(bench, recipe, tmp_path)
    file = tmp_path / "publish" / "adapter_config.json"
    targets = list(bench.source.architecture_spec.lora_targets)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": targets}))
    assert measure_reload_difference(tmp_path / "publish", base, sample, "cpu") <= 1e-5


BLOCKS = [f"encoder.layer.{n}.{name}" for n in range(12) for name in ("query", "key")]


@pytest.mark.parametrize(
    "paths",
    [
        BLOCKS,
        BLOCKS[:4],
        [*BLOCKS[:4], "encoder.layer.11.query"],
        ["encoder.albert_layer_groups.0.albert_layers.0.ffn"],
        ["layers.3.attn.Wqkv", "pooler.dense"],
    ],
)
def test_path_pattern_matches_exactly_the_paths(paths: list[str]) -> None:
    modules = sorted({*BLOCKS, *paths, "encoder", "encoder.layer.0.value", "layersX3.attn.Wqkv"})
    pattern = build_path_pattern(paths, modules)
    assert {name for name in modules if re.fullmatch(pattern, name)} == set(paths)
    assert not any(re.fullmatch(pattern, f"bert.{name}") for name in modules)
    # All blocks are adapted: a base of one more must not fit.
    assert bool(re.fullmatch(pattern, "encoder.layer.12.key")) == (paths == BLOCKS)
