"""What all arms of a run share: source, tokenizer, rows, token ids and frozen features."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hftl.analyse.probe import Probe, fit_probe
from hftl.check import check
from hftl.data.load import Row
from hftl.data.prepare import Prepared
from hftl.data.split import content_key
from hftl.data.text import Encoded, Pad, encode
from hftl.model.cache import Features, frozen_features
from hftl.model.head import Built, build
from hftl.model.source import SourceModel
from hftl.recipe import Arm

MEASURED = ("validation", "test")
"""The splits that arms are measured on."""


@dataclass
class Workbench:
    """Shared by the arms of one run; everything in it is computed once.

    `weights` is the hash of the source model's weights, `max_length` counts tokens.
    """

    source: SourceModel
    weights: str
    tokenizer: Any
    prepared: Prepared
    shots: int | None
    max_length: int
    device: str
    _encoded: dict[bytes, Encoded] = field(default_factory=dict)
    _features: dict[tuple[str, int | None], Features] = field(default_factory=dict)
    _probes: dict[tuple[str, int], Probe] = field(default_factory=dict)

    def check(self, asked_length: int, arms: list[Arm]) -> dict[str, Any]:
        """The preflight's facts and warnings, for the arms that train from the source."""
        trained = [arm.finetune for arm in arms if arm.strategy in ("partial", "full")]
        return check(self.source, self.tokenizer, self.prepared, asked_length, trained)

    @property
    def outputs(self) -> int:
        """Classes, or 1 for a target."""
        return max(1, len(self.prepared.names))

    @property
    def pad(self) -> Pad:
        """The collator."""
        return Pad(self.tokenizer)

    def train_rows(self, seed: int) -> list[Row]:
        """What an arm of this seed learns from."""
        return self.prepared.train(self.shots, seed)

    def encoded(self, rows: list[Row]) -> list[Encoded]:
        """Token ids, each text tokenised once in the run."""
        keys = [content_key(row) for row in rows]
        new = {k: r for k, r in zip(keys, rows, strict=True) if k not in self._encoded}
        texts = [row.texts for row in new.values()]
        self._encoded.update(zip(new, encode(self.tokenizer, texts, self.max_length), strict=True))
        return [self._encoded[key] for key in keys]

    def build(self, pooling: str, seed: int, scratch: bool = False) -> Built:
        """A new model with an untrained head."""
        return build(self.source, pooling, self.outputs, self.prepared.names, seed, scratch)

    def features(self, pooling: str, seed: int, rows: list[Row]) -> np.ndarray:
        """(rows, width): what the head's last layer sees before any training.

        Where weights below the last layer are new they differ by seed, and so do the features.
        """
        known = self._features.get((pooling, None)) or self._features.get((pooling, seed))
        if known is None:
            built = self.build(pooling, seed)
            built.model.to(self.device)
            known = Features(
                lambda new: frozen_features(
                    built.model, built.last_linear, self.encoded(new), self.pad, self.device
                )
            )
            self._features[pooling, None if built.frozen_is_shared else seed] = known
        return known.of(rows)

    def probe(self, pooling: str, seed: int) -> Probe:
        """The probe of this seed's training rows."""
        if (pooling, seed) not in self._probes:
            rows = self.train_rows(seed)
            self._probes[pooling, seed] = fit_probe(
                self.features(pooling, seed, rows),
                self.prepared.labels(rows),
                self.outputs,
                [row.group for row in rows],
            )
        return self._probes[pooling, seed]
