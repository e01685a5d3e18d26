"""What leaves the run: the card and the publish folders."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from hftl import rundir
from hftl.card.adaptation import render_adapted
from hftl.card.benchmark import EVERY_EVAL, benchmark_files
from hftl.card.card import render_card
from hftl.card.examples import told_examples, widget_examples
from hftl.card.forgetting import was_measured
from hftl.card.plots import plot_frontier, plot_ladder
from hftl.card.report import Picture, render_report
from hftl.data import pixels, prepare
from hftl.measure.mistakes import Errors, errors_of, sample_outputs
from hftl.publish.told import place_of, publishable
from hftl.record import to_json


def write_publish(run: Path, record: dict[str, Any]) -> None:
    """publish/ and report.html, written aside and put in place together."""
    aside = run / ".tmp-publish"
    shutil.copytree(run / "phases" / "package" / "model", aside)
    told = json.loads(to_json(publishable(record)))
    errors, picture = _errors(run, told)
    if told["recipe"]["publish"].get("examples"):
        told["examples"] = told_examples(errors.mistakes, picture, aside)
        prepared = prepare.read(run / "phases" / "data")
        told["widget"] = widget_examples(sample_outputs(prepared, _arm(run, told)))
    plot_ladder(told, aside / "assets" / "ladder.png")
    if was_measured(told):
        plot_frontier(told, aside / "assets" / "frontier.png")
    card = render_card(told, place_of(told))
    rundir.write_text(aside / "README.md", card)
    rundir.write_text(aside / "hftl.json", to_json(told))
    for name, text in benchmark_files(told, first_written(run)).items():
        (aside / name).parent.mkdir(exist_ok=True)
        rundir.write_text(aside / name, text)
    report = render_report(card, aside, told, errors, picture)
    put_in_place(run, aside, "publish")
    if (run / "phases" / "package" / "base").exists():
        write_base_card(run, told)
    elif (run / "publish-base").exists():
        shutil.rmtree(run / "publish-base")
    rundir.write_text(run / "report.html", report)


def report(run: Path, told: dict[str, Any], card: str) -> str | None:
    """report.html anew; None where the run lost what it shows.

    Args:
        run: a finished run.
        told: the record as it is published.
        card: the text of the card.
    """
    if not told["arms"]:
        return render_report(card, run / "publish", told)
    parts = [run / "phases" / "data", _arm(run, told)]
    if told["data"]["modality"] == "image":
        parts.append(run / "phases" / "pixels")
    if not all(part.exists() for part in parts):
        return None
    return render_report(card, run / "publish", told, *_errors(run, told))


def first_written(run: Path) -> str:
    """Return when the benchmark's files were made first, in seconds since 1970: now, or before."""
    path = run / "publish" / EVERY_EVAL
    if not path.exists():
        return str(int(time.time()))
    return json.loads(path.read_text(encoding="utf-8"))["retrieved_timestamp"]


def _errors(run: Path, record: dict[str, Any]) -> tuple[Errors, Picture | None]:
    """What the published weights get wrong on test, and the pictures where rows are pictures."""
    phases = run / "phases"
    errors = errors_of(prepare.read(phases / "data"), _arm(run, record))
    images = record["data"]["modality"] == "image"
    return errors, pixels.stored(phases / "pixels").__getitem__ if images else None


def _arm(run: Path, record: dict[str, Any]) -> Path:
    return run / "arms" / f"{record['own_arm']}-seed{record['published_seed']}"


def write_base_card(run: Path, told: dict[str, Any]) -> None:
    """publish-base/: the adapted base that the adapter is put on, which must be pushed first."""
    aside = run / ".tmp-publish-base"
    shutil.copytree(run / "phases" / "package" / "base", aside)
    rundir.write_text(aside / "README.md", render_adapted(told))
    rundir.write_text(aside / "hftl.json", to_json(told))
    put_in_place(run, aside, "publish-base")


def put_in_place(run: Path, aside: Path, name: str) -> None:
    """A finished folder takes the place of the one of that name."""
    target, old = run / name, run / f".tmp-old-{name}"
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)
