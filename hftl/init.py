"""`hftl init`: looks at a table or folder and writes a commented recipe for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hftl import rundir
from hftl.data.files import READERS
from hftl.data.load import guess_format
from hftl.errors import DataError, RecipeError

LOOKED_AT = 2000
"""Rows a guess is made from."""
MOST_CLASSES = 50
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "topic", "y")
TEXT_NAMES = ("text", "sentence", "review", "content", "body", "document", "comment", "message")
GROUP_NAMES = ("group", "document_id", "author", "user", "user_id", "patient", "session")

TEMPLATE = """# Fine-tunes {source} on {data}, and measures what the transfer was worth.
# Every key and its default: hftl schema.   Look before you run: hftl check {recipe}
source:
  model: {source}
  # published_as: org/name     # the public id, where model is a folder or package

data:
  task: {task}         # guessed from the label's values
  train:
    path: {data}
    text: {text}  # guessed
    label: {label}  # guessed
  {group}
  test: {{fraction: 0.2}}        # held out, never chosen by
  validation: {{fraction: 0.2}}  # the best epoch is chosen here
  # shots: 200                 # learn from so many labelled rows {unit}
  bad_rows: refuse             # skip: drop and count rows without text or label
  max_length: 128              # tokens; longer texts are cut

finetune:
  strategy: lora               # head | partial | lora | full
  pooling: {pooling:<13}       # native | mean | cls; mean suits sentence encoders
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


@dataclass(frozen=True)
class Guess:
    """What the columns seem to be; each note says why."""

    texts: list[str]
    label: str
    task: str
    group: str | None
    notes: list[str]


def write_recipe(data: Path, source: str, output: Path | None) -> tuple[Path, list[str]]:
    """Writes a recipe beside you, named after the data.

    Returns:
        Its path, and what was guessed, a line each.

    Raises:
        DataError: if the data cannot be read, or no column can be the text or the label.
        RecipeError: if the recipe exists already.
    """
    if not data.exists():
        raise DataError(f"{data} does not exist", "Check the path")
    path = output or Path(f"{data.stem}.yaml")
    if path.exists():
        raise RecipeError(f"{path} exists already", "Remove it, or choose another --output")
    name = guess_format(data)
    rows = []
    for raw in READERS[name](data):
        rows.append(raw.values)
        if len(rows) >= LOOKED_AT and name != "textfolder":
            break
    if not rows:
        raise DataError(f"{data.name} has no rows", "Check the file")
    guess = guess_columns(data.name, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    rundir.write_text(path, _filled(guess, data, source, path))
    return path, guess.notes


def guess_columns(name: str, rows: list[dict[str, Any]]) -> Guess:
    """Guesses text, label, task and group from the columns' names and values.

    Raises:
        DataError: naming what no column can be.
    """
    columns = {c: [row.get(c) for row in rows if row.get(c) not in (None, "")] for c in rows[0]}
    label, task = _label(name, columns)
    texts = _texts(name, columns, label)
    group = next(
        (c for c in columns if c.lower() in GROUP_NAMES and c not in (*texts, label)), None
    )
    distinct = len({str(value) for value in columns[label]})
    what = f"{distinct} classes" if task == "classification" else "a number"
    named = len(texts) > 1 or texts[0].lower() in TEXT_NAMES
    notes = [f"text: {' and '.join(texts)} ({'by name' if named else 'the longest column'})"]
    notes.append(f"label: {label} ({what}), so the task is {task}")
    if group:
        notes.append(f"group: {group}; its rows stay in one split")
    return Guess(texts, label, task, group, notes)


def _label(name: str, columns: dict[str, list[Any]]) -> tuple[str, str]:
    """The named label column, else the one with the fewest values that repeat."""
    named = [c for wanted in LABEL_NAMES for c in columns if c.lower() == wanted and columns[c]]
    few = sorted(
        (c for c in columns if 2 <= _distinct(columns[c]) <= min(MOST_CLASSES, _half(columns[c]))),
        key=lambda c: _distinct(columns[c]),
    )
    numbers = [c for c in columns if columns[c] and all(map(_is_number, columns[c]))]
    for column in [*named, *few, *numbers]:
        values = columns[column]
        many = _distinct(values) > MOST_CLASSES
        fractional = any(_is_number(v) and not float(v).is_integer() for v in values)
        if all(map(_is_number, values)) and (many or fractional):
            return column, "regression"
        return column, "classification"
    raise DataError(
        f"{name}: no column looks like a label; it has {', '.join(columns)}",
        "Write the recipe by hand, see recipes/README.md",
    )


def _texts(name: str, columns: dict[str, list[Any]], label: str) -> list[str]:
    """The named text column, a pair such as sentence1 and sentence2, else the longest."""
    lengths = {
        c: sum(map(len, map(str, values))) / len(values)
        for c, values in columns.items()
        if c != label and values and all(isinstance(v, str) for v in values)
        and not all(map(_is_number, values))
    }  # fmt: skip
    if not lengths:
        raise DataError(
            f"{name}: no column looks like text; it has {', '.join(columns)}",
            "Write the recipe by hand, see recipes/README.md",
        )
    for column in lengths:
        second = f"{column[:-1]}2"
        if column.endswith("1") and second in lengths:
            return [column, second]
    if "premise" in lengths and "hypothesis" in lengths:
        return ["premise", "hypothesis"]
    named = [c for wanted in TEXT_NAMES for c in lengths if c.lower() == wanted]
    return [named[0] if named else max(lengths, key=lambda c: lengths[c])]


def _filled(guess: Guess, data: Path, source: str, path: Path) -> str:
    regression = guess.task == "regression"
    sentence_encoder = any(part in source.lower() for part in ("minilm", "sentence", "mpnet"))
    text = guess.texts[0] if len(guess.texts) == 1 else guess.texts
    return TEMPLATE.format(
        source=_yaml(source), data=_yaml(str(data)), recipe=path, task=guess.task,
        text=_yaml(text), label=_yaml(guess.label),
        group=f"group: {_yaml(guess.group)}" if guess.group
        else "# group: document_id         # rows of one group never straddle splits",
        unit="in all" if regression else "a class",
        pooling="mean" if sentence_encoder else "native",
        metric="pearson" if regression else "accuracy",
    )  # fmt: skip


def _yaml(value: str | list[str]) -> str:
    """A name, or a list of them, on one line that YAML reads back as it is."""
    line = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return line.removesuffix("...\n").strip()


def _distinct(values: list[Any]) -> int:
    return len({str(value) for value in values})


def _half(values: list[Any]) -> int:
    return max(2, len(values) // 2)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)
