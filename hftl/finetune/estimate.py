"""How long a run will take, from a timed forward pass."""

import time

from hftl.finetune import weight
from hftl.finetune.embed import compared
from hftl.finetune.retention import OWN_HEADS, mixes_general
from hftl.finetune.weight import is_open
from hftl.finetune.workbench import BY_STEPS, MEASURED, Workbench
from hftl.model.anatomy import count_blocks
from hftl.model.cache import frozen_features
from hftl.model.parts import TOKENS
from hftl.recipe import Arm, Recipe
from hftl.sections.retain import Replay, Retain

SAMPLE = 128
STEP = 4.0
"""A training step of all weights costs about four forward passes: its own, the backward one and the
optimizer."""
LORA_STEP = 3.0
"""Where the base is frozen, the gradients of its weights are not computed."""
SEARCHED = 1 / 3


def estimate_seconds(bench: Workbench, jobs: list[Arm], recipe: Recipe) -> float:
    """Seconds for the arms given, one entry an arm and seed; rough, within a factor of two."""
    train = len(bench.train_rows(recipe.measure.seeds[0]))
    validation = len(bench.prepared.rows["validation"])
    measured = sum(len(bench.prepared.rows[split]) for split in MEASURED)
    embedded = sum(map(len, compared(bench).values()))
    passes = float(train + measured)
    seen: set[str] = set()
    for arm in jobs:
        if arm.strategy not in (*BY_STEPS, "scratch"):
            continue
        epochs, step = _epochs(bench, arm, recipe), _step(bench, arm)
        own = measured + epochs * (train * (step + _beside(bench, arm.retain, step)) + validation)
        own += _once(bench, arm.retain, train, validation)
        own += embedded if arm.strategy != "scratch" else 0
        passes += own
        if arm.name not in seen and arm.strategy == "scratch":
            passes += len(recipe.measure.scratch.learning_rates) * epochs * SEARCHED * train * STEP
        if arm.name not in seen and is_open(arm.retain):
            passes += len(weight.GRID) * (own + _looked(bench))
        seen.add(arm.name)
    return passes * _seconds_a_row(bench, recipe.finetune.pooling)


def _epochs(bench: Workbench, arm: Arm, recipe: Recipe) -> float:
    """How often a training sees its rows, at most."""
    if arm.strategy == "gradual":
        phased = arm.finetune.gradual
        return phased.epochs * (count_blocks(bench.source.config) + 1) + phased.final_epochs
    factor = recipe.measure.scratch.epochs_factor if arm.strategy == "scratch" else 1
    return factor * float(arm.finetune.training["num_train_epochs"])


def _step(bench: Workbench, arm: Arm) -> float:
    """The forward passes that a training step costs for each of its rows."""
    if arm.strategy == "partial":
        trained = min(1.0, arm.finetune.blocks / count_blocks(bench.source.config))
        return 1 + (STEP - 1) * trained
    return LORA_STEP if arm.strategy == "lora" else STEP


def _beside(bench: Workbench, retain: Retain | None, step: float) -> float:
    """Forward passes that retention adds in training, for each row of the target."""
    if retain is None:
        return 0.0
    general = (retain.replay or Replay()).ratio if mixes_general(retain) else 0.0
    rows = {"target": 1.0, "general": general, "both": 1.0 + general}
    # A head of the source's own is another pass to train through, and one of the original's.
    own = sum(step * rows[kl.inputs] for kl in retain.kls if kl.weight and kl.on in OWN_HEADS)
    asked = 0.0 if _is_cached(bench, retain) else 1.0 + general
    return general * step + own + asked


def _once(bench: Workbench, retain: Retain | None, train: int, validation: int) -> float:
    """Forward passes that retention adds to a training once."""
    if retain is None:
        return 0.0
    general = len(bench.general.used) if bench.general is not None else 0
    asked = any(kl.weight and kl.on not in OWN_HEADS for kl in retain.kls)
    looked = train + (general if mixes_general(retain) else 0) if asked else 0
    fisher = STEP * retain.ewc.samples if retain.ewc is not None else 0.0
    return looked + fisher + validation * len(retain.interpolate or ())


def _is_cached(bench: Workbench, retain: Retain) -> bool:
    """Whether the original need not be asked at every step."""
    terms = [kl.on for kl in retain.kls if kl.weight and kl.on not in OWN_HEADS]
    words = bench.prepared.task == TOKENS and "probe" in terms
    return not terms or not (bench.augment or words)


def _looked(bench: Workbench) -> int:
    """The rows that tell what was forgotten where a weight is chosen."""
    general = bench.general
    rows = bench.prepared.rows["validation"] if general is None else general.used
    return min(weight.LOOKED, len(rows))


def _seconds_a_row(bench: Workbench, pooling: str) -> float:
    rows = bench.prepared.rows["test"][:SAMPLE]
    built = bench.build(pooling, 0)
    built.model.to(bench.device)
    encoded = bench.encoded(rows)
    frozen_features(built.model, built.last_linear, encoded[:8], bench.inputs, bench.device)
    started = time.perf_counter()
    frozen_features(built.model, built.last_linear, encoded, bench.inputs, bench.device)
    return (time.perf_counter() - started) / len(rows)
