"""Kill, stop and cut off whole runs at moments drawn by a seed, and compare how they end.

    python -m tests.campaign --kills 100 --signals 20 --faults 50 --ranks 8

Each run is the whole pipeline of a tiny model, its checkpoints written as often as they can be. A
run that was cut off is continued by the same command. It must end with the weights, predictions,
published files and record of a run that was never stopped. Every other one is continued from
another place than it was begun at. Runs are forks of this process, which has imported everything
once; those of several processes are started by torchrun.
"""
# ruff: noqa: E402

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import yaml
from conftest import pictures, sentences, write_csv
from support.fresh_process import child
from support.tiny import save_tiny

from hftl import cli
from hftl.measure.record import Record
from hftl.pipeline import pipeline
from hftl.publish import reload_process
from hftl.train import step_checkpoint

assert pipeline.run, "forks must not import what runs need"
LIMIT_SECONDS = 30
"""In which a run must have ended after a signal."""
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
    str(Path(__file__)), "--as-rank",
]  # fmt: skip
FINAL_FILES = ("weights.safetensors", "predictions.parquet", "head.safetensors")


@dataclass
class Tally:
    """Count trials of one kind and those that went wrong."""

    name: str
    trials: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, label: str, problem: str) -> None:
        """Count a trial; an empty problem is none."""
        self.trials += 1
        if problem:
            self.wrong.append(f"{label}: {problem}")
        print(f"{self.name} {label}: {problem or 'identical'}", flush=True)


def write_recipes(folder: Path) -> dict[str, Path]:
    """Write recipes that use everything that trains, on text and on pictures."""
    train = write_csv(folder / "train.csv", ["text", "label"], sentences(90))
    general = write_csv(folder / "general.csv", ["text", "label"], sentences(60, 7))
    photos = pictures(folder / "photos", 25)
    training = {"num_train_epochs": 2, "learning_rate": 1e-3, "bf16": False,
                "per_device_train_batch_size": 8}  # fmt: skip
    scratch = {"learning_rates": [1e-3, 3e-3], "epochs_factor": 1}
    adapt = {"guard": "neighbours", "tolerance": 1, "held_out": 0.2, "training": training}
    trees = {
        "text": {
            "source": {"model": str(save_tiny("bert", folder / "bert", True))},
            "data": {"train": {"path": str(train)}, "max_length": 16,
                     "general": {"path": str(general), "label": "label"}},
            "adapt": {"objective": "mlm", "method": "lora", "pack": False, **adapt},
            "finetune": {"strategy": "lora", "pooling": "mean", "training": training},
            "retain": {"kl": {"weight": 0.3, "inputs": "both"}, "replay": {"ratio": 0.5}},
            "measure": {"seeds": [0], "scratch": scratch, "parallel": "data",
                        "arms": ["scratch", "head",
                                 {"gradual": {"retain": None}}, {"partial": {"retain": None}}]},
        },
        "image": {
            "source": {"model": str(save_tiny("vit", folder / "vit"))},
            "data": {"train": {"path": str(photos)}, "image_size": 24, "augment": "light"},
            "adapt": {"objective": "mae", "method": "full", **adapt, "guard": "off"},
            "finetune": {"strategy": "full", "training": training},
            "measure": {"seeds": [0, 1], "scratch": scratch, "parallel": "data",
                        "arms": ["scratch"]},
        },
    }  # fmt: skip
    paths = {}
    for name, tree in trees.items():
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(tree), encoding="utf-8")
    return paths


def reload_in_fork(command: list[str], **_: Any) -> Any:
    """Stand in for the fresh process of the reload check."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        pid = os.fork()
        if pid == 0:
            for descriptor, file in ((1, out), (2, err)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
            for name in [name for name in sys.modules if name.split(".")[0] == "hftl"]:
                del sys.modules[name]
            os._exit(child(os.getcwd(), None, command[2:]))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return SimpleNamespace(returncode=code, stdout=out.read_text(), stderr=err.read_text())


def run_command(recipe: Path, folder: Path, prepare: Callable[[], None]) -> None:
    """Run the command line, and end this process as it ends."""
    reload_process.subprocess = SimpleNamespace(run=reload_in_fork)  # pyright: ignore
    reload_process.WaitingReload = lambda: None  # pyright: ignore
    step_checkpoint.MIN_SECONDS, step_checkpoint.COST_SHARE = 0.0, 0.3
    prepare()
    sys.argv = ["hftl", "run", str(recipe), "--output", str(folder)]
    cli.main()


def start(recipe: Path, folder: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Start a run in a fork; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        with open(folder.with_suffix(".txt"), "ab") as screen:
            os.dup2(screen.fileno(), 1)
            os.dup2(screen.fileno(), 2)
        run_command(recipe, folder, prepare)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int, seconds: float | None = None) -> int | None:
    """Return the exit code of a process, or None where it has not ended in time."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, 0 if deadline is None else os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            return None
        time.sleep(0.005)


def hash_results(folder: Path) -> dict[str, str]:
    """Return the hashes of all that a finished run leaves."""
    files = [
        path for path in sorted(folder.rglob("*"))
        if path.is_file() and (path.name in FINAL_FILES or "encoder" in path.parts)
    ]  # fmt: skip
    files += sorted((folder / "publish").rglob("*.safetensors"))
    hashes = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    return hashes | {"record.json": Record.read(folder).hash}


def compare(folder: Path, expected: dict[str, str]) -> str:
    """Return what differs from a run without a stop, or that something was left behind."""
    results = hash_results(folder)
    names = sorted(results.keys() | expected.keys())
    differing = [name for name in names if results.get(name) != expected.get(name)]
    left = [path.name for path in folder.rglob(".tmp-*")]
    left += [path.name for path in folder.glob("checkpoints/*")]
    return "" if not differing and not left else f"differs {differing[:3]}, left {left[:3]}"


class Campaign:
    """Cut runs off, and continue them.

    Args:
        recipe: of the run.
        folder: for everything.
        draw: of all moments.
    """

    def __init__(self, recipe: Path, folder: Path, draw: random.Random) -> None:
        self.recipe, self.folder, self.draw = recipe, folder, draw
        self.finished = 0
        straight = folder / f"{recipe.stem}-straight"
        begun = time.monotonic()
        code = wait(start(recipe, straight))
        assert code == 0, straight.with_suffix(".txt").read_text()
        self.seconds = time.monotonic() - begun
        self.expected = hash_results(straight)
        print(f"{recipe.stem}: a run takes {self.seconds:.1f} s", flush=True)

    def open_trial(self) -> Path:
        """Return an empty folder's place."""
        place = self.folder / "trial"
        shutil.rmtree(place, ignore_errors=True)
        place.with_suffix(".txt").unlink(missing_ok=True)
        return place

    def finish(self, place: Path) -> str:
        """Continue a run that was cut off, every other one elsewhere; return what went wrong."""
        self.finished += 1
        if self.finished % 2 == 0 and place.exists():
            elsewhere = place.with_name("moved")
            shutil.rmtree(elsewhere, ignore_errors=True)
            place = place.rename(elsewhere)
        code = wait(start(self.recipe, place), 20 * self.seconds + 60)
        if code != 0:
            return f"exit {code}: {place.with_suffix('.txt').read_text()[-300:]}"
        return compare(place, self.expected)

    def draw_moments(self, count: int) -> Iterator[float]:
        """Yield moments over a whole run, each in its own share of it."""
        for number in range(count):
            yield (number + self.draw.random()) / count * self.seconds

    def kill(self, count: int, tally: Tally) -> None:
        """Kill a run, some of them again and again."""
        for number, moment in enumerate(self.draw_moments(count)):
            place, kills = self.open_trial(), 1 + 2 * (number % 5 == 4)
            for _ in range(kills):
                pid = start(self.recipe, place)
                wait(pid, moment / kills)
                with_kill(pid, signal.SIGKILL)
            tally.add(f"{self.recipe.stem} {moment:.2f} s x {kills}", self.finish(place))

    def stop(self, count: int, tally: Tally) -> None:
        """Send SIGTERM, SIGINT, and the notice SIGUSR1 by turns."""
        for number, moment in enumerate(self.draw_moments(count)):
            sent = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[number % 3]
            place = self.open_trial()
            pid = start(self.recipe, place)
            if (code := wait(pid, moment)) is None:
                os.kill(pid, sent)
                code = wait(pid, LIMIT_SECONDS)
            expected = 130 if sent == signal.SIGINT else 143
            problem = self._judge_stop(place, code, expected)
            tally.add(f"{self.recipe.stem} {moment:.2f} s {sent.name}", problem)

    def _judge_stop(self, place: Path, code: int | None, expected: int) -> str:
        """Return what went wrong in a run that got a signal, and in its continuation."""
        if code not in (expected, 0):
            return f"exit {code} instead of {expected}"
        if code != 0 and (place / "phases" / "report").exists():
            return "went on to the report"
        return self.finish(place)

    def cut_writes(self, count: int, tally: Tally) -> None:
        """Let the power fail at a write, flush or rename, the last of them not carried out."""
        calls, place = self.folder / "calls.txt", self.open_trial()
        calls.unlink(missing_ok=True)
        code = wait(start(self.recipe, place, lambda: fail_at(0, calls)))
        assert code == 0
        phases = [name_phase(path, place) for path in calls.read_text().splitlines()]
        chosen = draw_calls(phases, count, self.draw)
        for at in chosen:
            place = self.open_trial()
            wait(start(self.recipe, place, lambda at=at: fail_at(at, calls)))
            label = f"{self.recipe.stem} call {at} of {len(phases)} in {phases[at - 1]}"
            tally.add(label, self.finish(place))
        hit = Counter(phases[at - 1] for at in chosen)
        for phase, total in Counter(phases).items():
            print(f"{self.recipe.stem} {phase}: {hit[phase]} of {total} calls", flush=True)


def name_phase(path: str, run: Path) -> str:
    """Return the part of a run that a file is written for."""
    if not path.startswith(f"{run}/"):
        return "outside"
    first, *rest = (part.removeprefix(".tmp-") for part in Path(path).relative_to(run).parts)
    # An arm's seeds are one phase.
    name = rest[0].split("-seed")[0] if len(rest) > 0 else ""
    return f"{first}/{name}" if first in ("phases", "arms", "checkpoints") else first


def draw_calls(phases: list[str], count: int, draw: random.Random) -> list[int]:
    """Return the numbers of calls, from 1: one of each phase, the rest spread over the run."""
    places: dict[str, list[int]] = {}
    for number, phase in enumerate(phases, 1):
        places.setdefault(phase, []).append(number)
    chosen = [draw.choice(numbers) for numbers in places.values()][:count]
    left = count - len(chosen)
    chosen += [1 + int((n + draw.random()) / left * (len(phases) - 1)) for n in range(left)]
    return sorted(chosen)


def with_kill(pid: int, number: int) -> None:
    """Kill a process that may have ended, and wait for it."""
    try:
        os.kill(pid, number)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def fail_at(number: int, calls: Path) -> None:
    """End this process in the call of so many flushes, renames and safetensors; 0 lists them."""
    done = 0

    def wrap(function: Callable[..., Any], find_path: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == number:
                os._exit(137)
            if not number:
                with open(calls, "a") as handle:
                    handle.write(f"{find_path(*args)}\n")
            return function(*args, **kwargs)

        return call

    os.fsync = wrap(os.fsync, lambda handle: os.readlink(f"/proc/self/fd/{handle}"))
    os.rename = wrap(os.rename, lambda old, _: str(old))  # pyright: ignore
    step_checkpoint.save_file = wrap(step_checkpoint.save_file, lambda _, path: str(path))


def stop_ranks(recipe: Path, folder: Path, count: int, draw: random.Random, tally: Tally) -> None:
    """Stop, and kill, one rank of two or the launcher, and continue on two."""
    straight = folder / f"{recipe.stem}-two"
    begun = time.monotonic()
    ended = launch(recipe, straight)
    assert ended.wait(600) == 0, straight.with_suffix(".txt").read_text()
    seconds, expected = time.monotonic() - begun, hash_results(straight)
    victims = [("rank", signal.SIGTERM), ("launcher", signal.SIGTERM), ("rank", signal.SIGKILL),
               ("rank", signal.SIGUSR1)]  # fmt: skip
    for number in range(count):
        victim, sent = victims[number % len(victims)]
        place = folder / "trial-two"
        shutil.rmtree(place, ignore_errors=True)
        process, moment = launch(recipe, place), draw.uniform(0.3, 0.95) * seconds
        time.sleep(moment)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        ranks = children.read_text().split() if process.poll() is None else []
        if ranks:
            os.kill(int(ranks[-1]) if victim == "rank" else process.pid, sent)
        problem = "" if process.wait(2 * LIMIT_SECONDS) is not None else "did not end"
        error = place / "error.json"
        code = json.loads(error.read_text())["exit_code"] if error.exists() else None
        codes = (8, None) if sent == signal.SIGKILL else (143, None)
        if ranks and code not in codes:
            problem = f"error.json holds {code}"
        if not problem:
            again = launch(recipe, place)
            problem = compare(place, expected) if again.wait(600) == 0 else "failed again"
        tally.add(f"{victim} {moment:.1f} s {sent.name}", problem)


def launch(recipe: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start two ranks by torchrun."""
    with open(folder.with_suffix(".txt"), "ab") as screen:
        return subprocess.Popen([*TORCHRUN, str(recipe), str(folder)], stdout=screen, stderr=screen)


def main() -> int:
    """Run what is asked for; return 1 if anything ended otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    for name, count in (("kills", 100), ("signals", 20), ("faults", 50), ("ranks", 8), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--only", choices=["text", "image"], help="of the two recipes")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    tallies = {name: Tally(name) for name in ("kills", "signals", "faults", "ranks")}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipes = write_recipes(folder)
        names = [options.only] if options.only else list(recipes)
        share = len(names)
        for name in names:
            campaign = Campaign(recipes[name], folder, draw)
            campaign.kill(options.kills // share, tallies["kills"])
            campaign.stop(options.signals // share, tallies["signals"])
            if options.faults:
                campaign.cut_writes(options.faults // share, tallies["faults"])
        if options.ranks:
            stop_ranks(recipes[names[0]], folder, options.ranks, draw, tallies["ranks"])
    for tally in tallies.values():
        right = tally.trials - len(tally.wrong)
        print(f"{tally.name}: {right} of {tally.trials} identical")
        print("\n".join(f"  {line}" for line in tally.wrong), end="")
    return int(any(tally.wrong for tally in tallies.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-rank"]:
        run_command(Path(sys.argv[2]), Path(sys.argv[3]), lambda: None)
    sys.exit(main())
