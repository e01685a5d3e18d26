"""Find faults by the frozen source: does it score better under another reading of the same rows?

Features of a sample of rows are read once as the recipe says, and of some of these rows once under
every other reading. What is compared is the loss of probes out of fold, row by row. A check takes
the examined rows and yields findings; it is one function in `READING_CHECKS`.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import expit, log_expit, log_softmax

from hftl.analysis.out_of_fold import assign_folds
from hftl.analysis.probe import fit_probe
from hftl.analysis.readings import LEVEL, Reading, list_readings
from hftl.config.recipe import Recipe
from hftl.data.image_inputs import ImageInputs
from hftl.data.rows import Row
from hftl.data.splits import hash_row, take_stratified
from hftl.data.text_inputs import EncodedRow, TextInputs
from hftl.finetune.context import ExperimentContext
from hftl.models.architectures import get_max_tokens
from hftl.models.features import compute_frozen_features
from hftl.runtime.hardware import has_fast_bf16
from hftl.train.facts import Finding

SAMPLE_SECONDS, READING_SECONDS = 15.0, 10.0
"""The forward passes of the sample, and of all readings; the rest of a minute is imports, data and
probes. Wrong labels among hard pictures need 600 rows: a fifth of clip art's give p .004 in 617."""
TIMED_ROWS = 16
MAX_SAMPLE, MAX_READ = 1500, 700
MIN_READ = 40
READ_TOKENS = 128
"""Tokens of a text that are read, at most: news of 332 words are told apart by a probe in .966 of
200 rows by these, in .968 by 400 tokens."""
DIVISIONS = 3
"""Divisions into folds that the scores of a reading are averaged over."""
LIKELY_LEVEL = 0.01
"""Of all readings of a check together."""
PROBE_C = np.array([0.01])
"""The penalty on standardised features; one for all readings, so that none gains by its choice."""


class MeasuredReading(NamedTuple):
    """Hold what another reading of `rows` rows gains: the one-sided p-value, and points."""

    reading: Reading
    p_value: float
    cost: float
    rows: int

    @property
    def sentence(self) -> str:
        """Say how much better the source reads by it."""
        return (
            f"a probe of {self.rows} rows is right in {self.cost:+.1%} of them "
            f"{self.reading.name}, p {self.p_value:.1g}"
        )


class RowScores(NamedTuple):
    """Hold how wrong and how right every row is by probes that have not seen it, (rows,) each."""

    losses: np.ndarray
    hits: np.ndarray


@dataclass(frozen=True)
class ExaminedRows:
    """Hold a sample of labelled rows of train with their frozen features.

    `read_rows` of them, the first ones, are read in other ways. `pooling` is what features are read
    by: a pooler that is new says nothing. `context` reads the first `READ_TOKENS` of texts.
    """

    recipe: Recipe
    context: ExperimentContext
    pooling: str
    rows: list[Row]
    read_rows: int
    readings: list[Reading]

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

    @cached_property
    def measured(self) -> list[MeasuredReading]:
        """Return every other reading with what it gains."""
        if not self.readings:
            return []
        count = self.read_rows
        own, results = self.score(self.features[:count]), []
        for reading in self.readings:
            features = self.compute_features(reading.encode(self.rows[:count]), reading.inputs)
            results.append(
                MeasuredReading(reading, *compare_readings(own, self.score(features)), count)
            )
        return results

    def score(self, features: np.ndarray) -> RowScores:
        """Return the scores of the first rows by features of them, out of fold."""
        count = len(features)
        groups = self.context.group_outputs(self.rows[:count])
        return score_rows(features, self.targets[:count], self.context.num_outputs, groups)

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
    pooling, context = _choose_pooling(recipe, context), _set_text_length(context, rows)
    ordered = sorted(rows, key=lambda row: hash_row(row, 0, "check"))
    # Decoding counts, but not the building of the model.
    context.extract_features(pooling, 0, ordered[:1])
    started = time.perf_counter()
    context.extract_features(pooling, 0, ordered[1 : 1 + TIMED_ROWS])
    seconds = (time.perf_counter() - started) / TIMED_ROWS
    sample = min(len(rows), MAX_SAMPLE, max(MIN_READ, int(SAMPLE_SECONDS / seconds)))
    drawn = rows
    if sample < len(rows):
        drawn = take_stratified(rows, sample, prepared.task, 0, "check")[0]
    ordered = sorted(drawn, key=lambda row: hash_row(row, 0, "check"))
    family = str(context.source.config.model_type)
    readings = list_readings(context.inputs, family, ordered, context.encode_rows)
    read = max(MIN_READ, int(READING_SECONDS / max(1, len(readings)) / seconds))
    return ExaminedRows(
        recipe, context, pooling, ordered, min(read, MAX_READ, len(ordered)), readings
    )


def _choose_pooling(recipe: Recipe, context: ExperimentContext) -> str:
    """Return the recipe's pooling, or the mean where that would be read through a new pooler."""
    pooling = recipe.finetune.pooling
    is_encoder = not context.source.architecture_spec.is_causal
    if pooling == "native" and context.prepared.modality == "text" and is_encoder:
        return "mean"
    return pooling


def _set_text_length(context: ExperimentContext, rows: list[Row]) -> ExperimentContext:
    """Return a context that reads `READ_TOKENS` of texts that are longer, whatever the recipe cuts.

    More would say little for what it costs. Of texts that the recipe cuts to a few words labels
    would look wrong that are not: the cut is what is wrong there, and it is a finding by itself.
    """
    inputs = context.inputs
    if not isinstance(inputs, TextInputs):
        return context
    length = min(READ_TOKENS, get_max_tokens(context.source.config))
    is_cut = inputs.max_length > length or inputs.summarize(rows[:MAX_READ])["truncated"] > 0
    if inputs.max_length == length or not is_cut:
        return context
    read = replace(inputs, max_length=length)
    return replace(context, inputs=read, _encoded={}, _features={}, _probes={})


def multiply_fast(context: ExperimentContext) -> torch.autocast:
    """Return the context manager under which pictures are read in bfloat16, where that is fast.

    A probe errs far more than this rounds, and the same seconds read more rows. Texts have a shape
    for every length, each of which would be compiled first. The context holds features that are
    rounded afterwards: it is one of a check, which trains nothing.
    """
    is_fast = isinstance(context.inputs, ImageInputs) and has_fast_bf16(context.device)
    return torch.autocast(context.device, torch.bfloat16, enabled=is_fast)


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


def score_rows(
    features: np.ndarray, targets: np.ndarray, outputs: int, groups: np.ndarray | None
) -> RowScores:
    """Return the scores of every row out of fold, averaged over several divisions into folds.

    The average varies less than a single one: of clip art with exchanged channels, t is 3.2 for
    2.4. Groups are dealt to folds by their size alone, in one way.
    """
    divisions = DIVISIONS if groups is None else 1
    losses, hits = np.zeros(len(features)), np.zeros(len(features))
    for seed in range(divisions):
        order = np.random.default_rng(seed).permutation(len(features))
        own = None if groups is None else groups[order]
        logits = predict_rows(features[order], targets[order], outputs, own)
        losses[order] += compute_losses(logits, targets[order]) / divisions
        hits[order] += compute_hits(logits, targets[order]) / divisions
    return RowScores(losses, hits)


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


def check_readings(examined: ExaminedRows) -> Iterator[Finding]:
    """Find a reading under which the source scores better beyond noise than under the recipe's."""
    better = [
        one
        for one in examined.measured
        if one.p_value < one.reading.level / len(examined.measured)
        and one.cost >= one.reading.min_cost
    ]
    # Of several readings that are better the best one is what is wrong.
    if not better:
        return
    best = max(better, key=lambda one: one.cost)
    reading = best.reading
    is_likely = best.p_value < LIKELY_LEVEL / len(examined.measured)
    yield Finding(
        kind=reading.kind,
        what=reading.what,
        confidence="likely" if is_likely else "possible",
        cost=best.cost,
        evidence="; ".join(filter(None, [best.sentence, reading.evidence])),
        fix=reading.fix,
    )


def add_costs(findings: list[Finding], examined: ExaminedRows) -> list[Finding]:
    """Return findings of what a checkpoint declares, with the points that they cost here.

    One that the probe contradicts, as the source reads better by what it has, is possible at most.
    """
    priced = []
    for finding in findings:
        measured = [one for one in examined.measured if one.reading.kind == finding.kind]
        if finding.cost is not None or not measured:
            priced.append(finding)
            continue
        best = max(measured, key=lambda one: one.cost)
        sure = "possible" if best.p_value > 1 - LEVEL else finding.confidence
        evidence = "; ".join(filter(None, [finding.evidence, best.sentence]))
        changes = {"cost": best.cost, "evidence": evidence, "confidence": sure}
        priced.append(finding.model_copy(update=changes))
    return priced


def compare_readings(own: RowScores, other: RowScores) -> tuple[float, float]:
    """Return the one-sided p-value that another reading is no better, and the points it gains."""
    cost = float((other.hits - own.hits).mean())
    return compute_p_above_zero(own.losses - other.losses), cost


def compute_p_above_zero(values: np.ndarray) -> float:
    """Return the one-sided p-value that the mean of values is not above 0; 1 of equal values."""
    from scipy.stats import ttest_1samp

    if np.ptp(values) == 0:
        return 1.0
    result: Any = ttest_1samp(values, 0, alternative="greater")
    return float(result.pvalue)
