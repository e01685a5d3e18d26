"""Guess which columns of a table are the input, the label and the group, and what the task is."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from hftl.data.normalization import DECIMAL_COMMA, is_missing_value, normalize_name
from hftl.data.tables import IMAGE_SUFFIXES
from hftl.errors import DataError, join_names

MAX_CLASSES = 50
MAX_NAME_WORDS = 2
"""Words of a file's name; a longer one may be a sentence."""
MAX_WORDS = 0.05
"""Share of words among the numbers of a target."""
LABEL_NAMES = (
    "label",
    "labels",
    "tags",
    "ner_tags",
    "class",
    "category",
    "target",
    "sentiment",
    "topic",
    "y",
)
TEXT_NAMES = ("text", "sentence", "review", "content", "body", "document", "comment", "message")
WORD_LIST_NAMES = ("tokens", "words")
GROUP_NAMES = ("group", "document_id", "author", "user", "user_id", "patient", "session")
BINARY_NAMES = ({"0", "1"}, {"false", "true"})

NO_GUESS_ADVICE = "Write the recipe by hand: data.train names the columns; keys: hftl schema"


@dataclass(frozen=True)
class ColumnGuess:
    """Hold a guess about the columns; each note gives its reason.

    `kind` is `text` or `image`, and `inputs` the columns of it, for texts one or two.
    """

    kind: str
    inputs: list[str]
    label: str
    task: str
    group: str | None
    notes: list[str]
    numbers: list[str]
    """The classes, where they are numbers that say nothing."""
    unused: list[str]
    """The other columns."""
    beside: list[str]
    """Of these the ones that hold 0 and 1, where the label does."""


def guess_columns(
    name: str, rows: Sequence[Mapping[str, object]], folder: Path = Path()
) -> ColumnGuess:
    """Guess text, label, task and group from the columns' names and values.

    Args:
        name: of the table, for messages.
        rows: its first ones.
        folder: what paths of pictures are relative to.

    Raises:
        DataError: if no column can be the text, or none the label.
    """
    columns = {c: [row.get(c) for row in rows if is_given(row.get(c))] for c in rows[0]}
    image = next((c for c in columns if _are_images(columns[c], folder)), None)
    others = {c: values for c, values in columns.items() if c != image}
    label, task = _guess_label(name, others)
    words = _find_word_lists(others, label) if task == "multi-label" else None
    if words:
        task = "token-classification"
    inputs = [image] if image else [words] if words else _guess_text_columns(name, others, label)
    groups = [c for c in others if c.lower() in GROUP_NAMES and c not in (*inputs, label)]
    group = next((c for c in groups if len(columns[c]) == len(rows)), None)
    kind = "image" if image else "text"
    named = len(inputs) > 1 or image or words or inputs[0].lower() in TEXT_NAMES
    notes = [f"{kind}: {' and '.join(inputs)} ({'by name' if named else 'the longest column'})"]
    if group:
        notes.append(f"group: {group}; its rows stay in one split")
    elif groups:
        lacking = len(rows) - len(columns[groups[0]])
        notes.append(
            f"group: none; {groups[0]} is empty in {lacking} of {len(rows)} rows, so that rows "
            "that belong together may be on both sides of a split"
        )
    unused = [c for c in columns if c not in (*inputs, label, group)]
    is_binary = _is_binary(columns[label])
    return ColumnGuess(
        kind, inputs, label, task, group, notes, _list_numbers(task, columns[label]), unused,
        beside=[c for c in unused if is_binary and _is_binary(columns[c])],
    )  # fmt: skip


def is_given(value: object) -> bool:
    """Return whether a cell holds anything but blanks."""
    return value is not None and not (isinstance(value, str) and not value.strip())


def _is_binary(values: list[object]) -> bool:
    """Return whether a column holds 0 and 1, or false and true, and both of them."""
    return {normalize_name(value).lower() for value in values} in BINARY_NAMES


def _list_numbers(task: str, values: list[object]) -> list[str]:
    """Return the classes in their order where all of them are numbers; else none."""
    if task != "classification" or not _are_numbers(values):
        return []
    return sorted({normalize_name(value) for value in values}, key=float)


def _are_images(values: list[object], folder: Path) -> bool:
    """Return whether a column holds images, and not sentences that end in the name of one."""
    if not values or not all(map(_is_image, values)):
        return False
    sentences = [v for v in values if isinstance(v, str) and len(v.split()) > MAX_NAME_WORDS]
    return len(sentences) < len(values) or (folder / sentences[0]).exists()


def _is_image(value: object) -> bool:
    """Return whether a value is an image: a file, bytes, or the path of one."""
    if isinstance(value, dict):
        return "bytes" in value
    return isinstance(value, (Path, bytes)) or (
        isinstance(value, str) and Path(value).suffix.lower() in IMAGE_SUFFIXES
    )


def _find_word_lists(columns: dict[str, list[object]], label: str) -> str | None:
    """Return a column of lists as long as the label's lists; None without one."""
    lengths = _measure_lists(columns[label])
    others = ((c, values) for c, values in columns.items() if c != label and values)
    return next((c for c, values in others if _measure_lists(values) == lengths), None)


def _measure_lists(values: list[object]) -> list[int]:
    """Return the length of each list; -1 of what is none."""
    return [len(value) if isinstance(value, list) else -1 for value in values]


def _guess_label(name: str, columns: dict[str, list[object]]) -> tuple[str, str]:
    """Return label and task: a column by name, of lists, else with the fewest values."""
    named = [c for name in LABEL_NAMES for c in columns if c.lower() == name and columns[c]]
    lists = [
        c for c, values in columns.items()
        if values and all(isinstance(v, list) for v in values) and c.lower() not in WORD_LIST_NAMES
    ]  # fmt: skip
    few = sorted(
        (
            c
            for c in columns
            if 2 <= _count_distinct(columns[c]) <= min(MAX_CLASSES, _halve_count(columns[c]))
        ),
        key=lambda c: _count_distinct(columns[c]),
    )
    numbers = [c for c in columns if columns[c] and _are_mostly_numbers(columns[c])]
    for column in [*named, *lists, *few, *numbers]:
        values = columns[column]
        if column in lists:
            return column, "multi-label"
        _refuse_decimal_commas(name, column, values)
        many = _count_distinct(values) > MAX_CLASSES
        fractional = any(n is not None and not n.is_integer() for n in map(_parse_number, values))
        # A few words among the numbers of a target are rows that cannot be used.
        if _are_mostly_numbers(values) and (many or fractional):
            return column, "regression"
        return column, "classification"
    raise DataError(
        f"{name}: no column looks like a label; it has {_list_columns(columns)}",
        NO_GUESS_ADVICE,
    )


def _refuse_decimal_commas(name: str, column: str, values: list[object]) -> None:
    """Refuse a label of numbers some of which have a comma: neither classes nor a target.

    Raises:
        DataError: naming the first such number.
    """
    texts = [str(value).strip() for value in values]
    commas = [text for text in texts if DECIMAL_COMMA.fullmatch(text)]
    numbers = sum(_parse_number(text) is not None for text in texts)
    if commas and len(commas) + numbers == len(texts):
        point = commas[0].replace(",", ".")
        raise DataError(
            f"{name}: the column {column!r} holds numbers with a comma, such as {commas[0]!r}",
            f"Write decimals with a point, as {point}, and thousands without a comma; for several "
            "labels a row give a column of lists (.jsonl, .parquet)",
        )


def _guess_text_columns(name: str, columns: dict[str, list[object]], label: str) -> list[str]:
    """Return a pair such as sentence1 and sentence2, a column by name, else the longest."""
    lengths = {
        c: sum(map(len, map(str, values))) / len(values)
        for c, values in columns.items()
        if c != label and values and all(isinstance(v, str) for v in values)
        and not _are_numbers(values)
    }  # fmt: skip
    if not lengths:
        raise DataError(
            f"{name}: no column looks like text; it has {_list_columns(columns)}",
            NO_GUESS_ADVICE,
        )
    for column in lengths:
        second = f"{column[:-1]}2"
        if column.endswith("1") and second in lengths:
            return [column, second]
    if "premise" in lengths and "hypothesis" in lengths:
        return ["premise", "hypothesis"]
    named = [c for known in TEXT_NAMES for c in lengths if c.lower() == known]
    return [named[0] if named else max(lengths, key=lambda c: lengths[c])]


def _list_columns(columns: dict[str, list[object]]) -> str:
    return join_names(c if values else f"{c} (empty in every row)" for c, values in columns.items())


def _count_distinct(values: list[object]) -> int:
    return len({normalize_name(value) for value in values})


def _halve_count(values: list[object]) -> int:
    return max(2, len(values) // 2)


def _parse_number(value: object) -> float | None:
    """Return a number, or that which a text spells as CSV tables do; None for anything else."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    return None


def _are_numbers(values: list[object]) -> bool:
    return all(_parse_number(value) is not None for value in values)


def _are_mostly_numbers(values: list[object]) -> bool:
    """Return whether hardly any value is anything but a number, with a point or a comma.

    A word that comes again and again, among classes that are codes, is a class.
    """
    texts = [str(value).strip() for value in values if _parse_number(value) is None]
    words = Counter(text for text in texts if not DECIMAL_COMMA.fullmatch(text))
    is_class = any(count > 2 and not is_missing_value(word) for word, count in words.items())
    return not is_class and words.total() <= MAX_WORDS * len(values)
