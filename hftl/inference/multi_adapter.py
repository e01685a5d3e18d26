"""Load several models for one comparison, adapters of one base together."""

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from hftl.config.upstream_args import BASE_PRESERVING_INITS
from hftl.inference.find_model import find_adapter_base
from hftl.inference.load import (
    add_adapter,
    add_head,
    load_incomplete_base,
    overwrites_base_tensors,
    read_model_config,
)
from hftl.inference.load_predictor import build_predictor
from hftl.inference.predict import Predictor
from hftl.publish.settings_files import HEAD_WEIGHTS, THRESHOLDS_KEY, AdapterConfig


def iterate_predictors(
    folders: Sequence[Path], base: str | None = None
) -> Iterator[tuple[int, Predictor]]:
    """Yield the number and predictor of each model, usable until the next is taken.

    Every base is loaded once: its adapters are put on it together and switched. Where two cannot
    share a model, as when they save other modules, the second gets a copy in memory.

    Args:
        folders: of adapters and whole models.
        base: of every adapter, where it is not the one each names.

    Raises:
        RunFolderError: if one of them does not load.
    """
    remaining = list(range(len(folders)))
    bases = [find_adapter_base(folder, base) for folder in folders]
    configs = [read_model_config(*pair) for pair in zip(folders, bases, strict=True)]
    keys = [_build_model_key(*one) for one in zip(folders, bases, configs, strict=True)]
    while remaining:
        together = [n for n in remaining if keys[n] == keys[remaining[0]]]
        remaining = [n for n in remaining if n not in together]
        number = together[0]
        loaded = load_incomplete_base(
            folders[number], bases[number] or folders[number], configs[number]
        )
        groups: dict[str, list[int]] = {}
        for number in together:
            groups.setdefault(_build_adapter_key(folders[number], number), []).append(number)
        for left, group in zip(range(len(groups) - 1, -1, -1), groups.values(), strict=True):
            model = deepcopy(loaded.model) if left else loaded.model
            for number in group:
                folder = folders[number]
                if not loaded.is_whole_model:
                    model = add_adapter(loaded, model, folder, f"model-{number}")
                headed = add_head(folder, model)
                yield number, build_predictor(folder, bases[number], configs[number], headed)


def _build_model_key(folder: Path, base: Path | None, config: Any) -> tuple[Any, ...]:
    """Return what is equal for adapters of the same model: base, class, outputs and sizes."""
    has_own_head = (folder / HEAD_WEIGHTS).exists()
    if base is None or has_own_head:
        return base or folder, has_own_head
    names = (
        "id2label", "label2id", "label_names", "problem_type", "transformers_version", "dtype",
        THRESHOLDS_KEY,
    )  # fmt: skip
    sizes = {k: v for k, v in config.to_dict().items() if k not in names and k[0] != "_"}
    return base, has_own_head, config.num_labels, json.dumps(sizes, sort_keys=True, default=str)


def _build_adapter_key(folder: Path, number: int) -> str:
    """Return what is equal for adapters that one model can hold side by side."""
    adapter = AdapterConfig.read(folder)
    settings = adapter.settings
    alone = (
        settings.get("bias", "none") != "none"
        or settings.get("init_lora_weights", True) not in BASE_PRESERVING_INITS
        or bool(settings and overwrites_base_tensors(folder))
    )
    shared = ("peft_type", "task_type", "trainable_token_indices")
    key: dict[str, object] = {name: settings.get(name) for name in shared}
    key["modules_to_save"] = sorted(adapter.modules_to_save)
    return json.dumps(key | {"alone": number if alone else None}, sort_keys=True)
