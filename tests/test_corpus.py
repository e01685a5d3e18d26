"""Compare the blocks of a corpus with a plain loop; hold out documents, drop copies."""

import pickle
import random
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import sentences
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hftl.data import corpus
from hftl.data.corpus import BlockSpec, TokenBlocks, write_blocks
from hftl.errors import DataError, RecipeError

TEXTS = [text for text, _ in sentences(60)]
LONG = [" ".join(TEXTS[i : i + 1 + i % 5]) for i in range(50)]
KINDS = ("wordpiece", "bytes", "pieces")
Tokens = Callable[[str], Any]
Block = tuple[list[int], list[int]]


def drop_none(text: str) -> bool:
    return False


def train_tokenizer(kind: str) -> Any:
    """Train a fast tokenizer of one of three kinds, with words of several tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    sizes: dict[str, Any] = {"special_tokens": special, "show_progress": False}
    core: Any
    if kind == "wordpiece":
        core = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # pyright: ignore
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        core.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=90, **sizes)
    elif kind == "bytes":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=90, **sizes)
    else:
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="[UNK]", **sizes)
    core.train_from_iterator(TEXTS, trainer)
    ids = [(name, core.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_of() -> Tokens:
    made = {kind: train_tokenizer(kind) for kind in KINDS}
    return lambda kind: made[kind]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_of: Tokens) -> Any:
    return tokenizer_of("wordpiece")


def write(
    folder: Path, texts: Iterable[str], tokenizer: Any, drop: Any = drop_none, **spec: Any
) -> Any:
    """Write the blocks of texts to a new folder, and return their facts."""
    folder.mkdir(exist_ok=True)
    settings = {"length": 16, "pack": True, "held_out": 0.2, "seed": 0} | spec
    return write_blocks(texts, tokenizer, BlockSpec(**settings), drop, folder)


def read(folder: Path) -> list[list[Block]]:
    sides = [TokenBlocks(folder, part) for part in ("train", "held_out")]
    return [[(ids.tolist(), words.tolist()) for ids, words in side] for side in sides]


def cut_by_loop(texts: list[str], tokenizer: Any, pack: bool, length: int = 16) -> list[Block]:
    """Cut documents into blocks token by token."""
    before, after, payload = [tokenizer.cls_token_id], [tokenizer.sep_token_id], length - 2
    streams: list[list[tuple[int, Any]]] = [[]]
    for number, text in enumerate(texts):
        encoding = tokenizer(text, add_special_tokens=False)
        if number and pack:
            streams[-1].append((after[0], None))
        elif number:
            streams.append([])
        words = [(number, word) for word in encoding.word_ids()]
        streams[-1] += zip(encoding["input_ids"], words, strict=True)
    blocks = []
    for stream in streams:
        for at in range(0, len(stream), payload):
            piece = stream[at : at + payload]
            seen: list[Any] = []
            numbers = []
            for _, word in piece:
                if word is not None and word not in seen:
                    seen.append(word)
                numbers.append(-1 if word is None else seen.index(word))
            blocks.append((before + [token for token, _ in piece] + after, [-1, *numbers, -1]))
    return blocks


def find_held_out(texts: list[str], tokenizer: Any, folder: Path, **spec: Any) -> set[str]:
    """Return the documents held out: those whose blocks are, were every document one block."""
    write(folder, texts, tokenizer, **(spec | {"length": 10**6, "pack": False}))
    by_ids = {tuple(tokenizer(text)["input_ids"]): text for text in texts}
    return {by_ids[tuple(ids)] for ids, _ in read(folder)[1]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pack", [True, False])
def test_blocks_are_those_of_a_plain_loop(
    tmp_path: Path, tokenizer_of: Tokens, kind: str, pack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "CHUNK_TOKENS", 23)
    monkeypatch.setattr(corpus, "BATCH_TEXTS", 7)
    tokenizer = tokenizer_of(kind)
    facts = write(tmp_path / "out", iter(LONG), tokenizer, pack=pack)
    held_out = find_held_out(LONG, tokenizer, tmp_path / "each")
    assert 0 < len(held_out) < len(LONG) == len(set(LONG))
    sides = [[t for t in LONG if t not in held_out], [t for t in LONG if t in held_out]]
    expected = [cut_by_loop(side, tokenizer, pack) for side in sides]
    assert read(tmp_path / "out") == expected
    tokens = [sum(len(tokenizer.tokenize(text)) for text in side) for side in sides]
    assert asdict(facts) | {"fingerprint": ""} == {
        "documents": len(sides[0]), "tokens": tokens[0], "blocks": len(expected[0]),
        "held_out_documents": len(sides[1]), "held_out_tokens": tokens[1],
        "held_out_blocks": len(expected[1]), "duplicates": 0, "leaked": 0, "empty": 0,
        "fingerprint": "",
    }  # fmt: skip
    assert not list((tmp_path / "out").glob("stream*"))


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_those_between_spaces(tmp_path: Path, tokenizer_of: Tokens, kind: str) -> None:
    tokenizer, several = tokenizer_of(kind), 0
    write(tmp_path, TEXTS, tokenizer, length=512, pack=False)
    for ids, words in TokenBlocks(tmp_path, "train"):
        assert ids.dtype == words.dtype == np.int64
        decoded = [tokenizer.decode(ids[words == n]).strip() for n in range(words.max() + 1)]
        several += len(ids) - 2 - len(decoded)
        assert " ".join(decoded) in TEXTS
    assert several > 100


@pytest.mark.parametrize("kind", KINDS)
def test_document_longer_than_a_batch_is_tokenised_the_same(
    tmp_path: Path, tokenizer_of: Tokens, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, characters in (("whole", 10**6), ("cut", 40)):
        monkeypatch.setattr(corpus, "BATCH_CHARACTERS", characters)
        write(tmp_path / name, LONG, tokenizer_of(kind), pack=False)
    assert read(tmp_path / "whole") == read(tmp_path / "cut")


def test_memory_does_not_grow_with_the_corpus(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "CHUNK_TOKENS", 4096)
    monkeypatch.setattr(corpus, "BATCH_TEXTS", 10)
    peaks, stored = [], 0
    for count in (50, 500):
        tracemalloc.start()
        texts = (f"{number} " + " ".join(LONG[:20]) for number in range(count))
        facts = write(tmp_path / str(count), texts, tokenizer, length=128)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        stored = 3 * (facts.tokens + facts.held_out_tokens)
    assert peaks[1] - peaks[0] < stored / 50


def test_held_out_documents_depend_on_texts_and_seed_alone(tmp_path: Path, tokenizer: Any) -> None:
    def hold_out(texts: list[str], seed: int = 0) -> set[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return find_held_out(texts, tokenizer, folder, held_out=0.3, seed=seed)

    first = hold_out(LONG)
    assert hold_out(random.Random(0).sample(LONG, len(LONG))) == first
    assert hold_out(LONG[:25]) == first & set(LONG[:25])
    others = [hold_out(LONG, seed) for seed in range(1, 11)]
    assert all(other != first for other in others)
    assert 0.2 < sum(map(len, others)) / len(others) / len(LONG) < 0.4


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_each_side_has_a_document(tmp_path: Path, tokenizer: Any, share: float) -> None:
    facts = write(tmp_path, TEXTS[:9], tokenizer, held_out=share, pack=False)
    assert sorted((facts.documents, facts.held_out_documents)) == [1, 8]


def test_copies_and_leaked_documents_are_dropped(tmp_path: Path, tokenizer: Any) -> None:
    texts = [*LONG, *LONG[20:30], LONG[25], " "]
    facts = write(tmp_path / "a", texts, tokenizer, set(LONG[:5]).__contains__)
    assert (facts.duplicates, facts.leaked, facts.empty) == (11, 5, 1)
    clean = write(tmp_path / "b", LONG[5:], tokenizer)
    assert read(tmp_path / "a") == read(tmp_path / "b")
    backwards = write(tmp_path / "c", LONG[:4:-1], tokenizer)
    assert facts.fingerprint == clean.fingerprint == backwards.fingerprint


def test_fingerprints_of_different_corpora_differ(tmp_path: Path, tokenizer: Any) -> None:
    corpora = (LONG, LONG[1:], [LONG[0] + " .", *LONG[1:]])
    facts = [write(tmp_path / str(i), texts, tokenizer) for i, texts in enumerate(corpora)]
    assert len({part.fingerprint for part in facts}) == 3


def test_a_large_vocabulary_is_stored_in_full(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer = pickle.loads(pickle.dumps(tokenizer))
    tokenizer.add_tokens([f"token{number}" for number in range(1 << 16)])
    texts = [f"the token{65535 - number} of it" for number in range(30)]
    write(tmp_path, texts, tokenizer, pack=False)
    stored = {tuple(ids) for side in read(tmp_path) for ids, _ in side}
    assert stored == {tuple(tokenizer(text)["input_ids"]) for text in texts}
    assert max(map(max, stored)) > 1 << 16


def test_blocks_travel_to_a_worker_as_a_path(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path, LONG, tokenizer)
    blocks = TokenBlocks(tmp_path, "train")
    sent = pickle.dumps(blocks)
    assert len(sent) < 500
    assert np.array_equal(pickle.loads(sent)[3][0], blocks[3][0])
    with pytest.raises(IndexError):
        blocks[len(blocks)]


@pytest.mark.parametrize(
    ("texts", "spec", "drop", "message"),
    [
        ([], {}, drop_none, "^the corpus has no documents, at least 2 are needed"),
        (["good"], {}, drop_none, "^the corpus has 1 document, at least 2 are needed"),
        (["good", "good"], {}, drop_none, "has 1 document .dropped: 1 duplicate., at least 2"),
        (["good", "bad"], {}, lambda text: True, "has no documents .dropped: 2 leaked."),
        (TEXTS[:3], {"length": 256}, drop_none, r"^the corpus holds \d+ tokens, fewer than one "
         "block of 256.*adapt.pack=false or a smaller data.max_length"),
    ],
)  # fmt: skip
def test_a_corpus_that_is_too_small_is_refused(
    tmp_path: Path, tokenizer: Any, texts: list[str], spec: Any, drop: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write(tmp_path, texts, tokenizer, drop, **spec)


def test_a_block_needs_room_for_text_and_a_fast_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match="data.max_length=2 leaves no room"):
        write(tmp_path, LONG, tokenizer, length=2)

    class Slow:
        is_fast = False

    with pytest.raises(RecipeError, match="not a fast one"):
        write(tmp_path, LONG, Slow())
