"""Hold what the arms of a run share: source, inputs, rows, their encodings and frozen features."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hftl.analysis.check import run_preflight_checks
from hftl.analysis.probe import Probe, fit_probe
from hftl.config.finetune import ClassWeight, Finetune
from hftl.config.recipe import Arm, Recipe
from hftl.data.class_weights import ClassWeights, compute_class_weights, describe_class_weights
from hftl.data.general import GeneralData
from hftl.data.image_inputs import ImageInputs, augment_image
from hftl.data.labels import encode_targets
from hftl.data.prepare import PreparedData
from hftl.data.rows import Row
from hftl.data.splits import hash_row
from hftl.data.text_inputs import Augmentation, EncodedDataset, EncodedRow, TextInputs
from hftl.finetune.trainable import apply_strategy
from hftl.models.features import FeatureCache, compute_frozen_features
from hftl.models.heads import LoadedModel, TargetScale, build_model, has_head_bias
from hftl.models.pairs import EMBEDDING, build_embedding_model
from hftl.models.source import SourceModel
from hftl.runtime import distributed
from hftl.runtime.run_folder import fingerprint
from hftl.train.facts import CheckFacts, LearningRate, TrainingFacts
from hftl.train.optimizer import LayerLearningRates, build_layer_rates, summarize_learning_rates
from hftl.train.samplers import build_ignored_labels

FrozenFeatures = dict[tuple[str, int | None], dict[bytes, np.ndarray]]
"""Features by pooling, and seed where they differ by it, then by the content of a row."""
MIN_BATCHNORM_ROWS = 1000
"""Training rows from which on BatchNorm's running statistics are estimated anew."""


@dataclass
class ExperimentContext:
    """Hold what the arms of one run share; everything in it is computed once.

    `source` is what the arms start from, after any adaptation, and `weights_hash` the hash of its
    weights; `config_hash` and `preprocessing_hash` are those of the recipe's source and stay.
    `inputs` is how the encoder takes rows, and `augment` whether training pictures vary.
    Where adaptation came between, `base` is what a published adapter is put on, `base_is_adapted`
    says that adaptation made it, `lora_factors` are those that turn it into `source`, and
    `original` is the context before it; `lm_head` is the head of words that it trained.
    `general` are the rows of general data, None where the recipe names none; `label_column` is that
    of train's labels, by which theirs are known; `label_words` are the words for each class, and
    `class_scores` what a source that scores every class said of the rows, by prompts and split.
    `feature_root` is where features and the states of frozen blocks stay, None: nowhere; `seeds`
    are those of the run, whose rows run in one pass: no state depends on which arm is first.
    """

    source: SourceModel
    weights_hash: str
    config_hash: str
    preprocessing_hash: str
    inputs: TextInputs | ImageInputs
    prepared: PreparedData
    shots: int | None
    device: str
    augment: bool = False
    base: SourceModel | None = None
    base_is_adapted: bool = False
    lora_factors: tuple[Path, ...] = ()
    original: "ExperimentContext | None" = None
    lm_head: Path | None = None
    general: GeneralData | None = None
    label_column: str = "label"
    label_words: Mapping[str, str] = field(default_factory=dict)
    class_scores: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    feature_root: Path | None = None
    seeds: tuple[int, ...] = ()
    _encoded: dict[bytes, EncodedRow] = field(default_factory=dict)
    _features: dict[tuple[str, int | None], FeatureCache] = field(default_factory=dict)
    _probes: dict[tuple[str, int, str], Probe] = field(default_factory=dict)
    _drawn: dict[tuple[int, ...], dict[bytes, Row]] = field(default_factory=dict, init=False)

    @property
    def public_base(self) -> SourceModel:
        """Return the model that a published adapter applies to."""
        return self.base or self.source

    def with_encoder(
        self, source: SourceModel, weights: str, base: SourceModel | None,
        loras: tuple[Path, ...], lm_head: Path | None = None,
    ) -> "ExperimentContext":  # fmt: skip
        """Return a context of the same rows and encodings under another encoder.

        Args:
            source: the adapted encoder.
            weights: their hash.
            base: what a published adapter is put on; None: the adapted encoder itself.
            loras: the factors that turn the base into the encoder.
            lm_head: the language-model head that adaptation left, if any.
        """
        return replace(
            self, source=source, weights_hash=weights, base=base or source, lora_factors=loras,
            base_is_adapted=base is None or self.base_is_adapted, original=self.original or self,
            lm_head=lm_head, _features={}, _probes={},
        )  # fmt: skip

    def run_preflight(self, recipe: Recipe, arms: Sequence[Arm], sharing: int = 1) -> CheckFacts:
        """Return the preflight's facts and warnings.

        With them `learning_rates` by the name of the arm, where its parts have their own.

        Args:
            recipe: of the run.
            arms: of the run.
            sharing: processes that share each training step.
        """
        facts = run_preflight_checks(recipe, arms, self.source, self.inputs, self.prepared, sharing)
        rates = {
            arm.name: self.list_learning_rates(arm.finetune, chosen)
            for arm in arms
            for chosen in [build_layer_rates(arm.finetune.layer_decay, arm.finetune.learning_rates)]
            if chosen is not None and arm.spec.changes_encoder
        }
        return facts.model_copy(update={"learning_rates": rates}) if rates else facts

    def list_learning_rates(
        self, finetune: Finetune, rates: LayerLearningRates
    ) -> list[LearningRate]:
        """Return the learning rate of every part of the model that a strategy trains."""
        built = self.build_model(finetune.pooling, 0)
        model = apply_strategy(built.model, finetune, built.fresh)
        return summarize_learning_rates(model, finetune.training["learning_rate"], rates)

    @property
    def reads_prompt(self) -> bool:
        """Return whether the source is a vision-language model."""
        return self.source.architecture_spec.reads_prompt

    @property
    def num_outputs(self) -> int:
        """Return the number of classes, or 1 for a target."""
        return max(1, len(self.prepared.names))

    def select_train_rows(self, seed: int) -> list[Row]:
        """Return the rows that an arm of this seed trains on."""
        return self.prepared.draw_train_rows(self.shots, seed)

    def compute_target_scale(self, seed: int) -> TargetScale | None:
        """Return the scale of the targets that an arm of this seed trains on; None for classes."""
        if self.prepared.task != "regression":
            return None
        return TargetScale.measure(self.prepared.encode_targets(self.select_train_rows(seed)))

    def compute_class_weights(self, class_weight: ClassWeight, seed: int) -> ClassWeights | None:
        """Return the weights of classes for an arm of this seed; None where all weigh the same."""
        targets = self.prepared.encode_targets(self.select_train_rows(seed))
        return compute_class_weights(class_weight, targets, self.prepared.names)

    def describe_class_weights(self, class_weight: ClassWeight, seed: int) -> TrainingFacts:
        """Return the weights of classes as facts, none where all weigh the same."""
        targets = self.prepared.encode_targets(self.select_train_rows(seed))
        return describe_class_weights(class_weight, targets, self.prepared.names)

    def encode_rows(self, rows: list[Row]) -> list[EncodedRow]:
        """Return the rows as the encoder takes them, each encoded once in the run."""
        keys = [hash_row(row) for row in rows]
        new = {k: r for k, r in zip(keys, rows, strict=True) if k not in self._encoded}
        self._encoded.update(zip(new, self.inputs.encode(list(new.values())), strict=True))
        return [self._encoded[key] for key in keys]

    def build_dataset(
        self, rows: list[Row], seed: int | None = None,
        standardise: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> EncodedDataset:  # fmt: skip
        """Return the rows as a dataset; with a seed it is for training, and may be augmented.

        Args:
            rows: what they hold.
            seed: of augmentation, or None.
            standardise: of targets, before they lose precision to float32.
        """
        keys = [hash_row(row) for row in rows]
        targets = self.prepared.encode_targets(rows)
        if standardise is not None:
            targets = standardise(targets)
        if targets.dtype == np.float64:
            targets = targets.astype(np.float32)
        labels = list(targets)
        if self.prepared.task == "token-classification":
            labels = np.split(targets, np.cumsum(self.prepared.count_words(rows))[:-1])
        change: Augmentation | None = None
        if self.augment and seed is not None:
            change = lambda row, epoch, key: augment_image(row, seed, epoch, key)  # noqa: E731
        places = [row.where for row in rows]
        return EncodedDataset(self.encode_rows(rows), labels, keys, change, places)

    def build_general_dataset(self, labelled: bool = False) -> EncodedDataset:
        """Return the general rows that training may read; their labels count only if `labelled`."""
        assert self.general is not None
        rows, prepared = self.general.train_rows, self.prepared
        encoded = self.encode_rows(rows)
        if labelled:
            values = self.general.get_control_labels(self.label_column)
            labels = list(encode_targets(values, prepared.task, prepared.names))
        else:
            target_row = self.build_dataset(prepared.rows["train"][:1])[0]
            labels = [build_ignored_labels(target_row, dict(row)) for row in encoded]
        return EncodedDataset(encoded, labels, [hash_row(row) for row in rows], None)

    def get_canvases(self, rows: list[Row]) -> list[np.ndarray]:
        """Return the images as the encoder sees them, each (3, height, width) uint8."""
        assert isinstance(self.inputs, ImageInputs)
        return self.inputs.get_canvases(rows)

    def group_outputs(self, rows: list[Row]) -> np.ndarray | None:
        """Return a group name for each output, equal within a group or a row of words; None
        without."""
        words = self.prepared.count_words(rows)
        if rows[0].group is not None:
            return np.repeat([str(row.group) for row in rows], words)
        if self.prepared.task == "token-classification":
            return np.repeat(np.arange(len(rows)).astype(str), words)
        return None

    def decide_batchnorm(self, finetune: Finetune, seed: int) -> Finetune:
        """Return the section with `freeze_batchnorm` set, by the number of training rows."""
        if finetune.freeze_batchnorm is not None:
            return finetune
        few = len(self.select_train_rows(seed)) < MIN_BATCHNORM_ROWS
        return finetune.model_copy(update={"freeze_batchnorm": few})

    def build_model(self, pooling: str, seed: int, scratch: bool = False) -> LoadedModel:
        """Return a new model with an untrained head."""
        if pooling == EMBEDDING:
            return build_embedding_model(self.source, self.num_outputs, seed, scratch)
        prepared = self.prepared
        return build_model(
            self.source, prepared.task, pooling, self.num_outputs, prepared.names, seed, scratch
        )

    def build_probed_model(
        self, pooling: str, seed: int, scale: TargetScale | None = None,
        class_weight: ClassWeight = None,
    ) -> LoadedModel:  # fmt: skip
        """Return a new model whose head is the probe (LP-FT; Kumar et al. 2022, arXiv:2202.10054).

        With a scale the head is one of standardised targets, rounded to float32 once: another unit
        of the targets starts from the same weights. Collective.
        """
        built = self.build_model(pooling, seed)
        weight, bias = self.solve_probe(pooling, seed, class_weight).exact
        if scale is not None:
            weight, bias = weight / scale.sd, (bias - scale.mean) / scale.sd
        with torch.no_grad():
            built.last_linear.weight.copy_(torch.from_numpy(weight))
            if built.has_head_bias:
                built.last_linear.bias.copy_(torch.from_numpy(bias))
        return built

    def extract_features(self, pooling: str, seed: int, rows: list[Row]) -> np.ndarray:
        """Return the inputs of the head's last layer before training, (outputs of the rows, width).

        Where weights below the last layer are new they differ by seed, and so do the features.
        Else the rows that any of the run's seeds draws run in one pass: the last bits of a row's
        features depend on the rows that ran with it, and a run that was stopped knows those of no
        seed that is finished.
        """
        known = self._features.get((pooling, None)) or self._features.get((pooling, seed))
        if known is None:
            built = self.build_model(pooling, seed)
            known = FeatureCache(partial(self._compute_features, built))
            self._features[pooling, None if built.features_are_shared else seed] = known
        if known is self._features.get((pooling, None)):
            drawn = self._list_drawn_rows()
            if any(hash_row(row) in drawn for row in rows):
                known.fill(drawn)
        return known.get(rows)

    def _list_drawn_rows(self) -> dict[bytes, Row]:
        """Return the rows that the run's seeds draw, by their hashes; none where all take all."""
        if self.shots is None:
            return {}
        if self.seeds not in self._drawn:
            rows = [row for seed in self.seeds for row in self.select_train_rows(seed)]
            self._drawn[self.seeds] = {hash_row(row): row for row in rows}
        return self._drawn[self.seeds]

    def dump_features(self) -> FrozenFeatures:
        """Return all features that are known by now, for another process to take over."""
        return {key: dict(cache.known) for key, cache in self._features.items()}

    def restore_features(self, features: FrozenFeatures) -> None:
        """Take over the features that another process has computed."""
        for (pooling, seed), known in features.items():

            def compute(rows: list[Row], pooling: str = pooling, seed: int | None = seed) -> Any:
                return self._compute_features(self.build_model(pooling, seed or 0), rows)

            self._features[pooling, seed] = FeatureCache(compute, known)

    def _compute_features(self, built: LoadedModel, rows: list[Row]) -> list[np.ndarray]:
        built.model.to(self.device)
        return compute_frozen_features(
            built.model, built.last_linear, self.encode_rows(rows), self.inputs, self.device
        )

    def solve_probe(self, pooling: str, seed: int, class_weight: ClassWeight = None) -> Probe:
        """Return the probe on this seed's training rows, solved by rank 0. Collective.

        Every process must call it, also where one of them has solved it before.
        """
        return distributed.broadcast_from_main(lambda: self._fit_probe(pooling, seed, class_weight))

    def _fit_probe(self, pooling: str, seed: int, class_weight: ClassWeight) -> Probe:
        key = pooling, seed, fingerprint(class_weight)
        if key not in self._probes:
            rows = self.select_train_rows(seed)
            features = self.extract_features(pooling, seed, rows)
            self._probes[key] = self.fit_probe_on(features, rows, pooling, class_weight)
        return self._probes[key]

    def fit_probe_on(
        self, features: np.ndarray, rows: list[Row], pooling: str, class_weight: ClassWeight = None
    ) -> Probe:
        """Return the probe of a head of this pooling on features of rows, (outputs, width)."""
        targets = self.prepared.encode_targets(rows)
        weights = compute_class_weights(class_weight, targets, self.prepared.names)
        return fit_probe(
            features, targets, self.num_outputs, self.group_outputs(rows),
            intercept=has_head_bias(self.source, self.prepared.task, pooling),
            weights=None if weights is None else weights.weigh(targets),
        )  # fmt: skip
