"""Check that the encoder sees its own processor's work; crops depend on seed, epoch and picture."""

import importlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hftl.data.image_inputs import (
    CROP_AREA,
    MAX_ASPECT_RATIO,
    build_normalizer,
    compute_pixel_features,
    get_image_size,
    random_crop_and_flip,
    resize_and_crop,
    resize_processor,
)
from hftl.errors import RecipeError

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def made(name: str, **settings: Any) -> Any:
    """A processor of the class's defaults, with some settings of a checkpoint."""
    module = importlib.import_module(
        f"transformers.models.{name.lower()}.image_processing_pil_{name.lower()}"
    )
    return getattr(module, f"{name}ImageProcessorPil")(**settings)


PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", {}),
    "vit of an offset": (
        "ViT",
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    ),
    "vit_mae, swin": ("ViT", {**IMAGENET, "resample": 3}),
    "deit": ("DeiT", {}),
    "beit": ("Beit", {}),
    "dinov2": ("Bit", {**IMAGENET, "size": {"shortest_edge": 256}}),
    "clip": ("CLIP", {}),
    "siglip": ("Siglip", {}),
    "efficientnet": ("EfficientNet", {"rescale_offset": True, "rescale_factor": 1 / 127.5}),
    "not normalised": ("ViT", {"do_normalize": False}),
    "not rescaled": ("ViT", {"do_rescale": False}),
}


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest) -> Any:
    name, settings = PROCESSORS[request.param]
    return made(name, **settings)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(173, 101), (47, 331), (31, 29)])
@pytest.mark.parametrize("image_size", [None, 98])
def test_canvas_and_normaliser_are_the_whole_processor(
    processor: Any, size: tuple[int, int], image_size: int | None
) -> None:
    chosen = resize_processor(processor, image_size)
    image = picture(*size)
    whole = np.asarray(chosen(image, return_tensors="np")["pixel_values"][0], dtype=np.float64)
    canvas = resize_and_crop(chosen, image)
    side = get_image_size(chosen)
    assert canvas.dtype == np.uint8 and canvas.shape == (3, side, side)
    parts = build_normalizer(chosen)(torch.from_numpy(canvas)[None])
    assert parts.dtype == torch.float32 and parts.shape == (1, 3, side, side)
    assert np.abs(parts[0].double().numpy() - whole).max() < 1e-6


@pytest.mark.parametrize("image_size", [None, 98])
def test_a_resized_processor_survives_saving(
    processor: Any, image_size: int | None, tmp_path: Path
) -> None:
    chosen = resize_processor(processor, image_size)
    chosen.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(again) is type(processor)
    assert again.to_dict() == chosen.to_dict()
    image = picture(150, 90)
    assert (resize_and_crop(again, image) == resize_and_crop(chosen, image)).all()


@pytest.mark.parametrize(
    ("name", "settings", "size", "crop"),
    [
        ("ViT", {}, {"height": 112, "width": 112}, None),
        ("DeiT", {}, {"height": 128, "width": 128}, {"height": 112, "width": 112}),
        (
            "Bit",
            {"size": {"shortest_edge": 256}},
            {"shortest_edge": 128},
            {"height": 112, "width": 112},
        ),
        ("CLIP", {}, {"shortest_edge": 112}, {"height": 112, "width": 112}),
        ("CLIP", {"do_center_crop": False}, {"height": 112, "width": 112}, None),
    ],
)
def test_an_image_size_keeps_the_share_that_is_cropped(
    name: str, settings: dict[str, Any], size: dict[str, int], crop: dict[str, int] | None
) -> None:
    before = made(name, **settings)
    stays = before.to_dict()
    after = resize_processor(before, 112)
    assert dict(after.size) == size
    assert crop is None or dict(after.crop_size) == crop
    assert get_image_size(after) == 112
    assert before.to_dict() == stays and resize_processor(before, None).to_dict() == stays


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 224, "width": 160}},
        {"size": {"shortest_edge": 224}},
        {"do_center_crop": True, "crop_size": {"height": 224, "width": 160}},
        {"do_resize": False},
    ],
)
def test_what_is_not_square_is_refused_until_a_size_is_given(settings: dict[str, Any]) -> None:
    processor = made("ViT", **settings)
    with pytest.raises(RecipeError, match="no squares of one size.*data.image_size"):
        get_image_size(processor)
    assert get_image_size(resize_processor(processor, 64)) == 64
    assert resize_and_crop(resize_processor(processor, 64), picture(90, 70)).shape == (3, 64, 64)


def test_sizes_of_a_kind_of_their_own_are_refused() -> None:
    longest = made("ViT", size={"shortest_edge": 224, "longest_edge": 300})
    for processor in (longest, made("ConvNext")):
        with pytest.raises(RecipeError, match="data.image_size cannot replace"):
            resize_processor(processor, 112)


def test_arithmetic_that_is_no_scale_and_shift_is_refused() -> None:
    with pytest.raises(RecipeError, match="MobileViT.*more to pixels than scale and shift"):
        build_normalizer(made("MobileViT"))  # swaps red and blue
    with pytest.raises(RecipeError, match="makes uint8 .3, 224, 224. of a picture"):
        resize_and_crop(made("Perceiver"), picture(300, 260))  # crops a share, then resizes


def pixels(side: int = 56, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture(side, side, seed)).transpose(2, 0, 1).copy())


def test_a_light_crop_is_a_function_of_seed_epoch_and_picture() -> None:
    image = pixels()
    first = random_crop_and_flip(image, 0, 0, b"a")
    assert first.dtype == torch.uint8 and first.shape == image.shape
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert torch.equal(random_crop_and_flip(image, 0, 0, b"a"), first)
    assert torch.equal(torch.get_rng_state(), state)
    others = [
        random_crop_and_flip(image, 1, 0, b"a"),
        random_crop_and_flip(image, 0, 1, b"a"),
        random_crop_and_flip(image, 0, 0, b"b"),
    ]
    assert not any(torch.equal(other, first) for other in others)
    keys = [f"{i}".encode() for i in range(40)]
    alone = [random_crop_and_flip(image, 0, 0, key) for key in keys]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda key: random_crop_and_flip(image, 0, 0, key), keys))
    assert all(map(torch.equal, alone, together))


def test_light_crops_keep_to_their_area_ratio_and_mirroring() -> None:
    # A ramp to the right and one downwards tell by their slopes what was cropped, and mirrored.
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
    assert (
        1 / MAX_ASPECT_RATIO - 0.03 < ratios.min() < 0.8
        and 1.25 < ratios.max() < MAX_ASPECT_RATIO + 0.03
    )
    assert abs(np.log(ratios).mean()) < 0.03
    assert 160 < mirrored < 240
    assert min(corners) < 1 and max(corners) > 30


def test_the_resize_of_a_crop_is_that_of_pillow() -> None:
    image = pixels(64)
    resized = torch.nn.functional.interpolate(
        image[None, :, 5:50, 3:61], (64, 64), mode="bilinear", antialias=True
    )[0]
    crop = Image.fromarray(image[:, 5:50, 3:61].permute(1, 2, 0).numpy())
    pillow = np.asarray(crop.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(resized.permute(1, 2, 0).numpy().astype(int) - pillow).max() <= 1


def test_pixel_features_average_areas() -> None:
    canvases = torch.stack([pixels(64, seed) for seed in range(3)])
    features = compute_pixel_features(canvases, 16)
    blocks = canvases.double().numpy().reshape(3, 3, 16, 4, 16, 4).mean(axis=(3, 5)) / 255
    assert features.dtype == torch.float32
    assert np.abs(features.numpy() - blocks.reshape(3, -1)).max() < 1e-6
    assert compute_pixel_features(torch.full((300, 3, 30, 30), 255, dtype=torch.uint8)).eq(1).all()
