"""Check hftl's own head on pooled tokens of images: features, what trains, what is published."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bench_of, pictures
from support.tiny import tiny_config
from transformers import AutoModel, ViTModel

import hftl
from hftl.analysis.feature_store import FeatureStore
from hftl.config.finetune import Finetune
from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.errors import RecipeError
from hftl.finetune.pretraining_heads import embed_compared_rows, embed_source
from hftl.finetune.trainable import apply_strategy, prepare
from hftl.init import write_recipe
from hftl.models.architectures import ARCHITECTURES, UNHEADED_ENCODERS, get_config_spec
from hftl.models.encoders import get_blocks
from hftl.models.heads import build_model, get_source_pooling
from hftl.models.layer_features import LayerSite
from hftl.models.lora import list_adapted_layers
from hftl.models.source import find_source, load_image_processor
from hftl.pipeline import pipeline

Tiny = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("fast_reload")

PREFIXES = {
    "vit": 1, "deit": 2, "vit_msn": 1, "dinov2": 1, "dinov2_with_registers": 5, "dinov3_vit": 3,
    "dinov3_convnext": 1,
}  # fmt: skip
"""Tokens before those of the patches in the tiny models: class tokens and registers."""
POOLINGS = ("cls", "mean", "cls+mean")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures") / "p", 20)


def make_recipe(model: Path, folder: Path, **more: Any) -> Recipe:
    training = {"num_train_epochs": 1, "learning_rate": 1e-2, "bf16": False}
    finetune = {
        "pooling": "cls", "training": training, "lora": {"r": 2}, "blocks": 1,
    } | more.pop("finetune", {})  # fmt: skip
    return Recipe.parse({
        "source": {"model": str(model), "published_as": "org/source"},
        "data": {"train": {"path": str(folder)}} | more.pop("data", {}),
        "finetune": finetune, "measure": {"seeds": [0], "arms": []} | more.pop("measure", {}),
        **more,
    })  # fmt: skip


def pool(hidden: torch.Tensor, prefix: int, pooling: str) -> np.ndarray:
    parts = {"cls": [hidden[:, 0]], "mean": [hidden[:, prefix:].mean(1)]}
    parts["cls+mean"] = [*parts["cls"], *parts["mean"]]
    return torch.cat(parts[pooling], 1).numpy()


@pytest.mark.parametrize("name", PREFIXES)
def test_features_are_pooled_states_of_the_plain_encoder(
    name: str, tiny_model: Tiny, folder: Path
) -> None:
    context = bench_of(make_recipe(tiny_model(name), folder))
    rows = context.prepared.rows["test"]
    encoder = AutoModel.from_pretrained(tiny_model(name)).eval()
    batch = context.inputs.collate([dict(row) for row in context.encode_rows(rows)])
    with torch.no_grad():
        hidden = encoder(pixel_values=batch["pixel_values"]).last_hidden_state
    for pooling in POOLINGS:
        features = context.extract_features(pooling, 0, rows)
        expected = pool(hidden, PREFIXES[name], pooling)
        np.testing.assert_allclose(features, expected, atol=1e-5)
        assert np.ptp(features, axis=0).max() > 1e-3, "pictures differ"


def test_every_entry_with_a_class_token_is_tested() -> None:
    names = ARCHITECTURES.keys() - {"timm_wrapper"} | UNHEADED_ENCODERS.keys()
    prefixes = {name: get_config_spec(tiny_config(name)).prefix_tokens for name in names}
    assert {name: count for name, count in prefixes.items() if count} == PREFIXES
    config = tiny_config("beit", use_mean_pooling=False)
    assert get_config_spec(config).prefix_tokens == 1


CONVNEXT_TOP = ("encoder.model.stages.1.layers.0.", "encoder.layer_norm.", "head.")
TOPS = {
    "vit": ("encoder.layers.2.", "encoder.layernorm.", "head."),
    "dinov2": ("encoder.encoder.layer.2.", "encoder.layernorm.", "head."),
    "dinov3_vit": ("encoder.model.layer.2.", "encoder.norm.", "head."),
    "dinov3_convnext": CONVNEXT_TOP,
}
"""The start of the names of what `partial` trains of one block."""
LORA_LAYERS = {"vit": 18, "dinov2": 18, "dinov3_vit": 18, "dinov3_convnext": 6}


@pytest.mark.parametrize("strategy", ["head", "partial", "gradual", "full", "lora"])
@pytest.mark.parametrize("name", TOPS)
def test_what_is_intended_trains_and_the_rest_does_not_move(
    name: str, strategy: str, tiny_model: Tiny
) -> None:
    source = find_source(Source(model=str(tiny_model(name))))
    built = build_model(source, "classification", "cls+mean", 2, ["a", "b"], 0)
    unused = "encoder.embeddings.mask_token"
    every = ("encoder.", "head.")
    starts = {"head": ("head.",), "partial": TOPS[name], "lora": ("head.",)}.get(strategy, every)
    model = prepare(built.model, strategy, blocks=1, fresh=built.fresh)
    for path, parameter in model.named_parameters():
        expected = path.startswith(starts) and path != unused or ".lora_" in path
        assert parameter.requires_grad == expected, path
    if strategy == "lora":
        assert len(list_adapted_layers(model)) == LORA_LAYERS[name]
    before = {path: tensor.detach().clone() for path, tensor in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for seed in range(2):
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        logits = model(pixel_values=images).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
        assert all(p.grad is not None for p in trained)
        optimizer.zero_grad()
    for path, parameter in model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[path]), path
    moved = {path for path, p in model.named_parameters() if not torch.equal(p, before[path])}
    assert all(any(path.startswith(start) for path in moved) for start in starts)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("dinov3_vit", {}), ("dinov3_vit", {"use_gated_mlp": True}), ("dinov3_convnext", {})],
)
def test_entry_without_a_stock_class_is_what_runs(name: str, changes: dict[str, Any]) -> None:
    model = AutoModel.from_config(tiny_config(name, **changes)).train()
    spec = get_config_spec(model.config)
    blocks = get_blocks(model, spec)
    calls: list[Any] = []
    for module in model.modules():
        if module in blocks or list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda m, *_: calls.append(m))
    hidden = model(pixel_values=torch.rand(2, 3, 64, 64)).last_hidden_state
    hidden.square().sum().backward()
    assert [module for module in calls if module in blocks] == blocks
    after = calls[calls.index(blocks[-1]) + 1 :]
    assert after == [model.get_submodule(path) for path in spec.final_parts]
    without = {path for path, p in model.named_parameters() if p.grad is None}
    assert without == ({"embeddings.mask_token"} if name == "dinov3_vit" else set())


@pytest.mark.parametrize(
    ("name", "strategy", "pooling", "more"),
    [
        ("dinov3_vit", "lora", "cls+mean", {"retain": {"kl": {"on": "relational"}}}),
        ("vit_mae", "lora", "cls", {"data": {"image_size": 48}}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("dinov3_convnext", "partial", "cls", {}),
                ("dinov3_convnext", "lora", "mean", {}),
                ("dinov2_with_registers", "gradual", "mean", {}), ("deit", "full", "cls+mean", {}),
                ("dinov2", "head", "cls", {}), 
                ("dinov3_vit", "full", "mean",
                 {"measure": {"arms": ["scratch", "head"], "scratch": {"learning_rates": [1e-3]}}}),
            )
        ),
    ],
)  # fmt: skip
def test_runs_are_published_and_reload(
    name: str, strategy: str, pooling: str, more: dict[str, Any], tiny_model: Tiny, folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    finetune = {"strategy": strategy, "pooling": pooling}
    recipe = make_recipe(tiny_model(name), folder, finetune=finetune, **more)
    record = pipeline.run(recipe, tmp_path / "run")
    assert record is not None and record["reload_difference"] < 1e-5
    publish = tmp_path / "run" / "publish"
    assert (publish / "head.safetensors").exists()
    assert (publish / "adapter_config.json").exists() == (strategy == "lora")
    picture = sorted((folder / "dark").iterdir())[0]
    predictor = hftl.load(tmp_path / "run")
    (predicted,) = predictor.predict([picture])
    card = (publish / "README.md").read_text("utf-8")
    assert f"its head above {pooling} pooling is in" in card
    logits = run_snippet(card, publish, tiny_model(name), str(picture))
    assert predicted["label"] == ["dark", "light"][int(logits.argmax())]
    if predictor.temperature is None:
        shares = list(predicted["scores"].values())  # pyright: ignore[reportTypedDictNotRequiredAccess]
        np.testing.assert_allclose(torch.softmax(logits, -1)[0], shares, atol=1e-4)


def run_snippet(card: str, publish: Path, base: Path, picture: str) -> torch.Tensor:
    """Run the card's code for plain libraries on a picture, and return its logits."""
    code = card.split("with the plain libraries:")[1].split("```python\n")[1].split("```")[0]
    code = re.sub(r'Image\.open\("[^"]*"\)', f"Image.open({picture!r})", code)
    code = code.replace('path = "."', f"path = {str(publish)!r}")
    code = code.replace('"org/source"', repr(str(base))).replace("print(", "logits = (")
    space: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), space)  # noqa: S102
    return space["logits"]


@pytest.mark.parametrize("name", ["dinov2", "dinov3_vit"])
def test_forgetting_compares_one_pooling_of_the_same_encoder(
    name: str, tiny_model: Tiny, folder: Path
) -> None:
    context = bench_of(make_recipe(tiny_model(name), folder))
    assert get_source_pooling(context.source) == ("native" if name == "dinov2" else "cls")
    before = embed_source(context, 0)["new"]
    for pooling in ("cls+mean", "cls"):
        built = context.build_model(pooling, 0)
        model = apply_strategy(built.model, Finetune(strategy="lora"), built.fresh)
        loaded = type(built)(model, built.architecture, pooling, built.fresh)
        np.testing.assert_allclose(embed_compared_rows(context, loaded)["new"], before, atol=1e-6)


@pytest.mark.parametrize("name", ["dinov3_vit", "dinov3_convnext"])
def test_layers_are_probed_without_a_stock_class(
    name: str, tiny_model: Tiny, folder: Path, tmp_path: Path
) -> None:
    context = bench_of(make_recipe(tiny_model(name), folder))
    store, rows = FeatureStore(context, tmp_path), context.prepared.rows["train"][:6]
    store.compute(rows)
    assert {site.pooling for site in store.sites} == {"cls", "mean"}
    for pooling in ("cls", "mean"):
        site = LayerSite(store.layers, pooling)
        expected = context.extract_features(pooling, 0, rows)
        np.testing.assert_allclose(store.get(rows, site), expected, atol=1e-5)
    assert store.find_site("native") is None and store.count_parameters() > 0


def test_processor_of_dinov3_needs_no_torchvision(tiny_model: Tiny, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny_model("dinov3_vit"))
    model.save_pretrained(tmp_path)
    settings = {
        "image_processor_type": "DINOv3ViTImageProcessorFast", "do_center_crop": None,
        "do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2,
        "size": {"height": 48, "width": 48}, "image_mean": [0.4, 0.5, 0.6], "crop_size": None,
        "image_std": [0.2, 0.2, 0.3], "rescale_factor": 1 / 255, "device": None,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = load_image_processor(find_source(Source(model=str(tmp_path))))
    grey = np.full((30, 20, 3), 51, dtype=np.uint8)
    pixels = processor(grey, return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 48)
    np.testing.assert_allclose(pixels[0, :, 7, 7], [-1.0, -1.5, -4 / 3], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "pooling", "message"),
    [
        ("dinov3_vit", "native", r"no classification class for dinov3_vit.* Set .*cls, mean or"),
        ("resnet", "mean", r"pooling=mean is for encoders with a class token.* pools resnet\. Use "
                           r"finetune.pooling=native"),
        ("swin", "cls", "pooling=cls is for encoders with a class token"),
        ("clip", "cls+mean", r"pools clip\. Use finetune.pooling=native"),
        ("vit", "last", r"is for vision-language sources, .*none\. Use finetune.pooling=native"),
        ("bert", "cls+mean", "pooling=cls\\+mean is for pictures, and source.model reads text"),
    ],
)  # fmt: skip
def test_what_the_source_cannot_be_pooled_by_is_one_line(
    name: str, pooling: str, message: str, tiny_model: Tiny
) -> None:
    source = find_source(Source(model=str(tiny_model(name))))
    with pytest.raises(RecipeError, match=message):
        build_model(source, "classification", pooling, 2, ["a", "b"], 0)


def test_init_pools_what_has_no_stock_class(folder: Path, tmp_path: Path) -> None:
    for name, pooling in (
        ("facebook/dinov3-vits16-pretrain-lvd1689m", "cls"), ("facebook/dinov2-small", "native"),
        ("HuggingFaceTB/SmolVLM-256M-Instruct", "last"), ("timm/resnet50.a1_in1k", "native"),
    ):  # fmt: skip
        path, _ = write_recipe(folder, name, tmp_path / f"{name.split('/')[1]}.yaml")
        assert Recipe.load(path).finetune.pooling == pooling


def test_masked_image_checkpoint_is_read_whole(tiny_model: Tiny) -> None:
    source = find_source(Source(model=str(tiny_model("vit_mae"))))
    built = build_model(source, "classification", "mean", 2, ["a", "b"], 0)
    assert type(built.encoder) is ViTModel and built.features_are_shared
