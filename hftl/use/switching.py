"""Several published models one after another, every base loaded once."""

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from hftl.use.base import base_folder
from hftl.use.locate import read_json
from hftl.use.model_config import read_config
from hftl.use.notes import Notes
from hftl.use.predict import Predictor, with_model
from hftl.use.strict_load import add_adapter, add_head, brings_own_tensors, load_base

PLAIN_STARTS = (True, False, "gaussian")
"""Values of init_lora_weights that leave the base's own weights alone."""


def each(folders: Sequence[Path], base: str | None = None) -> Iterator[tuple[int, Predictor]]:
    """Every model in turn, ready to predict until the next is asked for.

    Adapters of one base are put on it together and switched; where two cannot share a model, as
    when they save other modules, the second takes a copy in memory.

    Args:
        folders: of adapters and whole models.
        base: of every adapter, where it is not the one each names.

    Raises:
        RunFolderError: if one of them does not load.
    """
    waiting = list(range(len(folders)))
    bases = [_base(folder, base) for folder in folders]
    configs = [read_config(*pair) for pair in zip(folders, bases, strict=True)]
    keys = [_same_model(*one) for one in zip(folders, bases, configs, strict=True)]
    while waiting:
        together = [n for n in waiting if keys[n] == keys[waiting[0]]]
        waiting = [n for n in waiting if n not in together]
        number = together[0]
        loaded = load_base(folders[number], bases[number] or folders[number], configs[number])
        groups: dict[str, list[int]] = {}
        for number in together:
            groups.setdefault(_same_places(folders[number], number), []).append(number)
        for left, group in zip(range(len(groups) - 1, -1, -1), groups.values(), strict=True):
            model = deepcopy(loaded.model) if left else loaded.model
            for number in group:
                folder = folders[number]
                if not loaded.whole:
                    model = add_adapter(loaded, model, folder, f"model-{number}")
                headed = add_head(folder, model)
                yield number, with_model(folder, bases[number], configs[number], headed)


def _base(folder: Path, base: str | None) -> Path | None:
    if not (folder / "adapter_config.json").exists():
        return None
    return base_folder(folder, Notes.read(folder), base).resolve()


def _same_model(folder: Path, base: Path | None, config: Any) -> tuple[Any, ...]:
    """Equal for folders whose adapters go on the same model: base, class, outputs and sizes."""
    pooled = (folder / "head.safetensors").exists()
    if base is None or pooled:
        return base or folder, pooled
    names = ("id2label", "label2id", "problem_type", "transformers_version", "dtype")
    sizes = {k: v for k, v in config.to_dict().items() if k not in names and k[0] != "_"}
    return base, pooled, config.num_labels, json.dumps(sizes, sort_keys=True, default=str)


def _same_places(folder: Path, number: int) -> str:
    """Equal for adapters that may stand in one model side by side."""
    settings = read_json(folder / "adapter_config.json")
    alone = settings.get("bias", "none") != "none"
    alone = alone or bool(settings and brings_own_tensors(folder))
    alone = alone or settings.get("init_lora_weights", True) not in PLAIN_STARTS
    kept = ("peft_type", "task_type", "trainable_token_indices")
    told = {key: settings.get(key) for key in kept}
    told["modules_to_save"] = sorted(settings.get("modules_to_save") or [])
    return json.dumps(told | {"alone": number if alone else None}, sort_keys=True)
