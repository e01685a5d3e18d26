"""Compare the source's own heads on a trained encoder with stock models of transformers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import bench_of, pictures, sentences, write_csv
from safetensors.numpy import load_file
from support.tiny import tiny_config, tiny_processor, tiny_tokenizer
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    ViTMAEForPreTraining,
)

import hftl
from hftl.config.recipe import Recipe
from hftl.data.general import load_general
from hftl.data.masking import build_masking_spec, draw_patch_noise, mask_tokens
from hftl.data.rows import InputSpec
from hftl.data.splits import hash_row
from hftl.finetune.pretraining_heads import (
    MASK_PROBABILITY,
    embed_compared_rows,
    embed_source,
    find_source_classes,
    measure_pretraining_heads,
)
from hftl.finetune.trainable import prepare
from hftl.measure.forgetting import ForgettingSpec, measure_forgetting
from hftl.models import features
from hftl.models.heads import LoadedModel

pytestmark = pytest.mark.usefixtures("fast_reload")

Tiny = Callable[..., Path]


def build_tree(folder: Path, model: Path) -> dict[str, Any]:
    table = write_csv(folder / "reviews.csv", ["text", "label"], sentences(60))
    rows = [(text, f"d{i // 4}", tone) for i, (text, tone) in enumerate(sentences(100, 7))]
    path = write_csv(folder / "general.csv", ["text", "document", "tone"], rows)
    return {
        "source": {"model": str(model)},
        "data": {"train": {"path": str(table)}, "max_length": 16,
                 "general": {"path": str(path), "label": ["document", "tone"]}},
        "finetune": {"pooling": "mean", "strategy": "full",
                     "training": {"num_train_epochs": 1, "learning_rate": 5e-3, "bf16": False}},
        "measure": {"seeds": [0, 1], "arms": []},
    }  # fmt: skip


def build_context_with_general(tree: dict[str, Any], spec: InputSpec = InputSpec()) -> Any:  # noqa: B008
    recipe = Recipe.parse(tree)
    context = bench_of(recipe)
    context.general = load_general(recipe.data, context.prepared, spec)
    return context


def build_perturbed(context: Any, pooling: str, strategy: str) -> LoadedModel:
    """Return a model with noise added to every trained weight."""
    trained = context.build_model(pooling, 0)
    model = prepare(trained.model, strategy, lora={"r": 2}, fresh=trained.fresh)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return LoadedModel(model, trained.architecture, trained.pooling, trained.fresh)


def merge_encoder(trained: LoadedModel) -> dict[str, torch.Tensor]:
    """Return the encoder's weights, merged by peft."""
    model: Any = copy.deepcopy(trained.model)
    inner = model.encoder if trained.pooling != "native" else model
    if hasattr(inner, "merge_and_unload"):
        inner = inner.merge_and_unload()
    return (inner if trained.pooling != "native" else getattr(inner, trained.architecture.encoder)
            ).state_dict()  # fmt: skip


@pytest.mark.parametrize(("pooling", "strategy"), [("native", "full"), ("mean", "lora")])
def test_masked_language_loss_equals_the_stock_model_s(
    tmp_path: Path, tiny_model: Tiny, pooling: str, strategy: str
) -> None:
    folder = tiny_model("bert", True)
    context = build_context_with_general(build_tree(tmp_path, folder))
    trained = build_perturbed(context, pooling, strategy)
    before = {name: p.clone() for name, p in trained.model.named_parameters()}
    hooks = sum(len(m._forward_hooks) for m in trained.model.modules())
    values = measure_pretraining_heads(context, trained)["mlm_loss"]
    assert all(torch.equal(p, before[name]) for name, p in trained.model.named_parameters())
    assert sum(len(m._forward_hooks) for m in trained.model.modules()) == hooks
    stock: Any = BertForMaskedLM.from_pretrained(folder).eval()
    decoder = stock.cls.predictions.decoder
    decoder.weight = nn.Parameter(decoder.weight.detach().clone())
    stock.bert.load_state_dict(merge_encoder(trained), strict=False)
    masking = build_masking_spec(context.inputs.tokenizer, MASK_PROBABILITY, whole_words=False)
    for number, row in enumerate(context.encode_rows(context.general.eval_rows)):
        ids = np.array(row["input_ids"])
        draw = np.random.default_rng([0, number])
        masked, positions = mask_tokens(ids, np.zeros_like(ids), masking, draw)
        assert values[number, 1] == len(positions)
        if len(positions):
            with torch.no_grad():
                logits = stock(input_ids=torch.from_numpy(masked)[None]).logits[0]
            expected = F.cross_entropy(logits[positions], torch.from_numpy(ids[positions]))
            assert values[number, 0] == pytest.approx(expected.item(), abs=1e-5)
    assert values[:, 1].sum() > 20


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """Save a tiny BERT classifier of two tones, in another order than general data."""
    folder = tmp_path / "classifier"
    torch.manual_seed(5)
    names = {0: "positive", 1: "negative"}
    config = tiny_config("bert", id2label=names, label2id={v: k for k, v in names.items()})
    model: Any = AutoModelForSequenceClassification.from_config(config)
    nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


@pytest.mark.parametrize(("pooling", "strategy"), [("mean", "full"), ("native", "lora")])
def test_source_classes_are_predicted_by_its_own_head(
    tmp_path: Path, classifier: Path, pooling: str, strategy: str
) -> None:
    context = build_context_with_general(build_tree(tmp_path, classifier))
    assert find_source_classes(context.source, context.general) == (
        "tone",
        ["positive", "negative"],
    )
    trained = build_perturbed(context, pooling, strategy)
    values = measure_pretraining_heads(context, trained)
    assert set(values) == {"backward"} and (values["backward"][:, 1] == 1).all()
    stock: Any = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    stock.bert.load_state_dict(merge_encoder(trained), strict=False)
    tones = context.general.get_control_values("tone")
    right = []
    for number, row in enumerate(context.encode_rows(context.general.eval_rows)):
        with torch.no_grad():
            logits = stock(input_ids=torch.tensor(row["input_ids"])[None]).logits[0]
        right.append(stock.config.id2label[int(logits.argmax())] == tones[number])
    assert values["backward"][:, 0].astype(bool).tolist() == right
    assert 0 < sum(right) < len(right)


def test_missing_heads_are_not_measured(tmp_path: Path, tiny_model: Tiny, classifier: Path) -> None:
    tree = build_tree(tmp_path, tiny_model("bert"))
    context = build_context_with_general(tree)
    assert measure_pretraining_heads(context, context.build_model("mean", 0)) == {}
    context.general = None
    assert measure_pretraining_heads(context, context.build_model("mean", 0)) == {}
    other = build_context_with_general(build_tree(tmp_path, classifier))
    other.source.config.id2label = {0: "cold", 1: "warm"}
    assert find_source_classes(other.source, other.general) is None
    # Labels alone make no classifier: the head has to be in the checkpoint.
    bare = build_context_with_general(tree)
    bare.source.config.id2label = {0: "negative", 1: "positive"}
    assert find_source_classes(bare.source, bare.general) is not None
    assert measure_pretraining_heads(bare, bare.build_model("mean", 0)) == {}


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_masked_image_loss_equals_vit_mae_s(
    tmp_path: Path, tiny_model: Tiny, strategy: str
) -> None:
    folder = tiny_model("vit_mae")
    train, general = pictures(tmp_path / "train", 12), tmp_path / "general"
    pictures(general, 25)
    for label in ("light", "dark"):
        for number in range(12):
            (general / label / f"{number}.png").unlink()
    tree = {
        "source": {"model": str(folder)},
        "data": {"train": {"path": str(train)},
                 "general": {"path": str(general), "label": "label"}},
    }  # fmt: skip
    context = build_context_with_general(tree, InputSpec("image", 8))
    trained = build_perturbed(context, "native", strategy)
    values = measure_pretraining_heads(context, trained)["mae_loss"]
    stock: Any = ViTMAEForPreTraining.from_pretrained(folder).eval()
    stock.vit.load_state_dict(merge_encoder(trained), strict=False)
    for number, row in enumerate(context.general.eval_rows):
        batch = context.inputs.collate(context.encode_rows([row]))
        noise = draw_patch_noise(16, 0, 0, hash_row(row))
        with torch.no_grad():
            expected = stock(batch["pixel_values"], noise=noise[None]).loss
        assert values[number] == pytest.approx([expected.item(), 12 * 8 * 8 * 3], rel=1e-4)
    headless = tmp_path / "headless"
    stock.vit.save_pretrained(headless)
    tiny_processor(headless)
    bare = build_context_with_general(
        tree | {"source": {"model": str(headless)}}, InputSpec("image", 8)
    )
    assert measure_pretraining_heads(bare, bare.build_model("native", 0)) == {}


def test_figures_are_means_over_all_masked_elements() -> None:
    draw = np.random.default_rng(0)

    def side() -> Any:
        positions = np.arange(40) % 4  # No token of the first row of four was masked.
        means = np.where(positions > 0, draw.exponential(size=40), 0)
        return {
            "general": draw.normal(size=(40, 5)).astype(np.float32),
            "new": draw.normal(size=(5, 5)).astype(np.float32),
            "mlm_loss": np.stack([means, positions], 1).astype(np.float32),
        }

    before, after = side(), [side(), side()]
    spec = ForgettingSpec({}, (), np.arange(40) // 4, 0.05)
    figures = measure_forgetting(before, {"own": after}, spec)["own"]
    sums = [(s["mlm_loss"][:, 0] * s["mlm_loss"][:, 1]).sum() for s in (before, *after)]
    figure = figures["mlm_loss"]
    assert figure["before"] == pytest.approx(sums[0] / 60)
    assert figure["per_seed"] == pytest.approx([total / 60 for total in sums[1:]])
    assert figure["ci95"][0] < figure["change"] < figure["ci95"][1]
    assert figures["mae_loss"] is None and figures["backward"] is None
    # A seed of an earlier version did not measure it.
    del after[1]["mlm_loss"]
    assert measure_forgetting(before, {"own": after}, spec)["own"]["mlm_loss"] is None
    nothing: Any = {**before, "mlm_loss": np.zeros((40, 2), np.float32)}
    assert measure_forgetting(nothing, {"own": [nothing]}, spec)["own"]["mlm_loss"] is None


@pytest.mark.parametrize("head", ["mlm_loss", pytest.param("backward", marks=pytest.mark.slow)])
def test_run_reports_heads_in_record_and_card(
    tmp_path: Path, tiny_model: Tiny, classifier: Path, head: str
) -> None:
    model = tiny_model("bert", True) if head == "mlm_loss" else classifier
    tree = build_tree(tmp_path, model)
    tree["measure"] = {"seeds": [0, 1], "arms": ["head"]}
    record = hftl.run(Recipe.parse(tree), tmp_path / "run")
    assert record is not None
    own, frozen = record["forgetting"]["arms"]
    figure = own["figures"][head]
    assert len(figure["per_seed"]) == 2 and figure["ci95"] is not None
    stored = [load_file(tmp_path / f"run/arms/full-seed{s}/embeddings.safetensors")[head]
            for s in (0, 1)]  # fmt: skip
    expected = [np.average(seed[:, 0], weights=seed[:, 1]) for seed in stored]
    assert (
        figure["per_seed"] == pytest.approx(expected)
        and len(stored[0]) == record["forgetting"]["rows"]
    )
    assert frozen["figures"][head]["change"] == 0
    others = {"mlm_loss", "mae_loss", "backward"} - {head}
    assert all(own["figures"][name] is None for name in others)
    control = "tone" if head == "backward" else None
    assert record["forgetting"]["backward_control"] == control
    words = {"mlm_loss": "masked-language head", "backward": "the original's own classes"}[head]
    (line,) = [line for line in (tmp_path / "run/publish/README.md").read_text("utf-8").splitlines()
               if words in line]  # fmt: skip
    assert f"| {figure['before']:.3f} | {figure['after']:.3f} |" in line


def test_the_source_is_compared_by_the_features_that_a_run_has(
    tmp_path: Path, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = build_context_with_general(build_tree(tmp_path, tiny_model("bert")))
    built = context.build_model("mean", 0)
    expected = embed_compared_rows(context, built)
    context.extract_features("mean", 0, context.prepared.rows["test"])
    passed: list[int] = []
    compute = features.compute_frozen_features

    def count(model: Any, last: Any, encoded: list[Any], *more: Any) -> Any:
        passed.append(len(encoded))
        return compute(model, last, encoded, *more)

    for module in ("hftl.finetune.context", "hftl.finetune.pretraining_heads"):
        monkeypatch.setattr(f"{module}.compute_frozen_features", count)
    embeddings = embed_source(context, 0, {"mean"})
    assert passed == [len(context.general.eval_rows)], "test passes no second time"
    assert embeddings.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(embeddings[name], values, atol=1e-5, err_msg=name)


def test_after_a_stop_test_passes_the_source_as_a_head_has_read_it(
    tmp_path: Path, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = build_tree(tmp_path, tiny_model("bert"))
    monkeypatch.setattr("hftl.finetune.pretraining_heads.MAX_NEW_ROWS", 5)
    for heads, rows in (({"cls"}, 5), ({"mean"}, None)):
        context = build_context_with_general(tree)
        embeddings = embed_source(context, 0, heads)
        (known,) = context.dump_features().values()
        rows = rows or len(context.prepared.rows["test"])
        assert len(known) == len(context.general.eval_rows) + rows
        assert len(embeddings["new"]) == 5
