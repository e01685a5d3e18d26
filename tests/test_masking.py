"""Masking: shares by chi-square, whole words, what decides a mask, batches by brute force."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from scipy.stats import chisquare

from hftl.data.masking import (
    MaskedBlocks,
    MaskingSpec,
    build_masking_spec,
    collate_masked_blocks,
    mask_tokens,
)
from hftl.errors import RecipeError

RATIO = 0.15
VOCABULARY = 500
SPECIAL = np.arange(5)
MASK = 4
TOKENS = 1_000_000


def masking(whole_words: bool = False, ratio: float = RATIO) -> MaskingSpec:
    special = np.arange(VOCABULARY) < len(SPECIAL)
    return MaskingSpec(ratio, whole_words, MASK, special, np.flatnonzero(~special))


def block(length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random ids between [CLS] and [SEP], with words of one to four tokens."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(len(SPECIAL), VOCABULARY, length)
    words = np.repeat(np.arange(length), draw.integers(1, 5, length))[:length]
    ids[[0, -1]], words[[0, -1]] = [2, 3], -1
    words[words > 0] -= words[1]
    words[1:-1] -= words[1]
    return ids, words


class Stored:
    """Blocks in memory, of differing lengths."""

    lengths = (20, 12, 20, 3, 16)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return block(self.lengths[i], i)


def dataset(seed: int = 0, whole_words: bool = True, fixed: bool = False) -> MaskedBlocks:
    blocks: Any = Stored()
    return MaskedBlocks(blocks, masking(whole_words, 0.4), seed, 0, fixed)


def passes(counts: list[int], shares: list[float]) -> bool:
    return chisquare(counts, np.array(shares) * sum(counts)).pvalue > 1e-3


@pytest.fixture(scope="module")
def million() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A million plain tokens: their ids, what is shown, and the chosen positions."""
    draw = np.random.default_rng(1)
    ids = draw.integers(len(SPECIAL), VOCABULARY, TOKENS)
    return ids, *mask_tokens(ids, np.arange(TOKENS), masking(), draw)


def test_tokens_are_chosen_at_the_ratio(million: tuple[np.ndarray, ...]) -> None:
    _, _, positions = million
    assert positions.dtype == np.int64
    assert (np.diff(positions) > 0).all()
    assert passes([len(positions), TOKENS - len(positions)], [RATIO, 1 - RATIO])


def test_a_choice_does_not_depend_on_place_or_neighbour(million: tuple[np.ndarray, ...]) -> None:
    _, _, positions = million
    chosen = np.zeros(TOKENS, dtype=int)
    chosen[positions] = 1
    assert passes(chosen.reshape(100, -1).sum(1).tolist(), [0.01] * 100)
    pairs = np.bincount(chosen[:-1:2] * 2 + chosen[1::2], minlength=4)
    no = 1 - RATIO
    assert passes(pairs.tolist(), [no * no, no * RATIO, RATIO * no, RATIO * RATIO])


def test_eight_of_ten_are_masked_one_is_random_and_one_kept(
    million: tuple[np.ndarray, ...],
) -> None:
    ids, shown, positions = million
    masked = shown[positions] == MASK
    changed = (shown[positions] != ids[positions]) & ~masked
    # A random draw gives the token itself once in the size of the vocabulary.
    same = 0.1 / (VOCABULARY - len(SPECIAL))
    counts = [int(masked.sum()), int(changed.sum()), int((~masked & ~changed).sum())]
    assert passes(counts, [0.8, 0.1 - same, 0.1 + same])
    untouched = np.setdiff1d(np.arange(TOKENS), positions)
    assert np.array_equal(shown[untouched], ids[untouched])
    drawn = np.bincount(shown[positions][changed], minlength=VOCABULARY)
    assert drawn[SPECIAL].sum() == 0
    assert passes(drawn[len(SPECIAL) :].tolist(), [1 / (VOCABULARY - len(SPECIAL))] * 495)


def test_whole_words_are_chosen_together_each_at_the_ratio() -> None:
    ids, words = block(200_000)
    chosen_positions = [
        mask_tokens(ids, words, masking(True), np.random.default_rng(s))[1] for s in range(5)
    ]
    for positions in chosen_positions:
        chosen = np.zeros(len(ids), dtype=bool)
        chosen[positions] = True
        assert np.array_equal(chosen, np.isin(words, words[positions]))
        count = len(np.unique(words[positions]))
        assert passes([count, words.max() + 1 - count], [RATIO, 1 - RATIO])
    fates = [mask_tokens(ids, words, masking(True), np.random.default_rng(s))[0] for s in range(5)]
    masked = sum(
        int((shown[p] == MASK).sum()) for shown, p in zip(fates, chosen_positions, strict=True)
    )
    total = sum(map(len, chosen_positions))
    assert passes([masked, total - masked], [0.8, 0.2])


def test_tokens_alone_split_words() -> None:
    ids, words = block(10_000)
    _, positions = mask_tokens(ids, words, masking(), np.random.default_rng(0))
    assert not np.array_equal(positions, np.flatnonzero(np.isin(words, words[positions])))


@pytest.mark.parametrize("whole_words", [True, False])
def test_special_tokens_are_never_chosen(whole_words: bool) -> None:
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 10, 5_000)
    words = np.where(ids == 3, -1, np.arange(len(ids)) // 2)
    for _ in range(20):
        shown, positions = mask_tokens(ids, words, masking(whole_words, 0.9), draw)
        assert not np.isin(ids[positions], SPECIAL).any()
        assert np.array_equal(shown[ids < 5], ids[ids < 5])
    before = ids.copy()
    outside = np.full(4, -1)
    shown, positions = mask_tokens(np.full(4, 77), outside, masking(whole_words, 0.9), draw)
    assert len(positions) == 0 and (shown == 77).all()
    assert np.array_equal(ids, before)


def test_masks_are_a_function_of_seed_epoch_and_block() -> None:
    rows = dataset()
    first = [rows[i] for i in range(5)]
    again = dataset()
    for i in (3, 1, 4, 0, 2):
        assert all(np.array_equal(again[i][key], first[i][key]) for key in first[i])
    rows.set_epoch(1)
    other_epoch = [rows[i]["input_ids"] for i in range(5)]
    other_seed = [dataset(seed=1)[i]["input_ids"] for i in range(5)]
    for others in (other_epoch, other_seed):
        same = [np.array_equal(o, row["input_ids"]) for o, row in zip(others, first, strict=True)]
        assert not all(same)
    rows.set_epoch(0)
    assert np.array_equal(rows[0]["input_ids"], first[0]["input_ids"])
    sent = pickle.loads(pickle.dumps(again))
    assert np.array_equal(sent[2]["input_ids"], first[2]["input_ids"])


def test_no_two_blocks_share_their_random_numbers() -> None:
    class Same(Stored):
        def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
            return block(200)

    distinct = set()
    for seed in range(4):
        rows = MaskedBlocks(Same(), masking(), seed, 0)  # pyright: ignore
        for epoch in range(4):
            rows.set_epoch(epoch)
            distinct |= {rows[i]["positions"].tobytes() for i in range(5)}
    assert len(distinct) == 4 * 4 * 5


def test_fixed_masks_stay_those_of_epoch_0() -> None:
    fixed, moving = dataset(fixed=True), dataset()
    fixed.set_epoch(7)
    for i in range(5):
        assert np.array_equal(fixed[i]["input_ids"], moving[i]["input_ids"])


def test_a_row_holds_what_stood_at_its_positions() -> None:
    for i, row in enumerate(dataset()[i] for i in range(5)):
        ids, _ = Stored()[i]
        assert np.array_equal(row["labels"], ids[row["positions"]])
        restored = row["input_ids"].copy()
        restored[row["positions"]] = row["labels"]
        assert np.array_equal(restored, ids)


def brute_force(rows: list[dict[str, np.ndarray]], pad_id: int) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    most = max(1, max(len(row["labels"]) for row in rows))
    ids, mask, flat, slots, labels = [], [], [], [], []
    for number, row in enumerate(rows):
        fill = longest - len(row["input_ids"])
        ids.append([*row["input_ids"], *[pad_id] * fill])
        mask.append([1] * (longest - fill) + [0] * fill)
        for place, position in enumerate(row["positions"]):
            flat.append(number * longest + position)
            slots.append(number * most + place)
        labels.append([*row["labels"], *[-100] * (most - len(row["labels"]))])
    batch = {"input_ids": ids, "attention_mask": mask, "flat": flat, "slots": slots}
    if all(map(all, mask)):
        del batch["attention_mask"]
    return {k: torch.tensor(v, dtype=torch.int64) for k, v in {**batch, "labels": labels}.items()}


@pytest.mark.parametrize("picked", [[0, 1, 2, 3, 4], [0, 2], [3], [1]])
def test_a_batch_is_that_of_a_loop(picked: list[int]) -> None:
    for seed in range(20):
        rows = dataset(seed)
        some = [rows[i] for i in picked]
        batch, expected = rows.collate(some), brute_force(some, 0)
        assert list(batch) == list(expected)
        for key in expected:
            assert batch[key].dtype == torch.int64
            assert batch[key].shape == expected[key].shape and torch.equal(
                batch[key], expected[key]
            )
    assert ("attention_mask" in batch) == (len({len(row["input_ids"]) for row in some}) > 1)


def test_the_picked_tokens_meet_their_labels() -> None:
    rows = [dataset()[i] for i in range(5)]
    batch = collate_masked_blocks(rows, pad_id=9)
    ids = torch.full(batch["input_ids"].shape, 9)
    for i in range(5):
        whole = torch.from_numpy(Stored()[i][0])
        ids[i, : len(whole)] = whole
    labels = batch["labels"].reshape(-1)
    assert torch.equal(ids.reshape(-1)[batch["flat"]], labels[batch["slots"]])
    assert len(batch["slots"]) == int((labels != -100).sum())


def test_a_batch_without_a_chosen_token_has_labels_all_the_same() -> None:
    ids = np.array([2, 7, 3])
    empty = np.array([], dtype=np.int64)
    batch = collate_masked_blocks([{"input_ids": ids, "positions": empty, "labels": empty}] * 2, 0)
    assert batch["labels"].tolist() == [[-100], [-100]]
    assert batch["flat"].shape == batch["slots"].shape == (0,)


def test_the_masking_of_a_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny_tokenizer(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    spec = build_masking_spec(tokenizer, 0.3, True)
    special = {tokenizer.convert_tokens_to_ids(name) for name in tokenizer.all_special_tokens}
    assert len(special) == 5
    assert set(np.flatnonzero(spec.special)) == special
    assert spec.replaceable.tolist() == [i for i in range(len(tokenizer)) if i not in special]
    assert (spec.ratio, spec.whole_words, spec.mask_id) == (0.3, True, tokenizer.mask_token_id)


@pytest.mark.parametrize("ratio", [0, 0.0, 1, 1.0, -0.1, 1.5, float("nan")])
def test_a_ratio_at_or_beyond_a_bound_is_refused(tmp_path: Path, ratio: float) -> None:
    with pytest.raises(RecipeError, match=f"^adapt.mask_ratio={ratio} must lie between 0 and 1"):
        build_masking_spec(None, ratio, False)


def test_a_tokenizer_without_masks_or_words_is_refused(tmp_path: Path) -> None:
    from tokenizers.pre_tokenizers import Split
    from transformers import AutoTokenizer

    tiny_tokenizer(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.pre_tokenizer = Split("none of it", "isolated")
    with pytest.raises(RecipeError, match="does not say where words begin. Set adapt.whole_words"):
        build_masking_spec(tokenizer, 0.15, True)
    assert not build_masking_spec(tokenizer, 0.15, False).whole_words
    tokenizer.mask_token = None
    with pytest.raises(RecipeError, match="no mask token"):
        build_masking_spec(tokenizer, 0.15, False)
