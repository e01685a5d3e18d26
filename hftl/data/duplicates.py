"""Find duplicates: exact copies of a row, and near copies of the rows that measure.

Texts are the same when they differ only in white space, case or Unicode form; images when they
decode to the same pixels. The same content twice is one item; with two labels it is none.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from imagehash import phash
from PIL import Image

from hftl.data.facts import CopyCounts
from hftl.data.normalization import normalize_content, normalize_text
from hftl.data.rows import Label, Row

if TYPE_CHECKING:
    from datasketch import MinHash

SPLIT_PRIORITY = ("test", "validation", "train")
"""Of copies in several tables the one that measures is kept."""
MAX_HASH_DISTANCE = 4
"""Images whose perceptual hashes differ in at most so many of 64 bits may be near copies."""
THUMBNAIL_SIDE = 16
MAX_GREY_DIFFERENCE, MAX_FINE_DISTANCE = 4.0, 30
"""They are where their thumbnails differ by so many levels of 255 in the mean, or in so many of the
256 signs of their frequencies. The hashes alone say where light and dark lie: small garments on
black share them, and differ by more (5.9 levels at least in 276 pairs, 18 in the median). Resized
and re-encoded copies of theirs differ by .9 to 3 in the median, smooth pictures by less than 1. The
signs are for other colours, and were counted on hashes of 64 x 64 pixels: garments 32 at least and
66 in the median, copies 2 to 18, two drawings of clip art in other colours 22 and 30. Of the ten
pairs of garments across splits seven are one garment (6 to 30 signs, 0 to 17 levels, thumbnails
correlated by .969 to 1), three are other shoes (26 to 30, 10 to 20, .962 to .975): nothing of these
separates them."""
CHUNK_PAIRS = 1 << 22
"""Pairs of hashes that are compared at once."""
CHUNK_THUMBNAILS = 1 << 13
"""Thumbnails, or pairs of them, whose pixels are compared at once: pictures of one outline, such as
radiographs, may all have near hashes."""
WORD = re.compile(r"[^\W_]+")
SHINGLE_WORDS = 3
LSH_BANDS, LSH_ROWS = 32, 4
"""Two texts of Jaccard similarity j become candidates with probability 1 - (1 - j^4)^32
(Leskovec et al. 2014, Mining of Massive Datasets, 3.4.2): 0.9999999 at 0.8, 0.87 at 0.5. The
library's own choice for a threshold of 0.8, 9 bands of 13, would find 0.4 of those at 0.8; false
candidates cost only a comparison."""
MIN_QUOTED_SHINGLES = 6
"""Shingles, eight words, below which a text is too short to be recognized as a quotation."""
MINHASH_SEED = 1
MAX_FLAT_DEVIATION = 2.0
"""Standard deviation of grey levels of 255 below which an image is flat: its hash is rounding."""

Shingles = set[tuple[str, ...]]


def drop_duplicates(splits: dict[str, list[Row]]) -> tuple[dict[str, list[Row]], CopyCounts]:
    """Return one row for each input, none where the labels differ, and the counts of the dropped.

    Args:
        splits: rows by train, validation and test; only train is required.
    """
    copies: dict[tuple[str, ...], list[tuple[str, Row]]] = defaultdict(list)
    for split in SPLIT_PRIORITY:
        for row in splits.get(split, []):
            copies[normalize_content(row.content)].append((split, row))
    remaining: dict[str, list[Row]] = {split: [] for split in splits}
    duplicates = conflicting = contradictory = leaked = 0
    for same in copies.values():
        if len({_round_target(row.label) for _, row in same}) > 1:
            conflicting += len(same)
            contradictory += 1
            continue
        duplicates += len(same) - 1
        first = same[0][0]
        leaked += sum(split != first for split, _ in same)
        candidates = [row for split, row in same if split == first]
        remaining[first].append(
            min(candidates, key=lambda row: (row.group or "", row.content, row.index))
        )
    return remaining, CopyCounts(
        duplicates=duplicates,
        conflicting=conflicting,
        contradictory_inputs=contradictory,
        distinct_inputs=len(copies),
        leaked=leaked,
    )


def _round_target(label: Label) -> Label:
    """Return a target as float32 holds it: Parquet may have rounded what a csv has in full."""
    if not isinstance(label, float):
        return label
    with np.errstate(over="ignore"):
        return float(np.float32(label))


@dataclass(frozen=True)
class PictureHashes:
    """Hold perceptual hashes (n,) uint64 of pictures, their thumbnails (n, side * side) uint8, the
    signs of the thumbnails' frequencies as bits, (n, 4) uint64, and whether thumbnails are known,
    (n,): rows that an older version stored have none."""

    hashes: np.ndarray
    thumbnails: np.ndarray
    signs: np.ndarray
    is_known: np.ndarray

    @classmethod
    def collect(cls, rows: Sequence[Row]) -> "PictureHashes":
        """Return the hashes and thumbnails of rows that have a hash."""
        return cls.build([(row.perceptual_hash, row.thumbnail) for row in rows])

    @classmethod
    def build(cls, pictures: Sequence[tuple[int | None, bytes | None]]) -> "PictureHashes":
        """Return what is compared of pictures, from the hash and the thumbnail of each."""
        blank = bytes(THUMBNAIL_SIDE**2)
        pixels = b"".join(thumbnail or blank for _, thumbnail in pictures)
        thumbnails = np.frombuffer(pixels, np.uint8).reshape(len(pictures), len(blank))
        parts = [
            compute_frequency_signs(thumbnails[start : start + CHUNK_THUMBNAILS])
            for start in range(0, max(1, len(pictures)), CHUNK_THUMBNAILS)
        ]
        return cls(
            np.array([code for code, _ in pictures], dtype=np.uint64),
            thumbnails,
            np.concatenate(parts),
            np.array([thumbnail is not None for _, thumbnail in pictures], dtype=bool),
        )

    def find_near(self, others: "PictureHashes") -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield positions of near copies here and among the others, a part at a time.

        All near copies of a picture are in one part.
        """
        step = max(1, CHUNK_PAIRS // max(1, others.hashes.size))
        for start in range(0, self.hashes.size if others.hashes.size else 0, step):
            distances = np.bitwise_count(self.hashes[start : start + step, None] ^ others.hashes)
            left, right = np.nonzero(distances <= MAX_HASH_DISTANCE)
            left = left + start
            near = np.zeros(len(left), dtype=bool)
            for begin in range(0, len(left), CHUNK_THUMBNAILS):
                part = slice(begin, begin + CHUNK_THUMBNAILS)
                near[part] = self._compare_thumbnails(left[part], others, right[part])
            yield left[near], right[near]

    def _compare_thumbnails(
        self, left: np.ndarray, others: "PictureHashes", right: np.ndarray
    ) -> np.ndarray:
        """Return which pairs of pictures of near hashes are near copies, (pairs,) bool.

        Those whose thumbnails differ little are; so are those whose frequencies have nearly the
        same signs, in other colours or brightness, and those without a known thumbnail.
        """
        differing = np.bitwise_count(self.signs[left] ^ others.signs[right]).sum(1)
        levels = self.thumbnails[left].astype(np.int16) - others.thumbnails[right]
        is_near = np.abs(levels).mean(1) <= MAX_GREY_DIFFERENCE
        is_known = self.is_known[left] & others.is_known[right]
        return is_near | (differing <= MAX_FINE_DISTANCE) | ~is_known


def compute_frequency_signs(thumbnails: np.ndarray) -> np.ndarray:
    """Return which frequencies of thumbnails are above their median, as bits, (n, 4) uint64.

    A smooth picture has hardly any frequency with a sign of its own.

    Args:
        thumbnails: (n, side * side) uint8.
    """
    from scipy.fft import dctn

    squares = thumbnails.reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE).astype(np.float64)
    waves = np.asarray(dctn(squares, axes=(1, 2))).reshape(thumbnails.shape)
    signs = waves > np.median(waves, axis=1, keepdims=True)
    return np.packbits(signs, axis=1).view(np.uint64)


def count_near_images(rows: dict[str, list[Row]]) -> int:
    """Return how many images of validation and test are near copies of one in an earlier split.

    Those are of validation near one of train, and of test near one of either. Near copies are
    re-encoded or resized: their perceptual hashes differ in a few bits.
    """
    train, validation, test = (
        [row for row in rows[split] if row.perceptual_hash is not None]
        for split in ("train", "validation", "test")
    )
    return _count_near(validation, train) + _count_near(test, [*train, *validation])


def _count_near(rows: list[Row], others: list[Row]) -> int:
    """Count the pictures that are near copies of one of the others."""
    near = PictureHashes.collect(rows).find_near(PictureHashes.collect(others))
    return sum(len(np.unique(left)) for left, _ in near)


class NearTextIndex:
    """Index texts so that `text in index` says whether one of them is the same or nearly so.

    Near means: the Jaccard similarity of the sets of their shingles, three lower-cased words each,
    is at least `threshold`. A text of fewer words is one shingle, so it must be the same.
    Candidates come from MinHash (Broder 1997) and are then compared, so there are no false hits.

    A text S is compared only if at least `threshold` of its shingles occur anywhere in the indexed
    texts. No other can be near: for each indexed text M, with U the union of all,
    |S and M| / |S or M| <= |S and M| / |S| <= |S and U| / |S|.

    An indexed text of at least `MIN_QUOTED_SHINGLES` is also found inside a longer text: at least
    `threshold` of its shingles are among those of the longer one.

    Args:
        texts: those to index.
        threshold: the least similarity, above 0 and at most 1.
    """

    def __init__(self, texts: Iterable[str], threshold: float = 0.8) -> None:
        from datasketch import MinHashLSH

        self._threshold = threshold
        distinct = {frozenset(build_shingles(text)) for text in texts}
        self._indexed = sorted(distinct, key=sorted)
        self._union = frozenset().union(*self._indexed)
        self._numbers_by_shingle: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._lsh = MinHashLSH(num_perm=LSH_BANDS * LSH_ROWS, params=(LSH_BANDS, LSH_ROWS))
        for number, shingles in enumerate(self._indexed):
            if len(shingles) >= MIN_QUOTED_SHINGLES:
                for shingle in shingles:
                    self._numbers_by_shingle[shingle].append(number)
            self._lsh.insert(number, _compute_minhash(shingles))

    def __contains__(self, text: str) -> bool:
        shingles = build_shingles(text)
        if self._has_quotation(shingles):
            return True
        if len(shingles & self._union) / len(shingles) < self._threshold:
            return False
        candidates: list[Any] = self._lsh.query(_compute_minhash(shingles))
        return any(
            _compute_jaccard(shingles, self._indexed[i]) >= self._threshold for i in candidates
        )

    def _has_quotation(self, shingles: Shingles) -> bool:
        """Return whether an indexed text occurs inside a text of these shingles."""
        counts = Counter(
            number for shingle in shingles for number in self._numbers_by_shingle.get(shingle, ())
        )
        return any(n >= self._threshold * len(self._indexed[i]) for i, n in counts.items())


class NearImageIndex:
    """Index images so that `canvas in index` says whether one of them is the same or nearly so.

    Near means: their perceptual hashes, the signs of the 64 lowest frequencies against their median
    (Zauner 2010), differ in at most `MAX_HASH_DISTANCE` bits, and their thumbnails are near too,
    see `PictureHashes`. Of a flat image, whose hash is the rounding of its pixels, only an exact
    copy is near.

    Args:
        canvases: those to index, each (3, height, width) uint8.
    """

    def __init__(self, canvases: Iterable[np.ndarray]) -> None:
        self._flat: set[tuple[tuple[int, ...], bytes]] = set()
        pictures = []
        for canvas in canvases:
            picture = compute_perceptual_hash(_convert_to_image(canvas))
            if picture is None:
                self._flat.add(_build_exact_key(canvas))
            else:
                pictures.append(picture)
        self._pictures = PictureHashes.build(pictures)

    def __contains__(self, canvas: np.ndarray) -> bool:
        picture = compute_perceptual_hash(_convert_to_image(canvas))
        if picture is None:
            return _build_exact_key(canvas) in self._flat
        parts = PictureHashes.build([picture]).find_near(self._pictures)
        return any(len(left) > 0 for left, _ in parts)


def build_shingles(text: str) -> Shingles:
    """Return the runs of three words, or all words where there are fewer; never empty.

    Words are those of the normalized text: a copy in another Unicode form is the same text.
    """
    normalized = normalize_text(text)
    words = WORD.findall(normalized)
    if len(words) < SHINGLE_WORDS:
        # A text without words, such as a row of signs, is compared as it is.
        return {tuple(words) or (normalized or text.strip(),)}
    return set(zip(words, words[1:], words[2:], strict=False))


def _compute_jaccard(one: Shingles, other: frozenset[tuple[str, ...]]) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def _compute_minhash(shingles: Iterable[tuple[str, ...]]) -> "MinHash":
    from datasketch import MinHash

    minhash = MinHash(num_perm=LSH_BANDS * LSH_ROWS, seed=MINHASH_SEED)
    minhash.update_batch([" ".join(words).encode() for words in shingles])
    return minhash


def compute_perceptual_hash(image: Image.Image) -> tuple[int, bytes] | None:
    """Return the 64-bit hash that survives re-encoding and resizing, and the grey thumbnail by
    which pictures of near hashes are compared; None for a flat image."""
    grey = image.convert("L")
    if _is_flat(grey):
        return None
    thumbnail = grey.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    return int(_compute_hash_bits(grey)), thumbnail.tobytes()


def _convert_to_image(canvas: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(canvas.transpose(1, 2, 0)))


def _is_flat(image: Image.Image) -> bool:
    return float(np.asarray(image).std()) < MAX_FLAT_DEVIATION


def _compute_hash_bits(image: Image.Image) -> np.uint64:
    """Return the perceptual hash as a number."""
    return np.packbits(phash(image).hash.reshape(-1)).view(np.uint64)[0]


def _build_exact_key(canvas: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return canvas.shape, canvas.tobytes()
