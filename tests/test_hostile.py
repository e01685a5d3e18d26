"""Put hostile strings in every place that a card shows: each stays text, and the card parses."""

import copy
import html
import re
import unicodedata
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from markdown_it import MarkdownIt
from support.records import (
    HFTL_KEYS,
    add_forgetting,
    make_record,
    render,
    render_page,
    validate_own_card,
)
from test_card import shape

from hftl.card.markdown import (
    INVISIBLE_CATEGORIES,
    escape_markup,
    format_yaml_block,
    slugify,
    to_code_text,
    to_one_line,
)
from hftl.card.plots import plot_ladder
from hftl.data.normalization import JOINERS
from hftl.errors import RunFolderError
from hftl.measure.error_analysis import ClassScore, ErrorAnalysis, Mistake
from hftl.measure.record import Record

PAYLOADS = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "</code></pre><script>x</script>", '"><a href="javascript:x">y</a>', "' onmouseover='x",
    "<!-- hidden", "<details open ontoggle=x>", "&lt;script&gt;", "[x](javascript:alert(1))",
    "![x](http://evil.example/x.png)", "<http://evil.example>", "http://evil.example/x",
    "www.evil.example", "a@evil.example", "[x]: http://evil.example", "](http://evil.example)",
    "`code` **bold** _em_ ~~no~~", "``` \n# heading\n```", "~~~~\n# heading", "a | b | c",
    "| x |\n|---|", "# heading", "- item\n1. x", "---\nlicense: mit\n---", "\n---\n\n# other",
    "x: y # z", "!!python/object/apply:os.system ['x']", "&anchor *alias", "{{ 7*7 }}",
    "{% for x in y %}{{ x }}", "{# gone #}{{ config }}", "$x$ \\(y\\)", "null", "1e5",
    "\u202eevil\u202c", "\u200b\u2060\ufeff", "\x1b[31mred\x1b[0m\x07", "nul\x00nul\x7f",
    "\ud800half", "x\u2028y\x85z", "n" * 10_000, "`" * 10_000, "\\", "\ue000\U000e0041",
]  # fmt: skip
PLACES = ["labels", "dataset", "columns", "recipe", "words"]
BASE = add_forgetting(make_record())
BASE["adapt"] = None
TAGS = {
    "h1", "h2", "h3", "p", "strong", "em", "code", "pre", "a", "img", "ul", "li", "table", "thead",
    "tbody", "tr", "th", "td", "details", "summary", "blockquote",
}  # fmt: skip


def record_with(payload: str, place: str) -> dict[str, Any]:
    """Return a record of an opted-in, forced card that has the payload in one of its places."""
    record = copy.deepcopy(BASE)
    record |= {"forced": {"reason": "for comparison"}, "classes": None}
    record["check"]["warnings"] = ["the class 'x' is rare"]
    record["examples"] = [{"texts": ["a text"], "true": "x", "said": "y", "surety": 0.9}]
    put = {"labels": _labels, "dataset": _dataset, "columns": _columns, "recipe": _recipe,
           "words": _words}  # fmt: skip
    put[place](record, payload)
    return record


def _labels(record: dict[str, Any], payload: str) -> None:
    record["data"]["labels"] = [payload, f"{payload}2"]
    rows = [{"label": payload, "own": 0.1, "baseline": 0.2, "rows": 3}]
    record["classes"] = {"baseline": "scratch", "rows": rows}


def _dataset(record: dict[str, Any], payload: str) -> None:
    record["data"]["name"] = payload
    for table in ("train", "general"):
        record["recipe"]["data"][table]["path"] = _replace_surrogates(payload)


def _replace_surrogates(payload: str) -> str:
    """Return the payload as a name of a recipe, which takes no half of a character."""
    return payload.encode("utf-8", "replace").decode()


def _columns(record: dict[str, Any], payload: str) -> None:
    record["recipe"]["data"]["train"] |= {"text": payload, "label": payload}
    record["recipe"]["data"]["group"] = payload
    forgetting = record["forgetting"]
    forgetting["general"]["documents"] = forgetting["headline"]["control"] = payload
    for entry in forgetting["arms"]:
        controls = entry["figures"]["controls"]
        entry["figures"]["controls"] = {payload: controls["document"]}


def _recipe(record: dict[str, Any], payload: str) -> None:
    record["recipe"]["source"]["model"] = _replace_surrogates(payload)
    record["recipe"]["finetune"]["training"]["optim_args"] = payload
    record["source"] |= {"model": payload, "name": payload, "published_as": payload,
                         "revision": payload}  # fmt: skip


def _words(record: dict[str, Any], payload: str) -> None:
    record["forced"] = {"reason": payload}
    record["check"]["warnings"] = [f"the class {payload!r} is rare", f"the class {payload} is rare"]
    record["verdict"]["reasons"] = [f"it is so: {payload}"]
    record["examples"] = [{"texts": [payload, payload], "true": payload, "said": payload,
                           "surety": 0.9}]  # fmt: skip
    record["environment"]["device"] = payload


class PageParser(HTMLParser):
    """Collect elements with their attributes, and the text outside of code."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("code", "style", "a"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("code", "style", "a"):
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open:
            self.words.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment hides {data!r}")


def check_page(page: str, more: set[str] = frozenset()) -> Counter[str]:  # pyright: ignore
    """Check that a page holds only our own elements, links and pictures; return their counts."""
    seen = PageParser(page)
    for tag, attributes in seen.elements:
        assert tag in TAGS | more, f"<{tag}>"
        assert not any(name.startswith("on") for name in attributes), attributes
        for name in ("href", "src"):
            target = attributes.get(name) or "assets/"
            assert target.startswith(("https://huggingface.co/", "assets/", "data:image/png"))
    text = "".join(seen.words)
    assert more or not re.search(r"://|www\.|\w@\w", text), "GitHub would make a link of it"
    return Counter(tag for tag, _ in seen.elements if tag in ("a", "img", "details", "h1", "h2"))


def front_of(card: str) -> dict[str, Any]:
    block = REGEX_YAML_BLOCK.search(card)
    assert block is not None
    front = yaml.safe_load(block[2])
    assert ModelCard(card).data.to_dict() == front and set(front) <= HFTL_KEYS
    return front


@cache
def plain_front() -> dict[str, Any]:
    return front_of(render(BASE))


@cache
def plain_shape(place: str) -> list[tuple[str, str]]:
    return shape(render(record_with("plain", place)))


def expected_front(place: str, payload: str) -> dict[str, Any]:
    """Return the metadata of the plain record, with what the place changes in them."""
    front = copy.deepcopy(plain_front())
    if place == "dataset":
        result = front["model-index"][0]["results"][0]["dataset"]
        result |= {"name": to_one_line(payload), "type": slugify(payload)}
    if place == "recipe":
        if re.fullmatch(r"[\w.-]{1,96}", payload, re.ASCII):
            front["tags"][-1] = f"base_model:adapter:{payload}"
            return front | {"base_model": payload, "base_model_revision": payload}
        front["tags"].pop()
        del front["base_model"], front["base_model_relation"]
    return front


@cache
def make_parser(raw: bool) -> MarkdownIt:
    """Return a parser of GitHub's markdown, with or without HTML."""
    return MarkdownIt("commonmark", {"html": raw}).enable("table").enable("strikethrough")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_payload_is_inert(payload: str, place: str) -> None:
    record = record_with(payload, place)
    card = render(record)
    card.encode("utf-8")
    unseen = {c for c in card if unicodedata.category(c) in INVISIBLE_CATEGORIES} - set(
        "\n" + JOINERS
    )
    assert not unseen
    front, expected = front_of(card), expected_front(place, payload)
    for metadata in (front, expected):
        name = metadata["model-index"][0].pop("name")
        assert re.fullmatch(r"[\w.-]+", name)
    assert front == expected
    problems = validate_own_card(card)
    assert [p for p in problems if place != "recipe" or "base_model is missing" not in p] == []
    body = card.split("\n---\n", 1)[1]
    counts = [check_page(make_parser(raw).render(body)) for raw in (False, True)]
    assert shape(card) == plain_shape(place)
    assert counts[0]["a"] == counts[1]["a"] == int("base_model" in front) and counts[0]["img"] == 2
    assert counts[1]["details"] == 2 and counts[0]["h1"] == 1


@pytest.mark.parametrize(
    ("section", "key", "payload"),
    [("source", "revision", "{{ 7*7 }}"), ("source", "revision", "nul\x00nul"),
     ("source", "model", "\ud800half"), ("data", "train", "\ud800half")],
)  # fmt: skip
def test_a_recipe_refuses_names_that_can_be_none(section: str, key: str, payload: str) -> None:
    record = copy.deepcopy(BASE)
    record["recipe"][section][key] = {"path": payload} if key == "train" else payload
    with pytest.raises(RunFolderError, match=rf"recipe\.{section}\.{key}"):
        render(record)


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_payload_is_inert_in_the_report(payload: str, tmp_path: Path) -> None:
    record = record_with(payload, "labels")
    for name in ("ladder", "frontier"):
        (tmp_path / "assets").mkdir(exist_ok=True)
        (tmp_path / "assets" / f"{name}.png").write_bytes(b"\x89PNG")
    mistakes = [Mistake((payload,) * 3, payload, payload, 0.9, payload, word) for word in (None, 1)]
    errors = ErrorAnalysis(
        [ClassScore(payload, 0.5, 0.5, 0.5, 4)] * 2, np.eye(2, dtype=int), mistakes, 2, 4
    )
    report = render_page(record, tmp_path, errors)
    report.encode("utf-8")
    counts = check_page(report, {"html", "head", "meta", "title", "style", "body", "div", "mark"})
    assert counts["img"] == 2 and counts["a"] == 1 and counts["details"] == 2
    assert html.escape(to_one_line(payload, 400), quote=False)[:20] in report.replace(
        "&#34;", '"'
    ).replace("&#39;", "'")  # noqa: E501


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_label_is_shown_and_recipe_reads_back(payload: str) -> None:
    record = record_with(payload, "labels")
    shown = html.unescape(MarkdownIt("commonmark").render(render(record)))
    assert f"<code>{to_code_text(payload)}</code>" in shown
    recipe = record_with(payload, "columns")["recipe"]
    block = format_yaml_block(recipe)
    (token,) = MarkdownIt("commonmark").parse(block)
    assert token.type == "fence" and yaml.safe_load(token.content) == recipe


@pytest.mark.parametrize(
    "plain",
    ["of 3 rows: +0.1 [+0.0, +0.2]", "data.max_length=128 is above it", "Ünïcode كلمة 词"],
)
def test_plain_text_stays_as_it_is(plain: str) -> None:
    assert escape_markup(plain) == plain == to_one_line(plain)


def test_ladder_of_a_hostile_record_is_drawn(tmp_path: Path) -> None:
    plot_ladder(Record.parse(record_with("$x$", "labels")), tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
