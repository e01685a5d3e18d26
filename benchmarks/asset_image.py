"""Labelled images: clip art and garments."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from pathlib import Path

from asset_package import unpack_deb

CATEGORIES = ["animals", "buildings", "food", "people", "plants", "transportation"]
GARMENTS = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
            "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]  # fmt: skip


def build_clipart(deb: Path, product: Path) -> None:
    """Copy six categories as shipped: bombs, odd modes and repeated images included."""
    source = unpack_deb(deb) / "usr/share/openclipart/png"
    for category in CATEGORIES:
        # Links become copies: some point into categories that are left out.
        shutil.copytree(source / category, product / category)


def encode_png(pixels: bytes) -> bytes:
    """Encode one grey 28x28 image."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.frombytes("L", (28, 28), pixels).save(buffer, "png")
    return buffer.getvalue()


def build_fashion(deb: Path, product: Path) -> None:
    """Write train.parquet and test.parquet: image, as `datasets.Image` stores it, and label."""
    import pyarrow as pa
    from pyarrow import parquet

    source = unpack_deb(deb) / "usr/share/datasets/fashion-mnist"
    features = {"image": {"_type": "Image"}, "label": {"_type": "Value", "dtype": "string"}}
    schema = {"huggingface": json.dumps({"info": {"features": features}})}
    product.mkdir()
    for split, stem in (("train", "train"), ("test", "t10k")):
        # IDX headers take 16 bytes before the images and 8 before the labels.
        pixels = gzip.decompress((source / f"{stem}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((source / f"{stem}-labels-idx1-ubyte.gz").read_bytes())[8:]
        images = [
            {"bytes": encode_png(pixels[at : at + 28 * 28]), "path": f"{row}.png"}
            for row, at in enumerate(range(0, len(pixels), 28 * 28))
        ]
        table = pa.table({"image": images, "label": [GARMENTS[label] for label in labels]})
        parquet.write_table(table.replace_schema_metadata(schema), product / f"{split}.parquet")
