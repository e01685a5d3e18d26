"""Evaluate an adaptation without a task: record, verdict, card and publish folder."""

import shutil
from pathlib import Path

from hftl.card.card import render_adaptation_card
from hftl.card.report import render_report
from hftl.card.wording import format_adaptation_sentence
from hftl.data.facts import DataFacts
from hftl.data.image_inputs import ImageInputs
from hftl.finetune.context import ExperimentContext
from hftl.measure.record import (
    PUBLISHED_FILE,
    RECORD_FILE,
    SCHEMA_VERSION,
    Record,
    describe_environment,
)
from hftl.measure.verdict import decide_adaptation_verdict
from hftl.pipeline.finalize_record import (
    build_adaptation_section,
    build_source_section,
    replace_folder,
    update_record,
)
from hftl.pipeline.run import FinishedStage, Run
from hftl.publish.export import export_encoder
from hftl.publish.sanitize import sanitize_record
from hftl.runtime import run_folder
from hftl.runtime.hardware import get_dtype_name
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
    inputs = {
        "recipe": run.recipe.to_dict(),
        "adapt": [run_folder.hash_stage(stage.folder) for stage in stages],
    }
    last = stages[-1].context
    record = update_record(
        run.folder, inputs, publish,
        lambda: _build_adaptation_record(run, context, stages),
        lambda record: _write_publish_folder(run.folder, last, record),
    )  # fmt: skip
    lines = ["", format_adaptation_sentence(record), f"verdict: {record.verdict.decision}"]
    lines += [f"  {reason}" for reason in record.verdict.reasons]
    lines += ["", f"record   {run.folder}/{RECORD_FILE}"]
    if publish:
        lines += [f"card     {run.folder}/publish/README.md"]
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
        forward=context.inputs.arguments if isinstance(context.inputs, ImageInputs) else None,
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
        run_folder.check_finished_files(run)
        aside = run / ".tmp-publish"
        shutil.copytree(run / "publish", aside)
        _write_adaptation_card(run, aside, Record.read(run))
        run_folder.write_finished_files(run)


def _write_publish_folder(run: Path, context: ExperimentContext, record: Record) -> None:
    """Write publish/ and report.html aside, and put them in place together."""
    aside = run / ".tmp-publish"
    aside.mkdir()
    export_encoder(context, aside)
    _write_adaptation_card(run, aside, record)


def _write_adaptation_card(run: Path, aside: Path, record: Record) -> None:
    published = sanitize_record(record)
    card = render_adaptation_card(published, published.place)
    run_folder.write_text(aside / "README.md", card)
    run_folder.write_text(aside / PUBLISHED_FILE, published.to_json())
    report = render_report(card, aside, published)
    replace_folder(run, aside, "publish")
    run_folder.write_text(run / "report.html", report)
