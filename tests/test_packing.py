"""Compare encoders on packed rows with the same on padded batches, forward and backward."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import TEXT_MODELS, tiny_config
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, TrainingArguments

from hftl import TransferTrainer, prepare
from hftl.models import packing
from hftl.models.architecture_spec import TOKEN_CLASSIFICATION
from hftl.models.architectures import ARCHITECTURES, get_config_spec
from hftl.models.encoders import get_blocks, get_stock_encoder, get_task_class, hide_padding
from hftl.models.pooled_model import PooledModel

PACKED = sorted(name for name in TEXT_MODELS if ARCHITECTURES[name].packs)
LENGTHS = [7, 2, 5, 1]


def build_batch(types: bool = False) -> dict[str, Tensor]:
    """Build texts of several lengths; one has an id that stands for padding in its middle."""
    draw = torch.Generator().manual_seed(1)
    mask = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(5, 30, mask.shape, generator=draw) * mask
    ids[0, 3] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch | ({"token_type_ids": (ids > 15).long()} if types else {})


def build_pair(name: str, task: str = "classification", **changes: Any) -> tuple[Any, Any]:
    """Build a model that packs, and one of the same weights that does not."""
    config, models = tiny_config(name, **changes), []
    for packs in (True, False):
        torch.manual_seed(0)
        kind = AutoModel.from_config if task == "encoder" else get_task_class(config, task)
        model: Any = kind(config)
        if packs:
            hide_padding(model)
        models.append(model)
    return models[0], models[1]


def collect(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Return outputs, and gradients of the logits at tokens by parameter."""
    output = model(**batch)
    logits = output.logits
    if logits.ndim == 3:
        logits = logits[batch["attention_mask"].bool()]
    model.zero_grad()
    (logits * torch.linspace(1, 3, logits.numel()).view(logits.shape)).sum().backward()
    return logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(one: Any, other: Any, batch: dict[str, Tensor]) -> None:
    (logits, gradients), (expected, slow) = collect(one, batch), collect(other, batch)
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)
    assert gradients.keys() == slow.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, slow[name], atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("limit", [packing.SHORT_TEXT, 0], ids=["short", "long"])
@pytest.mark.parametrize("task", ["classification", TOKEN_CLASSIFICATION])
@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_give_the_outputs_and_gradients_of_a_padded_batch(
    name: str, task: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "SHORT_TEXT", limit)
    packed, padded = build_pair(name, task)
    spec = get_config_spec(packed.config)
    shapes: list[tuple[int, ...]] = []
    block = get_blocks(get_stock_encoder(packed, spec), spec)[0]
    block.register_forward_hook(lambda module, args, output: shapes.append(args[0].shape[:2]))
    assert_equal(packed.eval(), padded.eval(), build_batch())
    assert shapes == [(1, sum(LENGTHS))], "padding was computed"


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_a_model_of_ones_own_trains_packed_with_the_losses_of_the_padded_one(
    strategy: str, tmp_path: Path
) -> None:
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    batch = build_batch() | {"labels": torch.tensor([0, 1, 1, 0])}
    rows: Any = [{name: values[n] for name, values in batch.items()} for n in range(len(LENGTHS))]
    losses, shapes = [], set()
    for packs in (True, False):
        torch.manual_seed(0)
        config = tiny_config("bert", **changes)
        attention = "sdpa" if packs else "eager"
        stock: Any = AutoModelForSequenceClassification.from_config(
            config, attn_implementation=attention
        )
        torch.manual_seed(1)
        model = prepare(stock, strategy)
        stock.bert.encoder.layer[0].register_forward_hook(
            lambda module, args, output: shapes.add(tuple(args[0].shape[:2]))
        )
        args = TrainingArguments(
            str(tmp_path), max_steps=4, logging_steps=1, per_device_train_batch_size=4,
            learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True,
            save_strategy="no",
        )  # fmt: skip
        trainer = TransferTrainer(model, args, train_dataset=rows)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert shapes == {(1, sum(LENGTHS)), (4, 7)}, "another attention than the usual one stays"
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0][0] != losses[0][-1]


def test_a_packed_model_is_saved_as_the_stock_one(tmp_path: Path) -> None:
    packed, padded = build_pair("bert")
    packed.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    expected = padded.eval()(**build_batch()).logits
    torch.testing.assert_close(loaded(**build_batch()).logits, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_prepared_model_is_copied_and_pickled(copied: Callable[[nn.Module], nn.Module]) -> None:
    stock = AutoModelForSequenceClassification.from_config(tiny_config("bert"))
    model = prepare(stock, "lora").eval()
    other = copied(model)
    assert torch.equal(other(**build_batch()).logits, model(**build_batch()).logits)
    kinds = [[type(module).__name__ for module in both.modules()] for both in (model, other)]
    assert kinds[0] == kinds[1]
    assert any(isinstance(module, packing.PackedEncoder) for module in other.modules())


def test_token_types_and_the_mean_over_tokens() -> None:
    packed, padded = build_pair("bert", "encoder")
    models = []
    for encoder in (packed, padded):
        torch.manual_seed(3)
        models.append(PooledModel(encoder, "mean", 16, 2).eval())
    assert_equal(models[0], models[1], build_batch(types=True))
    batch = build_batch(types=True)
    other = batch | {"token_type_ids": 1 - batch["token_type_ids"]}
    assert not torch.allclose(models[0](**batch).logits, models[0](**other).logits)


def test_half_precision_is_as_exact_as_padded() -> None:
    packed, padded = build_pair("bert")
    exact = padded.eval()(**build_batch()).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = [model.eval()(**build_batch()).logits for model in (packed, padded)]
    assert logits[0].dtype == logits[1].dtype == torch.bfloat16
    errors = [(x.float() - exact).abs().max() for x in logits]
    assert errors[0] < 2 * errors[1] + 1e-3


@pytest.mark.parametrize("limit", [packing.SHORT_TEXT, 0], ids=["short", "long"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_row_longer_than_its_tokens_gives_the_same(
    name: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision rounds the length up; in fp32 the same shows that nothing reads the rest."""
    monkeypatch.setattr(packing, "SHORT_TEXT", limit)
    plain, spares = packing.Packing, list[int]()

    def build(mask: Tensor, _: bool) -> packing.Packing:
        rows = plain(mask, rounds_up=True)
        spares.append(rows.spare)
        return rows

    monkeypatch.setattr(packing, "Packing", build)
    monkeypatch.setattr(packing, "SIZE_BITS", 2)
    packed, padded = build_pair(name)
    assert_equal(packed.eval(), padded.eval(), build_batch())
    assert spares == [1], "15 tokens in a row of 16"


def test_a_row_of_half_precision_has_one_of_few_lengths() -> None:
    lengths = {packing.round_up_size(tokens) for tokens in range(1, 2049)}
    assert all(packing.round_up_size(n) - n < max(1, n / 8) for n in range(1, 2049))
    assert len([n for n in lengths if 1024 < n <= 2048]) == 8
    assert packing.round_up_size(900) == 960 and packing.round_up_size(960) == 960
    mask = torch.ones(3, 31, dtype=torch.bool)
    assert (packing.Packing(mask).spare, packing.Packing(mask, True).spare) == (0, 3)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    packed, padded = build_pair("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    packed.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal(packed.train(), padded.train(), build_batch())


@pytest.mark.parametrize(
    "change",
    [
        {"output_hidden_states": True}, {"position_ids": torch.arange(7)[None]},
        {"attention_mask": build_batch()["attention_mask"].flip(1)},
    ],
    ids=["hidden states", "positions", "left padding"],
)  # fmt: skip
def test_what_packing_does_not_know_runs_padded(change: dict[str, Any]) -> None:
    packed, padded = build_pair("bert", "encoder")
    batch: Any = build_batch() | change
    output, expected = packed.eval()(**batch), padded.eval()(**batch)
    assert output.keys() == expected.keys()
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(output.pooler_output, expected.pooler_output)


@pytest.mark.parametrize(("length", "packs"), [(20, False), (18, True)])
def test_long_texts_pack_where_a_tenth_is_padding(
    length: int, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of short ones attention alone is faster packed, whatever the padding."""
    model, _ = build_pair("bert", "encoder")
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, length:] = 0
    assert model._packs(mask, {})
    monkeypatch.setattr(packing, "SHORT_TEXT", 19)
    mask[0, length:] = 0
    assert model._packs(mask, {}) == packs


def test_dropout_of_attention_is_drawn_anew_and_right_in_the_mean() -> None:
    """The gradient is that of the draw in the forward pass."""
    torch.manual_seed(0)
    rows = packing.Packing(build_batch()["attention_mask"].bool())
    shape = (1, 2, sum(LENGTHS), 4)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))

    def attend(dropout: float) -> Tensor:
        return packing._ShortAttention.apply(query, key, value, rows, 0.5, dropout)  # pyright: ignore

    torch.manual_seed(5)
    output = attend(0.5)
    assert not torch.equal(attend(0.5), output)
    mean = torch.stack([attend(0.5).detach() for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, attend(0.0), atol=0.08, rtol=0)
    gradients = torch.autograd.grad(output.sum(), (query, key, value))
    for tensor, gradient in zip((query, key, value), gradients, strict=True):
        step = torch.zeros_like(tensor)
        step[0, 1, 3, 2] = 1e-2
        sums = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor += sign * step
                torch.manual_seed(5)
                sums.append(attend(0.5).sum())
                tensor -= sign * step
        torch.testing.assert_close((sums[0] - sums[1]) / 2e-2, gradient[0, 1, 3, 2],
                                   atol=2e-3, rtol=1e-2)  # fmt: skip


def test_predictions_are_those_of_the_stock_class_to_the_bit() -> None:
    packed, padded = build_pair("bert")
    with torch.no_grad():
        logits, expected = (model.eval()(**build_batch()).logits for model in (packed, padded))
    assert torch.equal(logits, expected)


def test_a_saved_config_does_not_name_the_attention(tmp_path: Any) -> None:
    packed, _ = build_pair("bert")
    packed.save_pretrained(tmp_path)
    assert packing.NAME not in (tmp_path / "config.json").read_text()
