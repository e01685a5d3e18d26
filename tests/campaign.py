"""Kill, stop and cut off whole runs at moments drawn by a seed, and compare how they end.

    python -m tests.campaign --kills 100 --signals 40 --faults 60 --races 20 --ranks 8 --store

`--store` adds each trial to those of the same code in benchmarks/results/campaign.json, and passes
over what is there: with `--minutes` a campaign is made in parts, by the same command. `--share 1/2`
and `--share 2/2` make it on two cores at once.

Each run is the whole pipeline of a tiny model, its checkpoints written as often as they can be. A
run that was cut off is continued by the same command. It must end with the weights, predictions,
published files and record of a run that was never stopped. Every other one is continued from
another place than it was begun at.

`--fuzz 10` changes what each loader reads at random for so many minutes of each loader. It must be
read, or refused in one line.
"""
# ruff: noqa: E402

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from support.campaign_results import RESULT, Log, Trial, count_identical
from support.campaign_runs import (
    compare,
    end_with,
    hash_results,
    import_modules,
    launch,
    start,
    wait,
    write_recipes,
)
from support.disk_states import Recorder, count_changes, read_states

LIMIT_SECONDS = 30
"""In which a run must have ended after a signal."""
COUNTS = {"kills": 100, "signals": 40, "faults": 60, "races": 20, "ranks": 8}


class Schedule:
    """Say which trials are to be made, and what each of them draws.

    Args:
        seed: of all draws.
        minutes: after which no other trial begins.
        log: of the trials.
        share: which of so many equal parts of them is made here, and how many parts there are.
    """

    def __init__(
        self, seed: int, minutes: float, log: Log, share: tuple[int, int] = (1, 1)
    ) -> None:
        self.seed, self.log, self.share = seed, log, share
        self._deadline = time.monotonic() + 60 * minutes

    def list_missing(self, kind: str, recipe: str, count: int) -> list[int]:
        """Return the numbers of the trials that the log lacks, spread over the run as they come."""
        mixed = self.draw("order", count).sample(range(count), count)
        part, parts = self.share
        return [
            number for number in mixed[part - 1 :: parts]
            if not self.log.has(kind, (recipe, self.seed, number, count))
        ]  # fmt: skip

    def has_time(self) -> bool:
        """Return whether another trial may begin."""
        return time.monotonic() < self._deadline

    def draw(self, *of: object) -> random.Random:
        """Return what a trial draws from, whichever came before it."""
        return random.Random(" ".join(map(str, (self.seed, *of))))

    def run(
        self, kind: str, recipe: str, count: int, try_one: Callable[[int], tuple[str, str]]
    ) -> None:
        """Make the trials that are missing; `try_one` returns what it did and what went wrong."""
        for number in self.list_missing(kind, recipe, count):
            if not self.has_time():
                return
            what, problem = try_one(number)
            trial = Trial(
                recipe=recipe, seed=self.seed, number=number, of=count, what=what, problem=problem
            )
            self.log.add(kind, trial)


class Campaign:
    """Cut runs off, and continue them.

    Args:
        recipe: of the run.
        folder: for everything.
        schedule: of all trials.
    """

    def __init__(self, recipe: Path, folder: Path, schedule: Schedule) -> None:
        self.recipe, self.folder, self.schedule = recipe, folder, schedule
        straight, imported = folder / f"{recipe.stem}-straight", folder / "imported.txt"
        code = wait(start(recipe, straight, imported=imported))
        assert code == 0, straight.with_suffix(".txt").read_text()
        import_modules(imported.read_text(encoding="utf-8").splitlines())
        self.seconds = self._time_run()
        self.expected = hash_results(straight)
        print(f"{recipe.stem}: a run takes {self.seconds:.1f} s", flush=True)

    def run(self, kind: str, count: int) -> None:
        """Make the trials of one kind."""
        if kind == "faults":
            self._record_states()
            count = min(count, len(self.changes))
        trials = {"kills": self._kill, "signals": self._stop, "faults": self._cut_write,
                  "races": self._race}  # fmt: skip
        self.schedule.run(kind, self.recipe.stem, count, lambda number: trials[kind](number, count))

    def _time_run(self) -> float:
        """Return the seconds of a run that imports nothing, as those that follow."""
        begun = time.monotonic()
        assert wait(start(self.recipe, self._open_trial())) == 0
        return time.monotonic() - begun

    def _open_trial(self) -> Path:
        """Return an empty folder's place."""
        place = self.folder / "trial"
        shutil.rmtree(place, ignore_errors=True)
        place.with_suffix(".txt").unlink(missing_ok=True)
        return place

    def _finish(self, place: Path, number: int) -> str:
        """Continue a run that was cut off, every other one elsewhere; return what went wrong."""
        if number % 2 and place.exists():
            elsewhere = place.with_name("moved")
            shutil.rmtree(elsewhere, ignore_errors=True)
            elsewhere.with_suffix(".txt").unlink(missing_ok=True)
            place = place.rename(elsewhere)
        code = wait(start(self.recipe, place), 20 * self.seconds + 60)
        if code != 0:
            screen = place.with_suffix(".txt").read_text().strip()
            return f"exit {code}: {screen.splitlines()[-1:]}"
        return compare(place, self.expected)

    def _draw_moment(self, kind: str, number: int, count: int) -> float:
        """Return a moment of a whole run, each number's in its own share of it."""
        share = self.schedule.draw(kind, self.recipe.stem, number).random()
        return (number + share) / count * self.seconds

    def _kill(self, number: int, count: int) -> tuple[str, str]:
        """Kill a run, some of them again and again."""
        moment = self._draw_moment("kills", number, count)
        place, kills = self._open_trial(), 1 + 2 * (number % 5 == 4)
        for _ in range(kills):
            while not self._kill_at(place, moment / kills):
                # It had ended: nothing was killed.
                place, moment = self._open_trial(), 0.9 * moment
        return f"{moment:.2f} s x {kills}", self._finish(place, number)

    def _kill_at(self, place: Path, seconds: float) -> bool:
        """Kill a run after so many seconds; return whether it still ran."""
        pid = start(self.recipe, place)
        ended = wait(pid, seconds) is not None
        if not ended:
            end_with(pid, signal.SIGKILL)
        return not ended

    def _stop(self, number: int, count: int) -> tuple[str, str]:
        """Send SIGTERM, SIGINT, and the notice SIGUSR1 by turns."""
        sent = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[number % 3]
        moment, place = self._draw_moment("signals", number, count), self._open_trial()
        pid = start(self.recipe, place)
        if (code := wait(pid, moment)) is None:
            os.kill(pid, sent)
            code = wait(pid, LIMIT_SECONDS)
            if code is None:
                end_with(pid, signal.SIGKILL)
        expected = 130 if sent == signal.SIGINT else 143
        return f"{moment:.2f} s {sent.name}", self._judge_stop(place, code, expected, number)

    def _judge_stop(self, place: Path, code: int | None, expected: int, number: int) -> str:
        """Return what went wrong in a run that got a signal, and in its continuation."""
        if code not in (expected, 0):
            return f"exit {code} instead of {expected}"
        if code != 0 and (place / "phases" / "report").exists():
            return "went on to the report"
        return self._finish(place, number)

    def _record_states(self) -> None:
        """Record the folder before each write, flush, rename and removal of a run."""
        place, self.states = self._open_trial(), self.folder / f"{self.recipe.stem}-states"
        recorder = Recorder(place, self.states)
        code = wait(start(self.recipe, place, recorder.start))
        assert code == 0, place.with_suffix(".txt").read_text()
        self.changes = [
            f"{event} in {name_phase(path, place)}" for event, path in read_states(self.states)
        ]
        phases = Counter(change.partition(" in ")[2] for change in self.changes)
        counts = ", ".join(f"{phase} {count}" for phase, count in phases.items())
        print(f"{self.recipe.stem}: {count_changes(self.states)} changes of files leave "
              f"{len(self.changes)} states: {counts}", flush=True)  # fmt: skip

    def _cut_write(self, number: int, count: int) -> tuple[str, str]:
        """Go on from what a kill before a change of a file leaves."""
        # Its own share of the states, or all.
        at = number * len(self.changes) // count
        place = self._open_trial()
        shutil.copytree(self.states / str(at), place)
        return f"state {at} of {len(self.changes)}, {self.changes[at]}", self._finish(place, number)

    def _race(self, number: int, count: int) -> tuple[str, str]:
        """Start a second run in the folder of the first, every other time at once."""
        moment = number % 2 * 0.8 * self._draw_moment("races", number, count)
        place = self._open_trial()
        first = start(self.recipe, place)
        time.sleep(moment)
        second = start(self.recipe, place)
        codes = sorted((wait(second) or 0, wait(first) or 0))
        problem = compare(place, self.expected) if codes == [0, 4] else f"exits {codes}"
        return f"{moment:.2f} s", problem


def name_phase(path: str, run: Path) -> str:
    """Return the part of a run that a file is written for."""
    if not path.startswith(f"{run}/"):
        return "outside"
    first, *rest = (part.removeprefix(".tmp-") for part in Path(path).relative_to(run).parts)
    # An arm's seeds are one phase.
    name = rest[0].split("-seed")[0] if len(rest) > 0 else ""
    return f"{first}/{name}" if first in ("phases", "arms", "checkpoints") else first


class RankCampaign:
    """Stop, and kill, one rank of two or the launcher, and continue on two; see `Campaign`."""

    def __init__(self, recipe: Path, folder: Path, schedule: Schedule) -> None:
        self.recipe, self.folder, self.schedule = recipe, folder, schedule
        straight = folder / f"{recipe.stem}-two"
        begun = time.monotonic()
        ended = launch(recipe, straight)
        assert ended.wait(600) == 0, straight.with_suffix(".txt").read_text()
        self.seconds, self.expected = time.monotonic() - begun, hash_results(straight)

    def run(self, count: int) -> None:
        """Make the trials."""
        self.schedule.run("ranks", self.recipe.stem, count, self._stop)

    def _stop(self, number: int) -> tuple[str, str]:
        victims = [("rank", signal.SIGTERM), ("launcher", signal.SIGTERM),
                   ("rank", signal.SIGKILL), ("rank", signal.SIGUSR1)]  # fmt: skip
        victim, sent = victims[number % len(victims)]
        place = self.folder / "trial-two"
        shutil.rmtree(place, ignore_errors=True)
        draw = self.schedule.draw("ranks", self.recipe.stem, number)
        moment = draw.uniform(0.3, 0.95) * self.seconds
        process = launch(self.recipe, place)
        time.sleep(moment)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        ranks = children.read_text().split() if process.poll() is None else []
        if ranks:
            # By turns the last and the first rank.
            rank = ranks[-1 - number // len(victims) % 2]
            os.kill(int(rank) if victim == "rank" else process.pid, sent)
        return f"{victim} {moment:.1f} s {sent.name}", self._judge(place, process, sent, ranks)

    def _judge(
        self, place: Path, process: subprocess.Popen[bytes], sent: int, ranks: list[str]
    ) -> str:
        """Return what went wrong in a launch that lost a rank, and in its continuation."""
        try:
            process.wait(2 * LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return "did not end"
        error = place / "error.json"
        code = json.loads(error.read_text())["exit_code"] if error.exists() else None
        if ranks and code not in (8 if sent == signal.SIGKILL else 143, None):
            return f"error.json holds {code}"
        again = launch(self.recipe, place)
        return compare(place, self.expected) if again.wait(600) == 0 else "failed again"


class FuzzCampaign:
    """Change at random what the loaders read.

    Args:
        minutes: of each loader, shared by what it is tried with.
        schedule: of all trials.
    """

    def __init__(self, minutes: float, schedule: Schedule) -> None:
        from support.fuzzing import LOADERS  # needs hypothesis

        kinds = Counter(name.split()[0] for name in LOADERS)
        self.seconds = {name: 60 * minutes / kinds[name.split()[0]] for name in LOADERS}
        self.schedule = schedule

    def run(self) -> None:
        """Make the trials that are missing."""
        part, parts = self.schedule.share
        for name in list(self.seconds)[part - 1 :: parts]:
            key = (name, self.schedule.seed, 0, 1)
            if self.schedule.has_time() and not self.schedule.log.has("fuzz", key):
                self.schedule.log.add("fuzz", self._fuzz(name))

    def _fuzz(self, name: str) -> Trial:
        """Try a loader in a process of its own, so that its memory is its own."""
        seed, seconds = self.schedule.seed, self.seconds[name]
        command = [sys.executable, str(TESTS / "support" / "fuzzing.py"), name, str(seconds),
                   str(seed)]  # fmt: skip
        tries, what = 0, f"{seconds:.0f} s"
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 300)
        except subprocess.TimeoutExpired:
            problem = "hangs"
        else:
            # A process that the system ended has nothing to say.
            problem = f"exit {ended.returncode}: {ended.stderr[-2000:]}"
            if ended.returncode == 0:
                problem = ""
                result = json.loads(ended.stdout.splitlines()[-1])
                tries = result["tries"]
                what += f", slowest {result['slowest']:.1f} s, {result['memory']} MiB"
        return Trial(recipe=name, seed=seed, number=0, of=1, what=what, problem=problem,
                     tries=tries)  # fmt: skip


def read_options() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    for name, count in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--fuzz", type=float, default=10, help="minutes of each loader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["text", "image"], help="of the two recipes")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--share", type=read_share, default=(1, 1), metavar="1/2",
                        help="make one half of the trials, for two processes at once")  # fmt: skip
    parser.add_argument("--store", action="store_true")
    return parser.parse_args()


def read_share(text: str) -> tuple[int, int]:
    """Return a part of so many, as 1/2."""
    part, parts = map(int, text.split("/"))
    if not 1 <= part <= parts:
        raise ValueError(text)
    return part, parts


def main() -> int:
    """Run what is asked for; return 1 if anything ended otherwise."""
    options = read_options()
    log = Log(RESULT if options.store else None)
    schedule = Schedule(options.seed, options.minutes, log, options.share)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipes = write_recipes(folder)
        names = [options.only] if options.only else list(recipes)
        for name in names:
            counts = {kind: getattr(options, kind) // len(names) for kind in COUNTS}
            kinds = [kind for kind in ("kills", "signals", "faults", "races")
                     if schedule.list_missing(kind, name, counts[kind])]  # fmt: skip
            if kinds and schedule.has_time():
                campaign = Campaign(recipes[name], folder, schedule)
                for kind in kinds:
                    campaign.run(kind, counts[kind])
        if schedule.list_missing("ranks", names[0], options.ranks) and schedule.has_time():
            RankCampaign(recipes[names[0]], folder, schedule).run(options.ranks)
    if options.fuzz:
        FuzzCampaign(options.fuzz, schedule).run()
    for kind in (*COUNTS, "fuzz"):
        trials = [trial for of, trial in log.added if of == kind]
        print(f"{kind}: {count_identical(trials)} as promised")
    return int(any(trial.problem for _, trial in log.added))


if __name__ == "__main__":
    sys.exit(main())
