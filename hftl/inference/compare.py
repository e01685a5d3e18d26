"""Score several runs or adapters on the same labelled items, each base loaded once."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from hftl.card.plots import plot_comparison
from hftl.console import format_table
from hftl.data.facts import TagScheme
from hftl.data.image_inputs import ImageInputs
from hftl.data.labels import decode_logits, encode_for_metrics, recognize_tag_scheme
from hftl.data.normalization import normalize_name
from hftl.errors import RecipeError
from hftl.inference.arguments import COMPARISON_SUFFIXES, PLOT_SUFFIXES, check_output
from hftl.inference.eval_data import (
    LabelledItems,
    count_known_items,
    normalize_labels,
    read_labelled_items,
    read_shared_items,
)
from hftl.inference.find_model import check_trained_head, find_published_folder
from hftl.inference.multi_adapter import iterate_predictors
from hftl.inference.predict import Predictor
from hftl.measure.gain import assign_units
from hftl.measure.metrics import SELECTION_METRICS, Metric, find_metric
from hftl.measure.scores import ComparedModel, compare_pair, score_with_interval
from hftl.measure.verdict import format_gain
from hftl.models.features import predict_logits
from hftl.models.weight_files import read_file_shapes
from hftl.publish.published_metadata import PublishedMetadata
from hftl.runtime.run_folder import write_text


def compare_models(
    models: Sequence[str], data: Path | None, output: Path | None, base: str | None = None
) -> str:
    """Score every model on the same items, and each against the first.

    Args:
        models: runs, published folders or hub ids.
        data: a labelled table; None takes the test items of the runs.
        base: of every adapter, where it is not the one each names.
        output: a .csv, the plot beside it, or a .png of the plot alone.

    Returns:
        The table as text.

    Raises:
        RecipeError: if a model cannot be loaded, they differ in task or labels, or there is no
            data to score them on.
        DataError: if the table cannot be read, or has a label that no model knows.
        HubError: if a hub id cannot be had.
    """
    check_output(output, COMPARISON_SUFFIXES, PLOT_SUFFIXES)
    folders = [_find_model_folder(model) for model in models]
    shared, unknown = (None, []) if data else read_shared_items(models, folders)
    predictions: dict[int, np.ndarray] = {}
    first: Predictor | None = None
    items: LabelledItems | None = None
    scheme: TagScheme | None = None
    for number, predictor in iterate_predictors(folders, base):
        predictor = _normalize_predictor(models[number], predictor)
        if first is None or items is None:
            first = predictor
            items = shared or read_labelled_items(Path(data or ""), predictor, folders[number])
            items = normalize_labels(items, predictor)
            scheme = _find_tag_scheme(models[number], folders[number], predictor)
        _check_comparable(models[number], predictor, first)
        predictions[number] = _predict_items(predictor, items, first.class_names, scheme)
    assert first is not None and items is not None
    labels = encode_for_metrics(
        [row.label for row in items.rows], first.task, first.class_names, scheme
    )
    rows = _score_models(
        models, folders, labels, predictions, _find_metric(folders[0], first.task), items
    )
    if output is not None:
        _write_comparison(rows, output)
    warnings = [
        f"\n  warning: what {model} was trained on is not recorded; if these items were part of "
        "it, its score is too good"
        for model in unknown
    ]
    if data:
        warnings += [
            f"\n  warning: {count:,} of these items are in train or validation of {model}, so that "
            "its score is too good"
            for model, count in count_known_items(models, items).items()
        ]
    return _format_comparison(rows, len(items.rows)) + "".join(warnings)


def _find_model_folder(model: str) -> Path:
    folder = find_published_folder(model)
    check_trained_head(folder, model)
    return folder


def _normalize_predictor(model: str, predictor: Predictor) -> Predictor:
    """Return the model with its classes spelled as those of a table are.

    Raises:
        RecipeError: if two of its classes then have one name.
    """
    names = list(map(normalize_name, predictor.class_names))
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise RecipeError(
            f"{model} has several classes that differ from {repeated!r} only in spelling",
            "Train it on labels of one spelling",
        )
    return replace(predictor, class_names=names)


def _check_comparable(model: str, predictor: Predictor, first: Predictor) -> None:
    """Refuse a model of another task or other labels than the first; their order may differ."""
    facts = [(one.task, one.modality, len(one.columns)) for one in (predictor, first)]
    if facts[0] != facts[1]:
        words = [f"{task} of {kind}s" for task, kind, _ in facts]
        raise RecipeError(
            f"{model} does {words[0]}, and the first {words[1]}", "Compare models of one task"
        )
    if set(predictor.class_names) != set(first.class_names):
        raise RecipeError(
            f"{model} has the labels {', '.join(sorted(predictor.class_names))}, and the first "
            f"{', '.join(sorted(first.class_names))}",
            "Compare models with the same labels",
        )


def _find_tag_scheme(model: str, folder: Path, predictor: Predictor) -> TagScheme | None:
    """Return the scheme that hftl.json records or the tags show; None for other tasks.

    Raises:
        DataError: if the tags follow no scheme.
    """
    if predictor.task != "token-classification":
        return None
    recorded = PublishedMetadata.read(folder).tag_scheme
    return recorded or recognize_tag_scheme(tuple(predictor.class_names), f"{model}: ")


def _predict_items(
    predictor: Predictor, items: LabelledItems, names: list[str], scheme: TagScheme | None
) -> np.ndarray:
    """Return predictions for the metrics, encoded in the order of `names`, not the model's own."""
    inputs = predictor.inputs
    if isinstance(inputs, ImageInputs):
        inputs = inputs.with_data(items.data)
    rows = items.rows
    tokens = predictor.task == "token-classification"
    words = [len(row.content) if tokens else 1 for row in rows]
    logits = predict_logits(predictor.model, inputs.encode(rows), inputs, predictor.device)
    labels, _ = decode_logits(
        logits, predictor.task, predictor.class_names, words, predictor.thresholds
    )
    return encode_for_metrics(labels, predictor.task, names, scheme)


def _find_metric(folder: Path, task: str) -> Metric:
    """Return the first model's recorded metric, or the task's."""
    name = PublishedMetadata.read(folder).metric or SELECTION_METRICS[task]
    return find_metric(name, task)


def _score_models(
    models: Sequence[str], folders: Sequence[Path], labels: np.ndarray,
    predictions: dict[int, np.ndarray], metric: Metric, items: LabelledItems,
) -> list[ComparedModel]:  # fmt: skip
    units = assign_units(items.rows)
    return [
        ComparedModel(
            model=model,
            metric=metric.name,
            score=score_with_interval(metric, labels, predictions[number], units),
            against_first=compare_pair(metric, labels, predictions[number], predictions[0], units)
            if number
            else None,
            parameters=count_saved_parameters(folders[number]),
        )
        for number, model in enumerate(models)
    ]


def count_saved_parameters(folder: Path) -> int:
    """Count the parameters in a folder: of the adapter and its head, or of the whole model."""
    files = sorted(folder.glob("*.safetensors"))
    return sum(math.prod(shape) for path in files for shape in read_file_shapes(path).values())


def _format_comparison(models: list[ComparedModel], count: int) -> str:
    cells = [("model", f"{models[0].metric} [95 %]", "against the first", "parameters")]
    for model in models:
        low, high = model.score.ci95 or (None, None)
        score = f"{model.score.value:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")
        against = "" if model.against_first is None else format_gain(model.against_first)
        cells.append((model.model, score, against, f"{model.parameters:,}"))
    return f"{format_table(cells)}\n  {count:,} items; differences are paired, positive is better"


def _write_comparison(models: list[ComparedModel], output: Path) -> None:
    """Write the figures as CSV, and the plot beside them."""
    plot_comparison(models, output.with_suffix(".png"))
    if output.suffix == ".png":
        return
    buffer = io.StringIO(newline="")
    rows = [_flatten_model(model) for model in models]
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(output, buffer.getvalue())


def _flatten_model(model: ComparedModel) -> dict[str, str | float | None]:
    low, high = model.score.ci95 or (None, None)
    against = model.against_first
    worst, best = (against and against.ci95) or (None, None)
    return {
        "model": model.model, "metric": model.metric, "value": model.score.value, "low": low,
        "high": high, "difference": against and against.value, "difference_low": worst,
        "difference_high": best, "parameters": model.parameters,
    }  # fmt: skip
