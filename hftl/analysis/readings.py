"""List other readings of the same rows: what a source might have been trained to read instead."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from hftl.analysis.fingerprints import (
    CLIP,
    NORMALIZATIONS,
    USUAL,
    Normalization,
    read_normalization,
)
from hftl.data.image_inputs import ImageInputs
from hftl.data.prompted_inputs import PromptedInputs
from hftl.data.rows import Row
from hftl.data.text_inputs import EncodedRow, TextInputs
from hftl.train.facts import FaultKind

LEVEL, MIN_COST = 0.05, 0.02
"""Significance of all readings of a check together, and the points of accuracy below which a better
reading is no fault: two."""
COLOUR_LEVEL, BLUE_LEVEL, MIN_BLUE_COST = 0.01, 0.1, 0.01
"""Of exchanged channels: pictures of the world and drawings of it are on average more red than blue
(.485 against .406 in ImageNet, .09 in 503 clip arts, with the same sign in each of six categories).
Where they are, an exchange is improbable; where they are bluer beyond noise, it is not."""
COLOUR_NOISE = 0.001
CASING_ROWS = 100
"""Rows that show whether the tokenizer distinguishes upper case."""

Encode = Callable[[list[Row]], list[EncodedRow]]


@dataclass(frozen=True)
class Reading:
    """Describe another way to read the same rows: what it would mean, and how it is done.

    It is a fault where the source scores better under it at significance `level`, shared by all
    readings, and by at least `min_cost`. `evidence` is what speaks for it besides.
    """

    kind: FaultKind
    name: str
    what: str
    fix: str
    encode: Encode
    inputs: TextInputs | ImageInputs
    level: float = LEVEL
    min_cost: float = MIN_COST
    evidence: str = ""


def list_readings(
    inputs: TextInputs | ImageInputs, model_type: str, rows: list[Row], encode: Encode
) -> list[Reading]:
    """Return the readings that would be other bytes for the encoder than the recipe's own.

    Args:
        inputs: the recipe's own.
        model_type: the source's family.
        rows: some of those to read.
        encode: encodes rows by `inputs`.
    """
    if isinstance(inputs, PromptedInputs):
        return []  # Its processor holds words and pictures together.
    if isinstance(inputs, ImageInputs):
        return [
            *_list_normalizations(inputs, model_type, encode),
            *_swap_channels(inputs, rows, encode),
        ]
    return [*_list_casings(inputs, rows)]


def list_other_normalizations(model_type: str, own: Normalization) -> dict[str, Normalization]:
    """Return by name the normalizations that a checkpoint may have been trained under instead.

    Of a family whose released checkpoints share one, that one alone: DINOv2 reads clip art better
    under -1 to 1 (.66 against .62, p 5e-6), which it was not trained under.
    """
    usual = USUAL.get(model_type)
    if usual is None:
        known = [*NORMALIZATIONS.items()]
        if own.is_near(CLIP):
            known = [(name, other) for name, other in known if name != "ImageNet"]
    else:
        names = {other: name for name, other in NORMALIZATIONS.items()} | {CLIP: "CLIP"}
        known = [(names[other], other) for other in usual]
    return {name: other for name, other in known if not own.is_near(other)}


def _list_normalizations(inputs: ImageInputs, model_type: str, encode: Encode) -> Iterator[Reading]:
    own = read_normalization(inputs)
    is_rescaled = 0.05 < max(own.std) < 2
    for name, other in list_other_normalizations(model_type, own).items():
        yield Reading(
            "normalization" if is_rescaled else "rescale",
            f"by {name} ({other})",
            f"the source reads these pictures better by {name} ({other}) than by the processor's "
            f"own {own}",
            "correct image_mean, image_std and rescale_factor in preprocessor_config.json",
            encode,
            _normalize_by(inputs, other),
        )


def _normalize_by(inputs: ImageInputs, normalization: Normalization) -> ImageInputs:
    settings = inputs.processor.to_dict() | {
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(normalization.mean), "image_std": list(normalization.std),
    }  # fmt: skip
    processor = type(inputs.processor).from_dict(settings)
    return inputs.with_processor(processor)


def _swap_channels(inputs: ImageInputs, rows: list[Row], encode: Encode) -> Iterator[Reading]:
    """Yield the exchange of red and blue, unless all pictures are grey."""
    from scipy.stats import ttest_1samp

    balance = np.array([measure_red(row) for row in encode(rows)])
    if not balance.any():
        return
    mean = float(balance.mean())
    is_blue = mean < 0 and ttest_1samp(balance, 0).pvalue < COLOUR_NOISE  # pyright: ignore
    yield Reading(
        "channels",
        "with red and blue exchanged",
        "the source reads these pictures better with red and blue exchanged",
        "save the pictures in the order red, green, blue (OpenCV writes and reads blue first)",
        lambda own: [swap_channels(row) for row in encode(own)],
        inputs,
        BLUE_LEVEL if is_blue else COLOUR_LEVEL,
        MIN_BLUE_COST if is_blue else MIN_COST,
        f"they hold {-mean:.0f} of 255 levels more blue than red, and most pictures less"
        if is_blue
        else "",
    )


def measure_red(encoded: EncodedRow) -> float:
    """Return how many levels of 255 a picture's red is on average above its blue."""
    pixels = np.asarray(encoded["pixel_values"], dtype=np.float64)
    return float(pixels[0].mean() - pixels[2].mean())


def swap_channels(encoded: EncodedRow) -> EncodedRow:
    """Return a picture with red and blue exchanged."""
    pixels = np.asarray(encoded["pixel_values"])
    return {"pixel_values": np.ascontiguousarray(pixels[::-1])}


def _list_casings(inputs: TextInputs, rows: list[Row]) -> Iterator[Reading]:
    rows = rows[:CASING_ROWS]
    lowered = list(map(lower_row, rows))
    changed = sum(a.content != b.content for a, b in zip(rows, lowered, strict=True))
    if changed < 0.2 * len(rows) or inputs.encode(rows) == inputs.encode(lowered):
        return
    yield Reading(
        "casing",
        "in lower case",
        "the source reads these texts better in lower case",
        "set do_lower_case to true in its tokenizer_config.json, or give the texts in lower case",
        lambda own: inputs.encode(list(map(lower_row, own))),
        inputs,
    )


def lower_row(row: Row) -> Row:
    """Return a row whose texts are in lower case."""
    return replace(row, content=tuple(text.lower() for text in row.content))
