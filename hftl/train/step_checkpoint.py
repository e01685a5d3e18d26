"""Write checkpoints of a training between two steps, and continue from the newest that is whole.

A checkpoint is a folder `step-N`, written aside, hashed into its manifest, flushed and renamed. It
holds all that the next step depends on, in safetensors and JSON: what trains, the optimizer, the
schedule, random states of every process, losses since the last log, and what callbacks hold.
"""

import json
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from hftl.errors import DataWarning, RunFolderError
from hftl.runtime import distributed, run_folder, watchdog
from hftl.runtime.interruption import SignalFlag, raise_interruption
from hftl.runtime.run_folder import hash_file
from hftl.train import hf_compat
from hftl.train.checkpoint import StatefulCallback, iterate_trainable
from hftl.train.random_state import collect_random_state, restore_random_state

WEIGHTS_FILE, OPTIMIZER_FILE, CALLBACKS_FILE, RANDOM_FILE = (
    "weights.safetensors", "optimizer.safetensors", "callbacks.safetensors", "random.safetensors",
)  # fmt: skip
STATE_FILE, KEY_FILE = "state.json", "inputs.json"
QUARANTINE = "quarantine-"
UNCOMPARED_KEYS = ("asked",)
"""Keys of what a training depends on that name its place in a recipe, and change no step."""
MAX_CHECKPOINTS = 2
MIN_SECONDS = 30.0
"""Seconds between two checkpoints, at least: what takes less starts over."""
COST_SHARE = 0.025
"""The share of a training's time that writing may take."""
WRITE_SPEED = 2e8
"""Bytes a second that are expected to be hashed and flushed, before one was written."""
PARAMETER_COPIES = 4
"""Of what trains: weights, two moments, and the best weights."""
WRITABLE_STATE = (Tensor, int, float, bool, str, type(None))


@dataclass(frozen=True)
class CheckpointSpec:
    """Say where the checkpoints of a training are, and all that the training depends on.

    `every` are steps after which one is written beside those that time asks for; 0: none.
    """

    folder: Path
    cache_key: Mapping[str, object]
    every: int = 0

    def nest(self, name: str, **more: JsonValue) -> "CheckpointSpec":
        """Return those of a part of the training, which depends on more."""
        return CheckpointSpec(self.folder / name, {**self.cache_key, **more}, self.every)


class Rhythm:
    """Say when the next checkpoint of a training is due, by what the last one took.

    Args:
        model: what trains of it, whose size decides before one was written.
    """

    def __init__(self, model: nn.Module) -> None:
        size = sum(tensor.nbytes for _, tensor in iterate_trainable(model))
        self.interval = 0.0
        """Seconds from one checkpoint to the next; infinite where none can be written."""
        self.note_written(PARAMETER_COPIES * size / WRITE_SPEED)

    @property
    def is_due(self) -> bool:
        """Return whether the time has come."""
        return time.monotonic() - self._written >= self.interval

    def note_written(self, seconds: float) -> None:
        """Wait anew, by the seconds that a checkpoint has taken."""
        self._written = time.monotonic()
        self.interval = max(MIN_SECONDS, seconds / COST_SHARE)


class CheckpointWriter:
    """Write a trainer's checkpoints, when time or a signal asks for one on any process.

    Collective: every process makes one. `last` is the newest whole checkpoint of before.
    """

    def __init__(self, spec: CheckpointSpec) -> None:
        self.spec = spec
        self.last = distributed.broadcast_from_main(
            lambda: find_checkpoint(spec.folder, spec.cache_key)
        )
        self.flag = SignalFlag()
        self.request = 0.0
        """The greatest request of all processes in this step: 0 nothing, 1 a checkpoint, above it a
        checkpoint and the end by that signal."""
        self._visited = -1
        self.rhythm: Rhythm | None = None
        """It begins with the first step."""

    def compute_request(self, step: int, model: nn.Module) -> float:
        """Return the request of this process after a step; see `request`."""
        self.rhythm = self.rhythm or Rhythm(model)
        if self.flag.number:
            return float(self.flag.number)
        return float(self.rhythm.is_due or (self.spec.every > 0 and step % self.spec.every == 0))

    def agree(self, step: int, model: nn.Module) -> None:
        """Set `request`, before the optimizer's step. Collective."""
        self.request = distributed.reduce_max(self.compute_request(step, model))

    def visit(self, trainer: Trainer) -> None:
        """Write a checkpoint if one was asked for, and end by a signal; between two steps.

        The Trainer comes here after each step, and again at the end of an epoch. There it has
        evaluated only the second time, and would not do so again.
        """
        state = trainer.state
        is_second = state.global_step == self._visited
        self._visited = state.global_step
        ends_epoch = state.epoch is not None and state.epoch == int(state.epoch)
        if trainer.control.should_training_stop or (ends_epoch and not is_second):
            return
        request, self.request = self.request, 0.0
        if request:
            self._write(trainer)
        if request > 1:
            raise_interruption(int(request))

    def end(self) -> None:
        """End by a signal that came after the last step. Collective."""
        number = distributed.reduce_max(float(self.flag.number))
        if number:
            raise_interruption(int(number))

    def _write(self, trainer: Trainer) -> None:
        """Write a checkpoint, then remove all but the newest. Collective."""
        started = time.monotonic()
        processes = distributed.gather_values(
            (collect_random_state(trainer.args.device), hf_compat.get_logged_loss(trainer))
        )
        folder = self.spec.folder / f"step-{trainer.state.global_step}"

        def commit() -> bool:
            if not is_writable(trainer.optimizer):
                return False
            with commit_checkpoint(folder, self.spec.cache_key) as aside:
                write_training_state(aside, trainer, processes)
            remove_older(self.spec.folder)
            return True

        with watchdog.suspend_watch():
            is_written = distributed.broadcast_from_main(commit)
        assert self.rhythm is not None
        self.rhythm.note_written(time.monotonic() - started if is_written else math.inf)


@contextmanager
def commit_checkpoint(folder: Path, cache_key: Mapping[str, object]) -> Iterator[Path]:
    """Yield a folder to write into, which is then `folder`; after an error nothing of it is left.

    Args:
        folder: of the checkpoint.
        cache_key: all that the training depends on.
    """
    with run_folder.commit_stage(folder, {}) as aside:
        # A file beside the manifest, whose hash is in it: no damage looks like a change.
        run_folder.write_text(aside / KEY_FILE, json.dumps(dict(cache_key), sort_keys=True))
        yield aside


def find_checkpoint(folder: Path, cache_key: Mapping[str, object]) -> Path | None:
    """Return the newest whole checkpoint of a training; None where there is none.

    Damaged ones are set aside, those of another training are removed, both with a warning.
    """
    now = json.loads(json.dumps(dict(cache_key)))
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover)
    for path in sorted(folder.glob("step-*"), key=get_step, reverse=True):
        try:
            run_folder.read_stage_inputs(path)
            stored = json.loads((path / KEY_FILE).read_text("utf-8"))
        except (RunFolderError, OSError) as error:
            _set_aside(path, error.what if isinstance(error, RunFolderError) else str(error))
            continue
        changed = _list_changed_keys(stored, now)
        if not changed:
            return path
        shutil.rmtree(path)
        warnings.warn(
            f"{path} was of another training, and is removed: this one starts over (changed: "
            f"{', '.join(changed)})",
            DataWarning,
            2,
        )
    return None


def _list_changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the keys whose values differ; of the recipe those within it."""
    keys = sorted((before.keys() | now.keys()) - {*UNCOMPARED_KEYS})
    changed = [key for key in keys if before.get(key) != now.get(key)]
    if "recipe" not in changed:
        return changed
    old, new = before.get("recipe", {}), now.get("recipe", {})
    inner = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [*inner, *(key for key in changed if key != "recipe")]


def read_cache_keys(folder: Path) -> list[dict[str, Any]]:
    """Return what each checkpoint below a folder depends on, as far as that is readable.

    `find_checkpoint` reports damage, where a checkpoint would be used.
    """
    keys = []
    for path in sorted(folder.rglob(f"step-*/{KEY_FILE}")):
        with suppress(RunFolderError, OSError):
            if run_folder.read_manifest(path.parent).files.get(KEY_FILE) == hash_file(path):
                keys.append(json.loads(path.read_text("utf-8")))
    return keys


def get_step(path: Path) -> int:
    """Return the number in a checkpoint's name."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def remove_older(folder: Path) -> None:
    """Remove all checkpoints but the newest."""
    for path in sorted(folder.glob("step-*"), key=get_step)[:-MAX_CHECKPOINTS]:
        shutil.rmtree(path)


def _set_aside(path: Path, reason: str) -> None:
    """Rename a damaged checkpoint, and say so."""
    place = path.with_name(f"{QUARANTINE}{path.name}")
    if place.exists():
        shutil.rmtree(place)
    path.rename(place)
    warnings.warn(f"{reason}: an earlier state is used, this one is {place}", DataWarning, 2)


def write_training_state(folder: Path, trainer: Any, processes: list[Any]) -> None:
    """Write all that a training's next step depends on.

    Args:
        folder: of the checkpoint.
        trainer: a `TransferTrainer` between two steps.
        processes: random state and losses since the last log of every process.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    write_tensors(folder / WEIGHTS_FILE, dict(iterate_trainable(model)))
    optimizer = write_optimizer(folder, trainer.optimizer)
    random, losses = zip(*processes, strict=True)
    write_tensors(
        folder / RANDOM_FILE,
        {f"{rank}.{key}": t for rank, (tensors, _) in enumerate(random)
         for key, t in tensors.items()},
    )  # fmt: skip
    values, tensors = {}, {}
    for number, callback in enumerate(_list_callbacks(trainer)):
        values[str(number)], held = callback.dump_state()
        tensors |= {f"{number}.{name}": tensor for name, tensor in held.items()}
    write_tensors(folder / CALLBACKS_FILE, tensors)
    scaler = trainer.accelerator.scaler
    state = {
        "optimizer": optimizer,
        "schedule": trainer.lr_scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "random": [numbers for _, numbers in random],
        "losses": losses,
        "pieces": trainer.pieces,
        "callbacks": values,
    }
    run_folder.write_text(folder / STATE_FILE, json.dumps(state))
    trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))


def is_step_checkpoint(folder: str | Path) -> bool:
    """Return whether a folder is such a checkpoint, and none of transformers' own."""
    return (Path(folder) / KEY_FILE).exists()


def load_weights(folder: Path, trainer: Any) -> None:
    """Load what trains, and what callbacks and a `TransferTrainer` hold."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    stored = load_file(folder / WEIGHTS_FILE)
    for name, tensor in iterate_trainable(model):
        tensor.copy_(stored[name])
    state, tensors = _read_state(folder), load_file(folder / CALLBACKS_FILE)
    trainer.pieces = state["pieces"]
    for number, callback in enumerate(_list_callbacks(trainer)):
        held = {
            name.removeprefix(f"{number}."): tensor
            for name, tensor in tensors.items() if name.startswith(f"{number}.")
        }  # fmt: skip
        callback.load_state(state["callbacks"][str(number)], held)


def load_optimizer_and_schedule(folder: Path, trainer: Any) -> None:
    """Load optimizer, schedule and the scale of float16's gradients."""
    state = _read_state(folder)
    load_optimizer(folder, trainer.optimizer, state["optimizer"])
    trainer.lr_scheduler.load_state_dict(state["schedule"])
    if state["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])


def load_random_state(folder: Path, trainer: Trainer) -> None:
    """Load this process's random states, and its losses since the last log."""
    state, rank = _read_state(folder), distributed.get_rank()
    tensors = {
        name.removeprefix(f"{rank}."): tensor
        for name, tensor in load_file(folder / RANDOM_FILE).items() if name.startswith(f"{rank}.")
    }  # fmt: skip
    restore_random_state(tensors, state["random"][rank], trainer.args.device)
    hf_compat.set_logged_loss(trainer, *state["losses"][rank])


def write_optimizer(folder: Path, optimizer: Any) -> dict[str, Any]:
    """Write the tensors of an optimizer's state, and return the rest for JSON."""
    state = optimizer.state_dict()
    values = {
        f"{parameter}.{key}": value
        for parameter, held in state["state"].items() for key, value in held.items()
    }  # fmt: skip
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in values.items() if name not in tensors}
    write_tensors(folder / OPTIMIZER_FILE, tensors)
    return {"numbers": numbers, "groups": state["param_groups"]}


def load_optimizer(folder: Path, optimizer: Any, rest: Mapping[str, Any]) -> None:
    """Load what `write_optimizer` wrote.

    Args:
        folder: of the checkpoint.
        optimizer: over the same parameters.
        rest: what it returned, as read from JSON.
    """
    state: dict[int, dict[str, Any]] = {}
    for name, value in (load_file(folder / OPTIMIZER_FILE) | dict(rest["numbers"])).items():
        parameter, key = name.split(".", 1)
        state.setdefault(int(parameter), {})[key] = value
    groups = [
        {key: tuple(v) if isinstance(own.get(key), tuple) else v for key, v in group.items()}
        for group, own in zip(rest["groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def is_writable(optimizer: Any) -> bool:
    """Return whether an optimizer's state is tensors and numbers; warn where it is more.

    GaLore's state holds projections.
    """
    for held in optimizer.state_dict()["state"].values():
        for key, value in held.items():
            if type(value) not in WRITABLE_STATE:
                warnings.warn(
                    f"the optimizer's state holds {key}, a {type(value).__name__}, which no "
                    "checkpoint can hold: after a stop this training starts over",
                    DataWarning,
                    2,
                )
                return False
    return True


def _read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))


def _list_callbacks(trainer: Trainer) -> list[StatefulCallback]:
    callbacks = trainer.callback_handler.callbacks
    return [callback for callback in callbacks if isinstance(callback, StatefulCallback)]
