"""Evaluate finished arms: record, verdict, card and publish folder."""

import json
from pathlib import Path

from hftl import console
from hftl.card.card import format_gain_sentence
from hftl.card.wording import format_adaptation_sentence, has_forgetting
from hftl.config.recipe import Arm, Recipe
from hftl.data.facts import DataFacts, LabelCounts
from hftl.data.image_inputs import ImageInputs
from hftl.data.labels import recognize_tag_scheme
from hftl.data.splits import MEASURED_SPLITS
from hftl.errors import RunFolderError
from hftl.finetune import arm_files
from hftl.finetune.context import ExperimentContext
from hftl.finetune.strategies import PROBE_ARM
from hftl.measure.error_analysis import compute_class_gains
from hftl.measure.gain import (
    average_metrics,
    build_ladder,
    collect_predictions,
    compute_transfer_gain,
    find_best_seed,
)
from hftl.measure.metrics import Metric
from hftl.measure.record import SCHEMA_VERSION, Record, describe_environment
from hftl.measure.verdict import decide_verdict
from hftl.pipeline.finalize_record import (
    build_adaptation_section,
    build_source_section,
    update_record,
    write_publish_folder,
)
from hftl.pipeline.forgetting import build_forgetting_section
from hftl.pipeline.run import ArmContexts, FinishedStage, Run
from hftl.publish.checks import measure_reload_difference
from hftl.publish.export import export_base, export_model, rebuild_model, write_reload_sample
from hftl.publish.sanitize import strip_parents
from hftl.runtime import hardware, run_folder
from hftl.runtime.hardware import get_dtype_name
from hftl.runtime.progress import show_activity
from hftl.runtime.run_folder import to_json
from hftl.train.facts import ScratchSearch


def evaluate_run(
    run: Run,
    context: ExperimentContext,
    arm_contexts: ArmContexts,
    stages: list[FinishedStage],
    metric: Metric,
    publish: bool,
) -> Record:
    """Measure, prove the reload, decide, and write what is missing.

    Args:
        run: the run, every arm finished.
        context: the source as it is, and the rows.
        arm_contexts: what each arm worked with.
        stages: the recipe's adaptations.
        metric: what gains are measured in.
        publish: whether to write card, report and publish folder too.
    """
    recipe = run.recipe
    folders = {
        arm.name: [run.arm_folder(arm.name, seed) for seed in recipe.measure.seeds]
        for arm in run.arms
    }
    inputs = {
        "recipe": recipe.to_dict(),
        "arms": {
            name: [run_folder.hash_stage(f) for f in seeds] for name, seeds in folders.items()
        },
        "adapt": [run_folder.hash_stage(stage.folder) for stage in stages],
        "data": run_folder.hash_stage(run.folder / "phases" / "data"),
    }
    record = update_record(
        run.folder, inputs, publish,
        lambda: build_record(run, context, arm_contexts, stages, metric, folders),
        lambda record: write_publish_folder(run.folder, record),
    )  # fmt: skip
    run.say(_format_summary(record, publish))
    return record


def build_record(
    run: Run,
    context: ExperimentContext,
    arm_contexts: ArmContexts,
    stages: list[FinishedStage],
    metric: Metric,
    folders: dict[str, list[Path]],
) -> Record:
    """Compute the record: every figure from the arms' files."""
    recipe, arms = run.recipe, run.arms
    own = arms[0]
    splits, entries = collect_predictions(folders, context.prepared, metric)
    best = find_best_seed(metric, splits["validation"], own.name)
    seed = recipe.measure.seeds[best]
    difference = _package_best_seed(
        run.folder, arm_contexts[own.name], own, seed, folders[own.name][best]
    )
    test = splits["test"]
    gain = compute_transfer_gain(metric, test, own.name)
    ladder = build_ladder(metric, splits["validation"], test, own.name)
    over = {row.arm: row.gain_of_own for row in ladder}
    timings = {
        path.name: arm_files.read_metrics_file(path).timings
        for seeds in folders.values()
        for path in seeds
    }
    classes = compute_class_gains(
        test, own.name, gain.baseline if gain else None, _list_classes(context)
    )
    return Record(
        schema_version=SCHEMA_VERSION,
        recipe=recipe,
        source=build_source_section(context),
        data=_build_data_section(recipe, context),
        check=context.run_preflight(recipe, arms),
        forward=context.inputs.arguments if isinstance(context.inputs, ImageInputs) else None,
        adapt=build_adaptation_section(
            stages, arm_contexts[own.name], over.get("source"), own.spec.trains_adapter
        ),
        metric=metric.name,
        own_arm=own.name,
        arms=entries,
        scratch_search=_read_search(run),
        ladder=ladder,
        transfer_gain=gain,
        test_metrics=average_metrics(entries, own.name),
        classes=classes,
        forgetting=build_forgetting_section(run, context, folders),
        reload_difference=difference,
        verdict=decide_verdict(gain, over.get(PROBE_ARM), difference, over.get("source")),
        published_seed=seed,
        environment=describe_environment(
            context.device, get_dtype_name(recipe.finetune.training),
            _estimate_energy(recipe, timings),
        ),
        timings=timings,
    )  # fmt: skip


def _estimate_energy(recipe: Recipe, timings: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the energy of the trainings and its CO2, as far as they are known."""
    spent = hardware.sum_energy(timings)
    stated = recipe.publish.emissions
    return spent | hardware.compute_emissions(spent, stated and stated.grams_per_kwh)


def _package_best_seed(
    run: Path, context: ExperimentContext, own: Arm, seed: int, arm_folder: Path
) -> float:
    """Export the best seed's model as it will be published; return the largest difference of
    logits after a reload in a fresh process."""
    folder = run / "phases" / "package"
    reads = {
        "arm": run_folder.hash_stage(arm_folder),
        "base": str(context.public_base.public_id),
        "revision": context.public_base.revision,
        "loras": [run_folder.hash_file(path) for path in context.lora_factors],
    }
    if run_folder.read_stage_inputs(folder) != reads:
        model = rebuild_model(context, own.finetune, seed, arm_folder / arm_files.WEIGHTS)
        with run_folder.commit_stage(folder, reads) as aside:
            (aside / "model").mkdir()
            export_model(context, model, own.finetune, aside / "model")
            if own.spec.trains_adapter and context.base_is_adapted:
                export_base(context, aside / "base")
            sample = write_reload_sample(context, arm_files.read_logits(arm_folder, "test"), aside)
            with show_activity("reloading in a fresh process"):
                difference = measure_reload_difference(
                    aside / "model", context.public_base.folder, sample, context.device
                )
            run_folder.write_text(aside / "reload.json", to_json({"difference": difference}))
    return json.loads((folder / "reload.json").read_text("utf-8"))["difference"]


def _build_data_section(recipe: Recipe, context: ExperimentContext) -> DataFacts:
    """Return the data's facts, its name, and how many labels were read."""
    facts = context.prepared.facts
    draws = [context.select_train_rows(seed) for seed in recipe.measure.seeds]
    if any(stage.guard in (None, "probe") for stage in recipe.stages):
        draws.append(context.select_train_rows(recipe.data.seed))
    train = {row.content: row for rows in draws for row in rows}
    measured = [row for split in MEASURED_SPLITS for row in context.prepared.rows[split]]
    count_words = context.prepared.count_words
    path = recipe.data.train.path
    return DataFacts.model_validate(
        facts.to_dict()
        | {
            "name": path if "train" in facts.hub_revisions else strip_parents(path),
            "labels_read": LabelCounts(
                train_per_seed=sum(count_words(draws[0])),
                total=sum(count_words([*train.values(), *measured])),
            ),
        }
    )


def _list_classes(context: ExperimentContext) -> list[str]:
    """Return the classes of a row as a whole, for words the types of entities; none for a
    target."""
    names = context.prepared.names
    words = context.prepared.task == "token-classification"
    return recognize_tag_scheme(tuple(names)).types if words else names


def _read_search(run: Run) -> ScratchSearch | None:
    """Return the search of scratch's learning rate; None where scratch did not run."""
    if not any(arm.spec.schedule == "rate_search" for arm in run.arms):
        return None
    return run.read_scratch_search()


def _format_summary(record: Record, publish: bool) -> str:
    run = record.folder
    lines = ["", console.format_ladder(record)]
    if has_forgetting(record):
        lines += ["", console.format_forgetting(record)]
    lines += ["", format_gain_sentence(record)]
    if record.adapt is not None:
        lines.append(format_adaptation_sentence(record))
    lines.append(f"verdict: {record.verdict.decision}")
    lines += [f"  {reason}" for reason in record.verdict.reasons]
    lines += ["", f"record   {run}/record.json"]
    if publish:
        lines += [f"card     {run}/publish/README.md", f"report   {run}/report.html"]
        lines += ["", "next:", f"  hftl predict {run} INPUT"]
        if record.verdict.decision == "publish":
            lines.append(f"  hftl publish {run} --dry-run")
    return "\n".join(lines)


def rewrite_card(run: Path) -> None:
    """Write card and report again from the record of a finished run.

    Raises:
        RunFolderError: if the run has no record or was changed since, or is in use.
    """
    if not (run / "record.json").exists() or not (run / "phases" / "package").exists():
        raise RunFolderError(f"{run} has no record", "Finish it with `hftl run`")
    with run_folder.lock_run(run):
        # What the card is written from must be what was measured, or it would vouch for the rest.
        run_folder.check_finished_files(run, "record.json")
        record = Record.read(run)
        arm = f"arms/{record.own_arm}-seed{record.published_seed}"
        for part in ("phases/package", "phases/data", arm):
            if run_folder.read_stage_inputs(run / part) is None:
                raise RunFolderError(f"{run / part} is missing", "Run the same `hftl run` again")
        write_publish_folder(run, record)
        run_folder.write_finished_files(run)
