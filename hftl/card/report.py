"""The report: a card as one HTML file, and where the model is wrong, which the card leaves out."""

import base64
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from hftl.card.training_sections import ImageLookup, make_thumbnail, split_context
from hftl.card.wording import to_one_line
from hftl.measure.error_analysis import ErrorAnalysis, Mistake
from hftl.measure.verdict import is_better

OUTCOME_COLORS = {"positive": "#1a7f37", "negative": "#cf222e"}
"""Of the line beside the gain, by its outcome."""
DEFAULT_COLOR = "#9a6700"
MAX_CHARACTERS = 400
"""Characters of a text that are shown."""
MAX_MATRIX_CLASSES = 40
"""Classes up to which what is taken for what is shown."""


def render_report(
    card: str, folder: Path, record: dict[str, Any], errors: ErrorAnalysis | None = None,
    picture: ImageLookup | None = None,
) -> str:  # fmt: skip
    """The card as one HTML file, its pictures inside.

    Args:
        card: README.md.
        folder: what the card's pictures lie under.
        record: that of the card.
        errors: what the published weights get wrong; None where there is no task.
        picture: the pixels of what was read, where that is pictures.
    """
    body = card.split("\n---\n", 1)[1]
    title = next(line[2:] for line in body.splitlines() if line.startswith("# "))
    told = {} if errors is None else _build_errors_section(errors, record, picture)
    return _load_template().render(
        title=title, page=Markup(_render_html(body, folder)), errors=errors,
        color=_choose_color(record), **told,
    )  # fmt: skip


def _choose_color(record: dict[str, Any]) -> str:
    """Return the color of the line beside the gain, green only where `head` is not as good."""
    gain = record["transfer_gain"]
    if gain is None:
        return DEFAULT_COLOR
    head = [row["gain_of_own"] for row in record["ladder"] if row["arm"] == "head"]
    level = any(over is not None and not is_better(over) for over in head)
    return (
        DEFAULT_COLOR
        if level and gain["outcome"] == "positive"
        else OUTCOME_COLORS.get(gain["outcome"], DEFAULT_COLOR)
    )


@cache
def _load_template() -> Template:
    engine = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True)
    engine.filters["line"] = lambda text: to_one_line(text, MAX_CHARACTERS)
    return engine.from_string(files("hftl.card").joinpath("report.html").read_text("utf-8"))


def _render_html(body: str, folder: Path) -> str:
    """The card's text as HTML; nothing in it is markup but what Markdown makes."""
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(_mark_details(body))

    def inline(match: re.Match[str]) -> str:
        return f'src="{_encode_data_uri((folder / match[1]).read_bytes())}"'

    html = re.sub(r'src="(assets/[\w-]+\.png)"', inline, html)
    html = re.sub(r"<h2>\x02(.*?)</h2>", r"<details><summary>\1</summary>", html)
    return html.replace("<p>\x03</p>", "</details>")


def _mark_details(body: str) -> str:
    """Folded parts as marks that no card can hold: HTML in the card is escaped in the report."""
    body = re.sub(r"(?m)^<details><summary>(.*?)</summary>$", "## \x02\\1", body)
    return re.sub(r"(?m)^</details>$", "\x03", body)


def _build_errors_section(
    errors: ErrorAnalysis, record: dict[str, Any], picture: ImageLookup | None
) -> dict[str, Any]:
    words = record["data"]["task"] == "token-classification"
    names = record["data"]["task"] == "multi-label"
    target = not errors.classes
    noun = "words" if words else "rows"
    share = f"{errors.wrong:,} of {errors.answers:,} {'answers' if names else noun} are wrong."
    shown = len(errors.mistakes)
    return {
        "seed": record["published_seed"],
        "told": f"its {shown} largest errors stand below." if target else share,
        "kept": "The card shows the mistakes too, as the recipe lets examples out."
        if record.get("examples")
        else "This part is in the report only, and stays on this machine.",
        "tables": _build_score_tables(errors, noun),
        "confused": _build_confusion_rows(errors),
        "heading": f"The {shown} largest errors" if target else f"Its {shown} surest mistakes",
        "surety": "off by" if target else "probability",
        "mistakes": [_build_mistake_row(mistake, picture) for mistake in errors.mistakes],
    }


def _build_score_tables(
    errors: ErrorAnalysis, noun: str
) -> list[tuple[str, str, str, list[dict[str, Any]]]]:
    """Return the tables of scores: heading, what a row is of, what it counts, and the rows."""
    tables = [
        ("Entity by entity", "entity", "entities", errors.entities),
        ("Class by class", "class", noun, errors.classes),
    ]
    return [table for table in tables if table[-1]]


def _build_confusion_rows(errors: ErrorAnalysis) -> list[dict[str, Any]]:
    """The rows of the table, each cell the darker the larger its share of the row."""
    counts = errors.counts
    if counts is None or len(counts) > MAX_MATRIX_CLASSES:
        return []
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return [
        {
            "label": row["label"],
            "cells": [
                {"count": int(counts[i, j]), "color": _cell_color(float(shares[i, j]), i == j)}
                for j in range(len(counts))
            ],
        }
        for i, row in enumerate(errors.classes)
    ]


def _cell_color(share: float, right: bool) -> str:
    color = "31,111,235" if right else "207,34,46"
    return f"rgba({color},{0.7 * share:.3f})"


def _build_mistake_row(mistake: Mistake, picture: ImageLookup | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "label": mistake.label, "prediction": mistake.prediction, "surety": mistake.confidence,
        "where": mistake.location, "picture": None, "word": None, "before": "", "after": "",
    }  # fmt: skip
    if picture is not None:
        row["picture"] = _encode_data_uri(make_thumbnail(picture(mistake.content[0])))
    elif mistake.word is None:
        row["before"] = " / ".join(mistake.content)
    else:
        before, row["word"], after = split_context(mistake.content, mistake.word)
        row |= {"before": before, "after": after}
    return row


def _encode_data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
