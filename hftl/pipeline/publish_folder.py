"""Write publish/ around the exported model: card, record, plots and report."""

import json
import shutil
from pathlib import Path

import numpy as np

from hftl.card.analysis_plots import plot_curve, plot_distance, plot_probe, plot_shift
from hftl.card.card import render_adaptation_card, render_card
from hftl.card.metadata import build_benchmark_files, find_first_timestamp
from hftl.card.plots import plot_abstention, plot_frontier, plot_ladder, plot_slices
from hftl.card.report import ImageLookup, build_examples, build_widget_examples, render_report
from hftl.card.slices import has_gains
from hftl.card.wording import has_forgetting
from hftl.data.image_inputs import load_image_cache
from hftl.data.prepare import read_prepared_data
from hftl.errors import RunFolderError
from hftl.measure.error_analysis import ErrorAnalysis, analyze_errors, collect_sample_outputs
from hftl.measure.record import PUBLISHED_FILE, Record
from hftl.publish.sanitize import sanitize_record
from hftl.runtime import finished_files, run_folder


def write_publish_folder(run: Path, record: Record) -> None:
    """Write publish/ and report.html aside, and put them in place together."""
    aside = run / ".tmp-publish"
    shutil.copytree(run / "phases" / "package" / "model", aside)
    published = sanitize_record(record)
    errors, picture = _load_errors(run, published)
    if published.recipe.publish.examples:
        prepared = read_prepared_data(run / "phases" / "data")
        samples = collect_sample_outputs(prepared, _find_published_arm(run, published))
        examples = {
            "examples": build_examples(errors.mistakes, picture, aside),
            "widget": build_widget_examples(samples),
        }
        published = published.model_copy(update=examples)
    plot_ladder(published, aside / "assets" / "ladder.png")
    if has_forgetting(published):
        plot_frontier(published, aside / "assets" / "frontier.png")
    if has_gains(published):
        plot_slices(published, aside / "assets" / "slices.png")
    if published.abstention is not None:
        plot_abstention(published, aside / "assets" / "abstention.png")
    _plot_analyses(published, aside / "assets")
    card = render_card(published, published.place)
    run_folder.write_text(aside / "README.md", card)
    run_folder.write_text(aside / PUBLISHED_FILE, published.to_json())
    timestamp = find_first_timestamp(run / "publish")
    for name, text in build_benchmark_files(published, timestamp).items():
        (aside / name).parent.mkdir(exist_ok=True)
        run_folder.write_text(aside / name, text)
    report = render_report(card, aside, published, errors, picture)
    run_folder.replace_folder(aside, run / "publish")
    if (run / "phases" / "package" / "base").exists():
        _write_base_card(run, published)
    elif (run / "publish-base").exists():
        shutil.rmtree(run / "publish-base")
    run_folder.write_text(run / "report.html", report)


def _plot_analyses(published: Record, assets: Path) -> None:
    """Draw the analyses that were made with the run."""
    section = published.analysis
    if section is None:
        return
    if section.probe is not None:
        plot_probe(section.probe, assets / "probe.png")
    if section.curve is not None:
        plot_curve(section.curve, assets / "curve.png")
    if section.distance is not None:
        plot_distance(section.distance, assets / "distance.png")
    if section.shift is not None:
        plot_shift(section.shift, assets / "shift.png")


def _write_base_card(run: Path, published: Record) -> None:
    """Write publish-base/: the adapted base of the adapter, which must be pushed first."""
    aside = run / ".tmp-publish-base"
    shutil.copytree(run / "phases" / "package" / "base", aside)
    run_folder.write_text(aside / "README.md", render_adaptation_card(published))
    # The tensors of the base are named by `adapt.base`.
    described = published.model_copy(update={"weight_files": None})
    run_folder.write_text(aside / PUBLISHED_FILE, described.to_json())
    run_folder.replace_folder(aside, run / "publish-base")


def _load_errors(run: Path, record: Record) -> tuple[ErrorAnalysis, ImageLookup | None]:
    """Return the published weights' errors on test, and the images where rows are images."""
    phases = run / "phases"
    prepared = read_prepared_data(phases / "data")
    thresholds = None
    if record.thresholds is not None:
        thresholds = np.array([record.thresholds.thresholds[name] for name in prepared.names])
    arm = _find_published_arm(run, record)
    errors = analyze_errors(prepared, arm, thresholds, record.calibration)
    if record.data.modality != "image":
        return errors, None
    return errors, load_image_cache(phases / "pixels").__getitem__


def _find_published_arm(run: Path, record: Record) -> Path:
    return run / "arms" / f"{record.own_arm}-seed{record.published_seed}"


def render_amended_report(run: Path, amended: dict[str, str]) -> dict[str, str]:
    """Return the report of the amended card; nothing where the run lost what the report shows.

    Args:
        run: the run folder.
        amended: what `render_amended_files` returned.
    """
    published = Record.parse(json.loads(amended[f"publish/{PUBLISHED_FILE}"]))
    card = amended["publish/README.md"]
    if not published.arms:
        return {"report.html": render_report(card, run / "publish", published)}
    parts = [run / "phases" / "data", _find_published_arm(run, published)]
    if published.data.modality == "image":
        parts.append(run / "phases" / "pixels")
    if not all(part.exists() for part in parts):
        return {}
    page = render_report(card, run / "publish", published, *_load_errors(run, published))
    return {"report.html": page}


def rewrite_card(run: Path) -> None:
    """Write card and report again from the record of a finished run.

    Raises:
        RunFolderError: if the run has no record or was changed since, or is in use.
    """
    if not (run / "record.json").exists() or not (run / "phases" / "package").exists():
        raise RunFolderError(f"{run} has no record", "Finish it with `hftl run`")
    with run_folder.lock_run(run):
        # What the card is written from must be what was measured, or it would vouch for the rest.
        finished_files.check_finished_files(run, "record.json")
        record = Record.read(run)
        arm = _find_published_arm(run, record)
        for part in (run / "phases" / "package", run / "phases" / "data", arm):
            if run_folder.read_stage_inputs(part) is None:
                raise RunFolderError(f"{part} is missing", "Run the same `hftl run` again")
        write_publish_folder(run, record)
        finished_files.write_finished_files(run)
