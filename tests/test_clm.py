"""Adapt decoders by the next token: its loss, its corpus, whole runs, and KL on it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import sentences, write_csv
from support.tiny import CAUSAL_MODELS
from support.training import build_probed_model, perturb, stack_rows
from torch import Tensor
from transformers import AutoModelForCausalLM

import hftl
from hftl.adapt.language_model import find_clm_class, find_mlm_class, load_clm
from hftl.config.recipe import Recipe
from hftl.config.retain import KL
from hftl.config.section import Source
from hftl.data.corpus import BlockSpec, TokenBlocks, write_blocks
from hftl.data.next_tokens import NextTokenBlocks
from hftl.errors import RecipeError
from hftl.finetune.pretraining_heads import check_pretraining_head
from hftl.finetune.trainable import prepare
from hftl.models.model_parts import get_encoder, get_model_spec
from hftl.models.source import find_source, load_tokenizer
from hftl.retain.pretraining_kl import NextTokenKL

Tiny = Callable[..., Path]
END = 3
TRAINING = {"num_train_epochs": 4, "learning_rate": 5e-3, "bf16": False}


@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_loss_is_the_stock_class_s(name: str, tiny_model: Tiny) -> None:
    folder = tiny_model(name, True)
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    model, new = load_clm(find_source(Source(model=str(folder))), 0)
    assert not new
    draw = np.random.default_rng(0)
    blocks: Any = [(draw.integers(5, 40, n), np.arange(n)) for n in (8, 8, 5)]
    rows = NextTokenBlocks(blocks, 0)
    batch = rows.collate([rows[i] for i in range(len(blocks))])
    labels = batch.pop("labels").flatten()[batch["slots"]]
    assert len(labels) == 7 + 7 + 4
    mask = batch["attention_mask"]
    targets = batch["input_ids"].masked_fill(mask == 0, -100)
    with torch.no_grad():
        expected = stock(input_ids=batch["input_ids"], attention_mask=mask, labels=targets).loss
        loss = F.cross_entropy(model.eval()(**batch).logits, labels)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)


def test_no_document_predicts_the_next_one(tiny_model: Tiny, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(find_source(Source(model=str(tiny_model("llama")))))
    texts = [text for text, _ in sentences(40)]
    write_blocks(texts, tokenizer, BlockSpec(16, True, 0.2, 0, END), lambda _: False, tmp_path)
    rows = NextTokenBlocks(TokenBlocks(tmp_path, "train"), 0)
    stream, ends = 0, 0
    for i in range(len(rows)):
        row = rows[i]
        ids, positions = row["input_ids"], row["positions"]
        assert (ids[positions] != END).all()
        np.testing.assert_array_equal(row["labels"], ids[positions + 1])
        np.testing.assert_array_equal(positions, np.flatnonzero(ids[:-1] != END))
        ends += int((row["labels"] == END).sum())
        stream += len(ids)
    assert ends > 20 and stream > 200


def build_tree(model: Path, folder: Path, method: str, **more: Any) -> dict[str, Any]:
    table = write_csv(folder / "t.csv", ["text", "label"], sentences(160))
    corpus = write_csv(folder / "c.csv", ["text"], [[text] for text, _ in sentences(90, 5)])
    adapt = {
        "objective": "clm", "method": method, "guard": "probe", "tolerance": 1.0,
        "training": TRAINING,
    }  # fmt: skip
    finetune = {"head_init": "random", "training": TRAINING | {"num_train_epochs": 1}}
    return {
        "source": {"model": str(model)},
        "data": {"train": {"path": str(table)}, "unlabeled": {"path": str(corpus)},
                 "max_length": 16},
        "adapt": adapt, "finetune": finetune, "measure": {"seeds": [0], "arms": []},
    } | more  # fmt: skip


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param("llama", "full", marks=pytest.mark.slow),
        ("llama", "lora"),
        pytest.param("modernbert-decoder", "lora", marks=pytest.mark.slow),
    ],
)
def test_a_run_adapts_and_publishes(
    name: str, method: str, tiny_model: Tiny, tmp_path: Path, fast_reload: None
) -> None:
    retain = {"kl": {"on": "clm", "weight": 0.1}}
    tree = build_tree(tiny_model(name, True), tmp_path, method, retain=retain)
    record: Any = hftl.run(Recipe.parse(json.loads(json.dumps(tree))), tmp_path / "run")
    (stage,) = record.stages
    assert (stage.objective, stage.method, stage.kept) == ("clm", method, "adapted")
    assert stage.loss.after < stage.loss.before
    assert stage.loss.perplexity[1] == pytest.approx(np.exp(stage.loss.after))
    card = (tmp_path / "run" / "publish" / "README.md").read_text()
    assert "causal language modelling" in card and "Loss a token" in card and "perplexity" in card
    assert "KL of the next token" in card


def test_objectives_that_do_not_fit(tiny_model: Tiny) -> None:
    llama, bert, vit = (find_source(Source(model=str(tiny_model(n)))) for n in NAMES)
    with pytest.raises(RecipeError, match="llama is a decoder.*Use adapt.objective=clm"):
        find_mlm_class(llama)
    with pytest.raises(RecipeError, match="bert is an encoder.*Use adapt.objective=mlm"):
        find_clm_class(bert)
    with pytest.raises(RecipeError, match="vit reads images.*Use adapt.objective=mae"):
        find_clm_class(vit)
    with pytest.raises(RecipeError, match="retain.kl.on=mlm: llama is a decoder"):
        check_pretraining_head(KL(on="mlm"), llama, False, "classification")
    with pytest.raises(RecipeError, match="retain.kl.on=clm: bert is an encoder"):
        check_pretraining_head(KL(on="clm"), bert, False, "classification")
    with pytest.raises(RecipeError, match="no trained causal-language head"):
        check_pretraining_head(KL(on="clm"), llama, False, "classification")


NAMES = ("llama", "bert", "vit")


@pytest.mark.parametrize("strategy", ["lora", "full"])
@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_kl_is_of_the_next_tokens_of_a_row(strategy: str, pooling: str, tiny_model: Tiny) -> None:
    folder = tiny_model("llama", True)
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    causal_lm, _ = load_clm(find_source(Source(model=str(folder))), 0)
    model = prepare(build_probed_model(folder, "full", pooling), strategy).eval()
    term = NextTokenKL(KL(on="clm", temperature=2.0), causal_lm)
    term.attach(model)
    ids = stack_rows(4, labels=False)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "row": torch.arange(4)}
    step: Any = SimpleNamespace(batch=batch, epoch=0)
    chosen = torch.tensor([True, True, False, True])
    assert float(term.compute_values(step, chosen).detach().abs().max()) < 1e-6
    perturb(model, 0.1)
    values = term.compute_values(step, chosen)
    encoder = get_encoder(model, get_model_spec(model))

    def log_probabilities(hidden: Tensor) -> Tensor:
        return F.log_softmax(stock.lm_head(hidden) / 2, -1)

    with torch.no_grad():
        original = log_probabilities(stock.model(ids, attention_mask=mask)[0])
        current = log_probabilities(encoder(ids, attention_mask=mask)[0])
    kl = 4 * (original.exp() * (original - current)).sum(-1)
    expected = torch.stack([kl[row, : int(mask[row].sum()) - 1].mean() for row in (0, 1, 3)])
    torch.testing.assert_close(values.detach(), expected, atol=1e-5, rtol=1e-4)
    assert float(values.detach().min()) > 1e-4 and values.requires_grad
