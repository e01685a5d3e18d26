"""Warn of images that use little of the range from black to white, whatever their depth."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hftl
from hftl import cli_output
from hftl.config.data import Data
from hftl.config.recipe import Recipe
from hftl.data.general import load_general
from hftl.data.images import count_narrow_images, decode_image, read_levels
from hftl.data.load import load_images
from hftl.data.prepare import prepare_data
from hftl.data.rows import BadRows, InputSpec
from hftl.errors import DataWarning
from hftl.inference.compare import compare_models
from hftl.inference.predict_table import predict_table
from hftl.pipeline import pipeline

pytestmark = pytest.mark.usefixtures("fast_reload")

Tiny = Callable[..., Path]

SIDE = 24


def save(values: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


def save_colour(values: np.ndarray) -> bytes:
    """Return a PNG of 16 bits a channel, which Pillow reads and does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def scene(low: float, high: float, seed: int = 0) -> np.ndarray:
    """Noise that reaches both ends, of shares of the full range."""
    values = np.random.default_rng(seed).uniform(low, high, (SIDE, SIDE))
    values[0, :2] = low, high
    return values


def deep(values: np.ndarray) -> np.ndarray:
    return np.rint(values * 65535).astype(np.uint16)


KINDS: dict[str, Callable[[np.ndarray], bytes]] = {
    "grey PNG": lambda v: save(deep(v), "PNG"),
    "grey TIFF": lambda v: save(deep(v), "TIFF"),
    "grey PGM": lambda v: save(deep(v), "PPM"),
    "colour PNG": lambda v: save_colour(deep(v)),
    "float TIFF": lambda v: save(v.astype(np.float32), "TIFF"),
    "8 bits": lambda v: save(np.rint(v * 255).astype(np.uint8), "PNG"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("low", "high", "narrow"),
    [(0.01, 1 / 16, True), (0.5, 0.55, True), (0, 1 / 300, True), (0, 1, False), (0.4, 0.6, False)],
)
def test_narrow_range_is_seen_at_every_depth(
    low: float, high: float, narrow: bool, kind: str
) -> None:
    image = decode_image(KINDS[kind](scene(low, high)), None, 10_000)
    assert (count_narrow_images([read_levels(image), None]) is not None) == narrow
    assert np.allclose(read_levels(image), (low * 255, high * 255), atol=1)


def test_a_flat_colour_is_not_narrow() -> None:
    assert count_narrow_images([read_levels(Image.new("RGB", (4, 4), (255, 0, 0)))]) is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write 12-bit images in 16-bit files: 3 to 12 of 255 as the model gets them."""
    for label, (low, high) in {"dark": (780, 1500), "light": (1600, 3080)}.items():
        (tmp_path / "deep" / label).mkdir(parents=True)
        for number in range(12):
            values = deep(scene(low / 65535, high / 65535, number))
            (tmp_path / "deep" / label / f"{number}.png").write_bytes(save(values, "PNG"))
    return tmp_path / "deep"


WARNING = "24 of 24 pictures use less than 10% .* within 3 to 12 of 255"


def test_check_run_predict_and_compare_warn(folder: Path, tiny_model: Tiny, tmp_path: Path) -> None:
    tree = {
        "source": {"model": str(tiny_model("vit"))}, "data": {"train": {"path": str(folder)}},
        "finetune": {"strategy": "head"}, "measure": {"seeds": [0], "arms": ["majority"]},
    }  # fmt: skip
    _, checked = pipeline.check_recipe(Recipe.parse(tree))
    assert any("within 3 to 12 of 255" in w for w in checked["warnings"])
    said: list[str] = []
    record = pipeline.run(Recipe.parse(tree), tmp_path / "run", say=said.append)
    assert record is not None and record["data"]["narrow_pictures"] == {
        "count": 24, "pictures": 24, "low": 3, "high": 12
    }  # fmt: skip
    assert any("warning: 24 of 24 pictures use less than 10%" in line for line in said)
    with pytest.warns(DataWarning, match="input: " + WARNING):
        predict_table(str(tmp_path / "run"), folder, tmp_path / "out.csv")
    with pytest.warns(DataWarning, match="1 of 1 pictures"):
        hftl.load(tmp_path / "run").predict([folder / "dark" / "2.png"])
    with pytest.warns(DataWarning, match="deep: " + WARNING):
        compare_models([str(tmp_path / "run")], folder, None)


def test_images_without_labels_are_checked_too(folder: Path) -> None:
    full = folder.parent / "full"
    for label in ("dark", "light"):
        (full / label).mkdir(parents=True)
        for number in range(4):
            values = scene(0, 1, 100 * len(label) + number)
            (full / label / f"{number}.png").write_bytes(KINDS["8 bits"](values))
    tree: dict[str, Any] = {"train": {"path": str(full)}, "unlabeled": {"path": str(folder)}}
    with pytest.warns(DataWarning, match="data.unlabeled: " + WARNING):
        load_images(Data.model_validate(tree), "unlabeled", BadRows(), InputSpec("image", 8))
    tree = {
        "task": "classification",
        "train": {"path": str(full)},
        "general": {"path": str(folder)},
        "test": {"fraction": 0.25},
    }
    data, reading = Data.model_validate(tree), InputSpec("image", 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = prepare_data(data, reading)
    assert prepared.facts.narrow_pictures is None
    with pytest.warns(DataWarning, match="data.general: " + WARNING):
        load_general(data, prepared, reading)


def test_a_command_shows_warnings_of_the_data_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = cli_output.show_warning
        warnings.warn("of a library", UserWarning, stacklevel=1)
        warnings.warn("of the data", DataWarning, stacklevel=1)
    out, err = capsys.readouterr()
    assert err == "  warning: of the data\n" and not out
