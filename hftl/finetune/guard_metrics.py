"""What guards an adaptation: the encoder as it is now, seen by a probe or by its neighbours."""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from hftl.analysis.drift import agreement
from hftl.analysis.probe import fit_probe
from hftl.data.text import Encoded
from hftl.errors import HftlError
from hftl.finetune.context import Workbench
from hftl.measure.metrics import METRICS, SELECTION
from hftl.models.features import frozen_features
from hftl.models.heads import Built, build
from hftl.models.parts import under
from hftl.runtime import distributed

State = Callable[[], dict[str, Tensor]]
"""The weights of an encoder that is being adapted, by their names in `AutoModel`."""
ROWS = 2000
"""Validation rows that a probe is scored on, at most; they stand in the order of a hash."""
FITTED = 5000
"""Training rows that it is fitted on, at most."""


def probe_score(bench: Workbench, pooling: str, seed: int, state: State) -> Callable[[], float]:
    """The score on validation of a probe fitted on the encoder as it is now; more is better.

    Every process must call it.

    Args:
        bench: rows, and the encoder's architecture.
        pooling: as in fine-tuning, which starts from such a probe.
        seed: whose training rows the probe is fitted on.
        state: the weights now.
    """
    prepared = bench.prepared
    built = bench.build(pooling, seed)
    built.model.to(bench.device)
    train, held = bench.train_rows(seed)[:FITTED], prepared.rows["validation"][:ROWS]
    name = SELECTION[prepared.task]
    metric = METRICS[prepared.task].get(name)

    def measure() -> float:
        _set(built, state())
        found = [
            np.concatenate(frozen_features(
                built.model, built.last_linear, bench.encoded(rows), bench.inputs, bench.device
            ))
            for rows in (train, held)
        ]  # fmt: skip

        def score() -> float:
            targets = prepared.targets(train)
            probe = fit_probe(found[0], targets, bench.outputs, bench.groups(train))
            told = bench.told(held, probe.logits(found[1]))
            assert metric is not None
            return metric.sign * metric.score(prepared.measured(held), told)

        return distributed.share(score)

    return measure


def neighbours_kept(
    bench: Workbench, encoded: list[Encoded], seed: int, state: State
) -> Callable[[], float]:
    """The share of each row's nearest neighbours that are those under the original encoder.

    Every process must call it, and must make it.

    Args:
        bench: the encoder's architecture.
        encoded: rows as the encoder takes them.
        seed: of weights above the encoder that the checkpoint lacks.
        state: the weights now.
    """
    pooling = "mean" if bench.prepared.modality == "text" else "native"
    built = build(bench.source, "regression", pooling, 1, [], seed)
    built.model.to(bench.device)

    def features() -> np.ndarray:
        return np.concatenate(
            frozen_features(built.model, built.last_linear, encoded, bench.inputs, bench.device)
        )

    before = features()

    def measure() -> float:
        _set(built, state())
        after = features()
        return distributed.share(lambda: agreement(before, after))

    return measure


def _set(built: Built, state: dict[str, Tensor]) -> None:
    """Puts an encoder's weights below a head."""
    mine = built.encoder.state_dict()
    beside = (built.anatomy.pooler or "pooler", *built.anatomy.unused)
    lost = [name for name in mine if name not in state and not under(name, beside)]
    if lost:
        raise HftlError(f"the adapted encoder has no weight {lost[0]!r}", "Report this")
    built.encoder.load_state_dict({k: v for k, v in state.items() if k in mine}, strict=False)
