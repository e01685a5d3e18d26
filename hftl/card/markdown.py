"""Write text of users and strangers into Markdown: on one line, visible, and never as markup."""

import re
import unicodedata
from typing import Any

import yaml

from hftl.data.normalization import JOINERS

MAX_NAME_CHARACTERS = 80
MAX_SENTENCE_CHARACTERS = 1000
INVISIBLE_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Controls, marks of direction, halves of characters, and code points without a character."""
MARKUP = re.compile(
    r"[<>`\\|&~*@$]|\][(\[:]|(?<!\w)_|_(?!\w)|://|www\.|\b(?:javascript|data|mailto):",
    re.IGNORECASE,
)
"""Characters that Markdown, or GitHub's, might take for more than text."""


def to_one_line(text: str, longest: int = MAX_NAME_CHARACTERS) -> str:
    """Return text in one line: invisible characters are spelt out, and what is too long is cut."""
    shown = "".join(map(_spell_invisible, " ".join(text[: 4 * longest].split())))
    return shown if len(shown) <= longest else f"{shown[: longest - 3]}..."


def to_code_text(text: str, longest: int = MAX_NAME_CHARACTERS) -> str:
    """Return text that cannot leave its code span."""
    return to_one_line(text, longest).replace("`", "'")


def escape_pipes(markdown: str) -> str:
    """Escape what would end a table's cell; Markdown shows `\\|` as `|`, in code spans too."""
    return markdown.replace("|", "\\|")


def format_code(text: str, longest: int = MAX_NAME_CHARACTERS) -> str:
    """Return text as a code span, in which nothing is markup."""
    return f"`{to_code_text(text, longest) or ' '}`"


def escape_markup(text: str) -> str:
    """Return a sentence or a name as it is where it is plain, else as a code span."""
    shown = to_one_line(text, MAX_SENTENCE_CHARACTERS)
    return format_code(text, MAX_SENTENCE_CHARACTERS) if MARKUP.search(shown) else shown


def slugify(text: str) -> str:
    """Return a name of letters, digits, dots, hyphens and underscores only, and no address."""
    return re.sub(r"[^\w.-]+|(?<=www)\.", "-", to_one_line(text))


def format_yaml_block(tree: Any) -> str:
    """Return a tree as YAML in a block of code, which reads back as the same tree."""
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
