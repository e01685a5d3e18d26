"""Check regularizers in the trainer: what they add, what they leave, and how a step is cut."""

from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.training import (
    EpochRows,
    GeneralRows,
    Rows,
    UnlabelledRows,
    assert_same_parameters,
    assert_same_step,
    build_classifier,
    build_probed_model,
    build_trainer,
    perturb,
    run_first_step,
    stack_rows,
    watch_losses,
)
from transformers import AutoModelForSequenceClassification

from hftl.config.retain import EWC, KL, RegularizerSection
from hftl.config.retain import L2SP as L2SPSection
from hftl.errors import RecipeError
from hftl.retain.kl import KLToOriginal
from hftl.retain.original import EmbeddingHook, Original, eval_mode
from hftl.retain.regularizer import Step, TrainingStart
from hftl.retain.weights import L2SP
from hftl.train.facts import TrainingFacts

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


def read_outputs(model: Any, rows: int = 8) -> Any:
    """Return a model's outputs of the first rows, in eval mode."""
    hook, batch = EmbeddingHook(model), stack_rows(rows, labels=False)
    with torch.no_grad(), eval_mode(model):
        outputs = hook.read_outputs(model(**batch), batch["attention_mask"])
    hook.remove()
    return outputs


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("probe", "full"), ("relational", "lora"), ("features", "lora"), ("general", "lora"),
     ("both", "full")],
)  # fmt: skip
def test_step_may_be_cut_into_batches(bert: Path, tmp_path: Path, name: str, strategy: str) -> None:
    steps = []
    for batch, accumulated in ((8, 1), (2, 4)):
        # Away from the original, where a term has a gradient.
        more = {"reference": perturb(build_probed_model(bert, "full"), 0.003)}
        if name in ("general", "both"):
            more["general_dataset"] = UnlabelledRows()
        trainer = build_trainer(
            build_probed_model(bert, strategy), tmp_path, [build_term(name)], more,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
        )  # fmt: skip
        steps.append(run_first_step(trainer))
    assert_same_step(*steps)


@pytest.mark.parametrize(
    ("name", "strategy"), [("probe", "partial"), ("relational", "full"), ("features", "lora")]
)
def test_cached_outputs_equal_computed_ones(
    bert: Path, tmp_path: Path, name: str, strategy: str
) -> None:
    models = []
    for cached in (True, False):
        models.append(build_probed_model(bert, strategy))
        terms = [build_term(name, cached=cached)]
        trainer = build_trainer(models[-1], tmp_path, terms, num_train_epochs=2)
        trainer.train()
        assert (get_original(trainer).original is None) == cached
    assert_same_parameters(*models, atol=1e-5, rtol=1e-4)


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


def test_rows_that_vary_are_not_cached(bert: Path, tmp_path: Path) -> None:
    class VaryingRows(EpochRows):
        def __getitem__(self, i: int) -> dict[str, Any]:
            row = super().__getitem__(i)
            return {**row, "input_ids": row["input_ids"].roll(self.epoch), "labels": self.labels[i]}

    model = build_probed_model(bert, "lora")
    trainer = build_trainer(model, tmp_path, [KLToOriginal(cached=True)], data=VaryingRows())
    with pytest.raises(RecipeError, match="differ from epoch to epoch"):
        trainer.train()
    trainer = build_trainer(model, tmp_path, [KLToOriginal()], data=VaryingRows(), max_steps=1)
    trainer.train()
    assert get_original(trainer).original is not None


def test_weight_zero_equals_no_term_bit_for_bit(bert: Path, tmp_path: Path) -> None:
    models = []
    for terms in ([], [KLToOriginal(0.0)], [KLToOriginal(0.5)]):
        torch.manual_seed(0)
        models.append(build_classifier(bert, "full", "mean", dropout=0.2))
        build_trainer(models[-1], tmp_path, terms, num_train_epochs=2).train()
    without, zero, weighted = models
    assert_same_parameters(zero, without)
    pairs = zip(without.parameters(), weighted.parameters(), strict=True)
    assert any(not torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    ("name", "strategy", "dropout"),
    [("probe", "full", 0.0), ("relational", "lora", 0.0), ("features", "full", 0.3),
     ("features", "lora", 0.3)],
)  # fmt: skip
def test_term_is_zero_at_the_original_without_dropout(
    bert: Path, tmp_path: Path, name: str, strategy: str, dropout: float
) -> None:
    """Train at a rate of 0. Under LoRA everything that has dropout is frozen, so in eval mode."""
    model = build_probed_model(bert, strategy, dropout=dropout)
    trainer = build_trainer(model, tmp_path, [build_term(name)], learning_rate=0.0)
    values: list[float] = []
    watch_losses(trainer, lambda step, value: values.append(float(value)))
    trainer.train()
    assert len(values) == 3
    if dropout and strategy == "full":
        assert min(values) > 1e-4
    else:
        assert max(map(abs, values)) < 1e-5


@pytest.mark.parametrize(("pooling", "cached"), [("native", True), ("mean", False)])
def test_reference_with_adapter_off_is_the_probed_model(
    bert: Path, tmp_path: Path, pooling: str, cached: bool
) -> None:
    model = build_probed_model(bert, "lora", pooling)
    before, reference = read_outputs(model), Original(model, None, needs_copy=False)
    build_trainer(model, tmp_path, [KLToOriginal(cached=cached)], learning_rate=0.1).train()
    current, original = read_outputs(model), reference(stack_rows(8))
    assert not torch.allclose(current.logits, before.logits, atol=1e-2)
    torch.testing.assert_close(original.logits, before.logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(original.embedding, before.embedding, atol=1e-6, rtol=1e-5)
    assert not original.logits.requires_grad and not original.embedding.requires_grad


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_reference_restores_every_mode(bert: Path, strategy: str) -> None:
    model = build_probed_model(bert, strategy, dropout=0.5).train()
    next(iter(model.modules())).training = False
    modes = [module.training for module in model.modules()]
    reference, batch = Original(model, None, needs_copy=True), stack_rows(8)
    first, second = reference(batch), reference(batch)
    assert torch.equal(first.logits, second.logits), "no dropout in the reference"
    assert [module.training for module in model.modules()] == modes
    if strategy == "full":
        assert reference.model is not model
        assert not any(p.requires_grad for p in reference.model.parameters())


def test_reference_is_copied_where_more_trains_than_the_adapter(bert: Path) -> None:
    """Train a head outside the adapter, which would otherwise change the reference."""
    plain: Any = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    model: Any = get_peft_model(plain, LoraConfig(r=2, target_modules=["query", "value"]))
    head = model.base_model.model.classifier.weight.requires_grad_(True)
    batch = stack_rows(1, labels=False)
    reference = Original(model, None, needs_copy=True)
    before = reference(batch).logits
    with torch.no_grad():
        head.add_(1.0)
    assert torch.equal(reference(batch).logits, before)


def test_refuses_an_adapter_that_changes_the_model_before_training(
    bert: Path, tmp_path: Path
) -> None:
    model: Any = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    config = LoraConfig(
        r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False
    )
    trainer = build_trainer(get_peft_model(model, config), tmp_path, [KLToOriginal()])
    with pytest.raises(RecipeError, match="differs from its reference before training"):
        trainer.train()


def test_refuses_kl_on_an_untrained_head(bert: Path, tmp_path: Path) -> None:
    model = build_classifier(bert, "lora", "mean")
    with pytest.raises(RecipeError, match="was never trained"):
        build_trainer(model, tmp_path, [KLToOriginal(on="probe")]).train()


def test_given_reference_pulls_the_model(bert: Path, tmp_path: Path) -> None:
    model = build_probed_model(bert, "lora")
    reference = perturb(build_probed_model(bert, "full"), 0.05)

    def measure_distance() -> float:
        first, second = (read_outputs(side, 24).embedding for side in (model, reference))
        return float((first - second).norm())

    before = measure_distance()
    build_trainer(
        model, tmp_path, [KLToOriginal(50.0, "features")], {"reference": reference},
        learning_rate=0.01, num_train_epochs=9, optim="adamw_torch",
    ).train()  # fmt: skip
    assert measure_distance() < 0.9 * before


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


def test_resumed_training_has_the_same_original(bert: Path, tmp_path: Path) -> None:
    def build(**more: Any) -> Any:
        terms = [build_term("relational"), build_term("features")]
        return build_trainer(
            build_probed_model(bert, "lora"), tmp_path, terms,
            num_train_epochs=2, optim="adamw_torch", learning_rate=0.02, **more,
        )  # fmt: skip

    whole, resumed = build(save_strategy="steps", save_steps=2), build()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_parameters(resumed.model, whole.model)


@pytest.mark.parametrize("inputs", ["general", "both"])
def test_refuses_a_term_on_general_rows_without_any(
    bert: Path, tmp_path: Path, inputs: str
) -> None:
    model = build_probed_model(bert, "lora")
    with pytest.raises(RecipeError, match=f"kl.inputs='{inputs}' is of general rows"):
        build_trainer(model, tmp_path, [KLToOriginal(inputs=inputs)]).train()
    build_trainer(model, tmp_path, [KLToOriginal(0, inputs=inputs)], max_steps=1).train()


def test_refuses_what_is_no_regularizer_or_ratio(bert: Path, tmp_path: Path) -> None:
    model = build_probed_model(bert, "lora")
    assert len(build_trainer(model, tmp_path, L2SP()).retention.regularizers) == 1
    with pytest.raises(RecipeError, match=r"retain holds <class .*L2SP'>, expected regularizers"):
        build_trainer(model, tmp_path, [L2SP])
    more = {"general_dataset": GeneralRows(), "general_ratio": 0.0}
    with pytest.raises(RecipeError, match="general_ratio=0.0 must be above 0"):
        build_trainer(model, tmp_path, [build_term("general")], more)


class HeadDecay:
    """Penalize the head's weights, as a user's own script may: no class of hftl."""

    def prepare(self, start: TrainingStart) -> None:
        self.has_rows = start.rows.total == len(Rows())

    def loss(self, step: Step) -> torch.Tensor:
        parts = [p.square().sum() for p in step.model.head.parameters()]
        return 0.1 * torch.stack(parts).sum() * step.share


def test_takes_a_users_own_term(bert: Path, tmp_path: Path) -> None:
    own, plain = HeadDecay(), build_trainer(build_probed_model(bert, "full"), tmp_path)
    steps = [
        run_first_step(build_trainer(build_probed_model(bert, "full"), tmp_path, term))
        for term in (own, L2SP(0.0, head=0.2))
    ]
    assert own.has_rows
    assert_same_step(*steps)
    assert steps[0][0] > run_first_step(plain)[0] + 1e-3


@pytest.mark.parametrize(
    ("returned", "kind"),
    [
        (None, "None"), ("0.1", "'0.1'"), (True, "True"), ([0.1], r"\[0.1\]"),
        (torch.ones(8), r"a tensor of shape \[8\]"), (torch.ones(1), r"a tensor of shape \[1\]"),
    ],
    ids=["None", "text", "bool", "list", "vector", "one element"],
)  # fmt: skip
def test_names_a_users_term_that_returns_no_number(
    returned: Any, kind: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeadDecay, "loss", lambda self, step: returned)
    trainer = build_trainer(build_probed_model(bert, "head"), tmp_path, [L2SP(), HeadDecay()])
    with pytest.raises(RecipeError, match=f"HeadDecay.loss returned {kind}, expected a scalar"):
        trainer.train()


def test_takes_a_number_and_no_term_at_all(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeadDecay, "loss", lambda self, step: 0.25)
    losses = [
        run_first_step(build_trainer(build_probed_model(bert, "head"), tmp_path, terms))[0]
        for terms in (None, [], HeadDecay())
    ]
    assert losses[0] == losses[1] == pytest.approx(losses[2] - 0.25)


@pytest.mark.parametrize("kind", [KLToOriginal, L2SP])
def test_refuses_a_key_that_is_given_twice(kind: Any) -> None:
    with pytest.raises(
        RecipeError, match=f"{kind.__name__}: weight is given twice, as 0.3 and 0.5. Give it once"
    ):
        kind(0.3, weight=0.5)


@pytest.mark.parametrize(
    "section",
    [*(KL(on=on) for on in get_args(KL.model_fields["on"].annotation)), L2SPSection(), EWC()],
)
def test_every_section_names_its_class(section: RegularizerSection) -> None:
    module, _, name = section.implementation.partition(":")
    assert getattr(import_module(module), name).section is type(section)
    clause = section.describe(TrainingFacts())
    assert clause.endswith(f"{section.weight:g}") or isinstance(section, KL)
