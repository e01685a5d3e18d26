"""The Trainer subclass: modes, order, accumulation, and a loss that broke."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from hftl.adapt.encoder_io import MaskedOutput
from hftl.config.section import Source
from hftl.errors import NumericError
from hftl.finetune.trainable import prepare
from hftl.models.heads import build_model
from hftl.models.source import find_source
from hftl.train.checkpoint import BestWeightsCallback
from hftl.train.frozen_eval import list_training_modes
from hftl.train.loss import MANY_CLASSES, compute_summed_loss, count_labels, has_labels, ignore_rows
from hftl.train.samplers import RankBatchSampler, SeededSampler
from hftl.train.trainer import TransferTrainer

ROWS = 24


class Rows(Dataset):
    """Random token ids with labels."""

    def __init__(self, rows: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 30, (rows, 6), generator=generator)
        self.labels = torch.randint(0, 3, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(6), "labels": self.labels[i]}


def model_of(folder: Path, strategy: str, pooling: str = "native", dropout: float = 0.0) -> Any:
    source = find_source(Source(model=str(folder)))
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout"):
        if hasattr(source.config, name):
            setattr(source.config, name, dropout)
    found = build_model(source, "classification", pooling, 3, ["a", "b", "c"], seed=0)
    model = prepare(found.model, strategy, fresh=found.fresh)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


def trainer_of(
    model: Any,
    folder: Path,
    kind: type[Trainer] = TransferTrainer,
    data: Dataset | None = None,
    **more: Any,
) -> Any:
    settings = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "seed": 3, "num_train_epochs": 1, "learning_rate": 1e-2,
        "per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "max_grad_norm": 0,
        "logging_strategy": "no", "optim": "sgd",
    } | more  # fmt: skip
    return kind(model=model, args=TrainingArguments(**settings), train_dataset=data or Rows())


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_order_is_a_function_of_seed_and_epoch() -> None:
    order = SeededSampler(50, seed=1)
    first = list(order)
    assert sorted(first) == list(range(50)) and list(order) == first
    order.set_epoch(1)
    assert list(order) != first
    assert list(SeededSampler(50, seed=2)) != first


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 16, 29])
def test_ranks_share_every_batch_of_the_order_evenly(
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
    kept = rows - rows % (4 * processes) if drop_last else rows
    assert seen == order[:kept]
    assert {len(rank) for rank in ranks} == {-(-kept // (4 * processes))}


class Epochs(Rows):
    """Rows whose labels tell the epoch, as an augmentation's randomness would."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**super().__getitem__(i), "labels": torch.tensor(self.epoch)}


@pytest.mark.parametrize("workers", [{}, {"dataloader_num_workers": 1},
    {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}])  # fmt: skip
def test_the_dataset_learns_the_epoch(
    workers: dict[str, Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    seen: list[int] = []

    class Watched(TransferTrainer):
        def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> torch.Tensor:
            seen.extend(inputs["labels"].tolist())
            return super().training_step(model, inputs, *args)

    model = model_of(tiny_model(), "head")
    trainer_of(model, tmp_path, Watched, Epochs(), num_train_epochs=3, **workers).train()
    assert seen == [0] * ROWS + [1] * ROWS + [2] * ROWS


def test_each_epoch_sees_every_row_once_in_another_order(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    seen: list[list[int]] = []

    class Watched(TransferTrainer):
        def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> torch.Tensor:
            seen.append(inputs["input_ids"].tolist())
            return super().training_step(model, inputs, *args)

    trainer_of(model_of(tiny_model(), "head"), tmp_path, Watched, num_train_epochs=2).train()
    rows = Rows().ids.tolist()
    epochs = [sum(seen[:3], []), sum(seen[3:], [])]
    assert all(sorted(epoch) == sorted(rows) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("pooling", ["native", "mean"])
@pytest.mark.parametrize("strategy", ["head", "partial", "lora"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_frozen_parameters_do_not_move_and_the_others_do(
    name: str, strategy: str, pooling: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = model_of(tiny_model(name), strategy, pooling, dropout=0.1)
    before = weights(model)
    trainer_of(model, tmp_path, optim="adamw_torch").train()
    for key, parameter in model.named_parameters():
        moved = not torch.equal(before[key], parameter)
        assert moved == parameter.requires_grad, f"{key}: moved {moved}"


@pytest.mark.parametrize("strategy", ["head", "partial", "lora", "full"])
def test_accumulation_does_not_change_the_step(
    strategy: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """8x1 = 4x2 = 2x4, also where the last batch is short: 24 rows in steps of 16."""
    found = []
    for size, accumulated in ((16, 1), (8, 2), (4, 4), (1, 16)):
        model = model_of(tiny_model(), strategy)
        trainer_of(
            model, tmp_path, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
        ).train()  # fmt: skip
        found.append(weights(model))
    for other in found[1:]:
        for key, tensor in found[0].items():
            torch.testing.assert_close(other[key], tensor, atol=1e-6, rtol=0)


def test_equals_the_plain_trainer_without_dropout(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    class PlainInOurOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SeededSampler(ROWS, 3)

    found = []
    for kind in (TransferTrainer, PlainInOurOrder):
        model = model_of(tiny_model(), "full")
        trainer_of(model, tmp_path, kind, num_train_epochs=3).train()
        found.append(weights(model))
    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key], tensor, atol=1e-5, rtol=0)


def modes(model: nn.Module) -> dict[str, bool]:
    for module, live in list_training_modes(model):
        module.training = live
    return {name: module.training for name, module in model.named_modules()}


def test_lora_keeps_the_encoder_in_eval_and_its_own_dropout_live(
    tiny_model: Callable[..., Path],
) -> None:
    source = find_source(Source(model=str(tiny_model())))
    found = build_model(source, "classification", "native", 3, ["a", "b", "c"], seed=0)
    model = prepare(found.model, "lora", lora={"lora_dropout": 0.5}, fresh=found.fresh)
    live = modes(model)
    block = "base_model.model.bert.encoder.layer.0"
    assert not live[f"{block}.attention.self"] and not live[f"{block}.output.dropout"]
    assert not live[f"{block}.output.dense"], "the wrapped layer itself"
    assert live[f"{block}.output.dense.lora_dropout.default"]
    assert live["base_model.model.dropout"], "directly before the trainable head"
    assert not live["base_model.model.bert.embeddings.dropout"]


def test_partial_keeps_frozen_blocks_in_eval(tiny_model: Callable[..., Path]) -> None:
    source = find_source(Source(model=str(tiny_model())))
    found = build_model(source, "classification", "native", 3, ["a", "b", "c"], seed=0)
    live = modes(prepare(found.model, "partial", blocks=1, fresh=found.fresh))
    assert live["bert.encoder.layer.2.output.dropout"]
    assert not live["bert.encoder.layer.1.output.dropout"]
    assert not live["bert.embeddings.dropout"]


def test_full_is_all_in_train_mode(tiny_model: Callable[..., Path]) -> None:
    assert all(modes(model_of(tiny_model(), "full")).values())


def test_frozen_batch_norm_statistics_stay_put() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    live = modes(model)
    assert live["1"] and not live["0"] and not live[""]


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_a_micro_batch_that_breaks_stops_before_the_step(
    micro_batch: int, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    class Breaks(TransferTrainer):
        calls = -1

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super().compute_loss(*args, **kwargs) / (self.calls != micro_batch)

    model = model_of(tiny_model(), "full")
    before = weights(model)
    with pytest.raises(NumericError, match="the loss is inf at step 0"):
        trainer_of(model, tmp_path, Breaks, gradient_accumulation_steps=2).train()
    assert all(torch.equal(before[k], p) for k, p in model.named_parameters())


def test_a_broken_loss_stops_before_the_step(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = model_of(tiny_model(), "full")
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    before = weights(model)
    with pytest.raises(NumericError, match="the loss is nan at step 0"):
        trainer_of(model, tmp_path).train()
    assert all(torch.equal(before[k], p) or p.isnan().any() for k, p in model.named_parameters())


def test_summed_loss_is_the_sum_over_rows() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, -100, 2])
    kept = labels >= 0
    by_hand = -F.log_softmax(logits, -1)[kept, labels[kept]].sum()
    torch.testing.assert_close(compute_summed_loss(logits, labels), by_hand)
    targets = torch.randn(5)
    values = torch.randn(5, 1)
    torch.testing.assert_close(
        compute_summed_loss(values, targets), ((values[:, 0] - targets) ** 2).sum()
    )


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_over_a_vocabulary_the_loss_is_taken_piece_by_piece(rows: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(rows, MANY_CLASSES + 5, requires_grad=True)
    labels = torch.randint(0, MANY_CLASSES + 5, (rows,))
    labels[1::5] = -100
    found, wanted = compute_summed_loss(logits, labels), F.cross_entropy(
        logits, labels, reduction="sum", ignore_index=-100
    )  # fmt: skip
    torch.testing.assert_close(found, wanted)
    mine, theirs = (torch.autograd.grad(3 * loss, logits)[0] for loss in (found, wanted))
    torch.testing.assert_close(mine, theirs)
    narrow = logits.detach().bfloat16().requires_grad_()
    torch.testing.assert_close(
        compute_summed_loss(narrow, labels),
        F.cross_entropy(narrow.float(), labels, reduction="sum", ignore_index=-100),
    )
    with torch.no_grad():
        torch.testing.assert_close(compute_summed_loss(logits, labels), wanted)


def test_targets_without_a_number_do_not_count() -> None:
    logits = torch.randn(4, 1, requires_grad=True)
    targets = torch.tensor([0.5, torch.nan, -100.0, 2.0])
    loss = compute_summed_loss(logits, targets)
    by_hand = sum((logits[i, 0] - targets[i]) ** 2 for i in (0, 2, 3))
    torch.testing.assert_close(loss, by_hand)
    assert count_labels(targets) == 3
    loss.backward()
    assert logits.grad is not None and logits.grad[1] == 0 and logits.grad.isfinite().all()


def test_several_labels_a_row_are_each_a_yes_or_no() -> None:
    logits = torch.randn(3, 4)
    labels = torch.tensor([[0.0, 1, 1, 0], [torch.nan] * 4, [1.0, 0, 0, 0]])
    kept = logits[[0, 2]].sigmoid(), labels[[0, 2]]
    by_hand = -(kept[1] * kept[0].log() + (1 - kept[1]) * (1 - kept[0]).log()).sum()
    torch.testing.assert_close(compute_summed_loss(logits, labels), by_hand)
    assert count_labels(labels) == 8


def test_labels_of_tokens_count_one_by_one() -> None:
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, -100, 4], [0, -100, -100]])
    by_hand = -sum(logits.log_softmax(-1)[i, j, labels[i, j]] for i, j in [(0, 0), (0, 2), (1, 0)])
    torch.testing.assert_close(compute_summed_loss(logits, labels), by_hand)
    assert count_labels(labels) == 3


def test_uncounted_rows_leave_the_others_and_the_original() -> None:
    for labels in (torch.tensor([[1, 2], [0, 1]]), torch.tensor([[1.0, 2], [0, 1]])):
        empty = ignore_rows(labels, slice(1, None))
        assert count_labels(empty) == 2 and count_labels(ignore_rows(labels)) == 0
        assert torch.equal(empty[0], labels[0]) and count_labels(labels) == 4


def test_the_evaluation_loss_is_the_mean_over_elements_not_batches(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = Rows()
    rows.labels[:6] = -100
    model = model_of(tiny_model(), "head")
    torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(0))
    trainer = trainer_of(model, tmp_path, per_device_eval_batch_size=7)
    found = trainer.evaluate(rows)["eval_loss"]
    with torch.no_grad():
        logits = model.eval()(rows.ids, torch.ones_like(rows.ids)).logits
    assert found == pytest.approx(F.cross_entropy(logits, rows.labels).item(), abs=1e-6)


def test_keep_best_restores_the_best_and_stops_after_patience() -> None:
    class Control:
        should_training_stop = False

    class State:
        epoch = 0.0

    model = nn.Linear(1, 1)
    keep = BestWeightsCallback("eval_accuracy", greater=True, patience=2)
    control, state = Control(), State()
    for epoch, score in enumerate([0.5, 0.9, 0.7, 0.9], start=1):
        state.epoch = float(epoch)
        nn.init.constant_(model.weight, epoch)
        keep.on_evaluate(None, state, control, model=model, metrics={"eval_accuracy": score})
        assert control.should_training_stop == (epoch == 4)
    keep.restore(model)
    assert model.weight.item() == 2 and keep.best == 0.9 and keep.epoch == 2


def test_keep_best_refuses_nan() -> None:
    class State:
        epoch = 1.0

    keep = BestWeightsCallback("eval_loss", greater=False, patience=None)
    with pytest.raises(NumericError, match="eval_loss is NaN"):
        keep.on_evaluate(None, State(), None, model=None, metrics={"eval_loss": float("nan")})


def test_label_smoothing_is_used_in_training_alone(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    found = []
    for share in (0.0, 0.5):
        model = model_of(tiny_model(), "head")
        torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(0))
        trainer = trainer_of(model, tmp_path, label_smoothing_factor=share)
        inputs = {k: torch.stack([row[k] for row in map(Rows().__getitem__, range(4))])
                  for k in Rows()[0]}  # fmt: skip
        model.eval()
        plain = trainer.compute_loss(model, dict(inputs)).item()
        model.train()
        found.append((plain, trainer.compute_loss(model, dict(inputs)).item()))
    (plain, trained), (smoothed_plain, smoothed_trained) = found
    assert plain == trained == smoothed_plain
    assert abs(smoothed_trained - trained) > 1e-3
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 2])
    expected = F.cross_entropy(logits, labels, label_smoothing=0.5, reduction="sum")
    torch.testing.assert_close(compute_summed_loss(logits, labels, 0.5), expected)


# Outputs of adaptation: slots, a penalty, patches


class Chosen(Dataset):
    """Rows of five places, some of which are to be guessed; the fourth row has none."""

    def __init__(self, rows: int = 22) -> None:
        draw = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(rows, 5, 4, generator=draw)
        self.hidden = torch.rand(rows, 5, generator=draw) < 0.5
        self.hidden[:, 0], self.hidden[3] = True, False
        self.answers = torch.randint(0, 7, (rows, 5), generator=draw)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> int:
        return i

    def collate(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """As masked-LM batches: labels side by side, padded to the row that has most."""
        told = [self.answers[i][self.hidden[i]] for i in rows]
        labels = torch.full((len(rows), max(1, *map(len, told))), -100)
        for row, answers in enumerate(told):
            labels[row, : len(answers)] = answers
        return {
            "inputs": self.inputs[rows], "flat": self.hidden[rows].flatten().nonzero()[:, 0],
            "slots": (labels != -100).flatten().nonzero()[:, 0], "labels": labels,
        }  # fmt: skip


class Guesses(nn.Module):
    """Answers at the chosen places, each row at its own price; `frozen` never trains."""

    def __init__(self, dear: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(4, 7)
        self.dear = dear

    def forward(
        self, inputs: torch.Tensor, flat: torch.Tensor, slots: torch.Tensor
    ) -> MaskedOutput:
        every = self.head(self.frozen(inputs))
        penalty = self.dear * every.square().mean((1, 2)) if self.dear else None
        return MaskedOutput(logits=every.flatten(0, 1)[flat], slots=slots, penalty=penalty)


def by_hand(model: Guesses, data: Chosen, rows: list[int]) -> torch.Tensor:
    """The loss of one step, place by place and row by row."""
    losses, prices = [], []
    for i in rows:
        every = model.head(model.frozen(data.inputs[i]))
        for place in data.hidden[i].nonzero()[:, 0].tolist():
            losses.append(-every[place].log_softmax(-1)[data.answers[i, place]])
        if data.hidden[i].any():
            prices.append(model.dear * every.square().mean())
    return torch.stack(losses).mean() + torch.stack(prices).mean()


def guesser(folder: Path, dear: float, **more: Any) -> Any:
    data = Chosen()
    trainer = trainer_of(
        Guesses(dear), folder, data=data, remove_unused_columns=False, label_names=["labels"],
        logging_strategy="steps", logging_steps=1, **more,
    )  # fmt: skip
    trainer.data_collator = data.collate
    return trainer


@pytest.mark.parametrize("dear", [0.0, 0.5])
@pytest.mark.parametrize("cut", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_slots_and_penalty_make_the_step_of_a_loop_however_it_is_cut(
    cut: tuple[int, int], dear: float, tmp_path: Path
) -> None:
    """Steps of 8, 8 and 6 rows; loss and gradient of each, the latter by plain descent."""
    trainer = guesser(
        tmp_path, dear, per_device_train_batch_size=cut[0], gradient_accumulation_steps=cut[1],
        learning_rate=0.5,
    )  # fmt: skip
    trainer.train()
    model, data = Guesses(dear), Chosen()
    order, losses = list(SeededSampler(len(data), 3)), []
    for start in (0, 8, 16):
        loss = by_hand(model, data, order[start : start + 8])
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.head.parameters():
                parameter -= 0.5 * parameter.grad  # pyright: ignore
    told = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert told == pytest.approx(losses, abs=1e-6)
    for mine, expected in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=0)


def test_evaluation_leaves_the_penalty_out(tmp_path: Path) -> None:
    trainer = guesser(tmp_path, 0.5, per_device_eval_batch_size=5, prediction_loss_only=True)
    data, free = Chosen(), Guesses(0.0)
    found = trainer.evaluate(data)["eval_loss"]
    assert found == pytest.approx(by_hand(free, data, list(range(len(data)))).item(), abs=1e-6)


def test_the_loss_of_patches_is_masked_autoencoders(tmp_path: Path) -> None:
    """He et al. 2022: the mean over hidden patches of each one's mean squared error.

    Patches without a number, which a normalised target leaves out, count for nothing.
    """
    logits = torch.randn(3, 4, 6, requires_grad=True)
    labels = torch.randn(3, 4, 6)
    left_out = [(0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]
    for row, patch in left_out:
        labels[row, patch] = torch.nan
    each = [
        ((logits[row, patch] - labels[row, patch]) ** 2).mean()
        for row in range(3) for patch in range(4) if (row, patch) not in left_out
    ]  # fmt: skip
    expected = torch.stack(each).mean()
    assert count_labels(labels) == 7 * 6 and has_labels(labels).tolist() == [True, False, True]
    loss = compute_summed_loss(logits, labels) / count_labels(labels)
    torch.testing.assert_close(loss, expected)
    (wanted,) = torch.autograd.grad(expected, logits, retain_graph=True)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, wanted)
    assert found.isfinite().all() and not any(found[place].any() for place in left_out)
    assert count_labels(ignore_rows(labels, slice(0, 1))) == 4 * 6


def test_a_plain_module_is_saved_whole_and_taken_up(tmp_path: Path) -> None:
    more = {"num_train_epochs": 2, "optim": "adamw_torch", "lr_scheduler_type": "linear"}
    whole = guesser(tmp_path / "whole", 0.5, **more)
    whole.train()
    parts = guesser(tmp_path / "parts", 0.5, save_strategy="steps", save_steps=2, **more)
    parts.train()
    folder = tmp_path / "parts" / "checkpoint-2"
    whole_names = {"frozen.weight", "frozen.bias", "head.weight", "head.bias"}
    assert load_file(folder / "model.safetensors").keys() == whole_names
    again = guesser(tmp_path / "again", 0.5, **more)
    with torch.no_grad():
        again.model.head.weight.fill_(9)
    again.train(resume_from_checkpoint=str(folder))
    for mine, expected in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, expected)


def test_a_gain_below_the_least_does_not_help_patience_but_is_kept() -> None:
    class Control:
        should_training_stop = False

    class State:
        epoch = 0.0

    model = nn.Linear(1, 1)
    keep = BestWeightsCallback("eval_loss", greater=False, patience=2, least=0.01)
    control, state = Control(), State()
    for epoch, loss in enumerate([2.0, 1.985, 1.95, 1.94, 1.93], start=1):
        state.epoch = float(epoch)
        nn.init.constant_(model.weight, epoch)
        keep.on_evaluate(None, state, control, model=model, metrics={"eval_loss": loss})
        assert control.should_training_stop == (epoch == 5)
    nn.init.zeros_(model.weight)
    keep.restore(model)
    assert model.weight.item() == 5 and keep.best == 1.93


def test_a_loss_of_the_users_own_is_called(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    calls = []

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        calls.append(num_items_in_batch)
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    def kind(**given: Any) -> TransferTrainer:
        return TransferTrainer(**given, compute_loss_func=loss)

    found = []
    for maker in (TransferTrainer, kind):
        model = model_of(tiny_model("bert"), "lora")
        trainer_of(model, tmp_path, maker).train()  # pyright: ignore
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert calls and torch.allclose(*found, atol=1e-6)
