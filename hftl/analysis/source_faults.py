"""Find faults by the frozen source: does it score better under another reading of the same rows?

Features of a sample of rows are read once as the recipe says, and of some of these rows once under
every other reading. What is compared is the loss of probes out of fold, row by row. A check takes
the examined rows and yields findings; it is one function in `READING_CHECKS`.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import expit, log_expit, log_softmax
from scipy.stats import ttest_1samp

from hftl.analysis.fingerprints import (
    CLIP,
    IMAGENET,
    NORMALIZATIONS,
    Normalization,
    read_normalization,
)
from hftl.analysis.out_of_fold import assign_folds
from hftl.analysis.probe import fit_probe
from hftl.config.recipe import Recipe
from hftl.data.image_inputs import ImageInputs
from hftl.data.prompted_inputs import PromptedInputs
from hftl.data.rows import Row
from hftl.data.splits import hash_row, take_stratified
from hftl.data.text_inputs import EncodedRow, TextInputs
from hftl.finetune.context import ExperimentContext
from hftl.models.features import compute_frozen_features
from hftl.train.facts import FaultKind, Finding

SAMPLE_SECONDS, READING_SECONDS = 10.0, 20.0
"""The forward passes of the sample, and of all readings; the rest of a minute is imports, data and
probes."""
TIMED_ROWS = 16
MAX_SAMPLE, MAX_READ = 1500, 400
MIN_READ = 40
SHUFFLES = 2
"""Random exchanges of tokens that texts are read under."""
LEVEL, LIKELY_LEVEL = 0.05, 0.01
"""Of all readings of a check together."""
MIN_COST = 0.02
"""Points of accuracy below which a better reading is no fault: two."""
MAX_BENEFIT = 0.1
"""Loss that a tokenizer saves at most, at 95 %, where it means nothing to the encoder; of few rows
nothing can be said."""
PROBE_C = np.array([0.01])
"""The penalty on standardised features; one for all readings, so that none gains by its choice."""


@dataclass(frozen=True)
class Reading:
    """Describe another way to read the same rows: what it would mean, and how it is done."""

    kind: FaultKind
    what: str
    fix: str
    encode: Callable[[list[Row]], list[EncodedRow]]
    inputs: TextInputs | ImageInputs


@dataclass(frozen=True)
class ExaminedRows:
    """Hold a sample of labelled rows of train with their frozen features.

    `read_rows` of them, the first ones, are read in other ways. `pooling` is what features are read
    by: a pooler that is new says nothing.
    """

    recipe: Recipe
    context: ExperimentContext
    pooling: str
    rows: list[Row]
    read_rows: int

    @cached_property
    def features(self) -> np.ndarray:
        """Return the features, (rows, width)."""
        return self.context.extract_features(self.pooling, 0, self.rows)

    @cached_property
    def targets(self) -> np.ndarray:
        """Return the targets, see `encode_targets`."""
        return self.context.prepared.encode_targets(self.rows)

    @cached_property
    def logits(self) -> np.ndarray:
        """Return the logits of every row by a probe that has not seen it, (rows, outputs)."""
        groups = self.context.group_outputs(self.rows)
        return predict_rows(self.features, self.targets, self.context.num_outputs, groups)

    def compute_features(
        self, encoded: list[EncodedRow], inputs: TextInputs | ImageInputs
    ) -> np.ndarray:
        """Return the features of rows that are encoded in another way."""
        built = self.context.build_model(self.pooling, 0)
        built.model.to(self.context.device)
        return np.concatenate(
            compute_frozen_features(
                built.model, built.last_linear, encoded, inputs, self.context.device
            )
        )


SourceCheck = Callable[[ExaminedRows], Iterator[Finding]]


def examine_rows(recipe: Recipe, context: ExperimentContext) -> ExaminedRows | None:
    """Draw the rows that faults are sought on, as many as the time allows; None for words or too
    few rows."""
    prepared = context.prepared
    rows = prepared.rows["train"]
    if prepared.task == "token-classification" or len(rows) < MIN_READ:
        return None
    pooling = recipe.finetune.pooling
    if (
        pooling == "native"
        and prepared.modality == "text"
        and not context.source.architecture_spec.is_causal
    ):
        pooling = "mean"
    ordered = sorted(rows, key=lambda row: hash_row(row, 0, "check"))
    started = time.perf_counter()
    # Decoding counts, but not the building of the model.
    context.extract_features(pooling, 0, ordered[:1])
    started = time.perf_counter()
    context.extract_features(pooling, 0, ordered[1 : 1 + TIMED_ROWS])
    seconds = (time.perf_counter() - started) / TIMED_ROWS
    readings = len(list_readings(context)) + (0 if prepared.modality == "image" else SHUFFLES)
    sample = min(len(rows), MAX_SAMPLE, max(MIN_READ, int(SAMPLE_SECONDS / seconds)))
    read = min(sample, MAX_READ, max(MIN_READ, int(READING_SECONDS / max(1, readings) / seconds)))
    drawn = rows
    if sample < len(rows):
        drawn = take_stratified(rows, sample, prepared.task, 0, "check")[0]
    ordered = sorted(drawn, key=lambda row: hash_row(row, 0, "check"))
    return ExaminedRows(recipe, context, pooling, ordered, min(read, len(ordered)))


def predict_rows(
    features: np.ndarray, targets: np.ndarray, outputs: int, groups: np.ndarray | None
) -> np.ndarray:
    """Return the logits of every row by a probe of the other folds, (rows, outputs)."""
    folds = assign_folds(targets, groups)
    logits = np.empty((len(features), outputs))
    for fold in np.unique(folds):
        train, held = folds != fold, folds == fold
        own = None if groups is None else groups[train]
        probe = fit_probe(features[train], targets[train], outputs, own, PROBE_C)
        logits[held] = probe.logits(features[held])
    return logits


def compute_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the loss of every row, (rows,): cross-entropy, or the squared error of a target."""
    if targets.ndim == 2:
        signs = 2 * targets - 1
        return -log_expit(signs * logits).mean(1)
    if targets.dtype == np.float64:
        return (logits[:, 0] - targets) ** 2 / max(float(targets.var()), 1e-12)
    return -log_softmax(logits, axis=1)[np.arange(len(targets)), targets]


def compute_hits(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return how right every row is, (rows,): 0 or 1, the share of labels, or 1 less the error."""
    if targets.ndim == 2:
        return ((expit(logits) > 0.5) == targets).mean(1)
    if targets.dtype == np.float64:
        return 1 - compute_losses(logits, targets)
    return (logits.argmax(1) == targets).astype(np.float64)


# Other readings of the same rows.


def list_readings(context: ExperimentContext) -> list[Reading]:
    """Return the readings that would be other bytes for the encoder than the recipe's own."""
    inputs = context.inputs
    if isinstance(inputs, PromptedInputs):
        return []  # Its processor holds words and pictures together.
    if isinstance(inputs, ImageInputs):
        return [*_list_normalizations(inputs, context), _swap_channels(inputs, context)]
    return [*_list_casings(inputs, context)]


def _list_normalizations(inputs: ImageInputs, context: ExperimentContext) -> Iterator[Reading]:
    own = read_normalization(inputs)
    for name, other in NORMALIZATIONS.items():
        if own.is_near(other) or (other is IMAGENET and own.is_near(CLIP)):
            continue
        is_rescaled = 0.05 < max(own.std) < 2
        yield Reading(
            "normalization" if is_rescaled else "rescale",
            f"the source reads these pictures better by {name} ({other}) than by the processor's "
            f"own {own}",
            "correct image_mean, image_std and rescale_factor in preprocessor_config.json",
            context.encode_rows,
            _normalize_by(inputs, other),
        )


def _normalize_by(inputs: ImageInputs, normalization: Normalization) -> ImageInputs:
    settings = inputs.processor.to_dict() | {
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(normalization.mean), "image_std": list(normalization.std),
    }  # fmt: skip
    processor = type(inputs.processor).from_dict(settings)
    return ImageInputs(inputs.data, processor, inputs.arguments, inputs.patch_size)


def _swap_channels(inputs: ImageInputs, context: ExperimentContext) -> Reading:
    def encode(rows: list[Row]) -> list[EncodedRow]:
        return [swap_channels(row) for row in context.encode_rows(rows)]

    return Reading(
        "channels",
        "the source reads these pictures better with red and blue exchanged",
        "save the pictures in the order red, green, blue (OpenCV writes and reads blue first)",
        encode,
        inputs,
    )


def swap_channels(encoded: EncodedRow) -> EncodedRow:
    """Return a picture with red and blue exchanged."""
    pixels = np.asarray(encoded["pixel_values"])
    return {"pixel_values": np.ascontiguousarray(pixels[::-1])}


def _list_casings(inputs: TextInputs, context: ExperimentContext) -> Iterator[Reading]:
    rows = context.prepared.rows["train"][:MAX_READ]
    lowered = list(map(lower_row, rows))
    changed = sum(a.content != b.content for a, b in zip(rows, lowered, strict=True))
    if changed < 0.2 * len(rows) or inputs.encode(rows) == inputs.encode(lowered):
        return
    yield Reading(
        "casing",
        "the source reads these texts better in lower case",
        "set do_lower_case to true in its tokenizer_config.json, or give the texts in lower case",
        lambda own: inputs.encode(list(map(lower_row, own))),
        inputs,
    )


def lower_row(row: Row) -> Row:
    """Return a row whose texts are in lower case."""
    return replace(row, content=tuple(text.lower() for text in row.content))


def check_readings(examined: ExaminedRows) -> Iterator[Finding]:
    """Find a reading under which the source scores better beyond noise than under the recipe's."""
    readings = list_readings(examined.context)
    count = examined.read_rows
    if not readings:
        return
    rows, targets = examined.rows[:count], examined.targets[:count]
    own = _predict_part(examined, examined.features[:count])
    results: list[Finding] = []
    for reading in readings:
        features = examined.compute_features(reading.encode(rows), reading.inputs)
        other = _predict_part(examined, features)
        p_value, cost = compare_readings(own, other, targets)
        if p_value < LEVEL / len(readings) and cost >= MIN_COST:
            results.append(
                Finding(
                    kind=reading.kind,
                    what=reading.what,
                    confidence="likely" if p_value < LIKELY_LEVEL / len(readings) else "possible",
                    cost=cost,
                    evidence=f"a probe of {count} rows is right in {cost:+.1%} of them, "
                    f"p {p_value:.1g}",
                    fix=reading.fix,
                )  # fmt: skip
            )
    # Of several readings that are better the best one is what is wrong.
    if results:
        yield max(results, key=lambda finding: finding.cost or 0.0)


def _predict_part(examined: ExaminedRows, features: np.ndarray) -> np.ndarray:
    count = len(features)
    groups = examined.context.group_outputs(examined.rows[:count])
    return predict_rows(features, examined.targets[:count], examined.context.num_outputs, groups)


def compare_readings(
    own: np.ndarray, other: np.ndarray, targets: np.ndarray
) -> tuple[float, float]:
    """Return the one-sided p-value that another reading is no better, and the points it gains."""
    gains = compute_losses(own, targets) - compute_losses(other, targets)
    cost = float((compute_hits(other, targets) - compute_hits(own, targets)).mean())
    return compute_p_above_zero(gains), cost


def compute_p_above_zero(values: np.ndarray) -> float:
    """Return the one-sided p-value that the mean of values is not above 0; 1 of equal values."""
    if np.ptp(values) == 0:
        return 1.0
    result: Any = ttest_1samp(values, 0, alternative="greater")
    return float(result.pvalue)


def check_tokenizer(examined: ExaminedRows) -> Iterator[Finding]:
    """Find a tokenizer whose ids mean nothing to the encoder: any other would do as well."""
    inputs, count = examined.context.inputs, examined.read_rows
    if isinstance(inputs, ImageInputs):
        return
    own = _predict_part(examined, examined.features[:count])
    encoded = inputs.encode(examined.rows[:count])
    targets = examined.targets[:count]
    gains = []
    for seed in range(SHUFFLES):
        features = examined.compute_features(shuffle_ids(encoded, inputs, seed), inputs)
        other = _predict_part(examined, features)
        gains.append(compute_losses(other, targets) - compute_losses(own, targets))
    mean = np.mean(gains, axis=0)
    p_value = compute_p_above_zero(mean)
    highest = float(mean.mean() + 1.645 * mean.std() / np.sqrt(len(mean)))
    if p_value > 0.05 and highest < MAX_BENEFIT and _beats_constant(own, targets):
        yield Finding(
            kind="tokenizer",
            what="the source reads these texts no better than with its tokens exchanged at random",
            confidence="likely" if float(mean.mean()) <= 0 else "possible",
            evidence=f"probes of {count} rows, p {p_value:.2g} that it is better",
            fix="take the tokenizer that belongs to the model; or the source does not know this "
            "language, or is not pretrained",
        )


def _beats_constant(logits: np.ndarray, targets: np.ndarray) -> bool:
    """Return whether a probe predicts better, beyond noise, than the same output for every row."""
    constant = logits.mean(0, keepdims=True).repeat(len(logits), 0)
    gains = compute_losses(constant, targets) - compute_losses(logits, targets)
    return compute_p_above_zero(gains) < 0.05


def shuffle_ids(encoded: list[EncodedRow], inputs: TextInputs, seed: int) -> list[EncodedRow]:
    """Return rows in which every token id but special ones is replaced by another, one to one."""
    special = np.array(sorted(set(inputs.tokenizer.all_special_ids)))
    used = np.unique(np.concatenate([np.asarray(row["input_ids"]) for row in encoded]))
    # Among the tokens of these rows: rare tokens of the vocabulary are hardly trained.
    ids = used[~np.isin(used, special)]
    mapping = np.arange(int(used.max()) + 1)
    mapping[ids] = np.random.default_rng(seed).permutation(ids)
    return [row | {"input_ids": mapping[np.asarray(row["input_ids"])].tolist()} for row in encoded]


READING_CHECKS: tuple[SourceCheck, ...] = (
    check_readings,
    check_tokenizer,
)
