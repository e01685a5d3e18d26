"""Read a table whose columns are guessed: count its labels, and doubt what may not be meant.

What `hftl check` would refuse of the table is refused here.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from hftl.config.data import Data
from hftl.data.columns import ColumnGuess, guess_columns, is_given
from hftl.data.images import ImageDecodeError, decode_image
from hftl.data.label_parsing import (
    get_value_type,
    list_classes,
    parse_label,
    refuse_fractions,
    refuse_mixed_labels,
)
from hftl.data.load import find_row_fault
from hftl.data.normalization import find_doubtful_names
from hftl.data.rows import BadRows, InputSpec, RawRow, find_reading_fault
from hftl.data.tables import READERS, guess_format
from hftl.errors import DataError
from hftl.plurals import choose_verb, count_noun

MAX_SAMPLE_ROWS = 2000
"""Rows that a guess is made from."""
MAX_OPENED = 100
"""Pictures that are opened, a second or two, spread over the rows that the guess is made from: of a
long table not the end. `hftl check` opens all."""
MAX_BAD = 0.1
"""Share of rows that may be left out; of more something is wrong with the guess or the table."""
FEW_ROWS = 50
FEW_CLASS_ROWS = 5
"""Rows a class, on average, below which the label is hardly one of classes."""
LABEL_SEPARATORS = ("|", ";", ",")


@dataclass
class LabelCounts:
    """Count the labels of all rows, by class, and the rows that `hftl check` would refuse."""

    rows: int = 0
    unlabelled: int = 0
    bad: BadRows = field(default_factory=lambda: BadRows(skip=True))
    names: Counter[str] = field(default_factory=Counter[str])
    opened: int = 0
    """Pictures that were decoded."""
    damaged: int = 0
    """Of those, how many could not be."""

    @property
    def usable(self) -> int:
        """Return the number of rows that are not left out."""
        return self.rows - self.bad.count

    @property
    def per_class(self) -> float:
        """Return the mean number of rows of a class."""
        return self.usable / max(1, len(self.names))

    @property
    def has_many_faults(self) -> bool:
        """Return whether of the rows with a label more cannot be used than may be left out.

        Rows without one are no fault of the guess: texts are often labelled in part.
        """
        faults = self.bad.count - self.unlabelled
        has_many_damaged = self.damaged > MAX_BAD * self.opened
        return has_many_damaged or faults > MAX_BAD * (self.rows - self.unlabelled)


def read_guessed_table(data: Path) -> tuple[ColumnGuess, LabelCounts]:
    """Guess from the first rows, of a folder from all, and count the labels of every row.

    Raises:
        DataError: naming the rows that cannot be read, as `hftl check` does; or if all labels are
            the same, or so many rows cannot be used that the guess must be wrong.
    """
    bad = BadRows(fix="Correct it; a recipe written by hand may skip such rows, data.bad_rows")
    sound = _iterate_sound(READERS[guess_format(data)](data), bad)
    rows = list(islice(sound, None if data.is_dir() else MAX_SAMPLE_ROWS))
    bad.refuse(data)
    if not rows:
        raise DataError(f"{data.name} has no rows", "Check the file")
    folder = data if data.is_dir() else data.parent
    guess = guess_columns(data.name, [raw.values for raw in rows], folder)
    counts = _count_labels(data, guess, chain(rows, sound), max(1, len(rows) // MAX_OPENED))
    bad.refuse(data)
    if counts.has_many_faults:
        BadRows(fix=bad.fix, count=counts.bad.count, dropped=counts.bad.dropped).refuse(data)
    _check_classes(data, guess, counts)
    return guess, counts


def _iterate_sound(raws: Iterable[RawRow], bad: BadRows) -> Iterator[RawRow]:
    """Yield each row that can be read, and note the others."""
    for raw in raws:
        fault = find_reading_fault(raw)
        if fault:
            bad.note(raw.where, fault)
        else:
            yield raw


def _count_labels(
    data: Path, guess: ColumnGuess, raws: Iterable[RawRow], every: int
) -> LabelCounts:
    """Count the labels of rows as `hftl check` names them; targets are no classes.

    Args:
        data: the table or folder.
        guess: its columns.
        raws: its rows.
        every: the number of rows of which one picture is opened, until `MAX_OPENED` are.

    Raises:
        DataError: for labels that check refuses as a whole: of mixed types, or with fractions.
    """
    counts = LabelCounts()
    types: dict[str, str] = {}
    places: dict[str, str] = {}
    section = _build_section(data, guess)
    spec = InputSpec("image" if guess.kind == "image" else "text")
    for raw in raws:
        counts.rows += 1
        fault = find_row_fault(raw, section.train, section, spec)
        if guess.kind == "image" and not is_given(raw.values.get(guess.inputs[0])):
            fault = f"{guess.inputs[0]} is empty"
        elif guess.kind == "image" and counts.rows % every == 0 and counts.opened < MAX_OPENED:
            damage = _find_damage(raw.values[guess.inputs[0]], data, section.max_pixels)
            counts.opened, counts.damaged = counts.opened + 1, counts.damaged + bool(damage)
            fault = fault or damage
        if fault:
            counts.bad.note(raw.where, fault)
            counts.unlabelled += not is_given(raw.values.get(guess.label))
        elif guess.task != "regression":
            classes = list_classes(parse_label(raw.values, guess.label, guess.task))
            counts.names.update(classes)
            places |= {name: raw.where for name in classes if name not in places}
            if guess.task == "classification":
                types.setdefault(get_value_type(raw.values[guess.label]), raw.where)
    refuse_mixed_labels(data.name, types)
    if guess.task != "token-classification":
        refuse_fractions(data.name, places)
    return counts


def _find_damage(value: object, data: Path, max_pixels: int) -> str | None:
    """Return why a picture cannot be read, if so."""
    try:
        decode_image(value, data if data.is_dir() else data.parent, max_pixels)
    except ImageDecodeError as error:
        return str(error)
    return None


def _build_section(data: Path, guess: ColumnGuess) -> Data:
    """Return the section `data` of the recipe that is written."""
    columns: dict[str, Any] = {"label": guess.label, guess.kind: guess.inputs}
    if len(guess.inputs) == 1:
        columns[guess.kind] = guess.inputs[0]
    table = {"path": str(data), **columns}
    return Data.model_validate({"task": guess.task, "train": table, "group": guess.group})


def _check_classes(data: Path, guess: ColumnGuess, counts: LabelCounts) -> None:
    """Refuse labels that are all the same.

    Raises:
        DataError: naming the only class.
    """
    if guess.task != "classification" or len(counts.names) != 1:
        return
    only = min(counts.names)
    if data.is_dir():
        raise DataError(
            f"{data.name}: every file is in the folder {only!r}, expected a folder for each class",
            "Give the folder that holds those of all classes",
        )
    raise DataError(
        f"{data.name}: every row of the column {guess.label!r} is {only!r}, expected two classes",
        "Give rows of other classes, or name another label in a recipe by hand: hftl schema",
    )


def list_doubts(guess: ColumnGuess, counts: LabelCounts) -> Iterator[str]:
    """Yield a sentence for each thing about the rows and labels that may not be as it was meant."""
    usable = counts.usable
    if usable < FEW_ROWS:
        yield (
            f"{count_noun(usable, 'row')} {choose_verb(usable, 'is')} few, of which a "
            "fifth each is for validation and test; a few hundred are better"
        )
    if counts.bad.count:
        first, verb = counts.bad.dropped[0], choose_verb(counts.bad.count, "is")
        yield (
            f"{count_noun(counts.bad.count, 'row')} cannot be used and {verb} left out "
            f"(data.bad_rows: skip), such as {first.where}: {first.why}"
        )
    if guess.task == "classification":
        yield from _list_class_doubts(guess, counts)


def _list_class_doubts(guess: ColumnGuess, counts: LabelCounts) -> Iterator[str]:
    classes = len(counts.names)
    if classes and classes == counts.names.total():
        first, *_ = counts.names
        yield (
            f"every row has a label of its own, such as {first!r}: {guess.label} reads like an "
            "identifier or a text, and nothing can be measured"
        )
        return
    if counts.per_class < FEW_CLASS_ROWS:
        yield (
            f"{classes} classes on {counts.usable} rows are fewer than "
            f"{FEW_CLASS_ROWS} rows a class; is {guess.label} what is to be predicted?"
        )
    yield from find_doubtful_names(counts.names)
    if guess.beside:
        columns = [guess.label, *guess.beside]
        yield (
            f"0 and 1 stand in {', '.join(guess.beside)}, too; where several hold at once, write "
            f"data.task: multi-label and label: [{', '.join(columns)}]"
        )
    joined = _find_joined_label(counts.names)
    if joined:
        yield (
            f"the label {joined!r} reads like several; for multi-label give a column of lists "
            "(.jsonl, .parquet), or a column of 0 and 1 for each"
        )


def _find_joined_label(names: Mapping[str, int]) -> str | None:
    """Return a class whose parts, by a separator, are all classes or parts of other classes."""
    for separator in LABEL_SEPARATORS:
        parts = {name: [part.strip() for part in name.split(separator)] for name in names}
        known = Counter(part for pieces in parts.values() for part in set(pieces))
        for name, pieces in parts.items():
            if len(pieces) > 1 and all(piece and known[piece] > 1 for piece in pieces):
                return name
    return None
