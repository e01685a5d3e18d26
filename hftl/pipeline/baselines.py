"""Score the baselines that train no encoder on validation: is there anything to transfer?"""

from dataclasses import replace

from hftl.config.recipe import Recipe
from hftl.data.splits import hash_row, take_stratified
from hftl.finetune.baselines import solve_majority
from hftl.finetune.classical import solve_classical
from hftl.finetune.context import ExperimentContext
from hftl.finetune.solved_arms import solve_head, solve_zero_shot
from hftl.measure.gain import assign_units
from hftl.measure.metrics import find_metric
from hftl.measure.scores import compare_pair, score_with_interval
from hftl.train.facts import BaselineCheck, BaselineScore

MAX_TRAIN, MAX_VALIDATION = 2000, 1000
"""Rows that are read, at most."""
UNTRAINED = ("majority", "classical")
"""Baselines that read no pretrained weight."""


def measure_baselines(recipe: Recipe, context: ExperimentContext) -> BaselineCheck:
    """Solve majority, classical, zero-shot where the recipe has words, and the probe; once.

    All learn from the rows of the first seed and are scored on validation: test stays unread.
    """
    metric = find_metric(recipe.measure.metric, context.prepared.task)
    seed, finetune = recipe.measure.seeds[0], recipe.finetune
    small = _reduce(context, seed)
    outputs = {
        "majority": solve_majority(small, seed),
        "classical": solve_classical(small, seed, finetune.class_weight),
    }
    words = next((arm for arm in recipe.arms if arm.reads_class_words), None)
    if words is not None:
        outputs["zero_shot"] = solve_zero_shot(small, words.finetune, seed)
    outputs["head"] = solve_head(small, finetune, seed)
    prepared, rows = small.prepared, small.prepared.rows["validation"]
    labels, units = prepared.encode_for_metrics(rows), assign_units(rows)
    predictions = {
        arm: prepared.decode_for_metrics(rows, output.logits["validation"])
        for arm, output in outputs.items()
    }
    estimates = {
        arm: score_with_interval(metric, labels, own, units) for arm, own in predictions.items()
    }
    over = max(UNTRAINED, key=lambda arm: metric.sign * estimates[arm].value)
    gain = compare_pair(metric, labels, predictions["head"], predictions[over], units)
    return BaselineCheck(
        metric=metric.name,
        train_rows=len(prepared.rows["train"]),
        validation_rows=len(rows),
        scores=[
            BaselineScore(arm=arm, score=estimate.value, ci95=estimate.ci95)
            for arm, estimate in estimates.items()
        ],
        gain=gain.value,
        gain_ci95=gain.ci95,
        over=over,
    )


def _reduce(context: ExperimentContext, seed: int) -> ExperimentContext:
    """Return a context of the seed's training rows and of validation, and hardly any test row."""
    prepared = context.prepared
    train, validation = context.select_train_rows(seed), prepared.rows["validation"]
    if len(train) > MAX_TRAIN:
        train = take_stratified(train, MAX_TRAIN, prepared.task, 0, "baseline", leave=1)[0]
    validation = sorted(validation, key=lambda row: hash_row(row, 0, "baseline"))
    rows = {
        "train": train,
        "validation": validation[:MAX_VALIDATION],
        "test": prepared.rows["test"][:1],
    }
    return replace(
        context, prepared=replace(prepared, rows=rows), shots=None, class_scores={}, _probes={}
    )
