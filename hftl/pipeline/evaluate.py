"""From finished arms to record, verdict, card and publish folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hftl import console
from hftl.card.card import gain_sentence
from hftl.card.result_sections import adaptation_sentence, was_measured
from hftl.config.recipe import Arm, Recipe
from hftl.data.image_processing import ImageInputs
from hftl.data.labels import recognise_tags
from hftl.errors import RunFolderError
from hftl.finetune import arm_files
from hftl.finetune.context import MEASURED, Workbench
from hftl.measure.error_analysis import class_gains, mean_metrics
from hftl.measure.gain import best_seed, figures, helped, ladder, lesser_gain, transfer_gain
from hftl.measure.metrics import Metric
from hftl.measure.paired_comparison import collect
from hftl.measure.record import SCHEMA_VERSION, Record, environment
from hftl.measure.verdict import decide
from hftl.models.source import weights_sha256
from hftl.pipeline.adaptation import Step
from hftl.pipeline.arms import Benches, Run
from hftl.pipeline.finalize_record import write_publish
from hftl.pipeline.forgetting import forgetting_record
from hftl.publish.checks import reload_difference
from hftl.publish.export import rebuild, write_base, write_model, write_sample
from hftl.publish.sanitize import last_name
from hftl.runtime import hardware, run_folder
from hftl.runtime.fingerprints import fingerprint, to_json
from hftl.runtime.hardware import dtype_name
from hftl.runtime.paths import PACKAGE
from hftl.runtime.progress import working


def finish(
    this: Run, bench: Workbench, benches: Benches, steps: list[Step], metric: Metric, publish: bool
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
        "recipe": recipe.tree(),
        "arms": {name: [run_folder.digest(f) for f in found] for name, found in folders.items()},
        "adapt": [run_folder.digest(step.folder) for step in steps],
        "data": run_folder.digest(run / "phases" / "data"),
    }
    record = written(
        run, inputs, publish,
        lambda: measure(this, bench, benches, steps, metric, folders),
        lambda told: write_publish(run, told),
    )  # fmt: skip
    this.say(_summary(record, publish))
    return record


def written(
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
    done = run / run_folder.REPORT
    # A publish folder that stands already must not fall behind the record.
    publish = publish or (run / "publish").exists()
    stamp = fingerprint({"inputs": fingerprint(inputs), "publish": publish})
    if (run_folder.reads(done) or {}).get("inputs") != stamp or not run_folder.intact(run):
        with working("measuring"):
            record = measured()
        if publish:
            with working("card and report"):
                published(record)
        run_folder.write_text(run / "record.json", to_json(record))
        run_folder.note_finished(run, stamp)
    return Record.read(run)


def measure(
    this: Run, bench: Workbench, benches: Benches, steps: list[Step], metric: Metric,
    folders: dict[str, list[Path]],
) -> dict[str, Any]:  # fmt: skip
    """The record's content: every figure from the arms' files."""
    recipe, run, arms = this.recipe, this.folder, this.arms
    own = arms[0]
    told, entries = collect(folders, bench.prepared, metric)
    best = best_seed(metric, told["validation"], own.name)
    seed = recipe.measure.seeds[best]
    difference = _package(run, benches[own.name], own, seed, folders[own.name][best])
    gain = transfer_gain(metric, told["test"], own.name)
    baseline = gain["baseline"] if gain else None
    rows = ladder(metric, told["validation"], told["test"], own.name)
    over = {row["arm"]: row["gain_of_own"] for row in rows}
    adapted = adaptation_record(steps, benches[own.name], over.get("source"), own.strategy)
    search = run / "phases" / "search" / "search.json"
    timings = {path.name: _timings(path) for found in folders.values() for path in found}
    scratch = any(arm.strategy == "scratch" for arm in arms)
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": recipe.tree(),
        "source": source_record(bench),
        "data": _data(recipe, bench),
        "check": bench.check(recipe.data.max_length, arms),
        "forward": bench.inputs.arguments if isinstance(bench.inputs, ImageInputs) else None,
        "adapt": adapted,
        "metric": metric.name,
        "own_arm": own.name,
        "arms": entries,
        "scratch_search": _search(search) if scratch else None,
        "ladder": rows,
        "transfer_gain": gain,
        "test_metrics": mean_metrics(entries, own.name),
        "classes": class_gains(told["test"], own.name, baseline, _classes(bench)),
        "forgetting": forgetting_record(this, bench, folders),
        "reload_difference": difference,
        "verdict": decide(gain, over.get("head"), difference, over.get("source")),
        "published_seed": seed,
        "environment": environment(bench.device, dtype_name(recipe.finetune.training))
        | _energy(recipe, timings),
        "timings": timings,
    }  # fmt: skip


def _energy(recipe: Recipe, timings: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the energy of the trainings and its CO2, as far as they are known."""
    spent = hardware.total(timings)
    stated = recipe.publish.emissions
    return spent | hardware.emissions(spent, stated and stated.grams_per_kwh)


def adaptation_record(
    steps: list[Step], own: Workbench | None, gain: dict[str, Any] | None, strategy: str
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
    stages = [figures(step.told) for step in steps]
    bench = own or steps[-1].bench
    base = None
    if bench.base_is_ours and strategy == "lora":
        base = {"weights_sha256": weights_sha256(bench.public_base)}
    words = helped(stages, gain)
    if gain is not None:
        gain = lesser_gain({"source": gain})
    return {"stages": stages, "gain": gain, "outcome": words, "base": base}


def _package(run: Path, bench: Workbench, own: Arm, seed: int, arm_folder: Path) -> float:
    """The best seed's model as it will be published, and the proof that it reloads."""
    folder = run / "phases" / "package"
    reads = {
        "arm": run_folder.digest(arm_folder),
        "base": str(bench.public_base.public_id),
        "revision": bench.public_base.revision,
        "loras": [run_folder.sha256(path) for path in bench.loras],
    }
    if run_folder.reads(folder) != reads:
        model = rebuild(bench, own.finetune, seed, arm_folder / arm_files.WEIGHTS)
        with run_folder.commit(folder, reads) as aside:
            (aside / "model").mkdir()
            write_model(bench, model, own.finetune, aside / "model")
            if own.strategy == "lora" and bench.base_is_ours:
                write_base(bench, aside / "base")
            sample = write_sample(bench, arm_files.read_logits(arm_folder, "test"), aside)
            with working("reloading in a fresh process"):
                difference = reload_difference(
                    aside / "model", bench.public_base.folder, sample, bench.device
                )
            run_folder.write_text(aside / "reload.json", to_json({"difference": difference}))
    return json.loads((folder / "reload.json").read_text("utf-8"))["difference"]


def source_record(bench: Workbench) -> dict[str, Any]:
    """What the record tells of the source model."""
    source = bench.source
    return {
        "model": source.spec,
        "name": source.public_id or last_name(source.spec),
        "local": source.local and not source.spec.startswith(PACKAGE),
        "published_as": source.public_id,
        "revision": source.revision,
        "architecture": source.architecture,
        "weights_sha256": bench.weights,
    }


def _data(recipe: Recipe, bench: Workbench) -> dict[str, Any]:
    """The data's facts, its name, and how many labels were read."""
    facts = bench.prepared.facts
    drawn = [bench.train_rows(seed) for seed in recipe.measure.seeds]
    if any(stage.guard in (None, "probe") for stage in recipe.stages):
        drawn.append(bench.train_rows(recipe.data.seed))
    train = {row.content: row for rows in drawn for row in rows}
    held = [row for split in MEASURED for row in bench.prepared.rows[split]]
    words = bench.prepared.words
    return {
        **facts,
        "name": recipe.data.train.path
        if "train" in facts["hub_revisions"]
        else last_name(recipe.data.train.path),
        "labels_read": {
            "train_per_seed": sum(words(drawn[0])),
            "total": sum(words([*train.values(), *held])),
        },
    }


def _classes(bench: Workbench) -> list[str]:
    """Return the classes of a row as a whole, for words the types of entities; none for a
    target."""
    names = bench.prepared.names
    words = bench.prepared.task == "token-classification"
    return recognise_tags(tuple(names)).types if words else names


def _search(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def _timings(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text("utf-8"))["timings"]


def _summary(record: Record, publish: bool) -> str:
    tree, run = record.tree, record.folder
    lines = ["", console.ladder(tree)]
    if was_measured(tree):
        lines += ["", console.forgetting(tree)]
    lines += ["", gain_sentence(tree)]
    if tree["adapt"]:
        lines.append(adaptation_sentence(tree))
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
    with run_folder.locked(run):
        # What the card is written from must be what was measured, or it would vouch for the rest.
        run_folder.check_finished(run, "record.json")
        record = Record.read(run).tree
        arm = f"arms/{record['own_arm']}-seed{record['published_seed']}"
        for part in ("phases/package", "phases/data", arm):
            if run_folder.reads(run / part) is None:
                raise RunFolderError(f"{run / part} is missing", "Run the same `hftl run` again")
        write_publish(run, record)
        run_folder.note_finished(run)
