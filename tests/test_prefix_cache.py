"""Compare models that read the states of frozen blocks with models that run these blocks."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from support.tiny import is_image, tiny_config
from torch import nn

from hftl.models.architectures import ARCHITECTURES, get_config_spec
from hftl.models.encoders import (
    accepts_attention_mask,
    get_encoder_class,
    get_stock_encoder,
    get_task_class,
    hide_padding,
    list_block_paths,
)
from hftl.models.pooling import pool_before_head
from hftl.models.prefix_cache import (
    MemoryRows,
    PrefixCache,
    get_precision,
    name_rows,
    split_rows,
)
from hftl.runtime.row_store import RowStore

LENGTHS = (3, 30, 4, 11, 28, 12)
RECOMPUTED = {"albert", "fnet", "megatron-bert", "rembert", "roformer"}
"""Blocks that run several times, texts without an attention mask, blocks that return attention."""
KINDS = {
    "bert", "roberta", "mobilebert", "deberta-v2", "modernbert", "llama", "gemma3_text", "vit",
    "beit", "swin", "clip", *RECOMPUTED,
}  # fmt: skip
"""One of each kind of blocks; the other architectures are variants of these."""
Batch = dict[str, torch.Tensor]


def build(name: str) -> tuple[Any, PrefixCache, list[nn.Module]]:
    """Return a model whose top block trains, its cache, and its blocks."""
    config = tiny_config(name)
    torch.manual_seed(0)
    model = get_task_class(config, "classification")(config).eval()
    hide_padding(model)
    pool_before_head(model)
    spec = get_config_spec(config)
    encoder = get_stock_encoder(model, spec)
    paths = list_block_paths(encoder, spec)
    blocks = [encoder.get_submodule(path) for path in paths]
    encoder.requires_grad_(False)
    blocks[-1].requires_grad_(True)
    cache = PrefixCache(encoder, paths, (*spec.final_parts, spec.pooler or "pooler"))
    cache.precision = get_precision(encoder)
    return model, cache, blocks


def make_batch(name: str) -> Batch:
    torch.manual_seed(1)
    if is_image(name):
        return {"pixel_values": torch.rand(4, 3, 32, 32)}
    ids = torch.randint(5, 30, (len(LENGTHS), max(LENGTHS)))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    batch = {"input_ids": torch.where(mask, ids, tiny_config(name).pad_token_id or 0)}
    if accepts_attention_mask(get_encoder_class(tiny_config(name))):
        batch["attention_mask"] = mask.long()
    return batch


def take(batch: Batch, rows: list[int]) -> Batch:
    return {name: value[rows] for name, value in batch.items()}


def run(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return logits and gradients."""
    logits = model(**batch).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), gradients


def store_rows(model: nn.Module, cache: PrefixCache, batch: Batch, depth: int) -> bool:
    """Let the cache read the rows of a batch; return False where blocks cannot be passed over."""
    named = name_rows(batch)
    with torch.no_grad():
        states = cache.record(lambda: model(**batch), [depth], whole=True)[depth]
    arrays = None if named is None else split_rows(named, states)
    if named is None or arrays is None or set(cache.counts) != {1}:
        return False
    stored = dict(zip(named.keys, arrays, strict=True))
    cache.read(depth, MemoryRows(stored, str(states.dtype)))
    return True


def check_equal(results: Any, expected: Any) -> None:
    (logits, gradients), (full, slow) = results, expected
    torch.testing.assert_close(logits, full, atol=1e-6, rtol=1e-5)
    assert gradients.keys() == slow.keys()
    for key, gradient in slow.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(gradients[key], gradient, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in KINDS else pytest.mark.slow)
        for n in sorted(ARCHITECTURES.keys() - {"timm_wrapper"})
    ],
)
def test_stored_rows_give_the_outputs_and_gradients_of_a_full_pass(name: str) -> None:
    model, cache, blocks = build(name)
    batch = make_batch(name)
    rows = list(range(len(next(iter(batch.values())))))
    calls: list[int] = []
    with cache.install():
        assert store_rows(model, cache, batch, len(blocks) - 1) == (name not in RECOMPUTED)
        if name in RECOMPUTED:
            return
        orders = [take(batch, order) for order in (rows, rows[::-1], rows[1:])]
        handle = blocks[0].register_forward_pre_hook(
            lambda block, _: calls.append("forward" not in vars(block))
        )
        results = [run(model, order) for order in orders]
        assert not any(calls) and cache.hits == 3
        handle.remove()
    for order, result in zip(orders, results, strict=True):
        check_equal(result, run(model, order))
    assert all("forward" not in vars(block) for block in blocks)


@pytest.fixture
def stored() -> Any:
    """Yield a BERT whose lower blocks are stored, its cache, blocks and batch."""
    model, cache, blocks = build("bert")
    batch = make_batch("bert")
    with cache.install():
        assert store_rows(model, cache, batch, len(blocks) - 1)
        yield model, cache, blocks, batch


@pytest.mark.parametrize("change", ["token", "dropout", "precision", "hidden states", "left"])
def test_what_differs_is_computed(change: str, stored: Any) -> None:
    model, cache, blocks, batch = stored
    if change == "token":
        batch["input_ids"][0, 1] += 1
    if change == "dropout":
        model.bert.embeddings.dropout.train()
    if change == "left":
        batch = {key: value.flip(1) for key, value in batch.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "precision"):
        model(**batch, output_hidden_states=change == "hidden states")
        assert cache.hits == 0


def test_all_blocks_may_be_frozen_and_a_copy_reads_the_same_rows(tmp_path: Any) -> None:
    """A frozen copy of the model, which KL compares with, starts from the boundary as well."""
    model, cache, blocks = build("bert")
    batch = make_batch("bert")
    blocks[-1].requires_grad_(False)
    expected = run(model, batch)
    with cache.install():
        assert store_rows(model, cache, batch, len(blocks))
        memory: Any = cache.store
        store = RowStore(tmp_path, {})
        with store.lock(), store.write_part(memory.details) as add:
            for key, values in memory.states.items():
                add(key, values)
        cache.read(len(blocks), store)
        twin = deepcopy(model)
    for module, hits in ((model, 0), (twin, 1)):
        own = next(iter(twin.bert._forward_pre_hooks.values())).__self__
        check_equal(run(module, batch), expected)
        assert own.hits == hits and cache.hits == 0 and own.store is store


@pytest.mark.parametrize("reentrant", [False, True])
def test_nothing_runs_backward_through_frozen_blocks(reentrant: bool) -> None:
    model, cache, blocks = build("bert")
    batch = make_batch("bert")
    expected = run(model, batch)
    settings = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    blocks[-1].training = True
    backward: list[int] = []
    for number, block in enumerate(blocks):
        block.register_full_backward_hook(lambda *_, number=number: backward.append(number))
    run(model, batch)
    assert backward == [2, 1, 0], "transformers lets the embeddings require a gradient"
    with cache.install():
        for is_stored in (False, True):
            backward.clear()
            cache.read(2, None)
            assert not is_stored or store_rows(model, cache, batch, 2)
            check_equal(run(model, batch), expected)
            assert set(backward) == {2} and cache.hits == is_stored


def test_an_error_leaves_the_blocks_whole(stored: Any) -> None:
    model, cache, blocks, batch = stored
    broken = blocks[-1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    broken.remove()
    assert cache.hits == 1 and all("forward" not in vars(block) for block in blocks)
