"""Several published models one after another, every base loaded once."""

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from hftl.use.base import base_folder
from hftl.use.locate import read_json
from hftl.use.notes import Notes
from hftl.use.predict import Predictor, with_model
from hftl.use.strict_load import BaseToFill, add_adapter, add_head, load_base

PLAIN_STARTS = (True, False, "gaussian")
"""Values of init_lora_weights that leave the base's own weights alone."""


def each(folders: Sequence[Path]) -> Iterator[tuple[int, Predictor]]:
    """Every model in turn, ready to predict until the next is asked for.

    Adapters of one base are put on it together and switched; where two cannot share a model, as
    when they save other modules, the second takes a copy in memory.

    Raises:
        RunFolderError: if one of them does not load.
    """
    waiting = list(range(len(folders)))
    bases = [_base(folder) for folder in folders]
    while waiting:
        key = _same_model(folders[waiting[0]], bases[waiting[0]])
        together = [n for n in waiting if _same_model(folders[n], bases[n]) == key]
        waiting = [n for n in waiting if n not in together]
        base = load_base(folders[together[0]], bases[together[0]])
        groups: dict[str, list[int]] = {}
        for number in together:
            groups.setdefault(_same_places(folders[number], number), []).append(number)
        for left, group in zip(range(len(groups) - 1, -1, -1), groups.values(), strict=True):
            model = deepcopy(base.model) if left else base.model
            yield from _switched(base, model, folders, group)


def _switched(
    base: BaseToFill, model: Any, folders: Sequence[Path], group: list[int]
) -> Iterator[tuple[int, Predictor]]:
    """The adapters of one model, one after another; a whole model by itself."""
    for number in group:
        folder = folders[number]
        if not base.whole:
            model = add_adapter(base, model, folder, f"model-{number}")
        yield number, with_model(folder, add_head(folder, model))


def _base(folder: Path) -> Path:
    if not (folder / "adapter_config.json").exists():
        return folder
    return base_folder(folder, Notes.read(folder), None).resolve()


def _same_model(folder: Path, base: Path) -> tuple[Any, ...]:
    """Equal for folders whose adapters go on the same model: base, class and outputs."""
    config = read_json(folder / "config.json")
    pooled = (folder / "head.safetensors").exists()
    labels = None if pooled else len(config.get("id2label") or {})
    return base, pooled, None if pooled else (config.get("architectures") or [None])[0], labels


def _same_places(folder: Path, number: int) -> str:
    """Equal for adapters that may stand in one model side by side."""
    settings = read_json(folder / "adapter_config.json")
    alone = settings.get("bias", "none") != "none"
    alone = alone or settings.get("init_lora_weights", True) not in PLAIN_STARTS
    kept = ("peft_type", "task_type", "trainable_token_indices")
    told = {key: settings.get(key) for key in kept}
    told["modules_to_save"] = sorted(settings.get("modules_to_save") or [])
    return json.dumps(told | {"alone": number if alone else None}, sort_keys=True)
