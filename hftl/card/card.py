"""Render the card: the record as a page. It formats and never computes; same record, same bytes."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined, Template

from hftl.card.advice import describe_advice
from hftl.card.evidence import EvidencePart, build_evidence_parts
from hftl.card.markdown import escape_markup, escape_pipes, format_code, format_yaml_block
from hftl.card.metadata import build_adapter_tags, build_metadata, build_origin, format_title
from hftl.card.scores import format_scores
from hftl.card.sections import (
    format_base_sentence,
    format_data_lines,
    format_data_sentence,
    format_environment,
    format_limits,
    format_training_sentence,
)
from hftl.card.slices import SlicesPart, build_slices_part
from hftl.card.snippets import (
    ModelFolder,
    render_encoder_snippet,
    render_pipeline_snippet,
    render_plain_snippet,
)
from hftl.card.wording import (
    PICTURE_EXAMPLE,
    TASK_PHRASES,
    build_figure_rows,
    build_forgetting_rows,
    describe_arm,
    example_input,
    find_public_base,
    format_adaptation_lines,
    format_adaptation_sentence,
    format_forgetting_lines,
    format_forgetting_sentence,
    has_forgetting,
    input_kind,
    is_pooled,
    name_surety,
)
from hftl.config.section import is_hub_id
from hftl.finetune.strategies import PROBE_ARM
from hftl.measure.metrics import describe_metric
from hftl.measure.record import Forced, Gain, LadderRow, Record, Verdict
from hftl.measure.verdict import format_gain, is_better, is_worse

OUTCOME_PHRASES = {
    "positive": "Transfer helped",
    "equivalent": "Transfer made practically no difference",
    "negative": "Negative transfer, this model is worse than its baseline",
    "undetermined": "Whether transfer helped is not settled",
}
MAX_LABELS = 12
"""Labels that are named."""
MAX_EXAMPLE_CHARACTERS = 200


@dataclass(frozen=True)
class ArmTableRow:
    """Hold the cells of one arm in the table of arms."""

    name: str
    test: str
    sd: str
    gain: str
    parameters: str


@dataclass(frozen=True)
class ForgettingPart:
    """Hold the card's part on forgetting; a table's first row is its header."""

    sentence: str
    tables: list[list[list[str]]]
    lines: list[str]


@dataclass(frozen=True)
class CardPage:
    """Hold what template.md names, in words."""

    title: str
    purpose: str
    gain_sentence: str
    verdict: Verdict
    forced: Forced | None
    adaptation: str | None
    adaptation_lines: list[str]
    forgetting: ForgettingPart | None
    slices: SlicesPart | None
    evidence: list[EvidencePart]
    metric: str | None
    metric_words: str
    rows: list[ArmTableRow]
    other_metrics: str
    scores: list[str]
    has_abstention: bool
    advice_sentence: str
    place: str
    hftl_place: str
    """As source code."""
    example: str
    plain_snippet: str
    pipeline_snippet: str | None
    pooling: str | None
    """None where the stock class pools."""
    data_sentence: str
    data_lines: list[str]
    warnings: list[str]
    limits: list[str]
    training_sentence: str
    base_sentence: str
    has_base_page: bool
    recipe: str
    environment: list[tuple[str, str]]
    version: str
    examples: list[list[str]]


@dataclass(frozen=True)
class AdaptationPage:
    """Hold what adapted.md names, in words."""

    name: str
    sentence: str
    alone: bool
    """False for a run with a task: its verdict is on what is fine-tuned from this encoder."""
    verdict: Verdict
    forced: Forced | None
    lines: list[str]
    snippet: str
    recipe: str
    version: str


def render_card(record: Record, place: str = ".") -> str:
    """Return README.md of a record.

    Args:
        record: the publishable record, free of local paths.
        place: what a reader passes to `load`: a hub id, or the folder's path.
    """
    return _render_page("template.md", _build_page(record, place), build_metadata(record))


def render_adaptation_card(record: Record, place: str = ".") -> str:
    """Return README.md of an adapted encoder or adapter that has no task.

    Args:
        record: the publishable record, free of local paths.
        place: what a reader loads it from.
    """
    assert record.adapt is not None
    adapted = any(stage.kept == "adapted" for stage in record.stages)
    adapter = (
        record.adapt.base is None
        and adapted
        and all(stage.method == "lora" for stage in record.stages if stage.kept == "adapted")
    )
    # Its own base is the source, not the adapted encoder that it is.
    plain = record.model_copy(update={"adapt": None})
    images = record.data.modality == "image"
    metadata = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-feature-extraction" if images else "feature-extraction",
        tags=["hftl", "domain-adaptation", *build_adapter_tags(plain, adapter)],
        **build_origin(plain, adapter),
    )
    page = AdaptationPage(
        name=escape_markup(record.source.name),
        sentence=format_adaptation_sentence(record),
        alone=record.own_arm is None,
        verdict=record.verdict,
        forced=record.forced,
        lines=format_adaptation_lines(record),
        snippet=render_encoder_snippet(
            place,
            *find_public_base(plain),
            record.source.architecture,
            adapter,
            adapted,
            _name_source_folder(record),
        ),  # fmt: skip
        recipe=format_yaml_block(record["recipe"]),
        version=record.environment.packages["hftl"],
    )
    return _render_page("adapted.md", page, metadata)


def _render_page(template: str, page: CardPage | AdaptationPage, metadata: ModelCardData) -> str:
    text = _load_template(template).render(vars(page))
    return f"---\n{metadata.to_yaml().strip()}\n---\n\n{text}"


@cache
def _load_template(name: str) -> Template:
    engine = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    engine.filters |= {
        "first_upper": lambda text: text[:1].upper() + text[1:],
        "inert": escape_markup,
        "in_table": escape_pipes,
    }
    return engine.from_string(files("hftl.card").joinpath(name).read_text("utf-8"))


def format_gain_sentence(record: Record) -> str:
    """Return the transfer gain in one sentence: the outcome, both scores, the gain and how sure it
    is. Before it comes the comparison with `head`, where this model is not better."""
    gain = record.transfer_gain
    head = _format_head_sentence(record)
    if gain is None:
        return (
            f"{head}No baseline that learns the task (scratch, classical) was run, so the transfer "
            "gain is not known."
        )
    test = {row.arm: row.test for row in record.ladder}
    return (
        f"{head}{OUTCOME_PHRASES[gain.outcome]}: {gain.metric} {record.own_row.test:.3f} against "
        f"{test[gain.baseline]:.3f} for {describe_arm(gain.baseline, record)}, a gain of "
        f"{format_gain(gain)} ({_format_gain_certainty(gain)})."
    )


def _format_head_sentence(record: Record) -> str:
    """Say that the model is not better than `head`; nothing where it is, or `head` did not run."""
    row = next((row for row in record.ladder if row.arm == PROBE_ARM), None)
    over = row and row.gain_of_own
    if row is None or over is None or is_better(over):
        return ""
    words = "Worse than" if over.ci95 is not None and is_worse(over) else "Not better than"
    return (
        f"{words} {describe_arm(PROBE_ARM, record)}: {record.metric} {record.own_row.test:.3f} "
        f"against {row.test:.3f}, a difference of {format_gain(over)} "
        f"({_format_gain_certainty(over)}). "
    )


def _format_gain_certainty(gain: Gain) -> str:
    seeds = f"{gain.seeds} seeds" if gain.seeds > 1 else "one seed"
    return f"95 % interval, {seeds}" if gain.ci95 else f"{seeds}, no interval"


def _build_page(record: Record, place: str) -> CardPage:
    folder = _describe_folder(record, place)
    return CardPage(
        title=format_title(record),
        purpose=_format_purpose(record),
        gain_sentence=format_gain_sentence(record),
        verdict=record.verdict,
        forced=record.forced,
        adaptation=record.adapt and format_adaptation_sentence(record),
        adaptation_lines=format_adaptation_lines(record) if record.adapt else [],
        forgetting=_build_forgetting_part(record) if has_forgetting(record) else None,
        slices=build_slices_part(record),
        evidence=build_evidence_parts(record.analysis),
        metric=record.metric,
        metric_words=describe_metric(str(record.metric)).label,
        rows=[_build_ladder_row(row, record) for row in record.ladder],
        other_metrics=_format_other_metrics(record),
        scores=format_scores(record),
        has_abstention=record.abstention is not None,
        advice_sentence=describe_advice(record),
        place=place,
        hftl_place=json.dumps(place),
        example=example_input(record),
        plain_snippet=render_plain_snippet(folder),
        pipeline_snippet=render_pipeline_snippet(folder),
        pooling=record.recipe.finetune.pooling if is_pooled(record) else None,
        data_sentence=format_data_sentence(record),
        data_lines=format_data_lines(record),
        warnings=[w[:1].upper() + w[1:] + "." for w in record.check.warnings],
        limits=format_limits(record),
        training_sentence=format_training_sentence(record),
        base_sentence=format_base_sentence(record),
        has_base_page=find_public_base(record)[0] is not None,
        recipe=format_yaml_block(record["recipe"]),
        environment=format_environment(record.environment),
        version=record.environment.packages["hftl"],
        examples=_build_example_rows(record),
    )


def _describe_folder(record: Record, place: str) -> ModelFolder:
    """Return the published folder as the plain libraries load it."""
    base, revision = find_public_base(record)
    if record.adapt is not None and record.adapt.base is not None and base is None:
        base = "../publish-base"
    given = record.forward.get("prompt") if record.forward else None
    prompt = given if isinstance(given, str) else None
    return ModelFolder(
        place=place,
        base=base,
        revision=revision,
        pooling=record.recipe.finetune.pooling,
        outputs=max(1, len(record.data.labels)),
        is_adapter=record.recipe.finetune.spec.trains_adapter,
        kind=input_kind(record),
        example=example_input(record).strip("()") if prompt is None else PICTURE_EXAMPLE,
        interpolates=bool(record.forward and record.forward.get("interpolate_pos_encoding")),
        architecture=record.source.architecture or "",
        prompt=prompt,
        prefix=record.source.prefix_tokens,
        is_quantized=record.recipe.source.quantization is not None,
        max_tokens=record.check.max_tokens,
        base_folder=_name_source_folder(record),
    )


def _name_source_folder(record: Record) -> str:
    """Return the last part of the source's place, for code that loads it."""
    return record.source.name.rsplit("/", 1)[-1]


def _format_other_metrics(record: Record) -> str:
    """Return the own arm's other scores on test, means over seeds."""
    return ", ".join(
        f"{name} {'-' if score is None else f'{score:.3f}'}"
        for name, score in (record.test_metrics or {}).items()
        if name != record.metric
    )


def _build_forgetting_part(record: Record) -> ForgettingPart:
    return ForgettingPart(
        sentence=format_forgetting_sentence(record),
        tables=[build_forgetting_rows(record), build_figure_rows(record)],
        lines=format_forgetting_lines(record),
    )


def _format_purpose(record: Record) -> str:
    source, labels = record.source, record.data.labels
    link = f"[{source.name}](https://huggingface.co/{source.name})"
    if source.published_as != source.name or not is_hub_id(source.name):
        link = escape_markup(source.name)
    start = f"{record.recipe.finetune.spec.model_words} {link} that"
    kind = input_kind(record)
    if not labels:
        return f"{start} predicts a number from {'pictures' if kind == 'image' else 'text'}."
    shown = ", ".join(_format_label(label, record) for label in labels[:MAX_LABELS])
    more = f" and {len(labels) - MAX_LABELS} more" if len(labels) > MAX_LABELS else ""
    end = ", several at once" if record.data.task == "multi-label" else ""
    if any(stage.kept == "adapted" for stage in record.stages):
        end += ", after adaptation to its domain"
    return f"{start} {TASK_PHRASES[kind]} {shown}{more}{end}."


def _format_label(label: str, record: Record) -> str:
    """Return a label as code, and the words for it where the recipe gives some."""
    words = (record.recipe.data.label_names or {}).get(label)
    return format_code(label) + (f" ({escape_markup(words)})" if words else "")


def _build_ladder_row(row: LadderRow, record: Record) -> ArmTableRow:
    own = row.arm == record.own_arm
    parameters = next(e.trainable_parameters for e in record.arms if e.arm == row.arm)
    return ArmTableRow(
        name=f"**{row.arm}** (this model)" if own else describe_arm(row.arm, record),
        test=f"**{row.test:.3f}**" if own else f"{row.test:.3f}",
        sd="" if row.sd is None else f"{row.sd:.3f}",
        gain="" if row.gain_of_own is None else format_gain(row.gain_of_own),
        parameters=f"{parameters:,}",
    )


def _build_example_rows(record: Record) -> list[list[str]]:
    """Return the table of mistakes, a header first; empty where none may go out."""
    if not record.examples:
        return []
    rows = [["input", "true", "said", name_surety(record)]]
    for example in record.examples:
        if example.picture is not None:
            shown = f"![]({example.picture})"
        elif example.words is not None:
            parts = [format_code(p, MAX_EXAMPLE_CHARACTERS) if p else "" for p in example.words]
            shown = f"{parts[0]} **{parts[1]}** {parts[2]}"
        else:
            texts = example.texts or []
            shown = " / ".join(format_code(text, MAX_EXAMPLE_CHARACTERS) for text in texts)
        rows.append(
            [shown, format_code(example.true), format_code(example.said), f"{example.surety:.3f}"]
        )
    return rows
