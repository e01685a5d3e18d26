"""Compare masks with their shares by chi-square, and batches with a plain loop."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from support.tiny import tiny_tokenizer
from tokenizers.pre_tokenizers import Split
from torch.utils.data import Subset
from transformers import AutoTokenizer

from hftl.config.adapt import Adapt
from hftl.data.masking import (
    MaskedBlocks,
    MaskingSpec,
    build_masking_spec,
    collate_masked_blocks,
    mask_tokens,
)
from hftl.errors import RecipeError
from hftl.pipeline.objectives import check_something_is_hidden

RATIO = 0.15
VOCABULARY = 500
SPECIAL = np.arange(5)
MASK = 4
TOKENS = 500_000


def build_spec(whole_words: bool = False, ratio: float = RATIO) -> MaskingSpec:
    special = np.arange(VOCABULARY) < len(SPECIAL)
    return MaskingSpec(ratio, whole_words, MASK, special, np.flatnonzero(~special))


def draw_block(length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return random ids between [CLS] and [SEP], and their words of one to four tokens."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(len(SPECIAL), VOCABULARY, length)
    words = np.repeat(np.arange(length), draw.integers(1, 5, length))[:length]
    ids[[0, -1]], words[[0, -1]] = [2, 3], -1
    words[words > 0] -= words[1]
    words[1:-1] -= words[1]
    return ids, words


class Blocks:
    """Hold blocks in memory, of differing lengths."""

    lengths = (20, 12, 20, 3, 16)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return draw_block(self.lengths[i], i)


def build_dataset(seed: int = 0, fixed: bool = False) -> MaskedBlocks:
    blocks: Any = Blocks()
    return MaskedBlocks(blocks, build_spec(True, 0.4), seed, 0, fixed)


def matches(counts: list[int], shares: list[float]) -> bool:
    return chisquare(counts, np.array(shares) * sum(counts)).pvalue > 1e-3


@pytest.fixture(scope="module")
def masked() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Many plain tokens: their ids, the masked ids, and the chosen positions."""
    draw = np.random.default_rng(1)
    ids = draw.integers(len(SPECIAL), VOCABULARY, TOKENS)
    return ids, *mask_tokens(ids, np.arange(TOKENS), build_spec(), draw)


def test_tokens_are_chosen_at_the_ratio_whatever_their_place_or_neighbour(
    masked: tuple[np.ndarray, ...],
) -> None:
    _, _, positions = masked
    assert positions.dtype == np.int64 and (np.diff(positions) > 0).all()
    assert matches([len(positions), TOKENS - len(positions)], [RATIO, 1 - RATIO])
    chosen = np.zeros(TOKENS, dtype=int)
    chosen[positions] = 1
    assert matches(chosen.reshape(100, -1).sum(1).tolist(), [0.01] * 100)
    pairs = np.bincount(chosen[:-1:2] * 2 + chosen[1::2], minlength=4)
    no = 1 - RATIO
    assert matches(pairs.tolist(), [no * no, no * RATIO, RATIO * no, RATIO * RATIO])


def test_eight_of_ten_are_masked_one_is_random_and_one_stays(
    masked: tuple[np.ndarray, ...],
) -> None:
    ids, shown, positions = masked
    is_mask = shown[positions] == MASK
    changed = (shown[positions] != ids[positions]) & ~is_mask
    # A random draw gives the token itself once in the size of the vocabulary.
    same = 0.1 / (VOCABULARY - len(SPECIAL))
    counts = [int(is_mask.sum()), int(changed.sum()), int((~is_mask & ~changed).sum())]
    assert matches(counts, [0.8, 0.1 - same, 0.1 + same])
    untouched = np.setdiff1d(np.arange(TOKENS), positions)
    assert np.array_equal(shown[untouched], ids[untouched])
    drawn = np.bincount(shown[positions][changed], minlength=VOCABULARY)
    assert drawn[SPECIAL].sum() == 0
    assert matches(drawn[len(SPECIAL) :].tolist(), [1 / (VOCABULARY - len(SPECIAL))] * 495)


def test_whole_words_are_chosen_together_each_at_the_ratio() -> None:
    ids, words = draw_block(100_000)
    masks = total = 0
    for seed in range(5):
        draw = np.random.default_rng(seed)
        shown, positions = mask_tokens(ids, words, build_spec(True), draw)
        chosen = np.zeros(len(ids), dtype=bool)
        chosen[positions] = True
        assert np.array_equal(chosen, np.isin(words, words[positions]))
        count = len(np.unique(words[positions]))
        assert matches([count, words.max() + 1 - count], [RATIO, 1 - RATIO])
        masks, total = masks + int((shown[positions] == MASK).sum()), total + len(positions)
    assert matches([masks, total - masks], [0.8, 0.2])
    _, positions = mask_tokens(ids, words, build_spec(), np.random.default_rng(0))
    assert not np.array_equal(positions, np.flatnonzero(np.isin(words, words[positions])))


@pytest.mark.parametrize("whole_words", [True, False])
def test_special_tokens_are_never_chosen(whole_words: bool) -> None:
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 10, 5_000)
    before = ids.copy()
    words = np.where(ids == 3, -1, np.arange(len(ids)) // 2)
    for _ in range(20):
        shown, positions = mask_tokens(ids, words, build_spec(whole_words, 0.9), draw)
        assert not np.isin(ids[positions], SPECIAL).any()
        assert np.array_equal(shown[ids < 5], ids[ids < 5])
    assert np.array_equal(ids, before)
    outside = np.full(4, -1)
    shown, positions = mask_tokens(np.full(4, 77), outside, build_spec(whole_words, 0.9), draw)
    assert len(positions) == 0 and (shown == 77).all()


def test_masks_are_a_function_of_seed_epoch_and_block() -> None:
    rows, again, fixed = build_dataset(), build_dataset(), build_dataset(fixed=True)
    first = [rows[i] for i in range(5)]
    for i in (3, 1, 4, 0, 2):
        assert all(np.array_equal(again[i][key], first[i][key]) for key in first[i])
    rows.set_epoch(1)
    fixed.set_epoch(7)
    for others in (rows, build_dataset(seed=1)):
        same = [np.array_equal(others[i]["input_ids"], first[i]["input_ids"]) for i in range(5)]
        assert not all(same)
    rows.set_epoch(0)
    sent = pickle.loads(pickle.dumps(again))
    for others in (rows, fixed, sent):
        assert all(np.array_equal(others[i]["input_ids"], first[i]["input_ids"]) for i in range(5))


def test_no_two_blocks_share_their_random_numbers() -> None:
    class Same(Blocks):
        def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
            return draw_block(200)

    distinct = set()
    for seed in range(4):
        rows = MaskedBlocks(Same(), build_spec(), seed, 0)  # pyright: ignore
        for epoch in range(4):
            rows.set_epoch(epoch)
            distinct |= {rows[i]["positions"].tobytes() for i in range(5)}
    assert len(distinct) == 4 * 4 * 5


def test_labels_are_the_ids_at_the_positions() -> None:
    for i, row in enumerate(build_dataset()[i] for i in range(5)):
        ids, _ = Blocks()[i]
        assert np.array_equal(row["labels"], ids[row["positions"]])
        restored = row["input_ids"].copy()
        restored[row["positions"]] = row["labels"]
        assert np.array_equal(restored, ids)


def collate_by_loop(rows: list[dict[str, np.ndarray]], pad_id: int) -> dict[str, torch.Tensor]:
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


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4], [0, 2], [3], [1]])
def test_a_batch_is_that_of_a_plain_loop(chosen: list[int]) -> None:
    for seed in range(20):
        dataset = build_dataset(seed)
        rows = [dataset[i] for i in chosen]
        batch, expected = dataset.collate(rows), collate_by_loop(rows, 0)
        assert list(batch) == list(expected)
        for key in expected:
            assert batch[key].dtype == torch.int64 and torch.equal(batch[key], expected[key])
    assert ("attention_mask" in batch) == (len({len(row["input_ids"]) for row in rows}) > 1)


def test_a_batch_without_a_chosen_token_has_labels_all_the_same() -> None:
    ids = np.array([2, 7, 3])
    empty = np.array([], dtype=np.int64)
    batch = collate_masked_blocks([{"input_ids": ids, "positions": empty, "labels": empty}] * 2, 0)
    assert batch["labels"].tolist() == [[-100], [-100]]
    assert batch["flat"].shape == batch["slots"].shape == (0,)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    tiny_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_spec_follows_the_tokenizer(tokenizer: Any) -> None:
    spec = build_masking_spec(tokenizer, 0.3, True)
    special = {tokenizer.convert_tokens_to_ids(name) for name in tokenizer.all_special_tokens}
    assert len(special) == 5
    assert set(np.flatnonzero(spec.special)) == special
    assert spec.replaceable.tolist() == [i for i in range(len(tokenizer)) if i not in special]
    assert (spec.ratio, spec.whole_words, spec.mask_id) == (0.3, True, tokenizer.mask_token_id)


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, float("nan")])
def test_a_ratio_at_or_beyond_a_bound_is_refused(ratio: float) -> None:
    with pytest.raises(RecipeError, match=f"^adapt.mask_ratio={ratio} must lie between 0 and 1"):
        build_masking_spec(None, ratio, False)


def test_a_tokenizer_without_masks_or_words_is_refused(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = Split("none of it", "isolated")
    with pytest.raises(RecipeError, match="does not say where words begin. Set adapt.whole_words"):
        build_masking_spec(tokenizer, 0.15, True)
    assert not build_masking_spec(tokenizer, 0.15, False).whole_words
    tokenizer.mask_token = None
    with pytest.raises(RecipeError, match="no mask token"):
        build_masking_spec(tokenizer, 0.15, False)


def test_blocks_without_a_hidden_token_are_refused() -> None:
    blocks: Any = Blocks()
    for ratio in (1e-9, 0.4):
        rows = Subset(MaskedBlocks(blocks, build_spec(False, ratio), 0, 0, True), [0, 1])
        stage = Adapt.model_validate({"objective": "mlm", "mask_ratio": ratio})
        if ratio == 0.4:
            check_something_is_hidden(rows, stage)
            continue
        with pytest.raises(RecipeError, match="adapt.mask_ratio=1e-09 hides no token"):
            check_something_is_hidden(rows, stage)
