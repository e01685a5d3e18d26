"""Compare the labels of rows with what the source's own classifier says of them."""

from collections.abc import Iterator
from copy import deepcopy

import numpy as np

from hftl.analysis.label_maps import MIN_MAP_GAIN, find_exchange
from hftl.analysis.source_faults import ExaminedRows
from hftl.data.normalization import normalize_name
from hftl.models.encoders import get_task_class
from hftl.models.features import predict_logits
from hftl.models.heads import build_quantization_arguments, load_class
from hftl.train.facts import Finding

MAX_ROWS = 300
"""Rows that the source's own classifier reads, at most."""


def check_own_labels(examined: ExaminedRows) -> Iterator[Finding]:
    """Find labels that are those of the source's own classifier under other names."""
    context = examined.context
    names = context.prepared.names
    if context.prepared.task != "classification":
        return
    order = match_own_names(context.source.config.id2label or {}, names)
    if order is None:
        return
    rows, labels = examined.rows[:MAX_ROWS], examined.targets[:MAX_ROWS]
    logits = predict_own(examined, len(rows))
    if logits is None:
        return
    predicted = order[logits.argmax(1)]
    exchange = find_exchange(predicted, labels, names, context.group_outputs(rows))
    # A head of another task may follow these classes a little; one of theirs is mostly right.
    if exchange is None or exchange.mapped < 1 / len(names) + MIN_MAP_GAIN:
        return
    yield Finding(
        kind="label map",
        what="the labels of train are exchanged against those of the source's own classifier: "
        f"{exchange.names}",
        # Numbers are those of any task; names say what they mean.
        confidence="possible" if all(name.isdecimal() for name in names) else "likely",
        cost=exchange.gain,
        evidence=f"it is right in {exchange.straight:.0%} of {len(rows)} rows, and in "
        f"{exchange.mapped:.0%} under the other map",
        fix="correct id2label in the source's config.json, or the label column of data.train",
    )


def match_own_names(id2label: dict[int, str], names: list[str]) -> np.ndarray | None:
    """Return the class of each output of the source's classifier, (outputs,), by its name.

    Outputs without names, `LABEL_0` and so on, are those of numbered labels. None where the names
    are not those of the classes.
    """
    outputs = [normalize_name(id2label[i]).casefold() for i in sorted(id2label)]
    if outputs == [f"label_{i}" for i in range(len(outputs))]:
        outputs = [str(i) for i in range(len(outputs))]
    classes = [name.casefold() for name in names]
    if len(set(classes)) < len(classes) or sorted(outputs) != sorted(classes):
        return None
    return np.array([classes.index(name) for name in outputs])


def predict_own(examined: ExaminedRows, count: int) -> np.ndarray | None:
    """Return the logits of the source's own classifier, (rows, outputs); None where it has none."""
    context = examined.context
    kind = get_task_class(context.source.config, "classification")
    if kind is None:
        return None
    source = context.source
    held = build_quantization_arguments(source, source.architecture_spec)
    model, missing = load_class(source, kind, deepcopy(source.config), held)
    if missing:
        return None
    encoded = context.encode_rows(examined.rows[:count])
    return predict_logits(model.to(context.device), encoded, context.inputs, context.device)
