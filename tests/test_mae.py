"""The masked autoencoder is ViTMAE's: it sees visible patches only and learns from hidden ones."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from support.ddp import run_two_backward_passes
from support.tiny import IMAGE_SIZE, tiny_processor
from transformers import AutoModel, ViTMAEForPreTraining

from hftl.adapt.encoder_io import merge_encoder_state, set_trainable
from hftl.adapt.mae import MaskedAutoencoder, compute_teacher_features, load_mae
from hftl.config.data import Data
from hftl.config.section import Source
from hftl.data.image_inputs import ImageInputs, augment_image, resize_processor
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
from hftl.models.source import SourceModel, find_source, load_processor

SUPPORTED = ("vit", "vit_mae", "deit", "dinov2", "dinov2_with_registers", "beit")
PREFIX = {"deit": 2, "dinov2_with_registers": 5}
DECODER = {"width": 16, "depth": 1, "heads": 2}
PATCHES = 16
PATCH = 8
LORA = {"r": 4, "lora_alpha": 8}

Tiny = Callable[..., Path]


def source_of(folder: Path) -> SourceModel:
    return find_source(Source(model=str(folder)))


def loaded(
    tiny_model: Tiny, kind: str, side: int = IMAGE_SIZE, ratio: float = 0.75, seed: int = 0
) -> MaskedAutoencoder:
    return load_mae(source_of(tiny_model(kind)), side, ratio, DECODER, seed)[0]


def given(batch: int = 3, side: int = IMAGE_SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and noise."""
    draw = torch.Generator().manual_seed(2)
    patches = (side // PATCH) ** 2
    return torch.randn(batch, 3, side, side, generator=draw), torch.rand(
        batch, patches, generator=draw
    )


def canvases(rows: int, side: int = IMAGE_SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, 3, side, side), dtype=np.uint8)


def inputs_of(source: SourceModel, side: int = IMAGE_SIZE) -> ImageInputs:
    more = {"interpolate_pos_encoding": True} if side != IMAGE_SIZE and (
        source.architecture_spec.image_sizes == "argument") else {}  # fmt: skip
    return ImageInputs(
        Data.model_construct(), resize_processor(load_processor(source), side), more, PATCH
    )


# Patches


def test_patchify_and_chosen_are_vit_mae_s(tiny_model: Tiny) -> None:
    stock = ViTMAEForPreTraining(tiny_config("vit_mae"))
    pixels, noise = given()
    assert torch.equal(patchify(pixels, PATCH), stock.patchify(pixels))
    back = stock.unpatchify(patchify(pixels, PATCH))
    assert torch.equal(back, pixels)
    tokens = torch.randn(3, PATCHES, 5)
    for ratio in (0.1, 0.5, 0.75, 0.9):
        stock.vit.embeddings.config.mask_ratio = ratio
        shown, mask, order = stock.vit.embeddings.random_masking(tokens, noise)
        kept, masked, restore = split_by_noise(noise, ratio)
        assert torch.equal(restore, order)
        assert torch.equal(gather_tokens(tokens, kept), shown)
        assert kept.shape[1] == int(PATCHES * (1 - ratio)) == count_visible(PATCHES, ratio)
        assert torch.equal(torch.zeros(3, PATCHES).scatter(1, masked, 1.0), mask)
        both = torch.cat([kept, masked], 1)
        assert torch.equal(both.gather(1, restore), torch.arange(PATCHES).expand(3, -1))


def test_equal_noise_goes_by_place() -> None:
    kept, masked, _ = split_by_noise(torch.zeros(1, 300), 0.5)
    assert kept.tolist() == [list(range(150))] and masked.tolist() == [list(range(150, 300))]


def test_a_rest_that_fills_no_patch_is_left_out() -> None:
    pixels = torch.randn(2, 3, 37, 35)
    assert torch.equal(patchify(pixels, 8), patchify(pixels[..., :32, :32], 8))


@pytest.mark.parametrize("norm", [False, True])
def test_targets_by_hand(norm: bool) -> None:
    pixels, noise = given()
    _, masked, _ = split_by_noise(noise, 0.75)
    found = build_pixel_targets(pixels, PATCH, masked, norm)
    for row, ids in enumerate(masked.tolist()):
        for place, number in enumerate(ids):
            top, left = divmod(number, IMAGE_SIZE // PATCH)
            part = pixels[row, :, top * 8 : top * 8 + 8, left * 8 : left * 8 + 8]
            part = part.permute(1, 2, 0).flatten().double().numpy()
            if norm:
                part = (part - part.mean()) / np.sqrt(part.var(ddof=1) + 1e-6)
            assert np.abs(found[row, place].numpy() - part).max() < 1e-5


def test_near_constant_patches_are_left_out_of_normalised_targets_alone() -> None:
    pictures = torch.from_numpy(canvases(1))
    pictures[0, :, :8, :8] = 255  # patch 0: white
    pictures[0, :, :8, 8:16] = 250 + torch.arange(64).reshape(8, 8) % 2  # patch 1: noise
    pictures[0, :, :8, 16:24] = 255
    pictures[0, :, 3, 16:24] = 0  # patch 2: a line
    pictures[0, :, :8, 24:32] = torch.tensor([200, 0, 0]).view(3, 1, 1)  # patch 3: red
    even = find_uniform_patches(pictures, PATCH)
    assert even.tolist() == [[True, True] + [False] * 14]
    spread = patchify(pictures.double(), PATCH).std(-1)
    assert torch.equal(even, spread < UNIFORM_DEVIATION)
    masked = torch.tensor([[5, 1, 3, 0]])
    plain = build_pixel_targets(pictures.float(), PATCH, masked, False, even)
    assert plain.isfinite().all()
    found = build_pixel_targets(pictures.float(), PATCH, masked, True, even)
    assert found.isnan().all(-1).tolist() == [[False, True, False, True]]
    assert found[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, 0.95, float("nan")])
def test_ratios_that_leave_nothing_are_refused(tiny_model: Tiny, ratio: float) -> None:
    with pytest.raises(RecipeError, match="adapt.mask_ratio.*leaves none (visible|masked)"):
        split_by_noise(torch.rand(1, PATCHES), ratio)
    with pytest.raises(RecipeError, match="adapt.mask_ratio"):
        loaded(tiny_model, "vit", ratio=ratio)


@pytest.mark.parametrize(
    ("side", "says"), [(8, "holds 1 patch of 8"), (7, "not even one patch"), (15, "holds 1 patch")]
)
def test_pictures_of_one_patch_are_refused(tiny_model: Tiny, side: int, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        loaded(tiny_model, "dinov2", side=side)
    with pytest.raises(RecipeError, match=says):
        MaskedImageDataset(canvases(2, side), [b"a", b"b"], PATCH, 0)
    assert count_patches(16, 8) == 4


def test_noise_is_a_function_of_seed_epoch_and_picture() -> None:
    pictures = MaskedImageDataset(canvases(3), [b"a", b"b", b"c"], PATCH, 7)
    first = [pictures[i]["noise"] for i in range(3)]
    pictures.set_epoch(1)
    second = [pictures[i]["noise"] for i in range(3)]
    pictures.set_epoch(0)
    assert all(torch.equal(pictures[i]["noise"], first[i]) for i in range(3))
    every = [*first, *second, draw_patch_noise(PATCHES, 8, 0, b"a")]
    assert len({tuple(noise.tolist()) for noise in every}) == 7
    assert all(noise.dtype == torch.float32 and noise.shape == (PATCHES,) for noise in every)
    fixed = MaskedImageDataset(canvases(3), [b"a", b"b", b"c"], PATCH, 7, fixed=True)
    fixed.set_epoch(5)
    assert torch.equal(fixed[1]["noise"], first[1])


def test_augmented_pictures_change_by_epoch_and_have_no_teacher() -> None:
    change = partial(_augmented, seed=3)
    pictures = MaskedImageDataset(canvases(1), [b"a"], PATCH, 3, change)
    first = pictures[0]["pixel_values"]
    assert first.dtype == torch.uint8
    pictures.set_epoch(1)
    assert not torch.equal(pictures[0]["pixel_values"], first)
    with pytest.raises(RecipeError, match="data.augment=none"):
        MaskedImageDataset(canvases(1), [b"a"], PATCH, 3, change, np.zeros((1, 16), np.float32))


def _augmented(row: dict[str, Any], epoch: int, key: bytes, seed: int) -> dict[str, Any]:
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
def test_collated_batch(tiny_model: Tiny, norm: bool) -> None:
    source = source_of(tiny_model("vit"))
    pictures = canvases(3)
    pictures[1] = 255
    rows = MaskedImageDataset(
        pictures, [b"a", b"b", b"c"], PATCH, 0, teacher=np.ones((3, 16), np.float32)
    )
    inputs = inputs_of(source)
    batch = collate_masked_images([rows[i] for i in range(3)], inputs, 0.75, norm)
    assert set(batch) == {"pixel_values", "noise", "teacher", "labels"}
    assert batch["pixel_values"].dtype == torch.float32 and batch["teacher"].shape == (3, 16)
    plain = inputs.collate([{"pixel_values": picture} for picture in pictures])["pixel_values"]
    assert torch.equal(batch["pixel_values"], plain)
    assert batch["labels"].shape == (3, 12, 192)
    assert batch["labels"].isnan().any(-1).any(-1).tolist() == [False, norm, False]
    kept = [0, 2]
    _, masked, _ = split_by_noise(batch["noise"], 0.75)
    assert torch.equal(batch["labels"][kept], build_pixel_targets(plain, PATCH, masked, norm)[kept])
    larger = inputs_of(source, 48)
    rows = MaskedImageDataset(canvases(2, 48), [b"a", b"b"], PATCH, 0)
    batch = collate_masked_images([rows[0], rows[1]], larger, 0.5, norm)
    assert batch["interpolate_pos_encoding"] is True and batch["noise"].shape == (2, 36)


# The objective


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_the_loss_is_vit_mae_s(tiny_model: Tiny, norm: bool, ratio: float) -> None:
    source = source_of(tiny_model("vit_mae"))
    model, fresh = load_mae(source, IMAGE_SIZE, ratio, DECODER, seed=0)
    assert fresh == ()
    stock: Any = ViTMAEForPreTraining.from_pretrained(source.folder)
    stock.config.norm_pix_loss, stock.config.mask_ratio = norm, ratio
    stock.eval(), model.eval()
    pixels, noise = given()
    theirs = stock(pixel_values=pixels, noise=noise)
    _, masked, _ = split_by_noise(noise, ratio)
    ours = model(pixels, noise)
    loss = (ours.logits - build_pixel_targets(pixels, PATCH, masked, norm)).square().mean()
    assert (gather_tokens(theirs.logits, masked) - ours.logits).abs().max() < 1e-5
    assert abs(theirs.loss - loss) < 1e-5
    theirs.loss.backward()
    loss.backward()
    expected = {n.removeprefix("vit."): p.grad for n, p in stock.named_parameters()}
    found = {n.removeprefix("encoder."): p.grad for n, p in model.named_parameters()}
    # transformers' loader makes the fixed positions of a decoder trainable.
    checked = [n for n, g in expected.items() if g is not None and n != "decoder.decoder_pos_embed"]
    assert len(checked) > 50
    assert max((expected[name] - found[name]).abs().max() for name in checked) < 1e-5


def test_a_vit_mae_decoder_takes_positions_of_another_size(tiny_model: Tiny) -> None:
    source = source_of(tiny_model("vit_mae"))
    model, fresh = load_mae(source, 48, 0.75, DECODER, seed=0)
    stock: Any = ViTMAEForPreTraining(tiny_config("vit_mae", image_size=48))
    stock.decoder.initialize_weights(36)
    decoder: Any = model.decoder
    assert fresh == () and torch.equal(decoder.decoder_pos_embed, stock.decoder.decoder_pos_embed)
    stored = load_file(source.folder / "model.safetensors")
    assert torch.equal(decoder.mask_token, stored["decoder.mask_token"])
    assert torch.equal(decoder.decoder_pred.weight, stored["decoder.decoder_pred.weight"])
    pixels, noise = given(side=48)
    logits = model(pixels, noise, interpolate_pos_encoding=True).logits
    assert logits.shape == (3, 27, 192) and logits.isfinite().all()


def test_a_vit_mae_checkpoint_without_its_decoder_gets_a_new_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModel.from_config(tiny_config("vit_mae")).save_pretrained(tmp_path)
    tiny_processor(tmp_path)
    model, fresh = load_mae(source_of(tmp_path), IMAGE_SIZE, 0.75, DECODER, seed=0)
    assert set(fresh) == set(model.head_parameters()) and "decoder.mask_token" in fresh


@pytest.mark.parametrize("kind", SUPPORTED)
@pytest.mark.parametrize("side", [IMAGE_SIZE, 48])
@pytest.mark.parametrize("method", ["head", "full", "lora", "lora+blocks"])
def test_every_architecture_learns(tiny_model: Tiny, kind: str, side: int, method: str) -> None:
    source = source_of(tiny_model(kind))
    model = loaded(tiny_model, kind, side)
    set_trainable(model, source.architecture_spec, method, 1, LORA)
    rows = MaskedImageDataset(canvases(3, side), [b"a", b"b", b"c"], PATCH, 0)
    batch = collate_masked_images([rows[i] for i in range(3)], inputs_of(source, side), 0.75, True)
    labels = batch.pop("labels")
    found = model(**batch)
    assert found.logits.shape == labels.shape and found.penalty is None
    loss = (found.logits - labels).square().mean()
    assert loss.isfinite()
    loss.backward()
    named = dict(model.named_parameters())
    assert not [name for name, p in named.items() if p.requires_grad and p.grad is None]
    assert all(p.requires_grad for p in model.head_parameters().values())
    trains = {name for name, p in model.encoder.named_parameters() if p.requires_grad}
    whole = {name for name in trains if "lora_" not in name}
    if method == "full":
        never = {name for name, p in model.encoder.named_parameters() if not p.requires_grad}
        assert all(name.split(".")[1] in ("mask_token", "position_embeddings") or
                   name.startswith("pooler") for name in never)  # fmt: skip
        assert ("embeddings.position_embeddings" in never) == (kind == "vit_mae")
    elif method == "head":
        assert not trains
    else:
        assert any("lora_" in name for name in trains)
        assert (method == "lora+blocks") == bool(whole)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_the_encoder_sees_visible_patches_only(tiny_model: Tiny, kind: str) -> None:
    model = loaded(tiny_model, kind)
    seen: list[int] = []
    encoder = model.encoder
    first = encoder.encoder.layer[0] if "dinov2" in kind else encoder.layers[0]
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    pixels, noise = given()
    found = model(pixels, noise)
    prefix = PREFIX.get(kind, 1)
    assert seen == [prefix + (PATCHES if kind == "beit" else 4)]
    assert found.logits.shape[1] == 12
    encoder(pixel_values=pixels)
    assert seen[1] == prefix + PATCHES


@pytest.mark.parametrize("kind", SUPPORTED)
def test_hidden_pixels_change_no_prediction_and_visible_ones_no_target(
    tiny_model: Tiny, kind: str
) -> None:
    model = loaded(tiny_model, kind).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    pixels, noise = given()
    pixels.requires_grad = True
    _, masked, _ = split_by_noise(noise, 0.75)
    hidden = torch.zeros(3, PATCHES, dtype=torch.bool).scatter(1, masked, True)
    said = torch.autograd.grad(model(pixels, noise).logits.square().sum(), pixels)[0]
    by_patch = patchify(said, PATCH).abs().amax(-1)
    assert (by_patch[hidden] == 0).all() and (by_patch[~hidden] > 0).all()
    asked = torch.autograd.grad(
        build_pixel_targets(pixels, PATCH, masked, True).square().sum(), pixels
    )[0]
    by_patch = patchify(asked, PATCH).abs().amax(-1)
    assert (by_patch[~hidden] == 0).all() and (by_patch[hidden] > 0).all()


def test_positions_are_added_before_patches_are_dropped(tiny_model: Tiny) -> None:
    model = loaded(tiny_model, "vit").eval()
    pixels, noise = given(1)
    kept, _, _ = split_by_noise(noise, 0.75)
    caught: list[torch.Tensor] = []
    model.encoder.layers[0].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    model(pixels, noise)
    model.encoder(pixel_values=pixels)
    expected = torch.cat([caught[1][:, :1], gather_tokens(caught[1][:, 1:], kept)], 1)
    assert torch.equal(caught[0], expected)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_penalty_is_the_distance_to_the_original_on_whole_pictures(
    tiny_model: Tiny, kind: str
) -> None:
    source = source_of(tiny_model(kind))
    model = loaded(tiny_model, kind)
    pictures, inputs = canvases(5), inputs_of(source)
    teacher = compute_teacher_features(model, pictures, inputs)
    plain: Any = AutoModel.from_pretrained(source.folder, config=source.config).eval()
    whole = inputs.collate([{"pixel_values": picture} for picture in pictures])["pixel_values"]
    with torch.no_grad():
        hidden = plain(pixel_values=whole).last_hidden_state
    expected = hidden[:, PREFIX.get(kind, 1) :].mean(1)
    assert teacher.shape == (5, 16) and (teacher - expected).abs().max() < 1e-5
    rows = MaskedImageDataset(pictures, [bytes([i]) for i in range(5)], PATCH, 0,
                          teacher=teacher.numpy())  # fmt: skip
    batch = collate_masked_images([rows[i] for i in range(5)], inputs, 0.75, True)
    batch.pop("labels")
    assert model(**batch).penalty.abs().max() < 1e-8
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    found = model(**batch)
    now = compute_teacher_features(model, pictures, inputs)
    assert (found.penalty - (now - teacher).square().mean(1)).abs().max() < 1e-5
    assert found.penalty.shape == (5,) and found.penalty.min() > 0
    without = model(**{key: value for key, value in batch.items() if key != "teacher"})
    assert torch.equal(without.logits, found.logits) and without.penalty is None


@pytest.mark.parametrize("kind", SUPPORTED)
def test_the_merged_encoder_is_the_live_one(tiny_model: Tiny, kind: str) -> None:
    source = source_of(tiny_model(kind))
    model = loaded(tiny_model, kind)
    set_trainable(model, source.architecture_spec, "lora+blocks", 1, LORA)
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    fresh: Any = AutoModel.from_pretrained(source.folder, config=source.config).eval()
    before = fresh.state_dict()
    state = merge_encoder_state(model)
    missing, unexpected = fresh.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("pooler") for name in missing)
    assert all(state[name].shape == before[name].shape for name in state)
    pixels, _ = given()
    with torch.no_grad():
        live = model.encoder(pixel_values=pixels).last_hidden_state
        assert (live - fresh(pixel_values=pixels).last_hidden_state).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["vit", "vit_mae", "beit"])
def test_a_trained_decoder_is_loaded_from_an_earlier_stage(
    tiny_model: Tiny, kind: str, tmp_path: Path
) -> None:
    source = source_of(tiny_model(kind))
    first = loaded(tiny_model, kind).eval()
    with torch.no_grad():
        for parameter in first.head_parameters().values():
            parameter.add_(0.5)
    file = tmp_path / "head.safetensors"
    save_file(first.head_state(), file)
    second, fresh = load_mae(source, IMAGE_SIZE, 0.75, DECODER, seed=9, head=file)
    pixels, noise = given()
    assert fresh == ()
    assert torch.equal(first(pixels, noise).logits, second.eval()(pixels, noise).logits)
    if kind == "vit":
        with pytest.raises(RecipeError, match=r"decoder.* \(16,\), expected \(32,\)"):
            load_mae(source, IMAGE_SIZE, 0.75, DECODER | {"width": 32}, seed=9, head=file)


def test_a_new_decoder_is_a_function_of_the_seed(tiny_model: Tiny) -> None:
    for kind in ("dinov2", "beit"):
        one, same, other = (loaded(tiny_model, kind, seed=s).head_state() for s in (1, 1, 2))
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("swin", "swin shifts windows over the full grid"),
        ("swinv2", "swinv2 shifts windows over the full grid"),
        ("siglip", "siglip is no architecture that mae knows.*vit_mae, vit, deit, beit, dinov2"),
        ("bert", "bert reads text; mae needs images"),
    ],
)
def test_other_architectures_are_refused(tiny_model: Tiny, kind: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        loaded(tiny_model, kind)


@pytest.mark.parametrize(
    "wrong", [{"depth": 0}, {"width": 18}, {"width": 16, "heads": 3}, {"width": 0}]
)
def test_a_decoder_that_cannot_be_is_refused(tiny_model: Tiny, wrong: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="adapt.decoder"):
        load_mae(source_of(tiny_model("vit")), IMAGE_SIZE, 0.75, DECODER | wrong, seed=0)


def test_an_incomplete_encoder_is_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    for file in tiny_model("vit").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("encoder.layer.0.output.dense.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match="lacks the weights of layers.0.mlp.fc2"):
        load_mae(source_of(tmp_path), IMAGE_SIZE, 0.75, DECODER, seed=0)


@pytest.mark.parametrize("kind", ["dinov2_with_registers", "beit"])
def test_ddp_finds_every_parameter_used(tiny_model: Tiny, kind: str) -> None:
    source = source_of(tiny_model(kind))
    model = loaded(tiny_model, kind)
    set_trainable(model, source.architecture_spec, "full", 0, {})
    pixels, noise = given()

    def loss(wrapped: Any) -> torch.Tensor:
        found = wrapped(pixels, noise, teacher=torch.zeros(3, 16))
        return found.logits.sum() + found.penalty.sum()

    run_two_backward_passes(model, loss)
