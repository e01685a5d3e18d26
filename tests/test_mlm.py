"""Compare the masked-LM model at the chosen positions with the stock model, and train alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import convert_to_fp32
from safetensors.torch import load_file, save_file
from support.ddp import run_two_backward_passes
from support.tiny import tiny_config
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForMaskedLM

from hftl.adapt.encoder_io import MaskedOutput, merge_encoder_state, set_trainable
from hftl.adapt.language_model import LanguageModel, load_mlm
from hftl.config.section import Source
from hftl.errors import RecipeError
from hftl.models.architectures import ARCHITECTURES as SPECS
from hftl.models.encoders import get_blocks, hide_padding
from hftl.models.source import SourceModel, find_source

SLOW = ("xlm-roberta", "camembert", "ernie", "megatron-bert", "nomic_bert", "big_bird")
"""Architectures whose code is like that of another one here."""
ARCHITECTURES = [
    "bert", "roberta", "mpnet", "electra", "distilbert", "albert", "deberta-v2", "modernbert",
    "rembert", "data2vec-text", "fnet", *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW),
]  # fmt: skip
LORA = {"r": 4, "lora_alpha": 8}

Tiny = Callable[..., Path]


def load_source(folder: Path) -> SourceModel:
    return find_source(Source(model=str(folder)))


def load_trainable(folder: Path, method: str, blocks: int = 0, **lora: Any) -> LanguageModel:
    """Return a model of which a method trains, its adapters moved away from zero."""
    source = load_source(folder)
    model, _ = load_mlm(source, seed=0)
    set_trainable(model, source.architecture_spec, method, blocks, LORA | lora)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def build_batch() -> dict[str, torch.Tensor]:
    """Return three rows of eight, the last one padded, and five chosen positions."""
    ids = torch.randint(5, 40, (3, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[2, 6:], mask[2, 6:] = 0, 0
    flat = torch.tensor([1, 3, 9, 14, 20])
    return {"input_ids": ids, "attention_mask": mask, "flat": flat, "slots": torch.arange(5)}


def compute_stock_logits(model: LanguageModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the stock model's logits at the chosen positions."""
    is_fnet = model.encoder.config.model_type == "fnet"
    names = ["input_ids"] if is_fnet else ["input_ids", "attention_mask"]
    logits = model.stock(**{name: batch[name] for name in names}).logits
    assert logits.shape[:2] == batch["input_ids"].shape
    return logits.flatten(0, 1)[batch["flat"]]


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("masked", [False, True])
def test_chosen_logits_and_gradients_are_the_full_head_s(
    tiny_model: Tiny, kind: str, masked: bool
) -> None:
    model, fresh = load_mlm(load_source(tiny_model(kind, masked)), seed=0)
    assert bool(fresh) != masked and set(fresh) <= set(model.head_parameters())
    model.eval()
    batch, answers = build_batch(), torch.arange(5) + 7
    results = []
    for logits in (compute_stock_logits(model, batch), model(**batch).logits):
        assert logits.shape == (5, model.encoder.config.vocab_size)
        model.zero_grad()
        loss = cross_entropy(logits, answers)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((logits.detach(), loss.detach(), grads))
    (whole, loss, expected), (chosen, own_loss, gradients) = results
    assert (whole - chosen).abs().max() < 1e-6
    assert abs(loss - own_loss) < 1e-6
    assert expected.keys() == gradients.keys()
    assert max((expected[name] - gradients[name]).abs().max() for name in expected) < 1e-6


@pytest.mark.parametrize("kind", [name for name, spec in SPECS.items() if spec.packs])
@pytest.mark.parametrize("is_padded", [False, True])
def test_packed_rows_give_the_logits_of_a_padded_batch(
    tiny_model: Tiny, kind: str, is_padded: bool
) -> None:
    model, _ = load_mlm(load_source(tiny_model(kind)), seed=0)
    model.eval()
    batch, sizes = build_batch(), []
    if not is_padded:
        del batch["attention_mask"]
    block = get_blocks(model.encoder, model.architecture)[0]
    block.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    packed = model(**batch).logits
    with torch.no_grad():
        padded = model(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**batch).logits
    assert sizes == [1, 3, 1]
    torch.testing.assert_close(packed, padded, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(half.float(), padded, atol=2e-2, rtol=5e-2)


@pytest.mark.parametrize("kind", [name for name, spec in SPECS.items() if spec.token_mixer])
def test_last_feed_forward_reads_the_chosen_positions_only(tiny_model: Tiny, kind: str) -> None:
    model, _ = load_mlm(load_source(tiny_model(kind)), seed=0)
    shapes: list[tuple[int, ...]] = []
    for layer in model.encoder.encoder.layer:
        layer.intermediate.register_forward_hook(lambda _, args, __: shapes.append(args[0].shape))
    batch = build_batch()
    model(**batch)
    tokens = int(batch["attention_mask"].sum())
    assert [tuple(s[:2]) for s in shapes] == [(1, tokens)] * 2 + [(1, 32)], "5, rounded up"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_missing_decoder_is_tied_and_a_new_head_is_a_function_of_the_seed(
    tiny_model: Tiny, kind: str
) -> None:
    source = load_source(tiny_model(kind))
    model, fresh = load_mlm(source, seed=3)
    words = model.stock.get_input_embeddings().weight
    shapes = [model.head_parameters()[name].shape for name in fresh]
    assert fresh and not any(shape == words.shape for shape in shapes)
    assert model.stock.get_output_embeddings().weight is words
    state = model.head_state()
    again, other = (load_mlm(source, seed)[0].head_state() for seed in (3, 4))
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert any(not torch.equal(other[name], tensor) for name, tensor in state.items())
    assert not any(state[name].any() for name in fresh if name.endswith("bias"))
    encoder = merge_encoder_state(model)
    plain = AutoModel.from_pretrained(source.folder).state_dict()
    assert all(name.startswith("pooler") for name in plain.keys() ^ encoder.keys())
    assert all(torch.equal(plain[name], tensor) for name, tensor in encoder.items())


@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra", "modernbert"])
def test_trained_head_is_loaded_from_an_earlier_stage(
    tiny_model: Tiny, kind: str, tmp_path: Path
) -> None:
    source = load_source(tiny_model(kind))
    first, fresh = load_mlm(source, seed=0)
    with torch.no_grad():
        for parameter in first.head_parameters().values():
            parameter.add_(0.5)
    save_file(first.head_state(), tmp_path / "head.safetensors")
    second, still_fresh = load_mlm(source, seed=9, head=tmp_path / "head.safetensors")
    assert fresh and still_fresh == ()
    first.eval(), second.eval()
    assert torch.equal(first(**build_batch()).logits, second(**build_batch()).logits)
    short = load_file(tmp_path / "head.safetensors")
    short.pop(fresh[0])
    save_file(short, tmp_path / "short.safetensors")
    with pytest.raises(RecipeError, match=f"{fresh[0]} None, expected"):
        load_mlm(source, seed=0, head=tmp_path / "short.safetensors")


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        *(pytest.param(*(k.values if hasattr(k, "values") else (k,)), {},
                       marks=getattr(k, "marks", ())) for k in ARCHITECTURES),
        ("bert", {"use_rslora": True}), ("bert", {"use_dora": True}),
        ("bert", {"target_modules": ["query", "value"]}),
    ],
)  # fmt: skip
def test_under_lora_logits_and_the_merged_encoder_are_exact(
    tiny_model: Tiny, kind: str, lora: dict[str, Any]
) -> None:
    model, batch = load_trainable(tiny_model(kind), "lora", **lora).eval(), build_batch()
    ids = batch["input_ids"]
    assert model.stock.base_model is model.encoder
    fresh = AutoModel.from_pretrained(tiny_model(kind)).eval()
    hide_padding(fresh)
    with torch.no_grad():
        assert (compute_stock_logits(model, batch) - model(**batch).logits).abs().max() < 1e-6
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = merge_encoder_state(model)
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
        original = fresh(input_ids=ids).last_hidden_state
        missing, unexpected = fresh.load_state_dict(state, strict=False)
        assert not unexpected and all(name.startswith("pooler") for name in missing)
        live = model.encoder(input_ids=ids).last_hidden_state
        merged = fresh(input_ids=ids).last_hidden_state
    assert (live - merged).abs().max() < 1e-5
    assert (live - original).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((kind, method) for kind in ARCHITECTURES[:11] for method in ("full", "lora+blocks")),
        ("bert", "head"), ("bert", "lora"),
    ],
)  # fmt: skip
def test_all_that_trains_gets_a_gradient(tiny_model: Tiny, kind: str, method: str) -> None:
    model = load_trainable(tiny_model(kind), method, 1)
    model(**build_batch()).logits.square().sum().backward()
    named = dict(model.named_parameters())
    assert not [name for name, p in named.items() if p.requires_grad and p.grad is None]
    assert all(p.requires_grad for p in model.head_parameters().values())
    trains = {name for name, p in model.encoder.named_parameters() if p.requires_grad}
    if method == "head":
        assert not trains
    elif method == "full":
        assert all("pooler" in n for n, p in named.items() if not p.requires_grad)
    else:
        assert (method == "lora+blocks") == any("lora_" not in name for name in trains)
        assert any("lora_" in name for name in trains)


def test_lora_and_blocks_unfreezes_the_top_blocks_whole(tiny_model: Tiny) -> None:
    model = load_trainable(tiny_model("bert"), "lora+blocks", 2)
    parameters = dict(model.encoder.named_parameters())
    whole = {name for name, p in parameters.items() if p.requires_grad and "lora_" not in name}
    assert {name.split("encoder.layer.")[1][0] for name in whole} == {"1", "2"}
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    assert frozen and all("layer.1." not in name and "layer.2." not in name for name in frozen)


@pytest.mark.parametrize(
    ("method", "blocks", "lora", "words"),
    [
        ("lora+blocks", 4, {}, r"adapt.blocks=4, but the source model has 3 blocks"),
        ("lora+blocks", 0, {}, r"adapt.blocks=0"),
        ("half", 1, {}, r"adapt.method=half.*full, lora, lora\+blocks"),
        ("lora", 1, {"r": 0}, r"adapt.lora: peft refuses it: .*positive.* 0"),
        ("lora", 1, {"target_modules": ["nothing"]}, r"target_modules: no module matches 'noth"),
        ("lora", 1, {"bias": "all"}, r"adapt.lora.bias=all"),
        ("lora", 1, {"modules_to_save": ["pooler"]}, r"adapt.lora.modules_to_save"),
    ],
)
def test_impossible_settings_are_refused(
    tiny_model: Tiny, method: str, blocks: int, lora: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        load_trainable(tiny_model("bert"), method, blocks, **lora)


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_replaced_encoder_answers_at_the_chosen_positions_too(tiny_model: Tiny, kind: str) -> None:
    source = load_source(tiny_model(kind))
    model, other = (load_mlm(source, seed=0)[0].eval() for _ in range(2))
    before = model(**build_batch()).logits
    model.encoder = other.encoder
    assert model.encoder is other.encoder and "encoder" not in dict(model.named_children())
    assert torch.equal(model(**build_batch()).logits, before)


def test_images_and_incomplete_checkpoints_are_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="vit reads images; mlm needs text"):
        load_mlm(load_source(tiny_model("vit")), seed=0)
    for file in tiny_model("bert").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("encoder.layer.1.output.dense.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match=r"lacks the weights of encoder.layer.1.output.dense"):
        load_mlm(load_source(tmp_path), seed=0)


def test_decoder_of_another_width_is_not_tied(tmp_path: Path) -> None:
    config = tiny_config("rembert", output_embedding_size=12, tie_word_embeddings=False)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="lacks the masked-LM decoder.*rembert"):
        load_mlm(load_source(tmp_path), seed=0)


def test_untied_decoder_of_the_checkpoint_stays(tmp_path: Path) -> None:
    stock: Any = AutoModelForMaskedLM.from_config(tiny_config("bert", tie_word_embeddings=False))
    stock.save_pretrained(tmp_path)
    model, fresh = load_mlm(load_source(tmp_path), seed=0)
    decoder = model.stock.get_output_embeddings().weight
    assert not fresh and torch.equal(decoder, stock.get_output_embeddings().weight)
    assert decoder is not model.stock.get_input_embeddings().weight


def test_outputs_survive_accelerate_and_ddp(tiny_model: Tiny) -> None:
    half = MaskedOutput(logits=torch.ones(2, 3, dtype=torch.bfloat16), slots=torch.arange(2))
    wide: Any = convert_to_fp32(half)
    assert isinstance(wide, MaskedOutput) and wide.logits.dtype == torch.float32
    assert torch.equal(wide.slots, half.slots) and wide.penalty is None

    def loss(wrapped: Any) -> torch.Tensor:
        output = wrapped(**build_batch())
        assert isinstance(output, MaskedOutput)
        return output.logits.sum()

    run_two_backward_passes(load_trainable(tiny_model("big_bird"), "full"), loss)
