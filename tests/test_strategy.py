"""Exactly the intended parameters train, and the others do not move."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import IMAGE_SIZE, is_image
from torch import nn

from hftl.config.section import Source
from hftl.errors import RecipeError
from hftl.finetune.strategies import count_trainable_parameters, prepare
from hftl.models.encoders import get_task_class
from hftl.models.heads import LoadedModel, PooledModel, build_model
from hftl.models.lora import list_lora_layers
from hftl.models.source import find_source
from hftl.train.trainer import training_modes

LINEARS_A_BLOCK = 6
STRATEGIES = ["head", "partial", "lora", "full"]
NAMES = ["a", "b", "c"]
TOKENS = "token-classification"


@dataclass(frozen=True)
class Line:
    """What is meant to train, as prefixes of parameter names in the stock class.

    `top` are the two top blocks, `after` what follows them, `fresh` what a checkpoint of masked
    pre-training lacks of that, `unused` what no output depends on, `linears` count those of all
    blocks.
    """

    top: list[str]
    after: list[str]
    head: list[str]
    last: str
    fresh: list[str]
    unused: list[str]
    linears: int


def line(
    top: str, blocks: str = "1 2", after: str = "", head: str = "classifier",
    last: str = "classifier", fresh: str = "", unused: str = "", linears: int = 18,
) -> Line:  # fmt: skip
    return Line(
        [f"{top}.{block}" for block in blocks.split()], after.split(), head.split(), last,
        fresh.split(), unused.split(), linears,
    )  # fmt: skip


OUT = "classifier.out_proj"
ONE_BLOCK = "albert.encoder.albert_layer_groups.0.albert_layers"
REGISTERS = "dinov2_with_registers"
SEQUENCES = {
    "bert": line("bert.encoder.layer", after="bert.pooler", fresh="bert.pooler"),
    "roberta": line("roberta.encoder.layer", last=OUT),
    "xlm-roberta": line("roberta.encoder.layer", last=OUT),
    "camembert": line("roberta.encoder.layer", last=OUT),
    "distilbert": line("distilbert.transformer.layer", head="pre_classifier classifier"),
    "albert": line(ONE_BLOCK, "0", after="albert.pooler", fresh="albert.pooler", linears=6),
    "electra": line("electra.encoder.layer", last=OUT),
    "mpnet": line("mpnet.encoder.layer", last=OUT),
    "deberta-v2": line("deberta.encoder.layer", head="pooler classifier"),
    "modernbert": line("model.layers", after="model.final_norm", head="head classifier",
                       linears=12),
}  # fmt: skip
IMAGES = {
    "vit": line("vit.layers", after="vit.layernorm"),
    "vit_mae": line("vit.layers", after="vit.layernorm"),
    "deit": line("deit.layers", after="deit.layernorm"),
    "beit": line("beit.layers", after="beit.pooler", fresh="beit.pooler",
                 unused="beit.embeddings.mask_token"),
    "dinov2": line("dinov2.encoder.layer", after="dinov2.layernorm",
                   unused="dinov2.embeddings.mask_token"),
    REGISTERS: line(f"{REGISTERS}.encoder.layer", after=f"{REGISTERS}.layernorm",
                    unused=f"{REGISTERS}.embeddings.mask_token"),
    "swin": line("swin.encoder.layers.1.blocks", "0 1", after="swin.layernorm"),
    "clip": line("vision_model.encoder.layers", unused="vision_model.post_layernorm"),
    "siglip": line("vision_model.encoder.layers", after="vision_model.post_layernorm",
                   unused="vision_model.head"),
}  # fmt: skip
DERIVED = {
    "megatron-bert": line("bert.encoder.layer", after="bert.encoder.ln bert.pooler",
                          fresh="bert.pooler"),
    "nomic_bert": line("nomic_bert.layers", after="nomic_bert.pooler", fresh="nomic_bert.pooler",
                       linears=21),
    "big_bird": line("bert.encoder.layer", last=OUT, unused="bert.pooler"),
    "swinv2": line("swinv2.encoder.layers.1.blocks", "0 1", after="swinv2.layernorm", linears=24),
}  # fmt: skip
TOKEN_CLASSES = {
    name: line(
        told.top[0].rpartition(".")[0], " ".join(b.rpartition(".")[2] for b in told.top),
        after="model.final_norm" if name == "modernbert" else "",
        head="head classifier" if name == "modernbert" else "classifier", linears=told.linears,
    )
    for name, told in SEQUENCES.items()
}  # fmt: skip
CASES = [
    *(("classification", name, told) for name, told in (SEQUENCES | IMAGES | DERIVED).items()),
    *((TOKENS, name, told) for name, told in TOKEN_CLASSES.items()),
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
    """A parameter's name without what peft puts into it."""
    for added in ("base_model.model.", "modules_to_save.default.", "base_layer."):
        name = name.replace(added, "")
    return name


def starting(names: set[str], prefixes: list[str]) -> set[str]:
    return {name for name in names if name.startswith(tuple(f"{p}." for p in prefixes))
            or name in prefixes}  # fmt: skip


def intended(told: Line, strategy: str, names: set[str], fresh: list[str]) -> set[str]:
    if strategy == "full":
        return names - starting(names, told.unused_parts)
    if strategy == "head":
        return starting(names, [told.last])
    if strategy == "lora":
        return starting(names, told.head + fresh)
    return starting(names, told.top + told.after + told.head)


def table(wanted: set[str], got: set[str]) -> str:
    """What trains, a parameter a row, where intention and model differ."""
    rows = [
        f"{name:60} {'trains' if name in wanted else 'frozen':8} "
        f"{'trains' if name in got else 'frozen'}"
        for name in sorted(wanted ^ got)
    ]
    return "\n".join([f"\n{'parameter':60} {'wanted':8} got", *rows])


def check(found: LoadedModel, told: Line, strategy: str, name: str, fresh: list[str]) -> nn.Module:
    """Prepares, compares what trains with the intention, steps twice, and looks what moved."""
    names = {n for n, _ in found.model.named_parameters()}
    blocks = min(2, len(told.top))
    model = prepare(found.model, strategy, blocks=blocks, fresh=found.fresh)
    trains = training(model)
    own = {plain(n) for n in trains if "lora_" not in n}
    wanted = intended(told, strategy, names, fresh)
    assert own == wanted, table(wanted, own)
    adapters = {n for n in trains if "lora_" in n}
    assert len(adapters) == (2 * told.linears if strategy == "lora" else 0)
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
        for module, live in training_modes(model):
            module.training = live
        optimizer.zero_grad()
        model(**batch(name)).logits.square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("task", "name", "told"), CASES, ids=[f"{name}-{task[:5]}" for task, name, _ in CASES]
)
def test_stock_class_trains_what_is_intended_and_reloads(
    task: str, name: str, told: Line, strategy: str,
    tiny_model: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    found = built(tiny_model(name), task=task)
    # AutoModel of NomicBERT has no pooler, and its stock class has one.
    fresh = told.fresh if name == "nomic_bert" else []
    model: Any = check(found, told, strategy, name, fresh)
    logits = model.eval()(**batch(name)).logits
    model.save_pretrained(tmp_path)
    source = find_source(Source(model=str(tiny_model(name))))
    kind = get_task_class(source.config, task)
    torch.manual_seed(5)
    if strategy == "lora":
        source.config.num_labels = 3
        base = kind.from_pretrained(source.folder, config=source.config)
        again: Any = PeftModel.from_pretrained(base, tmp_path)
    else:
        again = kind.from_pretrained(tmp_path)
    torch.testing.assert_close(again.eval()(**batch(name)).logits, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", MASKED)
def test_what_masked_pretraining_lacks_trains_and_is_saved(
    name: str, strategy: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    told = (SEQUENCES | IMAGES | DERIVED)[name]
    found = built(tiny_model(name, True))
    lacking = {path for path in found.fresh if not path.startswith(tuple(told.head))}
    assert lacking == starting(lacking, told.fresh) and bool(lacking) == bool(told.fresh)
    model: Any = check(found, told, strategy, name, fresh=told.fresh)
    if strategy != "lora":
        return
    logits = model.eval()(**batch(name)).logits
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    source = find_source(Source(model=str(tiny_model(name, True))))
    source.config.num_labels = 3
    base = get_task_class(source.config, "classification").from_pretrained(
        source.folder, config=source.config
    )
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(again(**batch(name)).logits, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("name", "pooling"),
    [(name, "mean") for name in [*SEQUENCES, "nomic_bert", "big_bird"]]
    + [(name, "cls") for name in ("bert", "roberta", "modernbert")],
)
def test_pooled_model_trains_what_is_intended(
    name: str, pooling: str, strategy: str, tiny_model: Callable[..., Path]
) -> None:
    told = (SEQUENCES | DERIVED)[name]
    inside = "encoder." + told.top[0].partition(".")[2].rpartition(".")[0]
    norm = "encoder.final_norm" if name == "modernbert" else ""
    blocks = " ".join(block.rpartition(".")[2] for block in told.top)
    pooled = line(inside, blocks, norm, "head", "head", unused="encoder.pooler",
                  linears=told.linears)  # fmt: skip
    found = built(tiny_model(name), pooling)
    assert isinstance(found.model, PooledModel) and found.fresh == ()
    model = check(found, pooled, strategy, name, fresh=[])
    assert model(**batch(name)).logits.shape == (4, 3)


@pytest.mark.parametrize("name", [*SEQUENCES, *IMAGES, *DERIVED])
def test_unused_is_what_no_gradient_reaches(name: str, tiny_model: Callable[..., Path]) -> None:
    model = built(tiny_model(name)).model
    model.requires_grad_(True)
    model(**batch(name)).logits.square().sum().backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    names = {n for n, _ in model.named_parameters()}
    assert without == starting(names, (SEQUENCES | IMAGES | DERIVED)[name].unused_parts)


@pytest.mark.parametrize("name", list(SEQUENCES | IMAGES))
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
    live = {module for module, trains in training_modes(model) if trains}
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
