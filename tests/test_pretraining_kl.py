"""Compute KL on heads of the source: masked language, and CLIP's classes by their names."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.tiny import tiny_config, tiny_processor, tiny_tokenizer
from support.training import (
    Rows,
    assert_same_step,
    build_probed_model,
    build_trainer,
    perturb,
    run_first_step,
    stack_rows,
)
from torch import Tensor, nn
from transformers import CLIPModel

from hftl.adapt.language_model import load_mlm
from hftl.config.retain import KL
from hftl.config.section import Source
from hftl.data.masking import build_masking_spec
from hftl.errors import RecipeError
from hftl.finetune.pretraining_heads import check_pretraining_head
from hftl.finetune.trainable import prepare
from hftl.models.heads import build_model
from hftl.models.model_parts import get_encoder, get_model_spec
from hftl.models.pairs import embed_texts, get_scale_and_bias
from hftl.models.source import find_source, load_tokenizer
from hftl.retain.original import eval_mode
from hftl.retain.pretraining_kl import (
    MaskedTokenKL,
    PretrainingHeadKL,
    ZeroShotHead,
    ZeroShotKL,
)

Tiny = Callable[..., Path]

ALL = torch.ones(6, dtype=torch.bool)


def build_masked_kl(folder: Path, weight: float = 1.0, is_other: bool = False) -> MaskedTokenKL:
    source = find_source(Source(model=str(folder)))
    masked_lm, new_weights = load_mlm(source, 0)
    assert not new_weights
    masking = build_masking_spec(load_tokenizer(source), 0.5, whole_words=False)
    config = KL(weight=weight, on="mlm")
    return MaskedTokenKL(config, masked_lm, masking, seed=3, is_other=is_other)


def compute_values(
    term: PretrainingHeadKL, batch: dict[str, Any], chosen: Tensor = ALL, epoch: int = 0
) -> Tensor:
    step: Any = SimpleNamespace(batch=batch, epoch=epoch)
    return term.compute_values(step, chosen)


def build_batch() -> dict[str, Any]:
    return {**stack_rows(6), "row": torch.arange(6), "general": torch.zeros(6, dtype=torch.bool)}


@pytest.fixture
def bert(tiny_model: Tiny) -> Path:
    return tiny_model("bert", True)


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_original_may_be_another_model(bert: Path, strategy: str) -> None:
    """Take the source after an adaptation: it is not the model without its adapter."""
    start = build_probed_model(bert, "full")
    perturb(get_encoder(start, get_model_spec(start)), 0.05)
    model, distances = prepare(start, strategy), {}
    for is_other in (False, True):
        term = build_masked_kl(bert, is_other=is_other)
        term.attach(model)
        distances[is_other] = float(compute_values(term, build_batch()).detach().mean())
    assert distances[True] > 1e-4
    assert (distances[False] < 1e-6) == (strategy == "lora")


@pytest.mark.parametrize(("strategy", "pooling"), [("lora", "native"), ("full", "mean")])
def test_masked_kl_is_zero_at_the_original(bert: Path, strategy: str, pooling: str) -> None:
    model, term = build_probed_model(bert, strategy, pooling).eval(), build_masked_kl(bert)
    term.attach(model)
    values = compute_values(
        term, build_batch(), torch.tensor([True, True, False, True, True, True])
    )
    assert values.shape == (5,) and values.abs().max() < 1e-5
    values.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(gradient.abs().max() < 1e-5 for gradient in gradients)


def test_masked_kl_is_that_of_two_stock_models(bert: Path) -> None:
    source = find_source(Source(model=str(bert)))
    model, term = build_probed_model(bert, "full").eval(), build_masked_kl(bert)
    term.attach(model)
    perturb(model.encoder, 0.05)
    batch = build_batch()
    values = compute_values(term, batch, epoch=2)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    masked, flat = term.mask_rows(ids, mask, list(range(6)), 2)
    assert len(flat) and (masked.reshape(-1)[flat] != ids.reshape(-1)[flat]).any()
    stock = [load_mlm(source, 0)[0].stock.eval() for _ in range(2)]
    stock[1].base_model.load_state_dict(model.encoder.state_dict(), strict=False)
    stock[1].cls.predictions.decoder.weight = nn.Parameter(
        stock[0].cls.predictions.decoder.weight.detach().clone()
    )
    with torch.no_grad():
        logs = [F.log_softmax(side(masked, mask).logits, -1) for side in stock]
    each = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).reshape(-1)
    for row in range(6):
        positions = [position for position in flat.tolist() if position // 6 == row]
        expected = each[positions].mean() if positions else torch.tensor(0.0)
        torch.testing.assert_close(values[row], expected, atol=1e-6, rtol=1e-4)
    assert torch.equal(values, compute_values(term, batch, epoch=2))
    assert not torch.equal(values, compute_values(term, batch, epoch=3))
    alone = compute_values(term, {k: v[2:3] for k, v in batch.items()}, ALL[:1], 2)
    torch.testing.assert_close(alone[0], values[2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("left", "right"), [(0, 6), (2, 1)])
def test_masks_do_not_depend_on_padding(bert: Path, left: int, right: int) -> None:
    term, numbers = build_masked_kl(bert), list(range(200))
    torch.manual_seed(0)
    ids = torch.randint(5, 30, (200, 12))
    mask = (torch.arange(12) < torch.randint(2, 13, (200, 1))).long()
    padded_ids, padded_mask = (F.pad(side, (left, right)) for side in (ids, mask))
    masked, flat = term.mask_rows(ids, mask, numbers, 1)
    padded_masked, padded_flat = term.mask_rows(padded_ids, padded_mask, numbers, 1)
    assert torch.equal(masked[mask.bool()], padded_masked[padded_mask.bool()])
    positions = flat // 12 * (12 + left + right) + flat % 12 + left
    assert len(positions) and torch.equal(positions, padded_flat)
    assert mask.bool().reshape(-1)[flat].all(), "padding is never masked"


class RaggedRows(Rows):
    """Hold rows of 2 to 12 tokens, so that a batch's padding depends on its rows."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = torch.cat([self.ids[i], self.ids[(i + 1) % len(self)]])[: 2 + (5 * i) % 11]
        return {"input_ids": ids, "attention_mask": torch.ones(len(ids)), "labels": self.labels[i]}


def collate_ragged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    longest = max(len(row["input_ids"]) for row in rows)
    padded = [
        {
            key: F.pad(value, (0, longest - len(value))) if value.dim() else value
            for key, value in ((k, torch.as_tensor(v)) for k, v in row.items())
        }
        for row in rows
    ]
    return {key: torch.stack([row[key] for row in padded]) for key in rows[0]}


def test_step_of_ragged_rows_may_be_cut_into_batches(bert: Path, tmp_path: Path) -> None:
    steps = []
    for batch, accumulated in ((8, 1), (2, 4)):
        trainer = build_trainer(
            build_probed_model(bert, "lora"), tmp_path, [build_masked_kl(bert, 10.0)], {},
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
        )  # fmt: skip
        trainer.train_dataset, trainer.data_collator = RaggedRows(), collate_ragged
        perturb(trainer.model, 0.05)
        steps.append(run_first_step(trainer))
    assert_same_step(*steps, tolerance=1e-5)


@pytest.mark.parametrize("strategy", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_training_with_masked_kl_stays_nearer(bert: Path, tmp_path: Path, strategy: str) -> None:
    distances = []
    for weight in (0.0, 3000.0):
        model = build_probed_model(bert, strategy)
        settings = {"num_train_epochs": 6, "learning_rate": 0.1, "optim": "adamw_torch"}
        build_trainer(model, tmp_path, [build_masked_kl(bert, weight)], {}, **settings).train()
        distance = build_masked_kl(bert)
        distance.attach(model.eval())
        if strategy == "full":  # The original is the checkpoint, not the trained model.
            distance._original = build_masked_kl(bert)._original
        distances.append(compute_values(distance, build_batch(), epoch=9).mean().item())
    assert distances[1] < 0.7 * distances[0]


def test_head_that_the_source_lacks_is_refused(tiny_model: Tiny) -> None:
    source = find_source(Source(model=str(tiny_model("bert"))))
    with pytest.raises(RecipeError, match="has no trained masked-language head"):
        check_pretraining_head(KL(on="mlm"), source, has_head=False, task="classification")
    check_pretraining_head(KL(on="mlm"), source, has_head=True, task="classification")
    with pytest.raises(RecipeError, match="is no pair of an image and a text encoder"):
        check_pretraining_head(KL(on="zero_shot"), source, has_head=False, task="classification")
    with pytest.raises(RecipeError, match="classifies by class names"):
        check_pretraining_head(KL(on="zero_shot"), source, has_head=False, task="regression")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random CLIP with both halves, a tokenizer and a processor."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    CLIPModel(tiny_config("clip")).save_pretrained(folder)
    tiny_tokenizer(folder)
    tiny_processor(folder)
    return folder


def test_clip_without_its_tokenizer_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    kl = KL(on="zero_shot")
    source = find_source(Source(model=str(clip_folder)))
    check_pretraining_head(kl, source, False, "classification")
    bare = tmp_path / "bare"
    shutil.copytree(clip_folder, bare, ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(RecipeError, match="has no usable tokenizer"):
        check_pretraining_head(kl, find_source(Source(model=str(bare))), False, "classification")


NAMES = ["good_film", "bad", "plot"]


def load_clip(folder: Path) -> tuple[Any, Any, Any]:
    """Return the source, the whole CLIP model, and the head of `NAMES`."""
    source = find_source(Source(model=str(folder)))
    clip: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
    texts = embed_texts(clip, load_tokenizer(source), prompts)
    return source, clip, ZeroShotHead(clip.visual_projection, texts, *get_scale_and_bias(clip))


def test_zero_shot_head_is_that_of_clip(clip_folder: Path) -> None:
    source, clip, head = load_clip(clip_folder)
    images = torch.randn(4, 3, 32, 32)
    prompts = [f"a photo of a {name}." for name in ("good film", "bad", "plot")]
    ids = load_tokenizer(source)(prompts, padding=True, return_tensors="pt")
    inputs = {key: ids[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad(), eval_mode(clip):
        expected = clip(pixel_values=images, **inputs).logits_per_image
        logits = head(clip.vision_model(images).pooler_output)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_zero_shot_kl_is_that_of_two_clip_towers(clip_folder: Path, strategy: str) -> None:
    source, clip, head = load_clip(clip_folder)
    loaded = build_model(source, "classification", "native", 3, NAMES, seed=0)
    model = prepare(loaded.model, strategy, fresh=loaded.fresh).eval()
    term = ZeroShotKL(KL(weight=1.0, on="zero_shot"), head)
    term.attach(model)
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.zeros(4)}
    chosen = torch.tensor([True, False, True, True])
    values = compute_values(term, batch, chosen)
    assert values.shape == (3,) and values.abs().max() < 1e-6
    perturb(model, 0.1)
    values = compute_values(term, batch, chosen)
    assert (values > 1e-6).all()
    with torch.no_grad():
        towers: list[Any] = [clip.vision_model, term._tower]
        images = batch["pixel_values"][chosen]
        logs = [head(tower(images).pooler_output).log_softmax(-1) for tower in towers]
    expected = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-3)
