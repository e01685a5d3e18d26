"""Run the adapt phase: every adaptation that an arm needs, each made once in a folder."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hftl import console
from hftl.adapt import adaptation as training
from hftl.adapt.adaptation import estimate_adaptation_seconds
from hftl.adapt.encoder_io import merge_encoder_state, set_trainable, write_encoder
from hftl.adapt.guard import AdaptationFacts, HeadTraining, summarize_adaptation
from hftl.config.adapt import Adapt
from hftl.config.recipe import Recipe
from hftl.finetune.context import ExperimentContext
from hftl.models.architectures import count_shared_layers
from hftl.models.encoders import check_block_count, count_blocks
from hftl.models.lora_concat import check_concatenable, extract_factors, save_factors
from hftl.models.source import SourceModel, hash_source_weights
from hftl.pipeline.cache_keys import build_adapt_key, build_checkpoint_key, build_context_inputs
from hftl.pipeline.changed_inputs import check_unfinished, is_stage_finished
from hftl.pipeline.corpora import Corpus, build_corpus
from hftl.pipeline.objectives import (
    build_adaptation_task,
    build_guard_metric,
    build_guard_rule,
    build_objective,
    check_objective,
    list_adaptation_warnings,
)
from hftl.pipeline.run import ArmContexts, FinishedStage, Run
from hftl.runtime import distributed, run_folder
from hftl.runtime.progress import show_activity
from hftl.runtime.run_folder import StageInputs, to_json
from hftl.train.step_checkpoint import CheckpointSpec

HEAD_FILE, FACTS_FILE = "head.safetensors", "told.json"


@dataclass(frozen=True)
class _StageJob:
    """Hold an adaptation that is to be made."""

    run: Run
    plain: ExperimentContext
    """The source as it is, which the guard compares with."""
    before: list[FinishedStage]
    """The adaptations that it goes on from."""
    stage: Adapt
    corpus: Corpus
    folder: Path
    reads: StageInputs
    """What it depends on."""

    @property
    def context(self) -> ExperimentContext:
        """Return what it starts from."""
        return self.before[-1].context if self.before else self.plain

    @property
    def work(self) -> Path:
        """Return the folder of its checkpoints."""
        return self.run.folder / "checkpoints" / self.folder.name

    @property
    def checkpoint_key(self) -> StageInputs:
        """Return what its checkpoints depend on."""
        return build_checkpoint_key(self.reads, self.stage.training, distributed.get_world_size())


def run_adaptations(
    run: Run, context: ExperimentContext
) -> tuple[ArmContexts, list[FinishedStage]]:
    """Run every adaptation that is missing.

    Returns:
        What each arm works with, and the steps of the recipe's own adaptation.
    """
    known: dict[str, FinishedStage] = {}
    own = _run_stages(run, context, run.recipe.stages, "adapt", known)
    arm_contexts = {}
    for arm in run.arms:
        steps = _run_stages(run, context, list(arm.stages), f"adapt-{arm.name}", known)
        arm_contexts[arm.name] = steps[-1].context if steps else context
    return arm_contexts, own


def _run_stages(
    run: Run,
    context: ExperimentContext,
    stages: list[Adapt],
    name: str,
    known: dict[str, FinishedStage],
) -> list[FinishedStage]:
    """Run adaptations one after the other; those that another arm shares run once."""
    steps: list[FinishedStage] = []
    for number in range(1, len(stages) + 1):
        key = json.dumps([s.model_dump(mode="json") for s in stages[:number]], sort_keys=True)
        if key not in known:
            folder = run.folder / "phases" / f"{name}-{number}"
            known[key] = _run_stage(run, context, steps, stages, folder)
        steps.append(known[key])
    return steps


def _run_stage(
    run: Run,
    context: ExperimentContext,
    before: list[FinishedStage],
    stages: list[Adapt],
    folder: Path,
) -> FinishedStage:
    """Run one adaptation, or read it where it is finished."""
    number = len(before) + 1
    stage = stages[number - 1]
    here = before[-1].context if before else context
    corpus = build_corpus(run, here, stage)
    reads: StageInputs = {
        "recipe": build_adapt_key(run.recipe, stages, number),
        "corpus": corpus.fingerprint,
        **build_context_inputs(here),
    }
    job = _StageJob(run, context, before, stage, corpus, folder, reads)
    if not distributed.broadcast_from_main(lambda: is_stage_finished(run.folder, folder, reads)):
        distributed.broadcast_from_main(
            lambda: check_unfinished(run.folder, job.work, job.checkpoint_key)
        )
        with show_activity(f"adapt {stage.objective} {stage.method} [{number}/{len(stages)}]"):
            _adapt_stage(job)
    else:
        distributed.broadcast_from_main(lambda: shutil.rmtree(job.work, ignore_errors=True))
    facts = run_folder.read_part(folder / FACTS_FILE, AdaptationFacts)
    run.say(console.format_adaptation(summarize_adaptation(facts)))
    if facts.weights_sha256 is None:
        return FinishedStage(here, facts, folder)
    source = replace(
        here.source, folder=folder / "encoder", architecture=here.source.model_type,
        public_id=None, revision=None,
    )  # fmt: skip
    head = folder / HEAD_FILE if stage.objective != "mae" else None
    base, loras = None, ()
    if stage.method == "lora":
        base, loras = here.public_base, (*here.lora_factors, folder / "lora.safetensors")
    return FinishedStage(
        here.with_encoder(source, facts.weights_sha256, base, loras, head), facts, folder
    )


def check_adaptations(recipe: Recipe, source: SourceModel) -> None:
    """Refuse what no adaptation of this source can do, before a row is read.

    Raises:
        RecipeError: for an objective that the architecture has not, too many blocks, or an adapter
            that cannot be joined with another exactly.
    """
    for arm in recipe.arms:
        joined = [stage for stage in arm.stages if stage.method == "lora"]
        if joined and arm.spec.trains_adapter:
            check_concatenable(arm.finetune.lora, "finetune.lora", last=True)
    for stage in recipe.all_stages:
        check_objective(stage, source)
        if stage.method != "full":
            check_concatenable(stage.lora, "adapt.lora")
        if stage.method == "lora+blocks":
            check_block_count(
                "adapt",
                stage.blocks,
                count_blocks(source.config),
                count_shared_layers(source.config),
            )


def _adapt_stage(job: _StageJob) -> None:
    """Train a new head, adapt, and write what the guard allows."""
    run, plain, stage, corpus = job.run, job.plain, job.stage, job.corpus
    seed, context = run.recipe.data.seed, job.context
    head = _prepare_head(job)
    model, _ = build_objective(context, plain, stage, seed, head / HEAD_FILE)
    set_trainable(model, context.source.architecture_spec, stage.method, stage.blocks, stage.lora)
    model.to(context.device)
    rule = build_guard_rule(run.recipe, stage, job.before[0].facts if job.before else None)
    task = build_adaptation_task(context, plain, stage, corpus, seed)
    steps = training.count_steps(stage, len(task.train))  # pyright: ignore
    for warning in list_adaptation_warnings(stage, len(corpus.train), len(corpus.held_out)):
        run.say(f"  warning: {warning}")
    seconds = distributed.broadcast_from_main(
        lambda: estimate_adaptation_seconds(model, task, stage, context.device)
    )
    run.say(f"  adapt {stage.objective} {stage.method}: {len(task.train):,} "  # pyright: ignore
             f"{'pictures' if stage.objective == 'mae' else 'blocks'}, {steps} steps, "
             f"about {console.format_duration(seconds)}")  # fmt: skip
    result = training.adapt_encoder(
        model, task, stage, rule, build_guard_metric(run.recipe, plain, rule, corpus, model), seed,
        context.device, CheckpointSpec(job.work / "steps", job.checkpoint_key),
    )  # fmt: skip
    facts = AdaptationFacts(
        objective=stage.objective,
        method=stage.method,
        guard=rule.guard,
        tolerance=rule.tolerance,
        relative=rule.relative,
        transductive=stage.transductive,
        corpus=corpus.facts,
        warmed=run_folder.read_part(head / FACTS_FILE, HeadTraining),
        **vars(result),
    )
    distributed.broadcast_from_main(lambda: _commit_stage(job, model, facts, head))
    distributed.broadcast_from_main(lambda: shutil.rmtree(job.work))


def _prepare_head(job: _StageJob) -> Path:
    """Return the folder of the objective's head: the source's own, or one trained on the corpus,
    from where an earlier adaptation has left it."""
    head, reads = job.work / "head", job.checkpoint_key
    if distributed.broadcast_from_main(lambda: run_folder.read_stage_inputs(head) == reads):
        return head
    seed, context = job.run.recipe.data.seed, job.context
    plain, stage = job.plain, job.stage
    _, lacking = build_objective(plain, plain, stage, seed, None)
    last = _find_previous_head(job.before[-1].folder if job.before else None, stage)
    model, _ = build_objective(context, plain, stage, seed, last)
    facts = HeadTraining(steps=0, loss=None)
    if lacking:
        # The encoder stands still, so that no teacher has to hold it.
        task = build_adaptation_task(
            context, plain, stage.model_copy(update={"distill": 0.0}), job.corpus, seed
        )
        model.to(context.device)
        with show_activity("the objective's new head"):
            facts = training.train_new_head(
                model, lacking, task, stage, seed, context.device,
                CheckpointSpec(job.work / "head-steps", reads),
            )  # fmt: skip

    def keep() -> None:
        with run_folder.commit_stage(head, reads) as aside:
            save_file(_to_cpu(model.head_state()), aside / HEAD_FILE)
            run_folder.write_text(aside / FACTS_FILE, to_json(facts.to_dict()))

    distributed.broadcast_from_main(keep)
    return head


def _find_previous_head(before: Path | None, stage: Adapt) -> Path | None:
    """Return the head of the adaptation before, where it had the same objective."""
    if before is None:
        return None
    facts = run_folder.read_part(before / FACTS_FILE, AdaptationFacts)
    return before / HEAD_FILE if facts.objective == stage.objective else None


def _commit_stage(job: _StageJob, model: Any, facts: AdaptationFacts, head: Path) -> None:
    """Write what the adaptation leaves: its figures, its head, and the encoder if it changed."""
    source = job.context.source
    with run_folder.commit_stage(job.folder, job.reads) as aside:
        if facts.kept == "adapted":
            write_encoder(source, merge_encoder_state(model), aside / "encoder")
            changed_source = replace(source, folder=aside / "encoder")
            facts = facts.model_copy(update={"weights_sha256": hash_source_weights(changed_source)})
            save_file(_to_cpu(model.head_state()), aside / HEAD_FILE)
            if job.stage.method == "lora":
                save_factors(extract_factors(model.encoder), aside / "lora.safetensors")
        else:
            shutil.copy(head / HEAD_FILE, aside / HEAD_FILE)
        run_folder.write_text(aside / FACTS_FILE, to_json(facts.to_dict()))


def _to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
