"""Keep what campaigns have found, trial by trial, and write it as a table.

The trials of one kind add up as long as they are of the same code; the first of another code takes
their place.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock
from pydantic import BaseModel

from hftl.console import format_table
from hftl.runtime.run_folder import write_text

ROOT = Path(__file__).parent.parent.parent
RESULT = ROOT / "benchmarks" / "results" / "campaign.json"
KINDS = {
    "kills": "kill -9, then the same command",
    "signals": "SIGTERM, Ctrl-C, SIGUSR1",
    "faults": "killed before a write, flush, rename",
    "races": "two runs in one folder",
    "ranks": "one rank of two, or the launcher",
    "fuzz": "files changed at random, keys set to anything",
}


class Trial(BaseModel, frozen=True):
    """Say how one run ended that was disturbed; an empty `problem` is none."""

    recipe: str
    """Of the run; of the fuzzing what a loader is tried with, see `fuzzing.LOADERS`."""
    seed: int
    number: int
    of: int
    """Its number among so many, which share a run's moments."""
    what: str
    problem: str
    tries: int = 1
    """The runs, or the examples of a loader."""

    @property
    def key(self) -> tuple[str, int, int, int]:
        """Return what no other trial of its kind has."""
        return (self.recipe, self.seed, self.number, self.of)


class Findings(BaseModel):
    """Hold the trials of one kind, all of the same code."""

    code: str
    date: str
    trials: list[Trial]


class CampaignResults(BaseModel):
    """Hold what is stored of campaigns, by kind."""

    kinds: dict[str, Findings]
    table: list[str]


@dataclass
class Log:
    """Add trials to those of the same code, in a file if one is given.

    Args:
        path: of the file; None keeps nothing.
    """

    path: Path | None

    def __post_init__(self) -> None:
        self.code = hash_code()
        self.kinds: dict[str, Findings] = {}
        self._read()
        self.added: list[tuple[str, Trial]] = []

    def has(self, kind: str, key: tuple[str, int, int, int]) -> bool:
        """Return whether this trial was made, of the same code."""
        return key in {trial.key for trial in self._list_trials(kind)}

    def add(self, kind: str, trial: Trial) -> None:
        """Add a trial to the file, to which another process may add others at the same time."""
        if self.path is None:
            self._put(kind, trial)
        else:
            with FileLock(f"{self.path}.lock"):
                self._read()
                self._put(kind, trial)
                kinds = {kind: self.kinds[kind] for kind in KINDS if kind in self.kinds}
                results = CampaignResults(kinds=kinds, table=build_table(kinds))
                tree = results.model_dump_json(indent=1, exclude_defaults=True)
                write_text(self.path, f"{tree}\n")
        self.added.append((kind, trial))
        print(f"{kind} {trial.recipe} {trial.number} of {trial.of}, {trial.what}: "
              f"{trial.problem or 'as promised'}", flush=True)  # fmt: skip

    def _read(self) -> None:
        """Read what is kept."""
        if self.path is not None and self.path.exists():
            self.kinds = read_campaign(self.path).kinds

    def _put(self, kind: str, trial: Trial) -> None:
        """Add a trial to those of the same code."""
        trials = sorted([*self._list_trials(kind), trial], key=lambda trial: trial.key)
        today = datetime.now(UTC).date().isoformat()
        self.kinds[kind] = Findings(code=self.code, date=today, trials=trials)

    def _list_trials(self, kind: str) -> list[Trial]:
        stored = self.kinds.get(kind)
        return stored.trials if stored is not None and stored.code == self.code else []


def read_campaign(path: Path = RESULT) -> CampaignResults:
    """Return what is stored."""
    return CampaignResults.model_validate_json(path.read_text(encoding="utf-8"))


def count_identical(trials: list[Trial]) -> str:
    """Return how many of them ended as they must, as "99 of 100"."""
    return f"{sum(not trial.problem for trial in trials)} of {len(trials)}"


def build_table(kinds: dict[str, Findings]) -> list[str]:
    """Return a line for each kind, and one for each trial that ended otherwise."""
    rows = [["kind", "what happens", "as promised", "of", "tries", "seeds", "code", "date"]]
    wrong = []
    for kind, findings in kinds.items():
        recipes = Counter(trial.recipe.split()[0] for trial in findings.trials)
        seeds = ", ".join(map(str, sorted({trial.seed for trial in findings.trials})))
        of = ", ".join(f"{name} {count}" for name, count in recipes.items())
        tries = f"{sum(trial.tries for trial in findings.trials):,}".replace(",", " ")
        good, code = count_identical(findings.trials), findings.code[:8]
        rows.append([kind, KINDS[kind], good, of, tries, seeds, code, findings.date])
        wrong += [
            f"  {kind} {trial.recipe} {trial.number}, {trial.what}: {trial.problem}"
            for trial in findings.trials if trial.problem
        ]  # fmt: skip
    return [line.removeprefix("  ") for line in format_table(rows).splitlines()] + wrong


def hash_code() -> str:
    """Return a hash of the package and of the campaign."""
    digest = hashlib.sha256()
    support = ROOT / "tests" / "support"
    campaign = [support.parent / "campaign.py", support / "campaign_runs.py",
                support / "disk_states.py", support / "fuzzing.py"]  # fmt: skip
    for path in [*sorted((ROOT / "hftl").rglob("*.py")), *campaign]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
