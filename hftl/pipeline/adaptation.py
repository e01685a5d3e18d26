"""The adapt phase: every adaptation that an arm asks for, each made once and kept as a folder."""

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
from hftl.config.adapt import Adapt
from hftl.config.recipe import Recipe
from hftl.errors import RunFolderError
from hftl.finetune.context import ExperimentContext
from hftl.measure.gain import summarize_adaptation
from hftl.models.architectures import count_layers
from hftl.models.encoders import check_block_count, count_blocks
from hftl.models.lora_concat import check_concatenable, extract_factors, save_factors
from hftl.models.source import SourceModel, hash_source_weights
from hftl.pipeline.arms import ArmContexts, Run
from hftl.pipeline.cache_keys import build_adapt_key
from hftl.pipeline.corpora import Corpus, build_corpus, estimate_rows
from hftl.pipeline.objectives import (
    build_adaptation_task,
    build_guard_metric,
    build_guard_rule,
    build_objective,
    check_objective,
)
from hftl.runtime import distributed, run_folder
from hftl.runtime.fingerprints import to_json
from hftl.runtime.progress import show_activity

HEAD_FILE = "head.safetensors"
MIN_STEPS = 10
"""Steps below which an adaptation hardly moves the encoder."""


@dataclass(frozen=True)
class FinishedStage:
    """One adaptation that stands: what comes after it starts from `bench`."""

    context: ExperimentContext
    facts: dict[str, Any]
    folder: Path


def run_adaptations(this: Run, bench: ExperimentContext) -> tuple[ArmContexts, list[FinishedStage]]:
    """Makes every adaptation that is missing.

    Returns:
        What each arm works with, and the steps of the recipe's own adaptation.
    """
    known: dict[str, FinishedStage] = {}
    own = _run_stages(this, bench, this.recipe.stages, "adapt", known)
    benches = {}
    for arm in this.arms:
        steps = _run_stages(this, bench, list(arm.stages), f"adapt-{arm.name}", known)
        benches[arm.name] = steps[-1].context if steps else bench
    return benches, own


def _run_stages(
    this: Run,
    bench: ExperimentContext,
    stages: list[Adapt],
    name: str,
    known: dict[str, FinishedStage],
) -> list[FinishedStage]:
    """One adaptation after the other; those that another arm has made already are taken."""
    steps: list[FinishedStage] = []
    for number in range(1, len(stages) + 1):
        key = json.dumps([s.model_dump(mode="json") for s in stages[:number]], sort_keys=True)
        if key not in known:
            folder = this.folder / "phases" / f"{name}-{number}"
            known[key] = _run_stage(this, bench, steps, stages, folder)
        steps.append(known[key])
    return steps


def _run_stage(
    this: Run,
    bench: ExperimentContext,
    before: list[FinishedStage],
    stages: list[Adapt],
    folder: Path,
) -> FinishedStage:
    """One adaptation, made where it does not stand."""
    number = len(before) + 1
    stage = stages[number - 1]
    here = before[-1].context if before else bench
    corpus = build_corpus(this, here, stage)
    reads = {
        "recipe": build_adapt_key(this.recipe, stages, number),
        "weights": here.weights_hash,
        "corpus": corpus.fingerprint,
        "data": bench.prepared.facts.fingerprint,
    }
    if not distributed.broadcast_from_main(lambda: _is_stage_finished(this, folder, reads)):
        with show_activity(f"adapt {stage.objective} {stage.method} [{number}/{len(stages)}]"):
            _adapt_stage(this, bench, before, stage, corpus, folder, reads)
    else:
        work = this.folder / "checkpoints" / folder.name
        distributed.broadcast_from_main(lambda: shutil.rmtree(work, ignore_errors=True))
    told = json.loads((folder / "told.json").read_text("utf-8"))
    this.say(console.format_adaptation(summarize_adaptation(told)))
    if told["kept"] == "original":
        return FinishedStage(here, told, folder)
    source = replace(
        here.source, folder=folder / "encoder", architecture=here.source.model_type,
        public_id=None, revision=None,
    )  # fmt: skip
    weights = told["weights_sha256"]
    head = folder / HEAD_FILE if stage.objective == "mlm" else None
    base, loras = None, ()
    if stage.method == "lora":
        base, loras = here.public_base, (*here.lora_factors, folder / "lora.safetensors")
    return FinishedStage(here.with_encoder(source, weights, base, loras, head), told, folder)


def check_adaptations(recipe: Recipe, source: SourceModel) -> None:
    """Refuses what no adaptation of this source can do, before a row is read.

    Raises:
        RecipeError: for an objective that the architecture has not, too many blocks, or an adapter
            that cannot be joined with another exactly.
    """
    for arm in recipe.arms:
        joined = [stage for stage in arm.stages if stage.method == "lora"]
        if joined and arm.spec.publishes_adapter:
            check_concatenable(arm.finetune.lora, "finetune.lora", last=True)
    for stage in recipe.all_stages:
        check_objective(stage, source)
        if stage.method != "full":
            check_concatenable(stage.lora, "adapt.lora")
        if stage.method == "lora+blocks":
            check_block_count(
                "adapt", stage.blocks, count_blocks(source.config), count_layers(source.config)
            )


def warn_of_few_steps(recipe: Recipe, bench: ExperimentContext) -> list[str]:
    """Of adaptations that will have hardly any steps, as far as it is known before they are made:
    of train's own inputs, and where the steps are given."""
    found: list[str] = []
    for stage in recipe.all_stages:
        rows = estimate_rows(recipe.data, bench, stage)
        if rows is not None or stage.training.get("max_steps", 0) > 0:
            found += _describe_few_steps(
                stage, training.count_steps(stage.training, rows or 0), "about "
            )
    return list(dict.fromkeys(found))


def _describe_few_steps(stage: Adapt, steps: int, about: str = "") -> list[str]:
    """What there is to say of so many steps."""
    if steps >= MIN_STEPS:
        return []
    return [
        f"adapt: {stage.objective} {stage.method} has {about}{steps} optimizer steps, too few to "
        "learn a domain; give a larger corpus, more adapt.training.num_train_epochs, or a smaller "
        "per_device_train_batch_size"
    ]


def _is_stage_finished(this: Run, folder: Path, reads: dict[str, Any]) -> bool:
    """Whether an adaptation is finished and what is asked.

    Raises:
        RunFolderError: if it was made from another source model, corpus or data.
    """
    found = run_folder.read_stage_inputs(folder)
    if found is None or found["recipe"] != reads["recipe"]:
        return False
    if found != reads:
        what = next(key for key in reads if found.get(key) != reads[key])
        raise RunFolderError(
            f"{this.folder} was made with another {what}: {folder.name} does not fit",
            "Put it back, choose another --output, or start over with --restart",
        )
    return True


def _adapt_stage(
    this: Run,
    plain: ExperimentContext,
    before: list[FinishedStage],
    stage: Adapt,
    corpus: Corpus,
    folder: Path,
    reads: dict[str, Any],
) -> None:
    """Warms the head, adapts, and keeps what the guard allows.

    Args:
        this: the run.
        plain: the source as it is, which the guard compares with.
        before: the adaptations that this one goes on from.
        stage: the recipe's section.
        corpus: what it learns from.
        folder: where it is kept.
        reads: what it depends on.
    """
    seed = this.recipe.data.seed
    bench = before[-1].context if before else plain
    work = this.folder / "checkpoints" / folder.name
    head = _prepare_head(this, plain, before, stage, corpus, work, reads)
    model, _ = build_objective(bench, plain, stage, seed, head / HEAD_FILE)
    set_trainable(model, bench.source.architecture_spec, stage.method, stage.blocks, stage.lora)
    model.to(bench.device)
    rule = build_guard_rule(this.recipe, stage, before[0].facts if before else None)
    task = build_adaptation_task(bench, plain, stage, corpus, seed)
    steps = training.count_steps(stage.training, len(task.train))  # pyright: ignore
    for warning in _describe_few_steps(stage, steps):
        this.say(f"  warning: {warning}")
    seconds = distributed.broadcast_from_main(
        lambda: estimate_adaptation_seconds(model, task, stage, bench.device)
    )
    this.say(f"  adapt {stage.objective} {stage.method}: {len(task.train):,} "  # pyright: ignore
             f"{'blocks' if stage.objective == 'mlm' else 'pictures'}, {steps} steps, "
             f"about {console.format_duration(seconds)}")  # fmt: skip
    found = training.adapt_encoder(
        model, task, stage, rule, build_guard_metric(this.recipe, plain, rule, corpus, model), seed,
        bench.device, work / "steps",
    )  # fmt: skip
    told = {
        "objective": stage.objective,
        "method": stage.method,
        "guard": rule.guard,
        "tolerance": rule.tolerance,
        "relative": rule.relative,
        "transductive": stage.transductive,
        "corpus": corpus.facts,
        "warmed": json.loads((head / "told.json").read_text("utf-8")),
        **found,
    }
    distributed.broadcast_from_main(
        lambda: _commit_stage(bench, stage, model, told, head, folder, reads)
    )
    distributed.broadcast_from_main(lambda: shutil.rmtree(work))


def _prepare_head(
    this: Run,
    plain: ExperimentContext,
    before: list[FinishedStage],
    stage: Adapt,
    corpus: Corpus,
    work: Path,
    reads: dict[str, Any],
) -> Path:
    """The folder of the objective's head: the source's own, or one that was warmed on the corpus,
    from where an earlier adaptation has left it."""
    head = work / "head"
    # Checkpoints of another number of processes are of other steps.
    reads = reads | {"processes": distributed.get_world_size()}

    def stands() -> bool:
        if run_folder.read_stage_inputs(head) == reads:
            return True
        # What an adaptation of other settings has left here is of no use.
        shutil.rmtree(work, ignore_errors=True)
        return False

    if distributed.broadcast_from_main(stands):
        return head
    seed = this.recipe.data.seed
    bench = before[-1].context if before else plain
    _, lacking = build_objective(plain, plain, stage, seed, None)
    last = _find_previous_head(before[-1].folder if before else None, stage)
    model, _ = build_objective(bench, plain, stage, seed, last)
    told: dict[str, Any] = {"steps": 0, "loss": None}
    if lacking:
        # The encoder stands still, so that no teacher has to hold it.
        task = build_adaptation_task(
            bench, plain, stage.model_copy(update={"distill": 0.0}), corpus, seed
        )
        model.to(bench.device)
        with show_activity("the objective's new head"):
            told = training.train_new_head(model, lacking, task, stage, seed, bench.device)

    def keep() -> None:
        with run_folder.commit_stage(head, reads) as aside:
            save_file(_to_cpu(model.head_state()), aside / HEAD_FILE)
            run_folder.write_text(aside / "told.json", to_json(told))

    distributed.broadcast_from_main(keep)
    return head


def _find_previous_head(before: Path | None, stage: Adapt) -> Path | None:
    """The head of the adaptation before, where it had the same objective."""
    if before is None:
        return None
    told = json.loads((before / "told.json").read_text("utf-8"))
    return before / HEAD_FILE if told["objective"] == stage.objective else None


def _commit_stage(
    bench: ExperimentContext,
    stage: Adapt,
    model: Any,
    told: dict[str, Any],
    head: Path,
    folder: Path,
    reads: dict[str, Any],
) -> None:
    """Writes what the adaptation leaves: its figures, its head, and the encoder if it changed."""
    with run_folder.commit_stage(folder, reads) as aside:
        if told["kept"] == "adapted":
            write_encoder(bench.source, merge_encoder_state(model), aside / "encoder")
            changed_source = replace(bench.source, folder=aside / "encoder")
            told["weights_sha256"] = hash_source_weights(changed_source)
            save_file(_to_cpu(model.head_state()), aside / HEAD_FILE)
            if stage.method == "lora":
                save_factors(extract_factors(model.encoder), aside / "lora.safetensors")
        else:
            shutil.copy(head / HEAD_FILE, aside / HEAD_FILE)
        run_folder.write_text(aside / "told.json", to_json(told))


def _to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
