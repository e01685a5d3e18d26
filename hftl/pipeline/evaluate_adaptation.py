"""From a finished adaptation without a task to its record, verdict, card and publish folder."""

import json
import shutil
from pathlib import Path
from typing import Any

from hftl.card.report import render_report
from hftl.card.result_sections import adaptation_sentence, render_adapted
from hftl.data.image_processing import ImageInputs
from hftl.finetune.context import Workbench
from hftl.measure.record import SCHEMA_VERSION, Record, environment
from hftl.measure.verdict import decide_adapted
from hftl.pipeline.adaptation import Step
from hftl.pipeline.arms import Run
from hftl.pipeline.evaluate import adaptation_record, source_record, written
from hftl.pipeline.finalize_record import put_in_place
from hftl.publish.export import write_encoder_alone
from hftl.publish.sanitize import place_of, publishable
from hftl.runtime import run_folder
from hftl.runtime.fingerprints import to_json
from hftl.runtime.hardware import dtype_name


def finish_adapted(this: Run, bench: Workbench, steps: list[Step], publish: bool) -> None:
    """Measures, decides, and writes what is not there yet.

    Args:
        this: the run, its adaptations finished.
        bench: the source as it is.
        steps: the adaptations.
        publish: whether card, report and publish folder are wanted too.
    """
    inputs = {
        "recipe": this.recipe.tree(),
        "adapt": [run_folder.digest(step.folder) for step in steps],
    }
    last = steps[-1].bench
    record = written(
        this.folder, inputs, publish,
        lambda: _measure(this, bench, steps),
        lambda told: _write_publish(this.folder, last, told),
    )  # fmt: skip
    tree = record.tree
    lines = ["", adaptation_sentence(tree), f"verdict: {record.verdict['decision']}"]
    lines += [f"  {reason}" for reason in record.verdict["reasons"]]
    lines += ["", f"record   {this.folder}/record.json"]
    if publish:
        lines += [f"card     {this.folder}/publish/README.md"]
    this.say("\n".join(lines))


def _measure(this: Run, bench: Workbench, steps: list[Step]) -> dict[str, Any]:
    recipe = this.recipe
    adapted = adaptation_record(steps, None, None, "full")
    assert adapted is not None
    training = recipe.stages[-1].training
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": recipe.tree(),
        "source": source_record(bench),
        "data": bench.prepared.facts | {"name": Path(recipe.data.train.path).name},
        "check": {"warnings": []},
        "forward": bench.inputs.arguments if isinstance(bench.inputs, ImageInputs) else None,
        "adapt": adapted,
        "metric": None,
        "own_arm": None,
        "arms": [],
        "ladder": [],
        "transfer_gain": None,
        "forgetting": None,
        "verdict": decide_adapted(adapted["stages"]),
        "environment": environment(bench.device, dtype_name(training)),
        "timings": {},
    }


def adapts_only(run: Path) -> bool:
    """Whether a run has a record, and no arm in it."""
    return (run / "record.json").exists() and not Record.read(run).tree.get("arms")


def rewrite_card(run: Path) -> None:
    """Writes card and report again from the record of a finished adaptation.

    Raises:
        RunFolderError: if the run is not finished, or is in use.
    """
    with run_folder.locked(run):
        run_folder.check_finished(run)
        aside = run / ".tmp-publish"
        shutil.copytree(run / "publish", aside)
        _write_card(run, aside, Record.read(run).tree)
        run_folder.note_finished(run)


def _write_publish(run: Path, bench: Workbench, record: dict[str, Any]) -> None:
    """publish/ and report.html, written aside and put in place together."""
    aside = run / ".tmp-publish"
    aside.mkdir()
    write_encoder_alone(bench, aside)
    _write_card(run, aside, record)


def _write_card(run: Path, aside: Path, record: dict[str, Any]) -> None:
    told = json.loads(to_json(publishable(record)))
    card = render_adapted(told, place_of(told))
    run_folder.write_text(aside / "README.md", card)
    run_folder.write_text(aside / "hftl.json", to_json(told))
    report = render_report(card, aside, told)
    put_in_place(run, aside, "publish")
    run_folder.write_text(run / "report.html", report)
