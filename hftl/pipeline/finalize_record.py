"""What leaves the run: the card and the publish folders."""

import copy
import json
import shutil
import time
from pathlib import Path
from typing import Any

from hftl.card.card import render_card
from hftl.card.metadata import EVERY_EVAL_EVER_FILE, build_benchmark_files
from hftl.card.plots import plot_frontier, plot_ladder
from hftl.card.report import ImageLookup, render_report
from hftl.card.result_sections import has_forgetting, render_adaptation_card
from hftl.card.training_sections import build_examples, build_widget_examples
from hftl.data import image_inputs, prepare
from hftl.measure.error_analysis import ErrorAnalysis, analyze_errors, collect_sample_outputs
from hftl.publish.sanitize import get_load_path, sanitize_record
from hftl.runtime import run_folder
from hftl.runtime.fingerprints import to_json


def write_publish_folder(run: Path, record: dict[str, Any]) -> None:
    """publish/ and report.html, written aside and put in place together."""
    aside = run / ".tmp-publish"
    shutil.copytree(run / "phases" / "package" / "model", aside)
    told = json.loads(to_json(sanitize_record(record)))
    errors, picture = _load_errors(run, told)
    if told["recipe"]["publish"].get("examples"):
        told["examples"] = build_examples(errors.mistakes, picture, aside)
        prepared = prepare.read_prepared_data(run / "phases" / "data")
        told["widget"] = build_widget_examples(
            collect_sample_outputs(prepared, _published_arm_folder(run, told))
        )
    plot_ladder(told, aside / "assets" / "ladder.png")
    if has_forgetting(told):
        plot_frontier(told, aside / "assets" / "frontier.png")
    card = render_card(told, get_load_path(told))
    run_folder.write_text(aside / "README.md", card)
    run_folder.write_text(aside / "hftl.json", to_json(told))
    for name, text in build_benchmark_files(told, find_first_timestamp(run)).items():
        (aside / name).parent.mkdir(exist_ok=True)
        run_folder.write_text(aside / name, text)
    report = render_report(card, aside, told, errors, picture)
    replace_folder(run, aside, "publish")
    if (run / "phases" / "package" / "base").exists():
        write_base_card(run, told)
    elif (run / "publish-base").exists():
        shutil.rmtree(run / "publish-base")
    run_folder.write_text(run / "report.html", report)


def rebuild_report(run: Path, told: dict[str, Any], card: str) -> str | None:
    """report.html anew; None where the run lost what it shows.

    Args:
        run: a finished run.
        told: the record as it is published.
        card: the text of the card.
    """
    if not told["arms"]:
        return render_report(card, run / "publish", told)
    parts = [run / "phases" / "data", _published_arm_folder(run, told)]
    if told["data"]["modality"] == "image":
        parts.append(run / "phases" / "pixels")
    if not all(part.exists() for part in parts):
        return None
    return render_report(card, run / "publish", told, *_load_errors(run, told))


def find_first_timestamp(run: Path) -> str:
    """Return when the benchmark's files were made first, in seconds since 1970: now, or before."""
    path = run / "publish" / EVERY_EVAL_EVER_FILE
    if not path.exists():
        return str(int(time.time()))
    return json.loads(path.read_text(encoding="utf-8"))["retrieved_timestamp"]


def _load_errors(run: Path, record: dict[str, Any]) -> tuple[ErrorAnalysis, ImageLookup | None]:
    """What the published weights get wrong on test, and the pictures where rows are pictures."""
    phases = run / "phases"
    errors = analyze_errors(
        prepare.read_prepared_data(phases / "data"), _published_arm_folder(run, record)
    )
    images = record["data"]["modality"] == "image"
    return errors, image_inputs.load_image_cache(
        phases / "pixels"
    ).__getitem__ if images else None


def _published_arm_folder(run: Path, record: dict[str, Any]) -> Path:
    return run / "arms" / f"{record['own_arm']}-seed{record['published_seed']}"


def write_base_card(run: Path, told: dict[str, Any]) -> None:
    """publish-base/: the adapted base that the adapter is put on, which must be pushed first."""
    aside = run / ".tmp-publish-base"
    shutil.copytree(run / "phases" / "package" / "base", aside)
    run_folder.write_text(aside / "README.md", render_adaptation_card(told))
    run_folder.write_text(aside / "hftl.json", to_json(told))
    replace_folder(run, aside, "publish-base")


def replace_folder(run: Path, aside: Path, name: str) -> None:
    """A finished folder takes the place of the one of that name."""
    target, old = run / name, run / f".tmp-old-{name}"
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


# What is only known once a run is pushed, written into its record, cards and adapter config.


def amend_record(
    record: dict[str, Any], repo_id: str, forced: str | None, base: tuple[str, str] | None,
    license: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The record with what is only known once it is pushed.

    Args:
        record: the run's.
        repo_id: where it goes.
        forced: why, where the verdict is hold.
        base: the id and commit of the base that an adapter goes on, once it is there.
        license: what wins over the recipe's; as an earlier push was given it where it is None.
    """
    tree = copy.deepcopy(record)
    license = license or (record.get("published") or {}).get("license")
    tree["published"] = {"repo_id": repo_id} | ({"license": license} if license else {})
    tree.pop("forced", None)
    if forced is not None:
        tree["forced"] = {"reason": forced}
    ours = (tree["adapt"] or {}).get("base")
    if ours is not None:
        ours.pop("published_as", None)
        ours.pop("revision", None)
    named = ours if ours is not None else tree["source"]
    if base is not None:
        named |= {"published_as": base[0], "revision": base[1]}
    return tree


def render_amended_files(
    run: Path, record: dict[str, Any], base: tuple[str, str] | None
) -> dict[str, str]:
    """The files of a run that tell what is only known once it is pushed, by path."""
    told = json.loads(to_json(sanitize_record(record)))
    before = json.loads((run / "publish" / "hftl.json").read_text(encoding="utf-8"))
    for key in ("examples", "widget"):
        if key in before:
            told[key] = before[key]
    render = render_card if record["arms"] else render_adaptation_card
    found = {
        "record.json": to_json(record),
        "publish/README.md": render(told, get_load_path(told)),
        "publish/hftl.json": to_json(told),
    }
    if record["arms"]:
        files = build_benchmark_files(told, find_first_timestamp(run))
        found |= {f"publish/{name}": text for name, text in files.items()}
    path = run / "publish" / "adapter_config.json"
    if base is not None:
        named = {"base_model_name_or_path": base[0], "revision": base[1]}
        settings = json.loads(path.read_text(encoding="utf-8")) | named
        found["publish/adapter_config.json"] = (
            json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        )
    return found


def render_base_files(record: dict[str, Any], base_id: str) -> dict[str, str]:
    """The same of the adapted base."""
    told = json.loads(to_json(sanitize_record(record)))
    return {
        "publish-base/README.md": render_adaptation_card(told, base_id),
        "publish-base/hftl.json": to_json(told),
    }


def render_amended_report(run: Path, amended: dict[str, str]) -> dict[str, str]:
    """The report of the amended card; as it was where the run lost what the report shows.

    Args:
        run: the run folder.
        amended: what `render_amended_files` gave.
    """
    page = rebuild_report(
        run, json.loads(amended["publish/hftl.json"]), amended["publish/README.md"]
    )
    return {} if page is None else {"report.html": page}
