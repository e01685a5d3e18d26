"""The masked-LM model answers at the chosen places as the stock model does, and trains alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import convert_to_fp32
from safetensors.torch import load_file, save_file
from support.ddp import run_two_backward_passes
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForMaskedLM

from hftl.adapt.encoder_io import MaskedOutput, merge_encoder_state, set_trainable
from hftl.adapt.mlm import MaskedLM, load_mlm
from hftl.config.section import Source
from hftl.errors import RecipeError
from hftl.models.architectures import ARCHITECTURES as SPECS
from hftl.models.encoders import hide_padding
from hftl.models.source import SourceModel, find_source

SLOW = ("xlm-roberta", "camembert", "ernie", "megatron-bert", "nomic_bert", "big_bird")
"""Whose code is like that of another one here."""
ARCHITECTURES = [
    "bert", "roberta", "mpnet", "electra", "distilbert", "albert", "deberta-v2", "modernbert",
    "rembert", "data2vec-text", "fnet", *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW),
]  # fmt: skip
LORA = {"r": 4, "lora_alpha": 8}

Tiny = Callable[..., Path]


def source_of(folder: Path) -> SourceModel:
    return find_source(Source(model=str(folder)))


def batch() -> dict[str, torch.Tensor]:
    """Three rows of eight, the last one padded, and five chosen places."""
    ids = torch.randint(5, 40, (3, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[2, 6:], mask[2, 6:] = 0, 0
    flat = torch.tensor([1, 3, 9, 14, 20])
    return {"input_ids": ids, "attention_mask": mask, "flat": flat, "slots": torch.arange(5)}


def full_logits(model: MaskedLM, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The stock model's own logits everywhere, then those of the chosen places."""
    names = ["input_ids"] if model.encoder.config.model_type == "fnet" else \
        ["input_ids", "attention_mask"]  # fmt: skip
    logits = model.stock(**{name: given[name] for name in names}).logits
    assert logits.shape[:2] == given["input_ids"].shape
    return logits.flatten(0, 1)[given["flat"]]


def stir(model: Any) -> None:
    """Makes every adapter say something."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("masked", [False, True])
def test_chosen_logits_and_gradients_are_the_full_head_s(
    tiny_model: Tiny, kind: str, masked: bool
) -> None:
    model, fresh = load_mlm(source_of(tiny_model(kind, masked)), seed=0)
    assert bool(fresh) != masked
    assert set(fresh) <= set(model.head_parameters())
    model.eval()
    given, answers = batch(), torch.arange(5) + 7
    grads = []
    for logits in (full_logits(model, given), model(**given).logits):
        assert logits.shape == (5, model.encoder.config.vocab_size)
        model.zero_grad()
        loss = cross_entropy(logits, answers)
        loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        grads.append((logits.detach(), loss.detach(), found))
    (whole, loss, expected), (chosen, ours, got) = grads
    assert (whole - chosen).abs().max() < 1e-6
    assert abs(loss - ours) < 1e-6
    assert expected.keys() == got.keys()
    assert max((expected[name] - got[name]).abs().max() for name in expected) < 1e-6


@pytest.mark.parametrize(
    "kind", [name for name, spec in SPECS.items() if spec.token_mixer is not None]
)
def test_last_feed_forward_sees_the_chosen_places_only(tiny_model: Tiny, kind: str) -> None:
    model, _ = load_mlm(source_of(tiny_model(kind)), seed=0)
    seen: list[tuple[int, ...]] = []
    for layer in model.encoder.encoder.layer:
        layer.intermediate.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    model(**batch())
    assert [tuple(shape[:2]) for shape in seen] == [(3, 8), (3, 8), (1, 32)], "5, rounded up"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_missing_decoder_is_tied_and_a_new_head_comes_from_the_seed(
    tiny_model: Tiny, kind: str
) -> None:
    source = source_of(tiny_model(kind))
    model, fresh = load_mlm(source, seed=3)
    words = model.stock.get_input_embeddings().weight
    shapes = [model.head_parameters()[name].shape for name in fresh]
    assert fresh and not any(shape == words.shape for shape in shapes)
    decoder = model.stock.get_output_embeddings()
    assert decoder.weight is words
    again, other = load_mlm(source, seed=3)[0].head_state(), load_mlm(source, seed=4)[0]
    assert all(torch.equal(again[name], t) for name, t in model.head_state().items())
    drawn = [not torch.equal(again[name], t) for name, t in other.head_state().items()]
    assert any(drawn)
    state = model.head_state()
    assert not any(state[name].any() for name in fresh if name.endswith("bias"))
    encoder, plain = (
        merge_encoder_state(model),
        AutoModel.from_pretrained(source.folder).state_dict(),
    )
    assert all(name.startswith("pooler") for name in plain.keys() ^ encoder.keys())
    assert all(torch.equal(plain[name], tensor) for name, tensor in encoder.items())


@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra", "modernbert"])
def test_a_trained_head_is_loaded_from_an_earlier_stage(
    tiny_model: Tiny, kind: str, tmp_path: Path
) -> None:
    source = source_of(tiny_model(kind))
    first, fresh = load_mlm(source, seed=0)
    with torch.no_grad():
        for parameter in first.head_parameters().values():
            parameter.add_(0.5)
    save_file(first.head_state(), tmp_path / "head.safetensors")
    second, still = load_mlm(source, seed=9, head=tmp_path / "head.safetensors")
    assert fresh and still == ()
    first.eval(), second.eval()
    assert torch.equal(first(**batch()).logits, second(**batch()).logits)
    short = load_file(tmp_path / "head.safetensors")
    short.pop(fresh[0])
    save_file(short, tmp_path / "short.safetensors")
    with pytest.raises(RecipeError, match=f"{fresh[0]} None, expected"):
        load_mlm(source, seed=0, head=tmp_path / "short.safetensors")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_under_lora_the_chosen_places_are_still_exact_and_the_merged_encoder_too(
    tiny_model: Tiny, kind: str
) -> None:
    source = source_of(tiny_model(kind))
    model, _ = load_mlm(source, seed=0)
    raw = model.encoder
    set_trainable(model, source.architecture_spec, "lora", 0, LORA)
    assert model.encoder is not raw and model.stock.base_model is model.encoder
    stir(model)
    model.eval()
    given = batch()
    with torch.no_grad():
        assert (full_logits(model, given) - model(**given).logits).abs().max() < 1e-6
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = merge_encoder_state(model)
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
        fresh = AutoModel.from_pretrained(source.folder).eval()
        hide_padding(fresh)
        original = fresh(input_ids=given["input_ids"]).last_hidden_state
        missing, unexpected = fresh.load_state_dict(state, strict=False)
        assert not unexpected and all(name.startswith("pooler") for name in missing)
        live = model.encoder(input_ids=given["input_ids"]).last_hidden_state
        merged = fresh(input_ids=given["input_ids"]).last_hidden_state
    assert (live - merged).abs().max() < 1e-5
    assert (live - original).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("method", ["head", "full", "lora", "lora+blocks"])
def test_all_that_trains_gets_a_gradient(tiny_model: Tiny, kind: str, method: str) -> None:
    source = source_of(tiny_model(kind))
    model, _ = load_mlm(source, seed=0)
    set_trainable(model, source.architecture_spec, method, 1, LORA)
    stir(model)
    model(**batch()).logits.square().sum().backward()
    named = dict(model.named_parameters())
    idle = [name for name, p in named.items() if p.requires_grad and p.grad is None]
    assert not idle
    assert all(p.requires_grad for p in model.head_parameters().values())
    trains = {name for name, p in model.encoder.named_parameters() if p.requires_grad}
    if method == "head":
        assert not trains
    elif method == "full":
        assert all("pooler" in n for n, p in named.items() if not p.requires_grad)
    else:
        whole = {name for name in trains if "lora_" not in name}
        assert (method == "lora+blocks") == bool(whole)
        assert any("lora_" in name for name in trains)


def test_lora_and_blocks_unfreezes_the_top_blocks_whole(tiny_model: Tiny) -> None:
    source = source_of(tiny_model("bert"))
    model, _ = load_mlm(source, seed=0)
    set_trainable(model, source.architecture_spec, "lora+blocks", 2, LORA)
    whole = {
        name.split("encoder.layer.")[1][0]
        for name, p in model.encoder.named_parameters()
        if p.requires_grad and "lora_" not in name
    }
    assert whole == {"1", "2"}
    frozen = [n for n, p in model.encoder.named_parameters() if not p.requires_grad]
    assert frozen and all("layer.1." not in name and "layer.2." not in name for name in frozen)


@pytest.mark.parametrize(
    ("method", "blocks", "lora", "says"),
    [
        ("lora+blocks", 4, {}, r"adapt.blocks=4, but the source model has 3 blocks"),
        ("lora+blocks", 0, {}, r"adapt.blocks=0"),
        ("half", 1, {}, r"adapt.method=half.*full, lora, lora\+blocks"),
        ("lora", 1, {"r": 0}, r"adapt.lora.r must be above 0, got 0"),
        ("lora", 1, {"target_modules": ["nothing"]}, r"target_modules: no module matches 'noth"),
        ("lora", 1, {"bias": "all"}, r"adapt.lora.bias=all"),
        ("lora", 1, {"modules_to_save": ["pooler"]}, r"adapt.lora.modules_to_save"),
    ],
)
def test_what_cannot_train_is_refused(
    tiny_model: Tiny, method: str, blocks: int, lora: dict[str, Any], says: str
) -> None:
    source = source_of(tiny_model("bert"))
    model, _ = load_mlm(source, seed=0)
    with pytest.raises(RecipeError, match=says):
        set_trainable(model, source.architecture_spec, method, blocks, LORA | lora)


def test_rank_stabilised_and_weight_decomposed_adapters_merge_too(tiny_model: Tiny) -> None:
    source = source_of(tiny_model("bert"))
    for more in ({"use_rslora": True}, {"use_dora": True}, {"target_modules": ["query"]}):
        model, _ = load_mlm(source, seed=0)
        set_trainable(model, source.architecture_spec, "lora", 0, LORA | more)
        stir(model)
        fresh = AutoModel.from_pretrained(source.folder).eval()
        fresh.load_state_dict(merge_encoder_state(model), strict=False)
        ids = batch()["input_ids"]
        with torch.no_grad():
            live = model.eval().encoder(input_ids=ids).last_hidden_state
            assert (live - fresh(input_ids=ids).last_hidden_state).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_another_encoder_in_its_place_answers_at_the_chosen_places_too(
    tiny_model: Tiny, kind: str
) -> None:
    source = source_of(tiny_model(kind))
    model, other = (load_mlm(source, seed=0)[0].eval() for _ in range(2))
    before = model(**batch()).logits
    model.encoder = other.encoder
    assert model.encoder is other.encoder and "encoder" not in dict(model.named_children())
    assert torch.equal(model(**batch()).logits, before)


def test_images_and_incomplete_checkpoints_are_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="vit reads images; mlm needs text"):
        load_mlm(source_of(tiny_model("vit")), seed=0)
    folder = tmp_path / "half"
    folder.mkdir()
    for file in tiny_model("bert").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.layer.1.output.dense.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match=r"lacks the weights of encoder.layer.1.output.dense"):
        load_mlm(source_of(folder), seed=0)


def test_a_decoder_of_another_width_is_not_tied(tmp_path: Path) -> None:
    from conftest import tiny_config

    config = tiny_config("rembert", output_embedding_size=12, tie_word_embeddings=False)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="lacks the masked-LM decoder.*rembert"):
        load_mlm(source_of(tmp_path), seed=0)


def test_an_untied_decoder_of_the_checkpoint_stays(tmp_path: Path) -> None:
    from conftest import tiny_config

    stock: Any = AutoModelForMaskedLM.from_config(tiny_config("bert", tie_word_embeddings=False))
    stock.save_pretrained(tmp_path)
    model, fresh = load_mlm(source_of(tmp_path), seed=0)
    decoder = model.stock.get_output_embeddings().weight
    assert not fresh and torch.equal(decoder, stock.get_output_embeddings().weight)
    assert decoder is not model.stock.get_input_embeddings().weight


def test_outputs_survive_accelerate_and_ddp(tiny_model: Tiny) -> None:
    half = MaskedOutput(logits=torch.ones(2, 3, dtype=torch.bfloat16), slots=torch.arange(2))
    wide: Any = convert_to_fp32(half)
    assert isinstance(wide, MaskedOutput) and wide.logits.dtype == torch.float32
    assert torch.equal(wide.slots, half.slots) and wide.penalty is None
    source = source_of(tiny_model("big_bird"))
    model, _ = load_mlm(source, seed=0)
    set_trainable(model, source.architecture_spec, "full", 0, {})

    def loss(wrapped: Any) -> torch.Tensor:
        found = wrapped(**batch())
        assert isinstance(found, MaskedOutput)
        return found.logits.sum()

    run_two_backward_passes(model, loss)
