"""Compare the blocks of a corpus with a plain loop; hold out documents, drop copies."""

import pickle
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import sentences

from hftl.data import corpus
from hftl.data.corpus import BlockSpec, TokenBlocks, write_blocks
from hftl.errors import DataError, RecipeError

TEXTS = [text for text, _ in sentences(60)]
LONG = [" ".join(TEXTS[i : i + 1 + i % 5]) for i in range(50)]
KINDS = ("wordpiece", "bytes", "pieces")


def keep_all(text: str) -> bool:
    return False


def train_tokenizer(kind: str) -> Any:
    """Train a fast tokenizer of one of three kinds, with words of several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

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
def tokenizer_of() -> Callable[[str], Any]:
    made = {kind: train_tokenizer(kind) for kind in KINDS}
    return lambda kind: made[kind]


def build_spec(**changes: Any) -> BlockSpec:
    return BlockSpec(**{"length": 16, "pack": True, "held_out": 0.2, "seed": 0} | changes)


def read_blocks(folder: Path) -> list[list[tuple[list[int], list[int]]]]:
    sides = [TokenBlocks(folder, part) for part in ("train", "held_out")]
    return [[(ids.tolist(), words.tolist()) for ids, words in side] for side in sides]


def cut_by_loop(
    texts: list[str], tokenizer: Any, cut: BlockSpec
) -> list[tuple[list[int], list[int]]]:
    """Cut documents into blocks token by token."""
    before, after, payload = [tokenizer.cls_token_id], [tokenizer.sep_token_id], cut.length - 2
    streams: list[list[tuple[int, Any]]] = [[]]
    for number, text in enumerate(texts):
        encoding = tokenizer(text, add_special_tokens=False)
        if number:
            streams[-1].append((after[0], None))
            if not cut.pack:
                streams[-1].pop()
                streams.append([])
        streams[-1] += [
            (token, (number, word))
            for token, word in zip(encoding["input_ids"], encoding.word_ids(), strict=True)
        ]
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


def held_out_texts(texts: list[str], tokenizer: Any, cut: BlockSpec, folder: Path) -> set[str]:
    """Return the documents held out: those whose blocks are, were every document one block."""
    folder.mkdir()
    write_blocks(
        texts, tokenizer, BlockSpec(10**6, False, cut.held_out, cut.seed), keep_all, folder
    )
    ids = {tuple(tokenizer(text)["input_ids"]): text for text in texts}
    return {ids[tuple(block_ids)] for block_ids, _ in read_blocks(folder)[1]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pack", [True, False])
def test_blocks_are_those_of_a_plain_loop(
    tmp_path: Path, tokenizer_of: Callable[[str], Any], kind: str, pack: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(corpus, "CHUNK_TOKENS", 23)
    monkeypatch.setattr(corpus, "BATCH_TEXTS", 7)
    tokenizer, cut = tokenizer_of(kind), build_spec(pack=pack)
    (tmp_path / "out").mkdir()
    facts = write_blocks(iter(LONG), tokenizer, cut, keep_all, tmp_path / "out")
    held_out = held_out_texts(LONG, tokenizer, cut, tmp_path / "each")
    assert 0 < len(held_out) < len(LONG) == len(set(LONG))
    sides = [[t for t in LONG if t not in held_out], [t for t in LONG if t in held_out]]
    expected = [cut_by_loop(side, tokenizer, cut) for side in sides]
    assert read_blocks(tmp_path / "out") == expected
    tokens = [sum(len(tokenizer.tokenize(text)) for text in side) for side in sides]
    assert asdict(facts) | {"fingerprint": ""} == {
        "documents": len(sides[0]), "tokens": tokens[0], "blocks": len(expected[0]),
        "held_out_documents": len(sides[1]), "held_out_tokens": tokens[1],
        "held_out_blocks": len(expected[1]), "duplicates": 0, "leaked": 0, "empty": 0,
        "fingerprint": "",
    }  # fmt: skip
    assert not list((tmp_path / "out").glob("stream*"))


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_those_between_spaces(
    tmp_path: Path, tokenizer_of: Callable[[str], Any], kind: str
) -> None:
    tokenizer = tokenizer_of(kind)
    write_blocks(TEXTS, tokenizer, build_spec(length=512, pack=False), keep_all, tmp_path)
    several = 0
    for ids, words in TokenBlocks(tmp_path, "train"):
        assert ids.dtype == words.dtype == np.int64
        spelt = [tokenizer.decode(ids[words == n]).strip() for n in range(words.max() + 1)]
        several += len(ids) - 2 - len(spelt)
        assert " ".join(spelt) in TEXTS
    assert several > 100


@pytest.mark.parametrize("kind", KINDS)
def test_document_longer_than_a_batch_is_tokenised_the_same(
    tmp_path: Path, tokenizer_of: Callable[[str], Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, cut = tokenizer_of(kind), build_spec(pack=False)
    for name, characters in (("whole", 10**6), ("cut", 40)):
        monkeypatch.setattr(corpus, "BATCH_CHARACTERS", characters)
        (tmp_path / name).mkdir()
        write_blocks(LONG, tokenizer, cut, keep_all, tmp_path / name)
    assert read_blocks(tmp_path / "whole") == read_blocks(tmp_path / "cut")


def test_memory_does_not_grow_with_the_corpus(
    tmp_path: Path, tokenizer_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "CHUNK_TOKENS", 4096)
    monkeypatch.setattr(corpus, "BATCH_TEXTS", 10)
    peaks = []
    for count in (50, 500):
        folder = tmp_path / str(count)
        folder.mkdir()
        tracemalloc.start()
        texts = (f"{number} " + " ".join(LONG[:20]) for number in range(count))
        facts = write_blocks(
            texts, tokenizer_of("wordpiece"), build_spec(length=128), keep_all, folder
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    stored = 3 * (facts.tokens + facts.held_out_tokens)
    assert peaks[1] - peaks[0] < stored / 50


def test_held_out_documents_depend_on_texts_and_seed_alone(
    tmp_path: Path, tokenizer_of: Callable[[str], Any]
) -> None:
    tokenizer, cut = tokenizer_of("wordpiece"), build_spec(held_out=0.3)
    first = held_out_texts(LONG, tokenizer, cut, tmp_path / "a")
    shuffled = random.Random(0).sample(LONG, len(LONG))
    assert held_out_texts(shuffled, tokenizer, cut, tmp_path / "b") == first
    assert held_out_texts(LONG[:25], tokenizer, cut, tmp_path / "c") == first & set(LONG[:25])
    others = [
        held_out_texts(LONG, tokenizer, build_spec(held_out=0.3, seed=seed), tmp_path / f"{seed}")
        for seed in range(1, 11)
    ]
    assert all(other != first for other in others)
    assert 0.2 < sum(map(len, others)) / len(others) / len(LONG) < 0.4


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_each_side_has_a_document(
    tmp_path: Path, tokenizer_of: Callable[[str], Any], share: float
) -> None:
    cut = build_spec(held_out=share, pack=False)
    facts = write_blocks(TEXTS[:9], tokenizer_of("bytes"), cut, keep_all, tmp_path)
    assert sorted((facts.documents, facts.held_out_documents)) == [1, 8]


def test_copies_and_leaked_documents_are_dropped(
    tmp_path: Path, tokenizer_of: Callable[[str], Any]
) -> None:
    tokenizer = tokenizer_of("wordpiece")
    leaked = set(LONG[:5])
    texts = [*LONG, *LONG[20:30], LONG[25], " "]
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    facts = write_blocks(texts, tokenizer, build_spec(), leaked.__contains__, folders[0])
    assert (facts.duplicates, facts.leaked, facts.empty) == (11, 5, 1)
    clean = write_blocks(LONG[5:], tokenizer, build_spec(), keep_all, folders[1])
    assert read_blocks(folders[0]) == read_blocks(folders[1])
    assert facts.fingerprint == clean.fingerprint
    backwards = write_blocks(LONG[:4:-1], tokenizer, build_spec(), keep_all, folders[2])
    assert backwards.fingerprint == clean.fingerprint


def test_fingerprints_of_different_corpora_differ(
    tmp_path: Path, tokenizer_of: Callable[[str], Any]
) -> None:
    fingerprints = set()
    for number, texts in enumerate((LONG, LONG[1:], [LONG[0] + " .", *LONG[1:]])):
        (tmp_path / str(number)).mkdir()
        facts = write_blocks(
            texts, tokenizer_of("bytes"), build_spec(), keep_all, tmp_path / str(number)
        )
        fingerprints.add(facts.fingerprint)
    assert len(fingerprints) == 3


def test_a_large_vocabulary_is_stored_in_full(
    tmp_path: Path, tokenizer_of: Callable[[str], Any]
) -> None:
    tokenizer = pickle.loads(pickle.dumps(tokenizer_of("wordpiece")))
    tokenizer.add_tokens([f"token{number}" for number in range(1 << 16)])
    texts = [f"the token{65535 - number} of it" for number in range(30)]
    write_blocks(texts, tokenizer, build_spec(pack=False), keep_all, tmp_path)
    stored = {tuple(ids) for side in read_blocks(tmp_path) for ids, _ in side}
    assert stored == {tuple(tokenizer(text)["input_ids"]) for text in texts}
    assert max(map(max, stored)) > 1 << 16


def test_blocks_travel_to_a_worker_as_a_path(
    tmp_path: Path, tokenizer_of: Callable[[str], Any]
) -> None:
    write_blocks(LONG, tokenizer_of("wordpiece"), build_spec(), keep_all, tmp_path)
    blocks = TokenBlocks(tmp_path, "train")
    sent = pickle.dumps(blocks)
    assert len(sent) < 500
    assert np.array_equal(pickle.loads(sent)[3][0], blocks[3][0])
    with pytest.raises(IndexError):
        blocks[len(blocks)]


@pytest.mark.parametrize(
    ("texts", "changes", "drop", "message"),
    [
        ([], {}, keep_all, "^the corpus has no documents, at least 2 are needed"),
        (["good"], {}, keep_all, "^the corpus has 1 document, at least 2 are needed"),
        (["good", "good"], {}, keep_all, "has 1 document .dropped: 1 duplicates., at least 2"),
        (["good", "bad"], {}, lambda text: True, "has no documents .dropped: 2 leaked."),
        (TEXTS[:3], {"length": 256}, keep_all, r"^the corpus holds \d+ tokens, fewer than one "
         "block of 256.*adapt.pack=false or a smaller data.max_length"),
    ],
)  # fmt: skip
def test_a_corpus_that_is_too_small_is_refused(
    tmp_path: Path, tokenizer_of: Callable[[str], Any], texts: list[str],
    changes: dict[str, Any], drop: Callable[[str], bool], message: str,
) -> None:  # fmt: skip
    with pytest.raises(DataError, match=message):
        write_blocks(texts, tokenizer_of("wordpiece"), build_spec(**changes), drop, tmp_path)


def test_a_block_needs_room_for_text(tmp_path: Path, tokenizer_of: Callable[[str], Any]) -> None:
    with pytest.raises(RecipeError, match="data.max_length=2 leaves no room"):
        write_blocks(LONG, tokenizer_of("bytes"), build_spec(length=2), keep_all, tmp_path)


def test_a_tokenizer_in_python_is_refused(tmp_path: Path) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(RecipeError, match="not a fast one"):
        write_blocks(LONG, Slow(), build_spec(), keep_all, tmp_path)
