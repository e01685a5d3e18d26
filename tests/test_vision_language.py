"""Check vision-language sources: prompts, last-token features, likelihoods, what is published."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bench_of, pictures
from PIL import Image
from support.vision_language import save_vision_language_model
from transformers import AutoModelForImageTextToText

import hftl
from hftl.analysis.readings import list_readings
from hftl.config.recipe import Recipe
from hftl.errors import DataError, RecipeError
from hftl.finetune.context import ExperimentContext
from hftl.finetune.trainable import prepare
from hftl.finetune.zero_shot import list_prompts, score_classes
from hftl.models.encoders import get_blocks, has_prefix
from hftl.models.lora import list_adapted_layers
from hftl.models.pooled_model import PooledModel
from hftl.models.vision_language_architectures import VISION_LANGUAGE
from hftl.pipeline import pipeline

pytestmark = pytest.mark.usefixtures("fast_reload")
every_model = pytest.mark.parametrize("name", VISION_LANGUAGE)
BLOCKS, LINEARS = 3, 7
PROMPT = "the {} story"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save a random model of each architecture; Idefics2 has no chat format."""
    return {
        name: save_vision_language_model(name, tmp_path_factory.mktemp(name), name != "idefics2")
        for name in VISION_LANGUAGE
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save noisy pictures, and a table that names them and has a text beside each."""
    root = pictures(tmp_path_factory.mktemp("pictures") / "p", 12)
    wide = Image.fromarray(np.full((20, 64, 3), 200, dtype=np.uint8))
    wide.save(root / "light" / "0.png")
    rows = [
        {"image": str(path.relative_to(root)), "text": "good film " * (number % 3 + 1),
         "label": path.parent.name}
        for number, path in enumerate(sorted(root.rglob("*.png")))
    ]  # fmt: skip
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


def make_recipe(model: Path, folder: Path, **more: Any) -> Recipe:
    training = {"num_train_epochs": 1, "learning_rate": 1e-3, "bf16": False}
    data = {"train": {"path": str(folder / "rows.jsonl")}} | more.pop("data", {})
    return Recipe.parse({
        "source": {"model": str(model), "published_as": "org/vision-language"}, "data": data,
        "finetune": {"pooling": "last", "training": training} | more.pop("finetune", {}),
        "measure": {"seeds": [0], "arms": []} | more.pop("measure", {}), **more,
    })  # fmt: skip


def encode(context: ExperimentContext, count: int = 4) -> list[Any]:
    return [dict(row) for row in context.encode_rows(context.prepared.rows["train"][:count])]


@every_model
def test_inputs_are_the_processors(name: str, models: dict[str, Path], folder: Path) -> None:
    context = bench_of(make_recipe(models[name], folder, data={"prompt": PROMPT}))
    inputs: Any = context.inputs
    rows = context.prepared.rows["train"][:3]
    images = inputs.decode_images(rows)
    for row, image, encoded in zip(rows, images, encode(context, 3), strict=True):
        prompt = inputs.write_prompt(row.content[1])
        assert f"the {row.content[1]} story" in prompt
        assert prompt.endswith("film:") != (name == "idefics2")
        expected = inputs.processor(text=[prompt], images=[image], return_tensors="pt")
        batch = inputs.collate([encoded])
        assert batch.keys() == set(expected.keys())
        for key, value in expected.items():
            torch.testing.assert_close(batch[key], value, atol=1e-6, rtol=0)


@every_model
def test_features_are_the_last_tokens_state_whatever_is_beside(
    name: str, models: dict[str, Path], folder: Path
) -> None:
    context = bench_of(make_recipe(models[name], folder, data={"prompt": PROMPT}))
    rows = context.prepared.rows["train"][:4]
    stock: Any = AutoModelForImageTextToText.from_pretrained(models[name]).eval()
    expected = []
    for encoded in encode(context):
        with torch.no_grad():
            output = stock.model(**context.inputs.collate([encoded]))
        expected.append(output.last_hidden_state[0, -1].numpy())
    features = context.extract_features("last", 0, rows)
    np.testing.assert_allclose(features, np.stack(expected), atol=1e-5)
    lengths = {len(row["input_ids"]) for row in encode(context)}
    assert len(lengths) > 1 and np.ptp(features, axis=0).max() > 1e-3


@every_model
def test_entry_is_what_runs(name: str, models: dict[str, Path], folder: Path) -> None:
    """Compare the entry with missing gradients, and LoRA with the language model's layers."""
    context = bench_of(make_recipe(models[name], folder))
    built = context.build_model("last", 0)
    model, spec = built.model, built.architecture
    assert isinstance(model, PooledModel)
    assert len(get_blocks(built.encoder, spec)) == BLOCKS
    model(**context.inputs.collate(encode(context, 2))).logits.square().sum().backward()
    for path, parameter in model.named_parameters():
        unused = has_prefix(path.removeprefix("encoder."), spec.unused_parts)
        assert (parameter.grad is None) == unused, path
    layers = list_adapted_layers(prepare(context.build_model("last", 0).model, "lora", fresh=()))
    stem = f"encoder.base_model.model.{spec.blocks}."
    assert len(layers) == BLOCKS * LINEARS and all(path.startswith(stem) for path in layers)


NORMS = {"language_model.layers": "language_model.norm.", "text_model.layers": "text_model.norm."}


@every_model
@pytest.mark.parametrize("strategy", ["head", "partial", "lora"])
def test_what_is_intended_trains_and_the_rest_does_not_move(
    name: str, strategy: str, models: dict[str, Path], folder: Path
) -> None:
    context = bench_of(make_recipe(models[name], folder))
    built = context.build_model("last", 0)
    blocks = str(built.architecture.blocks)
    model = prepare(built.model, strategy, blocks=1, fresh=())
    starts = ("head.",)
    if strategy == "partial":
        starts = ("head.", f"encoder.{blocks}.2.", f"encoder.{NORMS[blocks]}")
    before = {path: tensor.detach().clone() for path, tensor in model.named_parameters()}
    for path, parameter in model.named_parameters():
        assert parameter.requires_grad == (path.startswith(starts) or ".lora_" in path), path
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for start in (0, 2):
        batch = context.inputs.collate(encode(context)[start : start + 2])
        model(**batch).logits.square().sum().backward()
        optimizer.step()
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[path]), path
    assert not torch.equal(dict(model.named_parameters())["head.weight"], before["head.weight"])


@every_model
def test_likelihoods_are_sums_of_token_log_probabilities(
    name: str, models: dict[str, Path], folder: Path
) -> None:
    settings = {"zero_shot": {"descriptions": {"dark": ["sad film", "dull"], "light": "bright"}}}
    recipe = make_recipe(models[name], folder, data={"prompt": PROMPT}, finetune=settings)
    context = bench_of(recipe)
    inputs: Any = context.inputs
    stock: Any = AutoModelForImageTextToText.from_pretrained(models[name]).eval()
    scores = score_classes(context, list_prompts(context, recipe.finetune))["test"]

    def compute_likelihood(row: Any, text: str) -> float:
        tokens = inputs.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        batch, count = inputs.collate([dict(row)]), len(tokens)
        grown = {"input_ids": tokens, "attention_mask": [1] * count,
                 "mm_token_type_ids": [0] * count}  # fmt: skip
        for key in grown.keys() & batch.keys():
            batch[key] = torch.cat([batch[key], torch.tensor([grown[key]])], 1)
        with torch.no_grad():
            logits = stock(**batch).logits[0].log_softmax(-1)
        return sum(float(logits[place - count - 1, token]) for place, token in enumerate(tokens))

    expected = [
        [np.mean([compute_likelihood(row, text) for text in ("sad film", "dull")]),
         compute_likelihood(row, "bright")]
        for row in context.encode_rows(context.prepared.rows["test"])
    ]  # fmt: skip
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=1e-5)


def run_snippet(card: str, publish: Path, base: Path, picture: str) -> list[float]:
    """Run the card's code on a picture and the text "good film", and return its probabilities."""
    code = card.split("with the plain libraries:")[1].split("```python\n")[1].split("```")[0]
    code = code.replace('"a_picture.png"', repr(picture)).replace(
        'path = "."', f'path = "{publish}"'
    )
    code = code.replace('"org/vision-language"', repr(str(base)))
    code = code.replace("A text of your own.", "good film").replace("print(", "logits = (")
    space: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), space)  # noqa: S102
    return torch.softmax(space["logits"], -1)[0].tolist()


@pytest.mark.parametrize(
    ("name", "strategy", "prompt"),
    [
        ("idefics3", "lora", PROMPT),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("llava", "lora", None), ("idefics2", "partial", PROMPT),
                ("smolvlm", "head", None), ("qwen2_5_vl", "lora", PROMPT),
            )
        ),
    ],
)  # fmt: skip
def test_runs_are_published_and_reload(
    name: str, strategy: str, prompt: str | None, models: dict[str, Path], folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    arms = ["zero_shot", "classical"] if strategy == "lora" else []
    recipe = make_recipe(
        models[name], folder, data={"prompt": prompt}, finetune={"strategy": strategy},
        measure={"arms": arms},
    )  # fmt: skip
    record = pipeline.run(recipe, tmp_path / "run")
    assert record is not None and record["reload_difference"] < 1e-5
    publish = tmp_path / "run" / "publish"
    assert (publish / "adapter_config.json").exists() == (strategy == "lora")
    picture = str(sorted((folder / "dark").iterdir())[0])
    row: Any = picture if prompt is None else (picture, "good film")
    predictor = hftl.load(tmp_path / "run")
    first, second = predictor.predict([row, row])
    assert first == second and first["label"] in ("dark", "light")
    card = (publish / "README.md").read_text("utf-8")
    assert ("A text of your own" in card) == (prompt is not None)
    if name not in ("smolvlm", "qwen2_5_vl"):
        # AutoProcessor builds a part for videos of the others, which needs torchvision.
        shares = run_snippet(card, publish, models[name], picture)
        if predictor.temperature is None:
            np.testing.assert_allclose(shares, list(first["scores"].values()), atol=1e-4)  # pyright: ignore
        assert max(zip(shares, ("dark", "light"), strict=True))[1] == first["label"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune": {"pooling": "native"}}, r"Set finetune\.pooling=last"),
        ({"finetune": {"strategy": "zero_shot", "pooling": "last"}}, "no head that could be"),
        ({"data": {"image_size": 32}}, "data.image_size is for sources that read pictures alone"),
        ({"data": {"augment": "light"}}, "data.augment is for sources that read pictures alone"),
    ],
)  # fmt: skip
def test_what_such_a_source_cannot_do_is_one_line(
    changes: dict[str, Any], message: str, models: dict[str, Path], folder: Path
) -> None:
    data = changes.pop("data", {}) | {"train": {"path": str(folder / "rows.jsonl")}}
    with pytest.raises(RecipeError) as raised:
        pipeline.check_recipe(make_recipe(models["llava"], folder, data=data, **changes))
    assert re.search(message, f"{raised.value.what} {raised.value.fix}")


def test_prompts_are_for_vision_language_sources(
    models: dict[str, Path], folder: Path, bert: Path, table: Path
) -> None:
    texts = {"train": {"path": str(table)}}
    recipe = make_recipe(bert, folder, data={**texts, "prompt": "x"})
    with pytest.raises(RecipeError, match="data.prompt is for vision-language sources"):
        bench_of(recipe)
    with pytest.raises(RecipeError, match="finetune.pooling=last is for vision-language sources"):
        bench_of(make_recipe(bert, folder, data=texts)).build_model("last", 0)
    with pytest.raises(RecipeError, match="several places"):
        make_recipe(models["llava"], folder, data={"prompt": "{} and {}"})
    missing = {"prompt": PROMPT, "train": {"path": str(folder / "rows.jsonl"), "text": "words"}}
    with pytest.raises(DataError, match="no column 'words'"):
        bench_of(make_recipe(models["llava"], folder, data=missing))


def test_checks_read_such_pictures_in_no_other_way(models: dict[str, Path], folder: Path) -> None:
    context = bench_of(make_recipe(models["llava"], folder))
    rows = context.prepared.rows["validation"]
    assert list_readings(context.inputs, "llava", rows, context.encode_rows) == []


def test_inputs_of_other_tables_keep_the_prompt(models: dict[str, Path], folder: Path) -> None:
    context = bench_of(make_recipe(models["llava"], folder))
    inputs: Any = context.inputs
    rows, other = context.prepared.rows["test"], inputs.data.model_copy(update={"max_pixels": 99})
    context.get_canvases(rows)
    for changed in (inputs.with_data(other), inputs.with_processor(inputs.processor)):
        assert (type(changed), changed.prompt) == (type(inputs), inputs.prompt)
        assert changed.hash_preprocessing() == inputs.hash_preprocessing()
        assert inputs._canvases and not changed._canvases
    assert inputs.with_data(other).data is other
