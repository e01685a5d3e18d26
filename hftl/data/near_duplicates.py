"""Near duplicates: is a text or picture of a corpus a copy, or nearly, of one that measures?"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH
from imagehash import phash
from PIL import Image

from hftl.data.normalization import normalize_text

WORD = re.compile(r"[^\W_]+")
SHINGLE_WORDS = 3
"""Words of a shingle."""
LSH_BANDS, LSH_ROWS = 32, 4
"""Two texts of Jaccard similarity j become candidates with probability 1 - (1 - j^4)^32
(Leskovec et al. 2014, Mining of Massive Datasets, 3.4.2): 0.9999999 at 0.8, 0.87 at 0.5. The
library's own choice for a threshold of 0.8, 9 bands of 13, would find 0.4 of those at 0.8; false
candidates cost only a comparison."""
MIN_QUOTED_SHINGLES = 6
"""Shingles, eight words, below which a text says too little to be told as a quotation."""
MINHASH_SEED = 1
MAX_FLAT_DEVIATION = 2.0
"""A picture that varies less than this, in standard deviations of grey levels of 255, says nothing
to its hash but rounding."""

Shingles = set[tuple[str, ...]]


class NearTextIndex:
    """The texts that measure; `text in near` says whether one of them is the same or nearly so.

    Nearly: the Jaccard similarity of the sets of their shingles, three lower-cased words each, is
    `threshold` or more. A text of fewer words is one shingle, so it must be the same. Candidates
    come from MinHash (Broder 1997) and are confirmed, so what is said to be near is near.

    A text S is compared only if at least `threshold` of its shingles stand anywhere in the texts
    that measure. No other can be near: for each M of them, with U their union,
    |S and M| / |S or M| <= |S and M| / |S| <= |S and U| / |S|.

    A text of `MIN_QUOTED_SHINGLES` shingles or more that stands inside a longer one is found as well: at least
    `threshold` of its own shingles are among the longer one's.

    Args:
        texts: those that measure.
        threshold: the least similarity, above 0 and at most 1.
    """

    def __init__(self, texts: Iterable[str], threshold: float = 0.8) -> None:
        self._threshold = threshold
        distinct = {frozenset(build_shingles(text)) for text in texts}
        self._measured = sorted(distinct, key=sorted)
        self._union = frozenset().union(*self._measured)
        self._holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for number, found in enumerate(self._measured):
            if len(found) >= MIN_QUOTED_SHINGLES:
                for shingle in found:
                    self._holders[shingle].append(number)
        self._index = MinHashLSH(num_perm=LSH_BANDS * LSH_ROWS, params=(LSH_BANDS, LSH_ROWS))
        for number, found in enumerate(self._measured):
            self._index.insert(number, _compute_minhash(found))

    def __contains__(self, text: str) -> bool:
        found = build_shingles(text)
        if self._quotes(found):
            return True
        if len(found & self._union) / len(found) < self._threshold:
            return False
        candidates: list[Any] = self._index.query(_compute_minhash(found))
        return any(
            _compute_jaccard(found, self._measured[i]) >= self._threshold for i in candidates
        )

    def _quotes(self, found: Shingles) -> bool:
        """Whether a measured text stands inside this one."""
        hits = Counter(number for shingle in found for number in self._holders.get(shingle, ()))
        return any(n >= self._threshold * len(self._measured[i]) for i, n in hits.items())


class NearImageIndex:
    """The pictures that measure; `canvas in near` says whether one is the same or nearly so.

    Nearly: their perceptual hashes, the signs of the 64 lowest frequencies against their median
    (Zauner 2010), differ in at most `distance` bits. Of a flat picture, whose hash is the rounding
    of its pixels, only an exact copy is near.

    Args:
        canvases: those that measure, each (3, height, width) uint8.
        distance: the most bits.
    """

    def __init__(self, canvases: Iterable[np.ndarray], distance: int = 4) -> None:
        self._distance = distance
        self._flat: set[tuple[tuple[int, ...], bytes]] = set()
        hashes = []
        for canvas in canvases:
            image = _convert_to_grey(canvas)
            if _is_flat(image):
                self._flat.add(_build_exact_key(canvas))
            else:
                hashes.append(_compute_hash_bits(image))
        self._hashes = np.array(hashes, dtype=np.uint64)

    def __contains__(self, canvas: np.ndarray) -> bool:
        image = _convert_to_grey(canvas)
        if _is_flat(image):
            return _build_exact_key(canvas) in self._flat
        differing = np.bitwise_count(self._hashes ^ _compute_hash_bits(image))
        return bool((differing <= self._distance).any())


def build_shingles(text: str) -> Shingles:
    """Return the runs of three words, all words where there are fewer; never empty.

    Words are those of the normalised text: a copy in another Unicode form is the same text.
    """
    normalised = normalize_text(text)
    words = WORD.findall(normalised)
    if len(words) < SHINGLE_WORDS:
        # What has no words, as a row of signs, is compared as it is.
        return {tuple(words) or (normalised or text.strip(),)}
    return set(zip(words, words[1:], words[2:], strict=False))


def _compute_jaccard(one: Shingles, other: frozenset[tuple[str, ...]]) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def _compute_minhash(found: Iterable[tuple[str, ...]]) -> MinHash:
    made = MinHash(num_perm=LSH_BANDS * LSH_ROWS, seed=MINHASH_SEED)
    made.update_batch([" ".join(words).encode() for words in found])
    return made


def compute_perceptual_hash(image: Image.Image) -> int | None:
    """Return the 64 bits that survive re-encoding and resizing; None for a flat picture."""
    grey = image.convert("L")
    return None if _is_flat(grey) else int(_compute_hash_bits(grey))


def _convert_to_grey(canvas: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(canvas.transpose(1, 2, 0))).convert("L")


def _is_flat(image: Image.Image) -> bool:
    return float(np.asarray(image).std()) < MAX_FLAT_DEVIATION


def _compute_hash_bits(image: Image.Image) -> np.uint64:
    """The perceptual hash as a number."""
    return np.packbits(phash(image).hash.reshape(-1)).view(np.uint64)[0]


def _build_exact_key(canvas: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return canvas.shape, canvas.tobytes()
