"""Check pairs of an image and a text encoder: zero-shot logits, training from them, publishing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import bench_of, pictures
from PIL import Image
from safetensors import safe_open
from support.tiny import draw_images, tiny_config, tiny_processor, tiny_tokenizer
from support.training import perturb
from transformers import AutoTokenizer

import hftl
from hftl.config.finetune import Finetune, ZeroShot
from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.doctor.adapter_folder import open_adapter_folder
from hftl.doctor.report import run_doctor
from hftl.errors import RecipeError
from hftl.finetune.context import ExperimentContext
from hftl.finetune.pretraining_heads import embed_source
from hftl.finetune.solved_arms import solve_zero_shot
from hftl.finetune.trainable import prepare
from hftl.finetune.zero_shot import build_start_model, check_zero_shot, load_zero_shot_head
from hftl.models.features import predict_logits
from hftl.models.pairs import PAIRS, EmbeddingModel, build_embedding_model
from hftl.models.source import find_source
from hftl.pipeline import pipeline

pytestmark = pytest.mark.usefixtures("fast_reload")

CLASSES = {
    "clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model",
    "metaclip_2": "MetaClip2Model",
}  # fmt: skip
SIGLIPS = ("siglip", "siglip2")
TEMPLATES = ["a {} film", "this is {}"]
WORDS = {"dark": "sad and dull", "light": "bright"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save a random pair of each kind, with tokenizer and processor."""
    return {name: save_pair(name, tmp_path_factory.mktemp(name)) for name in PAIRS}


def save_pair(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    pair = getattr(transformers, CLASSES[name])(tiny_config(name))
    perturb(pair, 0.2)
    if name in SIGLIPS:
        with torch.no_grad():
            pair.logit_scale.fill_(2.0)
            pair.logit_bias.fill_(-3.0)
    pair.save_pretrained(folder)
    tiny_tokenizer(folder)
    tiny_processor(folder, name)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures") / "p", 30)


def make_recipe(pair: Path, folder: Path, **more: Any) -> Recipe:
    training = {"num_train_epochs": 1, "learning_rate": 1e-3, "bf16": False}
    finetune = {
        "pooling": "embedding", "training": training, "zero_shot": {"templates": TEMPLATES},
    } | more.pop("finetune", {})  # fmt: skip
    return Recipe.parse({
        "source": {"model": str(pair), "published_as": "org/pair"},
        "data": {"train": {"path": str(folder)}, "label_names": WORDS},
        "finetune": finetune,
        "measure": {"seeds": [0], "arms": []} | more.pop("measure", {}), **more,
    })  # fmt: skip


def stock_logits(context: ExperimentContext, rows: list[Any]) -> np.ndarray:
    """Return the pair's own logits, its texts averaged by class as by hand."""
    source = context.source
    pair: Any = getattr(transformers, CLASSES[source.model_type]).from_pretrained(source.folder)
    # SigLIP2 was trained with padding on the right; its tokenizer's class pads on the left.
    tokenizer = AutoTokenizer.from_pretrained(source.folder, padding_side="right")
    siglip = source.model_type in SIGLIPS
    padding: Any = {"padding": "max_length", "max_length": 40} if siglip else {"padding": True}
    batch = context.inputs.collate([dict(row) for row in context.encode_rows(rows)])
    classes, images = [], None
    for words in WORDS.values():
        ids = tokenizer([t.format(words) for t in TEMPLATES], return_tensors="pt", **padding)
        names = ("input_ids",) if siglip else ("input_ids", "attention_mask")
        with torch.no_grad():
            output = pair.eval()(**batch, **{n: ids[n] for n in names})
        mean = output.text_embeds.mean(0)
        classes.append(mean / mean.norm())
        images = output.image_embeds
    assert images is not None
    logits = pair.logit_scale.exp() * images @ torch.stack(classes).T
    if siglip:
        logits = logits + pair.logit_bias
    return logits.detach().numpy()


@pytest.mark.parametrize("name", PAIRS)
def test_zero_shot_logits_are_the_pairs_own(
    name: str, pairs: dict[str, Path], folder: Path
) -> None:
    context = bench_of(make_recipe(pairs[name], folder))
    finetune = Finetune(zero_shot=ZeroShot(templates=TEMPLATES))
    rows = context.prepared.rows["test"]
    expected = stock_logits(context, rows)
    output = solve_zero_shot(context, finetune, 0)
    np.testing.assert_allclose(output.logits["test"], expected, atol=1e-5, rtol=0)
    assert np.ptp(expected) > 1e-2, "pictures differ"
    start = finetune.model_copy(update={"head_init": "zero_shot", "pooling": "embedding"})
    model = build_start_model(context, start, 0).model
    assert isinstance(model, EmbeddingModel)
    encoded = context.encode_rows(rows)
    np.testing.assert_allclose(
        predict_logits(model, encoded, context.inputs, "cpu"), expected, atol=1e-5, rtol=0
    )
    # KL compares the same logits.
    head = load_zero_shot_head(context, finetune)
    batch: Any = context.inputs.collate([dict(row) for row in encoded])
    with torch.no_grad():
        pooled = model.encoder(**batch).pooler_output
        np.testing.assert_allclose(head(pooled).numpy(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "strategy", "more"),
    [
        pytest.param(
            "clip", "lora", {"retain": {"interpolate": [0.5, 1], "kl": {"on": "zero_shot"}}},
            marks=pytest.mark.slow,
        ),
        ("siglip", "full", {"measure": {"arms": ["zero_shot", "head", "scratch"],
                                        "scratch": {"learning_rates": [1e-3]}}}),
        ("metaclip_2", "partial", {"retain": {"kl": {"on": "relational"}}}),
        pytest.param("metaclip_2", "lora", {}, marks=pytest.mark.slow),
        ("siglip", "zero_shot", {"measure": {"arms": ["majority"]}}),
        pytest.param(
            "siglip2", "lora", {"measure": {"arms": ["zero_shot", "head"]}}, marks=pytest.mark.slow
        ),
    ],
)  # fmt: skip
def test_runs_are_published_without_the_text_half(
    name: str, strategy: str, more: dict[str, Any], pairs: dict[str, Path], folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    recipe = make_recipe(
        pairs[name], folder, finetune={"strategy": strategy, "head_init": "zero_shot"}, **more
    )
    record = pipeline.run(recipe, tmp_path / "run")
    assert record is not None and record["reload_difference"] < 1e-5
    publish = tmp_path / "run" / "publish"
    config = json.loads((publish / "config.json").read_text("utf-8"))
    assert config["architectures"][0].endswith("VisionModel")
    weights = publish / "model.safetensors"
    assert weights.exists() != (publish / "adapter_config.json").exists()
    if weights.exists():
        with safe_open(weights, "pt") as file:
            assert not [key for key in file.keys() if "text" in key]  # noqa: SIM118
    if strategy == "lora":
        lines: list[str] = []
        opened, base = open_adapter_folder(publish), str(pairs[name])
        assert run_doctor(opened, base, False, lines.append) == 0, lines
    images = sorted((folder / "dark").iterdir())[:3]
    predicted = hftl.load(tmp_path / "run").predict([Image.open(path) for path in images])
    assert all(row["label"] in WORDS for row in predicted)
    card = (publish / "README.md").read_text("utf-8")
    assert "`dark` (sad and dull), `light` (bright)" in card and "VisionModel" in card
    if strategy == "zero_shot":
        snippet = card.split("with the plain libraries:")[1].split("```python\n")[1].split("```")[0]
        images[0].rename(images[0].parent / "0.png")
        code = snippet.replace('"a_picture.png"', repr(str(images[0])))
        code = code.replace('path = "."', f"path = {str(publish)!r}")
        exec(compile(code, "card", "exec"), {})  # noqa: S102


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"finetune": {"pooling": "native", "head_init": "zero_shot"}},
         r"Set finetune\.pooling=embedding"),
        ({"finetune": {"pooling": "native", "strategy": "zero_shot"}},
         r"Set finetune\.pooling=embedding"),
    ],
)  # fmt: skip
def test_head_needs_the_pairs_pooling(
    more: dict[str, Any], message: str, pairs: dict[str, Path], folder: Path
) -> None:
    recipe = make_recipe(pairs["clip"], folder, **more)
    with pytest.raises(RecipeError, match=message):
        check_zero_shot(recipe, bench_of(recipe))


TOP = ("encoder.encoder.layers.2.", "encoder.post_layernorm.", "projection.", "head.")
TRAINED = {
    "head": ("head.",), "zero_shot": ("head.",), "partial": TOP,
    "gradual": ("encoder.", "projection.", "head."), "full": ("encoder.", "projection.", "head."),
}  # fmt: skip
"""The start of the names of what trains, by strategy, of three blocks the top one under partial."""


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("strategy", [*TRAINED, "lora"])
def test_what_is_intended_trains_and_the_rest_does_not_move(
    strategy: str, name: str, pairs: dict[str, Path]
) -> None:
    source = find_source(Source(model=str(pairs[name])))
    built = build_embedding_model(source, 2, 0)
    model = prepare(built.model, strategy, blocks=1, fresh=built.fresh)
    starts = TRAINED.get(strategy, ())
    if name in SIGLIPS and strategy == "partial":
        starts = (*starts, "encoder.head.")
    for path, parameter in model.named_parameters():
        is_lora = ".lora_" in path and ".encoder.layers." in path
        expected = is_lora or path.startswith("head.") if strategy == "lora" else (
            path.startswith(starts)
        )  # fmt: skip
        assert parameter.requires_grad == expected, path
    before = {path: tensor.detach().clone() for path, tensor in model.named_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(2):
        torch.manual_seed(step)
        logits = model(**draw_images(name, 4)).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[path]), path
    assert not torch.equal(model.head.weight, before["head.weight"])  # pyright: ignore


def test_half_a_pair_is_refused(pairs: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    model = transformers.CLIPVisionModel.from_pretrained(pairs["clip"])
    model.save_pretrained(tmp_path / "half")
    with pytest.raises(RecipeError, match="is the image half of a pair alone"):
        find_source(Source(model=str(tmp_path / "half")))
    stock = transformers.CLIPForImageClassification.from_pretrained(pairs["clip"])
    stock.save_pretrained(tmp_path / "stock")
    tiny_tokenizer(tmp_path / "stock")
    tiny_processor(tmp_path / "stock")
    recipe = make_recipe(tmp_path / "stock", folder, measure={"arms": ["zero_shot"]})
    with pytest.raises(RecipeError, match=r"measure\.arms\.zero_shot: .*is no whole pair"):
        check_zero_shot(
            recipe,
            bench_of(
                recipe.model_copy(
                    update={"finetune": recipe.finetune.model_copy(update={"pooling": "native"})}
                )
            ),
        )


def test_forgetting_compares_what_the_stock_class_pools(
    pairs: dict[str, Path], folder: Path
) -> None:
    from hftl.finetune.pretraining_heads import embed_compared_rows

    context = bench_of(make_recipe(pairs["clip"], folder))
    before = embed_source(context, 0)
    after = embed_compared_rows(context, context.build_model("embedding", 0))
    np.testing.assert_allclose(after["new"], before["new"], atol=1e-6)


def test_texts_have_no_such_pooling(bert: Path, table: Path) -> None:
    recipe = Recipe.parse({
        "source": {"model": str(bert)}, "data": {"train": {"path": str(table)}},
        "finetune": {"pooling": "embedding"},
    })  # fmt: skip
    with pytest.raises(RecipeError, match=r"pooling=embedding: .* is no pair of an image"):
        bench_of(recipe).build_model("embedding", 0)
