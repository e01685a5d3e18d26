"""Which recipe keys a finished part of a run has read, and what follows when one changes.

A changed key outside `measure` and `publish` that a finished part has read is refused; an arm
that `measure` defines anew is run again.
"""

from pathlib import Path
from typing import Any

from hftl import rundir, yamlfile
from hftl.errors import RunFolderError
from hftl.recipe import Arm, Recipe

PATHS = ("path", "format", "split", "revision", "name")
"""Where a table lies is not what it says: data count by content."""
NOT_SPLIT = ("data.max_length", "data.image_size", "data.augment")
TRAINED = ("head_init", "patience", "training")


def data_reads(recipe: Recipe) -> dict[str, Any]:
    """What the data phase reads."""
    flat = yamlfile.flatten(recipe.tree()["data"], "data")
    return {
        key: value
        for key, value in flat.items()
        if key not in NOT_SPLIT and key.rsplit(".", 1)[-1] not in PATHS
    }


def arm_reads(recipe: Recipe, arm: Arm) -> dict[str, Any]:
    """What an arm reads besides the data: its own section, as far as its strategy uses it."""
    section = arm.finetune.model_dump(mode="json")
    used = {
        "head": ("pooling",),
        "partial": ("pooling", "blocks", *TRAINED),
        "lora": ("pooling", "lora", *TRAINED),
        "full": ("pooling", *TRAINED),
        "scratch": ("pooling", "training"),
    }.get(arm.strategy, ())
    if arm.name != arm.strategy:
        used = (*used, "strategy")
    reads = yamlfile.flatten({key: section[key] for key in used}, "finetune") if used else {}
    reads["data.shots"] = recipe.data.shots
    if used:
        reads["data.max_length"] = recipe.data.max_length
    # Texts know neither, and their runs say nothing of them.
    if recipe.data.image_size is not None and arm.strategy != "majority":
        reads["data.image_size"] = recipe.data.image_size
    if recipe.data.augment != "none" and "training" in used:
        reads["data.augment"] = recipe.data.augment
    if arm.strategy == "scratch":
        reads |= yamlfile.flatten(recipe.measure.scratch.model_dump(), "measure.scratch")
    return reads


def asked(recipe: Recipe, reads: dict[str, Any]) -> dict[str, Any]:
    """What the recipe itself says of the keys that an arm reads."""
    flat = yamlfile.flatten(recipe.tree())
    return {key: flat.get(key) for key in reads}


def changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for every key that differs."""
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key}: {_shown(old, key)} -> {_shown(new, key)}" for key in keys]


def refuse_changed(recipe: Recipe, run: Path, wanted: list[Arm]) -> None:
    """Compares the recipe with the one the finished parts were made under.

    Raises:
        RunFolderError: naming each key that a finished part has read and that changed.
    """
    now = yamlfile.flatten(recipe.tree())
    found: set[str] = set()
    data = rundir.reads(run / "phases" / "data")
    if data is not None:
        found |= set(changed(data["recipe"], data_reads(recipe)))
    for arm in wanted:
        for folder in sorted((run / "arms").glob(f"{arm.name}-seed[0-9]*")):
            read = rundir.reads(folder)
            if read is None:
                continue
            wanted_now = arm_reads(recipe, arm)
            if "data.max_length" not in read["recipe"]:
                wanted_now.pop("data.max_length", None)
            for line in changed(read["recipe"], wanted_now):
                key = line.split(":", 1)[0]
                # Where the recipe itself says what it said then, `measure` has changed the arm.
                if not key.startswith("measure.") and read["asked"].get(key) != now.get(key):
                    found.add(line)
    if found:
        raise RunFolderError(
            f"{run} was made with another recipe: {'; '.join(sorted(found))}",
            "Put it back, choose another --output, or start over with --restart",
        )


def _shown(values: dict[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "unset"
