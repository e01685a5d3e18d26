"""Stop a training of every family of models, and compare the end with one without a stop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import bench_of, pictures, sentences, write_csv
from support.tiny import CAUSAL_MODELS
from support.vision_language import save_vision_language_model
from test_pairs import save_pair
from test_resume import check_stopped_training
from test_text_families import FAMILIES as TEXT_FAMILIES
from test_vision import ENCODERS

from hftl.config.recipe import Recipe
from hftl.models.pairs import PAIRS
from hftl.models.vision_language_architectures import VISION_LANGUAGE

Tiny = Callable[..., Path]
pytestmark = pytest.mark.slow
TRAINING = {
    "learning_rate": 5e-3, "bf16": False, "per_device_train_batch_size": 8, "num_train_epochs": 3,
}  # fmt: skip
every_strategy = pytest.mark.parametrize("strategy", ["partial", "lora", "full"])


def stop_training(model: Path, data: Path, strategy: str, folder: Path, **finetune: Any) -> None:
    """Train on some twenty rows, with a stop after the third step of three epochs."""
    recipe = Recipe.parse({
        "source": {"model": str(model)}, "data": {"train": {"path": str(data)}},
        "finetune": {"strategy": strategy, "blocks": 1, "training": TRAINING} | finetune,
    })  # fmt: skip
    check_stopped_training(bench_of(recipe), recipe.finetune, folder)


@every_strategy
@pytest.mark.parametrize("name", [*ENCODERS, "siglip2"])
def test_images(name: str, strategy: str, tiny_model: Tiny, tmp_path: Path) -> None:
    """Running statistics of BatchNorm go on too."""
    data = pictures(tmp_path / "pictures", 16)
    stop_training(tiny_model(name), data, strategy, tmp_path, freeze_batchnorm=False)


@every_strategy
@pytest.mark.parametrize("name", ["dinov3_vit", "dinov3_convnext"])
def test_images_under_a_head_of_their_own(
    name: str, strategy: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    data = pictures(tmp_path / "pictures", 16)
    stop_training(tiny_model(name), data, strategy, tmp_path, pooling="cls+mean")


@every_strategy
@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str, strategy: str, tmp_path: Path) -> None:
    (tmp_path / "pair").mkdir()
    pair, data = save_pair(name, tmp_path / "pair"), pictures(tmp_path / "pictures", 16)
    stop_training(pair, data, strategy, tmp_path, pooling="embedding", head_init="zero_shot")


@every_strategy
@pytest.mark.parametrize("name", [*CAUSAL_MODELS, *TEXT_FAMILIES])
def test_texts(name: str, strategy: str, tiny_model: Tiny, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "reviews.csv", ["text", "label"], sentences(32))
    stop_training(tiny_model(name), data, strategy, tmp_path)


@pytest.mark.parametrize("strategy", ["partial", "lora"])
@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_pictures_in_a_prompt(name: str, strategy: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model = save_vision_language_model(name, tmp_path / "model", name != "idefics2")
    data = pictures(tmp_path / "pictures", 16)
    stop_training(model, data, strategy, tmp_path, pooling="last")
