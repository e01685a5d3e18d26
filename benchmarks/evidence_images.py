"""Make sources out of the image encoders, and the tables of pictures that they are compared on."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from evidence_zoo import (
    add_noise,
    cut_layers,
    digest,
    draw_weights,
    save_source,
    shuffle_weights,
    train_sibling,
)
from image_probe import MAX_PIXELS, flatten_on_white
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file

IMAGE_TARGETS = ("clipart", "garments")
SIDE = 160
"""Pixels of the longest edge of stored clip art."""
PER_CLASS = {"clipart": 80, "garments": 48}
Picture = dict[str, Any]
"""A row: image as `datasets.Image` stores it, label, document."""


def write_image_tables(assets: Path, work: Path) -> None:
    """Write what targets and siblings read: they share no document."""
    for name, read in (("clipart", read_clipart), ("garments", read_garments)):
        rows = read(assets)
        _write_pictures(work / "targets" / f"{name}.parquet", _draw_pictures(rows, name, True))
        own = _draw_pictures(rows, name, False)
        _write_pictures(work / "siblings" / f"{name}.parquet", own)
    labels = np.random.default_rng(0).permutation([row["label"] for row in own])
    shuffled = [{**row, "label": str(label)} for row, label in zip(own, labels, strict=True)]
    _write_pictures(work / "siblings" / "shuffled-garments.parquet", shuffled)


def read_clipart(assets: Path) -> list[Picture]:
    """Return small copies of all pictures but bombs, none twice; numbered ones are one document."""
    Image.MAX_IMAGE_PIXELS = None  # The size is read before the pixels.
    rows: dict[bytes, Picture] = {}
    for path in sorted((assets / "clipart").glob("*/**/*.png")):
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                continue
            small = flatten_on_white(picture)
        small.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        small.save(file, "png")
        place = path.relative_to(assets / "clipart")
        document = f"{place.parent}/{re.sub('[0-9].*', '', place.stem)}"
        rows[file.getvalue()] = _make_picture(file.getvalue(), place.parts[0], document)
    return list(rows.values())


def read_garments(assets: Path) -> list[Picture]:
    """Return the training rows, each a document."""
    table = parquet.read_table(assets / "fashion" / "train.parquet").slice(0, 6000)
    return [
        _make_picture(row["image"]["bytes"], row["label"], str(number))
        for number, row in enumerate(table.to_pylist())
    ]


def _make_picture(content: bytes, label: str, document: str) -> Picture:
    path = f"{hashlib.sha256(content).hexdigest()[:16]}.png"
    return {"image": {"bytes": content, "path": path}, "label": label, "document": document}


def _draw_pictures(rows: list[Picture], name: str, is_target: bool) -> list[Picture]:
    """Return as many pictures a class of three quarters of the documents, or of the others."""
    chosen: dict[str, list[Picture]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: digest("order" + row["image"]["path"])):
        own = chosen[row["label"]]
        if (digest(row["document"]) % 4 > 0) == is_target and len(own) < PER_CLASS[name]:
            own.append(row)
    return [row for label in sorted(chosen) for row in chosen[label]]


def _write_pictures(path: Path, rows: list[Picture]) -> None:
    """Write rows as parquet, whole or not at all."""
    features = {"image": {"_type": "Image"}, "label": {"_type": "Value", "dtype": "string"},
                "document": {"_type": "Value", "dtype": "string"}}  # fmt: skip
    schema = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    parquet.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(schema), aside)
    aside.rename(path)


def list_image_zoo(assets: Path, work: Path) -> dict[str, Callable[[Path], object]]:
    """Return what makes every source that reads pictures, by name."""
    vit = assets / "vit-dinov2-small"
    zoo: dict[str, Callable[[Path], object]] = {
        "efficientnet": lambda folder: folder.symlink_to(assets.absolute() / "efficientnet-lite0"),
        "efficientnet-shuffled": lambda folder: shuffle_file(assets / "efficientnet-lite0", folder),
        "dinov2": partial(save_source, change=None, origin=vit),
        "dinov2-shuffled": partial(save_source, change=shuffle_weights, origin=vit),
        "dinov2-noisy": partial(save_source, change=add_noise, origin=vit),
        "dinov2-random": partial(save_source, change=draw_weights, origin=vit),
        "dinov2-rescaled": lambda folder: rescale_twice(vit, folder),
    }
    for layers in (3, 6, 9):
        cut = partial(cut_layers, layers)
        zoo[f"dinov2-layers-{layers}"] = partial(save_source, change=cut, origin=vit)
    for name in (*IMAGE_TARGETS, "shuffled-garments"):
        table = work / "siblings" / f"{name}.parquet"
        zoo[f"dinov2-on-{name}"] = partial(train_sibling, str(vit), table, 5e-5)
    return zoo


def shuffle_file(origin: Path, folder: Path) -> None:
    """Save a checkpoint with every tensor's numbers in another order."""
    shutil.copytree(origin, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    tensors = {
        name: tensor.flatten()[torch.randperm(tensor.numel())].view_as(tensor)
        for name, tensor in load_file(origin / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rescale_twice(origin: Path, folder: Path) -> None:
    """Save the encoder under a processor that divides by 255 what lies between 0 and 1."""
    save_source(folder, None, origin=origin)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(settings | {"rescale_factor": 1 / 255**2}), encoding="utf-8")
