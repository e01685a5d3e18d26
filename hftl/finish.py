"""From finished arms to record, verdict, card and publish folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hftl import rundir, show
from hftl.card.card import gain_sentence, render_card, render_report
from hftl.card.plots import plot_ladder
from hftl.data.pixels import ImageInputs
from hftl.errors import RunFolderError
from hftl.finetune import store
from hftl.finetune.workbench import MEASURED, Workbench
from hftl.measure.collect import collect
from hftl.measure.gain import best_seed, ladder, transfer_gain
from hftl.measure.verdict import decide
from hftl.metrics import Metric
from hftl.places import PACKAGE
from hftl.publish.folder import rebuild, write_model, write_sample
from hftl.publish.gates import reload_difference
from hftl.recipe import Arm, Recipe
from hftl.record import SCHEMA_VERSION, Record, environment, fingerprint, to_json
from hftl.train.hardware import dtype_name


def finish(
    recipe: Recipe,
    run: Path,
    bench: Workbench,
    metric: Metric,
    arms: list[Arm],
    publish: bool,
    say: Callable[[str], None],
) -> Record:
    """Measures, proves the reload, decides, and writes what is not there yet.

    Args:
        recipe: what was asked.
        run: the run folder, every arm finished.
        bench: what the arms shared.
        metric: what gains are measured in.
        arms: the recipe's arms, its own first.
        publish: whether card, report and publish folder are wanted too.
        say: receives what is printed at the end.
    """
    folders = {
        arm.name: [run / "arms" / f"{arm.name}-seed{seed}" for seed in recipe.measure.seeds]
        for arm in arms
    }
    inputs = fingerprint(
        {
            "recipe": recipe.tree(),
            "arms": {name: [rundir.digest(f) for f in found] for name, found in folders.items()},
            "data": rundir.digest(run / "phases" / "data"),
        }
    )
    done = run / "phases" / "report"
    # A publish folder that stands already must not fall behind the record.
    publish = publish or (run / "publish").exists()
    inputs = fingerprint({"inputs": inputs, "publish": publish})
    if (rundir.reads(done) or {}).get("inputs") != inputs or not _intact(run, done):
        record = measure(recipe, run, bench, metric, arms, folders)
        if publish:
            _write_publish(run, record)
        rundir.write_text(run / "record.json", to_json(record))
        with rundir.commit(done, {"inputs": inputs}) as aside:
            rundir.write_text(aside / "files.json", to_json(_hashes(run)))
    record = Record.read(run)
    say(_summary(record, publish))
    return record


def measure(
    recipe: Recipe, run: Path, bench: Workbench, metric: Metric, arms: list[Arm],
    folders: dict[str, list[Path]],
) -> dict[str, Any]:  # fmt: skip
    """The record's content: every figure from the arms' files."""
    own = arms[0]
    told, entries = collect(folders, bench.prepared, metric)
    best = best_seed(metric, told["validation"], own.name)
    seed = recipe.measure.seeds[best]
    difference = _package(run, bench, own, seed, folders[own.name][best])
    gain = transfer_gain(metric, told["validation"], told["test"], own.name)
    rows = ladder(metric, told["validation"], told["test"], own.name)
    over_head = next((row["gain_of_own"] for row in rows if row["arm"] == "head"), None)
    search = run / "phases" / "search" / "search.json"
    scratch = any(arm.strategy == "scratch" for arm in arms)
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": recipe.tree(),
        "source": _source(bench),
        "data": _data(recipe, bench),
        "check": bench.check(recipe.data.max_length, arms),
        "forward": bench.inputs.arguments if isinstance(bench.inputs, ImageInputs) else None,
        "adapt": None,
        "metric": metric.name,
        "own_arm": own.name,
        "arms": entries,
        "scratch_search": _search(search) if scratch else None,
        "ladder": rows,
        "transfer_gain": gain,
        "forgetting": None,
        "reload_difference": difference,
        "verdict": decide(gain, over_head, difference),
        "published_seed": seed,
        "environment": environment(bench.device, dtype_name(recipe.finetune.training)),
        "timings": {path.name: _timings(path) for found in folders.values() for path in found},
    }  # fmt: skip


def publishable(record: dict[str, Any]) -> dict[str, Any]:
    """The record without places on this machine: a local path becomes its last name."""
    kept = json.loads(to_json(record))
    # What a bad row says is the user's data, and stays here; the count goes along.
    kept["data"].pop("bad_rows_listed")
    recipe = _without_paths(kept["recipe"])
    if kept["source"]["local"]:
        recipe["source"]["model"] = kept["source"]["model"] = kept["source"]["name"]
    for split in ("train", "validation", "test"):
        table = recipe["data"][split]
        if "path" in table and split not in kept["data"]["hub_revisions"]:
            table["path"] = _last_name(table["path"])
    return kept | {"recipe": recipe}


def _package(run: Path, bench: Workbench, own: Arm, seed: int, arm_folder: Path) -> float:
    """The best seed's model as it will be published, and the proof that it reloads."""
    folder = run / "phases" / "package"
    reads = {
        "arm": rundir.digest(arm_folder),
        "published_as": bench.source.public_id,
        "revision": bench.source.revision,
    }
    if rundir.reads(folder) != reads:
        model = rebuild(bench, own.finetune, seed, arm_folder / store.WEIGHTS)
        with rundir.commit(folder, reads) as aside:
            (aside / "model").mkdir()
            write_model(bench, model, own.finetune, aside / "model")
            sample = write_sample(bench, store.read_logits(arm_folder, "test"), aside)
            difference = reload_difference(aside / "model", bench.source, sample, bench.device)
            rundir.write_text(aside / "reload.json", to_json({"difference": difference}))
    return json.loads((folder / "reload.json").read_text("utf-8"))["difference"]


def _write_publish(run: Path, record: dict[str, Any]) -> None:
    """publish/ and report.html, written aside and put in place together."""
    aside = run / ".tmp-publish"
    shutil.copytree(run / "phases" / "package" / "model", aside)
    told = json.loads(to_json(publishable(record)))
    plot_ladder(told, aside / "assets" / "ladder.png")
    card = render_card(told)
    rundir.write_text(aside / "README.md", card)
    rundir.write_text(aside / "hftl.json", to_json(told))
    report = render_report(card, aside)
    target = run / "publish"
    if target.exists():
        target.rename(run / ".tmp-old-publish")
    aside.rename(target)
    shutil.rmtree(run / ".tmp-old-publish", ignore_errors=True)
    rundir.write_text(run / "report.html", report)


def _hashes(run: Path) -> dict[str, str]:
    """The finished files, to see that none was lost or changed since."""
    files = [p for p in (run / "publish").rglob("*") if p.is_file()]
    files += [p for p in (run / "record.json", run / "report.html") if p.exists()]
    return {p.relative_to(run).as_posix(): rundir.sha256(p) for p in files}


def _intact(run: Path, done: Path) -> bool:
    return json.loads((done / "files.json").read_text("utf-8")) == _hashes(run)


def _source(bench: Workbench) -> dict[str, Any]:
    source = bench.source
    return {
        "model": source.spec,
        "name": source.public_id or _last_name(source.spec),
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
    train = {row.content: row for rows in drawn for row in rows}
    held = [row for split in MEASURED for row in bench.prepared.rows[split]]
    words = bench.prepared.words
    return {
        **facts,
        "name": recipe.data.train.path
        if "train" in facts["hub_revisions"]
        else _last_name(recipe.data.train.path),
        "labels_read": {
            "train_per_seed": sum(words(drawn[0])),
            "total": sum(words([*train.values(), *held])),
        },
    }


def _search(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def _timings(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text("utf-8"))["timings"]


def _last_name(place: str) -> str:
    """A package as it is, a path by its last name."""
    return place if place.startswith(PACKAGE) else Path(place).expanduser().resolve().name


def _without_paths(value: Any) -> Any:
    """Nested values in which every string that is a path has become its last name."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    path = isinstance(value, str) and value.startswith(("/", "~", "./", "../"))
    return _last_name(value) if path else value


def _summary(record: Record, publish: bool) -> str:
    tree, run = record.tree, record.folder
    lines = ["", show.ladder(tree), "", gain_sentence(tree)]
    lines.append(f"verdict: {record.verdict['decision']}")
    lines += [f"  {reason}" for reason in record.verdict["reasons"]]
    lines += ["", f"record   {run}/record.json"]
    if publish:
        lines += [f"card     {run}/publish/README.md", f"report   {run}/report.html"]
        lines += ["", "next:", f"  hftl predict {run} INPUT", f"  hftl publish {run} --dry-run"]
    return "\n".join(lines)


def rewrite_card(run: Path) -> None:
    """Writes card and report again from the record of a finished run.

    Raises:
        RunFolderError: if the run has no record, or is in use.
    """
    if not (run / "record.json").exists() or not (run / "phases" / "package").exists():
        raise RunFolderError(f"{run} has no record", "Finish it with `hftl run`")
    with rundir.locked(run):
        done = run / "phases" / "report"
        inputs = (rundir.reads(done) or {}).get("inputs")
        _write_publish(run, Record.read(run).tree)
        with rundir.commit(done, {"inputs": inputs}) as aside:
            rundir.write_text(aside / "files.json", to_json(_hashes(run)))
