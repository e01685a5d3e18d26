"""Let memory run out in a step: it is tried again in smaller parts, and is the same step."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bench_of
from support.training import assert_same_parameters, build_classifier, build_trainer, stack_rows

from hftl.config.recipe import Recipe
from hftl.errors import DataWarning, ResourceError
from hftl.finetune.arm import train_arm
from hftl.retain.kl import KLToOriginal
from hftl.train.checkpoint import hold_running_statistics
from hftl.train.memory import MicroBatches, find_batch_dependence, split_batch
from hftl.train.trainer import TransferTrainer

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
]  # fmt: skip


def limit_memory(
    trainer: Any, rows: int, error: Exception = ERRORS[0], in_backward: bool = False, step: int = 1
) -> list[int]:
    """Let training of more rows at once run out of memory; return the list of sizes that ran."""
    compute_loss, sizes = trainer.compute_loss, []

    def run_out(gradient: Any = None) -> Any:
        raise error

    def compute(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(model, inputs, *args, **kwargs)
        if trainer.state.global_step >= step and len(inputs["labels"]) > rows:
            loss.register_hook(run_out) if in_backward else run_out()
        sizes.append(len(inputs["labels"]))
        return loss

    trainer.compute_loss = compute
    return sizes


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "python", "cpu"])
@pytest.mark.parametrize(("accumulated", "in_backward"), [(1, False), (2, True)])
def test_step_is_the_same_in_smaller_parts(
    error: Exception, accumulated: int, in_backward: bool, bert: Path, tmp_path: Path
) -> None:
    models = [build_classifier(bert, "full") for _ in range(2)]
    whole, scarce = (
        build_trainer(model, tmp_path, gradient_accumulation_steps=accumulated,
                      per_device_train_batch_size=8 // accumulated, num_train_epochs=2)
        for model in models
    )  # fmt: skip
    sizes = limit_memory(scarce, 2, error, in_backward)
    whole.train()
    with pytest.warns(DataWarning, match="memory ran out at step 1: .* 2 rows at most"):
        scarce.train()
    assert_same_parameters(*models, atol=1e-6)
    assert (whole.micro_batch, scarce.micro_batch) == (None, 2)
    assert sizes[0] == 8 // accumulated and set(sizes[-8:]) == {2}


def test_dropout_is_drawn_as_if_the_step_had_begun_in_parts(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [build_classifier(bert, "full", dropout=0.3) for _ in range(2)]
    failing, cut = (build_trainer(model, tmp_path) for model in models)
    limit_memory(failing, 4, step=0)
    torch.manual_seed(3)
    with pytest.warns(DataWarning):
        failing.train()
    run = MicroBatches.run

    def run_in_parts(self: MicroBatches, *args: Any) -> torch.Tensor:
        self.pieces = 2
        return run(self, *args)

    monkeypatch.setattr(MicroBatches, "run", run_in_parts)
    torch.manual_seed(3)
    cut.train()
    assert_same_parameters(*models)


def test_single_row_that_does_not_fit_ends_with_advice(bert: Path, tmp_path: Path) -> None:
    trainer = build_trainer(build_classifier(bert, "lora"), tmp_path)
    limit_memory(trainer, 0)
    with (
        pytest.warns(DataWarning),
        pytest.raises(ResourceError, match="on a single row at step 1.*gradient_checkpointing"),
    ):
        trainer.train()


def test_micro_batch_whose_rows_depend_on_each_other_is_not_cut(bert: Path, tmp_path: Path) -> None:
    model = build_classifier(bert, "full")
    model.dropout = torch.nn.BatchNorm1d(model.config.hidden_size)
    trainer = build_trainer(model, tmp_path)
    limit_memory(trainer, 2)
    message = "at step 1, .*BatchNorm normalizes by the rows.*CUDA out of memory.*freeze_batchnorm"
    with warnings.catch_warnings(), pytest.raises(ResourceError, match=message) as raised:
        warnings.simplefilter("error", DataWarning)
        trainer.train()
    assert raised.value.exit_code == 7 and trainer.micro_batch is None
    hold_running_statistics(model)
    assert find_batch_dependence(model, [KLToOriginal(0.5, anchors=8)]) is None
    reason, fix = find_batch_dependence(model, [KLToOriginal(0.5, anchors=0)]) or ("", "")
    assert reason.startswith("KLToOriginal compares the rows") and "retain.kl.anchors" in fix


def test_other_errors_are_not_taken_for_memory(bert: Path, tmp_path: Path) -> None:
    trainer = build_trainer(build_classifier(bert, "lora"), tmp_path)
    limit_memory(trainer, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        trainer.train()


def test_parts_hold_all_rows_and_share_what_is_no_tensor() -> None:
    batch = stack_rows(5) | {"interpolate_pos_encoding": True, "scale": torch.tensor(2.0)}
    parts = list(split_batch(batch, 4))
    assert [len(part["labels"]) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([p["input_ids"] for p in parts]), batch["input_ids"])
    assert all(part["interpolate_pos_encoding"] and part["scale"] == 2 for part in parts)


def test_arm_records_its_parts(
    recipe_tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_loss = TransferTrainer.compute_loss

    def compute(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and len(inputs["labels"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(TransferTrainer, "compute_loss", compute)
    training = recipe_tree["finetune"]["training"] | {"max_steps": 2}
    finetune = recipe_tree["finetune"] | {"training": training}
    recipe = Recipe.parse(recipe_tree | {"finetune": finetune})
    with pytest.warns(DataWarning, match="memory ran out"):
        output = train_arm(bench_of(recipe), recipe.finetune, 0, compared=False)
    assert output.facts.micro_batch == 4
