"""What an arm leaves behind."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hftl.analysis.check import check
from hftl.analysis.probe import Probe, fit_probe
from hftl.config.data import Data
from hftl.config.finetune import Finetune
from hftl.config.recipe import Arm, Recipe, arms
from hftl.data import image_processing
from hftl.data import labels as answers
from hftl.data.general import General
from hftl.data.image_processing import ImageInputs, resized, target_size
from hftl.data.load import Reading, Row
from hftl.data.prepare import Prepared
from hftl.data.splits import content_key
from hftl.data.text import Change, Encoded, Examples, TextInputs, WordInputs, of_words
from hftl.errors import RecipeError
from hftl.finetune.strategies import prepare
from hftl.models.architectures import (
    anatomy_of,
    check_blocks,
    count_blocks,
    encoder_config,
    layers,
    max_tokens,
    native_image_size,
    patch_size,
)
from hftl.models.features import Features, frozen_features
from hftl.models.heads import Built, build
from hftl.models.source import SourceModel, load_processor, load_tokenizer, weights_sha256
from hftl.runtime import distributed
from hftl.runtime.hardware import device
from hftl.train.optimizer import LayerRates, check_rates, layer_rates, learning_rates


@dataclass
class Outcome:
    """Predictions, weights and facts of one arm and seed.

    `logits` are (rows, outputs) for each split, for tokens (words, outputs), NaN where a word was
    cut off; `weights` the tensors that training changed or drew; `facts` tells how training went;
    `embeddings` are those of `embed`, none where the encoder is not trained from the source.
    """

    logits: dict[str, np.ndarray]
    weights: dict[str, Tensor]
    trainable_parameters: int
    facts: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)


# What all arms of a run share: source, inputs, rows, their encoding and frozen features.


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
            change = lambda row, epoch, key: image_processing.augment(row, seed, epoch, key)  # noqa: E731
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
        return distributed.share(lambda: self._fitted(pooling, seed))

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


# From source model and rows to the workbench: how the encoder takes these rows.


INTERPOLATE_THEMSELVES = ("dinov2", "dinov2_with_registers", "swin")
"""Architectures whose forward takes pictures of any size unasked."""


def reading_of(source: SourceModel, task: str) -> Reading:
    """What the source's encoder reads.

    Raises:
        RecipeError: if the task is about words and the source reads images.
    """
    if source.anatomy.modality == "text":
        return Reading()
    if task == "token-classification":
        raise RecipeError(
            f"data.task={task} needs a source that reads text, and source.model reads images",
            "Change one of them",
        )
    return Reading("image", patch_size(source.config))


def new_bench(recipe: Recipe, source: SourceModel, prepared: Prepared) -> Workbench:
    """The workbench of a recipe.

    Raises:
        RecipeError: if the recipe asks for more blocks, or rates of blocks, than there are, for a
            size that does not fit the source's patches, or for what the source's modality has not.
    """
    for arm in arms(recipe):
        rates = arm.finetune.lr
        if arm.strategy == "partial" or rates is not None:
            present = count_blocks(source.config)
            check_rates("finetune.lr", rates and rates.blocks, present)
        if arm.strategy == "partial":
            check_blocks("finetune", arm.finetune.blocks, present, layers(source.config))
    if prepared.modality == "image":
        inputs = image_inputs(recipe.data, source, prepared.facts["hub_revisions"])
    else:
        inputs = text_inputs(recipe.data, source)
    return Workbench(
        source, weights_sha256(source), inputs, prepared, recipe.data.shots, device(),
        augment=recipe.data.augment == "light", label=str(recipe.data.train.label),
    )  # fmt: skip


def text_inputs(data: Data, source: SourceModel) -> TextInputs:
    """Texts for a source that reads text.

    Raises:
        RecipeError: for keys that are about images, or a length that holds no token of a text.
    """
    for key, given in (("image_size", data.image_size), ("augment", data.augment != "none")):
        if given:
            raise RecipeError(
                f"data.{key} is about images, but source.model reads text", "Remove it"
            )
    longest = min(data.max_length, max_tokens(source.config))
    kind = WordInputs if data.task == "token-classification" else TextInputs
    tokenizer = load_tokenizer(source)
    if longest <= tokenizer.num_special_tokens_to_add():
        raise RecipeError(
            f"data.max_length={data.max_length} leaves no room for a token of the text",
            f"Use more than {tokenizer.num_special_tokens_to_add()}",
        )
    if kind is WordInputs:
        tokenizer = of_words(tokenizer, source.folder)
    return kind(tokenizer, longest)


def image_inputs(data: Data, source: SourceModel, revisions: dict[str, str]) -> ImageInputs:
    """Images for a source that reads images.

    Raises:
        RecipeError: if the size is no multiple of the patch, the encoder takes one size only, or
            pictures of another number of channels.
    """
    channels = getattr(encoder_config(source.config), "num_channels", 3)
    if channels != 3:
        raise RecipeError(
            f"source.model: {source.spec} takes pictures of {channels} channel(s), and hftl reads "
            "pictures of 3, in red, green and blue",
            "Use a source model of 3 channels",
        )
    patch = patch_size(source.config)
    processor = resized(load_processor(source), data.image_size)
    side = target_size(processor)
    if side % patch:
        below = side // patch * patch
        near = f"{below} or {below + patch}" if below else str(patch)
        raise RecipeError(
            f"data.image_size={side} is no multiple of the source's patch of {patch} pixels",
            f"Use {near}",
        )
    arguments = position_arguments(source.config, side)
    if not arguments and side != native_image_size(source.config):
        _check_any_size(source, side)
    return ImageInputs(pinned(data, revisions), processor, arguments, patch)


def pinned(data: Data, revisions: dict[str, str]) -> Data:
    """The data section with every hub table at the commit that its rows were read from."""
    tables = {
        name: getattr(data, name).model_copy(update={"revision": commit})
        for name, commit in revisions.items()
    }
    return data.model_copy(update=tables)


def _check_any_size(source: SourceModel, side: int) -> None:
    """Refuses another size for an encoder that is not known to interpolate by itself."""
    if source.model_type not in INTERPOLATE_THEMSELVES:
        raise RecipeError(
            f"the architecture {source.architecture!r} takes pictures of "
            f"{native_image_size(source.config)} pixels only, got {side}",
            "Leave data.image_size out, or choose another source",
        )


def position_arguments(config: Any, side: int) -> dict[str, Any]:
    """What forward must be told where the pictures are not of the size of pre-training."""
    interpolates = anatomy_of(config).interpolate_pos_encoding and side != native_image_size(config)
    return {"interpolate_pos_encoding": True} if interpolates else {}
