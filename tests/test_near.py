"""Near duplicates, against brute force over all pairs."""

import random
import unicodedata
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from imagehash import phash
from PIL import Image

from hftl.data.duplicates import NearImageIndex, NearTextIndex, build_shingles

WORDS = [f"word{i}" for i in range(400)]


def prose(words: int, draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=words))


@cache
def runs(text: str) -> set[str]:
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return {"|".join(words[i : i + 3]) for i in range(len(words) - 2)} or {"|".join(words)}


def similarity(one: str, other: str) -> float:
    """Jaccard, written out from the definition."""
    a, b = runs(one), runs(other)
    return len(a & b) / len(a | b)


def edited(text: str, share: float, draw: random.Random) -> str:
    """The text with a stretch of its words replaced: neighbouring edits share their shingles."""
    words = text.split()
    count = max(1, int(share * len(words)))
    start = draw.randrange(len(words) - count)
    words[start : start + count] = [f"new{draw.randrange(10**6)}" for _ in range(count)]
    return " ".join(words)


def test_near_texts_are_those_that_brute_force_finds() -> None:
    draw = random.Random(0)
    measured = [prose(draw.randint(20, 200), draw) for _ in range(120)]
    corpus = [edited(text, draw.uniform(0, 0.15), draw) for text in measured for _ in range(5)]
    corpus += [prose(60, draw) for _ in range(100)]
    near = NearTextIndex(measured)

    def quotes(text: str) -> bool:
        """Return whether four fifths of a measured text's shingles are the text's."""
        mine = build_shingles(text)
        return any(len(mine & build_shingles(m)) >= 0.8 * len(build_shingles(m)) for m in measured)

    best = [max(similarity(text, other) for other in measured) for text in corpus]
    want = [score >= 0.8 or quotes(text) for text, score in zip(corpus, best, strict=True)]
    is_near = [text in near for text in corpus]
    assert 200 < sum(want) < 600 and sum(0.8 <= score < 0.85 for score in best) > 30
    assert not any(f and not w for f, w in zip(is_near, want, strict=True))
    recall = sum(f and w for f, w in zip(is_near, want, strict=True)) / sum(want)
    assert recall >= 0.99


def test_the_threshold_decides() -> None:
    draw = random.Random(1)
    text = prose(100, draw)
    words = text.split()
    copy = " ".join([*words[:90], *(f"other{i}" for i in range(10))])
    assert 0.7 < similarity(text, copy) < 0.85
    assert copy in NearTextIndex([text], threshold=0.7)
    assert copy not in NearTextIndex([text], threshold=0.9)


def test_case_and_signs_do_not_matter_and_words_do() -> None:
    near = NearTextIndex(["The film, it was GOOD!", "Fine.", "don't", "!!!", "naïve café au lait"])
    for text in ("the film it was good", "FINE", "Don’t", " !!! ", "Naïve -- café: au lait"):
        assert text in near
    for text in ("the film it was bad", "fine film", "film", "?!", "", "naive cafe au lait"):
        assert text not in near


@pytest.mark.parametrize(
    "write",
    [
        lambda text: unicodedata.normalize("NFD", text), str.upper,
        lambda text: text.replace("\u00e9", "\u00e9\u200b"),
        lambda text: text.replace("an", "a\u00adn").replace("re", "r\u00ade"),
        lambda text: text.replace(" ", "\u00a0\r\n"),
    ],
)  # fmt: skip
def test_a_copy_of_another_spelling_is_near(write: Callable[[str], str]) -> None:
    text = "le caf\u00e9 tr\u00e8s anim\u00e9 de la for\u00eat ferm\u00e9 avant la re-lecture"
    assert write(text) != text and write(text) in NearTextIndex([text])


def test_a_text_that_quotes_a_measured_one_is_found_if_that_says_enough() -> None:
    draw = random.Random(2)
    short, long = prose(12, draw), prose(300, draw)
    near = NearTextIndex([short])
    assert f"{long} {short} {long}" in near and short in near and long not in near
    half = " ".join(short.split()[:6])
    assert f"{long} {half} {long}" not in near
    phrase = prose(5, draw)
    assert f"{long} {phrase} {long}" not in NearTextIndex([phrase])
    # Every shingle of it is measured, in several texts: it passes the union but is near to none.
    texts = [prose(7, draw) for _ in range(4)]
    assert " ".join(texts) not in NearTextIndex(texts)


def test_nothing_is_near_no_texts() -> None:
    assert "a text of words" not in NearTextIndex([]) and "" not in NearTextIndex([])


def test_shingles_are_never_none() -> None:
    assert build_shingles("one two") == {("one", "two")} and build_shingles(" ") == {("",)}
    assert build_shingles("a b c a b c") == {("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b")}


def canvas(seed: int, side: int = 64) -> np.ndarray:
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1).copy()


def changed(pixels: np.ndarray, seed: int) -> np.ndarray:
    """Noisier, a little brighter, and through a smaller size."""
    noise = np.random.default_rng(seed).normal(4, 4, pixels.shape)
    noisy = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    image = Image.fromarray(noisy.transpose(1, 2, 0)).resize((48, 48)).resize((64, 64))
    return np.asarray(image).transpose(2, 0, 1)


def test_near_pictures_are_those_that_imagehash_finds() -> None:
    measured = [canvas(seed) for seed in range(60)]
    corpus = [changed(pixels, 100 + i) for i, pixels in enumerate(measured)]
    corpus += [canvas(seed) for seed in range(1000, 1060)]

    def theirs(pixels: np.ndarray) -> object:
        return phash(Image.fromarray(pixels.transpose(1, 2, 0)))

    hashes = [theirs(pixels) for pixels in measured]
    for distance in (0, 4, 10):
        near = NearImageIndex(measured, distance)
        want = [min(h - theirs(p) for h in hashes) <= distance for p in corpus]  # pyright: ignore
        assert [p in near for p in corpus] == want
    near = NearImageIndex(measured)
    assert all(pixels in near for pixels in measured)
    assert sum(pixels in near for pixels in corpus[:60]) >= 57
    assert sum(pixels in near for pixels in corpus[60:]) == 0


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_a_flat_picture_is_near_its_own_copy_alone(shade: int) -> None:
    flat = np.full((3, 64, 64), shade, dtype=np.uint8)
    speck = flat.copy()
    speck[:, 10, 10] ^= 3
    near = NearImageIndex([flat, canvas(0)])
    assert flat.copy() in near and speck not in near
    assert canvas(0) in near and canvas(1) not in near
    assert np.full((3, 64, 64), 60, dtype=np.uint8) not in near
    assert flat not in NearImageIndex([canvas(0)]) and flat not in NearImageIndex([])
    # One mark is enough to be told by its hash.
    marked = flat.copy()
    marked[:, 20:40, 30:36] = 200 if shade < 100 else 20
    assert marked in NearImageIndex([marked]) and marked not in near
