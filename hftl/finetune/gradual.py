"""Gradual unfreezing: the head, then block after block from the top, while validation improves.

Howard & Ruder 2018, arXiv:1801.06146, section 3.3. One optimizer holds all parameters from the
start; what is frozen has no gradient, so that nothing moves it.
"""

import json
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import set_seed

from hftl import processes, rundir
from hftl.record import to_json
from hftl.sections import Gradual
from hftl.train.checkpoint import KeepBest
from hftl.train.optimizer import depths
from hftl.train.trainer import TransferTrainer

PHASES = 1009
"""More than any model has; the seeds of two trainings' phases differ."""
STATE, WEIGHTS, BEST, OPTIMIZER = (
    "state.json", "weights.safetensors", "best.safetensors", "optimizer.pt",
)  # fmt: skip


def phases(model: nn.Module) -> list[set[str]]:
    """The names of the parameters that train in each phase, of those that train at all.

    First the head and what stands with it after the blocks, then one block more each time, and with
    the lowest block the embeddings.
    """
    depth_of, blocks = depths(model)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    lowest = [*range(blocks + 1, 1, -1), 0]
    return [{name for name in trains if depth_of[name] >= depth} for depth in lowest]


@dataclass(frozen=True)
class State:
    """Where a training keeps how far it has come, and what it depends on."""

    folder: Path
    reads: dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """How far gradual unfreezing has come: what a stopped training goes on from."""

    phase: int = 0
    finished: bool = False
    history: tuple[dict[str, Any], ...] = ()


def fit_gradual(
    model: nn.Module, make: Callable[..., TransferTrainer], best: KeepBest, gradual: Gradual,
    seed: int, state: State | None,
) -> tuple[TransferTrainer, list[dict[str, Any]]]:  # fmt: skip
    """Trains phase by phase and leaves the best weights of all phases in the model.

    Args:
        model: everything that may train requires a gradient; it does afterwards.
        make: makes a trainer of the model, with other arguments where they are given.
        best: keeps the best evaluation over all phases.
        gradual: the recipe's section.
        seed: of dropout and order; each phase has its own from it.
        state: where the state after each phase is kept; None: nowhere.

    Returns:
        The last trainer, and {epoch, loss, ...} of every evaluation, with its `phase`.
    """
    everything = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().cpu().clone() for name, p in everything.items()}
    parts = phases(model)
    epochs = [gradual.epochs] * len(parts)
    if gradual.final_epochs:
        parts, epochs = [*parts, parts[-1]], [*epochs, gradual.final_epochs]
    # The original is asked, and the optimizer made, while everything requires a gradient.
    first = trainer = make()
    first.ask_original()
    first.create_optimizer()
    done = _resumed(state, model, best, first.optimizer)
    for number in range(done.phase, len(parts)):
        if done.finished:
            break
        before = best.best
        for name, parameter in everything.items():
            parameter.requires_grad = name in parts[number]
        set_seed(seed * PHASES + number)
        args = copy(first.args)
        args.num_train_epochs, args.data_seed = epochs[number], seed * PHASES + number
        trainer = make(args=args, optimizers=(first.optimizer, None), retain=first.retention)
        if gradual.final_epochs and number == len(parts) - 1:
            _slow(first.optimizer, gradual.final_rate)
        best.waited = 0
        trainer.train()
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        history = [{**row, "phase": number} for row in trainer.state.log_history]
        gained = before is None or best.best != before
        done = Progress(number + 1, not gained, (*done.history, *history))
        _keep(state, everything, best, first.optimizer, done)
    for name, parameter in everything.items():
        parameter.requires_grad = True
        with torch.no_grad():
            parameter.copy_(best.weights.get(name, start[name]))
    return trainer, list(done.history)


def _slow(optimizer: Any, share: float) -> None:
    """Lowers every learning rate of what comes next."""
    for group in optimizer.param_groups:
        group["initial_lr"] = share * group.get("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"]


def _keep(
    state: State | None, everything: dict[str, nn.Parameter], best: KeepBest, optimizer: Any,
    done: Progress,
) -> None:  # fmt: skip
    """Writes the state after a phase in the place of the one before."""
    if state is None:
        return
    told = {
        "phase": done.phase, "finished": done.finished, "history": done.history,
        "best": best.best, "epoch": best.epoch,
    }  # fmt: skip

    def write() -> None:
        with rundir.commit(state.folder, state.reads) as aside:
            save_file(_plain(everything), aside / WEIGHTS)
            save_file(_plain(best.weights), aside / BEST)
            torch.save(optimizer.state_dict(), aside / OPTIMIZER)
            rundir.write_text(aside / STATE, to_json(told))

    processes.share(write)


def _resumed(state: State | None, model: nn.Module, best: KeepBest, optimizer: Any) -> Progress:
    """Puts back the state that stands, if there is one of this training."""
    if state is None or processes.share(lambda: rundir.reads(state.folder)) != state.reads:
        return Progress()
    folder = state.folder
    told = json.loads((folder / STATE).read_text("utf-8"))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(folder / WEIGHTS).items():
            parameters[name].copy_(tensor)
    best.best, best.epoch = told["best"], told["epoch"]
    best.weights = load_file(folder / BEST)
    optimizer.load_state_dict(torch.load(folder / OPTIMIZER, weights_only=True))
    return Progress(told["phase"], told["finished"], tuple(told["history"]))


def _plain(tensors: Any) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
