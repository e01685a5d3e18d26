"""Check that exactly the intended parameters train, and that the others do not move."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.tiny import IMAGE_SIZE, is_image
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
from hftl.models.heads import LoadedModel, PooledModel, build_model, list_unused_parts
from hftl.models.lora import list_lora_layers
from hftl.models.source import SourceModel, find_source
from hftl.train.frozen_eval import list_training_modes

LINEARS_A_BLOCK = 6
STRATEGIES = ["head", "partial", "lora", "full"]
NAMES = ["a", "b", "c"]
TOKENS = "token-classification"


TEXT = [
    "bert", "roberta", "distilbert", "albert", "deberta-v2", "modernbert", "megatron-bert",
    "nomic_bert", "big_bird",
]  # fmt: skip
IMAGES = ["vit", "vit_mae", "beit", "dinov2", "swin", "swinv2", "clip", "siglip"]
CASES = [
    *(("classification", name) for name in TEXT + IMAGES),
    *((TOKENS, name) for name in ("bert", "albert", "modernbert", "roberta")),
]
MASKED = ["bert", "albert", "modernbert", "beit", "swin", "vit", "megatron-bert", "deberta-v2"]


def built(
    folder: Path, pooling: str = "native", task: str = "classification", seed: int = 0,
    scratch: bool = False,
) -> LoadedModel:  # fmt: skip
    source = find_source(Source(model=str(folder)))
    return build_model(source, task, pooling, 3, NAMES, seed, scratch)


def batch(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if is_image(name):
        return {"pixel_values": torch.rand(4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}
    ids = torch.randint(5, 30, (4, 6), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def training(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def plain(name: str) -> str:
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


def check(loaded: LoadedModel, strategy: str, name: str) -> nn.Module:
    """Prepare a model, compare what trains with the intention, step twice, and see what moved."""
    blocks = get_blocks(loaded.encoder, loaded.architecture)
    count = min(2, len(blocks))
    intended = list_intended(loaded, strategy, count)
    layers = sum(len(list_weight_layers(block)) for block in blocks)
    model = prepare(loaded.model, strategy, blocks=count, fresh=loaded.fresh)
    trains = training(model)
    assert {plain(n) for n in trains if "lora_" not in n} == intended
    adapters = {n for n in trains if "lora_" in n}
    assert len(adapters) == (2 * layers if strategy == "lora" else 0)
    assert len(list_lora_layers(model)) == len(adapters) // 2
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    two_steps(model, name)
    for n, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), f"{n} in no output's graph"
        if not parameter.requires_grad:
            assert torch.equal(before[n], parameter), f"{n} is frozen and moved"
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters())
    return model


def two_steps(model: nn.Module, name: str) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        for module, live in list_training_modes(model):
            module.training = live
        optimizer.zero_grad()
        model(**batch(name)).logits.square().sum().backward()
        optimizer.step()


def reload(model: Any, strategy: str, source: SourceModel, task: str, folder: Path) -> Any:
    """Save a trained model and load it by the libraries' own means."""
    model.save_pretrained(folder)
    kind = get_task_class(source.config, task)
    torch.manual_seed(5)
    if strategy != "lora":
        return kind.from_pretrained(folder).eval()
    source.config.num_labels = 3
    base = kind.from_pretrained(source.folder, config=source.config)
    return PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("task", "name"), CASES, ids=[f"{n}-{task[:5]}" for task, n in CASES])
def test_stock_class_trains_what_is_intended_and_reloads(
    task: str, name: str, strategy: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    loaded = built(tiny_model(name), task=task)
    model: Any = check(loaded, strategy, name)
    logits = model.eval()(**batch(name)).logits
    source = find_source(Source(model=str(tiny_model(name))))
    again = reload(model, strategy, source, task, tmp_path)
    torch.testing.assert_close(again(**batch(name)).logits, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strategy", ["partial", "lora"])
@pytest.mark.parametrize("name", MASKED)
def test_what_masked_pretraining_lacks_trains_and_is_saved(
    name: str, strategy: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    loaded = built(tiny_model(name, True))
    spec = loaded.architecture
    inside = [path for path in loaded.fresh if not has_prefix(path, spec.head.parts)]
    assert all(has_prefix(path, (f"{spec.encoder}.{spec.pooler}",)) for path in inside)
    assert bool(inside) == (spec.pooler is not None)
    model: Any = check(loaded, strategy, name)
    logits = model.eval()(**batch(name)).logits
    source = find_source(Source(model=str(tiny_model(name, True))))
    again = reload(model, strategy, source, "classification", tmp_path)
    torch.testing.assert_close(again(**batch(name)).logits, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("name", "pooling"),
    [(name, "mean") for name in TEXT] + [(name, "cls") for name in ("bert", "modernbert")],
)
def test_pooled_model_trains_what_is_intended(
    name: str, pooling: str, strategy: str, tiny_model: Callable[..., Path]
) -> None:
    loaded = built(tiny_model(name), pooling)
    assert isinstance(loaded.model, PooledModel) and loaded.fresh == ()
    model = check(loaded, strategy, name)
    assert model(**batch(name)).logits.shape == (4, 3)


@pytest.mark.parametrize("name", TEXT + IMAGES)
def test_scratch_shares_no_weight_with_the_source(
    name: str, tiny_model: Callable[..., Path]
) -> None:
    loaded = dict(built(tiny_model(name), seed=7).model.named_parameters())
    drawn = dict(built(tiny_model(name), seed=8, scratch=True).model.named_parameters())
    assert loaded.keys() == drawn.keys()
    same = [n for n, p in drawn.items() if p.ndim > 1 and p.std() > 0 and torch.equal(p, loaded[n])]
    assert not same


@pytest.mark.parametrize("task", ["classification", "multi-label", "regression", TOKENS])
def test_the_config_says_what_the_outputs_mean(task: str, tiny_model: Callable[..., Path]) -> None:
    source = find_source(Source(model=str(tiny_model())))
    names = [] if task == "regression" else NAMES
    config: Any = build_model(source, task, "native", len(names) or 1, names, seed=0).model.config
    kinds = {"multi-label": "multi_label_classification", "regression": "regression",
             "classification": "single_label_classification", TOKENS: None}  # fmt: skip
    assert config.problem_type == kinds[task]
    assert config.num_labels == (len(names) or 1)
    if names:
        assert config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize(
    ("name", "pooling", "task", "message"),
    [
        ("vit", "mean", "classification", "pooling=mean is for texts of one label, not for images"),
        ("bert", "cls", TOKENS, "pooling=cls is for texts of one label, not for token"),
        ("vit", "native", TOKENS, "vit has no class for token-classification"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(
    name: str, pooling: str, task: str, message: str, tiny_model: Callable[..., Path]
) -> None:
    with pytest.raises(RecipeError, match=message):
        built(tiny_model(name), pooling, task)


def test_shared_layers_are_one_block(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="has 1 block, which its 3 layers share. Use at most 1"):
        prepare(built(tiny_model("albert")).model, "partial", blocks=2)


@pytest.mark.parametrize("name", ["swin", "clip"])
def test_chosen_layers_are_counted_in_nested_lists(
    name: str, tiny_model: Callable[..., Path]
) -> None:
    """Swin's stages hold one and two blocks, and peft takes `layers` for stages."""
    model = prepare(built(tiny_model(name)).model, "lora", lora={"layers_to_transform": [1]})
    assert len(list_lora_layers(model)) == {"swin": 2, "clip": 1}[name] * LINEARS_A_BLOCK


def test_head_dropout_is_live_in_token_classes(tiny_model: Callable[..., Path]) -> None:
    model = prepare(built(tiny_model("roberta"), task=TOKENS).model, "head")
    live = {module for module, trains in list_training_modes(model) if trains}
    assert model.get_submodule("dropout") in live
    assert model.get_submodule("roberta.embeddings.dropout") not in live


def test_without_loading_info_the_pooler_is_taken_as_fresh(
    tiny_model: Callable[..., Path],
) -> None:
    model = prepare(built(tiny_model()).model, "lora")
    assert any("pooler" in name for name in training(model))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"use_dora": True}, 3 * LINEARS_A_BLOCK),
        ({"use_rslora": True}, 3 * LINEARS_A_BLOCK),
        ({"target_modules": ["query", "value"]}, 6),
        ({"target_modules": "all-linear"}, 3 * LINEARS_A_BLOCK),
        ({"layers_to_transform": [2]}, LINEARS_A_BLOCK),
        ({"bias": "lora_only"}, 3 * LINEARS_A_BLOCK),
    ],
)
def test_lora_options(settings: dict, expected: int, tiny_model: Callable[..., Path]) -> None:
    model = prepare(built(tiny_model(), "mean").model, "lora", lora=settings)
    assert len(list_lora_layers(model)) == expected


def test_lora_start_leaves_the_output_unchanged(tiny_model: Callable[..., Path]) -> None:
    inputs = {"input_ids": torch.tensor([[2, 7, 9, 3]]), "attention_mask": torch.ones(1, 4)}
    model = built(tiny_model(), "mean").model.eval()
    before = model(**inputs).logits
    after = prepare(model, "lora").eval()(**inputs).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "partial", "blocks": 4}, "blocks=4, but the source model has 3"),
        ({"strategy": "sideways"}, "unknown strategy 'sideways'"),
        (
            {"strategy": "lora", "lora": {"target_modules": ["nothing"]}},
            "no module matches .nothing.",
        ),
    ],
)
def test_refusals(arguments: dict, message: str, tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match=message):
        prepare(built(tiny_model()).model, **arguments)


def test_trainable_parameters_counts_numbers() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert count_trainable_parameters(model) == 4 * 2 + 2
