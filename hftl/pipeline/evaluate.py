"""From finished arms to record, verdict, card and publish folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hftl import console
from hftl.card.card import format_gain_sentence
from hftl.card.result_sections import format_adaptation_sentence, has_forgetting
from hftl.config.recipe import Arm, Recipe
from hftl.data.image_inputs import ImageInputs
from hftl.data.labels import recognize_tag_scheme
from hftl.errors import RunFolderError
from hftl.finetune import arm_files
from hftl.finetune.context import MEASURED_SPLITS, ExperimentContext
from hftl.measure.error_analysis import average_metrics, compute_class_gains
from hftl.measure.gain import (
    build_ladder,
    compute_transfer_gain,
    describe_adaptation_outcome,
    find_best_seed,
    select_lesser_gain,
    summarize_adaptation,
)
from hftl.measure.metrics import Metric
from hftl.measure.paired_comparison import collect_predictions
from hftl.measure.record import SCHEMA_VERSION, Record, describe_environment
from hftl.measure.verdict import decide_verdict
from hftl.models.source import hash_source_weights
from hftl.pipeline.adaptation import FinishedStage
from hftl.pipeline.arms import ArmContexts, Run
from hftl.pipeline.finalize_record import write_publish_folder
from hftl.pipeline.forgetting import build_forgetting_section
from hftl.publish.checks import measure_reload_difference
from hftl.publish.export import export_base, export_model, rebuild_model, write_reload_sample
from hftl.publish.sanitize import strip_parents
from hftl.runtime import hardware, run_folder
from hftl.runtime.fingerprints import fingerprint, to_json
from hftl.runtime.hardware import get_dtype_name
from hftl.runtime.paths import PACKAGE_PREFIX
from hftl.runtime.progress import show_activity


def evaluate_run(
    this: Run,
    bench: ExperimentContext,
    benches: ArmContexts,
    steps: list[FinishedStage],
    metric: Metric,
    publish: bool,
) -> Record:
    """Measures, proves the reload, decides, and writes what is not there yet.

    Args:
        this: the run, every arm finished.
        bench: the source as it is, and the rows.
        benches: what each arm worked with.
        steps: the recipe's adaptations.
        metric: what gains are measured in.
        publish: whether card, report and publish folder are wanted too.
    """
    run, recipe = this.folder, this.recipe
    folders = {
        arm.name: [run / "arms" / f"{arm.name}-seed{seed}" for seed in recipe.measure.seeds]
        for arm in this.arms
    }
    inputs = {
        "recipe": recipe.to_dict(),
        "arms": {
            name: [run_folder.hash_stage(f) for f in found] for name, found in folders.items()
        },
        "adapt": [run_folder.hash_stage(step.folder) for step in steps],
        "data": run_folder.hash_stage(run / "phases" / "data"),
    }
    record = update_record(
        run, inputs, publish,
        lambda: build_record(this, bench, benches, steps, metric, folders),
        lambda told: write_publish_folder(run, told),
    )  # fmt: skip
    this.say(_format_summary(record, publish))
    return record


def update_record(
    run: Path, inputs: dict[str, Any], publish: bool, measured: Callable[[], dict[str, Any]],
    published: Callable[[dict[str, Any]], None],
) -> Record:  # fmt: skip
    """The record, made anew where what it comes from has changed or a file of it is lost.

    Args:
        run: the run folder.
        inputs: what the record comes from.
        publish: whether the publish folder is wanted.
        measured: makes the record's content.
        published: writes the publish folder of a record.
    """
    done = run / run_folder.REPORT_STAGE
    # A publish folder that stands already must not fall behind the record.
    publish = publish or (run / "publish").exists()
    stamp = fingerprint({"inputs": fingerprint(inputs), "publish": publish})
    if (run_folder.read_stage_inputs(done) or {}).get(
        "inputs"
    ) != stamp or not run_folder.is_intact(run):
        with show_activity("measuring"):
            record = measured()
        if publish:
            with show_activity("card and report"):
                published(record)
        run_folder.write_text(run / "record.json", to_json(record))
        run_folder.write_finished_files(run, stamp)
    return Record.read(run)


def build_record(
    this: Run,
    bench: ExperimentContext,
    benches: ArmContexts,
    steps: list[FinishedStage],
    metric: Metric,
    folders: dict[str, list[Path]],
) -> dict[str, Any]:
    """The record's content: every figure from the arms' files."""
    recipe, run, arms = this.recipe, this.folder, this.arms
    own = arms[0]
    told, entries = collect_predictions(folders, bench.prepared, metric)
    best = find_best_seed(metric, told["validation"], own.name)
    seed = recipe.measure.seeds[best]
    difference = _package_best_seed(run, benches[own.name], own, seed, folders[own.name][best])
    gain = compute_transfer_gain(metric, told["test"], own.name)
    baseline = gain["baseline"] if gain else None
    rows = build_ladder(metric, told["validation"], told["test"], own.name)
    over = {row["arm"]: row["gain_of_own"] for row in rows}
    adapted = build_adaptation_section(steps, benches[own.name], over.get("source"), own.strategy)
    search = run / "phases" / "search" / "search.json"
    timings = {path.name: _read_timings(path) for found in folders.values() for path in found}
    scratch = any(arm.strategy == "scratch" for arm in arms)
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": recipe.to_dict(),
        "source": build_source_section(bench),
        "data": _build_data_section(recipe, bench),
        "check": bench.run_preflight(recipe.data.max_length, arms),
        "forward": bench.inputs.arguments if isinstance(bench.inputs, ImageInputs) else None,
        "adapt": adapted,
        "metric": metric.name,
        "own_arm": own.name,
        "arms": entries,
        "scratch_search": _read_search(search) if scratch else None,
        "ladder": rows,
        "transfer_gain": gain,
        "test_metrics": average_metrics(entries, own.name),
        "classes": compute_class_gains(told["test"], own.name, baseline, _list_classes(bench)),
        "forgetting": build_forgetting_section(this, bench, folders),
        "reload_difference": difference,
        "verdict": decide_verdict(gain, over.get("head"), difference, over.get("source")),
        "published_seed": seed,
        "environment": describe_environment(bench.device, get_dtype_name(recipe.finetune.training))
        | _estimate_energy(recipe, timings),
        "timings": timings,
    }  # fmt: skip


def _estimate_energy(recipe: Recipe, timings: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the energy of the trainings and its CO2, as far as they are known."""
    spent = hardware.sum_energy(timings)
    stated = recipe.publish.emissions
    return spent | hardware.compute_emissions(spent, stated and stated.grams_per_kwh)


def build_adaptation_section(
    steps: list[FinishedStage],
    own: ExperimentContext | None,
    gain: dict[str, Any] | None,
    strategy: str,
) -> dict[str, Any] | None:
    """What the record tells of the recipe's adaptations; None without any.

    Args:
        steps: the adaptations, one after the other.
        own: what the own arm worked with.
        gain: the own arm's gain over `source`.
        strategy: the own arm's; an adapter needs an adapted base of its own, a whole model none.
    """
    if not steps:
        return None
    stages = [summarize_adaptation(step.facts) for step in steps]
    bench = own or steps[-1].context
    base = None
    if bench.base_is_adapted and strategy == "lora":
        base = {"weights_sha256": hash_source_weights(bench.public_base)}
    words = describe_adaptation_outcome(stages, gain)
    if gain is not None:
        gain = select_lesser_gain({"source": gain})
    return {"stages": stages, "gain": gain, "outcome": words, "base": base}


def _package_best_seed(
    run: Path, bench: ExperimentContext, own: Arm, seed: int, arm_folder: Path
) -> float:
    """The best seed's model as it will be published, and the proof that it reloads."""
    folder = run / "phases" / "package"
    reads = {
        "arm": run_folder.hash_stage(arm_folder),
        "base": str(bench.public_base.public_id),
        "revision": bench.public_base.revision,
        "loras": [run_folder.hash_file(path) for path in bench.lora_factors],
    }
    if run_folder.read_stage_inputs(folder) != reads:
        model = rebuild_model(bench, own.finetune, seed, arm_folder / arm_files.WEIGHTS)
        with run_folder.commit_stage(folder, reads) as aside:
            (aside / "model").mkdir()
            export_model(bench, model, own.finetune, aside / "model")
            if own.strategy == "lora" and bench.base_is_adapted:
                export_base(bench, aside / "base")
            sample = write_reload_sample(bench, arm_files.read_logits(arm_folder, "test"), aside)
            with show_activity("reloading in a fresh process"):
                difference = measure_reload_difference(
                    aside / "model", bench.public_base.folder, sample, bench.device
                )
            run_folder.write_text(aside / "reload.json", to_json({"difference": difference}))
    return json.loads((folder / "reload.json").read_text("utf-8"))["difference"]


def build_source_section(bench: ExperimentContext) -> dict[str, Any]:
    """What the record tells of the source model."""
    source = bench.source
    return {
        "model": source.name,
        "name": source.public_id or strip_parents(source.name),
        "local": source.is_local and not source.name.startswith(PACKAGE_PREFIX),
        "published_as": source.public_id,
        "revision": source.revision,
        "architecture": source.architecture,
        "weights_sha256": bench.weights_hash,
    }


def _build_data_section(recipe: Recipe, bench: ExperimentContext) -> dict[str, Any]:
    """The data's facts, its name, and how many labels were read."""
    facts = bench.prepared.facts
    drawn = [bench.select_train_rows(seed) for seed in recipe.measure.seeds]
    if any(stage.guard in (None, "probe") for stage in recipe.stages):
        drawn.append(bench.select_train_rows(recipe.data.seed))
    train = {row.content: row for rows in drawn for row in rows}
    held = [row for split in MEASURED_SPLITS for row in bench.prepared.rows[split]]
    words = bench.prepared.count_words
    return {
        **facts.to_record(),
        "name": recipe.data.train.path
        if "train" in facts.hub_revisions
        else strip_parents(recipe.data.train.path),
        "labels_read": {
            "train_per_seed": sum(words(drawn[0])),
            "total": sum(words([*train.values(), *held])),
        },
    }


def _list_classes(bench: ExperimentContext) -> list[str]:
    """Return the classes of a row as a whole, for words the types of entities; none for a
    target."""
    names = bench.prepared.names
    words = bench.prepared.task == "token-classification"
    return recognize_tag_scheme(tuple(names)).types if words else names


def _read_search(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def _read_timings(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text("utf-8"))["timings"]


def _format_summary(record: Record, publish: bool) -> str:
    tree, run = record.tree, record.folder
    lines = ["", console.format_ladder(tree)]
    if has_forgetting(tree):
        lines += ["", console.format_forgetting(tree)]
    lines += ["", format_gain_sentence(tree)]
    if tree["adapt"]:
        lines.append(format_adaptation_sentence(tree))
    lines.append(f"verdict: {record.verdict['decision']}")
    lines += [f"  {reason}" for reason in record.verdict["reasons"]]
    lines += ["", f"record   {run}/record.json"]
    if publish:
        lines += [f"card     {run}/publish/README.md", f"report   {run}/report.html"]
        lines += ["", "next:", f"  hftl predict {run} INPUT"]
        if record.verdict["decision"] == "publish":
            lines.append(f"  hftl publish {run} --dry-run")
    return "\n".join(lines)


def rewrite_card(run: Path) -> None:
    """Writes card and report again from the record of a finished run.

    Raises:
        RunFolderError: if the run has no record or was changed since, or is in use.
    """
    if not (run / "record.json").exists() or not (run / "phases" / "package").exists():
        raise RunFolderError(f"{run} has no record", "Finish it with `hftl run`")
    with run_folder.lock_run(run):
        # What the card is written from must be what was measured, or it would vouch for the rest.
        run_folder.check_finished_files(run, "record.json")
        record = Record.read(run).tree
        arm = f"arms/{record['own_arm']}-seed{record['published_seed']}"
        for part in ("phases/package", "phases/data", arm):
            if run_folder.read_stage_inputs(run / part) is None:
                raise RunFolderError(f"{run / part} is missing", "Run the same `hftl run` again")
        write_publish_folder(run, record)
        run_folder.write_finished_files(run)
