"""Publish tiny models without training them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from support.tiny import is_image

from hftl.config.recipe import Recipe
from hftl.finetune.arm_files import collect_trained_tensors
from hftl.finetune.context import ExperimentContext
from hftl.finetune.trainable import prepare
from hftl.models.features import predict_logits
from hftl.models.heads import LoadedModel
from hftl.publish.export import (
    export_model,
    rebuild_model,
    select_sample_rows,
    write_reload_sample,
)

TOKENS = "token-classification"


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_data(model_type: str, task: str, folder: Path) -> dict[str, Any]:
    """Write texts, tagged words or images of two classes, and return a recipe's data section.

    Task "interpolated" is a classification of images of another size than the model's own.
    """
    from conftest import pictures, sentences

    if is_image(model_type):
        train: dict[str, Any] = {"path": str(pictures(folder / "pictures", 14))}
        if task in ("multi-label", "regression"):
            cell = {"multi-label": lambda n: ["a", "b"][: n % 3], "regression": float}[task]
            files = sorted((folder / "pictures").rglob("*.png"))
            rows = [{"image": str(file), "label": cell(n)} for n, file in enumerate(files)]
            train = {"path": str(write_jsonl(folder / "t.jsonl", rows))}
        size = 48 if task == "interpolated" else None
        task = "classification" if task == "interpolated" else task
        return {"task": task, "train": train, "image_size": size}
    if task == TOKENS:
        rows = [{"text": text.split(), "label": [w[:1] for w in text.split()]}
                for text, _ in sentences(60)]  # fmt: skip
    else:
        cell = {
            "multi-label": lambda label: [label], "regression": lambda label: float(label[0] == "p")
        }.get(task, str)  # fmt: skip
        rows = [{"text": text, "label": cell(label)} for text, label in sentences(60)]
    path = write_jsonl(folder / "t.jsonl", rows)
    return {"task": task, "train": {"path": str(path)}, "max_length": 16}


def open_context(
    model: Path, folder: Path, pooling: str, strategy: str, data: dict[str, Any] | None = None
) -> tuple[ExperimentContext, Recipe]:
    """Return the context and recipe of a tiny model; by default the data are classes of texts."""
    from conftest import bench_of

    folder.mkdir(exist_ok=True)
    blocks = 1 if "albert" in model.name else 2
    finetune = {"pooling": pooling, "strategy": strategy, "blocks": blocks, "head_init": "random"}
    tree = {
        "source": {"model": str(model)},
        "data": data or write_data("bert", "classification", folder),
        "finetune": finetune,
    }
    recipe = Recipe.parse(tree)
    return bench_of(recipe), recipe


def publish_model(context: ExperimentContext, recipe: Recipe, folder: Path) -> Path:
    """Move every trainable weight as training would, and publish the model.

    Returns:
        The sample of inputs and logits, beside the folder `publish`.
    """
    finetune = recipe.finetune
    built = context.build_model(finetune.pooling, seed=0)
    held = context.decide_batchnorm(finetune, 0).freeze_batchnorm
    model = prepare(
        built.model, finetune.strategy, finetune.blocks, finetune.lora, built.fresh,
        freeze_batchnorm=held,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    # The tiny encoders have small features; one layer alone must move far to be seen.
    scale = 30.0 if finetune.strategy == "head" else 0.3
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    trained = LoadedModel(model, built.architecture, finetune.pooling, built.fresh)
    rows = [context.prepared.rows["test"][i] for i in select_sample_rows(context)]
    encoded = context.encode_rows(rows)
    expected = predict_logits(model, encoded, context.inputs, "cpu", stock=True)
    if scale_logits(trained.last_linear, expected):
        expected = predict_logits(model, encoded, context.inputs, "cpu", stock=True)
    spread = np.ptp(expected, axis=0).max()
    assert spread > 1e-3, "the logits must differ for the comparison to mean anything"
    save_file(collect_trained_tensors(trained), folder / "weights.safetensors")
    rebuilt = rebuild_model(context, finetune, 0, folder / "weights.safetensors")
    (folder / "publish").mkdir()
    export_model(context, rebuilt, finetune, folder / "publish")
    return write_reload_sample(context, expected, folder)


def scale_logits(last: torch.nn.Linear, logits: np.ndarray) -> bool:
    """Change a last layer so that its largest logit is about 1: fp32 promises 1e-5 of such alone.

    Args:
        last: the layer; one with a bias is centred first where it is too large.
        logits: its outputs, (rows, outputs); rows that are not finite have none.

    Returns:
        Whether they were larger, or next to 0 as of a probe that found nothing, and the layer is
        another now.
    """
    finite = logits[np.isfinite(logits).all(1)]
    largest = float(np.abs(finite).max())
    if 0.01 <= largest <= 1:
        return False
    middle = np.zeros(finite.shape[1])
    if largest > 1 and last.bias is not None:
        middle = finite.mean(0)
        largest = max(1.0, float(np.abs(finite - middle).max()))
    with torch.no_grad():
        last.weight /= largest
        if last.bias is not None:
            last.bias.sub_(torch.from_numpy(middle)).div_(largest)
    return True
