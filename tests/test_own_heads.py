"""What the source's own heads say after training, against whole models of transformers."""

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
from tiny import tiny_config, tiny_processor, tiny_tokenizer
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    ViTMAEForPreTraining,
)

import hftl
from hftl.adapt.masked_patches import draw_patch_noise
from hftl.config.recipe import Recipe
from hftl.data.general import load_general
from hftl.data.load import InputSpec
from hftl.data.masking import build_masking_spec, mask_tokens
from hftl.data.splits import hash_row
from hftl.finetune.pretraining_heads import (
    MASK_PROBABILITY,
    find_source_classes,
    measure_pretraining_heads,
)
from hftl.finetune.strategies import prepare
from hftl.measure.forgetting import ForgettingSpec, measure_forgetting
from hftl.models.heads import LoadedModel


def tree_of(folder: Path, model: Path) -> dict[str, Any]:
    table = write_csv(folder / "reviews.csv", ["text", "label"], sentences(60))
    rows = [(text, f"d{i // 4}", tone) for i, (text, tone) in enumerate(sentences(100, 7))]
    path = write_csv(folder / "general.csv", ["text", "document", "tone"], rows)
    return {
        "source": {"model": str(model)},
        "data": {"train": {"path": str(table)}, "max_length": 16,
                 "general": {"path": str(path), "label": ["document", "tone"]}},
        "finetune": {"pooling": "mean", "strategy": "full",
                     "training": {"num_train_epochs": 2, "learning_rate": 5e-3, "bf16": False}},
        "measure": {"seeds": [0, 1], "arms": []},
    }  # fmt: skip


def bench_with_general(tree: dict[str, Any], reading: InputSpec = InputSpec()) -> Any:  # noqa: B008
    recipe = Recipe.parse(tree)
    bench = bench_of(recipe)
    bench.general = load_general(recipe.data, bench.prepared, reading)
    return bench


def moved(bench: Any, pooling: str, strategy: str) -> LoadedModel:
    """A model whose every trained weight is somewhere else."""
    built = bench.build_model(pooling, 0)
    model = prepare(built.model, strategy, lora={"r": 2}, fresh=built.fresh)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return LoadedModel(model, built.architecture, built.pooling, built.fresh)


def merged(built: LoadedModel) -> dict[str, torch.Tensor]:
    """The encoder's weights, by peft's own merging."""
    model: Any = copy.deepcopy(built.model)
    inner = model.encoder if built.pooling != "native" else model
    if hasattr(inner, "merge_and_unload"):
        inner = inner.merge_and_unload()
    return (inner if built.pooling != "native" else getattr(inner, built.architecture.encoder)
            ).state_dict()  # fmt: skip


@pytest.mark.parametrize(
    ("pooling", "strategy"), [("mean", "full"), ("native", "full"), ("mean", "lora"),
                              ("native", "lora")]
)  # fmt: skip
def test_the_masked_language_loss_is_that_of_the_stock_model(
    tmp_path: Path, tiny_model: Callable[..., Path], pooling: str, strategy: str
) -> None:
    folder = tiny_model("bert", True)
    bench = bench_with_general(tree_of(tmp_path, folder))
    built = moved(bench, pooling, strategy)
    before = {name: p.clone() for name, p in built.model.named_parameters()}
    hooks = sum(len(m._forward_hooks) for m in built.model.modules())
    found = measure_pretraining_heads(bench, built)["mlm_loss"]
    assert all(torch.equal(p, before[name]) for name, p in built.model.named_parameters())
    assert sum(len(m._forward_hooks) for m in built.model.modules()) == hooks
    stock: Any = BertForMaskedLM.from_pretrained(folder).eval()
    decoder = stock.cls.predictions.decoder
    decoder.weight = nn.Parameter(decoder.weight.detach().clone())
    stock.bert.load_state_dict(merged(built), strict=False)
    masking = build_masking_spec(bench.inputs.tokenizer, MASK_PROBABILITY, whole_words=False)
    for number, row in enumerate(bench.encode_rows(bench.general.eval_rows)):
        ids = np.array(row["input_ids"])
        draw = np.random.default_rng([0, number])
        shown, places = mask_tokens(ids, np.zeros_like(ids), masking, draw)
        assert found[number, 1] == len(places)
        if len(places):
            with torch.no_grad():
                logits = stock(input_ids=torch.from_numpy(shown)[None]).logits[0]
            wanted = F.cross_entropy(logits[places], torch.from_numpy(ids[places]))
            assert found[number, 0] == pytest.approx(wanted.item(), abs=1e-5)
    assert found[:, 1].sum() > 20


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A tiny BERT that was trained for two tones, in an order of its own."""
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
def test_the_sources_own_classes_are_told_by_its_own_head(
    tmp_path: Path, classifier: Path, pooling: str, strategy: str
) -> None:
    bench = bench_with_general(tree_of(tmp_path, classifier))
    assert find_source_classes(bench.source, bench.general) == ("tone", ["positive", "negative"])
    built = moved(bench, pooling, strategy)
    found = measure_pretraining_heads(bench, built)
    assert set(found) == {"backward"} and (found["backward"][:, 1] == 1).all()
    stock: Any = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    stock.bert.load_state_dict(merged(built), strict=False)
    tones = bench.general.values("tone")
    right = []
    for number, row in enumerate(bench.encode_rows(bench.general.eval_rows)):
        with torch.no_grad():
            logits = stock(input_ids=torch.tensor(row["input_ids"])[None]).logits[0]
        right.append(stock.config.id2label[int(logits.argmax())] == tones[number])
    assert found["backward"][:, 0].astype(bool).tolist() == right
    assert 0 < sum(right) < len(right)


def test_what_the_source_has_not_is_not_asked(
    tmp_path: Path, tiny_model: Callable[..., Path], classifier: Path
) -> None:
    tree = tree_of(tmp_path, tiny_model("bert"))
    bench = bench_with_general(tree)
    assert measure_pretraining_heads(bench, bench.build_model("mean", 0)) == {}
    bench.general = None
    assert measure_pretraining_heads(bench, bench.build_model("mean", 0)) == {}
    other = bench_with_general(tree_of(tmp_path, classifier))
    other.source.config.id2label = {0: "cold", 1: "warm"}
    assert find_source_classes(other.source, other.general) is None
    # Labels alone make no classifier: the head has to be in the checkpoint.
    bare = bench_with_general(tree)
    bare.source.config.id2label = {0: "negative", 1: "positive"}
    assert find_source_classes(bare.source, bare.general) is not None
    assert measure_pretraining_heads(bare, bare.build_model("mean", 0)) == {}


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_the_masked_image_loss_is_vit_maes(
    tmp_path: Path, tiny_model: Callable[..., Path], strategy: str
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
    bench = bench_with_general(tree, InputSpec("image", 8))
    built = moved(bench, "native", strategy)
    found = measure_pretraining_heads(bench, built)["mae_loss"]
    stock: Any = ViTMAEForPreTraining.from_pretrained(folder).eval()
    stock.vit.load_state_dict(merged(built), strict=False)
    for number, row in enumerate(bench.general.eval_rows):
        batch = bench.inputs.collate(bench.encode_rows([row]))
        noise = draw_patch_noise(16, 0, 0, hash_row(row))
        with torch.no_grad():
            wanted = stock(batch["pixel_values"], noise=noise[None]).loss
        assert found[number] == pytest.approx([wanted.item(), 12 * 8 * 8 * 3], rel=1e-4)
    headless = tmp_path / "headless"
    stock.vit.save_pretrained(headless)
    tiny_processor(headless)
    bare = bench_with_general(tree | {"source": {"model": str(headless)}}, InputSpec("image", 8))
    assert measure_pretraining_heads(bare, bare.build_model("native", 0)) == {}


def test_the_figures_are_means_over_all_that_was_hidden() -> None:
    draw = np.random.default_rng(0)

    def side() -> dict[str, np.ndarray]:
        places = np.arange(40) % 4  # The first row of four was not asked anything.
        means = np.where(places > 0, draw.exponential(size=40), 0)
        return {
            "general": draw.normal(size=(40, 5)).astype(np.float32),
            "new": draw.normal(size=(5, 5)).astype(np.float32),
            "mlm_loss": np.stack([means, places], 1).astype(np.float32),
        }

    before, after = side(), [side(), side()]
    asked = ForgettingSpec({}, (), np.arange(40) // 4, 0.05)
    told = measure_forgetting(before, {"own": after}, asked)["own"]
    sums = [(s["mlm_loss"][:, 0] * s["mlm_loss"][:, 1]).sum() for s in (before, *after)]
    figure = told["mlm_loss"]
    assert figure["before"] == pytest.approx(sums[0] / 60)
    assert figure["per_seed"] == pytest.approx([total / 60 for total in sums[1:]])
    assert figure["ci95"][0] < figure["change"] < figure["ci95"][1]
    assert told["mae_loss"] is None and told["backward"] is None
    # A seed of an earlier version, which was not asked, leaves the figure out.
    del after[1]["mlm_loss"]
    assert measure_forgetting(before, {"own": after}, asked)["own"]["mlm_loss"] is None
    nothing = {**before, "mlm_loss": np.zeros((40, 2), np.float32)}
    assert measure_forgetting(nothing, {"own": [nothing]}, asked)["own"]["mlm_loss"] is None


@pytest.mark.parametrize("head", ["mlm_loss", "backward"])
def test_a_run_tells_it_in_record_and_card(
    tmp_path: Path, tiny_model: Callable[..., Path], classifier: Path, head: str
) -> None:
    model = tiny_model("bert", True) if head == "mlm_loss" else classifier
    tree = tree_of(tmp_path, model)
    tree["measure"] = {"seeds": [0, 1], "arms": ["head"]}
    record = hftl.run(Recipe.parse(tree), tmp_path / "run")
    assert record is not None
    own, frozen = record["forgetting"]["arms"]
    figure = own["figures"][head]
    assert len(figure["per_seed"]) == 2 and figure["ci95"] is not None
    kept = [load_file(tmp_path / f"run/arms/full-seed{s}/embeddings.safetensors")[head]
            for s in (0, 1)]  # fmt: skip
    wanted = [np.average(told[:, 0], weights=told[:, 1]) for told in kept]
    assert (
        figure["per_seed"] == pytest.approx(wanted) and len(kept[0]) == record["forgetting"]["rows"]
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
