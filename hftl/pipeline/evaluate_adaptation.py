"""From a finished adaptation without a task to its record, verdict, card and publish folder."""

import json
import shutil
from pathlib import Path
from typing import Any

from hftl.card.report import render_report
from hftl.card.result_sections import format_adaptation_sentence, render_adaptation_card
from hftl.data.image_inputs import ImageInputs
from hftl.finetune.context import ExperimentContext
from hftl.measure.record import SCHEMA_VERSION, Record, describe_environment
from hftl.measure.verdict import decide_adaptation_verdict
from hftl.pipeline.adaptation import FinishedStage
from hftl.pipeline.arms import Run
from hftl.pipeline.evaluate import build_adaptation_section, build_source_section, update_record
from hftl.pipeline.finalize_record import replace_folder
from hftl.publish.export import export_encoder
from hftl.publish.sanitize import get_load_path, sanitize_record
from hftl.runtime import run_folder
from hftl.runtime.fingerprints import to_json
from hftl.runtime.hardware import get_dtype_name


def evaluate_adaptation(
    this: Run, bench: ExperimentContext, steps: list[FinishedStage], publish: bool
) -> None:
    """Measures, decides, and writes what is not there yet.

    Args:
        this: the run, its adaptations finished.
        bench: the source as it is.
        steps: the adaptations.
        publish: whether card, report and publish folder are wanted too.
    """
    inputs = {
        "recipe": this.recipe.to_dict(),
        "adapt": [run_folder.hash_stage(step.folder) for step in steps],
    }
    last = steps[-1].context
    record = update_record(
        this.folder, inputs, publish,
        lambda: _build_adaptation_record(this, bench, steps),
        lambda told: _write_publish_folder(this.folder, last, told),
    )  # fmt: skip
    tree = record.tree
    lines = ["", format_adaptation_sentence(tree), f"verdict: {record.verdict['decision']}"]
    lines += [f"  {reason}" for reason in record.verdict["reasons"]]
    lines += ["", f"record   {this.folder}/record.json"]
    if publish:
        lines += [f"card     {this.folder}/publish/README.md"]
    this.say("\n".join(lines))


def _build_adaptation_record(
    this: Run, bench: ExperimentContext, steps: list[FinishedStage]
) -> dict[str, Any]:
    recipe = this.recipe
    adapted = build_adaptation_section(steps, None, None, "full")
    assert adapted is not None
    training = recipe.stages[-1].training
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": recipe.to_dict(),
        "source": build_source_section(bench),
        "data": bench.prepared.facts.to_record() | {"name": Path(recipe.data.train.path).name},
        "check": {"warnings": []},
        "forward": bench.inputs.arguments if isinstance(bench.inputs, ImageInputs) else None,
        "adapt": adapted,
        "metric": None,
        "own_arm": None,
        "arms": [],
        "ladder": [],
        "transfer_gain": None,
        "forgetting": None,
        "verdict": decide_adaptation_verdict(adapted["stages"]),
        "environment": describe_environment(bench.device, get_dtype_name(training)),
        "timings": {},
    }


def is_adaptation_run(run: Path) -> bool:
    """Whether a run has a record, and no arm in it."""
    return (run / "record.json").exists() and not Record.read(run).tree.get("arms")


def rewrite_adaptation_card(run: Path) -> None:
    """Writes card and report again from the record of a finished adaptation.

    Raises:
        RunFolderError: if the run is not finished, or is in use.
    """
    with run_folder.lock_run(run):
        run_folder.check_finished_files(run)
        aside = run / ".tmp-publish"
        shutil.copytree(run / "publish", aside)
        _write_adaptation_card(run, aside, Record.read(run).tree)
        run_folder.write_finished_files(run)


def _write_publish_folder(run: Path, bench: ExperimentContext, record: dict[str, Any]) -> None:
    """publish/ and report.html, written aside and put in place together."""
    aside = run / ".tmp-publish"
    aside.mkdir()
    export_encoder(bench, aside)
    _write_adaptation_card(run, aside, record)


def _write_adaptation_card(run: Path, aside: Path, record: dict[str, Any]) -> None:
    told = json.loads(to_json(sanitize_record(record)))
    card = render_adaptation_card(told, get_load_path(told))
    run_folder.write_text(aside / "README.md", card)
    run_folder.write_text(aside / "hftl.json", to_json(told))
    report = render_report(card, aside, told)
    replace_folder(run, aside, "publish")
    run_folder.write_text(run / "report.html", report)
