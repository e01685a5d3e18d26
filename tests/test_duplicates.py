"""Find exact duplicates and near copies: one copy stays, with two labels none."""

import itertools
import random
import tracemalloc
import unicodedata
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from imagehash import phash
from PIL import Image
from scipy.fft import dctn

from hftl.data.duplicates import (
    NearImageIndex,
    NearTextIndex,
    build_shingles,
    compute_perceptual_hash,
    count_near_images,
    drop_duplicates,
)
from hftl.data.facts import CopyCounts
from hftl.data.near_copies import find_near_copies
from hftl.data.rows import Row


def row(text: str, label: str | float = "a", index: int = 0, group: str | None = None) -> Row:
    return Row((text,), label, group, index, f"t line {index}")


def totals(counts: CopyCounts) -> tuple[int, int, int]:
    return counts.duplicates, counts.conflicting, counts.leaked


# Exact copies


@pytest.mark.parametrize(
    ("tables", "remaining", "expected"),
    [
        ({"train": [row("x"), row("y"), row("x", index=2)]},
         {"train": [row("x"), row("y")]}, (1, 0, 0)),
        # With differing labels none stays, across tables too, and for regression.
        ({"train": [row("x"), row("y"), row("x", "b", 2), row("x", "a", 3)]},
         {"train": [row("y")]}, (0, 3, 0)),
        ({"train": [row("x"), row("y")], "test": [row("x", "b")]},
         {"train": [row("y")], "test": []}, (0, 2, 0)),
        ({"train": [row("x", 1.0), row("x", 1.5), row("y", 2.0)]},
         {"train": [row("y", 2.0)]}, (0, 2, 0)),
    ],
)  # fmt: skip
def test_one_copy_stays_and_with_two_labels_none(
    tables: dict[str, list[Row]], remaining: dict[str, list[Row]], expected: tuple[int, ...]
) -> None:
    rows, counts = drop_duplicates(tables)
    assert rows == remaining and totals(counts) == expected


def test_the_same_words_in_another_column_are_no_copy() -> None:
    contents = [("a", "b"), ("b", "a"), ("a b",), ("a c",)]
    rows = [Row(content, "x", None, i, "") for i, content in enumerate(contents)]
    remaining, counts = drop_duplicates({"train": rows})
    assert remaining["train"] == rows and counts.duplicates == 0


@pytest.mark.parametrize(
    ("tables", "stays"),
    [
        (("train", "test"), "test"),
        (("train", "validation"), "validation"),
        (("validation", "test"), "test"),
        (("train", "validation", "test"), "test"),
    ],
)
def test_a_copy_in_several_tables_stays_where_it_measures(
    tables: tuple[str, ...], stays: str
) -> None:
    parts = {"train": [row("own")]} | {t: [row("own " + t), row("x")] for t in tables}
    remaining, counts = drop_duplicates(parts)
    assert [part for part, rows in remaining.items() if row("x") in rows] == [stays]
    assert totals(counts) == (len(tables) - 1, 0, len(tables) - 1)


def test_which_copy_stays_does_not_depend_on_the_order() -> None:
    for groups in itertools.permutations(["g1", "g2", "g3"]):
        rows = [row("x", index=i, group=group) for i, group in enumerate(groups)]
        assert drop_duplicates({"train": rows})[0]["train"][0].group == "g1"


@pytest.mark.parametrize(
    "copy",
    ["a caf\u00e9 noir ", "a  caf\u00e9\tnoir", "A Caf\u00c9 Noir", "a cafe\u0301 noir",
     "a caf\u00e9\u200b noir", "a caf\u00e9\u00a0noir", "\ufeffa caf\u00e9 noir"],
    ids=["trailing space", "tab", "case", "NFD", "zero width", "hard space", "byte order mark"],
)  # fmt: skip
def test_texts_that_differ_only_in_spelling_are_copies(copy: str) -> None:
    plain = row("a caf\u00e9 noir")
    remaining, counts = drop_duplicates({"train": [plain, row(copy, index=1)], "test": [row(copy)]})
    assert (len(remaining["train"]), len(remaining["test"])) == (0, 1)
    assert totals(counts) == (2, 0, 2)
    assert drop_duplicates({"train": [plain, row(copy, "b", 1)]})[1].contradictory_inputs == 1


def test_pairs_and_words_are_compared_part_by_part() -> None:
    pair = [Row(("A b", "c"), "x", None, 0, ""), Row(("a b ", "C"), "x", None, 1, "")]
    assert drop_duplicates({"train": pair})[1].duplicates == 1
    words = [Row(("A", "b"), ("O", "O"), None, 0, ""), Row(("a", "b"), ("O", "B-X"), None, 1, "")]
    assert drop_duplicates({"train": words})[1].contradictory_inputs == 1


def test_contradictory_inputs_are_counted_apart_from_copies() -> None:
    rows = [row(f"t{i}", label, 2 * i) for i in range(70) for label in "ab"]
    rows += [row(f"u{i}", "a") for i in range(50)] + [row("u0", "a", 1)]
    counts = drop_duplicates({"train": rows})[1]
    assert counts == CopyCounts(
        duplicates=1, conflicting=140, contradictory_inputs=70, distinct_inputs=120, leaked=0
    )


def test_near_images_are_counted_where_they_measure() -> None:
    def image(code: int | None, name: str) -> Row:
        return Row((name,), "x", None, 0, "", perceptual_hash=code)

    train = [image(0b1111, "a"), image(1 << 63, "b"), image(None, "flat")]
    five = (1 << 63) | 0b111110000
    test = [image(0, "four bits off"), image(five, "five"), image(None, "c")]
    rows = {"train": train, "validation": [image(0b1111, "d")], "test": test}
    assert count_near_images(rows) == 2
    assert count_near_images(rows | {"train": [image(None, "flat")]}) == 1
    assert count_near_images(rows | {"train": [], "validation": []}) == 0


def test_garments_of_one_shape_are_no_near_copies_and_resized_pictures_are() -> None:
    def garment(seed: int) -> Image.Image:
        """Draw a bright shape on black, with a pattern of its own."""
        pixels = np.zeros((28, 28))
        pixels[6:26, 7:21] = 150 + np.random.default_rng(seed).normal(0, 45, (20, 14))
        pixels[6:14, 3:25] = 140
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    def row(image: Image.Image, name: str) -> Row:
        coarse, fine = compute_perceptual_hash(image) or pytest.fail("it is not flat")
        return Row((name,), "x", None, 0, "", perceptual_hash=coarse, thumbnail=fine)

    garments = [garment(seed) for seed in range(60)]
    train = [row(image, f"g{i}") for i, image in enumerate(garments)]
    copies = [row(image.resize((42, 42)), f"c{i}") for i, image in enumerate(garments[:10])]
    rows = {"train": train, "validation": [], "test": copies}
    coarse = [replace(one, thumbnail=None) for one in train]
    assert len(find_near_copies(rows | {"train": coarse, "test": []})) > 5, "shapes are alike"
    pairs = find_near_copies(rows)
    assert {(pair.row.content[0][1:], pair.other.content[0][1:]) for pair in pairs} == {
        (str(i), str(i)) for i in range(10)
    }
    assert count_near_images(rows) == 10
    canvases = [np.array(image.convert("RGB")).transpose(2, 0, 1) for image in garments]
    near = NearImageIndex(canvases[:30])
    assert [pixels in near for pixels in canvases] == [True] * 30 + [False] * 30, "nor is a corpus"


def test_many_pictures_of_one_outline_are_compared_in_little_memory() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.integers(60, 196, (100, 256))
    # Hardly changed, in another brightness, and another picture.
    thumbnails = np.concatenate([drawn, drawn + rng.integers(-3, 4, drawn.shape), drawn // 2 + 90])
    rows = [
        Row((str(n),), "x", None, n, "", perceptual_hash=7, thumbnail=pixels.tobytes())
        for n, pixels in enumerate(thumbnails.astype(np.uint8))
    ]
    waves = dctn(thumbnails.astype(float).reshape(-1, 16, 16), axes=(1, 2)).reshape(300, 256)
    signs = waves > np.median(waves, axis=1, keepdims=True)
    expected = {
        (i, j)
        for i, j in itertools.combinations(range(300), 2)
        if abs(thumbnails[i] - thumbnails[j]).mean() <= 4 or (signs[i] != signs[j]).sum() <= 30
    }
    assert {(n, n + 100) for n in range(100)} <= expected and len(expected) == 300
    tracemalloc.start()
    pairs = find_near_copies({"train": rows, "validation": [], "test": []})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {(pair.row.index, pair.other.index) for pair in pairs} == expected
    assert peak < 80e6, "of 45 000 pairs no more than a part lies in memory at once"
    assert count_near_images({"train": rows[:100], "validation": [], "test": rows[100:]}) == 200
    assert count_near_images({"train": [], "validation": [], "test": []}) == 0


# Near texts


def prose(words: int, draw: random.Random) -> str:
    return " ".join(draw.choices([f"word{i}" for i in range(400)], k=words))


def shingles(text: str) -> set[str]:
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return {"|".join(words[i : i + 3]) for i in range(len(words) - 2)} or {"|".join(words)}


def similarity(a: set[str], b: set[str]) -> float:
    """Return Jaccard's index, by its definition."""
    return len(a & b) / len(a | b)


def edit(text: str, share: float, draw: random.Random) -> str:
    """Replace a stretch of the words: neighbouring edits share their shingles."""
    words = text.split()
    count = max(1, int(share * len(words)))
    start = draw.randrange(len(words) - count)
    words[start : start + count] = [f"new{draw.randrange(10**6)}" for _ in range(count)]
    return " ".join(words)


def test_near_texts_equal_those_of_brute_force() -> None:
    draw = random.Random(0)
    measured = [prose(draw.randint(20, 200), draw) for _ in range(60)]
    corpus = [edit(text, draw.uniform(0, 0.2), draw) for text in measured for _ in range(5)]
    corpus += [prose(60, draw) for _ in range(50)]
    near, sets = NearTextIndex(measured), [shingles(text) for text in measured]
    own = [shingles(text) for text in corpus]
    best = [max(similarity(a, b) for b in sets) for a in own]
    # A text is near too where it quotes four fifths of a measured text.
    quotes = [any(len(a & b) >= 0.8 * len(b) for b in sets) for a in own]
    expected = [score >= 0.8 or quote for score, quote in zip(best, quotes, strict=True)]
    is_near = [text in near for text in corpus]
    assert 100 < sum(expected) < 300 and sum(0.8 <= score < 0.85 for score in best) > 10
    assert not any(n and not e for n, e in zip(is_near, expected, strict=True))
    assert sum(n and e for n, e in zip(is_near, expected, strict=True)) >= 0.99 * sum(expected)


def test_the_threshold_decides() -> None:
    text = prose(100, random.Random(1))
    copy = " ".join([*text.split()[:90], *(f"other{i}" for i in range(10))])
    assert 0.7 < similarity(shingles(text), shingles(copy)) < 0.85
    assert copy in NearTextIndex([text], threshold=0.7)
    assert copy not in NearTextIndex([text], threshold=0.9)


def test_case_and_signs_do_not_matter_and_words_do() -> None:
    near = NearTextIndex(["The film, it was GOOD!", "Fine.", "don't", "!!!", "naïve café au lait"])
    for text in ("the film it was good", "FINE", "Don’t", " !!! ", "Naïve -- café: au lait"):
        assert text in near
    for text in ("the film it was bad", "fine film", "film", "?!", "", "naive cafe au lait"):
        assert text not in near
    assert "a text of words" not in NearTextIndex([]) and "" not in NearTextIndex([])


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: unicodedata.normalize("NFD", text), str.upper,
        lambda text: text.replace("\u00e9", "\u00e9\u200b"),
        lambda text: text.replace("an", "a\u00adn").replace("re", "r\u00ade"),
        lambda text: text.replace(" ", "\u00a0\r\n"),
    ],
)  # fmt: skip
def test_a_copy_of_another_spelling_is_near(rewrite: Callable[[str], str]) -> None:
    text = "le caf\u00e9 tr\u00e8s anim\u00e9 de la for\u00eat ferm\u00e9 avant la re-lecture"
    assert rewrite(text) != text and rewrite(text) in NearTextIndex([text])


def test_a_long_quotation_is_near_and_a_phrase_is_not() -> None:
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


def test_short_texts_have_one_shingle() -> None:
    assert build_shingles("one two") == {("one", "two")} and build_shingles(" ") == {("",)}
    assert build_shingles("a b c a b c") == {("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b")}


# Near images


def canvas(seed: int, side: int = 64) -> np.ndarray:
    """Return a smooth random image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1).copy()


def distort(pixels: np.ndarray, seed: int) -> np.ndarray:
    """Add noise, brighten a little, and send it through a smaller size."""
    noise = np.random.default_rng(seed).normal(4, 4, pixels.shape)
    noisy = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    image = Image.fromarray(noisy.transpose(1, 2, 0)).resize((48, 48)).resize((64, 64))
    return np.asarray(image).transpose(2, 0, 1)


def convert(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.transpose(1, 2, 0))


def test_hashes_of_near_images_are_those_of_imagehash() -> None:
    measured = [canvas(seed) for seed in range(40)]
    corpus = [distort(pixels, 100 + i) for i, pixels in enumerate(measured)]
    corpus += [canvas(seed) for seed in range(1000, 1040)]
    old, new = ([phash(convert(pixels)) for pixels in side] for side in (measured, corpus))
    ours = [
        [picture[0] for pixels in side if (picture := compute_perceptual_hash(convert(pixels)))]
        for side in (measured, corpus)
    ]
    assert [[(a ^ b).bit_count() for a in ours[0]] for b in ours[1]] == [
        [a - b for a in old] for b in new
    ]
    near = NearImageIndex(measured)
    assert all(pixels in near for pixels in measured)
    assert sum(pixels in near for pixels in corpus[:40]) >= 38
    assert sum(pixels in near for pixels in corpus[40:]) == 0


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_a_flat_image_is_near_its_own_copy_alone(shade: int) -> None:
    flat = np.full((3, 64, 64), shade, dtype=np.uint8)
    speck = flat.copy()
    speck[:, 10, 10] ^= 3
    near = NearImageIndex([flat, canvas(0)])
    assert flat.copy() in near and speck not in near
    assert canvas(0) in near and canvas(1) not in near
    assert np.full((3, 64, 64), 60, dtype=np.uint8) not in near
    assert flat not in NearImageIndex([canvas(0)]) and flat not in NearImageIndex([])
    # One mark is enough for a hash.
    marked = flat.copy()
    marked[:, 20:40, 30:36] = 200 if shade < 100 else 20
    assert marked in NearImageIndex([marked]) and marked not in near
