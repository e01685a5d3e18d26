"""Write a commented recipe for a table or folder, guessing what its columns are: `hftl init`."""

import json
from pathlib import Path
from typing import Any

import yaml

from hftl.analysis.advice import choose_by_labels
from hftl.analysis.forecast import list_settings, load_forecast_model
from hftl.config.recipe import DEFAULT_METRICS
from hftl.data.columns import ColumnGuess
from hftl.data.csv_reader import find_separator
from hftl.data.guessed_table import LabelCounts, list_doubts, read_guessed_table
from hftl.data.splits import TASKS_WITHOUT_CLASS_SHOTS
from hftl.data.tables import guess_format
from hftl.errors import DataError, RecipeError, is_disk_full
from hftl.finetune.strategies import FINETUNE_STRATEGIES
from hftl.models.architectures import ARCHITECTURES, READ_AS, UNHEADED
from hftl.models.image_architectures import UNHEADED_ENCODERS
from hftl.models.known_sources import (
    find_known_source,
    find_packaged_source,
    suggest_known_source,
)
from hftl.models.timm_architecture import TIMM_WRAPPER
from hftl.models.vision_language_architectures import VISION_LANGUAGE
from hftl.plurals import count_noun
from hftl.publish.settings_files import ADAPTER_CONFIG
from hftl.runtime import paths, run_folder

MAX_NUMBERS = 4
"""Classes that are numbers, of which the recipe shows how to name them."""
MAX_LISTED = 8
"""Labels and columns that are listed, at most."""
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
  bad_rows: {bad_rows}\t# {bad_rows_note}
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
    if model is not None and (model / ADAPTER_CONFIG).exists():
        raise RecipeError(f"--source: {source} holds an adapter", "Give its base, a whole model")
    guess, counts = read_guessed_table(data)
    about_source = [] if model else _describe_hub_source(source)
    family = _find_family(source, model)
    _check_family(source, family)
    _check_modality(source, family, guess)
    notes = [*_describe_guess(guess, counts), *about_source]
    packaged = find_packaged_source(source)
    published = "# published_as: org/name\t# the public id, where model is a folder or package"
    if model is not None:
        published = PUBLIC_ID_LINE.format(id=packaged.id if packaged else "null")
    if packaged is not None:
        notes.append(f"source: {source} has the weights of {packaged.id}, its public id")
    notes += [f"warning: {doubt}" for doubt in list_doubts(guess, counts)]
    pooling = _choose_pooling(guess, source, family)
    text = _fill_template(guess, counts, data, source, path, published, pooling)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        run_folder.write_text(path, text)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise RecipeError(
            f"--output {path} cannot be written: {error.strerror}", "Choose another file"
        ) from error
    return path, notes


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
    if counts.opened:
        lines.append(f"pictures: {counts.opened} of {counts.rows:,} opened")
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


def _find_family(source: str, model: Path | None) -> str | None:
    """Return the architecture of a source, by its config or the list of well-known ones; None where
    neither says it."""
    if model is not None:
        family = _read_family(source, model / "config.json")
        return READ_AS.get(family, family)
    if source.startswith("timm/"):
        return TIMM_WRAPPER
    known = find_known_source(source)
    return None if known is None else READ_AS.get(known.family, known.family)


def _check_family(source: str, family: str | None) -> None:
    """Refuse an architecture that hftl does not load.

    Raises:
        RecipeError: naming it.
    """
    if family is not None and family not in (*ARCHITECTURES, *UNHEADED):
        raise RecipeError(
            f"--source: the architecture {family!r} of {source} is not supported",
            "Choose another: hftl sources",
        )


def _check_modality(source: str, family: str | None, guess: ColumnGuess) -> None:
    """Refuse a source of texts for pictures, and the reverse, where its architecture is known.

    Raises:
        RecipeError: naming what it reads.
    """
    spec = (ARCHITECTURES | UNHEADED).get(str(family))
    if spec is not None and spec.modality != guess.kind:
        raise RecipeError(
            f"--source: {source} reads {KIND_NAMES[spec.modality]}, and the data are "
            f"{KIND_NAMES[guess.kind]} (column {guess.inputs[0]!r})",
            f"Choose one of hftl sources --modality {guess.kind}",
        )


def _read_family(source: str, path: Path) -> str:
    """Return the architecture that a config names.

    Raises:
        RecipeError: if it is no JSON, or names none.
    """
    try:
        config: Any = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RecipeError(
            f"--source: config.json of {source} is no JSON: {error}", "Give the model anew"
        ) from error
    family = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(family, str):
        raise RecipeError(
            f"--source: config.json of {source} names no model_type", "Give the model anew"
        )
    return family


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
    rows = max(1, round(TRAIN_SHARE * counts.usable))
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
        unit="in all" if in_all else "a class", bad_rows="skip" if counts.bad.count else "refuse",
        bad_rows_note=f"{count_noun(counts.bad.count, 'row')} cannot be used; refuse: stop at them"
        if counts.bad.count else f"skip: drop and count rows without {guess.kind} or label",
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
