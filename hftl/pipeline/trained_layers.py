"""Compare the layers of a run's trained arms with what they were before training."""

import numpy as np

from hftl.analysis.drift import compute_cka
from hftl.analysis.facts import TrainedLayers
from hftl.analysis.feature_store import FeatureStore
from hftl.config.recipe import Arm
from hftl.data.rows import Row
from hftl.finetune.arm_files import WEIGHTS, load_trained_tensors
from hftl.finetune.context import ExperimentContext
from hftl.finetune.trainable import apply_strategy
from hftl.models.heads import LoadedModel
from hftl.models.layer_features import compute_layer_features
from hftl.pipeline.cache_keys import build_context_inputs
from hftl.pipeline.run import Run
from hftl.runtime import run_folder
from hftl.runtime.progress import track


def compare_trained_arms(
    run: Run, context: ExperimentContext, store: FeatureStore, rows: list[Row], pooling: str
) -> list[TrainedLayers]:
    """Return the CKA of every layer before with after training, for arms that the run has trained.

    One seed an arm, the first that is finished. An arm of an adapted encoder started elsewhere.

    Args:
        run: the recipe and its folder.
        context: of the source.
        store: holds the rows' features before.
        rows: that are compared.
        pooling: of every layer.
    """
    arms = [arm for arm in run.arms if arm.spec.changes_encoder and not arm.stages]
    trained = []
    for arm in track(arms, "trained arms"):
        for seed in run.recipe.measure.seeds:
            if _is_trained_from(run, context, arm, seed):
                cka = _compare_arm(run, context, store, rows, pooling, arm, seed)
                trained.append(TrainedLayers(arm=arm.name, seed=seed, cka=cka))
                break
    return trained


def _is_trained_from(run: Run, context: ExperimentContext, arm: Arm, seed: int) -> bool:
    """Return whether the run holds this arm and seed, of this source and its rows."""
    finished = run_folder.read_stage_inputs(run.arm_folder(arm.name, seed))
    now = build_context_inputs(context)
    return finished is not None and all(
        run_folder.has_equal(finished, now, key) for key in ("weights", "config", "data")
    )


def _compare_arm(
    run: Run, context: ExperimentContext, store: FeatureStore, rows: list[Row], pooling: str,
    arm: Arm, seed: int,
) -> list[float]:  # fmt: skip
    built = context.build_model(arm.finetune.pooling, seed)
    model = apply_strategy(built.model, arm.finetune, built.fresh)
    load_trained_tensors(model, run.arm_folder(arm.name, seed) / WEIGHTS)
    built = LoadedModel(model.to(context.device), built.architecture, built.pooling, built.fresh)
    widths, features = compute_layer_features(
        built, context.encode_rows(rows), context.inputs, context.device
    )
    after, start, values = np.concatenate(features), 0, []
    for site, width in widths.items():
        if site.pooling == pooling:
            before, now = store.get(rows, site), after[:, start : start + width]
            known = np.isfinite(before).all(1) & np.isfinite(now).all(1)
            values.append(compute_cka(before[known], now[known]))
        start += width
    return values
