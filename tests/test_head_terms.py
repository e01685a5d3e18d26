"""KL on heads of the source: masked language, and CLIP's classes told by their names."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tiny_tokenizer
from test_retention import retaining, step_of, with_probe
from test_trainer import Rows
from tiny import tiny_processor
from torch import nn
from transformers import CLIPModel

from hftl.adapt.mlm import MaskedTokenKL, load_mlm
from hftl.config.retain import KL
from hftl.config.section import Source
from hftl.data.masking import build_masking_spec
from hftl.errors import RecipeError
from hftl.finetune.pretraining_heads import check_pretraining_head
from hftl.finetune.strategies import prepare
from hftl.models.heads import build_model, get_encoder, get_model_architecture
from hftl.models.source import find_source, load_tokenizer
from hftl.retain.hooks import eval_mode
from hftl.retain.kl import ZeroShotKL, build_zero_shot_head


def masked_term(folder: Path, weight: float = 1.0, apart: bool = False) -> MaskedTokenKL:
    source = find_source(Source(model=str(folder)))
    masked, fresh = load_mlm(source, 0)
    assert not fresh
    masking = build_masking_spec(load_tokenizer(source), 0.5, whole_words=False)
    return MaskedTokenKL(weight, masked, masking, seed=3, apart=apart)


def batch_of(rows: int = 6) -> dict[str, Any]:
    found = {k: torch.stack([Rows()[i][k] for i in range(rows)]) for k in Rows()[0]}
    return {**found, "row": torch.arange(rows), "general": torch.zeros(rows, dtype=torch.bool)}


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_the_original_may_be_another_than_the_start(
    tiny_model: Callable[..., Path], strategy: str
) -> None:
    """As after adaptation, where the reference is the source: with the adapter off it is not."""
    folder = tiny_model("bert", True)
    start = with_probe(folder, "full")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in get_encoder(start, get_model_architecture(start)).parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model = prepare(start, strategy)
    far = {}
    for apart in (False, True):
        term = masked_term(folder, apart=apart)
        term.begin(model)
        values = term.values(batch_of(), torch.ones(6, dtype=torch.bool), 0)
        far[apart] = float(values.detach().mean())
    assert far[True] > 1e-4
    assert (far[False] < 1e-6) == (strategy == "lora"), "with an adapter the start is the original"


@pytest.mark.parametrize("strategy", ["lora", "full"])
@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_at_the_original_the_masked_head_says_the_same(
    tiny_model: Callable[..., Path], strategy: str, pooling: str
) -> None:
    folder = tiny_model("bert", True)
    model = with_probe(folder, strategy, pooling).eval()
    term = masked_term(folder)
    term.begin(model)
    batch, chosen = batch_of(), torch.tensor([True, True, False, True, True, True])
    values = term.values(batch, chosen, 0)
    assert values.shape == (5,) and values.abs().max() < 1e-5
    values.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert trained and all(p.grad.abs().max() < 1e-5 for p in trained)  # pyright: ignore


def test_the_masked_kl_is_that_of_two_whole_models(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("bert", True)
    source = find_source(Source(model=str(folder)))
    model = with_probe(folder, "full").eval()
    term = masked_term(folder)
    term.begin(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch, chosen = batch_of(), torch.ones(6, dtype=torch.bool)
    found = term.values(batch, chosen, 2)
    shown, flat = term._hidden(batch["input_ids"], batch["attention_mask"], list(range(6)), 2)
    assert len(flat) and (shown.reshape(-1)[flat] != batch["input_ids"].reshape(-1)[flat]).any()
    both = [load_mlm(source, 0)[0].stock.eval() for _ in range(2)]
    changed = both[1].base_model
    changed.load_state_dict(model.encoder.state_dict(), strict=False)
    both[1].cls.predictions.decoder.weight = nn.Parameter(
        both[0].cls.predictions.decoder.weight.detach().clone()
    )
    with torch.no_grad():
        logs = [F.log_softmax(whole(shown, batch["attention_mask"]).logits, -1) for whole in both]
    each = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).reshape(-1)
    for row in range(6):
        mine = [place for place in flat.tolist() if place // 6 == row]
        wanted = each[mine].mean() if mine else torch.tensor(0.0)
        torch.testing.assert_close(found[row], wanted, atol=1e-6, rtol=1e-4)
    again = term.values(batch, chosen, 2)
    assert torch.equal(found, again) and not torch.equal(found, term.values(batch, chosen, 3))
    alone = term.values({k: v[2:3] for k, v in batch.items()}, chosen[:1], 2)
    torch.testing.assert_close(alone[0], found[2], atol=1e-6, rtol=1e-5)


def padded(batch: dict[str, Any], left: int, right: int) -> dict[str, Any]:
    """The same rows with padding on both sides."""
    fill = {"input_ids": 0, "attention_mask": 0}
    return batch | {k: F.pad(batch[k], (left, right), value=v) for k, v in fill.items()}


@pytest.mark.parametrize(("left", "right"), [(0, 6), (6, 0), (2, 1)])
def test_what_is_hidden_does_not_depend_on_padding(
    tiny_model: Callable[..., Path], left: int, right: int
) -> None:
    term = masked_term(tiny_model("bert", True))
    torch.manual_seed(0)
    batch = batch_of(1) | {"input_ids": torch.randint(5, 30, (200, 12))}
    batch["attention_mask"] = (torch.arange(12) < torch.randint(2, 13, (200, 1))).long()
    more, numbers = padded(batch, left, right), list(range(200))
    one, two = (
        term._hidden(side["input_ids"], side["attention_mask"], numbers, 1)
        for side in (batch, more)
    )
    real, wide = batch["attention_mask"].bool(), more["attention_mask"].bool()
    assert torch.equal(one[0][real], two[0][wide])
    length = 12 + left + right
    places = one[1] // 12 * length + one[1] % 12 + left
    assert len(places) and torch.equal(places, two[1])
    assert real.reshape(-1)[one[1]].all(), "padding is never hidden"


class RaggedRows(Rows):
    """Rows of 2 to 12 tokens, so that a batch's padding depends on what is in it."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = torch.cat([self.ids[i], self.ids[(i + 1) % len(self)]])[: 2 + (5 * i) % 11]
        return {"input_ids": ids, "attention_mask": torch.ones(len(ids)), "labels": self.labels[i]}


def collate_ragged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        key: torch.stack([F.pad(row[key], (0, longest - len(row[key]))) for row in rows])
        for key in ("input_ids", "attention_mask")
    }
    rest = {key: torch.stack([torch.as_tensor(row[key]) for row in rows])
            for key in rows[0] if key not in batch}  # fmt: skip
    return batch | rest


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_a_step_of_ragged_rows_may_be_cut_into_batches(
    tiny_model: Callable[..., Path], tmp_path: Path, strategy: str
) -> None:
    folder, found = tiny_model("bert", True), []
    for batch, accumulated in ((8, 1), (2, 4)):
        trainer = retaining(
            with_probe(folder, strategy), tmp_path, [masked_term(folder, 10.0)], {},
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
        )  # fmt: skip
        trainer.train_dataset, trainer.data_collator = RaggedRows(), collate_ragged
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        found.append(step_of(trainer))
    (loss, gradients), (other, others) = found
    assert loss == pytest.approx(other, abs=1e-6)
    largest = max(float(value.abs().max()) for value in gradients.values())
    for key, value in gradients.items():
        torch.testing.assert_close(value, others[key], atol=1e-5 * max(1.0, largest), rtol=1e-4)


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_training_with_it_stays_nearer(
    tiny_model: Callable[..., Path], tmp_path: Path, strategy: str
) -> None:
    folder, far = tiny_model("bert", True), []
    for weight in (0.0, 3000.0):
        model = with_probe(folder, strategy)
        more = {"num_train_epochs": 8, "learning_rate": 0.1, "optim": "adamw_torch"}
        retaining(model, tmp_path, [masked_term(folder, weight)], {}, **more).train()
        judge = masked_term(folder)
        judge.begin(model.eval())
        if strategy == "full":  # The judge's original is the checkpoint's, not the trained copy.
            judge._original = masked_term(folder)._original
        far.append(judge.values(batch_of(), torch.ones(6, dtype=torch.bool), 9).mean().item())
    assert far[1] < 0.7 * far[0]


def test_kl_on_a_head_that_is_not_there_is_refused(tiny_model: Callable[..., Path]) -> None:
    source = find_source(Source(model=str(tiny_model("bert"))))
    with pytest.raises(RecipeError, match="has no trained masked-language head"):
        check_pretraining_head(KL(on="mlm"), source, warmed=False, task="classification")
    check_pretraining_head(KL(on="mlm"), source, warmed=True, task="classification")
    with pytest.raises(RecipeError, match="is no CLIP model"):
        check_pretraining_head(KL(on="zero_shot"), source, warmed=False, task="classification")
    with pytest.raises(RecipeError, match="tells classes by their names"):
        check_pretraining_head(KL(on="zero_shot"), source, warmed=False, task="regression")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP with both halves, a tokenizer and a processor."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    CLIPModel(tiny_config("clip")).save_pretrained(folder)
    tiny_tokenizer(folder)
    tiny_processor(folder)
    return folder


def test_a_clip_without_its_tokenizer_is_refused_before_it_trains(
    clip_folder: Path, tmp_path: Path
) -> None:
    """Of pictures alone nothing else reads it, so that the arm was the first to find out."""
    told = KL(on="zero_shot")
    check_pretraining_head(
        told, find_source(Source(model=str(clip_folder))), False, "classification"
    )
    bare = tmp_path / "bare"
    shutil.copytree(clip_folder, bare, ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(RecipeError, match="has no usable tokenizer"):
        check_pretraining_head(told, find_source(Source(model=str(bare))), False, "classification")


NAMES = ["good_film", "bad", "plot"]


def clip_parts(folder: Path) -> tuple[Any, Any, Any]:
    source = find_source(Source(model=str(folder)))
    clip: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    return source, clip, load_tokenizer(source)


def test_the_zero_shot_head_is_clips_own(clip_folder: Path) -> None:
    _, clip, tokenizer = clip_parts(clip_folder)
    head = build_zero_shot_head(clip, tokenizer, NAMES)
    pictures = torch.randn(4, 3, 32, 32)
    texts = tokenizer(
        [f"a photo of a {n}." for n in ("good film", "bad", "plot")], padding=True,
        return_tensors="pt",
    )  # fmt: skip
    inputs = {k: texts[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad(), eval_mode(clip):
        wanted = clip(pixel_values=pictures, **inputs).logits_per_image
        found = head(clip.vision_model(pictures).pooler_output)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_kl_of_the_zero_shot_classes(clip_folder: Path, strategy: str) -> None:
    source, clip, tokenizer = clip_parts(clip_folder)
    built = build_model(source, "classification", "native", 3, NAMES, seed=0)
    model = prepare(built.model, strategy, fresh=built.fresh).eval()
    term = ZeroShotKL(1.0, build_zero_shot_head(clip, tokenizer, NAMES))
    term.begin(model)
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.zeros(4)}
    chosen = torch.tensor([True, False, True, True])
    values = term.values(batch, chosen, 0)
    assert values.shape == (3,) and values.abs().max() < 1e-6
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    moved = term.values(batch, chosen, 0)
    assert (moved > 1e-6).all()
    head = build_zero_shot_head(clip, tokenizer, NAMES)
    with torch.no_grad():
        tower: Any = term._tower
        logs = [
            head(part(batch["pixel_values"][chosen]).pooler_output).log_softmax(-1)
            for part in (clip.vision_model.eval(), tower)
        ]
    wanted = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    torch.testing.assert_close(moved, wanted, atol=1e-5, rtol=1e-3)
