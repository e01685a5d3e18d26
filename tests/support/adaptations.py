"""Adapt tiny models, and return the facts and the weights of each adaptation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from support.tiny import IMAGE_SIZE, save_tiny
from torch import Tensor, nn

from hftl.adapt.adaptation import AdaptationData, adapt_encoder
from hftl.adapt.encoder_io import set_trainable
from hftl.adapt.guard import GuardRule
from hftl.adapt.language_model import load_mlm
from hftl.adapt.mae import load_mae
from hftl.config.adapt import Adapt
from hftl.config.data import Data
from hftl.config.section import Source
from hftl.data import masking
from hftl.data.image_inputs import ImageInputs
from hftl.data.image_processing import resize_processor
from hftl.data.masking import MaskedImageDataset, collate_masked_images
from hftl.models.source import find_source, load_image_processor
from hftl.train.checkpoint import iterate_trainable
from hftl.train.step_checkpoint import CheckpointSpec

ARCHITECTURES = {"mlm": "bert", "mae": "dinov2"}
"""The architecture that is adapted, by objective."""
ROWS, HELD_OUT, GENERAL = 22, 9, 5
PATCH = 8
DECODER = {"width": 16, "depth": 1, "heads": 2}
MASKING = masking.MaskingSpec(0.3, False, 4, np.arange(40) < 5, np.arange(5, 40))
OPEN_GUARD = GuardRule("probe", 1e6)
"""A guard that is measured and allows everything."""
Outcome = tuple[dict[str, Any], dict[str, Tensor]]


class Blocks:
    """Hold blocks of tokens of differing lengths, some tokens far more common than others."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        draw = np.random.default_rng([self.seed, i])
        ids = 5 + np.minimum(draw.geometric(0.3, 8 + i % 5) - 1, 34)
        return ids, np.arange(len(ids))


def load_objective(
    objective: str, folder: Path, method: str = "full", dropout: float = 0.0, lora: Any = None
) -> Any:
    """Return the objective's model of a tiny source; a source that is missing is made."""
    if not (folder / "config.json").exists():
        save_tiny(ARCHITECTURES[objective], folder)
    source = find_source(Source(model=str(folder)))
    model: Any = load_cold(objective, folder)[0]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    set_trainable(model, source.architecture_spec, method, 1, lora or {"r": 4, "lora_alpha": 8})
    return model


def load_cold(objective: str, folder: Path) -> tuple[Any, tuple[str, ...]]:
    """Return the objective's model as loaded, and the names of its new weights."""
    source = find_source(Source(model=str(folder)))
    if objective == "mlm":
        return load_mlm(source, seed=0)
    return load_mae(source, IMAGE_SIZE, 0.5, DECODER, seed=0)


def build_task(objective: str, folder: Path, general: bool = False) -> AdaptationData:
    """Return the data of an adaptation: `ROWS` to train on, `HELD_OUT`, and general rows."""
    sides = [(ROWS, 0, False), (HELD_OUT, 1, True), (GENERAL, 2, True)]
    if objective == "mlm":
        parts: list[Any] = [
            masking.MaskedBlocks(Blocks(rows, seed), MASKING, 0, 0, fixed)  # pyright: ignore
            for rows, seed, fixed in sides
        ]
        return AdaptationData(
            parts[0], parts[1], parts[2] if general else None,
            lambda rows: masking.collate_masked_blocks(rows, 0),
        )  # fmt: skip
    processor = load_image_processor(find_source(Source(model=str(folder))))
    inputs = ImageInputs(Data.model_construct(), resize_processor(processor, IMAGE_SIZE), {}, PATCH)
    parts = []
    for rows, seed, fixed in sides:
        size = (rows, 3, IMAGE_SIZE, IMAGE_SIZE)
        pixels = np.random.default_rng(seed).integers(120, 255, size).astype(np.uint8)
        keys = [f"{seed} {i}".encode() for i in range(rows)]
        parts.append(MaskedImageDataset(list(pixels), keys, PATCH, 0, fixed=fixed))
    return AdaptationData(
        parts[0], parts[1], parts[2] if general else None,
        lambda rows: collate_masked_images(rows, inputs, 0.5, False),
    )  # fmt: skip


def build_stage(
    objective: str, method: str = "full", patience: int | None = None, **more: Any
) -> Adapt:
    """Return a stage of three epochs of six steps, evaluated every third and saved every fourth."""
    training = {
        "num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "bf16": False, "save_steps": 4, "eval_steps": 3, "per_device_eval_batch_size": 4,
        **more,
    }  # fmt: skip
    return Adapt(objective=objective, method=method, patience=patience, training=training)  # pyright: ignore


def copy_trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all that trains."""
    return {name: tensor.clone() for name, tensor in iterate_trainable(model)}


def measure_length(model: nn.Module) -> Callable[[], float]:
    """Return a guard that any change of the weights changes: minus their squared length."""
    return lambda: (
        -float(sum(tensor.double().square().sum() for _, tensor in iterate_trainable(model)))
    )


def adapt(
    model: Any, task: AdaptationData, stage: Adapt, folder: Path, rule: GuardRule = OPEN_GUARD,
    measure: Callable[[], float] | None = None,
) -> Outcome:  # fmt: skip
    """Return the facts of an adaptation, and the weights that it left."""
    measure = measure or measure_length(model)
    checkpoints = CheckpointSpec(folder, {"of": "a test"})
    facts = adapt_encoder(model, task, stage, rule, measure, 3, "cpu", checkpoints)
    return facts, copy_trainable(model)
