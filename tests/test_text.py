"""Words and their tokens: each word is told by its first, on either side of the padding."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hftl.data.rows import Row
from hftl.data.text_inputs import TextInputs, WordInputs, build_word_tokenizer, find_first_tokens

SENTENCES = [("good", "unknownword", "film"), ("dull",), ("a", "bright", "and", "warm", "story")]


def rows() -> list[Row]:
    return [Row(words, "", None, i, "") for i, words in enumerate(SENTENCES)]


@pytest.fixture(params=["right", "left"])
def inputs(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> WordInputs:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
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
    encoded = inputs.encode(rows())
    for number, row in enumerate(encoded):
        row["labels"] = np.arange(len(SENTENCES[number])) + 10 * number
    batch = inputs.collate(encoded)
    tokenizer = inputs.tokenizer
    for number, words in enumerate(SENTENCES):
        labels = batch["labels"][number]
        # [CLS] and [SEP] leave three places; the fourth and fifth words are cut off.
        remaining = words[:3]
        assert labels[labels != -100].tolist() == [10 * number + i for i in range(len(remaining))]
        tokens = tokenizer.convert_ids_to_tokens(
            batch["input_ids"][number][labels != -100].tolist()
        )
        assert tokens == [w if w != "unknownword" else "[UNK]" for w in remaining]


def test_outputs_are_the_values_at_the_words(inputs: WordInputs) -> None:
    encoded = inputs.encode(rows())
    batch = inputs.collate(encoded)
    values = batch["input_ids"][:, :, None].float()
    outputs = inputs.split_outputs(values, encoded)
    assert [len(part) for part in outputs] == [3, 1, 5]
    ids = [inputs.tokenizer.convert_tokens_to_ids(w) for w in ("a", "bright", "and")]
    assert outputs[2][:3, 0].tolist() == ids and outputs[2][3:].isnan().all()


def test_facts_count_what_is_cut(inputs: WordInputs) -> None:
    facts = inputs.summarize(rows())
    assert facts["truncated"] == pytest.approx(1 / 3)
    assert facts["unknown_tokens"] == pytest.approx(1 / (9 + 6))


def test_labels_of_texts_keep_their_type(tiny_model: Callable[..., Path]) -> None:
    inputs = TextInputs(AutoTokenizer.from_pretrained(tiny_model()), 8)
    encoded = inputs.encode([Row(("good film",), "", None, 0, ""), Row(("bad",), "", None, 1, "")])
    for labels, kind, shape in (
        ([np.int64(1), np.int64(0)], torch.int64, (2,)),
        ([np.float32(1), np.float32(0)], torch.float32, (2,)),
        ([np.ones(3, np.float32)] * 2, torch.float32, (2, 3)),
    ):
        batch = inputs.collate(
            [{**row, "labels": label} for row, label in zip(encoded, labels, strict=True)]
        )
        assert batch["labels"].dtype == kind and tuple(batch["labels"].shape) == shape


def byte_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer, as RoBERTa's, saved with few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    core.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(["the cat sat on the cat"] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    return folder


def test_words_of_a_byte_tokenizer_have_their_space(tmp_path: Path) -> None:
    plain = AutoTokenizer.from_pretrained(byte_tokenizer(tmp_path / "a"))
    running = plain(" the cat sat")["input_ids"]
    words = ["the", "cat", "sat"]
    assert plain(words, is_split_into_words=True)["input_ids"] != running
    mended = build_word_tokenizer(plain, tmp_path / "a")
    assert mended(words, is_split_into_words=True)["input_ids"] == running
    mended.save_pretrained(tmp_path / "b")
    again = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert again(words, is_split_into_words=True)["input_ids"] == running


def test_other_tokenizers_are_left_alone(tiny_model: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    assert build_word_tokenizer(tokenizer, tiny_model()) is tokenizer
