"""Text that the page takes for text, whatever it holds: no markup, no link, nothing unseen."""

import re
import unicodedata
from typing import Any

import yaml

LONGEST = 80
"""Characters of a name that are shown."""
SENTENCE = 1000
JOINERS = "\u200c\u200d"
"""Unseen, and needed to write Persian and the languages of India."""
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Controls, marks of direction, halves of characters, and what has no character at all."""
MARKUP = re.compile(
    r"[<>`\\|&~*@$]|\][(\[:]|(?<!\w)_|_(?!\w)|://|www\.|\b(?:javascript|data|mailto):",
    re.IGNORECASE,
)
"""What Markdown, or GitHub's, might take for more than text."""


def one_line(text: str, longest: int = LONGEST) -> str:
    """Text in one line: what cannot be seen is spelt out, and what is too long is cut."""
    shown = "".join(map(_seen, " ".join(text[: 4 * longest].split())))
    return shown if len(shown) <= longest else f"{shown[: longest - 3]}..."


def cell(text: str, longest: int = LONGEST) -> str:
    """Text that cannot leave its code span."""
    return one_line(text, longest).replace("`", "'")


def in_table(markdown: str) -> str:
    """Escape what would end a table's cell; Markdown shows `\\|` as `|`, in code spans too."""
    return markdown.replace("|", "\\|")


def code(text: str, longest: int = LONGEST) -> str:
    """Text as a code span, in which nothing is markup."""
    return f"`{cell(text, longest) or ' '}`"


def inert(text: str) -> str:
    """A sentence or a name as it is where it is plain, else as a code span."""
    shown = one_line(text, SENTENCE)
    return code(text, SENTENCE) if MARKUP.search(shown) else shown


def slug(text: str) -> str:
    """A name of letters, digits, dots, hyphens and underscores only, and no address."""
    return re.sub(r"[^\w.-]+|(?<=www)\.", "-", one_line(text))


def fenced(tree: Any) -> str:
    """A tree as YAML in a block of code, which reads back as the same tree."""
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    if any(_seen(character) != character for character in text if character != "\n"):
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=False)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"


def _seen(character: str) -> str:
    if unicodedata.category(character) not in UNSEEN or character in JOINERS:
        return character
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
