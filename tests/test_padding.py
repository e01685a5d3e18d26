"""Check that a text has the same outputs alone and beside longer texts, for every architecture."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sentences, write_csv
from support.tiny import FIELDS, is_image, tiny_config
from transformers import AutoTokenizer, pipeline

from hftl import load, run
from hftl.adapt.mlm import load_mlm
from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.data.masking import collate_masked_blocks
from hftl.data.rows import Row
from hftl.data.text_inputs import EncodedRow, TextInputs, WordInputs
from hftl.errors import RecipeError
from hftl.models.features import compute_frozen_features, predict_logits
from hftl.models.heads import LoadedModel, build_model
from hftl.models.source import SourceModel, find_source, load_tokenizer

Tiny = Callable[..., Path]
TEXTS = [
    "good film",
    "the film is of a good plot and warm music with fine scene it was",
    "very bad story this",
]
KINDS = [kind for kind in FIELDS if not is_image(kind)]


def with_tokenizer(model: Path, folder: Path, **settings: object) -> SourceModel:
    """Copy a checkpoint whose tokenizer has other settings."""
    shutil.copytree(model, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return find_source(Source(model=str(folder)))


def rows(contents: list[tuple[str, ...]]) -> list[Row]:
    return [Row(content, "", None, n, "") for n, content in enumerate(contents)]


def measured_logits(
    built: LoadedModel, encoded: list[EncodedRow], inputs: TextInputs
) -> np.ndarray:
    return predict_logits(built.model, encoded, inputs, "cpu")


def measured_features(
    built: LoadedModel, encoded: list[EncodedRow], inputs: TextInputs
) -> np.ndarray:
    return np.concatenate(
        compute_frozen_features(built.model, built.last_linear, encoded, inputs, "cpu")
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_alone_has_the_outputs_that_it_has_in_a_batch(
    kind: str, side: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    source = with_tokenizer(tiny_model(kind), tmp_path / "model", padding_side=side)
    inputs = TextInputs(load_tokenizer(source), 32)
    encoded = inputs.encode(rows([(text,) for text in TEXTS]))
    for pooling in ("native", "mean", "cls"):
        built = build_model(source, "classification", pooling, 2, ["a", "b"], 0)
        torch.nn.init.normal_(built.last_linear.weight)
        for measure in (measured_logits, measured_features):
            alone = np.concatenate([measure(built, [row], inputs) for row in encoded])
            together = measure(built, encoded, inputs)
            np.testing.assert_allclose(together, alone, atol=1e-5, err_msg=pooling)


@pytest.mark.parametrize("side", ["left", "right"])
def test_so_have_the_words_of_a_text(side: str, tiny_model: Tiny, tmp_path: Path) -> None:
    source = with_tokenizer(tiny_model("bert"), tmp_path / "model", padding_side=side)
    inputs = WordInputs(load_tokenizer(source), 32)
    built = build_model(source, "token-classification", "native", 2, ["a", "b"], 0)
    encoded = inputs.encode(rows([tuple(text.split()) for text in TEXTS]))
    alone = np.concatenate([predict_logits(built.model, [row], inputs, "cpu") for row in encoded])
    np.testing.assert_allclose(
        predict_logits(built.model, encoded, inputs, "cpu"), alone, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["bert", "roberta", "fnet", "modernbert", "deberta-v2"])
def test_so_have_hidden_tokens(kind: str, tiny_model: Tiny) -> None:
    model, _ = load_mlm(find_source(Source(model=str(tiny_model(kind)))), seed=0)
    model.eval()
    blocks = [
        {"input_ids": ids, "positions": np.array([1, 2]), "labels": ids[1:3]}
        for ids in (np.array([2, 7, 8, 3]), np.array([2, *range(6, 20), 3]))
    ]

    def measure(part: list[dict[str, np.ndarray]]) -> torch.Tensor:
        batch = collate_masked_blocks(part, 0)
        batch.pop("labels")
        with torch.no_grad():
            return model(**batch).logits

    torch.testing.assert_close(measure(blocks)[:2], measure(blocks[:1]), atol=1e-5, rtol=0)


def test_a_tokenizer_that_gives_no_mask_is_made_to_give_one(
    tiny_model: Tiny, tmp_path: Path
) -> None:
    names = ["input_ids"]
    source = with_tokenizer(tiny_model("bert"), tmp_path / "model", model_input_names=names)
    tokenizer = load_tokenizer(source)
    tokenizer.save_pretrained(tmp_path / "saved")
    published = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert published.padding_side == "right"
    assert "attention_mask" in published(TEXTS, padding=True)


def test_a_tokenizer_that_cannot_pad_is_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    source = with_tokenizer(tiny_model("bert"), tmp_path / "model", pad_token=None)
    with pytest.raises(RecipeError, match="no padding token"):
        load_tokenizer(source)


@pytest.mark.parametrize(("kind", "pooling"), [("bert", "native"), ("fnet", "mean")])
def test_a_run_from_a_left_padding_source_publishes_answers_of_each_text_alone(
    kind: str, pooling: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    with_tokenizer(tiny_model(kind), tmp_path / "model", padding_side="left")
    table = write_csv(tmp_path / "table.csv", ["text", "label"], sentences(80))
    recipe = {
        "source": {"model": str(tmp_path / "model")},
        "data": {"train": {"path": str(table)}, "max_length": 32},
        "finetune": {"strategy": "full", "pooling": pooling,
                     "training": {"num_train_epochs": 1, "learning_rate": 1e-3, "bf16": False}},
        "measure": {"seeds": [0], "arms": []},
    }  # fmt: skip
    run(Recipe.parse(recipe), tmp_path / "run")
    model = load(tmp_path / "run")
    together = [answer["scores"]["positive"] for answer in model.predict(TEXTS)]
    alone = [model.predict([text])[0]["scores"]["positive"] for text in TEXTS]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    if pooling == "native":
        stock = pipeline("text-classification", model=str(tmp_path / "run" / "publish"), top_k=None)
        answers = stock(TEXTS, batch_size=3)
        scores = [{one["label"]: one["score"] for one in answer}["positive"] for answer in answers]
        np.testing.assert_allclose(scores, alone, atol=1e-5)


def test_the_encoder_without_a_mask_keeps_its_name(tiny_model: Tiny) -> None:
    source = find_source(Source(model=str(tiny_model("fnet"))))
    built = build_model(source, "classification", "cls", 2, ["a", "b"], 0)
    assert type(built.encoder).__name__ == type(tiny_config("fnet")).__name__.replace(
        "Config", "Model"
    )
