"""Refuse to go on with parts of a run that were made from other inputs, and say what changed.

A changed recipe key outside `measure` and `publish` that a finished part has read is refused; an
arm that `measure` defines anew runs again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from pydantic import JsonValue

from hftl.config.recipe import Arm, Recipe
from hftl.errors import RunFolderError
from hftl.pipeline.cache_keys import (
    build_adapt_key,
    build_arm_key,
    build_data_key,
    flatten_recipe,
    flatten_stages,
)
from hftl.runtime import run_folder
from hftl.runtime.run_folder import SEMANTICS, StageInputs, has_equal
from hftl.train.step_checkpoint import read_cache_keys

OLDER = "an older hftl, which trained otherwise"
MISFITS = {
    "semantics": OLDER,
    "weights": "another source model",
    "config": "another config.json of the source model",
    "preprocessing": "another tokenizer or image processor of the source model",
    "data": "other data",
    "general": "other general data",
    "corpus": "another corpus",
}
"""What a stage was made with, by the key of its inputs that differs; the first one is named."""
LAUNCH_MISFITS = {
    "processes": ("processes that share each step", "hold other numbers of rows"),
    "device": ("device", "be rounded otherwise"),
    "precision": ("precision", "be rounded otherwise"),
}
"""What the launch of a training was like, by the key of its checkpoints, and what follows."""


def is_stage_finished(run: Path, folder: Path, inputs: StageInputs) -> bool:
    """Return True if an arm or adaptation is finished and was made from these inputs.

    Raises:
        RunFolderError: if it was made from another source model, corpus or other data, or by a
            version that trained otherwise.
    """
    finished = run_folder.read_stage_inputs(folder)
    if finished is None or not has_equal(finished, inputs, "recipe"):
        return False
    _check_same_inputs(run, folder, finished, inputs)
    return True


def check_unfinished(run: Path, folder: Path, now: StageInputs) -> None:
    """Refuse to continue a training from checkpoints of other inputs, processes or hardware.

    Those of another recipe are refused by `refuse_changed`, or of no use where `measure` changed.

    Args:
        run: the run folder.
        folder: of the training's checkpoints.
        now: see `build_checkpoint_key`.

    Raises:
        RunFolderError: naming what was and what is.
    """
    for stored in read_cache_keys(folder):
        before = cast(StageInputs, stored)
        if not has_equal(before, now, "recipe"):
            continue
        _check_same_inputs(run, folder, before, now)
        for key, (what, follows) in LAUNCH_MISFITS.items():
            # Checkpoints of before these were stored hold none, and are dropped with a warning.
            if key in before and not has_equal(before, now, key):
                raise RunFolderError(
                    f"{run}: {what}: {before.get(key)} -> {now.get(key)}, for {folder.name}, which "
                    f"was stopped; its steps would {follows}",
                    "Launch it as before, choose another --output, or start over with --restart",
                )


def _check_same_inputs(run: Path, folder: Path, before: StageInputs, now: StageInputs) -> None:
    """Refuse a part of a run that was made from other inputs.

    Raises:
        RunFolderError: naming what was and what is.
    """
    for key, what in MISFITS.items():
        # Only an arm that could forget depends on general data, and only an adaptation on a corpus.
        is_read = key not in ("general", "corpus") or key in before or key in now
        if is_read and not has_equal(before, now, key):
            if key == "config":
                _check_same_quantization(run, before, now)
            change = f"{key}: {_shorten(before.get(key))} -> {_shorten(now.get(key))}"
            raise _build_misfit_error(run, folder, what, f" ({change})")


def _check_same_quantization(run: Path, before: StageInputs, now: StageInputs) -> None:
    """Refuse a part that was made from weights held otherwise, which the config's hash counts.

    Raises:
        RunFolderError: naming what was and what is.
    """
    old, new = before.get("quantization"), now.get("quantization")
    if old != new:
        raise _build_recipe_change_error(run, [f"source.quantization: {old} -> {new}"])


def _shorten(value: object) -> str:
    """Return the first digits of a hash."""
    return "none" if value is None else str(value)[:8]


def _build_misfit_error(run: Path, folder: Path, what: str, change: str = "") -> RunFolderError:
    return RunFolderError(
        f"{run} was made with {what}: {folder.name} does not fit{change}",
        "Put it back, choose another --output, or start over with --restart",
    )


def describe_changes(old: dict[str, JsonValue], new: dict[str, JsonValue]) -> list[str]:
    """Return `key: old -> new` for every key that differs."""
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key}: {_format_value(old, key)} -> {_format_value(new, key)}" for key in keys]


def refuse_changed(recipe: Recipe, run: Path, arms: Sequence[Arm]) -> None:
    """Compare the recipe with the one that the finished parts were made under.

    Raises:
        RunFolderError: naming each key that a finished part has read and that changed, or an arm
            that an older version trained.
    """
    changes: set[str] = set()
    for number in range(1, len(recipe.stages) + 1):
        folder = run / "phases" / f"adapt-{number}"
        inputs = _read_current_inputs(run, folder)
        if inputs is not None:
            changes |= set(
                describe_changes(
                    inputs.get("recipe", {}), build_adapt_key(recipe, recipe.stages, number)
                )
            )
        for stored in read_cache_keys(run / "checkpoints" / folder.name):
            now = build_adapt_key(recipe, recipe.stages, number)
            changes |= set(describe_changes(stored.get("recipe", {}), now))
    data = run_folder.read_stage_inputs(run / "phases" / "data")
    if data is not None:
        changes |= set(describe_changes(data.get("recipe", {}), build_data_key(recipe)))
    for arm in arms:
        for folder in sorted((run / "arms").glob(f"{arm.name}-seed[0-9]*")):
            if not folder.name.removeprefix(f"{arm.name}-seed").isdigit():
                # Of an arm whose own name goes on with -seed and a number.
                continue
            inputs = _read_current_inputs(run, folder)
            if inputs is not None:
                changes |= _describe_arm_changes(inputs, recipe, arm)
        for stored in _read_unfinished(run, arm):
            changes |= _describe_arm_changes(stored, recipe, arm)
    if changes:
        raise _build_recipe_change_error(run, sorted(changes))


def _build_recipe_change_error(run: Path, changes: Sequence[str]) -> RunFolderError:
    return RunFolderError(
        f"{run} was made with another recipe: {'; '.join(changes)}",
        "Put it back, choose another --output, or start over with --restart",
    )


def _read_unfinished(run: Path, arm: Arm) -> list[StageInputs]:
    """Return what the checkpoints of an arm's trainings depended on, for every seed.

    Raises:
        RunFolderError: if an older version wrote them.
    """
    start, unfinished = f"{arm.name}-seed", []
    folders = [
        folder for folder in sorted((run / "checkpoints").glob(f"{start}[0-9]*"))
        if folder.name.removeprefix(start).isdigit()
    ]  # fmt: skip
    if arm.spec.schedule == "rate_search":
        folders.append(run / "checkpoints" / "rates")
    for folder in folders:
        for stored in read_cache_keys(folder):
            if stored.get("semantics") != SEMANTICS:
                raise _build_misfit_error(run, folder, OLDER)
            unfinished.append(cast(StageInputs, stored))
    return unfinished


def _read_current_inputs(run: Path, folder: Path) -> StageInputs | None:
    """Return what an arm or adaptation depended on; None where it is absent.

    Raises:
        RunFolderError: if an older version trained it.
    """
    inputs = run_folder.read_stage_inputs(folder)
    if inputs is not None and inputs.get("semantics") != SEMANTICS:
        raise _build_misfit_error(run, folder, OLDER)
    return inputs


def _describe_arm_changes(inputs: StageInputs, recipe: Recipe, arm: Arm) -> set[str]:
    """Return the changes that a finished arm has read and that the recipe itself has made.

    Where the recipe says what it said then, `measure` has changed the arm, which runs again; so it
    does where adaptations were added after those that it had.
    """
    before, now = inputs.get("recipe", {}), build_arm_key(recipe, arm)
    if "data.max_length" not in before:
        now.pop("data.max_length", None)
    then, flat = inputs.get("asked", {}), flatten_recipe(recipe)
    adapted = {key: value for key, value in before.items() if key.startswith("adapt.")}
    old, new = sum(key.endswith(".objective") for key in adapted), len(arm.stages)
    is_extended = 0 < old < new and adapted == flatten_stages(arm.stages[:old])
    changes = set()
    for line in describe_changes(before, now):
        key = line.split(":", 1)[0]
        if key.startswith("measure.") or then.get(key) == flat.get(key):
            continue
        if not key.startswith("adapt.") or old == new:
            changes.add(line)
        elif not is_extended:
            changes.add(f"adapt: {old} -> {new} adaptations")
    return changes


def _format_value(values: dict[str, JsonValue], key: str) -> str:
    """Return a value; 5.0 as 5, since parts differ in whether they read a whole number as such."""
    value = values.get(key, "unset")
    return f"{value:.15g}" if isinstance(value, float) else str(value)
