"""What leaves the run: the record without this machine's places, the card, the publish folders."""

import json
import shutil
from pathlib import Path
from typing import Any

from hftl import rundir
from hftl.card.adaptation import render_adapted
from hftl.card.card import render_card
from hftl.card.examples import told_examples
from hftl.card.forgetting import was_measured
from hftl.card.plots import plot_frontier, plot_ladder
from hftl.card.report import Picture, render_report
from hftl.data import pixels, prepare
from hftl.measure.mistakes import Errors, errors_of
from hftl.places import PACKAGE
from hftl.record import to_json


def publishable(record: dict[str, Any]) -> dict[str, Any]:
    """The record without places on this machine: a local path becomes its last name."""
    kept = json.loads(to_json(record))
    # What a bad row says is the user's data, and stays here; the count goes along.
    kept["data"].pop("bad_rows_listed")
    recipe = _without_paths(kept["recipe"])
    if kept["source"]["local"]:
        recipe["source"]["model"] = kept["source"]["model"] = kept["source"]["name"]
    for split in ("train", "validation", "test", "unlabeled", "general"):
        table = recipe["data"][split] or {}
        if "path" in table and split not in kept["data"]["hub_revisions"]:
            table["path"] = last_name(table["path"])
    return kept | {"recipe": recipe}


def write_publish(run: Path, record: dict[str, Any]) -> None:
    """publish/ and report.html, written aside and put in place together."""
    aside = run / ".tmp-publish"
    shutil.copytree(run / "phases" / "package" / "model", aside)
    told = json.loads(to_json(publishable(record)))
    errors, picture = _errors(run, told)
    if told["recipe"]["publish"].get("examples"):
        told["examples"] = told_examples(errors.mistakes, picture, aside)
    plot_ladder(told, aside / "assets" / "ladder.png")
    if was_measured(told):
        plot_frontier(told, aside / "assets" / "frontier.png")
    card = render_card(told)
    rundir.write_text(aside / "README.md", card)
    rundir.write_text(aside / "hftl.json", to_json(told))
    report = render_report(card, aside, told, errors, picture)
    put_in_place(run, aside, "publish")
    if (run / "phases" / "package" / "base").exists():
        write_base_card(run, told)
    elif (run / "publish-base").exists():
        shutil.rmtree(run / "publish-base")
    rundir.write_text(run / "report.html", report)


def _errors(run: Path, record: dict[str, Any]) -> tuple[Errors, Picture | None]:
    """What the published weights get wrong on test, and the pictures where rows are pictures."""
    phases = run / "phases"
    arm = run / "arms" / f"{record['own_arm']}-seed{record['published_seed']}"
    errors = errors_of(prepare.read(phases / "data"), arm)
    images = record["data"]["modality"] == "image"
    return errors, pixels.stored(phases / "pixels").__getitem__ if images else None


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


def last_name(place: str) -> str:
    """A package as it is, a path by its last name."""
    return place if place.startswith(PACKAGE) else Path(place).expanduser().resolve().name


def _without_paths(value: Any) -> Any:
    """Nested values in which every string that is a path has become its last name."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    path = isinstance(value, str) and value.startswith(("/", "~", "./", "../"))
    return last_name(value) if path else value
