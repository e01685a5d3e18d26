"""Run the arms phase: every arm and seed that is missing, one after the other or dealt out."""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hftl import console
from hftl.card.sections import describe_scratch_search
from hftl.config.recipe import Arm
from hftl.errors import RunFolderError
from hftl.finetune import arm_files, baselines
from hftl.finetune.arm import train_arm
from hftl.finetune.arm_files import ArmOutput
from hftl.finetune.baselines import Trial
from hftl.finetune.context import ExperimentContext
from hftl.finetune.strategies import STRATEGIES
from hftl.pipeline.cache_keys import build_arm_inputs, build_checkpoint_key
from hftl.pipeline.changed_inputs import check_unfinished, is_stage_finished
from hftl.pipeline.deal import deal_tasks
from hftl.pipeline.estimate import RowCosts, estimate_trained_arms
from hftl.pipeline.kl_weight import choose_kl_weight, is_weight_chosen
from hftl.pipeline.placement import STEP_PASSES, choose_placement
from hftl.pipeline.retention import build_retention, warn_of_weak_probe
from hftl.pipeline.run import ArmContexts, Run
from hftl.pipeline.schedule import Task, plan_tasks
from hftl.pipeline.weight_grid import set_kl_weight
from hftl.runtime import distributed, run_folder
from hftl.runtime.hardware import measure_energy
from hftl.runtime.progress import show_activity
from hftl.runtime.run_folder import StageInputs, to_json
from hftl.train.facts import ArmFile, ScratchSearch, TrainingFacts, TriedRate
from hftl.train.step_checkpoint import CheckpointSpec


@dataclass(frozen=True)
class Job:
    """Name one arm and seed to run, and what its folder will depend on."""

    arm: Arm
    seed: int
    reads: StageInputs


ArmReport = Callable[[ArmFile, float, str], None]
"""Takes a finished arm's metrics, the seconds that went by since its start, and its note."""


def run_arms(run: Run, context: ExperimentContext, arm_contexts: ArmContexts) -> None:
    """Run every arm and seed that is missing: the solved first, then those that train. Collective.

    Args:
        run: the run.
        context: the source as it is, and the rows.
        arm_contexts: what each arm works with.
    """
    jobs = distributed.broadcast_from_main(lambda: _list_missing_jobs(run, arm_contexts))
    distributed.broadcast_from_main(lambda: _remove_finished_checkpoints(run, jobs))
    total = len(run.arms) * len(run.recipe.measure.seeds)
    if len(jobs) < total:
        stand = f"{total - len(jobs)} of {total}" if jobs else f"all {total}"
        run.say(f"  {stand} arms x seeds stand already")
    placement = distributed.broadcast_from_main(lambda: choose_placement(context, run.recipe))
    deals, sharing = placement.mode == "arms", placement.sharing
    distributed.broadcast_from_main(lambda: _check_sharing(run, jobs, sharing))
    distributed.broadcast_from_main(lambda: _check_unfinished(run, jobs, sharing))
    dealt = [job for job in jobs if deals and not job.arm.spec.is_solved]
    here = [job for job in jobs if not deals or job.arm.spec.is_solved]
    done = total - len(jobs)
    for number, job in enumerate(here, done + 1):
        _run_one(run, arm_contexts[job.arm.name], job, f"{number}/{total}")
    if dealt:
        tasks = distributed.broadcast_from_main(
            lambda: _plan_dealt(run, context, arm_contexts, dealt)
        )
        deal_tasks(run, arm_contexts, tasks, placement, done + len(here), total)
    distributed.broadcast_from_main(lambda: _remove_all_checkpoints(run))


def _check_sharing(run: Run, jobs: Sequence[Job], sharing: int) -> None:
    """Refuse to train seeds whose steps would hold other numbers of rows than those that stand.

    Args:
        run: the run.
        jobs: what is missing.
        sharing: processes that would share each step.

    Raises:
        RunFolderError: naming an arm, and how many processes shared its steps.
    """
    if all(job.arm.spec.is_solved for job in jobs):
        return
    missing = {(job.arm.name, job.seed) for job in jobs}
    stand = [
        (arm.name, seed) for arm in run.arms if not arm.spec.is_solved
        for seed in run.recipe.measure.seeds if (arm.name, seed) not in missing
    ]  # fmt: skip
    for name, seed in stand:
        reads = run_folder.read_manifest(run.arm_folder(name, seed)).reads
        before = reads.get("processes", sharing)
        if before != sharing:
            raise RunFolderError(
                f"{run.folder}: processes that share each step: {before} -> {sharing}, for {name} "
                f"seed {seed} and those that are missing; their steps would hold other numbers of "
                "rows",
                f"Launch it as before, set measure.parallel to {'arms' if before == 1 else 'data'},"
                " or choose another --output",
            )


def _check_unfinished(run: Run, jobs: Sequence[Job], sharing: int) -> None:
    """Refuse to continue trainings whose inputs have changed since they were stopped."""
    for job in jobs:
        key = build_checkpoint_key(job.reads, job.arm.finetune.training, sharing)
        check_unfinished(run.folder, run.checkpoints(job.arm.name, job.seed), key)
        if job.arm.spec.schedule == "rate_search":
            check_unfinished(run.folder, _get_trials_folder(run), key)


def _run_one(run: Run, context: ExperimentContext, job: Job, count: str) -> None:
    """Run one arm and seed on all processes, and report it."""

    def report(arm: ArmFile, seconds: float, note: str) -> None:
        run.say(console.format_arm_line(arm, run.recipe.measure.metric, count, seconds))
        if note:
            run.say(f"    {note}")

    with show_activity(f"[{count}] {job.arm.name} seed {job.seed}"):
        run_job(run, context, job, report)


def _plan_dealt(
    run: Run, context: ExperimentContext, arm_contexts: ArmContexts, jobs: Sequence[Job]
) -> list[Task]:
    """Plan the tasks of the jobs, and compute the frozen features that they start from."""
    chosen = {job.arm.name for job in jobs if is_rate_chosen(run, job)}
    chosen |= {job.arm.name for job in jobs if is_weight_chosen(run, job.arm, job.reads)}
    for job in jobs:
        if _starts_from_probe(job.arm):
            own = arm_contexts[job.arm.name]
            own.extract_features(
                job.arm.finetune.pooling, job.seed, own.select_train_rows(job.seed)
            )
    arms = [job.arm for job in jobs]
    units = RowCosts(1.0, 1.0, {arm.name: STEP_PASSES for arm in arms})
    costs = estimate_trained_arms(context, arms, run.recipe, units)
    return plan_tasks([(job.arm, job.seed) for job in jobs], run.recipe, costs, chosen)


def _starts_from_probe(arm: Arm) -> bool:
    """Return True where training reads the probe of frozen features."""
    terms = () if arm.retain is None else arm.retain.regularizers
    in_loss = any(term.reads_task_head for term in terms)
    return not arm.spec.is_baseline and (arm.finetune.head_init == "probe" or in_loss)


def _remove_finished_checkpoints(run: Run, jobs: list[Job]) -> None:
    """Remove the checkpoints of arms that are finished."""
    missing = [(job.arm.name, job.seed) for job in jobs]
    for arm in run.arms:
        for seed in run.recipe.measure.seeds:
            if (arm.name, seed) not in missing:
                shutil.rmtree(run.checkpoints(arm.name, seed), ignore_errors=True)


def _remove_all_checkpoints(run: Run) -> None:
    """Remove what is left once every arm is finished: also of arms that the recipe has dropped, of
    their adaptations, and of a search that was cut off between its end and its cleaning."""
    checkpoints = run.folder / "checkpoints"
    for folder in checkpoints.glob("*/"):
        shutil.rmtree(folder)
    with suppress(OSError):  # there is none, or it holds a file that is not ours
        checkpoints.rmdir()


def run_job(
    run: Run, context: ExperimentContext, job: Job, report: ArmReport, sharers: int = 1
) -> None:
    """Train on all processes, or solve on the main one, and write the arm's folder. Collective.

    Args:
        run: the run.
        context: the arm's.
        job: the arm and the seed.
        report: called on the main process once the arm is written.
        sharers: see `measure_energy`.
    """
    started = time.perf_counter()
    if job.arm.spec.is_solved:
        distributed.broadcast_from_main(
            lambda: _commit_arm(run, context, job, _run_arm(run, context, job), report, started)
        )
        return
    if job.arm.spec.schedule == "rate_search":
        # What its trials spend is measured trial by trial, whichever process makes them.
        search_scratch_rate(run, context, job, sharers)
    with measure_energy(sharers) as energy:
        outcome = _run_arm(run, context, job)
    for name, spent in energy.items():
        outcome.timings[name] = outcome.timings.get(name, 0.0) + spent
    distributed.broadcast_from_main(
        lambda: _commit_arm(run, context, job, outcome, report, started)
    )


def _commit_arm(
    run: Run, context: ExperimentContext, job: Job, outcome: ArmOutput, report: ArmReport,
    started: float,
) -> None:  # fmt: skip
    arm, seed = job.arm, job.seed
    folder = run.arm_folder(arm.name, seed)
    with run_folder.commit_stage(folder, job.reads) as aside:
        arm_files.write_arm(aside, context.prepared, outcome, arm.name, arm.strategy, seed)
    shutil.rmtree(run.checkpoints(arm.name, seed), ignore_errors=True)
    report(arm_files.read_metrics_file(folder), time.perf_counter() - started, outcome.note)


def _list_missing_jobs(run: Run, arm_contexts: ArmContexts) -> list[Job]:
    """Return every arm and seed that is not finished, with all that it depends on."""
    return [
        Job(arm, seed, reads)
        for arm in sorted(run.arms, key=lambda arm: list(STRATEGIES).index(arm.strategy))
        for reads in [build_arm_inputs(run.recipe, arm_contexts[arm.name], arm)]
        for seed in run.recipe.measure.seeds
        if not is_stage_finished(run.folder, run.arm_folder(arm.name, seed), reads)
    ]


def _run_arm(run: Run, context: ExperimentContext, job: Job) -> ArmOutput:
    arm, seed = job.arm, job.seed
    if arm.spec.is_solved:
        return baselines.solve_arm(context, arm, seed)
    key = build_checkpoint_key(job.reads, arm.finetune.training, distributed.get_world_size())
    checkpoints = CheckpointSpec(run.checkpoints(arm.name, seed), key)
    if arm.spec.schedule == "rate_search":
        chosen = run.read_scratch_search()
        trained_as = {"rate": chosen.learning_rate, "share": chosen.share}
        trial = distributed.broadcast_from_main(lambda: _find_trial(run, job, chosen))
        if trial is not None:
            return baselines.predict_trial(context, arm.finetune, seed, trial)
        return baselines.train_scratch(
            context, arm.finetune, run.recipe.measure.scratch, chosen, seed,
            replace(checkpoints, cache_key={**key, **trained_as}),
        )  # fmt: skip
    facts = TrainingFacts()
    if arm.retain is not None and arm.retain.has_auto_weight:
        chosen = choose_kl_weight(run, context, arm, job.reads)
        arm = replace(arm, retain=set_kl_weight(arm.retain, chosen.weight))
        facts = TrainingFacts(kl_weight=chosen)
    retention = build_retention(context, arm, seed, run.folder)
    warn_of_weak_probe(retention, arm, seed, run.say)
    output = train_arm(context, arm.finetune, seed, retention, checkpoints)
    output.facts = output.facts.merge(facts)
    return output


def search_scratch_rate(run: Run, context: ExperimentContext, job: Job, sharers: int = 1) -> None:
    """Search scratch's learning rate and length once, on the first seed. Collective.

    `sharers` as of `measure_energy`.
    """
    if not distributed.broadcast_from_main(lambda: is_rate_chosen(run, job)):
        search = baselines.search_rate(
            context, job.arm.finetune, run.recipe.measure.scratch, run.recipe.measure.seeds[0],
            run.say, partial(_try_rate_once, run, job, sharers),
        )  # fmt: skip

        def keep() -> None:
            with run_folder.commit_stage(_get_search_folder(run), job.reads) as aside:
                run_folder.write_text(aside / "search.json", to_json(search.to_dict()))
            chosen = _get_trial_folder(run, search.learning_rate, search.share)
            for folder in _get_trials_folder(run).glob("*/"):
                if folder != chosen:
                    shutil.rmtree(folder)

        distributed.broadcast_from_main(keep)
        run.say(f"  scratch: {describe_scratch_search(search)}")


def is_rate_chosen(run: Run, job: Job) -> bool:
    """Return True if the learning rate of scratch was searched under the same recipe."""
    stored = run_folder.read_stage_inputs(_get_search_folder(run)) or {}
    return {**stored, "asked": job.reads.get("asked")} == job.reads


def try_scratch_rate(
    run: Run, context: ExperimentContext, job: Job, rate: float, sharers: int = 1
) -> None:
    """Try one of the learning rates that the recipe gives, for the search to read. Collective.

    `sharers` as of `measure_energy`.
    """
    baselines.try_given_rate(
        context, job.arm.finetune, run.recipe.measure.scratch, rate,
        run.recipe.measure.seeds[0], run.say, partial(_try_rate_once, run, job, sharers),
    )  # fmt: skip


def _try_rate_once(
    run: Run, job: Job, sharers: int, rate: float, share: float,
    attempt: Callable[[CheckpointSpec | None], Trial],
) -> TriedRate:  # fmt: skip
    """Return what a learning rate has come to over a share of the budget, tried where no process
    has done so. Collective."""
    trained_as = {"seed": run.recipe.measure.seeds[0], "rate": rate, "share": share}
    stage, reads = _get_trial_folder(run, rate, share), {**job.reads, **trained_as}
    if distributed.broadcast_from_main(lambda: run_folder.read_stage_inputs(stage)) != reads:
        training, processes = job.arm.finetune.training, distributed.get_world_size()
        key = {**build_checkpoint_key(job.reads, training, processes), **trained_as}
        steps = stage.with_name(f"steps-{stage.name}")
        with measure_energy(sharers) as energy:
            trial = attempt(CheckpointSpec(steps, key))

        def keep() -> None:
            with run_folder.commit_stage(stage, reads) as aside:
                baselines.write_trial(aside, trial, energy)
            shutil.rmtree(steps, ignore_errors=True)

        distributed.broadcast_from_main(keep)
    return baselines.read_trial_score(stage)


def _find_trial(run: Run, job: Job, chosen: ScratchSearch) -> Path | None:
    """Return the folder of the trial that has trained what this job is to; None: there is none."""
    if job.seed != run.recipe.measure.seeds[0]:
        return None
    rate, share = chosen.learning_rate, chosen.share
    stage = _get_trial_folder(run, rate, share)
    # The recipe's first seed may be another than that of the search.
    reads = {**job.reads, "seed": job.seed, "rate": rate, "share": share}
    return stage if run_folder.read_stage_inputs(stage) == reads else None


def _get_trial_folder(run: Run, rate: float, share: float) -> Path:
    return _get_trials_folder(run) / f"rate-{rate:.6g}-{share:.2g}"


def _get_search_folder(run: Run) -> Path:
    return run.folder / "phases" / "search"


def _get_trials_folder(run: Run) -> Path:
    return run.folder / "checkpoints" / "rates"
