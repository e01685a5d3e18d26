"""Render the report: the card as one HTML file, and the errors, which the card leaves out.

Also prepares the examples that a published record may hold: mistakes, and the hub's widget.
"""

import base64
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from hftl.card.markdown import to_one_line
from hftl.card.wording import name_surety
from hftl.finetune.strategies import PROBE_ARM
from hftl.measure.error_analysis import ClassScore, ErrorAnalysis, Mistake
from hftl.measure.record import Example, Record, WidgetExample, WidgetScore
from hftl.measure.verdict import is_better

OUTCOME_COLORS = {"positive": "#1a7f37", "negative": "#cf222e"}
"""Of the line beside the gain."""
DEFAULT_COLOR = "#9a6700"
MAX_CHARACTERS = 400
"""Characters of a text that are shown."""
MAX_MATRIX_CLASSES = 40
"""Classes up to which the confusion matrix is shown."""
MAX_WIDGET_CHARACTERS = 400
MAX_WIDGET_CLASSES = 5
CONTEXT_WORDS = 8
"""Words shown on either side of one that was tagged wrong."""
THUMBNAIL_PIXELS = 96
ImageLookup = Callable[[str], np.ndarray]
"""The (3, height, width) uint8 pixels of the image of a hash."""


def render_report(
    card: str, folder: Path, record: Record, errors: ErrorAnalysis | None = None,
    picture: ImageLookup | None = None,
) -> str:  # fmt: skip
    """Return the card as one HTML file, its pictures inside.

    Args:
        card: README.md.
        folder: what the card's pictures lie under.
        record: that of the card.
        errors: what the published weights get wrong; None where there is no task.
        picture: the pixels of the inputs, where they are images.
    """
    body = card.split("\n---\n", 1)[1]
    title = next(line[2:] for line in body.splitlines() if line.startswith("# "))
    section = {} if errors is None else vars(_build_errors_section(errors, record, picture))
    return _load_template().render(
        title=title, page=Markup(_render_html(body, folder)), errors=errors,
        color=_choose_color(record), **section,
    )  # fmt: skip


def _choose_color(record: Record) -> str:
    """Return the color of the line beside the gain, green only where `head` is not as good."""
    gain = record.transfer_gain
    if gain is None:
        return DEFAULT_COLOR
    head = [row.gain_of_own for row in record.ladder if row.arm == PROBE_ARM]
    level = any(over is not None and not is_better(over) for over in head)
    if level and gain.outcome == "positive":
        return DEFAULT_COLOR
    return OUTCOME_COLORS.get(gain.outcome, DEFAULT_COLOR)


@cache
def _load_template() -> Template:
    engine = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True)
    engine.filters["line"] = lambda text: to_one_line(text, MAX_CHARACTERS)
    return engine.from_string(files("hftl.card").joinpath("report.html").read_text("utf-8"))


def _render_html(body: str, folder: Path) -> str:
    """Return the card's text as HTML; nothing in it is markup but what Markdown makes."""
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(_mark_details(body))

    def inline(match: re.Match[str]) -> str:
        return f'src="{_encode_data_uri((folder / match[1]).read_bytes())}"'

    html = re.sub(r'src="(assets/[\w-]+\.png)"', inline, html)
    html = re.sub(r"<h2>\x02(.*?)</h2>", r"<details><summary>\1</summary>", html)
    return html.replace("<p>\x03</p>", "</details>")


def _mark_details(body: str) -> str:
    """Replace folded parts by marks that no card can hold: HTML in the card is escaped here."""
    body = re.sub(r"(?m)^<details><summary>(.*?)</summary>$", "## \x02\\1", body)
    return re.sub(r"(?m)^</details>$", "\x03", body)


_ScoreTable = tuple[str, str, str, list[ClassScore]]
"""A heading, what a row is of, what it counts, and the rows."""


@dataclass(frozen=True)
class _ConfusionRow:
    """Hold a row of the confusion matrix: counts and their colors."""

    label: str
    cells: list[tuple[int, str]]


@dataclass(frozen=True)
class _MistakeRow:
    """Hold a mistake as it is shown: an image, a word in its context, or a text."""

    mistake: Mistake
    picture: str | None = None
    before: str = ""
    word: str | None = None
    after: str = ""


@dataclass(frozen=True)
class _ErrorsSection:
    """Hold what report.html names of the errors, in words."""

    seed: int | None
    summary: str
    note: str
    tables: list[_ScoreTable]
    confused: list[_ConfusionRow]
    heading: str
    confidence: str
    mistakes: list[_MistakeRow]


def _build_errors_section(
    errors: ErrorAnalysis, record: Record, picture: ImageLookup | None
) -> _ErrorsSection:
    target = not errors.classes
    noun = "words" if record.data.task == "token-classification" else "rows"
    answers = "answers" if record.data.task == "multi-label" else noun
    share = f"{errors.wrong:,} of {errors.answers:,} {answers} are wrong."
    if record.thresholds is not None:
        share += " Each label is decided at its threshold in config.json."
    shown = len(errors.mistakes)
    return _ErrorsSection(
        seed=record.published_seed,
        summary=f"its {shown} largest errors stand below." if target else share,
        note="The card shows the mistakes too, as the recipe lets examples out."
        if record.examples
        else "This part is in the report only, and stays on this machine.",
        tables=_build_score_tables(errors, noun),
        confused=_build_confusion_rows(errors),
        heading=f"The {shown} largest errors" if target else f"Its {shown} surest mistakes",
        confidence=name_surety(record),
        mistakes=[_build_mistake_row(mistake, picture) for mistake in errors.mistakes],
    )


def _build_score_tables(errors: ErrorAnalysis, noun: str) -> list[_ScoreTable]:
    """Return the tables of scores that have rows."""
    tables = [
        ("Entity by entity", "entity", "entities", errors.entities),
        ("Class by class", "class", noun, errors.classes),
    ]
    return [table for table in tables if table[-1]]


def _build_confusion_rows(errors: ErrorAnalysis) -> list[_ConfusionRow]:
    """Return the rows of the matrix, each cell the darker the larger its share of the row."""
    counts = errors.confusion
    if counts is None or len(counts) > MAX_MATRIX_CLASSES:
        return []
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return [
        _ConfusionRow(
            row.label,
            [
                (int(count), _cell_color(float(shares[i, j]), i == j))
                for j, count in enumerate(counts[i])
            ],
        )
        for i, row in enumerate(errors.classes)
    ]


def _cell_color(share: float, right: bool) -> str:
    color = "31,111,235" if right else "207,34,46"
    return f"rgba({color},{0.7 * share:.3f})"


def _build_mistake_row(mistake: Mistake, picture: ImageLookup | None) -> _MistakeRow:
    if picture is not None:
        image = _encode_data_uri(make_thumbnail(picture(mistake.content[0])))
        return _MistakeRow(mistake, picture=image)
    if mistake.word is None:
        return _MistakeRow(mistake, before=" / ".join(mistake.content))
    before, word, after = split_context(mistake.content, mistake.word)
    return _MistakeRow(mistake, before=before, word=word, after=after)


def _encode_data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


# Examples for the published record.


def build_examples(
    mistakes: list[Mistake], picture: ImageLookup | None, folder: Path
) -> list[Example]:
    """Return mistakes as the published record holds them; images go to the folder's assets.

    Args:
        mistakes: the surest first.
        picture: the pixels of the inputs, where they are images.
        folder: what is published.
    """
    return [
        _build_example(mistake, picture, folder, f"assets/mistake-{number:02d}.png")
        for number, mistake in enumerate(mistakes, 1)
    ]


def _build_example(
    mistake: Mistake, picture: ImageLookup | None, folder: Path, name: str
) -> Example:
    example = Example(true=mistake.label, said=mistake.prediction, surety=mistake.confidence)
    shown: dict[str, object] = {"texts": list(mistake.content)}
    if picture is not None:
        (folder / "assets").mkdir(exist_ok=True)
        (folder / name).write_bytes(make_thumbnail(picture(mistake.content[0])))
        shown = {"picture": name}
    elif mistake.word is not None:
        shown = {"words": split_context(mistake.content, mistake.word)}
    return example.model_copy(update=shown)


def build_widget_examples(
    samples: list[tuple[str, str, dict[str, float]]], most: int = MAX_WIDGET_CLASSES
) -> list[WidgetExample]:
    """Return the hub's widget examples with outputs, which show without a provider that serves.

    Args:
        samples: text, true label, and the probability of every class.
        most: classes that are shown of each, the likeliest first.
    """
    return [
        WidgetExample(
            text=text,
            example_title=f"true label: {to_one_line(label)}",
            output=[
                WidgetScore(label=to_one_line(name), score=round(by_class[name], 4))
                for name in sorted(by_class, key=lambda name: -by_class[name])[:most]
            ],
        )
        for text, label, by_class in samples
        if to_one_line(text, MAX_WIDGET_CHARACTERS) == text
    ]


def split_context(words: tuple[str, ...], position: int) -> tuple[str, str, str]:
    """Return the words before one, the word, and the words after it."""
    before = words[max(0, position - CONTEXT_WORDS) : position]
    after = words[position + 1 : position + 1 + CONTEXT_WORDS]
    return " ".join(before), words[position], " ".join(after)


def make_thumbnail(pixels: np.ndarray) -> bytes:
    """Return a small PNG of (3, height, width) uint8 pixels."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(np.moveaxis(np.asarray(pixels), 0, -1)))
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
