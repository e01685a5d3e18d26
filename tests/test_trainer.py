"""Check the Trainer subclass: modes, order, accumulation, checkpoints, and a loss that broke."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.training import (
    EpochRows,
    Rows,
    assert_same_parameters,
    build_classifier,
    build_trainer,
    copy_parameters,
    load_classifier,
    stack_rows,
    watch_batches,
)
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer

from hftl.adapt.encoder_io import MaskedOutput
from hftl.errors import NumericError
from hftl.finetune.trainable import prepare
from hftl.train.checkpoint import BestWeightsCallback, list_training_modes
from hftl.train.samplers import RankBatchSampler, SeededSampler
from hftl.train.trainer import TransferTrainer

# Order


def test_order_is_a_function_of_seed_and_epoch() -> None:
    order = SeededSampler(50, seed=1)
    first = list(order)
    assert sorted(first) == list(range(50)) and list(order) == first
    order.set_epoch(1)
    assert list(order) != first
    assert list(SeededSampler(50, seed=2)) != first


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 11, 12, 13, 29])
def test_processes_share_every_batch_of_the_order_evenly(
    rows: int, processes: int, drop_last: bool
) -> None:
    order = list(SeededSampler(rows, seed=1))
    ranks = [
        RankBatchSampler(SeededSampler(rows, seed=1), 4, processes, rank, drop_last)
        for rank in range(processes)
    ]
    seen: list[int] = []
    for step, shares in enumerate(zip(*ranks, strict=True)):
        last = step == len(ranks[0]) - 1
        own = [[] if last and r.is_idle else s for r, s in zip(ranks, shares, strict=True)]
        assert all(shares), "every process makes every step"
        sizes = [len(share) for share in own]
        assert max(sizes) - min(sizes) <= 1 and (last or min(sizes) == 4)
        seen += sum(own, [])
    used = rows - rows % (4 * processes) if drop_last else rows
    assert seen == order[:used]
    assert {len(rank) for rank in ranks} == {-(-used // (4 * processes))}


@pytest.mark.parametrize(
    "workers", [{}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}]
)
def test_each_epoch_sees_every_row_once_in_another_order(
    workers: dict[str, Any], bert: Path, tmp_path: Path
) -> None:
    epochs: list[int] = []
    ids: list[list[int]] = []
    model = build_classifier(bert, "head")
    trainer = build_trainer(model, tmp_path, data=EpochRows(), num_train_epochs=3, **workers)

    def watch(batch: dict[str, torch.Tensor]) -> None:
        epochs.extend(batch["labels"].tolist())
        ids.extend(batch["input_ids"].tolist())

    watch_batches(trainer, watch)
    trainer.train()
    assert epochs == [0] * 24 + [1] * 24 + [2] * 24, "the dataset is given the epoch"
    assert all(sorted(ids[k : k + 24]) == sorted(Rows().ids.tolist()) for k in (0, 24, 48))
    assert ids[:24] != ids[24:48] != ids[48:]


# Steps


@pytest.mark.parametrize(
    ("name", "strategy", "pooling"),
    [("bert", "head", "native"), ("distilbert", "partial", "native"), ("roberta", "lora", "mean")],
)
def test_trainable_parameters_move_and_frozen_ones_do_not(
    name: str, strategy: str, pooling: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = build_classifier(tiny_model(name), strategy, pooling, dropout=0.1)
    before = copy_parameters(model)
    build_trainer(model, tmp_path, optim="adamw_torch").train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_accumulation_does_not_change_the_step(strategy: str, bert: Path, tmp_path: Path) -> None:
    """Accumulate also where the last step is short: 24 rows in steps of 16."""
    models = []
    for size, accumulated in ((16, 1), (4, 4)):
        models.append(build_classifier(bert, strategy))
        build_trainer(
            models[-1], tmp_path, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
        ).train()  # fmt: skip
    assert_same_parameters(*models, atol=1e-6)


class StockTrainer(Trainer):
    """Train as transformers does, in hftl's order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SeededSampler(24, 3)


def test_training_without_dropout_equals_the_stock_trainer(bert: Path, tmp_path: Path) -> None:
    models = [build_classifier(bert, "full") for _ in range(2)]
    for kind, model in zip((TransferTrainer, StockTrainer), models, strict=True):
        build_trainer(model, tmp_path, kind=kind, num_train_epochs=2).train()
    assert_same_parameters(*models, atol=1e-5)


def test_loss_of_the_user_is_called(bert: Path, tmp_path: Path) -> None:
    counts = []

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        counts.append(num_items_in_batch)
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    models = [build_classifier(bert, "lora") for _ in range(2)]
    build_trainer(models[0], tmp_path).train()
    build_trainer(models[1], tmp_path, more={"compute_loss_func": loss}).train()
    assert counts
    assert_same_parameters(*models, atol=1e-6)


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_loss_that_is_not_finite_stops_before_the_step(
    micro_batch: int, bert: Path, tmp_path: Path
) -> None:
    model = build_classifier(bert, "full")
    before = copy_parameters(model)
    trainer = build_trainer(model, tmp_path, gradient_accumulation_steps=2)
    compute_loss, calls = trainer.compute_loss, iter(range(9))
    trainer.compute_loss = lambda *a, **k: compute_loss(*a, **k) / (next(calls) != micro_batch)
    with pytest.raises(NumericError, match="the loss is inf at step 0"):
        trainer.train()
    assert all(torch.equal(before[k], p) for k, p in model.named_parameters())


# Modes


def set_modes(model: nn.Module) -> dict[str, bool]:
    """Set every module's mode as training does, and return the modes by path."""
    for module, trains in list_training_modes(model):
        module.training = trains
    return {name: module.training for name, module in model.named_modules()}


def test_lora_keeps_the_encoder_in_eval_and_its_own_dropout_live(bert: Path) -> None:
    loaded = load_classifier(bert)
    live = set_modes(prepare(loaded.model, "lora", lora={"lora_dropout": 0.5}, fresh=loaded.fresh))
    block = "base_model.model.bert.encoder.layer.0"
    assert not live[f"{block}.attention.self"] and not live[f"{block}.output.dropout"]
    assert not live[f"{block}.output.dense"], "the wrapped layer itself"
    assert live[f"{block}.output.dense.lora_dropout.default"]
    assert live["base_model.model.dropout"], "directly before the trainable head"
    assert not live["base_model.model.bert.embeddings.dropout"]


def test_partial_keeps_frozen_blocks_in_eval_and_full_none(bert: Path) -> None:
    loaded = load_classifier(bert)
    live = set_modes(prepare(loaded.model, "partial", blocks=1, fresh=loaded.fresh))
    assert live["bert.encoder.layer.2.output.dropout"]
    assert not live["bert.encoder.layer.1.output.dropout"]
    assert not live["bert.embeddings.dropout"]
    assert all(set_modes(build_classifier(bert, "full")).values())


def test_frozen_batch_norm_is_in_eval() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    live = set_modes(model)
    assert live["1"] and not live["0"] and not live[""]


# Evaluation


def test_evaluation_loss_is_the_mean_over_labels_not_batches(bert: Path, tmp_path: Path) -> None:
    rows = Rows()
    rows.labels[:6] = -100
    model = build_classifier(bert, "head")
    torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(0))
    trainer = build_trainer(model, tmp_path, per_device_eval_batch_size=7)
    loss = trainer.evaluate(rows)["eval_loss"]
    with torch.no_grad():
        logits = model.eval()(rows.ids, torch.ones_like(rows.ids)).logits
    assert loss == pytest.approx(F.cross_entropy(logits, rows.labels).item(), abs=1e-6)


def test_label_smoothing_is_used_in_training_alone(bert: Path, tmp_path: Path) -> None:
    losses = []
    for smoothing in (0.0, 0.5):
        model = build_classifier(bert, "head")
        torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(0))
        trainer = build_trainer(model, tmp_path, label_smoothing_factor=smoothing)
        losses += [trainer.compute_loss(model.train(mode), stack_rows(4)).item()
                   for mode in (False, True)]  # fmt: skip
    evaluated, trained, smoothed_evaluated, smoothed = losses
    assert evaluated == trained == smoothed_evaluated
    assert abs(smoothed - trained) > 1e-3


def run_evaluations(callback: BestWeightsCallback, scores: list[float]) -> tuple[nn.Module, int]:
    """Return a model whose weight is the number of the restored evaluation, and where it stopped.

    The weight is set to 1, 2, ... before each evaluation.
    """
    model, control = nn.Linear(1, 1), SimpleNamespace(should_training_stop=False)
    for epoch, score in enumerate(scores, start=1):
        nn.init.constant_(model.weight, epoch)
        state, metrics = SimpleNamespace(epoch=float(epoch)), {callback.metric: score}
        callback.on_evaluate(None, state, control, model=model, metrics=metrics)
        if control.should_training_stop:
            break
    nn.init.zeros_(model.weight)
    callback.restore(model)
    return model, epoch


def test_best_weights_are_restored_and_training_stops_after_patience() -> None:
    best = BestWeightsCallback("eval_accuracy", greater=True, patience=2)
    model, stopped = run_evaluations(best, [0.5, 0.9, 0.7, 0.9, 1.0])
    assert stopped == 4
    assert model.weight.item() == 2 and best.best == 0.9 and best.epoch == 2


def test_gain_below_the_least_is_restored_and_does_not_extend_patience() -> None:
    best = BestWeightsCallback("eval_loss", greater=False, patience=2, least=0.01)
    model, stopped = run_evaluations(best, [2.0, 1.985, 1.95, 1.94, 1.93, 1.0])
    assert stopped == 5
    assert model.weight.item() == 5 and best.best == 1.93


def test_nan_is_no_best_metric() -> None:
    with pytest.raises(NumericError, match="eval_loss is NaN"):
        run_evaluations(BestWeightsCallback("eval_loss", False, None), [float("nan")])


# Outputs of adaptation: slots and a penalty


class MaskedRows(Dataset):
    """Hold rows of five places, some of which are to be predicted; the fourth row has none."""

    def __init__(self, rows: int = 22) -> None:
        draw = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(rows, 5, 4, generator=draw)
        self.hidden = torch.rand(rows, 5, generator=draw) < 0.5
        self.hidden[:, 0], self.hidden[3] = True, False
        self.labels = torch.randint(0, 7, (rows, 5), generator=draw)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> int:
        return i

    def collate(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Collate as masked-LM batches: labels side by side, padded to the row that has most."""
        hidden = [self.labels[i][self.hidden[i]] for i in rows]
        labels = torch.full((len(rows), max(1, *map(len, hidden))), -100)
        for row, own in enumerate(hidden):
            labels[row, : len(own)] = own
        return {
            "inputs": self.inputs[rows], "flat": self.hidden[rows].flatten().nonzero()[:, 0],
            "slots": (labels != -100).flatten().nonzero()[:, 0], "labels": labels,
        }  # fmt: skip


class MaskedModel(nn.Module):
    """Predict hidden places, with a penalty for each row; `frozen` never trains."""

    def __init__(self, penalty: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(4, 7)
        self.penalty = penalty

    def forward(
        self, inputs: torch.Tensor, flat: torch.Tensor, slots: torch.Tensor
    ) -> MaskedOutput:
        logits = self.head(self.frozen(inputs))
        penalty = self.penalty * logits.square().mean((1, 2)) if self.penalty else None
        return MaskedOutput(logits=logits.flatten(0, 1)[flat], slots=slots, penalty=penalty)


def compute_masked_loss(model: MaskedModel, data: MaskedRows, rows: list[int]) -> torch.Tensor:
    """Compute the loss of one step, place by place and row by row."""
    losses, penalties = [], []
    for i in rows:
        logits = model.head(model.frozen(data.inputs[i]))
        for place in data.hidden[i].nonzero()[:, 0].tolist():
            losses.append(-logits[place].log_softmax(-1)[data.labels[i, place]])
        if data.hidden[i].any():
            penalties.append(model.penalty * logits.square().mean())
    return torch.stack(losses).mean() + torch.stack(penalties).mean()


def build_masked_trainer(folder: Path, penalty: float, **settings: Any) -> Any:
    data = MaskedRows()
    return build_trainer(
        MaskedModel(penalty), folder, more={"data_collator": data.collate}, data=data,
        remove_unused_columns=False, label_names=["labels"], logging_strategy="steps",
        logging_steps=1, **settings,
    )  # fmt: skip


@pytest.mark.parametrize(("cut", "penalty"), [((8, 1), 0.0), ((8, 1), 0.5), ((1, 8), 0.5)])
def test_slots_and_penalty_make_the_step_of_a_loop_however_it_is_cut(
    cut: tuple[int, int], penalty: float, tmp_path: Path
) -> None:
    """Compare steps of 8, 8 and 6 rows: the loss, and the gradient by plain descent."""
    trainer = build_masked_trainer(
        tmp_path, penalty, per_device_train_batch_size=cut[0], gradient_accumulation_steps=cut[1],
        learning_rate=0.5, per_device_eval_batch_size=5, prediction_loss_only=True,
    )  # fmt: skip
    trainer.train()
    model, data = MaskedModel(penalty), MaskedRows()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.5)
    order, losses = list(SeededSampler(len(data), 3)), []
    for start in (0, 8, 16):
        loss = compute_masked_loss(model, data, order[start : start + 8])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx(losses, abs=1e-6)
    assert_same_parameters(trainer.model, model, atol=1e-6)
    trainer.model.penalty = 0.5  # An evaluation leaves it out.
    model.penalty = 0.0
    expected = compute_masked_loss(model, data, list(range(len(data)))).item()
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected, abs=1e-6)


def test_plain_module_is_saved_whole_and_resumed(tmp_path: Path) -> None:
    more = {"num_train_epochs": 2, "optim": "adamw_torch", "lr_scheduler_type": "linear"}
    whole = build_masked_trainer(
        tmp_path / "whole", 0.5, save_strategy="steps", save_steps=2, **more
    )
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    names = {"frozen.weight", "frozen.bias", "head.weight", "head.bias"}
    assert load_file(checkpoint / "model.safetensors").keys() == names
    resumed = build_masked_trainer(tmp_path / "resumed", 0.5, **more)
    nn.init.constant_(resumed.model.head.weight, 9)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_parameters(resumed.model, whole.model)
