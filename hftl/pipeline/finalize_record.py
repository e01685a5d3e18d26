"""Write what leaves the run: the published record, its card, report and folders."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from hftl.adapt.guard import summarize_adaptation
from hftl.card.card import render_adaptation_card, render_card
from hftl.card.metadata import EVERY_EVAL_EVER_FILE, build_benchmark_files
from hftl.card.plots import plot_frontier, plot_ladder
from hftl.card.report import ImageLookup, build_examples, build_widget_examples, render_report
from hftl.card.wording import has_forgetting
from hftl.data import image_inputs, prepare
from hftl.finetune.context import ExperimentContext
from hftl.measure.error_analysis import ErrorAnalysis, analyze_errors, collect_sample_outputs
from hftl.measure.gain import (
    describe_adaptation_outcome,
    select_lesser_gain,
)
from hftl.measure.record import (
    PUBLISHED_FILE,
    RECORD_FILE,
    SCHEMA_VERSION,
    AdaptedBase,
    AdaptSection,
    Forced,
    Gain,
    Published,
    Record,
    SourceFacts,
)
from hftl.models.source import hash_source_weights
from hftl.pipeline.run import FinishedStage
from hftl.publish.sanitize import sanitize_record, strip_parents
from hftl.runtime import run_folder
from hftl.runtime.paths import PACKAGE_PREFIX
from hftl.runtime.progress import show_activity
from hftl.runtime.run_folder import fingerprint


def update_record(
    run: Path, inputs: Mapping[str, object], publish: bool, build: Callable[[], Record],
    write_published: Callable[[Record], None],
) -> Record:  # fmt: skip
    """Return the record, made anew where what it comes from has changed or a file of it is lost.

    Args:
        run: the run folder.
        inputs: what the record comes from.
        publish: whether to write the publish folder.
        build: makes the record.
        write_published: writes the publish folder of a record.
    """
    finished = run / run_folder.REPORT_STAGE
    # A publish folder of an earlier call must not fall behind the record.
    publish = publish or (run / "publish").exists()
    stamp = fingerprint(
        {"inputs": fingerprint(inputs), "publish": publish, "schema_version": SCHEMA_VERSION}
    )
    before = run_folder.read_stage_inputs(finished) or {}
    if before.get("inputs") != stamp or not run_folder.is_intact(run):
        with show_activity("measuring"):
            record = build()
        if publish:
            with show_activity("card and report"):
                write_published(record)
        run_folder.write_text(run / "record.json", record.to_json())
        run_folder.write_finished_files(run, stamp)
    return Record.read(run)


def build_adaptation_section(
    stages: list[FinishedStage],
    own: ExperimentContext | None,
    over_source: Gain | None,
    is_adapter: bool,
) -> AdaptSection | None:
    """Return the record of the recipe's adaptations; None without any.

    Args:
        stages: the adaptations, one after the other.
        own: what the own arm worked with.
        over_source: the own arm's gain over `source`.
        is_adapter: an adapter needs an adapted base of its own, a whole model none.
    """
    if not stages:
        return None
    facts = [summarize_adaptation(stage.facts) for stage in stages]
    context = own or stages[-1].context
    base = None
    if context.base_is_adapted and is_adapter:
        base = AdaptedBase(weights_sha256=hash_source_weights(context.public_base))
    return AdaptSection(
        stages=facts,
        gain=None if over_source is None else select_lesser_gain({"source": over_source}),
        outcome=describe_adaptation_outcome(facts, over_source),
        base=base,
    )


def build_source_section(context: ExperimentContext) -> SourceFacts:
    """Return the record of the source model."""
    source = context.source
    return SourceFacts(
        model=source.name,
        name=source.public_id or strip_parents(source.name),
        local=source.is_local and not source.name.startswith(PACKAGE_PREFIX),
        published_as=source.public_id,
        revision=source.revision,
        architecture=source.architecture,
        weights_sha256=context.weights_hash,
    )


def write_publish_folder(run: Path, record: Record) -> None:
    """Write publish/ and report.html aside, and put them in place together."""
    aside = run / ".tmp-publish"
    shutil.copytree(run / "phases" / "package" / "model", aside)
    published = sanitize_record(record)
    errors, picture = _load_errors(run, published)
    if published.recipe.publish.examples:
        prepared = prepare.read_prepared_data(run / "phases" / "data")
        samples = collect_sample_outputs(prepared, _published_arm_folder(run, published))
        examples = {
            "examples": build_examples(errors.mistakes, picture, aside),
            "widget": build_widget_examples(samples),
        }
        published = published.model_copy(update=examples)
    plot_ladder(published, aside / "assets" / "ladder.png")
    if has_forgetting(published):
        plot_frontier(published, aside / "assets" / "frontier.png")
    card = render_card(published, published.place)
    run_folder.write_text(aside / "README.md", card)
    run_folder.write_text(aside / PUBLISHED_FILE, published.to_json())
    for name, text in build_benchmark_files(published, find_first_timestamp(run)).items():
        (aside / name).parent.mkdir(exist_ok=True)
        run_folder.write_text(aside / name, text)
    report = render_report(card, aside, published, errors, picture)
    replace_folder(run, aside, "publish")
    if (run / "phases" / "package" / "base").exists():
        write_base_card(run, published)
    elif (run / "publish-base").exists():
        shutil.rmtree(run / "publish-base")
    run_folder.write_text(run / "report.html", report)


def find_first_timestamp(run: Path) -> str:
    """Return when the benchmark's files were made first, in seconds since 1970: now, or before."""
    path = run / "publish" / EVERY_EVAL_EVER_FILE
    if not path.exists():
        return str(int(time.time()))
    return json.loads(path.read_text(encoding="utf-8"))["retrieved_timestamp"]


def _load_errors(run: Path, record: Record) -> tuple[ErrorAnalysis, ImageLookup | None]:
    """Return the published weights' errors on test, and the images where rows are images."""
    phases = run / "phases"
    prepared = prepare.read_prepared_data(phases / "data")
    errors = analyze_errors(prepared, _published_arm_folder(run, record))
    if record.data.modality != "image":
        return errors, None
    return errors, image_inputs.load_image_cache(phases / "pixels").__getitem__


def _published_arm_folder(run: Path, record: Record) -> Path:
    return run / "arms" / f"{record.own_arm}-seed{record.published_seed}"


def write_base_card(run: Path, published: Record) -> None:
    """Write publish-base/: the adapted base of the adapter, which must be pushed first."""
    aside = run / ".tmp-publish-base"
    shutil.copytree(run / "phases" / "package" / "base", aside)
    run_folder.write_text(aside / "README.md", render_adaptation_card(published))
    run_folder.write_text(aside / PUBLISHED_FILE, published.to_json())
    replace_folder(run, aside, "publish-base")


def replace_folder(run: Path, aside: Path, name: str) -> None:
    """Put a finished folder in the place of the one of that name."""
    target, old = run / name, run / f".tmp-old-{name}"
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


# What is only known once a run is pushed, written into its record, cards and adapter config.


def amend_record(
    record: Record, repo_id: str, forced: str | None, base: tuple[str, str] | None,
    license: str | None = None,
) -> Record:  # fmt: skip
    """Return the record with what is only known once it is pushed.

    Args:
        record: the run's.
        repo_id: the repository.
        forced: the reason, where the verdict is hold.
        base: the id and commit of the base that an adapter applies to, once it is pushed.
        license: wins over the recipe's; where it is None, that of an earlier push.
    """
    license = license or (record.published and record.published.license)
    published = Published.model_validate(
        {"repo_id": repo_id} | ({"license": license} if license else {})
    )
    tree = record.to_dict() | {"published": published.to_dict()}
    tree.pop("forced", None)
    if forced is not None:
        tree["forced"] = Forced(reason=forced).to_dict()
    adapted = (tree["adapt"] or {}).get("base")
    if adapted is not None:
        adapted.pop("published_as", None)
        adapted.pop("revision", None)
    if base is not None:
        (adapted or tree["source"]).update(published_as=base[0], revision=base[1])
    return Record.parse(tree)


def render_amended_files(run: Path, record: Record, base: tuple[str, str] | None) -> dict[str, str]:
    """Return the files of a run that tell what is only known once it is pushed, by path."""
    before = json.loads((run / "publish" / PUBLISHED_FILE).read_text(encoding="utf-8"))
    examples = {key: before[key] for key in ("examples", "widget") if key in before}
    published = Record.parse(sanitize_record(record).to_dict() | examples)
    render = render_card if record.arms else render_adaptation_card
    texts = {
        RECORD_FILE: record.to_json(),
        "publish/README.md": render(published, published.place),
        f"publish/{PUBLISHED_FILE}": published.to_json(),
    }
    if record.arms:
        files = build_benchmark_files(published, find_first_timestamp(run))
        texts |= {f"publish/{name}": text for name, text in files.items()}
    if base is not None:
        path = run / "publish" / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"base_model_name_or_path": base[0], "revision": base[1]}
        texts["publish/adapter_config.json"] = (
            json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        )
    return texts


def render_adapted_base_files(record: Record, base_id: str) -> dict[str, str]:
    """Return the same files of the adapted base."""
    published = sanitize_record(record)
    return {
        "publish-base/README.md": render_adaptation_card(published, base_id),
        f"publish-base/{PUBLISHED_FILE}": published.to_json(),
    }


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
    parts = [run / "phases" / "data", _published_arm_folder(run, published)]
    if published.data.modality == "image":
        parts.append(run / "phases" / "pixels")
    if not all(part.exists() for part in parts):
        return {}
    page = render_report(card, run / "publish", published, *_load_errors(run, published))
    return {"report.html": page}
