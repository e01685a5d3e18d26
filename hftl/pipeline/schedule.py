"""Plan the tasks of the arms that train: what waits for what, which come first, and where."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hftl.config.recipe import Arm, Recipe


@dataclass(frozen=True)
class ArmCost:
    """Hold the seconds of an arm on one process.

    Attributes:
        seed: one training with its predictions, or one solution.
        rate: trying one learning rate, where they are searched.
        choice: what else is tried before the seeds: all weights of KL where one is chosen, the
            whole budget of scratch.
        spared: what the choice has done of the first seed's training.
    """

    seed: float
    rate: float = 0.0
    choice: float = 0.0
    spared: float = 0.0


@dataclass(frozen=True)
class Placement:
    """Describe how the trainings of a run are placed on processes.

    Attributes:
        mode: `data`, all processes of the launcher share each arm, or the one process trains it;
            `arms`, each process takes an arm and seed.
        processes: how many train at the same time.
        local: they are started by this run and not by a launcher.
        threads: of each of those on a CPU; None leaves it to the environment.
        reason: why, in words.
    """

    mode: Literal["data", "arms"]
    processes: int
    local: bool = False
    threads: int | None = None
    reason: str = ""

    @property
    def sharing(self) -> int:
        """Return how many processes share each training step."""
        return 1 if self.mode == "arms" else self.processes

    @property
    def text(self) -> str:
        """Return the line of the header; nothing for one process."""
        if self.processes == 1:
            return ""
        if self.mode == "data":
            return f"data: {self.processes} processes share each arm; {self.reason}"
        threads = "" if self.threads is None else f" of {self.threads} thread"
        plural = "s" if (self.threads or 1) > 1 else ""
        return (
            f"arms: {self.processes} processes{threads}{plural} take an arm and seed each; "
            f"{self.reason}"
        )


@dataclass(frozen=True)
class Task:
    """Describe what one process does at a time.

    Attributes:
        name: unique, and good for a file's name.
        kind: to train an arm with its seed, to try a learning rate, to choose one of those tried,
            or to choose a weight of KL.
        arm: its name.
        seed: of the training.
        rate: the learning rate that is tried.
        after: the tasks that must be done before.
        seconds: that it takes, as estimated.
    """

    name: str
    kind: Literal["train", "rate", "search", "weight"]
    arm: str
    seed: int
    rate: float = 0.0
    after: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def title(self) -> str:
        """Return the words for it while it runs."""
        if self.kind == "train":
            return f"{self.arm} seed {self.seed}"
        return f"{self.arm} rate {self.rate:.3g}" if self.kind == "rate" else f"{self.arm} choice"


def plan_tasks(
    jobs: Sequence[tuple[Arm, int]], recipe: Recipe, costs: Mapping[str, ArmCost],
    chosen: Iterable[str] = (),
) -> list[Task]:  # fmt: skip
    """Return the tasks of trainings, those first that most has to wait for, then the longest.

    Args:
        jobs: arms with their seeds; none is solved.
        recipe: the learning rates that are searched, and the seed that chooses.
        costs: by the name of the arm.
        chosen: the arms whose learning rate or weight of KL is chosen already.
    """
    tasks: list[Task] = []
    first, done = recipe.measure.seeds[0], set(chosen)
    for arm, seed in jobs:
        cost, before = costs[arm.name], ()
        if arm.name not in done:
            tasks += _plan_choice(arm, first, recipe, cost)
            done.add(arm.name)
        name = f"{arm.name}-choice"
        if any(task.name == name for task in tasks):
            before = (name,)
        seconds = cost.seed - (cost.spared if seed == first else 0.0)
        task = Task(f"{arm.name}-seed{seed}", "train", arm.name, seed, 0.0, before, seconds)
        tasks.append(task)
    paths = _measure_paths(tasks)
    return sorted(tasks, key=lambda task: -paths[task.name])


def _plan_choice(arm: Arm, seed: int, recipe: Recipe, cost: ArmCost) -> list[Task]:
    """Return the tasks that come before the seeds of an arm."""
    name = f"{arm.name}-choice"
    if arm.spec.schedule == "rate_search":
        rates = [
            Task(f"{arm.name}-rate{number}", "rate", arm.name, seed, rate, (), cost.rate)
            for number, rate in enumerate(dict.fromkeys(recipe.measure.scratch.learning_rates))
        ]
        before = tuple(task.name for task in rates)
        return [*rates, Task(name, "search", arm.name, seed, 0.0, before, cost.choice)]
    if arm.retain is not None and arm.retain.has_auto_weight:
        return [Task(name, "weight", arm.name, seed, seconds=cost.choice)]
    return []


def _measure_paths(tasks: Sequence[Task]) -> dict[str, float]:
    """Return for each task the seconds from its start to the end of the last that waits for it."""
    paths: dict[str, float] = {}
    # A task stands behind those that it waits for.
    for task in reversed(tasks):
        waiting = [paths[other.name] for other in tasks if task.name in other.after]
        paths[task.name] = task.seconds + max(waiting, default=0.0)
    return paths


def estimate_makespan(tasks: Sequence[Task], processes: int) -> float:
    """Return the seconds until all tasks are done, each process taking the first that may begin."""
    free = [0.0] * processes
    ended: dict[str, float] = {}
    waiting = list(tasks)
    while waiting:
        process = min(range(processes), key=lambda number: free[number])
        ready = [task for task in waiting if all(name in ended for name in task.after)]
        # One whose turn it is takes what can begin at once, else what can begin first.
        starts = {
            task.name: max([free[process], *(ended[name] for name in task.after)]) for task in ready
        }
        task = min(ready, key=lambda task: starts[task.name])
        ended[task.name] = free[process] = starts[task.name] + task.seconds
        waiting.remove(task)
    return max(ended.values(), default=0.0)
