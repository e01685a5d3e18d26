"""Text that the page takes for text, whatever it holds: no markup, no link, nothing unseen."""

import re
import unicodedata
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined, Template

MAX_NAME_CHARACTERS = 80
"""Characters of a name that are shown."""
MAX_SENTENCE_CHARACTERS = 1000
JOINERS = "\u200c\u200d"
"""Unseen, and needed to write Persian and the languages of India."""
INVISIBLE_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Controls, marks of direction, halves of characters, and what has no character at all."""
MARKUP = re.compile(
    r"[<>`\\|&~*@$]|\][(\[:]|(?<!\w)_|_(?!\w)|://|www\.|\b(?:javascript|data|mailto):",
    re.IGNORECASE,
)
"""What Markdown, or GitHub's, might take for more than text."""


def to_one_line(text: str, longest: int = MAX_NAME_CHARACTERS) -> str:
    """Text in one line: what cannot be seen is spelt out, and what is too long is cut."""
    shown = "".join(map(_spell_invisible, " ".join(text[: 4 * longest].split())))
    return shown if len(shown) <= longest else f"{shown[: longest - 3]}..."


def to_code_text(text: str, longest: int = MAX_NAME_CHARACTERS) -> str:
    """Text that cannot leave its code span."""
    return to_one_line(text, longest).replace("`", "'")


def escape_pipes(markdown: str) -> str:
    """Escape what would end a table's cell; Markdown shows `\\|` as `|`, in code spans too."""
    return markdown.replace("|", "\\|")


def format_code(text: str, longest: int = MAX_NAME_CHARACTERS) -> str:
    """Text as a code span, in which nothing is markup."""
    return f"`{to_code_text(text, longest) or ' '}`"


def escape_markup(text: str) -> str:
    """A sentence or a name as it is where it is plain, else as a code span."""
    shown = to_one_line(text, MAX_SENTENCE_CHARACTERS)
    return format_code(text, MAX_SENTENCE_CHARACTERS) if MARKUP.search(shown) else shown


def slugify(text: str) -> str:
    """A name of letters, digits, dots, hyphens and underscores only, and no address."""
    return re.sub(r"[^\w.-]+|(?<=www)\.", "-", to_one_line(text))


def format_yaml_block(tree: Any) -> str:
    """A tree as YAML in a block of code, which reads back as the same tree."""
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    if any(_spell_invisible(character) != character for character in text if character != "\n"):
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=False)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"


def _spell_invisible(character: str) -> str:
    if unicodedata.category(character) not in INVISIBLE_CATEGORIES or character in JOINERS:
        return character
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


# What the card says differently for texts, words and pictures.


CLASSICAL_PHRASES = {
    "text": "TF-IDF with a linear model",
    "words": "the words' spelling with a linear model",
    "image": "downsampled pixels with a linear model",
}
ARM_PHRASES = {
    "scratch": "the same architecture trained from scratch",
    "head": "the frozen encoder with a linear head",
    "majority": "always the most frequent answer",
    "source": "the same without adaptation",
}
TASK_PHRASES = {"text": "sorts text into", "words": "tags words as", "image": "sorts pictures into"}


def input_kind(record: dict[str, Any]) -> str:
    """What a model of this record takes: `text`, `words` or `image`."""
    if record["data"]["task"] == "token-classification":
        return "words"
    return record["data"].get("modality", "text")


def describe_arm(arm: str, record: dict[str, Any]) -> str:
    """An arm's name, and what it is where that is known."""
    known = ARM_PHRASES | {"classical": CLASSICAL_PHRASES[input_kind(record)]}
    return f"{arm} ({known[arm]})" if arm in known else escape_markup(arm)


def is_pooled(record: dict[str, Any]) -> bool:
    """Return whether the head is hftl's own, above `mean` or `cls` pooling; stock classes do not
    answer with it, so that only the encoder's features load without hftl."""
    return record["recipe"]["finetune"]["pooling"] != "native"


def find_pipeline_tag(record: dict[str, Any]) -> str:
    """Return the hub's name for the task."""
    start = "token" if input_kind(record) == "words" else record["data"].get("modality", "text")
    return f"{start}-classification"


def example_input(record: dict[str, Any]) -> str:
    """One input, as `predict` takes it, in source code."""
    columns = record["recipe"]["data"]["train"]["text"]
    if input_kind(record) == "text" and isinstance(columns, list) and len(columns) == 2:
        return '("A first text.", "A second text.")'
    return {
        "text": '"A text of your own."',
        "words": '["Each", "word", "apart"]',
        "image": '"a_picture.png"',
    }[input_kind(record)]


# A page from its template: metadata first, then the text.


def render_page(template: str, page: dict[str, Any], metadata: ModelCardData) -> str:
    """The whole card.

    Args:
        template: a file of this folder.
        page: what the template names.
        metadata: what stands before the text.
    """
    return f"---\n{metadata.to_yaml().strip()}\n---\n\n{_load_template(template).render(**page)}"


@cache
def _load_template(name: str) -> Template:
    engine = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    engine.filters |= {
        "first_upper": lambda text: text[:1].upper() + text[1:],
        "inert": escape_markup,
    }
    engine.filters["in_table"] = escape_pipes
    return engine.from_string(files("hftl.card").joinpath(name).read_text("utf-8"))
