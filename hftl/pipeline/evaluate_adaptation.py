"""Evaluate an adaptation without a task: record, verdict, card and publish folder."""

import shutil
from pathlib import Path

from pydantic import JsonValue

from hftl.card.card import render_adaptation_card
from hftl.card.report import render_report
from hftl.card.wording import format_adaptation_sentence
from hftl.data.facts import DataFacts
from hftl.finetune.context import ExperimentContext
from hftl.measure.record import (
    PUBLISHED_FILE,
    RECORD_FILE,
    SCHEMA_VERSION,
    Record,
    describe_environment,
)
from hftl.measure.verdict import decide_adaptation_verdict
from hftl.pipeline.cache_keys import build_record_key
from hftl.pipeline.record_sections import build_adaptation_section, build_source_section
from hftl.pipeline.run import FinishedStage, Run
from hftl.publish.export import export_encoder
from hftl.publish.sanitize import sanitize_record
from hftl.runtime import finished_files, run_folder
from hftl.runtime.hardware import get_dtype_name
from hftl.runtime.progress import show_activity
from hftl.train.facts import CheckFacts


def evaluate_adaptation(
    run: Run, context: ExperimentContext, stages: list[FinishedStage], publish: bool
) -> None:
    """Measure, decide, and write what is missing.

    Args:
        run: the run, its adaptations finished.
        context: the source as it is.
        stages: the adaptations.
        publish: whether to write card, report and publish folder too.
    """
    folder = run.folder
    # A publish folder of an earlier call must not fall behind the record.
    has_card = publish or (folder / "publish").exists()
    hashes: dict[str, JsonValue] = {
        "adapt": [run_folder.hash_stage(stage.folder) for stage in stages],
        "data": run_folder.hash_stage(folder / "phases" / "data"),
    }
    key = build_record_key(run.recipe, hashes, has_card)
    if not finished_files.is_finished(folder, key):
        with show_activity("measuring"):
            record = _build_adaptation_record(run, context, stages)
        if has_card:
            with show_activity("card and report"):
                record = _write_publish_folder(folder, stages[-1].context, record)
        run_folder.write_text(folder / RECORD_FILE, record.to_json())
        finished_files.write_finished_files(folder, key)
    record = Record.read(folder)
    lines = ["", format_adaptation_sentence(record), f"verdict: {record.verdict.decision}"]
    lines += [f"  {reason}" for reason in record.verdict.reasons]
    lines += ["", f"record   {folder}/{RECORD_FILE}"]
    if publish:
        lines += [f"card     {folder}/publish/README.md"]
    run.say("\n".join(lines))


def _build_adaptation_record(
    run: Run, context: ExperimentContext, stages: list[FinishedStage]
) -> Record:
    recipe = run.recipe
    section = build_adaptation_section(stages, None, None, is_adapter=False)
    assert section is not None
    data = context.prepared.facts.to_dict() | {"name": Path(recipe.data.train.path).name}
    return Record(
        schema_version=SCHEMA_VERSION,
        recipe=recipe,
        source=build_source_section(context),
        data=DataFacts.model_validate(data),
        check=CheckFacts(warnings=[]),
        forward=context.inputs.forward_facts,
        adapt=section,
        metric=None,
        own_arm=None,
        arms=[],
        ladder=[],
        transfer_gain=None,
        forgetting=None,
        verdict=decide_adaptation_verdict(section.stages),
        environment=describe_environment(
            context.device, get_dtype_name(recipe.stages[-1].training)
        ),
        timings={},
    )


def is_adaptation_only_run(run: Path) -> bool:
    """Return whether a run has a record, and no arm in it."""
    return (run / RECORD_FILE).exists() and not Record.read(run).arms


def rewrite_adaptation_card(run: Path) -> None:
    """Write card and report again from the record of a finished adaptation.

    Raises:
        RunFolderError: if the run is not finished, or is in use.
    """
    with run_folder.lock_run(run):
        finished_files.check_finished_files(run)
        aside = run / ".tmp-publish"
        shutil.copytree(run / "publish", aside)
        _write_adaptation_card(run, aside, Record.read(run))
        finished_files.write_finished_files(run)


def _write_publish_folder(run: Path, context: ExperimentContext, record: Record) -> Record:
    """Write publish/ and report.html aside, and put them in place together.

    Returns:
        The record with the hashes of the files of tensors.
    """
    aside = run / ".tmp-publish"
    aside.mkdir()
    export_encoder(context, aside)
    files = {path.name: run_folder.hash_file(path) for path in sorted(aside.glob("*.safetensors"))}
    record = record.model_copy(update={"weight_files": files})
    _write_adaptation_card(run, aside, record)
    return record


def _write_adaptation_card(run: Path, aside: Path, record: Record) -> None:
    published = sanitize_record(record)
    card = render_adaptation_card(published, published.place)
    run_folder.write_text(aside / "README.md", card)
    run_folder.write_text(aside / PUBLISHED_FILE, published.to_json())
    report = render_report(card, aside, published)
    run_folder.replace_folder(aside, run / "publish")
    run_folder.write_text(run / "report.html", report)
