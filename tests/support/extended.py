"""Use what the patches of tests/patches add to hftl, and print what came of each as JSON.

    python tests/support/extended.py FOLDER ADDRESS    # with PYTHONPATH on a patched copy of hftl

FOLDER holds the table reviews.csv, ADDRESS is that of `fresh_process.py`. Everything goes through a
recipe and the command line, or what a user imports; the one run has the new architecture, metric,
regularizer and strategy.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from fresh_process import FreshProcess
from tiny import FIELDS, TEXT, save_tiny
from typer.testing import CliRunner

import hftl
from hftl.cli import app
from hftl.config.recipe import Recipe
from hftl.finetune.strategies import STRATEGIES
from hftl.pipeline.retention import build_regularizers
from hftl.retain.regularizer import Step


def write_recipe(folder: Path) -> Path:
    """Write a recipe of a tiny source and everything new."""
    FIELDS["layoutlm"] = TEXT
    training = {"num_train_epochs": 1, "learning_rate": 5e-3, "bf16": False}
    tree = {
        "source": {"model": str(save_tiny("layoutlm", folder / "layoutlm"))},
        "data": {"train": {"path": str(folder / "reviews.csv")}, "max_length": 16},
        "finetune": {"strategy": "bias", "biases": "attention", "training": training},
        "retain": {"norm": {"weight": 0.5}},
        "measure": {"metric": "kappa", "seeds": [0], "arms": ["full", "head"]},
    }
    path = folder / "reviews.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def invoke(*words: str | Path) -> tuple[int, str]:
    """Return the exit code and the output of a command."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    return result.exit_code, result.output


def use_regularizer(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Return the term that a batch adds to the loss, and the same by hand."""
    from transformers import AutoModelForSequenceClassification

    place = recipe.source.model
    model: Any = hftl.prepare(AutoModelForSequenceClassification.from_pretrained(place), "full")
    (term,) = build_regularizers(recipe.retain, None)  # pyright: ignore
    term.record_start(model)  # pyright: ignore
    counts = torch.ones(2, dtype=torch.bool)
    loss = term.loss(Step(model, {}, None, counts, torch.tensor(4), 0.0, 0))
    encoder = [p for p in model.layoutlm.parameters() if p.requires_grad]
    norm = sum(float(p.detach().square().sum()) for p in encoder)
    return {"class": type(term).__name__, "loss": loss.item(), "norm": norm}


def use_strategy(recipe: Recipe) -> list[str]:
    """Return the names of what trains under the keys of the recipe, in a user's own script."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(recipe.source.model)
    model = hftl.prepare(model, "bias", fresh=[], biases=recipe.finetune.biases)  # pyright: ignore
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def damage_folder(folder: Path) -> Path:
    """Write an adapter's folder whose download was interrupted."""
    damaged = folder / "damaged"
    damaged.mkdir()
    (damaged / "adapter_config.json").write_text("{}", encoding="utf-8")
    (damaged / "adapter_model.safetensors.incomplete").touch()
    return damaged


def main(folder: Path) -> None:
    """Use every extension."""
    path = write_recipe(folder)
    recipe = Recipe.load(path)
    results: dict[str, Any] = {
        "package": hftl.__file__,
        "check": invoke("check", path),
        "measure": invoke("measure", path, "measure.arms=[head]", "--output", folder / "run"),
        "doctor": invoke("doctor", damage_folder(folder)),
        "spread": invoke("spread", path, "finetune.pooling=mean"),
        "plan_help": invoke("plan", "--help"),
        "plan": invoke("plan", path),
        "regularizer": use_regularizer(recipe, folder),
        "strategies": list(STRATEGIES),
        "trained": use_strategy(recipe),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    with FreshProcess(sys.argv[2]).in_use():
        main(Path(sys.argv[1]))
