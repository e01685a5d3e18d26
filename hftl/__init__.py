"""hftl: transfer learning for pretrained models, with the evidence of what it was worth.

recipe -> data -> source model -> check -> adapt -> probe -> arms x seeds -> measure -> card
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hftl.config.recipe import Recipe
    from hftl.errors import HftlError
    from hftl.finetune.trainable import prepare
    from hftl.inference.load_predictor import load
    from hftl.measure.record import Record
    from hftl.pipeline.pipeline import run
    from hftl.retain.fisher import EWC
    from hftl.retain.kl import KLToOriginal
    from hftl.retain.weights import L2SP
    from hftl.train.trainer import TransferTrainer

__version__ = "0.1.0"

__all__ = [
    "EWC",
    "L2SP",
    "HftlError",
    "KLToOriginal",
    "Recipe",
    "Record",
    "TransferTrainer",
    "load",
    "prepare",
    "run",
]  # fmt: skip

HOMES = {
    "EWC": "hftl.retain.fisher",
    "HftlError": "hftl.errors",
    "KLToOriginal": "hftl.retain.kl",
    "L2SP": "hftl.retain.weights",
    "Recipe": "hftl.config.recipe",
    "Record": "hftl.measure.record",
    "TransferTrainer": "hftl.train.trainer",
    "load": "hftl.inference.load_predictor",
    "prepare": "hftl.finetune.trainable",
    "run": "hftl.pipeline.pipeline",
}


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds, and `hftl --help` needs none of it.
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module 'hftl' has no attribute {name!r}")
