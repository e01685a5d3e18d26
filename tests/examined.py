"""Fixtures of the doctor: a hub's cache of bases, sound adapters, and loads in this process."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from planting import (
    BASES,
    SOUND,
    into_cache,
    save,
    snapshot,
    wrapped,
)  # fmt: skip
from support.tiny import is_image, tiny_config, tiny_processor, tiny_tokenizer

from hftl.doctor import load_check, load_once
from hftl.doctor.adapter_folder import Examination

MADE: dict[str, Path] = {}
"""What is made once: pytest takes a fixture that several files import for several."""


@pytest.fixture(scope="module")
def hub(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A hub's cache with the bases, as `tiny/<name>` at COMMIT."""
    if "hub" not in MADE:
        MADE["hub"] = filled(tmp_path_factory, tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(MADE["hub"]))
        yield MADE["hub"]


def filled(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    for name, made_of in BASES.items():
        into_cache(cache, name, tiny_model(*made_of))
    deeper = tmp_path_factory.mktemp("deeper")
    from transformers import AutoModel

    for name, kind, more in (("bert-2", "bert", {"num_hidden_layers": 2}),
                             ("bert-4", "bert", {"num_hidden_layers": 4}),
                             ("vit-wide", "vit", {"hidden_size": 32})):  # fmt: skip
        AutoModel.from_config(tiny_config(kind, **more)).save_pretrained(deeper / name)
        (tiny_processor if is_image(kind) else tiny_tokenizer)(deeper / name)
        into_cache(cache, name, deeper / name)
    for name in ("roberta", "vit"):
        into_cache(cache, f"{name}-bare", tiny_model(name))
        for file in ("tokenizer.json", "preprocessor_config.json"):
            (snapshot(cache, f"{name}-bare") / file).unlink(missing_ok=True)
    return cache


@pytest.fixture(scope="module")
def adapters(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sound adapters made with plain peft."""
    if "sound" not in MADE:
        MADE["sound"] = tmp_path_factory.mktemp("sound")
        for name, (base, settings) in SOUND.items():
            save(wrapped(snapshot(hub, base), base, settings), MADE["sound"] / name)
    return {name: MADE["sound"] / name for name in SOUND}


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads here instead of in two fresh processes, which take seconds each."""
    if "fresh_processes" not in request.keywords:
        monkeypatch.setattr(load_check, "load_in_processes", here)


def here(clean: Path, base: Path, name: str) -> list[np.ndarray]:
    return [
        np.array(load_once.compute_output(clean, base, name, seed)) for seed in load_check.SEEDS
    ]


def kinds(found: Examination, defects: bool = True) -> set[str]:
    return {one.kind for one in (found.defects if defects else found.findings)}


def copied(adapters: dict[str, Path], name: str, place: Path) -> Path:
    return Path(shutil.copytree(adapters[name], place / "adapter"))
