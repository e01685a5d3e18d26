"""Define the files that dealt processes share: the plan, what each reports, the error it ends with.

They are JSON and safetensors, as all that a run folder holds.
"""

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator
from safetensors.numpy import load_file, save_file

from hftl import errors
from hftl.config.recipe import Recipe
from hftl.errors import HftlError, is_out_of_memory
from hftl.finetune.context import FrozenFeatures
from hftl.pipeline.schedule import Task
from hftl.runtime.run_folder import read_part, write_text
from hftl.train.facts import ArmFile

PLAN_FILE = "plan.json"
FEATURES_FILE = "features.safetensors"


def _escape_bytes(text: str) -> str:
    """Return a text that JSON can hold, also one with a file's name that is no UTF-8."""
    return text.encode(errors="backslashreplace").decode()


Text = Annotated[str, BeforeValidator(_escape_bytes)]


class FeatureTable(BaseModel, frozen=True):
    """Name frozen features: the arm that reads them, their pooling, and the seed they differ by."""

    arm: str
    pooling: str
    seed: int | None


class Plan(BaseModel, frozen=True):
    """Hold what workers need to train a run's arms.

    Attributes:
        recipe: of the run.
        tasks: in the order in which they are taken.
        tables: the frozen features that are known already; their tensors lie beside the plan.
        sharers: processes that train on one machine at the same time.
    """

    recipe: Recipe
    tasks: Sequence[Task]
    tables: Sequence[FeatureTable]
    sharers: int


class Event(BaseModel):
    """Hold one thing that a worker reports: a task begun or done, a line, or a finished arm."""

    kind: Literal["begin", "done", "line", "arm", "end"]
    text: str = ""
    arm: ArmFile | None = None
    seconds: float = 0.0


class WorkerError(BaseModel, frozen=True):
    """Hold the error of a worker, for another process to raise.

    Attributes:
        kind: hftl's own, the system's, memory that ran out, or any other.
        name: of its class, of hftl's own of the class in `hftl.errors`.
        what: its message.
        fix: of hftl's own.
        number: of the system's.
        file: of the system's.
        text: the traceback.
    """

    kind: Literal["hftl", "system", "memory", "other"]
    name: str
    what: Text
    fix: Text = ""
    number: int | None = None
    file: Text | None = None
    text: Text

    @classmethod
    def describe(cls, error: BaseException) -> "WorkerError":
        """Return what another process needs to raise the same."""
        name, text = type(error).__name__, "".join(traceback.format_exception(error))
        if isinstance(error, HftlError):
            kinds = type(error).__mro__
            name = next(kind.__name__ for kind in kinds if kind.__module__ == errors.__name__)
            return cls(kind="hftl", name=name, what=error.what, fix=error.fix, text=text)
        if is_out_of_memory(error):
            return cls(kind="memory", name=name, what=str(error), text=text)
        if isinstance(error, OSError) and error.errno is not None:
            file = None if error.filename is None else str(error.filename)
            return cls(kind="system", name=name, what=str(error.strerror), number=error.errno,
                       file=file, text=text)  # fmt: skip
        return cls(kind="other", name=name, what=str(error), text=text)

    def rebuild(self) -> Exception:
        """Return the error; one of another library's class as a RuntimeError that names it."""
        if self.kind == "memory":
            return MemoryError(self.what)
        if self.kind == "system":
            return OSError(self.number, self.what, self.file)
        if self.kind == "other":
            return RuntimeError(f"{self.name}: {self.what}")
        kind = getattr(errors, self.name)
        # Some classes build their message from other arguments.
        error = kind.__new__(kind)
        HftlError.__init__(error, self.what, self.fix)
        return error


def write_plan(
    folder: Path, recipe: Recipe, tasks: Sequence[Task], features: Mapping[str, FrozenFeatures],
    sharers: int,
) -> None:  # fmt: skip
    """Write the plan, and the features of each arm."""
    tables: list[FeatureTable] = []
    tensors: dict[str, np.ndarray] = {}
    for arm, held in features.items():
        for (pooling, seed), known in held.items():
            if known:
                tensors |= _dump_table(len(tables), known)
                tables.append(FeatureTable(arm=arm, pooling=pooling, seed=seed))
    save_file(tensors, folder / FEATURES_FILE)
    plan = Plan(recipe=recipe, tasks=tasks, tables=tables, sharers=sharers)
    write_text(folder / PLAN_FILE, plan.model_dump_json())


def _dump_table(number: int, known: Mapping[bytes, np.ndarray]) -> dict[str, np.ndarray]:
    """Return features as tensors: the rows' hashes, the outputs of each, and all outputs."""
    keys = np.frombuffer(b"".join(known), dtype=np.uint8).reshape(len(known), -1)
    counts = np.array([len(values) for values in known.values()])
    values = np.concatenate(list(known.values()))
    return {f"{number}.keys": keys, f"{number}.counts": counts, f"{number}.values": values}


def read_plan(folder: Path) -> Plan:
    """Return the plan."""
    return read_part(folder / PLAN_FILE, Plan)


def read_features(folder: Path, plan: Plan) -> dict[str, FrozenFeatures]:
    """Return the features of each arm."""
    tensors = load_file(folder / FEATURES_FILE)
    features: dict[str, FrozenFeatures] = {}
    for number, table in enumerate(plan.tables):
        keys, counts = tensors[f"{number}.keys"], tensors[f"{number}.counts"]
        parts = np.split(tensors[f"{number}.values"], np.cumsum(counts)[:-1])
        known = {key.tobytes(): part for key, part in zip(keys, parts, strict=True)}
        features.setdefault(table.arm, {})[table.pooling, table.seed] = known
    return features


def get_event_file(folder: Path, number: int) -> Path:
    """Return the file that a worker reports to."""
    return folder / f"events-{number}.jsonl"


def write_event(folder: Path, number: int, event: Event) -> None:
    """Report something; readers see a line once it is whole."""
    with open(get_event_file(folder, number), "ab") as handle:
        handle.write(event.model_dump_json(exclude_defaults=True).encode() + b"\n")


def write_error(folder: Path, number: int, error: BaseException) -> None:
    """Leave the error that a worker ends with."""
    write_text(_get_error_file(folder, number), WorkerError.describe(error).model_dump_json())


def read_error(folder: Path, number: int) -> Exception | None:
    """Return the error that a worker has left, its traceback as a note; None without one."""
    path = _get_error_file(folder, number)
    if not path.exists():
        return None
    stored = read_part(path, WorkerError)
    error = stored.rebuild()
    error.add_note(f"in process {number}:\n{stored.text}")
    return error


def _get_error_file(folder: Path, number: int) -> Path:
    return folder / f"error-{number}.json"
