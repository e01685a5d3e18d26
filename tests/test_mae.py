"""Compare the masked autoencoder with ViTMAE: it learns hidden patches from visible ones alone."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.ddp import run_two_backward_passes
from support.tiny import IMAGE_SIZE, tiny_config, tiny_processor
from transformers import AutoModel, ViTMAEForPreTraining

from hftl.adapt.encoder_io import merge_encoder_state, set_trainable
from hftl.adapt.mae import MaskedAutoencoder, compute_teacher_features, load_mae
from hftl.config.data import Data
from hftl.config.section import Source
from hftl.data.image_inputs import ImageInputs, augment_image
from hftl.data.image_processing import resize_processor
from hftl.data.masking import (
    UNIFORM_DEVIATION,
    MaskedImageDataset,
    build_pixel_targets,
    collate_masked_images,
    count_patches,
    count_visible,
    draw_patch_noise,
    find_uniform_patches,
    gather_tokens,
    patchify,
    split_by_noise,
)
from hftl.errors import RecipeError
from hftl.models.source import SourceModel, find_source, load_image_processor

SUPPORTED = ("vit", "vit_mae", "deit", "dinov2", "dinov2_with_registers", "beit")
PREFIX = {"deit": 2, "dinov2_with_registers": 5}
DECODER = {"width": 16, "depth": 1, "heads": 2}
PATCHES = 16
PATCH = 8
LORA = {"r": 4, "lora_alpha": 8}

Tiny = Callable[..., Path]


def load_source(folder: Path) -> SourceModel:
    return find_source(Source(model=str(folder)))


def load(
    tiny_model: Tiny, kind: str, side: int = IMAGE_SIZE, ratio: float = 0.75, seed: int = 0
) -> MaskedAutoencoder:
    return load_mae(load_source(tiny_model(kind)), side, ratio, DECODER, seed)[0]


def draw_batch(batch: int = 3, side: int = IMAGE_SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixels and noise."""
    draw = torch.Generator().manual_seed(2)
    pixels = torch.randn(batch, 3, side, side, generator=draw)
    return pixels, torch.rand(batch, (side // PATCH) ** 2, generator=draw)


def draw_canvases(rows: int, side: int = IMAGE_SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, 3, side, side), dtype=np.uint8)


def build_dataset(canvases: Any, seed: int = 0, **more: Any) -> MaskedImageDataset:
    return MaskedImageDataset(canvases, [bytes([i]) for i in range(len(canvases))], PATCH, seed,
                              **more)  # fmt: skip


def build_inputs(source: SourceModel, side: int = IMAGE_SIZE) -> ImageInputs:
    more = {"interpolate_pos_encoding": True} if side != IMAGE_SIZE and (
        source.architecture_spec.image_sizes == "argument") else {}  # fmt: skip
    return ImageInputs(
        Data.model_construct(), resize_processor(load_image_processor(source), side), more, PATCH
    )


def perturb(parameters: Any, by: float = 0.1) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * by)


# Patches


def test_patches_are_split_as_vit_mae_splits_them() -> None:
    stock = ViTMAEForPreTraining(tiny_config("vit_mae"))
    pixels, noise = draw_batch()
    assert torch.equal(patchify(pixels, PATCH), stock.patchify(pixels))
    assert torch.equal(stock.unpatchify(patchify(pixels, PATCH)), pixels)
    tokens = torch.randn(3, PATCHES, 5)
    for ratio in (0.1, 0.5, 0.75, 0.9):
        stock.vit.embeddings.config.mask_ratio = ratio
        shown, mask, order = stock.vit.embeddings.random_masking(tokens, noise)
        visible, masked, restore = split_by_noise(noise, ratio)
        assert torch.equal(restore, order)
        assert torch.equal(gather_tokens(tokens, visible), shown)
        assert visible.shape[1] == int(PATCHES * (1 - ratio)) == count_visible(PATCHES, ratio)
        assert torch.equal(torch.zeros(3, PATCHES).scatter(1, masked, 1.0), mask)
        both = torch.cat([visible, masked], 1)
        assert torch.equal(both.gather(1, restore), torch.arange(PATCHES).expand(3, -1))
    # Equal noise goes by place, and a rest that fills no patch is left out.
    visible, masked, _ = split_by_noise(torch.zeros(1, 300), 0.5)
    assert visible.tolist() == [list(range(150))] and masked.tolist() == [list(range(150, 300))]
    pixels = torch.randn(2, 3, 37, 35)
    assert torch.equal(patchify(pixels, 8), patchify(pixels[..., :32, :32], 8))


@pytest.mark.parametrize("norm", [False, True])
def test_targets_equal_those_of_a_plain_loop(norm: bool) -> None:
    pixels, noise = draw_batch()
    _, masked, _ = split_by_noise(noise, 0.75)
    targets = build_pixel_targets(pixels, PATCH, masked, norm)
    for row, ids in enumerate(masked.tolist()):
        for place, number in enumerate(ids):
            top, left = divmod(number, IMAGE_SIZE // PATCH)
            part = pixels[row, :, top * 8 : top * 8 + 8, left * 8 : left * 8 + 8]
            part = part.permute(1, 2, 0).flatten().double().numpy()
            if norm:
                part = (part - part.mean()) / np.sqrt(part.var(ddof=1) + 1e-6)
            assert np.abs(targets[row, place].numpy() - part).max() < 1e-5


def test_near_constant_patches_are_left_out_of_normalised_targets_alone() -> None:
    images = torch.from_numpy(draw_canvases(1))
    images[0, :, :8, :8] = 255  # patch 0: white
    images[0, :, :8, 8:16] = 250 + torch.arange(64).reshape(8, 8) % 2  # patch 1: noise
    images[0, :, :8, 16:24] = 255
    images[0, :, 3, 16:24] = 0  # patch 2: a line
    images[0, :, :8, 24:32] = torch.tensor([200, 0, 0]).view(3, 1, 1)  # patch 3: red
    uniform = find_uniform_patches(images, PATCH)
    assert uniform.tolist() == [[True, True] + [False] * 14]
    assert torch.equal(uniform, patchify(images.double(), PATCH).std(-1) < UNIFORM_DEVIATION)
    masked = torch.tensor([[5, 1, 3, 0]])
    plain = build_pixel_targets(images.float(), PATCH, masked, False, uniform)
    assert plain.isfinite().all()
    targets = build_pixel_targets(images.float(), PATCH, masked, True, uniform)
    assert targets.isnan().all(-1).tolist() == [[False, True, False, True]]
    assert targets[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 0.95, float("nan")])
def test_ratios_that_leave_nothing_are_refused(tiny_model: Tiny, ratio: float) -> None:
    with pytest.raises(RecipeError, match="adapt.mask_ratio.*leaves none (visible|masked)"):
        split_by_noise(torch.rand(1, PATCHES), ratio)
    with pytest.raises(RecipeError, match="adapt.mask_ratio"):
        load(tiny_model, "vit", ratio=ratio)


@pytest.mark.parametrize(
    ("side", "words"), [(8, "holds 1 patch of 8"), (7, "not even one patch"), (15, "holds 1 patch")]
)
def test_images_of_one_patch_are_refused(tiny_model: Tiny, side: int, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load(tiny_model, "dinov2", side=side)
    with pytest.raises(RecipeError, match=words):
        build_dataset(draw_canvases(2, side))
    assert count_patches(16, 8) == 4


def test_noise_is_a_function_of_seed_epoch_and_image() -> None:
    images = build_dataset(draw_canvases(3), 7)
    first = [images[i]["noise"] for i in range(3)]
    images.set_epoch(1)
    second = [images[i]["noise"] for i in range(3)]
    images.set_epoch(0)
    assert all(torch.equal(images[i]["noise"], first[i]) for i in range(3))
    every = [*first, *second, draw_patch_noise(PATCHES, 8, 0, bytes([0]))]
    assert len({tuple(noise.tolist()) for noise in every}) == 7
    assert all(noise.dtype == torch.float32 and noise.shape == (PATCHES,) for noise in every)
    fixed = build_dataset(draw_canvases(3), 7, fixed=True)
    fixed.set_epoch(5)
    assert torch.equal(fixed[1]["noise"], first[1])


def test_augmented_images_change_by_epoch_and_have_no_teacher() -> None:
    augment = partial(_augment, seed=3)
    images = build_dataset(draw_canvases(1), 3, change=augment)
    first = images[0]["pixel_values"]
    assert first.dtype == torch.uint8
    images.set_epoch(1)
    assert not torch.equal(images[0]["pixel_values"], first)
    with pytest.raises(RecipeError, match="data.augment=none"):
        build_dataset(draw_canvases(1), 3, change=augment, teacher=np.zeros((1, 16), np.float32))


def _augment(row: dict[str, Any], epoch: int, key: bytes, seed: int) -> dict[str, Any]:
    return augment_image(row, seed, epoch, key)


def test_every_patch_is_hidden_as_often() -> None:
    counts = torch.zeros(PATCHES)
    for number in range(4000):
        noise = draw_patch_noise(PATCHES, 0, 0, str(number).encode())
        counts[split_by_noise(noise[None], 0.75)[1]] += 1
    expected = 4000 * 0.75
    # Exactly 12 of 16 each time: the counts' variance is that of single draws times 16 / 15.
    chi2 = ((counts - expected) ** 2).sum() / (expected * 0.25 * PATCHES / (PATCHES - 1))
    assert counts.sum() == 4000 * 12 and chi2 < 37.7  # .999 of 15 degrees


@pytest.mark.parametrize("norm", [False, True])
def test_batch_holds_pixels_noise_teacher_and_labels(tiny_model: Tiny, norm: bool) -> None:
    source, images = load_source(tiny_model("vit")), draw_canvases(3)
    images[1] = 255
    rows = build_dataset(images, teacher=np.ones((3, 16), np.float32))
    inputs = build_inputs(source)
    batch = collate_masked_images([rows[i] for i in range(3)], inputs, 0.75, norm)
    assert set(batch) == {"pixel_values", "noise", "teacher", "labels"}
    assert batch["pixel_values"].dtype == torch.float32 and batch["teacher"].shape == (3, 16)
    plain = inputs.collate([{"pixel_values": image} for image in images])["pixel_values"]
    assert torch.equal(batch["pixel_values"], plain)
    assert batch["labels"].shape == (3, 12, 192)
    assert batch["labels"].isnan().any(-1).any(-1).tolist() == [False, norm, False]
    _, masked, _ = split_by_noise(batch["noise"], 0.75)
    expected = build_pixel_targets(plain, PATCH, masked, norm)[[0, 2]]
    assert torch.equal(batch["labels"][[0, 2]], expected)
    rows = build_dataset(draw_canvases(2, 48))
    batch = collate_masked_images([rows[0], rows[1]], build_inputs(source, 48), 0.5, norm)
    assert batch["interpolate_pos_encoding"] is True and batch["noise"].shape == (2, 36)


# The objective


@pytest.mark.parametrize(("norm", "ratio"), [(False, 0.75), (True, 0.5)])
def test_the_loss_is_vit_mae_s(tiny_model: Tiny, norm: bool, ratio: float) -> None:
    source = load_source(tiny_model("vit_mae"))
    model, fresh = load_mae(source, IMAGE_SIZE, ratio, DECODER, seed=0)
    assert fresh == ()
    stock: Any = ViTMAEForPreTraining.from_pretrained(source.folder)
    stock.config.norm_pix_loss, stock.config.mask_ratio = norm, ratio
    stock.eval(), model.eval()
    pixels, noise = draw_batch()
    theirs = stock(pixel_values=pixels, noise=noise)
    _, masked, _ = split_by_noise(noise, ratio)
    ours = model(pixels, noise)
    loss = (ours.logits - build_pixel_targets(pixels, PATCH, masked, norm)).square().mean()
    assert (gather_tokens(theirs.logits, masked) - ours.logits).abs().max() < 1e-5
    assert abs(theirs.loss - loss) < 1e-5
    theirs.loss.backward()
    loss.backward()
    expected = {n.removeprefix("vit."): p.grad for n, p in stock.named_parameters()}
    gradients = {n.removeprefix("encoder."): p.grad for n, p in model.named_parameters()}
    # transformers' loader makes the fixed positions of a decoder trainable.
    names = [n for n, g in expected.items() if g is not None and n != "decoder.decoder_pos_embed"]
    assert len(names) > 50
    assert max((expected[name] - gradients[name]).abs().max() for name in names) < 1e-5


def test_vit_mae_decoder_takes_positions_of_another_size(tiny_model: Tiny) -> None:
    source = load_source(tiny_model("vit_mae"))
    model, fresh = load_mae(source, 48, 0.75, DECODER, seed=0)
    stock: Any = ViTMAEForPreTraining(tiny_config("vit_mae", image_size=48))
    stock.decoder.initialize_weights(36)
    decoder: Any = model.decoder
    assert fresh == () and torch.equal(decoder.decoder_pos_embed, stock.decoder.decoder_pos_embed)
    stored = load_file(source.folder / "model.safetensors")
    assert torch.equal(decoder.mask_token, stored["decoder.mask_token"])
    assert torch.equal(decoder.decoder_pred.weight, stored["decoder.decoder_pred.weight"])
    pixels, noise = draw_batch(side=48)
    logits = model(pixels, noise, interpolate_pos_encoding=True).logits
    assert logits.shape == (3, 27, 192) and logits.isfinite().all()


def test_vit_mae_checkpoint_without_its_decoder_gets_a_new_one(tmp_path: Path) -> None:
    AutoModel.from_config(tiny_config("vit_mae")).save_pretrained(tmp_path)
    tiny_processor(tmp_path)
    model, fresh = load_mae(load_source(tmp_path), IMAGE_SIZE, 0.75, DECODER, seed=0)
    assert set(fresh) == set(model.head_parameters()) and "decoder.mask_token" in fresh


@pytest.mark.parametrize(
    ("kind", "side", "method"),
    [
        *((kind, IMAGE_SIZE, "full") for kind in SUPPORTED),
        *((kind, 48, "lora+blocks") for kind in SUPPORTED),
        ("vit", IMAGE_SIZE, "head"), ("dinov2", IMAGE_SIZE, "lora"),
    ],
)  # fmt: skip
def test_all_that_trains_gets_a_gradient(
    tiny_model: Tiny, kind: str, side: int, method: str
) -> None:
    source, model = load_source(tiny_model(kind)), load(tiny_model, kind, side)
    set_trainable(model, source.architecture_spec, method, 1, LORA)
    rows = build_dataset(draw_canvases(3, side))
    inputs = build_inputs(source, side)
    batch = collate_masked_images([rows[i] for i in range(3)], inputs, 0.75, True)
    labels = batch.pop("labels")
    output = model(**batch)
    assert output.logits.shape == labels.shape and output.penalty is None
    loss = (output.logits - labels).square().mean()
    assert loss.isfinite()
    loss.backward()
    named = dict(model.named_parameters())
    assert not [name for name, p in named.items() if p.requires_grad and p.grad is None]
    assert all(p.requires_grad for p in model.head_parameters().values())
    trains = {name for name, p in model.encoder.named_parameters() if p.requires_grad}
    if method == "full":
        never = {name for name, p in model.encoder.named_parameters() if not p.requires_grad}
        assert all(name.split(".")[1] in ("mask_token", "position_embeddings") or
                   name.startswith("pooler") for name in never)  # fmt: skip
        assert ("embeddings.position_embeddings" in never) == (kind == "vit_mae")
    elif method == "head":
        assert not trains
    else:
        assert any("lora_" in name for name in trains)
        assert (method == "lora+blocks") == any("lora_" not in name for name in trains)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_hidden_pixels_change_no_prediction_and_visible_ones_no_target(
    tiny_model: Tiny, kind: str
) -> None:
    model, lengths = load(tiny_model, kind).eval(), []
    perturb(model.parameters())
    encoder = model.encoder
    first = encoder.encoder.layer[0] if "dinov2" in kind else encoder.layers[0]
    first.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    pixels, noise = draw_batch()
    pixels.requires_grad = True
    _, masked, _ = split_by_noise(noise, 0.75)
    hidden = torch.zeros(3, PATCHES, dtype=torch.bool).scatter(1, masked, True)
    logits = model(pixels, noise).logits
    # BEiT has one bias for each pair of positions: it sees mask tokens in the hidden places.
    assert lengths == [PREFIX.get(kind, 1) + (PATCHES if kind == "beit" else 4)]
    assert logits.shape[1] == 12
    targets = build_pixel_targets(pixels, PATCH, masked, True)
    for output, reads in ((logits, ~hidden), (targets, hidden)):
        gradient = torch.autograd.grad(output.square().sum(), pixels)[0]
        by_patch = patchify(gradient, PATCH).abs().amax(-1)
        assert torch.equal(by_patch > 0, reads)


def test_positions_are_added_before_patches_are_dropped(tiny_model: Tiny) -> None:
    model = load(tiny_model, "vit").eval()
    pixels, noise = draw_batch(1)
    visible, _, _ = split_by_noise(noise, 0.75)
    tokens: list[torch.Tensor] = []
    model.encoder.layers[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    model(pixels, noise)
    model.encoder(pixel_values=pixels)
    expected = torch.cat([tokens[1][:, :1], gather_tokens(tokens[1][:, 1:], visible)], 1)
    assert torch.equal(tokens[0], expected)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_penalty_is_the_distance_to_the_original_on_whole_images(
    tiny_model: Tiny, kind: str
) -> None:
    source, model = load_source(tiny_model(kind)), load(tiny_model, kind)
    images, inputs = draw_canvases(5), build_inputs(source)
    teacher = compute_teacher_features(model, images, inputs)
    plain: Any = AutoModel.from_pretrained(source.folder, config=source.config).eval()
    whole = inputs.collate([{"pixel_values": image} for image in images])["pixel_values"]
    with torch.no_grad():
        hidden = plain(pixel_values=whole).last_hidden_state
    expected = hidden[:, PREFIX.get(kind, 1) :].mean(1)
    assert teacher.shape == (5, 16) and (teacher - expected).abs().max() < 1e-5
    rows = build_dataset(images, teacher=teacher.numpy())
    batch = collate_masked_images([rows[i] for i in range(5)], inputs, 0.75, True)
    batch.pop("labels")
    assert model(**batch).penalty.abs().max() < 1e-8
    perturb(model.encoder.parameters())
    output = model(**batch)
    now = compute_teacher_features(model, images, inputs)
    assert (output.penalty - (now - teacher).square().mean(1)).abs().max() < 1e-5
    assert output.penalty.shape == (5,) and output.penalty.min() > 0
    without = model(**{key: value for key, value in batch.items() if key != "teacher"})
    assert torch.equal(without.logits, output.logits) and without.penalty is None


@pytest.mark.parametrize("kind", SUPPORTED)
def test_merged_encoder_is_the_live_one(tiny_model: Tiny, kind: str) -> None:
    source, model = load_source(tiny_model(kind)), load(tiny_model, kind)
    set_trainable(model, source.architecture_spec, "lora+blocks", 1, LORA)
    perturb((p for p in model.parameters() if p.requires_grad), 0.2)
    model.eval()
    fresh: Any = AutoModel.from_pretrained(source.folder, config=source.config).eval()
    state = merge_encoder_state(model)
    missing, unexpected = fresh.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("pooler") for name in missing)
    pixels, _ = draw_batch()
    with torch.no_grad():
        live = model.encoder(pixel_values=pixels).last_hidden_state
        assert (live - fresh(pixel_values=pixels).last_hidden_state).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["vit", "vit_mae", "beit"])
def test_trained_decoder_is_loaded_from_an_earlier_stage(
    tiny_model: Tiny, kind: str, tmp_path: Path
) -> None:
    source, first = load_source(tiny_model(kind)), load(tiny_model, kind).eval()
    perturb(first.head_parameters().values())
    file = tmp_path / "head.safetensors"
    save_file(first.head_state(), file)
    second, fresh = load_mae(source, IMAGE_SIZE, 0.75, DECODER, seed=9, head=file)
    pixels, noise = draw_batch()
    assert fresh == ()
    assert torch.equal(first(pixels, noise).logits, second.eval()(pixels, noise).logits)
    if kind == "vit":
        with pytest.raises(RecipeError, match=r"decoder.* \(16,\), expected \(32,\)"):
            load_mae(source, IMAGE_SIZE, 0.75, DECODER | {"width": 32}, seed=9, head=file)


def test_new_decoder_is_a_function_of_the_seed(tiny_model: Tiny) -> None:
    for kind in ("dinov2", "beit"):
        one, same, other = (load(tiny_model, kind, seed=s).head_state() for s in (1, 1, 2))
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("swin", "swin convolves or shifts windows over the full grid"),
        ("swinv2", "swinv2 convolves or shifts windows over the full grid"),
        ("siglip", "siglip is no architecture that mae knows.*vit_mae, vit, deit, beit, dinov2"),
        ("bert", "bert reads text; mae needs images"),
    ],
)
def test_other_architectures_are_refused(tiny_model: Tiny, kind: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load(tiny_model, kind)


@pytest.mark.parametrize(
    "wrong", [{"depth": 0}, {"width": 18}, {"width": 16, "heads": 3}, {"width": 0}]
)
def test_impossible_decoders_are_refused(tiny_model: Tiny, wrong: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="adapt.decoder"):
        load_mae(load_source(tiny_model("vit")), IMAGE_SIZE, 0.75, DECODER | wrong, seed=0)


def test_incomplete_encoders_are_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    for file in tiny_model("vit").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("encoder.layer.0.output.dense.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match="lacks the weights of layers.0.mlp.fc2"):
        load_mae(load_source(tmp_path), IMAGE_SIZE, 0.75, DECODER, seed=0)


@pytest.mark.parametrize("kind", ["dinov2_with_registers", "beit"])
def test_ddp_finds_every_parameter_used(tiny_model: Tiny, kind: str) -> None:
    source, model = load_source(tiny_model(kind)), load(tiny_model, kind)
    set_trainable(model, source.architecture_spec, "full", 0, {})
    pixels, noise = draw_batch()

    def loss(wrapped: Any) -> torch.Tensor:
        output = wrapped(pixels, noise, teacher=torch.zeros(3, 16))
        return output.logits.sum() + output.penalty.sum()

    run_two_backward_passes(model, loss)
