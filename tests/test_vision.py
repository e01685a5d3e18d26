"""Train convolutional and hierarchical image encoders by every strategy, and publish them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bench_of, pictures
from safetensors.torch import save_file
from torch import Tensor
from transformers import set_seed

from hftl.adapt.mae import check_mae_architecture
from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.errors import RecipeError
from hftl.finetune.arm import fit_model, predict_trained, train_arm
from hftl.finetune.context import ExperimentContext
from hftl.finetune.trainable import apply_strategy
from hftl.models.heads import LoadedModel
from hftl.models.lora import list_adapted_layers
from hftl.models.source import find_source
from hftl.publish.checks import measure_reload_difference
from hftl.publish.export import export_model, rebuild_model, write_reload_sample

Tiny = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("fast_reload")

ENCODERS = {
    "resnet": ("encoder.stages.1.layers.0", 11),
    "regnet": ("encoder.stages.1.layers.0", 14),
    "convnext": ("encoder.stages.1.layers.0 layernorm", 6),
    "convnextv2": ("encoder.stages.1.layers.0 layernorm", 6),
    "efficientnet": ("encoder.blocks.1 encoder.top_conv encoder.top_bn", 7),
    "mobilevit": ("encoder.layer.4 conv_1x1_exp", 80),
    "pvt_v2": ("encoder.layers.1.blocks.1 encoder.layers.1.layer_norm", 19),
    "swinv2": ("encoder.layers.1.blocks.1 layernorm", 24),
    "hiera": ("encoder.stages.2.layers.1 pooler", 18),
}
"""What `partial` trains of one block beside the head, and how many layers LoRA wraps."""
FAST = ("resnet", "convnext", "efficientnet", "pvt_v2", "hiera")
WITH_BATCH_NORM = ("resnet", "regnet", "efficientnet", "mobilevit")


def open_arm(
    model: Path, folder: Path, strategy: str, image_size: int | None = None, **finetune: Any
) -> tuple[Any, Recipe]:
    """Return the context and recipe of two steps of training on a few pictures."""
    training = {"max_steps": 2, "learning_rate": 1e-3, "bf16": False}
    recipe = Recipe.parse({
        "source": {"model": str(model)},
        "data": {
            "train": {"path": str(pictures(folder / "pictures", 14))}, "image_size": image_size,
        },
        "finetune": {"strategy": strategy, "blocks": 1, "training": training, "lora": {"r": 2},
                     **finetune},
    })  # fmt: skip
    return bench_of(recipe), recipe


def copy_state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train_steps(context: ExperimentContext, recipe: Recipe) -> tuple[Any, set[str], Any]:
    """Train as an arm does; return the model, the tensors that moved, and the arm's output."""
    finetune = context.decide_batchnorm(recipe.finetune, 0)
    built = context.build_probed_model(finetune.pooling, 0)
    set_seed(0)
    model = apply_strategy(built.model, finetune, built.fresh)
    before = copy_state(model)
    prepared = LoadedModel(model, built.architecture, built.pooling, built.fresh)
    output = predict_trained(context, fit_model(context, prepared, finetune, 0), compared=True)
    after = model.state_dict()
    moved = {name for name, tensor in before.items() if not tensor.equal(after[name])}
    return model, moved, output


def publish(context: ExperimentContext, recipe: Recipe, output: Any, folder: Path) -> float:
    """Publish what an arm left, and return how far a fresh process is from its logits."""
    save_file(output.weights, folder / "weights.safetensors")
    model = rebuild_model(context, recipe.finetune, 0, folder / "weights.safetensors")
    export_model(context, model, recipe.finetune, folder / "publish")
    sample = write_reload_sample(context, output.logits["test"], folder)
    return measure_reload_difference(folder / "publish", context.source.folder, sample, "cpu")


@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in sorted(ENCODERS)],
)
def test_what_trains_moves_and_is_published(name: str, tiny_model: Tiny, tmp_path: Path) -> None:
    tops, layers = ENCODERS[name]
    for strategy in ("partial", "lora"):
        folder = tmp_path / strategy
        folder.mkdir()
        context, recipe = open_arm(tiny_model(name), folder, strategy)
        model, moved, output = train_steps(context, recipe)
        trains = {path for path, p in model.named_parameters() if p.requires_grad}
        assert moved <= trains and len(moved) > len(trains) / 2
        if strategy == "partial":
            starts = (*(f"{name}.{top}." for top in tops.split()), "classifier.")
            assert all(path.startswith(starts) for path in trains)
            assert all(any(path.startswith(start) for path in moved) for start in starts)
        else:
            assert len(list_adapted_layers(model)) == layers
            heads = [path for path in trains if ".lora_" not in path]
            assert heads and all(".classifier.modules_to_save." in path for path in heads)
        assert publish(context, recipe, output, folder) <= 1e-5
        again = train_arm(context, recipe.finetune, 0)
        assert all(tensor.equal(again.weights[key]) for key, tensor in output.weights.items())


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_batch_norm_moves_where_it_trains_and_is_not_held(
    name: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    context, recipe = open_arm(tiny_model(name), tmp_path, "partial", freeze_batchnorm=False)
    model, moved, output = train_steps(context, recipe)
    trains = {path for path, p in model.named_parameters() if p.requires_grad}
    statistics = {path for path, _ in model.named_buffers() if ".running_" in path}
    owners = {path.rsplit(".", 1)[0] for path in trains}
    expected = {path for path in statistics if path.rsplit(".", 1)[0] in owners}
    assert expected and expected < statistics
    assert {path for path in moved - trains if "num_batches" not in path} == expected
    assert output.facts.freeze_batchnorm is False
    assert publish(context, recipe, output, tmp_path) <= 1e-5


def test_few_rows_hold_the_statistics_and_many_estimate_them_anew(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, recipe = open_arm(tiny_model("resnet"), tmp_path, "full")
    assert context.decide_batchnorm(recipe.finetune, 0).freeze_batchnorm
    model, moved, output = train_steps(context, recipe)
    assert output.facts.freeze_batchnorm is True
    assert moved == {path for path, _ in model.named_parameters()}
    monkeypatch.setattr("hftl.finetune.context.MIN_BATCHNORM_ROWS", 5)
    assert not context.decide_batchnorm(recipe.finetune, 0).freeze_batchnorm
    given = recipe.finetune.model_copy(update={"freeze_batchnorm": True})
    assert context.decide_batchnorm(given, 0).freeze_batchnorm


def test_scratch_estimates_statistics_whatever_the_recipe_says(
    tiny_model: Tiny, tmp_path: Path
) -> None:
    from hftl.finetune.baselines import _scale_budget

    _, recipe = open_arm(tiny_model("resnet"), tmp_path, "full", freeze_batchnorm=True)
    assert _scale_budget(recipe.finetune, 1e-3, 1).freeze_batchnorm is False


@pytest.mark.parametrize("name", ["resnet", "efficientnet", "pvt_v2"])
def test_masked_image_adaptation_is_refused(name: str, tiny_model: Tiny, tmp_path: Path) -> None:
    source = find_source(Source(model=str(tiny_model(name))))
    with pytest.raises(RecipeError, match=f"{name} convolves.*or leave adapt out and fine-tune"):
        check_mae_architecture(source)


def test_a_model_of_timm_needs_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"architecture": "resnet10t", "num_classes": 1000, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setitem(sys.modules, "timm", None)
    words = r"a model of timm, which is not installed. pip install 'hftl\[timm\]'"
    with pytest.raises(RecipeError, match=words):
        find_source(Source(model=str(tmp_path)))


def test_layers_of_groups_of_channels_get_no_adapter(tiny_model: Tiny, tmp_path: Path) -> None:
    context, recipe = open_arm(tiny_model("regnet"), tmp_path, "lora")
    built = context.build_model("native", 0)
    model: Any = apply_strategy(built.model, recipe.finetune, built.fresh)
    modules = dict(model.get_base_model().named_modules())
    layers = [modules[path].base_layer for path in list_adapted_layers(model.get_base_model())]
    assert {layer.groups for layer in layers if isinstance(layer, torch.nn.Conv2d)} == {1}
