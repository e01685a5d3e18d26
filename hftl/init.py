"""Write a commented recipe for a table or folder, guessing what its columns are: `hftl init`."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import yaml

from hftl.analysis.advice import choose_by_labels
from hftl.analysis.forecast import list_settings, load_forecast_model
from hftl.config.recipe import DEFAULT_METRICS
from hftl.data.columns import ColumnGuess, guess_columns, is_given
from hftl.data.csv_reader import find_separator
from hftl.data.normalization import find_doubtful_names, normalize_name
from hftl.data.rows import BadRows, RawRow, find_reading_fault
from hftl.data.splits import TASKS_WITHOUT_CLASS_SHOTS
from hftl.data.tables import READERS, guess_format
from hftl.errors import DataError, RecipeError
from hftl.finetune.strategies import FINETUNE_STRATEGIES
from hftl.models.architectures import ARCHITECTURES, READ_AS, UNHEADED
from hftl.models.image_architectures import IMAGE_HALVES, UNHEADED_ENCODERS
from hftl.models.known_sources import (
    find_known_source,
    find_packaged_source,
    suggest_known_source,
)
from hftl.models.timm_architecture import TIMM_WRAPPER
from hftl.models.vision_language_architectures import VISION_LANGUAGE
from hftl.plurals import choose_verb, count_noun
from hftl.runtime import paths, run_folder

MAX_SAMPLE_ROWS = 2000
"""Rows that a guess is made from."""
MAX_NUMBERS = 4
"""Classes that are numbers, of which the recipe shows how to name them."""
MAX_LISTED = 8
"""Labels and columns that are listed, at most."""
FEW_ROWS = 50
FEW_CLASS_ROWS = 5
"""Rows a class, on average, below which the label is hardly one of classes."""
LABEL_SEPARATORS = ("|", ";", ",")
TRAIN_SHARE = 0.6
"""Of the rows, in the recipe that is written."""
COMMENT_COLUMN = 31
COMMENT_MARK = "\t# "
"""Stands before a comment of the template; no value that is written as YAML holds a tab."""

TEMPLATE = """# Fine-tunes {source} on {data}, and measures what the transfer was worth.
# Every key and its default: hftl schema.   Look before you run: hftl check {recipe}
source:
  model: {source}
  {published}

data:
  task: {task}\t# guessed from the label's values
  train:
    path: {data}{path_note}
    {column}: {name}\t# guessed
    label: {label}\t# guessed
  {group}
  test: {{fraction: 0.2}}\t# held out, never chosen by
  validation: {{fraction: 0.2}}\t# the best epoch is chosen here
  # shots: 200\t# learn from so many labelled rows {unit}
  bad_rows: refuse\t# skip: drop and count rows without {lacks} or label
  {size}

finetune:
  # By the rule of thumb, {labels} labels {unit} are for {rule}; hftl advise asks the source, too
  strategy: lora\t# {strategies}
  pooling: {pooling}\t# {pooling_note}
  lora: {{r: 8, lora_alpha: 16}}
  training:\t# transformers.TrainingArguments
    learning_rate: {rate}\t# as in the runs that hftl advise forecasts from
    num_train_epochs: {epochs}\t# as there for {rows} rows of train
    per_device_train_batch_size: 32

measure:
  metric: {metric}
  seeds: [0, 1, 2]\t# 6 or more give a p-value
  arms: [scratch, head]\t# what stands beside it; scratch brings a classical model along
"""


PUBLIC_ID_LINE = "published_as: {id}\t# org/name on the hub; without it no other loads the adapter"
KIND_NAMES = {"text": "texts", "image": "pictures"}
POOLING_NOTES = {
    "image": "native | cls | mean | cls+mean, where a class token stands before the patches",
    "text": "native | mean | cls; mean suits sentence encoders",
}
PROMPT_NOTE = "of the prompt, which data.prompt words"
SIZE_LINES = {
    "image": "# image_size: 224\t# pixels; null: the source's own",
    "text": "max_length: 128\t# tokens; longer texts are cut",
}


@dataclass
class LabelCounts:
    """Count the labels of all rows, by class, and the rows without an input or a label."""

    rows: int = 0
    lacking: int = 0
    names: Counter[str] = field(default_factory=Counter[str])

    @property
    def per_class(self) -> float:
        """Return the mean number of rows of a class."""
        return self.rows / max(1, len(self.names))


def write_recipe(data: Path, source: str, output: Path | None) -> tuple[Path, list[str]]:
    """Write a recipe in the current directory, named after the data.

    Returns:
        Its path, and a line for each guess and each doubt.

    Raises:
        DataError: if the data or a row of them cannot be read, no column can be the text or the
            label, or all rows are of one class.
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
    guess, counts = _read_table(data)
    _check_classes(data.name, guess, counts)
    family = _find_family(source, model)
    _check_modality(source, family, guess)
    notes = [*_describe_guess(guess, counts), *([] if model else _describe_hub_source(source))]
    packaged = find_packaged_source(source)
    published = "# published_as: org/name\t# the public id, where model is a folder or package"
    if model is not None:
        published = PUBLIC_ID_LINE.format(id=packaged.id if packaged else "null")
    if packaged is not None:
        notes.append(f"source: {source} has the weights of {packaged.id}, its public id")
    notes += [f"warning: {doubt}" for doubt in list_doubts(guess, counts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pooling = _choose_pooling(guess, source, family)
    run_folder.write_text(
        path, _fill_template(guess, counts, data, source, path, published, pooling)
    )
    return path, notes


def _read_table(data: Path) -> tuple[ColumnGuess, LabelCounts]:
    """Guess from the first rows, of a folder from all, and count the labels of every row.

    Raises:
        DataError: naming the rows that cannot be read, as `hftl check` does.
    """
    bad = BadRows(fix="Correct it; a recipe written by hand may skip such rows, data.bad_rows")
    sound = _iterate_sound(READERS[guess_format(data)](data), bad)
    rows = list(islice(sound, None if data.is_dir() else MAX_SAMPLE_ROWS))
    bad.refuse(data)
    if not rows:
        raise DataError(f"{data.name} has no rows", "Check the file")
    guess = guess_columns(data.name, rows)
    counts = count_labels(guess, chain(rows, sound))
    bad.refuse(data)
    return guess, counts


def _iterate_sound(raws: Iterable[RawRow], bad: BadRows) -> Iterator[Mapping[str, object]]:
    """Yield the cells of each row that can be read, and note the others."""
    for raw in raws:
        fault = find_reading_fault(raw)
        if fault:
            bad.note(raw.where, fault)
        else:
            yield raw.values


def count_labels(guess: ColumnGuess, rows: Iterable[Mapping[str, object]]) -> LabelCounts:
    """Count the labels of rows as `hftl check` names them; targets are no classes."""
    counts = LabelCounts()
    for row in rows:
        counts.rows += 1
        label = row.get(guess.label)
        if not all(is_given(row.get(column)) for column in (*guess.inputs, guess.label)):
            counts.lacking += 1
        elif guess.task != "regression":
            values = label if isinstance(label, (list, tuple)) else [label]
            counts.names.update(map(normalize_name, values))
    return counts


def _check_classes(name: str, guess: ColumnGuess, counts: LabelCounts) -> None:
    """Refuse labels that are all the same.

    Raises:
        DataError: naming the only class.
    """
    if guess.task == "classification" and len(counts.names) == 1:
        raise DataError(
            f"{name}: every row of the column {guess.label!r} is {min(counts.names)!r}, expected "
            "two classes",
            "Give rows of other classes, or name another label in a recipe by hand: hftl schema",
        )


def _describe_guess(guess: ColumnGuess, counts: LabelCounts) -> list[str]:
    """Return a line for each guess, for the labels, and for the columns that are not used."""
    kind = {
        "regression": "a number",
        "token-classification": "a list as long as the words",
        "multi-label": "a list",
    }.get(guess.task, f"{len(counts.names)} classes")
    lines = [f"label: {guess.label} ({kind}), so the task is {guess.task}"]
    if counts.names:
        most = counts.names.most_common(MAX_LISTED)
        labels = [f"{_shorten(name)} ({count:,})" for name, count in most]
        lines.append(f"labels: {_join_first(labels, len(counts.names))}")
    if guess.unused:
        shown = list(map(_shorten, guess.unused[:MAX_LISTED]))
        lines.append(f"not used: {_join_first(shown, len(guess.unused))}")
    first, *others = guess.notes
    return [first, *lines, *others]


def _join_first(shown: list[str], count: int) -> str:
    more = f" and {count - len(shown)} more" if count > len(shown) else ""
    return ", ".join(shown) + more


def _shorten(name: str) -> str:
    """Return a name as it is, but one that is long, blank, or has blanks at its ends."""
    shown = name if len(name) <= 40 else f"{name[:40]}..."
    return shown if shown.strip() == shown != "" else repr(shown)


def list_doubts(guess: ColumnGuess, counts: LabelCounts) -> Iterator[str]:
    """Yield a sentence for each thing about the rows and labels that may not be as it was meant."""
    if counts.rows < FEW_ROWS:
        yield (
            f"{count_noun(counts.rows, 'row')} {choose_verb(counts.rows, 'is')} few, of which a "
            "fifth each is for validation and test; a few hundred are better"
        )
    if counts.lacking:
        yield (
            f"{count_noun(counts.lacking, 'row')} {choose_verb(counts.lacking, 'has')} no "
            f"{guess.kind} or no label: hftl check refuses such rows, unless data.bad_rows is skip"
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
            f"{classes} classes on {counts.rows} rows are fewer than {FEW_CLASS_ROWS} rows a class;"
            f" is {guess.label} what is to be predicted?"
        )
    yield from find_doubtful_names(counts.names)
    if guess.beside:
        columns = [guess.label, *guess.beside]
        yield (
            f"0 and 1 stand in {', '.join(guess.beside)}, too; where several hold at once, write "
            f"data.task: multi-label and label: {_format_yaml(columns)}"
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


def _find_family(source: str, model: Path | None) -> str | None:
    """Return the architecture of a source, by its config or the list of well-known ones; None where
    neither says it."""
    if model is not None:
        family = _read_family(source, model / "config.json")
        return READ_AS.get(str(family), family)
    if source.startswith("timm/"):
        return TIMM_WRAPPER
    known = find_known_source(source)
    return None if known is None else READ_AS.get(known.family, known.family)


def _check_modality(source: str, family: str | None, guess: ColumnGuess) -> None:
    """Refuse a source of texts for pictures, and the reverse, where its architecture is known.

    Raises:
        RecipeError: naming what it reads.
    """
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


def _fill_template(
    guess: ColumnGuess, counts: LabelCounts, data: Path, source: str, path: Path, published: str,
    pooling: str,
) -> str:  # fmt: skip
    in_all = guess.task in TASKS_WITHOUT_CLASS_SHOTS
    rows = max(1, round(TRAIN_SHARE * counts.rows))
    labels = rows if in_all else max(1, round(rows / max(1, len(counts.names))))
    is_table = data.is_file() and guess_format(data) == "csv"
    text = TEMPLATE.format(
        source=_format_yaml(source), published=published, data=_format_yaml(str(data)),
        recipe=path, task=guess.task,
        path_note=f"{COMMENT_MARK}its columns are separated by ';'"
        if is_table and find_separator(data) == ";" else "",
        column=guess.kind, label=_format_yaml(guess.label),
        name=_format_yaml(guess.inputs[0] if len(guess.inputs) == 1 else guess.inputs),
        group=f"group: {_format_yaml(guess.group)}" if guess.group
        else f"# group: document_id{COMMENT_MARK}rows of one group never straddle splits",
        unit="in all" if in_all else "a class", lacks=guess.kind,
        size=SIZE_LINES[guess.kind] + _format_names_line(guess.numbers),
        labels=labels, rule=choose_by_labels(labels), rows=rows,
        strategies=" | ".join(FINETUNE_STRATEGIES), **_choose_training(guess.kind, rows),
        pooling=pooling, pooling_note=PROMPT_NOTE if pooling == "last" else
        POOLING_NOTES[guess.kind],
        metric=DEFAULT_METRICS.get(guess.task, "accuracy"),
    )  # fmt: skip
    return "".join(map(_align_comment, text.splitlines(keepends=True)))


def _choose_training(kind: str, rows: int) -> dict[str, str]:
    """Return the rate and epochs of lora in the runs that the forecast was fitted on."""
    modality = "image" if kind == "image" else "text"
    settings = list_settings("lora", modality, rows, load_forecast_model().training)
    rate, epochs = settings.values()
    mantissa, exponent = f"{rate:.1e}".split("e")
    return {"rate": f"{mantissa}e{int(exponent)}", "epochs": str(epochs)}


def _choose_pooling(guess: ColumnGuess, source: str, family: str | None) -> str:
    sentence_encoder = any(part in source.lower() for part in ("minilm", "sentence", "mpnet"))
    if sentence_encoder and guess.kind == "text" and guess.task != "token-classification":
        return "mean"
    if family in VISION_LANGUAGE:
        return "last"
    return "cls" if family in UNHEADED_ENCODERS else "native"


def _align_comment(line: str) -> str:
    """Return a line whose comment, after a mark, begins where those of other lines do."""
    before, mark, comment = line.partition(COMMENT_MARK)
    width = max(COMMENT_COLUMN, len(before) + 2)
    return f"{before:<{width}}# {comment}" if mark else line


def _format_names_line(numbers: list[str]) -> str:
    """Return the line that asks for words for labels that are numbers; nothing for others."""
    if not numbers:
        return ""
    entries = ", ".join(f'{number}: "..."' for number in numbers[:MAX_NUMBERS])
    return f"\n  # label_names: {{{entries}}}{COMMENT_MARK}words for the card, and for zero_shot"


def _format_yaml(value: str | list[str]) -> str:
    """Return a name, or a list of them, on one line that YAML reads back unchanged."""
    line = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return line.removesuffix("...\n").strip()
