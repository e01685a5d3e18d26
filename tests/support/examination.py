"""Fixtures of the doctor: a hub's cache of bases, sound adapters, and loads in this process."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.planted_defects import (
    BASES,
    SOUND,
    into_cache,
    rewrite,
    save,
    snapshot,
    wrapped,
)  # fmt: skip
from support.tiny import is_image, save_tiny, tiny_config, tiny_processor, tiny_tokenizer

from hftl.doctor import load_check, load_once, load_process
from hftl.doctor.examination import Examination


@pytest.fixture(scope="session")
def filled_cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """Return a hub's cache with the bases, as `tiny/<name>` at COMMIT."""
    cache = tmp_path_factory.mktemp("cache")
    for name, made_of in BASES.items():
        into_cache(cache, name, tiny_model(*made_of))
    deeper = tmp_path_factory.mktemp("deeper")
    from transformers import AutoModel

    for name, kind, more in (("bert-2", "bert", {"num_hidden_layers": 2}),
                             ("bert-4", "bert", {"num_hidden_layers": 4}),
                             ("vit-wide", "vit", {"hidden_size": 32})):  # fmt: skip
        AutoModel.from_config(tiny_config(kind, **more)).save_pretrained(deeper / name)
        if is_image(kind):
            tiny_processor(deeper / name, kind)
        else:
            tiny_tokenizer(deeper / name)
        into_cache(cache, name, deeper / name)
    for name in ("roberta", "vit"):
        into_cache(cache, f"{name}-bare", tiny_model(name))
        for file in ("tokenizer.json", "preprocessor_config.json"):
            (snapshot(cache, f"{name}-bare") / file).unlink(missing_ok=True)
    return cache


@pytest.fixture(scope="module")
def hub_cache(filled_cache: Path) -> Iterator[Path]:
    """Let the tests of a module use the filled cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(filled_cache))
        yield filled_cache


@pytest.fixture(scope="session")
def sound_adapters(filled_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the sound adapters, made with plain peft."""
    folder = tmp_path_factory.mktemp("sound")
    return {
        name: save(wrapped(snapshot(filled_cache, base), base, settings), folder / name)
        for name, (base, settings) in SOUND.items()
    }


@pytest.fixture
def adapters(hub_cache: Path, sound_adapters: dict[str, Path]) -> dict[str, Path]:
    """Return the sound adapters, and let a test use the cache of their bases."""
    return sound_adapters


@pytest.fixture
def loads_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load adapters in this process instead of two fresh ones, which take seconds each."""

    def load(clean: Path, base: Path, name: str, *_: object) -> list[np.ndarray]:
        seeds = load_check.SEEDS
        return [np.array(load_once.compute_output(clean, base, name, seed)) for seed in seeds]

    monkeypatch.setattr(load_check, "predict_in_fresh_process", load)
    monkeypatch.setattr(load_process, "LoadProcess", lambda: None)


def kinds(examination: Examination, defects: bool = True) -> set[str]:
    """Return the kinds of the defects, or of all findings."""
    return {one.kind for one in (examination.defects if defects else examination.findings)}


def copied(adapters: dict[str, Path], name: str, place: Path) -> Path:
    """Return a copy of an adapter."""
    return Path(shutil.copytree(adapters[name], place / "adapter"))


@pytest.fixture(scope="module")
def local_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a plain adapter on a local base."""
    place = tmp_path_factory.mktemp("adapter")
    base = save_tiny("bert", place / "base")
    lora = {"task_type": "SEQ_CLS", "target_modules": ["query"]}
    folder = save(wrapped(base, "bert", lora), place / "adapter")
    rewrite(folder / "adapter_config.json", base_model_name_or_path=str(base), revision=None)
    return folder
