"""Small adaptations of tiny models, and what each of them left."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from support.tiny import IMAGE_SIZE, save_tiny
from torch import Tensor, nn

from hftl.adapt.adaptation import AdaptationTask, adapt_encoder
from hftl.adapt.encoder_io import set_trainable
from hftl.adapt.guard import GuardRule
from hftl.adapt.mae import load_mae
from hftl.adapt.mlm import load_mlm
from hftl.config.adapt import Adapt
from hftl.config.data import Data
from hftl.config.section import Source
from hftl.data import masking
from hftl.data.image_inputs import ImageInputs, resize_processor
from hftl.data.masking import MaskedImageDataset
from hftl.data.masking import collate_masked_images as collate_pictures
from hftl.models.source import find_source, load_processor
from hftl.train.checkpoint import iterate_trainable

KINDS = {"mlm": "bert", "mae": "dinov2"}
"""By objective, the architecture that is adapted."""
ROWS, HELD_OUT = 22, 9
PATCH = 8
DECODER = {"width": 16, "depth": 1, "heads": 2}
MASKING = masking.MaskingSpec(0.3, False, 4, np.arange(40) < 5, np.arange(5, 40))
OPEN = GuardRule("probe", 1e6)
"""Measures a guard that holds always."""


@dataclass
class Blocks:
    """Blocks of tokens, some far more common than others, of differing lengths."""

    rows: int
    seed: int

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        draw = np.random.default_rng([self.seed, i])
        ids = 5 + np.minimum(draw.geometric(0.3, 8 + i % 5) - 1, 34)
        return ids, np.arange(len(ids))


def model_of(
    objective: str, folder: Path, method: str = "full", dropout: float = 0.0, lora: Any = None
) -> Any:
    """The objective of a tiny source that lies in the folder, or is made there; head untrained."""
    if not (folder / "config.json").exists():
        save_tiny(KINDS[objective], folder)
    source = find_source(Source(model=str(folder)))
    if objective == "mlm":
        model, _ = load_mlm(source, seed=0)
    else:
        model, _ = load_mae(source, IMAGE_SIZE, 0.5, DECODER, seed=0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    set_trainable(model, source.architecture_spec, method, 1, lora or {"r": 4, "lora_alpha": 8})
    return model


def task_of(objective: str, folder: Path, seed: int = 0, general: bool = False) -> AdaptationTask:
    """What it trains on."""
    if objective == "mlm":

        def blocks(rows: int, number: int, fixed: bool) -> Any:
            stored: Any = Blocks(rows, number)
            return masking.MaskedBlocks(stored, MASKING, seed, 0, fixed)

        return AdaptationTask(
            blocks(ROWS, 0, False),
            blocks(HELD_OUT, 1, True),
            blocks(5, 2, True) if general else None,
            lambda rows: masking.collate_masked_blocks(rows, 0),
        )
    processor = load_processor(find_source(Source(model=str(folder))))
    inputs = ImageInputs(Data.model_construct(), resize_processor(processor, IMAGE_SIZE), {}, PATCH)

    def pictures(rows: int, number: int, fixed: bool) -> MaskedImageDataset:
        draw = np.random.default_rng(number)
        found = draw.integers(120, 255, (rows, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.uint8)
        keys = [f"{number} {i}".encode() for i in range(rows)]
        return MaskedImageDataset(list(found), keys, PATCH, seed, fixed=fixed)

    return AdaptationTask(
        pictures(ROWS, 0, False), pictures(HELD_OUT, 1, True),
        pictures(5, 2, True) if general else None,
        lambda rows: collate_pictures(rows, inputs, 0.5, False),
    )  # fmt: skip


def stage_of(
    objective: str, method: str = "full", patience: int | None = None, **more: Any
) -> Adapt:
    """Three epochs of six steps; looked at every third step, saved every fourth."""
    training = {
        "num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "bf16": False, "save_steps": 4, "eval_steps": 3, "per_device_eval_batch_size": 4,
        **more,
    }  # fmt: skip
    return Adapt(objective=objective, method=method, patience=patience, training=training)  # pyright: ignore


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that trains."""
    return {name: tensor.clone() for name, tensor in iterate_trainable(model)}


def length_of(model: nn.Module) -> Callable[[], float]:
    """A guard that any change of the weights changes."""
    return lambda: (
        -float(sum(tensor.double().square().sum() for _, tensor in iterate_trainable(model)))
    )


def adapted(
    model: Any, task: AdaptationTask, stage: Adapt, folder: Path, rule: GuardRule = OPEN,
    measure: Callable[[], float] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # fmt: skip
    """What `adapt` told, and the weights it left."""
    told = adapt_encoder(model, task, stage, rule, measure or length_of(model), 3, "cpu", folder)
    return told, weights(model)
