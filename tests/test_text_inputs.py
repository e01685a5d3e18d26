"""Check texts and words as tokens: labels at first tokens, and outputs that no padding changes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sentences, write_csv
from support.tiny import TEXT_MODELS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from hftl import load, run
from hftl.adapt.language_model import load_mlm
from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.data.masking import collate_masked_blocks
from hftl.data.rows import Row
from hftl.data.text_inputs import (
    EncodedRow,
    TextInputs,
    WordInputs,
    build_word_tokenizer,
    find_first_tokens,
)
from hftl.errors import RecipeError
from hftl.models.features import compute_frozen_features, predict_logits
from hftl.models.heads import LoadedModel, build_model
from hftl.models.source import SourceModel, find_source, load_tokenizer, match_padding

pytestmark = pytest.mark.usefixtures("fast_reload")

Tiny = Callable[..., Path]
TEXTS = ["good film", "the film is of a good plot and warm music with fine scene it was"]
WORDS = [("good", "unknownword", "film"), ("dull",), ("a", "bright", "and", "warm", "story")]


def make_rows(contents: Any) -> list[Row]:
    return [Row(tuple(content), "", None, n, "") for n, content in enumerate(contents)]


# Words


@pytest.fixture(params=["right", "left"])
def inputs(request: pytest.FixtureRequest, bert: Path) -> WordInputs:
    """Return inputs of five tokens, padded on either side."""
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.padding_side = request.param
    return WordInputs(tokenizer, 5)


@pytest.mark.parametrize(
    ("ids", "words", "places"),
    [
        ([None, 0, 0, 1, None], 2, [1, 3]),
        ([None, 0, 1, 1], 4, [1, 2, -1, -1]),
        ([0, 2, 2], 3, [0, -1, 1]),
        ([None, None], 1, [-1]),
    ],
)
def test_first_tokens(ids: list[int | None], words: int, places: list[int]) -> None:
    assert find_first_tokens(ids, words) == places


def test_labels_stand_at_the_words_first_tokens(inputs: WordInputs) -> None:
    encoded = inputs.encode(make_rows(WORDS))
    for number, row in enumerate(encoded):
        row["labels"] = np.arange(len(WORDS[number])) + 10 * number
    batch = inputs.collate(encoded)
    for number, words in enumerate(WORDS):
        labels, ids = batch["labels"][number], batch["input_ids"][number]
        # [CLS] and [SEP] leave three places; the fourth and fifth words are cut off.
        remaining = words[:3]
        assert labels[labels != -100].tolist() == [10 * number + i for i in range(len(remaining))]
        tokens = inputs.tokenizer.convert_ids_to_tokens(ids[labels != -100].tolist())
        assert tokens == [w if w != "unknownword" else "[UNK]" for w in remaining]


def test_outputs_are_the_values_at_the_words(inputs: WordInputs) -> None:
    encoded = inputs.encode(make_rows(WORDS))
    values = inputs.collate(encoded)["input_ids"][:, :, None].float()
    outputs = inputs.split_outputs(values, encoded)
    assert [len(part) for part in outputs] == [3, 1, 5]
    ids = [inputs.tokenizer.convert_tokens_to_ids(w) for w in ("a", "bright", "and")]
    assert outputs[2][:3, 0].tolist() == ids and outputs[2][3:].isnan().all()
    facts = inputs.summarize(make_rows(WORDS))
    assert facts["truncated"] == pytest.approx(1 / 3)
    assert facts["unknown_tokens"] == pytest.approx(1 / (9 + 6))
    assert facts["max_tokens"] == max(map(inputs.length, encoded)) == inputs.max_length


@pytest.mark.parametrize(
    ("labels", "dtype", "shape"),
    [
        ([np.int64(1), np.int64(0)], torch.int64, (2,)),
        ([np.float32(1), np.float32(0)], torch.float32, (2,)),
        ([np.ones(3, np.float32)] * 2, torch.float32, (2, 3)),
    ],
)
def test_labels_of_texts_keep_their_type(
    bert: Path, labels: list[Any], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    inputs = TextInputs(AutoTokenizer.from_pretrained(bert), 8)
    encoded = inputs.encode(make_rows([("good film",), ("bad",)]))
    rows = [{**row, "labels": label} for row, label in zip(encoded, labels, strict=True)]
    batch = inputs.collate(rows)
    assert batch["labels"].dtype == dtype and tuple(batch["labels"].shape) == shape


def test_words_of_a_byte_tokenizer_have_their_space(bert: Path, tmp_path: Path) -> None:
    """Tokenize words as a running text, as RoBERTa's tokenizer does not by itself."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    core.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<unk>"], initial_alphabet=alphabet
    )
    core.train_from_iterator(["the cat sat on the cat"] * 50, trainer)
    byte_level = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
    byte_level.save_pretrained(tmp_path / "a")
    plain = AutoTokenizer.from_pretrained(tmp_path / "a")
    running, words = plain(" the cat sat")["input_ids"], ["the", "cat", "sat"]
    assert plain(words, is_split_into_words=True)["input_ids"] != running
    fixed = build_word_tokenizer(plain, tmp_path / "a")
    fixed.save_pretrained(tmp_path / "b")
    for tokenizer in (fixed, AutoTokenizer.from_pretrained(tmp_path / "b")):
        assert tokenizer(words, is_split_into_words=True)["input_ids"] == running
    other = AutoTokenizer.from_pretrained(bert)
    assert build_word_tokenizer(other, bert) is other


# Padding


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_text_has_the_same_outputs_alone_and_in_a_batch(kind: str, tiny_model: Tiny) -> None:
    source = find_source(Source(model=str(tiny_model(kind))))
    inputs = TextInputs(load_tokenizer(source), 32)
    source = match_padding(source, inputs.tokenizer)
    encoded = inputs.encode(make_rows([(text,) for text in TEXTS]))

    def measure(built: LoadedModel, rows: list[EncodedRow]) -> list[np.ndarray]:
        features = compute_frozen_features(built.model, built.last_linear, rows, inputs, "cpu")
        return [predict_logits(built.model, rows, inputs, "cpu"), np.concatenate(features)]

    first = ("cls",) if not source.architecture_spec.is_causal else ()
    for pooling in ("native", "mean", *first):
        built = build_model(source, "classification", pooling, 2, ["a", "b"], 0)
        torch.nn.init.normal_(built.last_linear.weight)
        alone = [measure(built, [row]) for row in encoded]
        for number, together in enumerate(measure(built, encoded)):
            expected = np.concatenate([outputs[number] for outputs in alone])
            np.testing.assert_allclose(together, expected, atol=1e-5, err_msg=pooling)


def test_words_have_the_same_outputs_alone_and_in_a_batch(bert: Path) -> None:
    source = find_source(Source(model=str(bert)))
    inputs = WordInputs(load_tokenizer(source), 32)
    built = build_model(source, "token-classification", "native", 2, ["a", "b"], 0)
    encoded = inputs.encode(make_rows(WORDS))
    alone = [predict_logits(built.model, [row], inputs, "cpu") for row in encoded]
    together = predict_logits(built.model, encoded, inputs, "cpu")
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "fnet", "modernbert", "deberta-v2"])
def test_hidden_tokens_have_the_same_outputs_alone_and_in_a_batch(
    kind: str, tiny_model: Tiny
) -> None:
    model, _ = load_mlm(find_source(Source(model=str(tiny_model(kind)))), seed=0)
    blocks = [
        {"input_ids": ids, "positions": np.array([1, 2]), "labels": ids[1:3]}
        for ids in (np.array([2, 7, 8, 3]), np.array([2, *range(6, 20), 3]))
    ]

    def measure(part: list[dict[str, np.ndarray]]) -> torch.Tensor:
        batch = {k: v for k, v in collate_masked_blocks(part, 0).items() if k != "labels"}
        with torch.no_grad():
            return model.eval()(**batch).logits

    torch.testing.assert_close(measure(blocks)[:2], measure(blocks[:1]), atol=1e-5, rtol=0)


def copy_with_tokenizer(model: Path, folder: Path, **settings: object) -> SourceModel:
    """Copy a checkpoint whose tokenizer has other settings."""
    shutil.copytree(model, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return find_source(Source(model=str(folder)))


def test_saved_tokenizer_pads_right_and_returns_a_mask(bert: Path, tmp_path: Path) -> None:
    settings = {"model_input_names": ["input_ids"], "padding_side": "left"}
    source = copy_with_tokenizer(bert, tmp_path / "model", **settings)
    load_tokenizer(source).save_pretrained(tmp_path / "saved")
    published = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert published.padding_side == "right"
    assert "attention_mask" in published(TEXTS, padding=True)
    source = copy_with_tokenizer(bert, tmp_path / "unpadded", pad_token=None)
    with pytest.raises(RecipeError, match="no padding token"):
        load_tokenizer(source)


def test_run_from_a_left_padding_source_publishes_outputs_of_each_text_alone(
    bert: Path, tmp_path: Path
) -> None:
    copy_with_tokenizer(bert, tmp_path / "model", padding_side="left")
    table = write_csv(tmp_path / "table.csv", ["text", "label"], sentences(80))
    recipe = {
        "source": {"model": str(tmp_path / "model")},
        "data": {"train": {"path": str(table)}, "max_length": 32},
        "finetune": {"strategy": "full",
                     "training": {"num_train_epochs": 1, "learning_rate": 1e-3, "bf16": False}},
        "measure": {"seeds": [0], "arms": []},
    }  # fmt: skip
    run(Recipe.parse(recipe), tmp_path / "run")
    model = load(tmp_path / "run")
    together = [row["scores"]["positive"] for row in model.predict(TEXTS)]
    alone = [model.predict([text])[0]["scores"]["positive"] for text in TEXTS]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    stock = pipeline("text-classification", model=str(tmp_path / "run" / "publish"), top_k=None)
    rows = stock(TEXTS, batch_size=2, function_to_apply="none")
    logits = [{one["label"]: one["score"] for one in row} for row in rows]
    # hftl's are calibrated; the pipeline knows no temperature.
    apart = np.array([row["positive"] - row["negative"] for row in logits])
    scores = 1 / (1 + np.exp(-apart / (model.temperature or 1.0)))
    np.testing.assert_allclose(scores, alone, atol=1e-5)


def test_the_hash_of_preprocessing_knows_rules_and_no_calls(
    tiny_model: Tiny, tmp_path: Path
) -> None:
    inputs = TextInputs(load_tokenizer(find_source(Source(model=str(tiny_model())))), 8)
    first = inputs.hash_preprocessing()
    inputs.encode(make_rows([(text,) for text in TEXTS]))
    assert inputs.hash_preprocessing() == first
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "moved"))
    for name, key, value in (
        ("tokenizer.json", "normalizer", None),
        ("tokenizer_config.json", "model_input_names", ["input_ids", "token_type_ids"]),
    ):
        before = (folder / name).read_text("utf-8")
        tree = json.loads(before) | {key: value}
        (folder / name).write_text(json.dumps(tree), "utf-8")
        other = TextInputs(load_tokenizer(find_source(Source(model=str(folder)))), 8)
        assert other.hash_preprocessing() != first, name
        (folder / name).write_text(before, "utf-8")
