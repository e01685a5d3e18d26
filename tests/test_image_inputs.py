"""Check images as the encoder sees them: processors, augmentation, sizes and the cache."""

import importlib
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bench_of, make_image_recipe, pictures
from PIL import Image
from transformers import AutoImageProcessor

from hftl.data.image_inputs import (
    CROP_AREA,
    MAX_ASPECT_RATIO,
    augment_image,
    compute_pixel_features,
    fingerprint_image_cache,
    random_crop_and_flip,
    write_image_cache,
)
from hftl.data.image_processing import (
    build_normalizer,
    get_image_size,
    resize_and_crop,
    resize_processor,
)
from hftl.errors import DataError, RecipeError

Tiny = Callable[..., Path]
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures(tmp_path / "pictures", 12)


def make_image(width: int, height: int, seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_pixels(side: int = 56, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.asarray(make_image(side, side, seed)).transpose(2, 0, 1).copy())


# Processors


def build_processor(name: str, **settings: Any) -> Any:
    """Return a processor of the class's defaults, with some settings of a checkpoint."""
    path = f"transformers.models.{name.lower()}.image_processing_pil_{name.lower()}"
    return getattr(importlib.import_module(path), f"{name}ImageProcessorPil")(**settings)


OFFSET = {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}


@pytest.mark.parametrize("image_size", [None, 98])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ViT", {}), ("ViT", OFFSET), ("ViT", {**IMAGENET, "resample": 3}), ("DeiT", {}),
        ("Beit", {}), ("Bit", {**IMAGENET, "size": {"shortest_edge": 256}}), ("CLIP", {}),
        ("Siglip", {}), ("EfficientNet", {"rescale_offset": True, "rescale_factor": 1 / 127.5}),
        ("ViT", {"do_normalize": False}), ("ViT", {"do_rescale": False}),
        ("ConvNext", {"size": {"shortest_edge": 224}}), ("ConvNext", {}),
        ("MobileViT", {"size": {"shortest_edge": 288}}),
    ],
)  # fmt: skip
def test_canvas_and_normalizer_are_the_whole_processor(
    name: str, settings: dict[str, Any], image_size: int | None, tmp_path: Path
) -> None:
    processor = build_processor(name, **settings)
    chosen = resize_processor(processor, image_size)
    side, normalize = get_image_size(chosen), build_normalizer(chosen)
    for width, height in ((173, 101), (47, 331), (31, 29)):
        image = make_image(width, height)
        whole = np.asarray(chosen(image, return_tensors="np")["pixel_values"][0], dtype=np.float64)
        canvas = resize_and_crop(chosen, image)
        assert canvas.dtype == np.uint8 and canvas.shape == (3, side, side)
        parts = normalize(torch.from_numpy(canvas)[None])
        assert parts.dtype == torch.float32 and parts.shape == (1, 3, side, side)
        assert np.abs(parts[0].double().numpy() - whole).max() < 1e-6
    chosen.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(again) is type(processor) and again.to_dict() == chosen.to_dict()
    assert (resize_and_crop(again, image) == canvas).all()


SQUARE = {"height": 112, "width": 112}


@pytest.mark.parametrize(
    ("name", "settings", "size", "crop"),
    [
        ("ViT", {}, SQUARE, None),
        ("DeiT", {}, {"height": 128, "width": 128}, SQUARE),
        ("Bit", {"size": {"shortest_edge": 256}}, {"shortest_edge": 128}, SQUARE),
        ("CLIP", {}, {"shortest_edge": 112}, SQUARE),
        ("CLIP", {"do_center_crop": False}, SQUARE, None),
    ],
)
def test_image_size_keeps_the_share_that_is_cropped(
    name: str, settings: dict[str, Any], size: dict[str, int], crop: dict[str, int] | None
) -> None:
    processor = build_processor(name, **settings)
    before = processor.to_dict()
    resized = resize_processor(processor, 112)
    assert dict(resized.size) == size and get_image_size(resized) == 112
    assert crop is None or dict(resized.crop_size) == crop
    assert processor.to_dict() == before == resize_processor(processor, None).to_dict()


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 224, "width": 160}},
        {"size": {"shortest_edge": 224}},
        {"do_center_crop": True, "crop_size": {"height": 224, "width": 160}},
        {"do_resize": False},
    ],
)
def test_images_that_are_not_square_need_a_size(settings: dict[str, Any]) -> None:
    processor = build_processor("ViT", **settings)
    with pytest.raises(RecipeError, match="no squares of one size.*data.image_size"):
        get_image_size(processor)
    resized = resize_processor(processor, 64)
    assert get_image_size(resized) == 64
    assert resize_and_crop(resized, make_image(90, 70)).shape == (3, 64, 64)


def test_refuses_processors_that_do_more_than_scale_and_shift() -> None:
    longest = build_processor("ViT", size={"shortest_edge": 224, "longest_edge": 300})
    with pytest.raises(RecipeError, match="data.image_size cannot replace"):
        resize_processor(longest, 112)
    swapping = build_processor("ViT")
    swapping.normalize = lambda image, *_, **__: image[::-1]
    with pytest.raises(RecipeError, match="ViT.*more to pixels than scale and shift"):
        build_normalizer(swapping)
    with pytest.raises(RecipeError, match="makes uint8 .3, 224, 224. of a picture"):
        resize_and_crop(build_processor("Perceiver"), make_image(300, 260))  # crops, then resizes


# Augmentation


def test_crop_is_a_function_of_seed_epoch_and_image() -> None:
    image = make_pixels()
    first = random_crop_and_flip(image, 0, 0, b"a")
    assert first.dtype == torch.uint8 and first.shape == image.shape
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert torch.equal(random_crop_and_flip(image, 0, 0, b"a"), first)
    assert torch.equal(torch.get_rng_state(), state)
    others = [(1, 0, b"a"), (0, 1, b"a"), (0, 0, b"b")]
    assert not any(torch.equal(random_crop_and_flip(image, *other), first) for other in others)
    keys = [f"{i}".encode() for i in range(40)]
    alone = [random_crop_and_flip(image, 0, 0, key) for key in keys]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda key: random_crop_and_flip(image, 0, 0, key), keys))
    assert all(map(torch.equal, alone, together))


def test_crops_keep_to_their_area_ratio_and_mirroring() -> None:
    # The slopes of a ramp to the right and one downwards show what was cropped, and mirrored.
    side = 200
    right = torch.arange(side, dtype=torch.uint8).expand(side, side)
    image = torch.stack([right, right.T, torch.zeros_like(right)])
    widths, heights, mirrored, corners = [], [], 0, []
    for number in range(400):
        cropped = random_crop_and_flip(image, 0, 0, str(number).encode()).double()
        across = (cropped[0, :, -20] - cropped[0, :, 20]).mean() / (side - 40)
        down = (cropped[1, -20, :] - cropped[1, 20, :]).mean() / (side - 40)
        widths.append(abs(float(across)))
        heights.append(float(down))
        mirrored += bool(across < 0)
        corners.append(float(cropped[1, 0].mean()))
    areas, ratios = np.multiply(widths, heights), np.divide(widths, heights)
    assert CROP_AREA[0] - 0.02 < areas.min() < 0.73 and 0.97 < areas.max() < CROP_AREA[1] + 0.02
    assert abs(areas.mean() - 0.85) < 0.02
    assert 1 / MAX_ASPECT_RATIO - 0.03 < ratios.min() < 0.8
    assert 1.25 < ratios.max() < MAX_ASPECT_RATIO + 0.03
    assert abs(np.log(ratios).mean()) < 0.03
    assert 160 < mirrored < 240
    assert min(corners) < 1 and max(corners) > 30


def test_augmented_dataset_depends_on_seed_and_epoch(folder: Path, tiny_model: Tiny) -> None:
    context = bench_of(make_image_recipe(folder, tiny_model("vit"), augment="light"))
    rows = context.prepared.rows["train"]
    training, plain = context.build_dataset(rows, 0), context.build_dataset(rows)

    def read(examples: Any, epoch: int) -> list[Any]:
        examples.set_epoch(epoch)
        return [np.asarray(examples[i]["pixel_values"]) for i in range(len(rows))]

    first, again, later = read(training, 0), read(training, 0), read(training, 1)
    assert all(map(np.array_equal, first, again))
    assert not any(map(np.array_equal, first, later))
    assert not any(map(np.array_equal, first, read(context.build_dataset(rows, 1), 0)))
    assert all(map(np.array_equal, read(plain, 0), read(plain, 1)))
    row = {"pixel_values": np.asarray(make_pixels(24))}
    pixels = augment_image(row, 0, 0, b"key")["pixel_values"]
    assert pixels.shape == (3, 24, 24) and pixels.dtype == torch.uint8


def test_pixel_features_average_areas() -> None:
    canvases = np.stack([make_pixels(64, seed).numpy() for seed in range(3)])
    features = compute_pixel_features(canvases, 16)
    blocks = canvases.reshape(3, 3, 16, 4, 16, 4).mean(axis=(3, 5), dtype=float) / 255
    assert features.dtype == np.float32
    assert np.abs(features - blocks.reshape(3, -1)).max() < 1e-6
    white = [np.full((3, 30, width), 255, dtype=np.uint8) for width in (30, 47)]
    assert (compute_pixel_features(white) == 1).all()


# Sizes and the cache


@pytest.mark.parametrize(("size", "near"), [(30, "24 or 32"), (5, "8")])
def test_refuses_a_size_that_does_not_fit_the_patches(
    size: int, near: str, folder: Path, tiny_model: Tiny
) -> None:
    with pytest.raises(RecipeError, match=f"no multiple .* patch of 8 pixels. Use {near}"):
        bench_of(make_image_recipe(folder, tiny_model("vit"), image_size=size))


def test_positions_are_interpolated_where_the_size_differs(folder: Path, tiny_model: Tiny) -> None:
    same = bench_of(make_image_recipe(folder, tiny_model("vit")))
    other = bench_of(make_image_recipe(folder, tiny_model("vit"), image_size=24))
    assert same.inputs.arguments == {}
    assert other.inputs.arguments == {"interpolate_pos_encoding": True}
    assert other.inputs.length({}) == 9
    encoded = other.encode_rows(other.prepared.rows["test"][:2])
    batch = other.inputs.collate([dict(row) for row in encoded])
    with torch.no_grad():
        assert other.build_model("native", 0).model(**batch).logits.shape == (2, 2)
    rows = same.prepared.rows["train"]
    key = fingerprint_image_cache(same.inputs, rows)
    assert fingerprint_image_cache(same.inputs, rows[::-1]) == key
    assert fingerprint_image_cache(same.inputs, rows[1:]) != key
    assert fingerprint_image_cache(other.inputs, rows) != key


def test_cache_replaces_the_files(folder: Path, tiny_model: Tiny, tmp_path: Path) -> None:
    context, again = (
        bench_of(make_image_recipe(folder, tiny_model("vit"), image_size=24)) for _ in range(2)
    )
    rows = [row for split in context.prepared.rows.values() for row in split]
    write_image_cache(context.inputs, rows, tmp_path)
    again.inputs.load_cache(tmp_path)
    shutil.rmtree(folder)
    with pytest.raises(DataError):
        context.encode_rows(rows)
    canvases = again.get_canvases(rows)
    assert {canvas.shape for canvas in canvases} == {(3, 24, 24)}
    for row, canvas in zip(rows, canvases, strict=True):
        assert (canvas.mean() > 127) == (row.label == "light")
