"""Check pictures of any shape as rows of patches, and whole runs of a model that reads them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bench_of, make_image_recipe
from PIL import Image
from test_image_inputs import build_processor, make_image
from test_resume import check_stopped_training
from transformers import AutoImageProcessor, Siglip2ForImageClassification

import hftl
from hftl.config.finetune import Finetune
from hftl.config.recipe import Recipe
from hftl.data.image_inputs import (
    fingerprint_image_cache,
    random_crop_and_flip,
    write_image_cache,
)
from hftl.data.image_processing import build_normalizer, join_patches, resize_to_patches
from hftl.data.patched_inputs import cut_into_patches, limit_patches
from hftl.errors import RecipeError
from hftl.models.features import predict_logits
from hftl.models.layer_features import compute_layer_features
from hftl.pipeline import pipeline

pytestmark = pytest.mark.usefixtures("fast_reload")
Tiny = Callable[..., Path]
SHAPES = ((40, 36), (90, 30), (24, 100), (20, 12))
"""Width and height; the last is enlarged."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save dark and light pictures of several shapes."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label, middle in (("light", 190), ("dark", 60)):
        (folder / label).mkdir()
        for number in range(28):
            width, height = SHAPES[number % len(SHAPES)]
            noise = middle + draw.integers(-50, 50, (height, width, 3))
            Image.fromarray(noise.astype("uint8")).save(folder / label / f"{number}.png")
    return folder


def collate_by_hand(processor: Any, images: list[Image.Image]) -> dict[str, Any]:
    return dict(processor(images, return_tensors="pt"))


@pytest.mark.parametrize("settings", [{}, {"image_mean": [0.4, 0.5, 0.6], "max_num_patches": 30}])
def test_canvas_normalizer_and_patches_are_the_whole_processor(settings: dict[str, Any]) -> None:
    processor = build_processor("Siglip2", **settings)
    normalize = build_normalizer(processor)
    for width, height in ((173, 101), (47, 331), (31, 29), (900, 20)):
        image = make_image(width, height)
        whole = collate_by_hand(processor, [image])
        canvas = resize_to_patches(processor, image)
        rows, columns = whole["spatial_shapes"][0].tolist()
        assert canvas.dtype == np.uint8 and canvas.shape == (3, 16 * rows, 16 * columns)
        patches = cut_into_patches(normalize(torch.from_numpy(canvas)[None])[0], 16)
        expected = whole["pixel_values"][0, : rows * columns]
        assert (patches - expected).abs().max() < 1e-6
        assert np.array_equal(join_patches(patches.numpy(), np.array([rows, columns])),
                              normalize(torch.from_numpy(canvas)[None])[0].numpy())  # fmt: skip
    limited = limit_patches(processor, 64)
    assert limited.max_num_patches == 16 and limit_patches(processor, None).to_dict() == (
        processor.to_dict()
    )


def test_batches_features_and_logits_are_those_of_the_plain_libraries(
    folder: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    """The cache holds canvases of several shapes; padding changes no output."""
    context, again = (bench_of(make_image_recipe(folder, tiny_model("siglip2"))) for _ in range(2))
    rows = context.prepared.rows["train"]
    write_image_cache(context.inputs, rows, tmp_path)
    again.inputs.load_cache(tmp_path)
    canvases = context.get_canvases(rows)
    assert len({canvas.shape for canvas in canvases}) == 4
    assert all(map(np.array_equal, canvases, again.get_canvases(rows)))
    key = fingerprint_image_cache(context.inputs, rows)
    other = bench_of(make_image_recipe(folder, tiny_model("siglip2"), image_size=24))
    assert fingerprint_image_cache(other.inputs, rows) != key and other.inputs.length({}) == 9

    encoded = context.encode_rows(rows)
    batch: Any = context.inputs.collate([dict(row) for row in encoded])
    processor = AutoImageProcessor.from_pretrained(tiny_model("siglip2"), backend="pil")
    images = context.inputs.decode_images(rows)
    expected = collate_by_hand(processor, images)
    assert batch.keys() == expected.keys()
    assert all((batch[name] - expected[name]).abs().max() < 1e-6 for name in batch)

    built = context.build_model("native", 0)
    with torch.no_grad():
        hidden = built.encoder(**expected).last_hidden_state
    mask = expected["pixel_attention_mask"].bool()
    means = np.stack([h[m].mean(0).numpy() for h, m in zip(hidden, mask, strict=True)])
    features = context.extract_features("native", 0, rows)
    np.testing.assert_allclose(features, means, atol=1e-5, rtol=1e-5)
    widths, layers = compute_layer_features(built, encoded, context.inputs, "cpu")
    assert [str(site) for site in widths] == [
        *(f"layer {layer} mean" for layer in range(4)), "layer 3 native",
    ]  # fmt: skip
    np.testing.assert_allclose(np.concatenate(layers)[:, -32:-16], means, atol=1e-5, rtol=1e-5)
    logits = predict_logits(built.model, encoded, context.inputs, "cpu")
    with torch.no_grad():
        alone = [built.model(**collate_by_hand(processor, [image])).logits for image in images]
    np.testing.assert_allclose(logits, torch.cat(alone).numpy(), atol=1e-5, rtol=1e-5)


def test_crops_keep_the_shape_of_a_picture() -> None:
    pixels = torch.from_numpy(np.asarray(make_image(40, 24)).transpose(2, 0, 1).copy())
    crops = [random_crop_and_flip(pixels, 0, 0, str(number).encode()) for number in range(8)]
    assert {crop.shape for crop in crops} == {pixels.shape}
    assert not any(torch.equal(crop, pixels) for crop in crops)


@pytest.mark.parametrize(
    ("strategy", "cache"),
    [
        ("full", "auto"),
        pytest.param("partial", "always", marks=pytest.mark.slow),
        pytest.param("lora", "auto", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_published_and_read_back(
    strategy: str, cache: str, folder: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    recipe = Recipe.parse({
        "source": {"model": str(tiny_model("siglip2")), "published_as": "org/siglip2"},
        "data": {"train": {"path": str(folder)}, "augment": "light" if cache == "auto" else "none"},
        "finetune": {
            "strategy": strategy, "blocks": 1, "cache": cache,
            "training": {"num_train_epochs": 2, "learning_rate": 1e-3, "bf16": False},
        },
        "measure": {"seeds": [0], "arms": []} if strategy == "full" else {
            "seeds": [0], "arms": ["head", "scratch"], "analyses": ["probe"],
            "scratch": {"learning_rates": [1e-3]},
        },
    })  # fmt: skip
    record = pipeline.run(recipe, tmp_path / "run")
    assert record is not None and record["reload_difference"] < 1e-5
    assert not any("crops or squeezes" in warning for warning in record["check"]["warnings"])
    wide = Image.open(folder / "dark" / "1.png")
    predictor = hftl.load(tmp_path / "run")
    (prediction,) = predictor.predict([wide])
    if strategy == "full":
        published = tmp_path / "run" / "publish"
        model = Siglip2ForImageClassification.from_pretrained(published)
        processor = AutoImageProcessor.from_pretrained(published, backend="pil")
        with torch.no_grad():
            logits = model(**collate_by_hand(processor, [wide])).logits[0]
        scores = (logits / (predictor.temperature or 1.0)).softmax(-1).tolist()
        by_name = dict(zip(predictor.class_names, scores, strict=True))
        assert prediction.get("scores") == pytest.approx(by_name, abs=1e-5)


def test_a_stopped_training_ends_as_one_without_a_stop(
    folder: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    context = bench_of(make_image_recipe(folder, tiny_model("siglip2"), augment="light", shots=9))
    training = {"learning_rate": 5e-3, "bf16": False, "num_train_epochs": 2}
    finetune = Finetune.model_validate({"strategy": "full", "training": training})

    check_stopped_training(context, finetune, tmp_path)


def test_a_size_of_no_whole_patches_is_refused(folder: Path, tiny_model: Tiny) -> None:
    with pytest.raises(RecipeError, match="no multiple .* patch of 8 pixels. Use 24 or 32"):
        bench_of(make_image_recipe(folder, tiny_model("siglip2"), image_size=30))


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ("ViT", "ViTImageProcessor.* makes no patches, and the model reads patches of 8 pixels"),
        ("Siglip2", "makes patches of 16 pixels, resized, and the model reads patches of 8"),
    ],
)
def test_another_processor_is_refused(
    processor: str, message: str, folder: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    model = Siglip2ForImageClassification.from_pretrained(tiny_model("siglip2"))
    model.save_pretrained(tmp_path)
    build_processor(processor).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=message):
        bench_of(make_image_recipe(folder, tmp_path))
