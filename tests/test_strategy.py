"""Check that exactly the intended parameters train, and that the others do not move."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.tiny import CAUSAL_MODELS, draw_images, is_image
from torch import nn

from hftl.config.section import Source
from hftl.errors import RecipeError
from hftl.finetune.trainable import count_trainable_parameters, prepare
from hftl.models.encoders import (
    get_blocks,
    get_task_class,
    has_prefix,
    list_block_paths,
    list_weight_layers,
)
from hftl.models.heads import LoadedModel, build_model
from hftl.models.lora import list_adapted_layers
from hftl.models.model_parts import list_unused_parts
from hftl.models.pooled_model import PooledModel
from hftl.models.source import find_source
from hftl.train.checkpoint import list_training_modes

Tiny = Callable[..., Path]
LINEARS_A_BLOCK = 6
STRATEGIES = ["head", "partial", "lora", "full"]
NAMES = ["a", "b", "c"]
TOKENS = "token-classification"
TEXT = [
    "bert", "roberta", "distilbert", "albert", "deberta-v2", "modernbert", "megatron-bert",
    "nomic_bert", "big_bird", "eurobert", *CAUSAL_MODELS,
]  # fmt: skip
IMAGES = ["vit", "vit_mae", "beit", "dinov2", "swin", "swinv2", "clip", "siglip", "siglip2"]


def build(
    folder: Path, pooling: str = "native", task: str = "classification", seed: int = 0,
    scratch: bool = False,
) -> LoadedModel:  # fmt: skip
    source = find_source(Source(model=str(folder)))
    return build_model(source, task, pooling, 3, NAMES, seed, scratch)


def make_batch(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if is_image(name):
        return draw_images(name, 4, generator=generator)
    ids = torch.randint(5, 30, (4, 6), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def list_trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def strip_peft(name: str) -> str:
    """Return a parameter's name without what peft inserts."""
    for added in ("base_model.model.", "modules_to_save.default.", "base_layer."):
        name = name.replace(added, "")
    return name


def select(names: set[str], prefixes: Iterable[str]) -> set[str]:
    return {name for name in names if has_prefix(name, tuple(prefixes))}


def list_intended(loaded: LoadedModel, strategy: str, blocks: int) -> set[str]:
    """Return what is to train beside adapters, as the entry of the architecture has it."""
    spec, model = loaded.architecture, loaded.model
    pooled = isinstance(model, PooledModel)
    names = {name for name, _ in model.named_parameters()}
    prefix = "encoder" if pooled else spec.encoder
    unused = {f"{prefix}.{part}" for part in list_unused_parts(model, spec)}
    head = ["head"] if pooled else spec.head.parts
    if strategy == "full":
        return names - select(names, unused)
    if strategy == "head":
        return select(names, ["head" if pooled else spec.head.last_linear])
    if strategy == "lora":
        return select(names, [*head, *loaded.fresh])
    top = list_block_paths(loaded.encoder, spec)[-blocks:]
    inside = [*top, *spec.final_parts, *([spec.pooler] if spec.pooler else [])]
    return select(names, [*head, *(f"{prefix}.{part}" for part in inside)]) - select(names, unused)


def train_two_steps(model: nn.Module, name: str) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        for module, live in list_training_modes(model):
            module.training = live
        optimizer.zero_grad()
        model(**make_batch(name)).logits.square().sum().backward()
        optimizer.step()


def prepare_and_train(loaded: LoadedModel, strategy: str, name: str) -> Any:
    """Return a model after two steps; check what is set to train, and what moved."""
    blocks = get_blocks(loaded.encoder, loaded.architecture)
    count = min(2, len(blocks))
    intended = list_intended(loaded, strategy, count)
    layers = sum(len(list_weight_layers(block)) for block in blocks)
    model = prepare(loaded.model, strategy, blocks=count, fresh=loaded.fresh)
    trains = list_trainable(model)
    assert {strip_peft(n) for n in trains if "lora_" not in n} == intended
    adapters = {n for n in trains if "lora_" in n}
    assert len(adapters) == (2 * layers if strategy == "lora" else 0)
    assert len(list_adapted_layers(model)) == len(adapters) // 2
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_two_steps(model, name)
    for n, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), f"{n} in no output's graph"
        if not parameter.requires_grad:
            assert torch.equal(before[n], parameter), f"{n} is frozen and moved"
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters())
    return model


def assert_reloads(
    model: Any, source_folder: Path, strategy: str, task: str, name: str, folder: Path
) -> None:
    """Check that the libraries' own means load a saved model to the same logits."""
    logits = model.eval()(**make_batch(name)).logits
    model.save_pretrained(folder)
    source = find_source(Source(model=str(source_folder)))
    kind: Any = get_task_class(source.config, task)
    torch.manual_seed(5)
    if strategy == "lora":
        source.config.num_labels = 3
        base = kind.from_pretrained(source.folder, config=source.config)
        again: Any = PeftModel.from_pretrained(base, folder)
    else:
        again = kind.from_pretrained(folder)
    torch.testing.assert_close(again.eval()(**make_batch(name)).logits, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("name", "task"),
    [(name, "classification") for name in TEXT + IMAGES]
    + [(name, TOKENS) for name in ("bert", "albert", "modernbert", "roberta", "llama", "gemma2")],
)
def test_stock_class_trains_what_is_intended_and_reloads(
    name: str, task: str, strategy: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    model = prepare_and_train(build(tiny_model(name), task=task), strategy, name)
    assert_reloads(model, tiny_model(name), strategy, task, name, tmp_path)


@pytest.mark.parametrize("strategy", ["partial", "lora"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "beit", "swin", "megatron-bert"])
def test_weights_that_masked_pretraining_lacks_train_and_are_saved(
    name: str, strategy: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    folder = tiny_model(name, True)
    loaded = build(folder)
    spec = loaded.architecture
    inside = [path for path in loaded.fresh if not has_prefix(path, spec.head.parts)]
    assert all(has_prefix(path, (f"{spec.encoder}.{spec.pooler}",)) for path in inside)
    assert bool(inside) == (spec.pooler is not None)
    model = prepare_and_train(loaded, strategy, name)
    assert_reloads(model, folder, strategy, "classification", name, tmp_path)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("name", "pooling"),
    [(name, "mean") for name in TEXT] + [(name, "cls") for name in ("bert", "modernbert")],
)
def test_pooled_model_trains_what_is_intended(
    name: str, pooling: str, strategy: str, tiny_model: Tiny
) -> None:
    loaded = build(tiny_model(name), pooling)
    assert isinstance(loaded.model, PooledModel) and loaded.fresh == ()
    model = prepare_and_train(loaded, strategy, name)
    assert model(**make_batch(name)).logits.shape == (4, 3)


@pytest.mark.parametrize("name", TEXT + IMAGES)
def test_scratch_shares_no_weight_with_the_source(name: str, tiny_model: Tiny) -> None:
    loaded = dict(build(tiny_model(name), seed=7).model.named_parameters())
    drawn = dict(build(tiny_model(name), seed=8, scratch=True).model.named_parameters())
    assert loaded.keys() == drawn.keys()
    same = [n for n, p in drawn.items() if p.ndim > 1 and p.std() > 0 and torch.equal(p, loaded[n])]
    assert not same


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        ("multi-label", "multi_label_classification"), ("regression", "regression"),
        ("classification", "single_label_classification"), (TOKENS, None),
    ],
)  # fmt: skip
def test_config_describes_the_outputs(task: str, problem: str | None, bert: Path) -> None:
    source = find_source(Source(model=str(bert)))
    names = [] if task == "regression" else NAMES
    config: Any = build_model(source, task, "native", len(names) or 1, names, seed=0).model.config
    assert config.problem_type == problem and config.num_labels == (len(names) or 1)
    if names:
        assert config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize(
    ("name", "pooling", "task", "message"),
    [
        ("swin", "mean", "classification", "pooling=mean is for encoders with a class token"),
        ("bert", "cls", TOKENS, "pooling=cls is for texts of one label, not for token"),
        ("vit", "native", TOKENS, "vit has no class for token-classification"),
    ],
)
def test_refuses_tasks_that_do_not_fit(
    name: str, pooling: str, task: str, message: str, tiny_model: Tiny
) -> None:
    with pytest.raises(RecipeError, match=message):
        build(tiny_model(name), pooling, task)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("albert", {"strategy": "partial", "blocks": 2}, "has 1 block, which its 3 layers share"),
        ("bert", {"strategy": "partial", "blocks": 4}, "blocks=4, but the source model has 3"),
        ("bert", {"strategy": "sideways"}, "unknown strategy 'sideways'"),
        ("bert", {"lora": ["r"]}, r"prepare: lora is \['r'\], expected a mapping of fields"),
        ("bert", {"strategy": "partial", "blokcs": 1}, "unknown key 'blokcs'; did you mean"),
    ],
)
def test_refuses_what_the_model_lacks(
    name: str, arguments: dict[str, Any], message: str, tiny_model: Tiny
) -> None:
    with pytest.raises(RecipeError, match=message):
        prepare(build(tiny_model(name)).model, **arguments)


@pytest.mark.parametrize(
    ("name", "lora", "layers"),
    [
        ("bert", {"use_dora": True, "bias": "lora_only"}, 3 * LINEARS_A_BLOCK),
        # Swin's stages hold one and two blocks, and peft takes `layers` for stages.
        ("swin", {"layers_to_transform": [1]}, 2 * LINEARS_A_BLOCK),
        ("clip", {"layers_to_transform": [1]}, LINEARS_A_BLOCK),
    ],
)
def test_lora_adapts_the_chosen_layers_and_leaves_the_output(
    name: str, lora: dict[str, Any], layers: int, tiny_model: Tiny
) -> None:
    model: Any = build(tiny_model(name)).model.eval()
    before = model(**make_batch(name)).logits
    adapted: Any = prepare(model, "lora", lora=lora).eval()
    assert len(list_adapted_layers(adapted)) == layers
    torch.testing.assert_close(adapted(**make_batch(name)).logits, before)


def test_head_dropout_is_live_in_token_classes(tiny_model: Tiny) -> None:
    model = prepare(build(tiny_model("roberta"), task=TOKENS).model, "head")
    live = {module for module, trains in list_training_modes(model) if trains}
    assert model.get_submodule("dropout") in live
    assert model.get_submodule("roberta.embeddings.dropout") not in live


def test_pooler_trains_where_nothing_says_that_it_was_loaded(bert: Path) -> None:
    model = prepare(build(bert).model, "lora")
    assert any("pooler" in name for name in list_trainable(model))


def test_trainable_parameters_are_counted_as_numbers() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert count_trainable_parameters(model) == 4 * 2 + 2
