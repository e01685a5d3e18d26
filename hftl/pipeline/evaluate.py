"""Evaluate finished arms: scores, reload proof, gain and verdict in the record, then the card."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import JsonValue
from torch import nn

from hftl import console
from hftl.card.card import format_gain_sentence
from hftl.card.wording import format_adaptation_sentence, has_forgetting
from hftl.config.recipe import Arm, Recipe
from hftl.data.labels import recognize_tag_scheme
from hftl.finetune.arm_files import WEIGHTS, read_logits
from hftl.finetune.context import ExperimentContext
from hftl.measure.error_analysis import compute_class_gains
from hftl.measure.facts import SliceSection
from hftl.measure.gain import (
    SplitPredictions,
    average_metrics,
    build_ladder,
    compute_transfer_gain,
    find_best_seed,
    read_arms,
)
from hftl.measure.metrics import Metric
from hftl.measure.record import (
    RECORD_FILE,
    SCHEMA_VERSION,
    Environment,
    Record,
    Verdict,
    describe_environment,
)
from hftl.measure.slices import measure_slices
from hftl.measure.verdict import judge_record
from hftl.models.features import predict_logits
from hftl.pipeline.advice import build_advice_section
from hftl.pipeline.cache_keys import build_record_key
from hftl.pipeline.forgetting import build_forgetting_section
from hftl.pipeline.placement import choose_placement
from hftl.pipeline.publish_folder import write_publish_folder
from hftl.pipeline.record_sections import (
    build_adaptation_section,
    build_data_section,
    build_source_section,
)
from hftl.pipeline.run import ArmContexts, FinishedStage, Run
from hftl.pipeline.score_sections import build_score_sections, fit_published_thresholds
from hftl.pipeline.slices import read_slices
from hftl.publish.checks import measure_reload_difference
from hftl.publish.export import (
    export_base,
    export_model,
    rebuild_model,
    select_sample_logits,
    select_sample_rows,
    write_reload_sample,
)
from hftl.publish.prediction_check import check_predictions
from hftl.runtime import finished_files, hardware, run_folder
from hftl.runtime.hardware import get_dtype_name
from hftl.runtime.progress import show_activity
from hftl.runtime.run_folder import to_json
from hftl.train.facts import ArmFile, ScratchSearch

PENDING = Verdict(decision="hold", reasons=["not judged yet"])
"""The verdict of a record whose figures are complete and that is not judged."""


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
    folder, own = run.folder, run.arms[0]
    own_context = arm_contexts[own.name]
    # A publish folder of an earlier call must not fall behind the record.
    has_card = publish or (folder / "publish").exists()
    key = build_record_key(run.recipe, _hash_stages(run, stages), has_card)
    if not finished_files.is_finished(folder, key):
        with show_activity("measuring"):
            test, arm_files = read_arms(_list_arm_folders(run), context.prepared, metric)
            seed = find_best_seed(metric, arm_files, own.name)
            difference = package_model(run, own_context, own, seed)
            record = build_record(
                run, context, own_context, stages, metric, test, arm_files, seed, difference
            )
        if has_card:
            with show_activity("card and report"):
                write_publish_folder(folder, record)
        run_folder.write_text(folder / RECORD_FILE, record.to_json())
        finished_files.write_finished_files(folder, key)
    record = Record.read(folder)
    run.say(_format_summary(record, publish))
    return record


def _list_arm_folders(run: Run) -> dict[str, list[Path]]:
    """Return the folders of each arm, one a seed."""
    seeds = run.recipe.measure.seeds
    return {arm.name: [run.arm_folder(arm.name, seed) for seed in seeds] for arm in run.arms}


def _hash_stages(run: Run, stages: list[FinishedStage]) -> dict[str, JsonValue]:
    """Return the hashes of all that the record comes from."""
    phases, general = run.folder / "phases", run.recipe.data.general
    return {
        "arms": {
            name: [run_folder.hash_stage(folder) for folder in folders]
            for name, folders in _list_arm_folders(run).items()
        },
        "adapt": [run_folder.hash_stage(stage.folder) for stage in stages],
        "data": run_folder.hash_stage(phases / "data"),
        "analyses": {
            name: run_folder.hash_stage(run.analysis_folder(name))
            for name in run.recipe.measure.analyses
        },
        "general": None if general is None else run_folder.hash_stage(phases / "general-rows"),
    }


def build_record(
    run: Run, context: ExperimentContext, own_context: ExperimentContext,
    stages: list[FinishedStage], metric: Metric, test: SplitPredictions,
    arm_files: Sequence[ArmFile], seed: int, reload_difference: float,
) -> Record:  # fmt: skip
    """Compute the record: every figure from the arms' scores and predictions.

    Args:
        run: the run.
        context: the source as it is, and the rows.
        own_context: what the own arm worked with.
        stages: the recipe's adaptations.
        metric: what gains are measured in.
        test: what the arms predicted on test.
        arm_files: the scores and facts of every arm and seed.
        seed: of the own arm, whose weights are published.
        reload_difference: see `package_model`.
    """
    recipe, own = run.recipe, run.arms[0]
    gain = compute_transfer_gain(metric, test, own.name, recipe.measure.equivalence_margin)
    ladder = build_ladder(metric, arm_files, test, own.name, recipe.measure.equivalence_margin)
    source_gain = next((row.gain_of_own for row in ladder if row.arm == "source"), None)
    baseline = gain.baseline if gain else None
    scores = build_score_sections(recipe, context, run.arm_folder(own.name, seed))
    analysis = run.read_analyses()
    sharing = choose_placement(context, recipe).sharing
    timings = {run.arm_folder(file.arm, file.seed).name: file.timings for file in arm_files}
    record = Record(
        schema_version=SCHEMA_VERSION,
        recipe=recipe,
        source=build_source_section(context),
        data=build_data_section(recipe, context),
        check=context.run_preflight(recipe, run.arms, sharing),
        advice=build_advice_section(recipe, context, run.arms, arm_files, analysis),
        forward=context.inputs.forward_facts,
        adapt=build_adaptation_section(stages, own_context, source_gain, own.spec.trains_adapter),
        metric=metric.name,
        own_arm=own.name,
        arms=[file.drop_timings() for file in arm_files],
        scratch_search=_read_search(run),
        ladder=ladder,
        transfer_gain=gain,
        test_metrics=average_metrics(arm_files, own.name),
        classes=compute_class_gains(test, own.name, baseline, _list_classes(context)),
        slices=_measure_slices(run, context, metric, test, baseline),
        calibration=scores.calibration,
        thresholds=scores.thresholds,
        conformal=scores.conformal,
        abstention=scores.abstention,
        forgetting=build_forgetting_section(run, context, _list_arm_folders(run)),
        reload_difference=reload_difference,
        weight_files=_list_weight_files(run),
        verdict=PENDING,
        published_seed=seed,
        environment=_describe_environment(context, recipe, timings),
        timings=timings,
    )  # fmt: skip
    changes = {"verdict": judge_record(record)}
    return record.model_copy(
        update=changes if analysis is None else changes | {"analysis": analysis}
    )


def _measure_slices(
    run: Run, context: ExperimentContext, metric: Metric, test: SplitPredictions,
    baseline: str | None,
) -> SliceSection | None:  # fmt: skip
    """Return the record's section; None where the recipe names no slices."""
    columns = read_slices(run.recipe, context)
    return measure_slices(metric, test, run.arms[0].name, baseline, columns) if columns else None


def package_model(run: Run, context: ExperimentContext, arm: Arm, seed: int) -> float:
    """Export the model of an arm and seed as it will be published, and prove that it reloads.

    Returns:
        The largest difference of logits after a reload in a fresh process, see
        `measure_reload_difference`.
    """
    folder = run.folder / "phases" / "package"
    arm_folder = run.arm_folder(arm.name, seed)
    thresholds = fit_published_thresholds(run.recipe, context, arm_folder)
    reads = {
        "arm": run_folder.hash_stage(arm_folder),
        "base": str(context.public_base.public_id),
        "revision": context.public_base.revision,
        "loras": [run_folder.hash_file(path) for path in context.lora_factors],
        **({"thresholds": thresholds} if thresholds else {}),
    }
    if run_folder.read_stage_inputs(folder) != reads:
        model = rebuild_model(context, arm.finetune, seed, arm_folder / WEIGHTS)
        with run_folder.commit_stage(folder, reads) as aside:
            (aside / "model").mkdir()
            export_model(context, model, arm.finetune, aside / "model", thresholds)
            if arm.spec.trains_adapter and context.base_is_adapted:
                export_base(context, aside / "base")
            logits = _compute_sample_logits(context, model, read_logits(arm_folder, "test"))
            sample = write_reload_sample(context, logits, aside)
            with show_activity("reloading in a fresh process"):
                difference = measure_reload_difference(
                    aside / "model", context.public_base.folder, sample, context.device,
                    run.waiting,
                )  # fmt: skip
            run_folder.write_text(aside / "reload.json", to_json({"difference": difference}))
    return json.loads((folder / "reload.json").read_text("utf-8"))["difference"]


def _list_weight_files(run: Run) -> dict[str, str]:
    """Return the hash of each file of tensors whose reload was proved, by its name."""
    files = run_folder.read_manifest(run.folder / "phases" / "package").files
    paths = {Path(name): digest for name, digest in files.items()}
    return {
        path.name: digest
        for path, digest in paths.items()
        if path.parent.name == "model" and path.suffix == ".safetensors"
    }


def _describe_environment(
    context: ExperimentContext, recipe: Recipe, timings: dict[str, dict[str, float]]
) -> Environment:
    """Return versions and hardware, and how the arms were placed on it."""
    placement, dtype = choose_placement(context, recipe), get_dtype_name(recipe.finetune.training)
    threads = placement.threads or torch.get_num_threads() if context.device == "cpu" else None
    return describe_environment(
        context.device, dtype, _estimate_energy(recipe, timings), placement.processes, threads
    )


def _compute_sample_logits(
    context: ExperimentContext, model: nn.Module, stored: np.ndarray
) -> np.ndarray:
    """Return the logits of the sample's rows in stock classes; the stored ones must equal them."""
    rows = context.encode_rows(
        [context.prepared.rows["test"][i] for i in select_sample_rows(context)]
    )
    model.to(context.device)
    logits = predict_logits(model, rows, context.inputs, context.device, stock=True)
    check_predictions(select_sample_logits(context, stored), logits, context.prepared.task)
    return logits


def _estimate_energy(recipe: Recipe, timings: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the energy of the trainings and its CO2, as far as they are known."""
    spent = hardware.sum_energy(timings)
    stated = recipe.publish.emissions
    return spent | hardware.compute_emissions(spent, stated and stated.grams_per_kwh)


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


def _advise_on_seeds(seed: int) -> str:
    """Return how to go on after a run of one seed, of which nothing is published."""
    seeds = ", ".join(str(seed + n) for n in range(3))
    return f'the same command with "measure.seeds=[{seeds}]": what stands is kept'


def _format_summary(record: Record, publish: bool) -> str:
    run = record.folder
    lines = ["", console.format_ladder(record)]
    if has_forgetting(record):
        lines += ["", console.format_forgetting(record)]
    lines += ["", format_gain_sentence(record)]
    if record.slices is not None:
        lines.append(console.format_slices(record.slices))
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
        elif len(record.recipe.measure.seeds) == 1:
            lines.append(f"  {_advise_on_seeds(record.recipe.measure.seeds[0])}")
    return "\n".join(lines)
