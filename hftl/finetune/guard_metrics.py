"""Score models while they train: validation for choices, a probe or neighbours for the guard."""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from hftl.analysis.neighbours import mean_shared_neighbours
from hftl.analysis.probe import fit_probe
from hftl.data.text_inputs import EncodedRow
from hftl.errors import HftlError
from hftl.finetune.context import ExperimentContext
from hftl.measure.metrics import METRICS, SELECTION_METRICS
from hftl.measure.statistics import jackknife
from hftl.models.encoders import has_prefix
from hftl.models.features import compute_frozen_features
from hftl.models.heads import LoadedModel, build_model, get_source_pooling
from hftl.runtime import distributed, watchdog

ReadWeights = Callable[[], dict[str, Tensor]]
"""The weights of an encoder that is being adapted, by their names in `AutoModel`."""
PROBE_EVAL_ROWS = 2000
"""Validation rows that a probe is scored on, at most; they stand in the order of a hash."""
PROBE_TRAIN_ROWS = 5000
"""Training rows that it is fitted on, at most."""


def build_probe_score(
    context: ExperimentContext, pooling: str, seed: int, state: ReadWeights
) -> Callable[[], float]:
    """Return a function that scores a probe, fitted on the current encoder, on validation.

    Every process must call it.

    Args:
        context: rows, and the encoder's architecture.
        pooling: as in fine-tuning, which starts from such a probe.
        seed: whose training rows the probe is fitted on.
        state: the weights now.
    """
    prepared = context.prepared
    built = context.build_model(pooling, seed)
    built.model.to(context.device)
    train, held = (
        context.select_train_rows(seed)[:PROBE_TRAIN_ROWS],
        prepared.rows["validation"][:PROBE_EVAL_ROWS],
    )
    name = SELECTION_METRICS[prepared.task]
    metric = METRICS[prepared.task].get(name)

    def measure() -> float:
        _load_encoder_weights(built, state())
        features = [
            np.concatenate(compute_frozen_features(
                built.model, built.last_linear, context.encode_rows(rows), context.inputs,
                context.device,
            ))
            for rows in (train, held)
        ]  # fmt: skip

        def score() -> float:
            targets = prepared.encode_targets(train)
            probe = fit_probe(
                features[0], targets, context.num_outputs, context.group_outputs(train)
            )
            predictions = context.prepared.decode_for_metrics(held, probe.logits(features[1]))
            assert metric is not None
            return metric.sign * metric.score(prepared.encode_for_metrics(held), predictions)

        with watchdog.suspend_watch():
            return distributed.broadcast_from_main(score)

    return measure


def build_neighbour_agreement(
    context: ExperimentContext, encoded: list[EncodedRow], seed: int, state: ReadWeights
) -> Callable[[], float]:
    """Return a function that computes the share of nearest neighbours that are still the
    original's.

    Every process must call it, and must make it.

    Args:
        context: the encoder's architecture.
        encoded: rows as the encoder takes them.
        seed: of weights above the encoder that the checkpoint lacks.
        state: the weights now.
    """
    pooling = get_source_pooling(context.source)
    built = build_model(context.source, "regression", pooling, 1, [], seed)
    built.model.to(context.device)

    def features() -> np.ndarray:
        return np.concatenate(
            compute_frozen_features(
                built.model, built.last_linear, encoded, context.inputs, context.device
            )
        )

    before = features()

    def measure() -> float:
        _load_encoder_weights(built, state())
        after = features()
        with watchdog.suspend_watch():
            return distributed.broadcast_from_main(lambda: mean_shared_neighbours(before, after))

    return measure


def _load_encoder_weights(built: LoadedModel, state: dict[str, Tensor]) -> None:
    """Load an encoder's weights below a head."""
    own = built.encoder.state_dict()
    beside = (built.architecture.pooler or "pooler", *built.architecture.unused_parts)
    lost = [name for name in own if name not in state and not has_prefix(name, beside)]
    if lost:
        raise HftlError(f"the adapted encoder has no weight {lost[0]!r}", "Report this")
    built.encoder.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)


def score_validation(context: ExperimentContext, logits: np.ndarray) -> tuple[float, float]:
    """Return the score on validation that arms are chosen by, and its standard error.

    More is better. Rows of one group are left out together.

    Args:
        context: the rows.
        logits: of the validation rows.
    """
    rows, task = context.prepared.rows["validation"], context.prepared.task
    metric = METRICS[task][SELECTION_METRICS[task]]
    labels = context.prepared.encode_for_metrics(rows)
    predictions = context.prepared.decode_for_metrics(rows, logits)
    groups = [str(i) if row.group is None else row.group for i, row in enumerate(rows)]
    units = np.unique(groups, return_inverse=True)[1].astype(np.int64)

    def score(index: np.ndarray) -> float:
        return metric.sign * metric.score(labels[index], predictions[index])

    if len(np.unique(units)) < 2:
        return score(np.arange(len(rows))), 0.0
    values = jackknife(score, units)
    return score(np.arange(len(rows))), float(values.std(ddof=1) / len(values) ** 0.5)
