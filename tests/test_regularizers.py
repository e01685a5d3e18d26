"""Regularizers in the trainer: what they add, what they leave alone, and how a step may be cut."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.regularizers import (
    UnlabelledRows,
    assert_same_step,
    build_probed_model,
    build_trainer,
    perturb,
    run_first_step,
    stack_rows,
    watch_losses,
)
from test_trainer import Epochs, Rows, model_of, trainer_of, weights
from transformers import AutoModelForSequenceClassification, Trainer

from hftl.config.retain import EWC, KL, RegularizerSection
from hftl.config.retain import L2SP as L2SPSection
from hftl.errors import RecipeError
from hftl.retain.build import Step
from hftl.retain.kl import KLToOriginal
from hftl.retain.reference import EmbeddingHook, Reference, eval_mode
from hftl.retain.weights import L2SP
from hftl.train.samplers import SeededSampler

TERMS: dict[str, dict[str, Any]] = {
    "probe": {"on": "probe", "temperature": 2.0},
    "relational": {"on": "relational", "anchors": 10},
    "features": {"on": "features"},
    "general": {"on": "relational", "inputs": "general", "anchors": 10},
    "both": {"on": "features", "inputs": "both"},
}


def build_term(name: str, **more: Any) -> KLToOriginal:
    return KLToOriginal(0.7, **TERMS[name], **more)


def get_original(trainer: Any) -> Any:
    """Return the outputs of the original that the first term compares with."""
    return trainer.retention.regularizers[0]._original


def add_general(name: str) -> dict[str, Any]:
    return {"general_dataset": UnlabelledRows()} if name in ("general", "both") else {}


@pytest.fixture
def bert(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("bert")


@pytest.mark.parametrize("name", list(TERMS))
@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_step_may_be_cut_into_batches(bert: Path, tmp_path: Path, name: str, strategy: str) -> None:
    steps = []
    for batch, accumulated in ((8, 1), (2, 4)):
        # Away from the original, where a term has a gradient.
        reference = perturb(build_probed_model(bert, "full"), 0.003)
        more = {**add_general(name), "reference": reference}
        trainer = build_trainer(
            build_probed_model(bert, strategy), tmp_path, [build_term(name)], more,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
        )  # fmt: skip
        steps.append(run_first_step(trainer))
    assert_same_step(*steps)


@pytest.mark.parametrize("name", ["probe", "relational", "features"])
@pytest.mark.parametrize("strategy", ["lora", "full", "partial"])
def test_cached_outputs_equal_computed_ones(
    bert: Path, tmp_path: Path, name: str, strategy: str
) -> None:
    results = []
    for cached in (True, False):
        model = build_probed_model(bert, strategy)
        term = build_term(name, cached=cached)
        trainer = build_trainer(model, tmp_path, [term], {}, num_train_epochs=2)
        trainer.train()
        assert (get_original(trainer).reference is None) == cached
        results.append(weights(model))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], atol=1e-5, rtol=1e-4)


def test_refuses_a_cache_of_varying_rows(bert: Path, tmp_path: Path) -> None:
    model = build_probed_model(bert, "lora")

    class Varying(Epochs):
        def __getitem__(self, i: int) -> dict[str, Any]:
            row = super().__getitem__(i)
            return {**row, "input_ids": row["input_ids"].roll(self.epoch), "labels": self.labels[i]}

    trainer = build_trainer(model, tmp_path, [KLToOriginal(cached=True)], {}, data=Varying())
    with pytest.raises(RecipeError, match="differ from epoch to epoch"):
        trainer.train()
    trainer = build_trainer(model, tmp_path, [KLToOriginal()], {}, data=Varying())
    trainer.train()
    assert get_original(trainer).reference is not None


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_weight_zero_equals_no_term_bit_for_bit(bert: Path, tmp_path: Path, strategy: str) -> None:
    results = []
    for terms in ([], [KLToOriginal(0.0)], [KLToOriginal(0.5)]):
        torch.manual_seed(0)
        model = model_of(bert, strategy, "mean", dropout=0.2)
        build_trainer(model, tmp_path, terms, {}, num_train_epochs=2).train()
        results.append(weights(model))
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())
    assert not all(torch.equal(value, results[2][key]) for key, value in results[0].items())


def test_weight_zero_equals_the_stock_trainer(bert: Path, tmp_path: Path) -> None:
    class Ordered(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SeededSampler(len(self.train_dataset), 3)  # pyright: ignore

    stock, own = model_of(bert, "full"), model_of(bert, "full")
    trainer_of(stock, tmp_path, Ordered).train()
    build_trainer(own, tmp_path, [KLToOriginal(0.0)], {}).train()
    for key, value in weights(stock).items():
        torch.testing.assert_close(value, weights(own)[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["probe", "relational", "features"])
@pytest.mark.parametrize(("strategy", "dropout"), [("lora", 0.0), ("full", 0.0), ("full", 0.3)])
def test_term_is_zero_at_the_original_without_dropout(
    bert: Path, tmp_path: Path, name: str, strategy: str, dropout: float
) -> None:
    """Under LoRA everything that has dropout is frozen, and so in eval mode."""
    model = build_probed_model(bert, strategy, dropout=dropout)
    trainer = build_trainer(model, tmp_path, [build_term(name)], {}, learning_rate=0.0)
    values: list[float] = []
    watch_losses(trainer, lambda step, value: values.append(float(value)))
    trainer.train()
    assert len(values) == 3
    assert min(values) > 1e-4 if dropout else max(map(abs, values)) < 1e-5


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_reference_with_adapter_off_is_the_probed_model(
    bert: Path, tmp_path: Path, pooling: str, cached: bool
) -> None:
    model, batch = build_probed_model(bert, "lora", pooling), stack_rows(8)
    hook = EmbeddingHook(model)
    inputs = {k: v for k, v in batch.items() if k != "labels"}

    def run_model() -> Any:
        with torch.no_grad(), eval_mode(model):
            return hook.read_outputs(model(**inputs), batch["attention_mask"])

    before, reference = run_model(), Reference(model, None, needs_copy=False)
    build_trainer(model, tmp_path, [KLToOriginal(cached=cached)], {}, learning_rate=0.1).train()
    current, original = run_model(), reference(batch)
    assert not torch.allclose(current.logits, before.logits, atol=1e-2)
    torch.testing.assert_close(original.logits, before.logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(original.embedding, before.embedding, atol=1e-6, rtol=1e-5)
    assert not original.logits.requires_grad and not original.embedding.requires_grad


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_reference_restores_every_mode(bert: Path, strategy: str) -> None:
    model = build_probed_model(bert, strategy, dropout=0.5).train()
    next(iter(model.modules())).training = False
    modes = [module.training for module in model.modules()]
    reference, batch = Reference(model, None, needs_copy=True), stack_rows(8)
    first, second = reference(batch), reference(batch)
    assert torch.equal(first.logits, second.logits), "no dropout in the reference"
    assert [module.training for module in model.modules()] == modes
    if strategy == "full":
        assert reference.model is not model
        assert not any(p.requires_grad for p in reference.model.parameters())


def test_refuses_an_adapter_that_changes_the_model_before_training(
    bert: Path, tmp_path: Path
) -> None:
    model: Any = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    config = LoraConfig(
        r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False
    )
    trainer = build_trainer(get_peft_model(model, config), tmp_path, [KLToOriginal()], {})
    with pytest.raises(RecipeError, match="differs from its reference before training"):
        trainer.train()


def test_refuses_kl_on_an_untrained_head(bert: Path, tmp_path: Path) -> None:
    model = model_of(bert, "lora", "mean")
    trainer = build_trainer(model, tmp_path, [KLToOriginal(on="probe")], {})
    with pytest.raises(RecipeError, match="was never trained"):
        trainer.train()


def test_given_reference_pulls_the_model(bert: Path, tmp_path: Path) -> None:
    model, other = build_probed_model(bert, "lora"), build_probed_model(bert, "full")
    perturb(other, 0.05)
    batch = stack_rows(24)
    inputs = {k: v for k, v in batch.items() if k != "labels"}

    def compute_distance() -> float:
        embeddings = []
        for side in (model, other):
            hook = EmbeddingHook(side)
            with torch.no_grad(), eval_mode(side):
                outputs = hook.read_outputs(side(**inputs), batch["attention_mask"])
            embeddings.append(outputs.embedding)
            hook.remove()
        return float((embeddings[0] - embeddings[1]).norm())

    before = compute_distance()
    build_trainer(
        model, tmp_path, [KLToOriginal(50.0, "features")], {"reference": other},
        learning_rate=0.01, num_train_epochs=9, optim="adamw_torch",
    ).train()  # fmt: skip
    assert compute_distance() < 0.9 * before


def test_general_rows_come_in_the_exact_ratio_without_labels(bert: Path, tmp_path: Path) -> None:
    counts: list[tuple[int, int]] = []
    trainer = build_trainer(
        build_probed_model(bert, "lora"), tmp_path, [build_term("general")],
        {"general_dataset": UnlabelledRows(), "general_ratio": 0.3}, num_train_epochs=2,
    )  # fmt: skip

    def watch(step: Step, value: torch.Tensor) -> None:
        general = step.batch["general"]
        assert (step.batch["labels"][general] == -100).all() and not step.counts[general].any()
        assert int(step.target_rows) == 8, "the step's rows are the target's"
        counts.append((int((~general).sum()), int(general.sum())))

    watch_losses(trainer, watch)
    trainer.train()
    assert [target for target, _ in counts] == [8] * 6
    assert sum(general for _, general in counts) == int(0.3 * 48)
    assert {general for _, general in counts} == {2, 3}


def test_labelled_general_rows_change_training(bert: Path, tmp_path: Path) -> None:
    results = []
    for general in (None, Rows(9)):
        model = build_probed_model(bert, "full")
        build_trainer(model, tmp_path, [], {"general_dataset": general}).train()
        results.append(weights(model))
    assert any(not torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_resumed_training_has_the_same_original(bert: Path, tmp_path: Path) -> None:
    def build(folder: str, **more: Any) -> Any:
        terms = [build_term("relational"), build_term("features")]
        return build_trainer(
            build_probed_model(bert, "lora"), tmp_path / folder, terms, {},
            num_train_epochs=2, optim="adamw_torch", learning_rate=0.02, **more,
        )  # fmt: skip

    whole, resumed = build("whole"), build("parts")
    whole.train()
    build("parts", save_strategy="steps", save_steps=2).train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for key, value in weights(whole.model).items():
        assert torch.equal(value, weights(resumed.model)[key]), key


def test_spread_is_the_same_cached_or_not(bert: Path, tmp_path: Path) -> None:
    spreads = []
    for cached in (True, False):
        term = KLToOriginal(0.5, "features", inputs="both", cached=cached)
        trainer = build_trainer(
            build_probed_model(bert, "lora"), tmp_path, [term],
            {"general_dataset": UnlabelledRows(40)}, data=Rows(300), max_steps=1,
        )  # fmt: skip
        trainer.train()
        spreads.append(get_original(trainer).spread)
    torch.testing.assert_close(*spreads)


@pytest.mark.parametrize("inputs", ["general", "both"])
def test_refuses_a_term_on_general_rows_without_any(
    bert: Path, tmp_path: Path, inputs: str
) -> None:
    model = build_probed_model(bert, "lora")
    with pytest.raises(RecipeError, match=f"kl.inputs='{inputs}' is of general rows"):
        build_trainer(model, tmp_path, [KLToOriginal(inputs=inputs)], {}).train()
    build_trainer(model, tmp_path, [KLToOriginal(0, inputs=inputs)], {}).train()


def test_refuses_a_ratio_of_zero(bert: Path, tmp_path: Path) -> None:
    more = {"general_dataset": UnlabelledRows(), "general_ratio": 0.0}
    with pytest.raises(RecipeError, match="general_ratio=0.0 must be above 0"):
        build_trainer(build_probed_model(bert, "lora"), tmp_path, [build_term("general")], more)


def test_accepts_one_term_and_refuses_its_class(bert: Path, tmp_path: Path) -> None:
    model = build_probed_model(bert, "lora")
    assert len(build_trainer(model, tmp_path, L2SP(), {}).retention.regularizers) == 1
    with pytest.raises(RecipeError, match=r"retain holds <class .*L2SP'>, expected regularizers"):
        build_trainer(model, tmp_path, [L2SP], {})


def test_reference_is_copied_where_more_trains_than_the_adapter(bert: Path) -> None:
    """A head outside the adapter would otherwise change the reference."""
    plain: Any = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    model: Any = get_peft_model(plain, LoraConfig(r=2, target_modules=["query", "value"]))
    head = model.base_model.model.classifier.weight.requires_grad_(True)
    batch = {key: value for key, value in stack_rows(1).items() if key != "labels"}
    reference = Reference(model, None, needs_copy=True)
    before = reference(batch).logits
    with torch.no_grad():
        head.add_(1.0)
    assert torch.equal(reference(batch).logits, before)


@pytest.mark.parametrize(
    "section",
    [*(KL(on=on) for on in get_args(KL.model_fields["on"].annotation)), L2SPSection(), EWC()],
)
def test_every_section_names_its_class(section: RegularizerSection) -> None:
    module, _, name = section.implementation.partition(":")
    assert getattr(import_module(module), name).section is type(section)
    assert section.describe({}).endswith(f"{section.weight:g}") or isinstance(section, KL)
