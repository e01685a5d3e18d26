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
from hftl.adapt.adaptation import estimate_seconds
from hftl.adapt.encoder_io import encoder_state, set_trainable, write_encoder
from hftl.config.adapt import Adapt
from hftl.config.recipe import Recipe, arms
from hftl.errors import RecipeError, RunFolderError
from hftl.finetune.context import Workbench
from hftl.measure.gain import figures
from hftl.models.architectures import check_blocks, count_blocks, layers
from hftl.models.lora_concat import check_exact, factors_of, save_factors
from hftl.models.source import SourceModel, weights_sha256
from hftl.pipeline.arms import Benches, Run
from hftl.pipeline.cache_keys import adapt_reads
from hftl.pipeline.corpora import Corpus, corpus_of, rows_foreseen
from hftl.pipeline.objectives import check_objective, measure_of, objective, rule_of, task_of
from hftl.runtime import distributed, run_folder
from hftl.runtime.fingerprints import to_json
from hftl.runtime.progress import working

HEAD = "head.safetensors"
FEW = 10
"""Steps below which an adaptation hardly moves the encoder."""


@dataclass(frozen=True)
class Step:
    """One adaptation that stands: what comes after it starts from `bench`."""

    bench: Workbench
    told: dict[str, Any]
    folder: Path


def adapt_all(this: Run, bench: Workbench) -> tuple[Benches, list[Step]]:
    """Makes every adaptation that is missing.

    Returns:
        What each arm works with, and the steps of the recipe's own adaptation.
    """
    known: dict[str, Step] = {}
    own = _chain(this, bench, this.recipe.stages, "adapt", known)
    benches = {}
    for arm in this.arms:
        steps = _chain(this, bench, list(arm.stages), f"adapt-{arm.name}", known)
        benches[arm.name] = steps[-1].bench if steps else bench
    return benches, own


def _chain(
    this: Run, bench: Workbench, stages: list[Adapt], name: str, known: dict[str, Step]
) -> list[Step]:
    """One adaptation after the other; those that another arm has made already are taken."""
    steps: list[Step] = []
    for number in range(1, len(stages) + 1):
        key = json.dumps([s.model_dump(mode="json") for s in stages[:number]], sort_keys=True)
        if key not in known:
            folder = this.folder / "phases" / f"{name}-{number}"
            known[key] = _step(this, bench, steps, stages, folder)
        steps.append(known[key])
    return steps


def _step(
    this: Run, bench: Workbench, before: list[Step], stages: list[Adapt], folder: Path
) -> Step:
    """One adaptation, made where it does not stand."""
    number = len(before) + 1
    stage = stages[number - 1]
    here = before[-1].bench if before else bench
    corpus = corpus_of(this, here, stage)
    reads = {
        "recipe": adapt_reads(this.recipe, stages, number),
        "weights": here.weights,
        "corpus": corpus.fingerprint,
        "data": bench.prepared.facts["fingerprint"],
    }
    if not distributed.share(lambda: _stands(this, folder, reads)):
        with working(f"adapt {stage.objective} {stage.method} [{number}/{len(stages)}]"):
            _make(this, bench, before, stage, corpus, folder, reads)
    else:
        work = this.folder / "checkpoints" / folder.name
        distributed.share(lambda: shutil.rmtree(work, ignore_errors=True))
    told = json.loads((folder / "told.json").read_text("utf-8"))
    this.say(console.adaptation(figures(told)))
    if told["kept"] == "original":
        return Step(here, told, folder)
    source = replace(
        here.source, folder=folder / "encoder", architecture=here.source.model_type,
        public_id=None, revision=None,
    )  # fmt: skip
    weights = told["weights_sha256"]
    head = folder / HEAD if stage.objective == "mlm" else None
    base, loras = None, ()
    if stage.method == "lora":
        base, loras = here.public_base, (*here.loras, folder / "lora.safetensors")
    return Step(here.adapted(source, weights, base, loras, head), told, folder)


def check_stages(recipe: Recipe, source: SourceModel) -> None:
    """Refuses what no adaptation of this source can do, before a row is read.

    Raises:
        RecipeError: for an objective that the architecture has not, too many blocks, or an adapter
            that cannot be joined with another exactly.
    """
    for arm in arms(recipe):
        joined = [stage for stage in arm.stages if stage.method == "lora"]
        if joined and arm.strategy == "lora":
            check_exact(arm.finetune.lora, "finetune.lora", last=True)
    decoders = [stage.decoder for stage in recipe.stages if stage.objective == "mae"]
    if any(decoder != decoders[0] for decoder in decoders):
        raise RecipeError("adapt: the decoders of two adaptations differ", "Give both the same")
    for stage in [*recipe.stages, *(stage for arm in arms(recipe) for stage in arm.stages)]:
        check_objective(stage, source)
        if stage.method != "full":
            check_exact(stage.lora, "adapt.lora")
        if stage.method == "lora+blocks":
            check_blocks("adapt", stage.blocks, count_blocks(source.config), layers(source.config))


def step_warnings(recipe: Recipe, bench: Workbench) -> list[str]:
    """Of adaptations that will have hardly any steps, as far as it is known before they are made:
    of train's own inputs, and where the steps are given."""
    found: list[str] = []
    for stage in [*recipe.stages, *(stage for arm in arms(recipe) for stage in arm.stages)]:
        rows = rows_foreseen(recipe.data, bench, stage)
        if rows is not None or stage.training.get("max_steps", 0) > 0:
            found += _few(stage, training.steps_of(stage.training, rows or 0), "about ")
    return list(dict.fromkeys(found))


def _few(stage: Adapt, steps: int, about: str = "") -> list[str]:
    """What there is to say of so many steps."""
    if steps >= FEW:
        return []
    return [
        f"adapt: {stage.objective} {stage.method} has {about}{steps} optimizer steps, too few to "
        "learn a domain; give a larger corpus, more adapt.training.num_train_epochs, or a smaller "
        "per_device_train_batch_size"
    ]


def _stands(this: Run, folder: Path, reads: dict[str, Any]) -> bool:
    """Whether an adaptation is finished and what is asked.

    Raises:
        RunFolderError: if it was made from another source model, corpus or data.
    """
    found = run_folder.reads(folder)
    if found is None or found["recipe"] != reads["recipe"]:
        return False
    if found != reads:
        what = next(key for key in reads if found.get(key) != reads[key])
        raise RunFolderError(
            f"{this.folder} was made with another {what}: {folder.name} does not fit",
            "Put it back, choose another --output, or start over with --restart",
        )
    return True


def _make(
    this: Run, plain: Workbench, before: list[Step], stage: Adapt, corpus: Corpus, folder: Path,
    reads: dict[str, Any],
) -> None:  # fmt: skip
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
    bench = before[-1].bench if before else plain
    work = this.folder / "checkpoints" / folder.name
    head = _warmed(this, plain, before, stage, corpus, work, reads)
    model, _ = objective(bench, plain, stage, seed, head / HEAD)
    set_trainable(model, bench.source.anatomy, stage.method, stage.blocks, stage.lora)
    model.to(bench.device)
    rule = rule_of(this.recipe, stage, before[0].told if before else None)
    task = task_of(bench, plain, stage, corpus, seed)
    steps = training.steps_of(stage.training, len(task.train))  # pyright: ignore
    for warning in _few(stage, steps):
        this.say(f"  warning: {warning}")
    seconds = distributed.share(lambda: estimate_seconds(model, task, stage, bench.device))
    this.say(f"  adapt {stage.objective} {stage.method}: {len(task.train):,} "  # pyright: ignore
             f"{'blocks' if stage.objective == 'mlm' else 'pictures'}, {steps} steps, "
             f"about {console.duration(seconds)}")  # fmt: skip
    found = training.adapt(
        model, task, stage, rule, measure_of(this.recipe, plain, rule, corpus, model), seed,
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
    distributed.share(lambda: _keep(bench, stage, model, told, head, folder, reads))
    distributed.share(lambda: shutil.rmtree(work))


def _warmed(
    this: Run, plain: Workbench, before: list[Step], stage: Adapt, corpus: Corpus, work: Path,
    reads: dict[str, Any],
) -> Path:  # fmt: skip
    """The folder of the objective's head: the source's own, or one that was warmed on the corpus,
    from where an earlier adaptation has left it."""
    head = work / "head"
    # Checkpoints of another number of processes are of other steps.
    reads = reads | {"processes": distributed.size()}

    def stands() -> bool:
        if run_folder.reads(head) == reads:
            return True
        # What an adaptation of other settings has left here is of no use.
        shutil.rmtree(work, ignore_errors=True)
        return False

    if distributed.share(stands):
        return head
    seed = this.recipe.data.seed
    bench = before[-1].bench if before else plain
    _, lacking = objective(plain, plain, stage, seed, None)
    last = _last_head(before[-1].folder if before else None, stage)
    model, _ = objective(bench, plain, stage, seed, last)
    told: dict[str, Any] = {"steps": 0, "loss": None}
    if lacking:
        # The encoder stands still, so that no teacher has to hold it.
        task = task_of(bench, plain, stage.model_copy(update={"distill": 0.0}), corpus, seed)
        model.to(bench.device)
        with working("the objective's new head"):
            told = training.warm(model, lacking, task, stage, seed, bench.device)

    def keep() -> None:
        with run_folder.commit(head, reads) as aside:
            save_file(_plain(model.head_state()), aside / HEAD)
            run_folder.write_text(aside / "told.json", to_json(told))

    distributed.share(keep)
    return head


def _last_head(before: Path | None, stage: Adapt) -> Path | None:
    """The head of the adaptation before, where it had the same objective."""
    if before is None:
        return None
    told = json.loads((before / "told.json").read_text("utf-8"))
    return before / HEAD if told["objective"] == stage.objective else None


def _keep(
    bench: Workbench, stage: Adapt, model: Any, told: dict[str, Any], head: Path, folder: Path,
    reads: dict[str, Any],
) -> None:  # fmt: skip
    """Writes what the adaptation leaves: its figures, its head, and the encoder if it changed."""
    with run_folder.commit(folder, reads) as aside:
        if told["kept"] == "adapted":
            write_encoder(bench.source, encoder_state(model), aside / "encoder")
            changed_source = replace(bench.source, folder=aside / "encoder")
            told["weights_sha256"] = weights_sha256(changed_source)
            save_file(_plain(model.head_state()), aside / HEAD)
            if stage.method == "lora":
                save_factors(factors_of(model.encoder), aside / "lora.safetensors")
        else:
            shutil.copy(head / HEAD, aside / HEAD)
        run_folder.write_text(aside / "told.json", to_json(told))


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
