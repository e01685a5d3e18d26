"""Write a commented recipe for a table or folder, guessing what its columns are: `hftl init`."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import Any

import yaml

from hftl.config.recipe import DEFAULT_METRICS
from hftl.data.normalization import normalize_name
from hftl.data.splits import TASKS_WITHOUT_CLASS_SHOTS
from hftl.data.tables import IMAGE_SUFFIXES, READERS, guess_format
from hftl.errors import DataError, RecipeError
from hftl.finetune.strategies import FINETUNE_STRATEGIES
from hftl.models.architectures import ARCHITECTURES, READ_AS, UNHEADED
from hftl.models.image_architectures import IMAGE_HALVES, UNHEADED_ENCODERS
from hftl.models.known_sources import find_known_source, suggest_known_source
from hftl.runtime import paths, run_folder

MAX_SAMPLE_ROWS = 2000
"""Rows that a guess is made from."""
MAX_CLASSES = 50
MAX_NUMBERS = 4
"""Classes that are numbers, of which the recipe shows how to name them."""
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

NO_GUESS_ADVICE = "Write the recipe by hand: data.train names the columns; keys: hftl schema"

TEMPLATE = """# Fine-tunes {source} on {data}, and measures what the transfer was worth.
# Every key and its default: hftl schema.   Look before you run: hftl check {recipe}
source:
  model: {source}
  # published_as: org/name     # the public id, where model is a folder or package

data:
  task: {task}         # guessed from the label's values
  train:
    path: {data}
    {column}: {name}  # guessed
    label: {label}  # guessed
  {group}
  test: {{fraction: 0.2}}        # held out, never chosen by
  validation: {{fraction: 0.2}}  # the best epoch is chosen here
  # shots: 200                 # learn from so many labelled rows {unit}
  bad_rows: refuse             # skip: drop and count rows without {lacks} or label
  {size}

finetune:
  strategy: lora               # {strategies}
  pooling: {pooling:<13}       # {pooling_note}
  lora: {{r: 8, lora_alpha: 16}}
  training:                    # transformers.TrainingArguments
    learning_rate: 5.0e-4
    num_train_epochs: 5
    per_device_train_batch_size: 32

measure:
  metric: {metric}
  seeds: [0, 1, 2]             # 6 or more give a p-value
  arms: [scratch, head]        # what stands beside it; scratch brings a classical model along
"""


KIND_NAMES = {"text": "texts", "image": "pictures"}
POOLING_NOTES = {
    "image": "native | cls | mean | cls+mean, where a class token stands before the patches",
    "text": "native | mean | cls; mean suits sentence encoders",
}
SIZE_LINES = {
    "image": "# image_size: 224            # pixels; null: the source's own",
    "text": "max_length: 128              # tokens; longer texts are cut",
}


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


def write_recipe(data: Path, source: str, output: Path | None) -> tuple[Path, list[str]]:
    """Write a recipe in the current directory, named after the data.

    Returns:
        Its path, and a line for each guess.

    Raises:
        DataError: if the data cannot be read, no column can be the text or the label, or all rows
            are of one class.
        RecipeError: if the recipe exists already, or the source is a folder or package that holds
            no model, one that hftl does not load, or one that reads other inputs than these;
            whether a hub has it is asked by `hftl check`.
    """
    if not data.exists():
        raise DataError(f"{data} does not exist", "Check the path")
    path = output or Path(f"{data.stem}.yaml")
    if path.exists():
        raise RecipeError(f"{path} exists already", "Remove it, or choose another --output")
    model = paths.resolve_local_path(source, "--source")
    if model is not None and not (model / "config.json").is_file():
        raise RecipeError(f"--source: {source} holds no model", "Give a folder with config.json")
    values = (raw.values for raw in READERS[guess_format(data)](data))
    rows = list(values if data.is_dir() else islice(values, MAX_SAMPLE_ROWS))
    if not rows:
        raise DataError(f"{data.name} has no rows", "Check the file")
    guess = guess_columns(data.name, rows)
    _check_classes(data.name, guess, (row.get(guess.label) for row in chain(rows, values)))
    _check_modality(source, model, guess)
    notes = [*guess.notes, *([] if model else _describe_hub_source(source))]
    path.parent.mkdir(parents=True, exist_ok=True)
    run_folder.write_text(path, _fill_template(guess, data, source, path))
    return path, notes


def _check_classes(name: str, guess: ColumnGuess, values: Iterable[object]) -> None:
    """Refuse labels that are all the same; of a sorted table the first rows may be.

    Raises:
        DataError: naming the only class.
    """
    if guess.task != "classification":
        return
    given = (str(value) for value in values if value not in (None, ""))
    first = next(given)
    if all(other == first for other in given):
        raise DataError(
            f"{name}: every row of the column {guess.label!r} is {first!r}, expected two classes",
            "Give rows of other classes, or name another label in a recipe by hand: hftl schema",
        )


def _check_modality(source: str, model: Path | None, guess: ColumnGuess) -> None:
    """Refuse a source of texts for pictures, and the reverse, where its architecture is known.

    Raises:
        RecipeError: naming what it reads.
    """
    known = find_known_source(source)
    family = None if known is None else known.family
    if model is not None:
        family = _read_family(source, model / "config.json")
    family = READ_AS.get(str(family), family)
    spec = (ARCHITECTURES | UNHEADED | IMAGE_HALVES).get(str(family))
    if spec is not None and spec.modality != guess.kind:
        raise RecipeError(
            f"--source: {source} reads {KIND_NAMES[spec.modality]}, and the data are "
            f"{KIND_NAMES[guess.kind]} (column {guess.inputs[0]!r})",
            f"Choose one of hftl sources --modality {guess.kind}",
        )


def _read_family(source: str, path: Path) -> str | None:
    """Return the architecture that a config names.

    Raises:
        RecipeError: if it is no JSON.
    """
    try:
        config: Any = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RecipeError(
            f"--source: config.json of {source} is no JSON: {error}", "Give the model anew"
        ) from error
    return config.get("model_type") if isinstance(config, dict) else None


def _describe_hub_source(source: str) -> list[str]:
    """Return a note where a name is nearly that of a well-known model; the hub is not asked.

    Raises:
        RecipeError: if it is that of one which hftl does not load.
    """
    known = find_known_source(source)
    if known is not None and known.obstacle is not None:
        raise RecipeError(
            f"--source: {source} cannot be loaded: {known.obstacle}",
            "Choose another: hftl sources",
        )
    nearest = None if known else suggest_known_source(source)
    if nearest is None:
        return []
    return [f"source: {source}; did you mean {nearest}? hftl sources lists well-known ones"]


def guess_columns(name: str, rows: Sequence[Mapping[str, object]]) -> ColumnGuess:
    """Guess text, label, task and group from the columns' names and values.

    Raises:
        DataError: if no column can be the text, or none the label.
    """
    columns = {c: [row.get(c) for row in rows if row.get(c) not in (None, "")] for c in rows[0]}
    image = next((c for c in columns if columns[c] and all(map(_is_image, columns[c]))), None)
    others = {c: values for c, values in columns.items() if c != image}
    label, task = _guess_label(name, others)
    words = _find_word_lists(others, label) if task == "multi-label" else None
    if words:
        task = "token-classification"
    inputs = [image] if image else [words] if words else _guess_text_columns(name, others, label)
    group = next(
        (c for c in others if c.lower() in GROUP_NAMES and c not in (*inputs, label)), None
    )
    kind = "image" if image else "text"
    named = len(inputs) > 1 or image or words or inputs[0].lower() in TEXT_NAMES
    notes = [f"{kind}: {' and '.join(inputs)} ({'by name' if named else 'the longest column'})"]
    notes.append(f"label: {label} ({_describe_label(task, columns[label])}), so the task is {task}")
    if group:
        notes.append(f"group: {group}; its rows stay in one split")
    return ColumnGuess(kind, inputs, label, task, group, notes, _list_numbers(task, columns[label]))


def _list_numbers(task: str, values: list[object]) -> list[str]:
    """Return the classes in their order where all of them are numbers; else none."""
    if task != "classification" or not _are_numbers(values):
        return []
    return sorted({normalize_name(value) for value in values}, key=float)


def _describe_label(task: str, values: list[object]) -> str:
    if task == "regression":
        return "a number"
    if task == "token-classification":
        return "a list as long as the words"
    if task == "multi-label":
        return "a list"
    return f"{_count_distinct(values)} classes"


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
    numbers = [c for c in columns if columns[c] and _are_numbers(columns[c])]
    for column in [*named, *lists, *few, *numbers]:
        values = columns[column]
        if column in lists:
            return column, "multi-label"
        many = _count_distinct(values) > MAX_CLASSES
        fractional = any(n is not None and not n.is_integer() for n in map(_parse_number, values))
        if _are_numbers(values) and (many or fractional):
            return column, "regression"
        return column, "classification"
    raise DataError(
        f"{name}: no column looks like a label; it has {', '.join(columns)}",
        NO_GUESS_ADVICE,
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
            f"{name}: no column looks like text; it has {', '.join(columns)}",
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


def _fill_template(guess: ColumnGuess, data: Path, source: str, path: Path) -> str:
    in_all = guess.task in TASKS_WITHOUT_CLASS_SHOTS
    sentence_encoder = any(part in source.lower() for part in ("minilm", "sentence", "mpnet"))
    known = find_known_source(source)
    unheaded = known is not None and known.family in UNHEADED_ENCODERS
    pooled = sentence_encoder and guess.kind == "text" and guess.task != "token-classification"
    return TEMPLATE.format(
        source=_format_yaml(source), data=_format_yaml(str(data)), recipe=path, task=guess.task,
        column=guess.kind, label=_format_yaml(guess.label),
        name=_format_yaml(guess.inputs[0] if len(guess.inputs) == 1 else guess.inputs),
        group=f"group: {_format_yaml(guess.group)}" if guess.group
        else "# group: document_id         # rows of one group never straddle splits",
        unit="in all" if in_all else "a class", lacks=guess.kind,
        size=SIZE_LINES[guess.kind] + _format_names_line(guess.numbers),
        strategies=" | ".join(FINETUNE_STRATEGIES),
        pooling="mean" if pooled else "cls" if unheaded else "native",
        pooling_note=POOLING_NOTES[guess.kind],
        metric=DEFAULT_METRICS.get(guess.task, "accuracy"),
    )  # fmt: skip


def _format_names_line(numbers: list[str]) -> str:
    """Return the line that asks for words for labels that are numbers; nothing for others."""
    if not numbers:
        return ""
    entries = ", ".join(f'{number}: "..."' for number in numbers[:MAX_NUMBERS])
    return f"\n  # label_names: {{{entries}}}   # words for the card, and for zero_shot"


def _format_yaml(value: str | list[str]) -> str:
    """Return a name, or a list of them, on one line that YAML reads back unchanged."""
    line = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return line.removesuffix("...\n").strip()


def _count_distinct(values: list[object]) -> int:
    return len({str(value) for value in values})


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
