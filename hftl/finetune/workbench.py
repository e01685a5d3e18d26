"""What all arms of a run share: source, inputs, rows, their encoding and frozen features."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hftl import processes
from hftl.analyse.probe import Probe, fit_probe
from hftl.check import check
from hftl.data import answers, pixels
from hftl.data.examples import Change, Examples
from hftl.data.general import General
from hftl.data.load import Row
from hftl.data.pixels import ImageInputs
from hftl.data.prepare import Prepared
from hftl.data.split import content_key
from hftl.data.text import Encoded, TextInputs
from hftl.finetune.strategy import prepare
from hftl.model.cache import Features, frozen_features
from hftl.model.head import Built, build
from hftl.model.source import SourceModel
from hftl.recipe import Arm
from hftl.sections.finetune import Finetune
from hftl.train.optimizer import LayerRates, layer_rates, learning_rates

MEASURED = ("validation", "test")
"""The splits that arms are measured on."""
BY_STEPS = ("partial", "gradual", "lora", "full")
"""The strategies that train from the source by an optimizer's steps."""


@dataclass
class Workbench:
    """Shared by the arms of one run; everything in it is computed once.

    `source` is what the arms start from, after any adaptation, and `weights` the hash of its
    weights; `inputs` is how its encoder takes rows, and `augment` whether training pictures vary.
    Where adaptation came between, `base` is what a published adapter is put on, `base_is_ours`
    says that adaptation made it, `loras` are the factors that turn it into `source`, and `original`
    is the workbench before it; `mlm_head` is the masked-language head that it has trained.
    `general` are the rows of general data, None where the recipe names none; `label` is the column
    of train's labels, by which theirs are known.
    """

    source: SourceModel
    weights: str
    inputs: TextInputs | ImageInputs
    prepared: Prepared
    shots: int | None
    device: str
    augment: bool = False
    base: SourceModel | None = None
    base_is_ours: bool = False
    loras: tuple[Path, ...] = ()
    original: "Workbench | None" = None
    mlm_head: Path | None = None
    general: General | None = None
    label: str = "label"
    _encoded: dict[bytes, Encoded] = field(default_factory=dict)
    _features: dict[tuple[str, int | None], Features] = field(default_factory=dict)
    _probes: dict[tuple[str, int], Probe] = field(default_factory=dict)

    @property
    def public_base(self) -> SourceModel:
        """The model that a published adapter is put on."""
        return self.base or self.source

    def adapted(
        self, source: SourceModel, weights: str, base: SourceModel | None,
        loras: tuple[Path, ...], mlm_head: Path | None = None,
    ) -> "Workbench":  # fmt: skip
        """The same rows and encodings under another encoder, see `Workbench`.

        Args:
            source: the adapted encoder.
            weights: their hash.
            base: what a published adapter is put on; None: the adapted encoder itself.
            loras: the factors that turn the base into the encoder.
            mlm_head: the masked-language head that adaptation left, if any.
        """
        return replace(
            self, source=source, weights=weights, base=base or source, loras=loras,
            base_is_ours=base is None or self.base_is_ours, original=self.original or self,
            mlm_head=mlm_head, _features={}, _probes={},
        )  # fmt: skip

    def check(self, asked_length: int, arms: list[Arm]) -> dict[str, Any]:
        """The preflight's facts and warnings, for the arms that train from the source.

        With them `learning_rates` by the name of the arm, where its parts have their own.
        """
        trained = [arm.finetune for arm in arms if arm.strategy in ("partial", "gradual", "full")]
        found = check(self.source, self.inputs, self.prepared, asked_length, trained)
        rates = {
            arm.name: self._learning_rates(arm.finetune, chosen)
            for arm in arms
            for chosen in [layer_rates(arm.finetune.layer_decay, arm.finetune.rates)]
            if chosen is not None and arm.strategy in BY_STEPS
        }
        return found | ({"learning_rates": rates} if rates else {})

    @property
    def outputs(self) -> int:
        """Classes, or 1 for a target."""
        return max(1, len(self.prepared.names))

    def train_rows(self, seed: int) -> list[Row]:
        """What an arm of this seed learns from."""
        return self.prepared.train(self.shots, seed)

    def encoded(self, rows: list[Row]) -> list[Encoded]:
        """What the encoder takes, each row encoded once in the run."""
        keys = [content_key(row) for row in rows]
        new = {k: r for k, r in zip(keys, rows, strict=True) if k not in self._encoded}
        self._encoded.update(zip(new, self.inputs.encode(list(new.values())), strict=True))
        return [self._encoded[key] for key in keys]

    def examples(
        self, rows: list[Row], seed: int | None = None,
        standardise: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Examples:  # fmt: skip
        """The rows as a dataset; with a seed they are for training, and may vary.

        Args:
            rows: what they hold.
            seed: of augmentation, or None.
            standardise: of targets, before they lose precision to float32.
        """
        keys = [content_key(row) for row in rows]
        targets = self.prepared.targets(rows)
        if standardise is not None:
            targets = standardise(targets)
        if targets.dtype == np.float64:
            targets = targets.astype(np.float32)
        labels = list(targets)
        if self.prepared.task == "token-classification":
            labels = np.split(targets, np.cumsum(self.prepared.words(rows))[:-1])
        change: Change | None = None
        if self.augment and seed is not None:
            change = lambda row, epoch, key: pixels.augment(row, seed, epoch, key)  # noqa: E731
        return Examples(self.encoded(rows), labels, keys, change)

    def canvases(self, rows: list[Row]) -> np.ndarray:
        """(rows, 3, height, width) uint8 pictures as the encoder sees them."""
        return np.stack([row["pixel_values"] for row in self.encoded(rows)])

    def told(self, rows: list[Row], logits: np.ndarray) -> np.ndarray:
        """The answers that logits give, in the form that metrics compare."""
        prepared = self.prepared
        found, _ = answers.told(logits, prepared.task, prepared.names, prepared.words(rows))
        return answers.measured(found, prepared.task, prepared.names)

    def groups(self, rows: list[Row]) -> np.ndarray | None:
        """A name an output, equal where outputs belong together: of one group, or one row."""
        words = self.prepared.words(rows)
        if rows[0].group is not None:
            return np.repeat([str(row.group) for row in rows], words)
        if self.prepared.task == "token-classification":
            return np.repeat(np.arange(len(rows)).astype(str), words)
        return None

    def build(self, pooling: str, seed: int, scratch: bool = False) -> Built:
        """A new model with an untrained head."""
        prepared = self.prepared
        return build(
            self.source, prepared.task, pooling, self.outputs, prepared.names, seed, scratch
        )

    def features(self, pooling: str, seed: int, rows: list[Row]) -> np.ndarray:
        """(outputs of the rows, width): what the head's last layer sees before any training.

        Where weights below the last layer are new they differ by seed, and so do the features.
        """
        known = self._features.get((pooling, None)) or self._features.get((pooling, seed))
        if known is None:
            built = self.build(pooling, seed)
            built.model.to(self.device)
            known = Features(
                lambda new: frozen_features(
                    built.model, built.last_linear, self.encoded(new), self.inputs, self.device
                )
            )
            self._features[pooling, None if built.frozen_is_shared else seed] = known
        return known.of(rows)

    def probe(self, pooling: str, seed: int) -> Probe:
        """The probe of this seed's training rows, the same on every process.

        Every process must come here; what one of them knows already is no reason not to.
        """
        return processes.share(lambda: self._fitted(pooling, seed))

    def _learning_rates(self, finetune: Finetune, rates: LayerRates) -> list[dict[str, Any]]:
        built = self.build(finetune.pooling, 0)
        model = prepare(built.model, finetune.strategy, finetune.blocks, finetune.lora, built.fresh)
        return learning_rates(model, finetune.training["learning_rate"], rates)

    def _fitted(self, pooling: str, seed: int) -> Probe:
        if (pooling, seed) not in self._probes:
            rows = self.train_rows(seed)
            features = self.features(pooling, seed, rows)
            self._probes[pooling, seed] = fit_probe(
                features, self.prepared.targets(rows), self.outputs, self.groups(rows)
            )
        return self._probes[pooling, seed]
