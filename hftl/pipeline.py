"""A run, phase by phase: each reads files, writes files, and is skipped where they stand."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hftl import rundir, show
from hftl.data import prepare as data_stage
from hftl.data.prepare import Prepared
from hftl.errors import RecipeError, RunFolderError
from hftl.finetune import arm as training
from hftl.finetune import baseline, store
from hftl.finetune.estimate import estimate_seconds
from hftl.finetune.strategy import check_blocks
from hftl.finetune.workbench import Workbench
from hftl.finish import finish
from hftl.metrics import find
from hftl.model.anatomy import max_tokens
from hftl.model.source import find_source, load_tokenizer, weights_sha256
from hftl.reads import arm_reads, asked, data_reads, refuse_changed
from hftl.recipe import Arm, Recipe, arms
from hftl.record import Record, to_json
from hftl.train.hardware import device, dtype_name

UNTIL = ("finetune", "measure", "publish")
ORDER = ("majority", "classical", "head", "lora", "partial", "full", "scratch")
"""Quick arms first."""


@dataclass(frozen=True)
class Run:
    """One run in progress: the recipe, its folder, and where to say what happens."""

    recipe: Recipe
    folder: Path
    say: Callable[[str], None]
    progress: bool

    @property
    def arms(self) -> list[Arm]:
        """The recipe's arms, its own first."""
        return arms(self.recipe)

    def arm_folder(self, name: str, seed: int) -> Path:
        """Where an arm's files stand."""
        return self.folder / "arms" / f"{name}-seed{seed}"


def run(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    until: str = "publish",
    restart: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> Record | None:
    """Runs a recipe, or what is missing of it.

    Args:
        recipe: a recipe or the path of one.
        output: the run folder; by default `runs/<recipe's folder>-<stem>`.
        until: the last phase: finetune, measure or publish.
        restart: throw away what stands in the run folder first.
        say: receives each line of progress.
        progress: whether to draw progress bars.

    Returns:
        The record, from the phase `measure` on.

    Raises:
        HftlError: one of its kinds, each with an exit code.
    """
    if until not in UNTIL:
        raise RecipeError(f"unknown phase {until!r}", f"Use one of {', '.join(UNTIL)}")
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    if output is None:
        output = recipe.default_output()
    _one_process()
    metric = find(recipe.measure.metric, str(recipe.data.task))
    folder = Path(output)
    quiet()
    rundir.make(folder)
    this = Run(recipe, folder, say, progress)
    with rundir.locked(folder):
        if restart:
            _start_over(folder)
        refuse_changed(recipe, folder, this.arms)
        bench = _bench(this)
        labels = bench.prepared.labels(bench.prepared.rows["validation"])
        # A metric that cannot take these labels should say so before anything trains.
        metric.score(labels, labels)
        rundir.write_text(folder / "recipe.yaml", _recipe_text(recipe))
        _arms_phase(this, bench)
        if until not in ("measure", "publish"):
            return None
        return finish(recipe, folder, bench, metric, this.arms, until == "publish", say)


def preflight(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """`hftl check`: the header's facts, and what the preflight found; trains and writes nothing."""
    find(recipe.measure.metric, str(recipe.data.task))
    quiet()
    bench = _new_bench(recipe, data_stage.prepare(recipe.data))
    wanted = arms(recipe)
    found = bench.check(recipe.data.max_length, wanted)
    return _header(recipe, bench, wanted, len(wanted) * len(recipe.measure.seeds)), found


def quiet() -> None:
    """Keeps the libraries' own bars and notices off the terminal."""
    import datasets
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            f"{os.environ['WORLD_SIZE']} processes were started, and a run on several is not "
            "built yet",
            "Start it with `hftl run`, on one device",
        )


def _start_over(folder: Path) -> None:
    """Removes what a run has written; the recipe stays, it marks the folder as a run's."""
    for name in rundir.OURS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        elif name not in (".lock", "recipe.yaml"):
            path.unlink(missing_ok=True)


def _bench(this: Run) -> Workbench:
    """The data phase, and what all arms share."""
    recipe = this.recipe
    folder = this.folder / "phases" / "data"
    digest = data_stage.files_digest(recipe.data)
    stands = rundir.reads(folder) is not None
    if stands and data_stage.stored_digest(folder) == digest:
        prepared = data_stage.read(folder)
    else:
        prepared = data_stage.prepare(recipe.data)
        if stands:
            _same_data(data_stage.read(folder), prepared, this.folder)
            prepared = data_stage.read(folder)
    bench = _new_bench(recipe, prepared)
    if not stands:
        with rundir.commit(folder, {"recipe": data_reads(recipe)}) as aside:
            data_stage.write(prepared, aside, digest)
    return bench


def _same_data(before: Prepared, now: Prepared, run: Path) -> None:
    if before.facts["fingerprint"] != now.facts["fingerprint"]:
        old, new = before.facts["rows_read"], now.facts["rows_read"]
        raise RunFolderError(
            f"{run} was made with other data: {old} rows then, {new} now, and not the same ones",
            "Put the data back, choose another --output, or start over with --restart",
        )


def _new_bench(recipe: Recipe, prepared: Prepared) -> Workbench:
    source = find_source(recipe.source)
    for arm in arms(recipe):
        if arm.strategy == "partial":
            check_blocks(arm.finetune.blocks, source.config.num_hidden_layers)
    longest = min(recipe.data.max_length, max_tokens(source.config))
    tokenizer = load_tokenizer(source)
    weights = weights_sha256(source)
    return Workbench(source, weights, tokenizer, prepared, recipe.data.shots, longest, device())


def _arms_phase(this: Run, bench: Workbench) -> None:
    """Runs every arm and seed that is missing, quick ones first."""
    jobs = [
        (arm, seed, reads)
        for arm in sorted(this.arms, key=lambda arm: ORDER.index(arm.strategy))
        for reads in [_arm_reads(this.recipe, bench, arm)]
        for seed in this.recipe.measure.seeds
        if not _stands(this, this.arm_folder(arm.name, seed), reads)
    ]
    if not jobs:
        return
    this.say(show.header(_header(this.recipe, bench, [job[0] for job in jobs], len(jobs))))
    for warning in bench.check(this.recipe.data.max_length, this.arms)["warnings"]:
        this.say(f"  warning: {warning}")
    total = len(this.arms) * len(this.recipe.measure.seeds)
    done = total - len(jobs)
    if done:
        this.say(f"  {done} of {total} arms x seeds stand already")
    for arm, seed, reads in jobs:
        folder = this.arm_folder(arm.name, seed)
        outcome = _run_arm(this, bench, arm, seed)
        with rundir.commit(folder, reads) as aside:
            store.write(aside, bench.prepared, outcome, arm.name, arm.strategy, seed)
        done += 1
        told = store.read(folder, bench.prepared).told
        this.say(show.arm_line(told, this.recipe.measure.metric, done, total))


def _arm_reads(recipe: Recipe, bench: Workbench, arm: Arm) -> dict[str, Any]:
    """What an arm's folder tells of where it comes from."""
    read = arm_reads(recipe, arm)
    return {
        "recipe": read,
        "asked": asked(recipe, read),
        "weights": bench.weights,
        "data": bench.prepared.facts["fingerprint"],
    }


def _stands(this: Run, folder: Path, reads: dict[str, Any]) -> bool:
    """Whether an arm is finished and what the recipe asks.

    Raises:
        RunFolderError: if it was made from another source model or other data.
    """
    found = rundir.reads(folder)
    if found is None:
        return False
    for key, what in (("weights", "another source model"), ("data", "other data")):
        if found[key] != reads[key]:
            raise RunFolderError(
                f"{this.folder} was made with {what}: {folder.name} does not fit",
                "Put it back, choose another --output, or start over with --restart",
            )
    return found["recipe"] == reads["recipe"]


def _run_arm(this: Run, bench: Workbench, arm: Arm, seed: int) -> training.Outcome:
    match arm.strategy:
        case "majority":
            return baseline.majority(bench, seed)
        case "classical":
            return baseline.solve_classical(bench, seed)
        case "head":
            return training.solve_head(bench, arm.finetune, seed)
        case "scratch":
            rate = _scratch_rate(this, bench, arm)
            search = this.recipe.measure.scratch
            return baseline.train_scratch(bench, arm.finetune, search, rate, seed, this.progress)
    return training.train_arm(bench, arm.finetune, seed, this.progress)


def _scratch_rate(this: Run, bench: Workbench, arm: Arm) -> float:
    """The learning rate of scratch, searched once on the first seed."""
    folder = this.folder / "phases" / "search"
    reads = _arm_reads(this.recipe, bench, arm)
    if (rundir.reads(folder) or {}) | {"asked": reads["asked"]} != reads:
        search = this.recipe.measure.scratch
        found = baseline.search_rate(
            bench, arm.finetune, search, this.recipe.measure.seeds[0], this.progress
        )
        with rundir.commit(folder, reads) as aside:
            rundir.write_text(aside / "search.json", to_json(found))
        edge = ", at the edge of those tried" if found["at_edge"] else ""
        this.say(f"  scratch: learning rate {found['learning_rate']:g} is best on validation{edge}")
    return json.loads((folder / "search.json").read_text("utf-8"))["learning_rate"]


def _header(recipe: Recipe, bench: Workbench, wanted: list[Arm], jobs: int) -> dict[str, str]:
    facts = bench.prepared.facts
    splits = facts["splits"]
    train = len(bench.train_rows(recipe.measure.seeds[0]))
    labels = ", ".join(facts["labels"][:8]) + (", ..." if len(facts["labels"]) > 8 else "")
    names = list(dict.fromkeys(arm.name for arm in wanted))
    seconds = estimate_seconds(bench, wanted, recipe)
    dropped = facts["duplicates"] + facts["conflicting"]
    return {
        "source": f"{recipe.source.model} ({bench.source.model_type})",
        "device": f"{bench.device}, {dtype_name(recipe.finetune.training)}",
        "rows": f"train {train} of {splits['train']}, validation {splits['validation']}, "
        f"test {splits['test']} ({facts['bad_rows']} bad, {dropped} duplicate rows dropped)",
        "labels": labels or "a number",
        "arms": f"{', '.join(names)} x seeds {recipe.measure.seeds}: {jobs} to run",
        "time": f"about {show.duration(seconds)}",
    }


def _recipe_text(recipe: Recipe) -> str:
    import yaml

    return yaml.safe_dump(recipe.tree(), sort_keys=False, allow_unicode=True)
