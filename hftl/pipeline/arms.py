"""Run the arms phase: every arm and seed that is missing, the quick ones first."""

import shutil
import time
from dataclasses import dataclass, replace

from hftl import console
from hftl.card.sections import describe_scratch_search
from hftl.config.recipe import Arm
from hftl.finetune import arm_files, baselines
from hftl.finetune.arm import train_arm
from hftl.finetune.arm_files import ArmOutput
from hftl.finetune.context import ExperimentContext
from hftl.finetune.gradual import GradualCheckpoint
from hftl.finetune.strategies import STRATEGIES
from hftl.pipeline.cache_keys import build_arm_inputs, is_stage_finished
from hftl.pipeline.kl_weight import choose_kl_weight, has_auto_weight, set_kl_weight
from hftl.pipeline.retention import build_retention, warn_of_weak_probe
from hftl.pipeline.run import ArmContexts, Run
from hftl.runtime import distributed, run_folder
from hftl.runtime.hardware import measure_energy
from hftl.runtime.progress import show_activity
from hftl.runtime.run_folder import StageInputs, to_json
from hftl.train.facts import TrainingFacts


@dataclass(frozen=True)
class Job:
    """Name one arm and seed to run, and what its folder will depend on."""

    arm: Arm
    seed: int
    reads: StageInputs


def run_arms(run: Run, arm_contexts: ArmContexts) -> None:
    """Run every arm and seed that is missing, the quick ones first."""
    jobs = distributed.broadcast_from_main(lambda: _list_missing_jobs(run, arm_contexts))
    distributed.broadcast_from_main(lambda: _remove_finished_checkpoints(run, jobs))
    total = len(run.arms) * len(run.recipe.measure.seeds)
    if jobs and len(jobs) < total:
        run.say(f"  {total - len(jobs)} of {total} arms x seeds stand already")
    for done, job in enumerate(jobs, total - len(jobs) + 1):
        with show_activity(f"[{done}/{total}] {job.arm.name} seed {job.seed}"):
            _run_job(run, arm_contexts[job.arm.name], job, f"{done}/{total}")


def _remove_finished_checkpoints(run: Run, jobs: list[Job]) -> None:
    """Remove the checkpoints of arms that are finished."""
    missing = [(job.arm.name, job.seed) for job in jobs]
    for arm in run.arms:
        for seed in run.recipe.measure.seeds:
            if (arm.name, seed) not in missing:
                shutil.rmtree(run.checkpoints(arm.name, seed), ignore_errors=True)


def _run_job(run: Run, context: ExperimentContext, job: Job, count: str) -> None:
    """Train on all processes, or solve on the main one, and write the arm's folder."""
    started = time.perf_counter()
    if job.arm.spec.is_solved:
        distributed.broadcast_from_main(
            lambda: _commit_arm(run, context, job, _run_arm(run, context, job), count, started)
        )
        return
    with measure_energy() as energy:
        outcome = _run_arm(run, context, job)
    outcome.timings |= energy
    distributed.broadcast_from_main(lambda: _commit_arm(run, context, job, outcome, count, started))


def _commit_arm(
    run: Run, context: ExperimentContext, job: Job, outcome: ArmOutput, count: str, started: float
) -> None:
    arm, seed = job.arm, job.seed
    folder = run.arm_folder(arm.name, seed)
    with run_folder.commit_stage(folder, job.reads) as aside:
        arm_files.write_arm(aside, context.prepared, outcome, arm.name, arm.strategy, seed)
    shutil.rmtree(run.checkpoints(arm.name, seed), ignore_errors=True)
    metrics_file = arm_files.read_metrics_file(folder)
    seconds = time.perf_counter() - started
    run.say(console.format_arm_line(metrics_file, run.recipe.measure.metric, count, seconds))
    if outcome.note:
        run.say(f"    {outcome.note}")


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
    if arm.spec.schedule == "rate_search":
        rate = _search_scratch_rate(run, context, job)
        return baselines.train_scratch(
            context, arm.finetune, run.recipe.measure.scratch, rate, seed
        )
    facts = TrainingFacts()
    if arm.retain is not None and has_auto_weight(arm.retain):
        chosen = choose_kl_weight(run, context, arm, job.reads)
        arm = replace(arm, retain=set_kl_weight(arm.retain, chosen.weight))
        facts = TrainingFacts(kl_weight=chosen)
    retention = build_retention(context, arm, seed, run.folder)
    warn_of_weak_probe(retention, arm, seed, run.say)
    state = GradualCheckpoint(
        run.checkpoints(arm.name, seed), {**job.reads, "processes": distributed.get_world_size()}
    )
    output = train_arm(context, arm.finetune, seed, retention, state)
    output.facts = output.facts.merge(facts)
    return output


def _search_scratch_rate(run: Run, context: ExperimentContext, job: Job) -> float:
    """Return the learning rate of scratch, searched once on the first seed."""
    folder = run.folder / "phases" / "search"
    stored = distributed.broadcast_from_main(lambda: run_folder.read_stage_inputs(folder) or {})
    if {**stored, "asked": job.reads.get("asked")} != job.reads:
        search = baselines.search_rate(
            context, job.arm.finetune, run.recipe.measure.scratch, run.recipe.measure.seeds[0],
            run.say,
        )  # fmt: skip

        def keep() -> None:
            with run_folder.commit_stage(folder, job.reads) as aside:
                run_folder.write_text(aside / "search.json", to_json(search.to_dict()))

        distributed.broadcast_from_main(keep)
        run.say(f"  scratch: {describe_scratch_search(search)}")
    return run.read_scratch_search().learning_rate
