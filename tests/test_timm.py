"""Train, publish and reload models of timm through transformers' wrapper."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.family_grid import Family, check_every_strategy, save_stripes
from support.fresh_process import FreshProcess
from support.tiny import measure_statistics
from test_vision import copy_state, open_arm, publish, train_steps

import hftl
from hftl.adapt.mae import check_mae_architecture
from hftl.config.section import Source
from hftl.data.image_processing import build_normalizer, resize_and_crop
from hftl.errors import RecipeError
from hftl.models.model_parts import get_last_linear
from hftl.models.source import find_source, load_image_processor
from hftl.publish.settings_files import ModelConfig

timm = pytest.importorskip("timm", reason="needs timm: pip install 'hftl[timm]'")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_reload")]

STAGES = {"channels": [8, 8, 16, 16]}
TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
WINDOWS = {
    "img_size": 32, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4,
}  # fmt: skip
CONVNEXT = {"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16]}
ATTENTION = ("attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2")
SQUEEZE = ("conv_pw", "conv_pwl", "se.conv_expand", "se.conv_reduce")
ARCHITECTURES: dict[str, tuple[dict[str, Any], int, int, int, str, tuple[str, ...], str]] = {
    "resnet10t": (STAGES, 32, 4, 12, "layer4.0", ("conv1", "conv2", "downsample.1"), "fc"),
    "convnext_atto": (
        CONVNEXT, 32, 5, 10, "stages.3.blocks.0", ("mlp.fc1", "mlp.fc2"), "head.norm head.fc",
    ),
    "vit_tiny_patch16_224": (TINY_VIT, 32, 2, 8, "blocks.1", ATTENTION, "norm head"),
    "tinynet_e": ({}, 32, 10, 39, "blocks.6.0", SQUEEZE, "conv_head bn2 classifier"),
    "seresnext26d_32x4d": (
        {"layers": [1, 1, 1, 1]}, 32, 4, 20, "layer4.0",
        ("conv1", "conv3", "downsample.1", "se.fc1", "se.fc2"), "fc",
    ),
    "regnetx_002": (
        {}, 32, 13, 30, "s4.b7", ("conv1.conv", "conv3.conv", "downsample.conv"), "head.fc",
    ),
    "regnety_002": (
        {}, 32, 13, 56, "s4.b7",
        ("conv1.conv", "conv3.conv", "downsample.conv", "se.fc1", "se.fc2"), "head.fc",
    ),
    "tf_efficientnet_lite0": (
        {}, 32, 16, 31, "blocks.6.0", ("conv_pw", "conv_pwl"), "conv_head bn2 classifier",
    ),
    "mobilenetv2_035": (
        {}, 32, 17, 33, "blocks.6.0", ("conv_pw", "conv_pwl"), "conv_head bn2 classifier",
    ),
    "mobilenetv3_small_050": (
        {}, 32, 12, 40, "blocks.5.0", ("conv", *SQUEEZE), "conv_head classifier",
    ),
    "mobilenetv4_conv_small_035": (
        {}, 32, 17, 29, "blocks.4.0", ("conv", "pw_exp.conv", "pw_proj.conv"),
        "conv_head norm_head classifier",
    ),
    "lcnet_035": (
        {}, 32, 13, 17, "blocks.5.1", ("conv_pw", "se.conv_expand", "se.conv_reduce"),
        "conv_head classifier",
    ),
    "ghostnet_050": (
        {}, 32, 17, 52, "blocks.9.0",
        ("conv", "ghost1.primary_conv.0", "ghost2.primary_conv.0", "se.conv_expand",
         "se.conv_reduce", "shortcut.2"),
        "conv_head classifier",
    ),
    "convnextv2_atto": (
        CONVNEXT, 32, 5, 10, "stages.3.blocks.0", ("mlp.fc1", "mlp.fc2"), "head.norm head.fc",
    ),
    "deit3_small_patch16_224": (TINY_VIT, 32, 2, 8, "blocks.1", ATTENTION, "norm head"),
    "vit_small_patch14_dinov2": (TINY_VIT, 32, 2, 8, "blocks.1", ATTENTION, "norm head"),
    "vit_small_patch16_dinov3": (TINY_VIT, 32, 2, 8, "blocks.1", ATTENTION, "norm head"),
    "eva02_tiny_patch14_224": (
        TINY_VIT, 32, 2, 6, "blocks.1", ("attn.proj", "mlp.fc1", "mlp.fc2"), "fc_norm head",
    ),
    "beit_base_patch16_224": (
        TINY_VIT, 32, 2, 6, "blocks.1", ("attn.proj", "mlp.fc1", "mlp.fc2"), "fc_norm head",
    ),
    "swin_tiny_patch4_window7_224": (
        WINDOWS, 32, 3, 12, "layers.1.blocks.1", ATTENTION, "norm head.fc",
    ),
    "swinv2_tiny_window8_256": (
        WINDOWS, 32, 3, 15, "layers.1.blocks.1",
        ("attn.cpb_mlp.0", "attn.cpb_mlp.2", "attn.proj", "mlp.fc1", "mlp.fc2"), "norm head.fc",
    ),
    "maxvit_pico_rw_256": (
        {"img_size": 64, "embed_dim": [32, 32, 32, 32], "depths": [1, 1, 1, 1], "stem_width": 8},
        64, 4, 49, "stages.3",
        (*(f"blocks.0.{part}.{layer}" for part in ("attn_block", "attn_grid")
           for layer in ATTENTION),
         "blocks.0.conv.conv1_1x1", "blocks.0.conv.conv3_1x1", "blocks.0.conv.se.fc1",
         "blocks.0.conv.se.fc2", "blocks.0.conv.shortcut.expand"),
        "norm head.fc",
    ),
    "hiera_tiny_224": (
        {"img_size": 64, "embed_dim": 8, "num_heads": 1, "stages": [1, 1, 1, 1]}, 64, 4, 19,
        "blocks.3", (*ATTENTION, "proj"), "head.norm head.fc",
    ),
    "densenet121": (
        {"growth_rate": 4, "block_config": [2, 1, 1, 1]}, 32, 5, 10,
        "features.denseblock4.denselayer1", ("conv1", "conv2"), "features.norm5 classifier",
    ),
    "xcit_nano_12_p16_224": (
        {"depth": 2, "embed_dim": 16, "num_heads": 2}, 32, 4, 20, "cls_attn_blocks.1",
        ("attn.k", "attn.proj", "attn.q", "attn.qkv", "attn.v", "mlp.fc1", "mlp.fc2"), "norm head",
    ),
    "pvt_v2_b0": (
        {"depths": [1, 1, 1, 1]}, 32, 4, 26, "stages.3",
        ("blocks.0.attn.kv", "blocks.0.attn.proj", "blocks.0.attn.q", "blocks.0.attn.sr",
         "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "downsample.proj"),
        "head",
    ),
    "resnetv2_18": (
        {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_chs": 8}, 32, 4, 11,
        "stages.3.blocks.0", ("conv1", "conv2", "downsample.conv"), "norm head.fc",
    ),
    "nf_resnet26": ({}, 32, 8, 28, "stages.3.1", ("conv1", "conv2", "conv3", "downsample.conv"),
                    "head.fc"),
}  # fmt: skip
"""Arguments that make it small, side, blocks, LoRA's layers in all of them, the top block, LoRA's
layers by the end of their names in a block, and what comes after the blocks, the last layer last.

BiT (resnetv2_50x1_bit) is not here: timm takes its channels and not its number of blocks, and 16 at
random tell pictures apart by so little that a solved head magnifies rounding to 5e-5. `bit` of
transformers, of three blocks, is in tests/test_families.py.
"""
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def open_residual_branches(model: torch.nn.Module) -> None:
    """Give the ends of residual branches a scale, as training does; timm begins at 0 or nearly 0.

    Nothing in a branch gets a gradient while a frozen norm or layer at its end multiplies by 0, and
    a class token sees nothing of the picture while its layers are scaled by .00001.
    """
    norms = torch.nn.BatchNorm2d | torch.nn.LayerNorm
    for module in model.modules():
        if isinstance(module, norms) and not module.weight.any():
            torch.nn.init.ones_(module.weight)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2].startswith("gamma"):
            torch.nn.init.ones_(parameter)


@pytest.fixture(scope="session")
def tiny_timm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return `tiny_timm(name)`, which saves a small random model as timm does."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            arguments, side, *_ = ARCHITECTURES[name]
            torch.manual_seed(0)
            model = timm.create_model(
                name, num_classes=5, pretrained_cfg_overlay={"input_size": (3, side, side)},
                **arguments,
            )  # fmt: skip
            open_residual_branches(model)
            measure_statistics(model, side)
            made[name] = tmp_path_factory.mktemp(name)
            timm.models.save_for_hf(model.eval(), made[name], model_args=arguments)
        return made[name]

    return make


def test_masked_image_adaptation_is_refused(tmp_path: Path) -> None:
    config = {"architecture": "resnet10t", "num_classes": 2, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="runs whole pictures by timm.*or leave adapt out"):
        check_mae_architecture(find_source(Source(model=str(tmp_path))))


@every_architecture
def test_every_strategy(
    name: str, tiny_timm: Callable[..., Path], tmp_path: Path, reload_server: FreshProcess
) -> None:
    """Compare what trains with the table; stop, go on, publish and reload."""
    _, _, blocks, layers, top, targets, after = ARCHITECTURES[name]
    last = f"timm_model.{after.split()[-1]}"
    family = Family(
        f"{last}.", " ".join(f"timm_model.{part}." for part in after.split()),
        f"timm_model.{top}.", blocks, " ".join(targets), layers, last,
        "timm_model.stages.3.downsample." if name.startswith("convnext") else "",
    )  # fmt: skip
    data = save_stripes(tmp_path / "pictures")
    check_every_strategy(family, tiny_timm(name), data, tmp_path, reload_server)


@every_architecture
def test_features_are_those_before_the_classifier(
    name: str, tiny_timm: Callable[..., Path], tmp_path: Path
) -> None:
    context, _ = open_arm(tiny_timm(name), tmp_path, "head")
    rows = context.prepared.rows["test"]
    features = context.extract_features("native", 0, rows)
    model: Any = context.build_model("native", 0).model.get_submodule("timm_model")
    pixels = context.inputs.collate(context.encode_rows(rows))["pixel_values"]
    with torch.no_grad():
        expected = model.eval().forward_head(model.forward_features(pixels), pre_logits=True)
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-5, rtol=1e-4)


def test_published_labels_and_preprocessing(tiny_timm: Callable[..., Path], tmp_path: Path) -> None:
    """The new labels are read back, also after a second fine-tuning of the published model."""
    context, recipe = open_arm(tiny_timm("resnet10t"), tmp_path, "full", image_size=43)
    _, _, output = train_steps(context, recipe)
    assert publish(context, recipe, output, tmp_path) <= 1e-5
    folder = tmp_path / "publish"
    assert json.loads((folder / "config.json").read_text())["label_names"] == ["dark", "light"]
    assert ModelConfig.read(folder).label_names == ["dark", "light"]
    picture = next((tmp_path / "pictures" / "dark").iterdir())
    prediction = hftl.load(folder).predict([str(picture)])[0]
    assert prediction["label"] in ("dark", "light")
    source = find_source(Source(model=str(folder)))
    assert list(source.config.id2label.values()) == ["dark", "light"]
    assert "label_names" not in vars(source.config)


def test_scratch_is_drawn_by_timm(tiny_timm: Callable[..., Path], tmp_path: Path) -> None:
    context, _ = open_arm(tiny_timm("resnet10t"), tmp_path, "full")
    drawn = context.build_model("native", 0, scratch=True).model
    own = timm.create_model("resnet10t", num_classes=2, **STAGES)
    for path, weight in own.named_parameters():
        if weight.ndim == 4:
            ratio = drawn.get_parameter(f"timm_model.{path}").std() / weight.std()
            assert 0.8 < ratio < 1.25, path
    same = copy_state(context.build_model("native", 0, scratch=True).model)
    assert all(tensor.equal(same[name]) for name, tensor in drawn.state_dict().items())


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_canvas_is_that_of_timm(mode: str, tmp_path: Path) -> None:
    model = timm.create_model(
        "resnet10t", num_classes=5,
        pretrained_cfg_overlay={"input_size": (3, 32, 32), "crop_pct": 0.8, "crop_mode": mode},
        **STAGES,
    )  # fmt: skip
    timm.models.save_for_hf(model, tmp_path, model_args=STAGES)
    processor = load_image_processor(find_source(Source(model=str(tmp_path))))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    draw = np.random.default_rng(0)
    for width in range(60, 84, 3):
        image = Image.fromarray(draw.integers(0, 256, (60, width, 3), dtype=np.uint8))
        canvas = torch.from_numpy(resize_and_crop(processor, image))[None]
        torch.testing.assert_close(build_normalizer(processor)(canvas)[0], transform(image))


def test_refuses_what_it_cannot_train(tiny_timm: Callable[..., Path], tmp_path: Path) -> None:
    def refuse(name: str, words: str, **pretrained: Any) -> None:
        config = {"architecture": name, "num_classes": 2, "pretrained_cfg": pretrained}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(RecipeError, match=words):
            find_source(Source(model=str(tmp_path)))

    side = {"input_size": [3, 64, 64]}
    refuse(
        "resnet50d_", "timm .* has no architecture 'resnet50d_'; did you mean 'resnet50d'", **side
    )
    refuse("crossvit_tiny_240", "the classifier of timm's .* is a ModuleList", **side)
    refuse("poolformer_s12", "whose blocks timm does not name", **side)
    refuse("vgg11_bn", "whose blocks are single layers", input_size=[3, 224, 224])
    refuse("vit_tiny_patch16_224", "does not build .*doesn't match model", **side)
    config = {
        "architecture": "resnet10t", "num_classes": 2, "model_args": {"layerz": [1]},
        "pretrained_cfg": side,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="timm does not build 'resnet10t' .*'layerz'"):
        find_source(Source(model=str(tmp_path)))
    with pytest.raises(RecipeError, match="takes pictures of 32 pixels only, got 64"):
        open_arm(tiny_timm("vit_tiny_patch16_224"), tmp_path, "lora", image_size=64)


def test_the_head_is_one_linear_layer(tiny_timm: Callable[..., Path], tmp_path: Path) -> None:
    context, _ = open_arm(tiny_timm("convnext_atto"), tmp_path, "lora")
    built = context.build_model("native", 0)
    assert built.features_are_shared
    assert built.last_linear is get_last_linear(built.model, built.architecture)
    assert built.last_linear.out_features == 2
