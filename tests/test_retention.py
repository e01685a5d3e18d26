"""Terms in the trainer: what they add, what they leave alone, and how a step may be cut."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_trainer import Epochs, Rows, model_of, trainer_of, weights
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, Trainer

from hftl.errors import RecipeError
from hftl.models.heads import get_last_linear, get_model_architecture
from hftl.retain.hooks import EmbeddingHook, eval_mode
from hftl.retain.kl import KLToOriginal
from hftl.retain.reference import Reference
from hftl.retain.weights import L2SP
from hftl.train.trainer import TransferTrainer


def opinionated(model: nn.Module, data: Dataset | None = None) -> nn.Module:
    """The model with its last layer solved on the rows' own labels, as a probe would."""
    rows = data or Rows()
    layer = get_last_linear(model, get_model_architecture(model))
    caught: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    batch = {k: torch.stack([rows[i][k] for i in range(len(rows))])  # pyright: ignore
             for k in ("input_ids", "attention_mask")}  # fmt: skip
    with torch.no_grad(), eval_mode(model):
        model(**batch)
        labels = torch.stack([rows[i]["labels"] for i in range(len(rows))])  # pyright: ignore
        targets = 2.0 * nn.functional.one_hot(labels, layer.out_features).float()
        solved = torch.linalg.lstsq(caught[0], targets - targets.mean()).solution
        # A solver's last digits differ from call to call.
        layer.weight.copy_(solved.T.round(decimals=3))
        layer.bias.zero_()
    hook.remove()
    return model


@pytest.fixture
def bert(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("bert")


def with_probe(folder: Path, strategy: str, pooling: str = "mean", dropout: float = 0.0) -> Any:
    """A model whose head was solved before it is wrapped."""
    from hftl.config.section import Source
    from hftl.finetune.strategies import prepare
    from hftl.models.heads import build_model
    from hftl.models.source import find_source

    source = find_source(Source(model=str(folder)))
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(source.config, name, dropout)
    found = build_model(source, "classification", pooling, 3, ["a", "b", "c"], seed=0)
    return prepare(opinionated(found.model), strategy, fresh=found.fresh)


def step_of(trainer: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of the first optimizer step."""
    seen: dict[str, torch.Tensor] = {}
    total = []
    model = trainer.model
    plain = trainer.training_step

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = plain(*args, **kwargs)
        total.append(float(loss))
        return loss

    trainer.training_step = noted
    original = torch.optim.SGD.step

    def stop(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not seen:
            seen.update({n: p.grad.clone() for n, p in model.named_parameters()
                         if p.grad is not None})  # fmt: skip
            trainer.first_loss = sum(total)
        return original(optimizer, *args, **kwargs)

    torch.optim.SGD.step = stop  # pyright: ignore
    try:
        trainer.train()
    finally:
        torch.optim.SGD.step = original
    return trainer.first_loss, seen


TERMS = {
    "probe": KLToOriginal(0.7, "probe", temperature=2.0),
    "relational": KLToOriginal(0.7, "relational", anchors=10),
    "features": KLToOriginal(0.7, "features"),
    "general": KLToOriginal(0.7, "relational", inputs="general", anchors=10),
    "both": KLToOriginal(0.7, "features", inputs="both"),
}


class Plain(Rows):
    """General rows, without labels."""

    def __init__(self, rows: int = 7) -> None:
        super().__init__(rows)
        self.ids = self.ids.flip(1)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {k: v for k, v in super().__getitem__(i).items() if k != "labels"}


def extra(name: str) -> dict[str, Any]:
    return {"general_dataset": Plain()} if name in ("general", "both") else {}


def retaining(model: Any, folder: Path, terms: Any, more: dict[str, Any], **settings: Any) -> Any:
    def kind(**given: Any) -> TransferTrainer:
        return TransferTrainer(**given, retain=terms, **more)

    return trainer_of(model, folder, kind, **settings)  # pyright: ignore


@pytest.mark.parametrize("name", list(TERMS))
@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_a_step_may_be_cut_into_batches(
    bert: Path, tmp_path: Path, name: str, strategy: str
) -> None:
    found = []
    for batch, accumulated in ((8, 1), (2, 4)):
        # Away from the original, where a term has a gradient.
        torch.manual_seed(0)
        away = with_probe(bert, "full")
        with torch.no_grad():
            for parameter in away.parameters():
                parameter.add_(0.003 * torch.randn_like(parameter))
        more = {**extra(name), "reference": away}
        trainer = retaining(
            with_probe(bert, strategy), tmp_path, [TERMS[name]], more,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
        )  # fmt: skip
        found.append(step_of(trainer))
    (loss, gradients), (other, others) = found
    assert loss == pytest.approx(other, abs=1e-6)
    assert gradients.keys() == others.keys()
    largest = max(float(value.abs().max()) for value in gradients.values())
    for key, value in gradients.items():
        torch.testing.assert_close(value, others[key], atol=1e-6 * max(1.0, largest), rtol=1e-4)


@pytest.mark.parametrize("name", ["probe", "relational", "features"])
@pytest.mark.parametrize("strategy", ["lora", "full", "partial"])
def test_cached_is_what_is_computed_on_the_fly(
    bert: Path, tmp_path: Path, name: str, strategy: str
) -> None:
    from dataclasses import replace

    found = []
    for cached in (True, False):
        model = with_probe(bert, strategy)
        term = replace(TERMS[name], cached=cached)
        trainer = retaining(model, tmp_path, [term], {}, num_train_epochs=2)
        trainer.train()
        assert (trainer.retention._reference is None) == cached
        found.append(weights(model))
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], atol=1e-5, rtol=1e-4)


def test_a_cache_is_refused_where_rows_vary(bert: Path, tmp_path: Path) -> None:
    model = with_probe(bert, "lora")

    class Varying(Epochs):
        def __getitem__(self, i: int) -> dict[str, Any]:
            row = super().__getitem__(i)
            return {**row, "input_ids": row["input_ids"].roll(self.epoch), "labels": self.labels[i]}

    trainer = retaining(model, tmp_path, [KLToOriginal(cached=True)], {}, data=Varying())
    with pytest.raises(RecipeError, match="differ from epoch to epoch"):
        trainer.train()
    trainer = retaining(model, tmp_path, [KLToOriginal()], {}, data=Varying())
    trainer.train()
    assert trainer.retention._reference is not None


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_weight_zero_is_the_trainer_without_terms_bit_for_bit(
    bert: Path, tmp_path: Path, strategy: str
) -> None:
    found = []
    for terms in ([], [KLToOriginal(0.0)], [KLToOriginal(0.5)]):
        torch.manual_seed(0)
        model = model_of(bert, strategy, "mean", dropout=0.2)
        trainer = retaining(model, tmp_path, terms, {}, num_train_epochs=2)
        trainer.train()
        found.append(weights(model))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    assert not all(torch.equal(value, found[2][key]) for key, value in found[0].items())


def test_weight_zero_is_plain_trainer(bert: Path, tmp_path: Path) -> None:
    from hftl.train.samplers import SeededSampler

    class Ordered(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SeededSampler(len(self.train_dataset), 3)  # pyright: ignore

    found = []
    for plain in (True, False):
        model = model_of(bert, "full")
        if plain:
            trainer = trainer_of(model, tmp_path, Ordered)
        else:
            trainer = retaining(model, tmp_path, [KLToOriginal(0.0)], {})
        trainer.train()
        found.append(weights(model))
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["probe", "relational", "features"])
@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_at_the_original_a_term_is_zero_unless_there_is_dropout(
    bert: Path, tmp_path: Path, name: str, strategy: str
) -> None:
    for dropout in (0.0, 0.3):
        model = with_probe(bert, strategy, dropout=dropout)
        if strategy == "lora" and dropout:
            continue  # Under LoRA everything that has dropout is frozen, and so in eval.
        trainer = retaining(model, tmp_path, [TERMS[name]], {}, learning_rate=0.0)
        values: list[float] = []
        plain = trainer.retention.loss

        def noted(*args: Any, plain: Any = plain, values: list[float] = values) -> torch.Tensor:
            value = plain(*args)
            values.append(float(value))
            return value

        trainer.retention.loss = noted
        trainer.train()
        assert len(values) == 3
        if dropout:
            assert min(values) > 1e-4
        else:
            assert max(map(abs, values)) < 1e-5


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_the_reference_with_the_adapter_off_is_the_probed_model(
    bert: Path, tmp_path: Path, pooling: str, cached: bool
) -> None:
    model = with_probe(bert, "lora", pooling)
    batch = {k: torch.stack([Rows()[i][k] for i in range(8)]) for k in Rows()[0]}
    tap = EmbeddingHook(model)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad(), eval_mode(model):
        before = tap.read_outputs(model(**inputs), batch["attention_mask"])
    reference = Reference(model, None, copied=False)
    retaining(model, tmp_path, [KLToOriginal(cached=cached)], {}, learning_rate=0.1).train()
    with torch.no_grad(), eval_mode(model):
        now = tap.read_outputs(model(**inputs), batch["attention_mask"])
    then = reference(batch)
    assert not torch.allclose(now.logits, before.logits, atol=1e-2)
    torch.testing.assert_close(then.logits, before.logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(then.embedding, before.embedding, atol=1e-6, rtol=1e-5)
    assert not then.logits.requires_grad and not then.embedding.requires_grad  # pyright: ignore


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_the_reference_leaves_every_mode_as_it_was(bert: Path, strategy: str) -> None:
    model = with_probe(bert, strategy, dropout=0.5).train()
    next(iter(model.modules())).training = False
    modes = [module.training for module in model.modules()]
    reference = Reference(model, None, copied=True)
    batch = {k: torch.stack([Rows()[i][k] for i in range(8)]) for k in Rows()[0]}
    first, second = reference(batch), reference(batch)
    assert torch.equal(first.logits, second.logits), "no dropout in the reference"
    assert [module.training for module in model.modules()] == modes
    if strategy == "full":
        assert reference.model is not model
        assert not any(p.requires_grad for p in reference.model.parameters())


def test_an_adapter_that_changes_the_model_before_training_is_refused(
    bert: Path, tmp_path: Path
) -> None:
    model: Any = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    settings = LoraConfig(
        r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False
    )
    model = get_peft_model(model, settings)
    trainer = retaining(model, tmp_path, [KLToOriginal()], {})
    with pytest.raises(RecipeError, match="differs from its reference before training"):
        trainer.train()


def test_kl_on_a_head_that_nobody_trained_is_refused(bert: Path, tmp_path: Path) -> None:
    model = model_of(bert, "lora", "mean")
    trainer = retaining(model, tmp_path, [KLToOriginal(on="probe")], {})
    with pytest.raises(RecipeError, match="nobody has trained it"):
        trainer.train()


def test_another_original_may_be_given(bert: Path, tmp_path: Path) -> None:
    model, other = with_probe(bert, "lora"), with_probe(bert, "full")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    terms, far = [KLToOriginal(50.0, "features")], []
    tap = EmbeddingHook(other)
    batch = {k: torch.stack([Rows()[i][k] for i in range(24)]) for k in Rows()[0]}
    inputs = {k: v for k, v in batch.items() if k != "labels"}

    def distance() -> float:
        mine = EmbeddingHook(model)
        with torch.no_grad(), eval_mode(model), eval_mode(other):
            one = mine.read_outputs(model(**inputs), batch["attention_mask"]).embedding
            two = tap.read_outputs(other(**inputs), batch["attention_mask"]).embedding
        mine.close()
        return float((one - two).norm())  # pyright: ignore

    far.append(distance())
    retaining(
        model,
        tmp_path,
        terms,
        {"reference": other},
        learning_rate=0.01,
        num_train_epochs=9,
        optim="adamw_torch",
    ).train()
    far.append(distance())
    assert far[1] < 0.9 * far[0], "the model moves towards the reference that it was given"


def test_general_rows_come_in_the_exact_ratio_and_never_count_as_labelled(
    bert: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    model = with_probe(bert, "lora")
    trainer = retaining(
        model, tmp_path, [TERMS["general"]],
        {"general_dataset": Plain(), "general_ratio": 0.3}, num_train_epochs=2,
    )  # fmt: skip
    plain = trainer.retention.loss

    def noted(model: Any, batch: Any, outputs: Any, counts: Any, target: Any, *rest: Any) -> Any:
        general = batch["general"]
        assert (batch["labels"][general] == -100).all() and not counts[general].any()
        assert int(target) == 8, "the step's rows are the target's"
        seen.append((int((~general).sum()), int(general.sum())))
        return plain(model, batch, outputs, counts, target, *rest)

    trainer.retention.loss = noted
    trainer.train()
    assert [rows for rows, _ in seen] == [8] * 6
    assert sum(general for _, general in seen) == int(0.3 * 48)
    assert {general for _, general in seen} == {2, 3}


def test_labelled_general_rows_are_learnt_from(bert: Path, tmp_path: Path) -> None:
    found = []
    for general in (None, Rows(9)):
        model = with_probe(bert, "full")
        trainer = retaining(model, tmp_path, [], {"general_dataset": general})
        trainer.train()
        found.append(weights(model))
    assert any(not torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_resuming_keeps_the_original(bert: Path, tmp_path: Path) -> None:
    more = {"num_train_epochs": 2, "optim": "adamw_torch", "learning_rate": 0.02}
    terms = [TERMS["relational"], TERMS["features"]]
    whole = with_probe(bert, "lora")
    retaining(whole, tmp_path / "whole", terms, {}, **more).train()
    first = with_probe(bert, "lora")
    retaining(
        first, tmp_path / "parts", terms, {}, save_strategy="steps", save_steps=2, **more
    ).train()
    again = with_probe(bert, "lora")
    retaining(again, tmp_path / "parts", terms, {}, **more).train(
        resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2")
    )
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(again)[key]), key


def test_features_are_measured_by_the_same_spread_cached_or_not(bert: Path, tmp_path: Path) -> None:
    spreads = []
    for cached in (True, False):
        model = with_probe(bert, "lora")
        more = {"general_dataset": Plain(40)}
        term = KLToOriginal(0.5, "features", inputs="both", cached=cached)
        trainer = retaining(model, tmp_path, [term], more, data=Rows(300), max_steps=1)
        trainer.train()
        spreads.append(trainer.retention._spread)
    torch.testing.assert_close(*spreads)


@pytest.mark.parametrize("inputs", ["general", "both"])
def test_a_term_on_general_rows_is_refused_where_there_are_none(
    bert: Path, tmp_path: Path, inputs: str
) -> None:
    term = KLToOriginal(inputs=inputs)
    with pytest.raises(RecipeError, match=f"kl.inputs='{inputs}' is of general rows"):
        retaining(with_probe(bert, "lora"), tmp_path, [term], {}).train()
    still = retaining(with_probe(bert, "lora"), tmp_path, [KLToOriginal(0, inputs=inputs)], {})
    still.train()


def test_a_ratio_of_nothing_is_refused(bert: Path, tmp_path: Path) -> None:
    more = {"general_dataset": Plain(), "general_ratio": 0.0}
    with pytest.raises(RecipeError, match="general_ratio=0.0 must be above 0"):
        retaining(with_probe(bert, "lora"), tmp_path, [TERMS["general"]], more)


def test_a_term_alone_is_a_list_of_one_and_a_class_is_none(bert: Path, tmp_path: Path) -> None:
    assert len(retaining(with_probe(bert, "lora"), tmp_path, L2SP(), {}).retention.weights) == 1
    with pytest.raises(RecipeError, match="retain holds a type, expected terms"):
        retaining(with_probe(bert, "lora"), tmp_path, [L2SP], {})


def test_the_reference_stands_still_where_more_trains_than_the_adapter(bert: Path) -> None:
    """A head that no adapter holds would move the reference with it."""
    plain: Any = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    model: Any = get_peft_model(plain, LoraConfig(r=2, target_modules=["query", "value"]))
    head = model.base_model.model.classifier.weight.requires_grad_(True)
    batch = {k: v for k, v in Rows()[0].items() if k != "labels"}
    batch = {key: value.unsqueeze(0) for key, value in batch.items()}
    reference = Reference(model, None, copied=True)
    before = reference(batch).logits
    with torch.no_grad():
        head.add_(1.0)
    assert torch.equal(reference(batch).logits, before)
