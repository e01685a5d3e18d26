"""Which recipe keys a finished part of a run has read, and what follows when one changes.

A changed key outside `measure` and `publish` that a finished part has read is refused; an arm
that `measure` defines anew is run again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hftl.config import overrides
from hftl.config.adapt import Adapt
from hftl.config.recipe import Arm, Recipe
from hftl.config.retain import Retain
from hftl.errors import RunFolderError
from hftl.runtime import run_folder

SEMANTICS = 2
"""Raised when the same recipe and data train, draw or choose otherwise than before, so that arms
of both are never averaged: 2 standardises targets, draws them by their inputs alone, keeps the
least error and pads on the right."""

PATHS = ("path", "format", "split", "revision", "name")
"""Where a table lies is not what it says: data count by content."""
NOT_SPLIT = ("data.max_length", "data.image_size", "data.augment")
CORPORA = ("data.unlabeled", "data.general")
"""What adaptation reads; the data phase does not."""
TRAINED = ("head_init", "patience", "training")
COMPARED = ("partial", "gradual", "lora", "full")
"""The strategies whose encoder is compared with the source's, on general data where there are."""


def build_data_key(recipe: Recipe) -> dict[str, Any]:
    """What the data phase reads."""
    flat = overrides.flatten(recipe.to_dict()["data"], "data")
    return {
        key: value
        for key, value in flat.items()
        if key not in NOT_SPLIT
        and key.rsplit(".", 1)[-1] not in PATHS
        and not key.startswith(CORPORA)
    }


def build_arm_key(recipe: Recipe, arm: Arm) -> dict[str, Any]:
    """What an arm reads besides the data: its own section, as far as its strategy uses it."""
    section = arm.finetune.model_dump(mode="json")
    used = {
        "head": ("pooling",),
        "partial": ("pooling", "blocks", *TRAINED),
        "lora": ("pooling", "lora", *TRAINED),
        "gradual": ("pooling", "gradual", *TRAINED),
        "full": ("pooling", *TRAINED),
        "scratch": ("pooling", "training"),
    }.get(arm.strategy, ())
    if arm.name != arm.strategy:
        used = (*used, "strategy")
    if "patience" in used:
        used = (*used, *(key for key in ("layer_decay", "lr") if section[key] is not None))
    reads = overrides.flatten({key: section[key] for key in used}, "finetune") if used else {}
    if arm.strategy == "gradual":
        # Each phase has its own number of epochs.
        reads.pop("finetune.training.num_train_epochs", None)
    reads |= flatten_stages(arm.stages)
    if arm.retain is not None:
        reads |= flatten_retain(arm.retain)
    reads["data.shots"] = recipe.data.shots
    if used:
        reads["data.max_length"] = recipe.data.max_length
    # Texts know neither, and their runs say nothing of them.
    if recipe.data.image_size is not None and arm.strategy != "majority":
        reads["data.image_size"] = recipe.data.image_size
    if recipe.data.augment != "none" and "training" in used:
        reads["data.augment"] = recipe.data.augment
    if arm.strategy in COMPARED or (arm.strategy == "head" and arm.stages):
        reads |= build_general_key(recipe)
    if arm.strategy == "scratch":
        reads |= overrides.flatten(recipe.measure.scratch.model_dump(), "measure.scratch")
    return reads


def build_general_key(recipe: Recipe) -> dict[str, Any]:
    """What is read of general data to measure forgetting; content counts for itself."""
    if recipe.data.general is None:
        return {}
    flat = overrides.flatten(recipe.data.general.model_dump(mode="json"), "data.general")
    return {key: value for key, value in flat.items() if key.rsplit(".", 1)[-1] not in PATHS}


def build_adapt_key(recipe: Recipe, stages: Sequence[Adapt], number: int) -> dict[str, Any]:
    """What the adaptation of this number, counted from 1, reads: those before it and itself."""
    flat = _flatten_recipe(recipe)
    data = ("data.max_length", "data.image_size", "data.augment", "data.seed", "finetune.pooling",
            "data.shots")  # fmt: skip
    return flatten_stages(stages[:number]) | {key: flat[key] for key in data}


def select_recipe_values(recipe: Recipe, reads: dict[str, Any]) -> dict[str, Any]:
    """What the recipe itself says of the keys that an arm reads."""
    flat = _flatten_recipe(recipe)
    return {key: flat.get(key) for key in reads}


def flatten_stages(stages: Sequence[Adapt]) -> dict[str, Any]:
    """The adaptations as `adapt.key`, or `adapt.0.key` where there are several."""
    dumped = [stage.model_dump(mode="json") for stage in stages]
    if not dumped:
        return {}
    if len(dumped) == 1:
        return overrides.flatten(dumped[0], "adapt")
    return overrides.flatten({str(i): stage for i, stage in enumerate(dumped)}, "adapt")


def flatten_retain(retain: Retain) -> dict[str, Any]:
    """What keeps an arm near the original as `retain.key`, or `retain.kl.0.key` of several."""
    tree = {
        key: dict(enumerate(value)) if isinstance(value, list) and key == "kl" else value
        for key, value in retain.model_dump(mode="json").items()
        if value is not None
    }
    if retain.replay is not None and not retain.replay.labelled:
        # Without labels there is no loss to weigh.
        tree["replay"] = {"ratio": retain.replay.ratio}
    return overrides.flatten(tree, "retain")


def describe_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for every key that differs."""
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key}: {_format_value(old, key)} -> {_format_value(new, key)}" for key in keys]


def refuse_changed(recipe: Recipe, run: Path, wanted: list[Arm]) -> None:
    """Compares the recipe with the one the finished parts were made under.

    Raises:
        RunFolderError: naming each key that a finished part has read and that changed.
    """
    found: set[str] = set()
    for number in range(1, len(recipe.stages) + 1):
        read = run_folder.read_stage_inputs(run / "phases" / f"adapt-{number}")
        if read is not None:
            found |= set(
                describe_changes(read["recipe"], build_adapt_key(recipe, recipe.stages, number))
            )
    data = run_folder.read_stage_inputs(run / "phases" / "data")
    if data is not None:
        found |= set(describe_changes(data["recipe"], build_data_key(recipe)))
    for arm in wanted:
        for folder in sorted((run / "arms").glob(f"{arm.name}-seed[0-9]*")):
            read = run_folder.read_stage_inputs(folder)
            if read is not None:
                found |= _describe_arm_changes(read, recipe, arm)
    if found:
        raise RunFolderError(
            f"{run} was made with another recipe: {'; '.join(sorted(found))}",
            "Put it back, choose another --output, or start over with --restart",
        )


def _describe_arm_changes(read: dict[str, Any], recipe: Recipe, arm: Arm) -> set[str]:
    """What a finished arm has read and the recipe now says otherwise.

    Adaptations that were added after those it had are none of it: the arm is run again.
    """
    now, wanted, then = _flatten_recipe(recipe), build_arm_key(recipe, arm), read["recipe"]
    if "data.max_length" not in then:
        wanted.pop("data.max_length", None)
    adapted = {key: value for key, value in then.items() if key.startswith("adapt.")}
    before, after = sum(key.endswith(".objective") for key in adapted), len(arm.stages)
    added = 0 < before < after and adapted == flatten_stages(arm.stages[:before])
    found = set()
    for line in describe_changes(then, wanted):
        key = line.split(":", 1)[0]
        # Where the recipe itself says what it said then, `measure` has changed the arm.
        if key.startswith("measure.") or read["asked"].get(key) == now.get(key):
            continue
        if not key.startswith("adapt.") or before == after:
            found.add(line)
        elif not added:
            found.add(f"adapt: {before} -> {after} adaptations")
    return found


def _flatten_recipe(recipe: Recipe) -> dict[str, Any]:
    tree = recipe.to_dict()
    tree.pop("adapt")
    tree.pop("retain")
    kept = {} if recipe.retain is None else flatten_retain(recipe.retain)
    return overrides.flatten(tree) | flatten_stages(recipe.stages) | kept


def _format_value(values: dict[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "unset"
