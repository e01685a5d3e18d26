"""Compare what a checkpoint declares with its tokenizer or processor.

A check takes source and inputs and yields findings; it is one function in `FINGERPRINT_CHECKS`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from hftl.data.image_inputs import ImageInputs
from hftl.data.text_inputs import TextInputs
from hftl.models.source import SourceModel
from hftl.train.facts import Finding

FingerprintCheck = Callable[[SourceModel, TextInputs | ImageInputs], Iterator[Finding]]


class Normalization(NamedTuple):
    """Hold the mean and standard deviation that a processor takes from pixels of 0 to 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def is_near(self, other: "Normalization") -> bool:
        """Return whether two are the same but for rounding."""
        return bool(np.allclose(self, other, atol=0.011))

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.3g}" for value in part) for part in self)
        return f"mean [{mean}], std [{std}]"


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = Normalization((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758))
UNIT = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
NORMALIZATIONS = {"ImageNet": IMAGENET, "-1 to 1": HALF, "0 to 1": UNIT}
"""Those that are tried. CLIP's is so near ImageNet's that no score distinguishes them."""
USUAL: dict[str, tuple[Normalization, ...]] = {
    "dinov2": (IMAGENET,), "dinov2_with_registers": (IMAGENET,), "dinov3_vit": (IMAGENET,),
    "vit_mae": (IMAGENET,), "deit": (IMAGENET,), "swin": (IMAGENET,), "swinv2": (IMAGENET,),
    "convnext": (IMAGENET,), "convnextv2": (IMAGENET,), "vit": (HALF, IMAGENET),
    "beit": (HALF, IMAGENET), "siglip": (HALF,), "siglip2": (HALF,), "clip": (CLIP,),
    "siglip_vision_model": (HALF,), "clip_vision_model": (CLIP,),
}  # fmt: skip
"""What the released checkpoints of a family were trained under."""
MIN_RANGE, MAX_RANGE = 0.5, 20.0
"""The range from black to white that a processor makes: 1 for [0, 1], 2 for [-1, 1], 4.4 for
ImageNet's; .004 where pixels are divided by 255 twice, 255 where they are not divided."""
MIN_VOCABULARY = 1000
"""Tokens from which on their letters say whether a vocabulary is cased."""
CASED_SHARE = 0.02


def read_normalization(inputs: ImageInputs) -> Normalization:
    """Return the mean and standard deviation that the processor's arithmetic amounts to."""
    low, high = inputs.normalize_levels().tolist()
    std = tuple(1 / (b - a) if b != a else float("inf") for a, b in zip(low, high, strict=True))
    mean = tuple(-a * s for a, s in zip(low, std, strict=True))
    return Normalization(mean, std)  # pyright: ignore[reportArgumentType]


def check_pixel_range(source: SourceModel, inputs: TextInputs | ImageInputs) -> Iterator[Finding]:
    """Find pixels that are divided by 255 twice, or never."""
    if not isinstance(inputs, ImageInputs):
        return
    width = 1 / max(read_normalization(inputs).std)
    if MIN_RANGE <= width <= MAX_RANGE:
        return
    how = "divided by 255 twice" if width < MIN_RANGE else "not divided by 255"
    yield Finding(
        kind="rescale",
        what=f"the processor makes a range of {width:.3g} from black to white, as of pixels that "
        f"are {how}",
        confidence="certain",
        fix="correct rescale_factor (1/255), do_rescale and image_std in preprocessor_config.json",
    )


def check_normalization(source: SourceModel, inputs: TextInputs | ImageInputs) -> Iterator[Finding]:
    """Find a normalization that the family's checkpoints are not trained under."""
    usual = USUAL.get(str(source.config.model_type))
    if not isinstance(inputs, ImageInputs) or usual is None:
        return
    own = read_normalization(inputs)
    if any(own.is_near(known) for known in usual) or not MIN_RANGE <= 1 / max(own.std) <= MAX_RANGE:
        return
    yield Finding(
        kind="normalization",
        what=f"the processor takes {own} from pixels, and checkpoints of {source.architecture} "
        f"are trained under {usual[0]}",
        confidence="likely",
        evidence="declared in preprocessor_config.json",
        fix="correct image_mean and image_std there, or make sure that this checkpoint is another",
    )


def check_casing(source: SourceModel, inputs: TextInputs | ImageInputs) -> Iterator[Finding]:
    """Find a tokenizer whose casing is not that of its vocabulary."""
    if isinstance(inputs, ImageInputs):
        return
    tokenizer = inputs.tokenizer
    special = set(tokenizer.all_special_tokens)
    words = [token for token in tokenizer.get_vocab() if token not in special]
    if len(words) < MIN_VOCABULARY:
        return
    if sum(token.lower() != token.upper() for token in words) < len(words) / 2:
        return  # Scripts without upper case say nothing.
    cased = sum(token != token.lower() for token in words) / len(words)
    sample = "The Film Is Good"
    lowers = tokenizer.tokenize(sample) == tokenizer.tokenize(sample.lower())
    if lowers == (cased < CASED_SHARE):
        return
    does = "lower-cases texts" if lowers else "does not lower-case texts"
    yield Finding(
        kind="casing",
        what=f"the tokenizer {does}, and {cased:.1%} of its vocabulary have upper-case letters",
        confidence="likely",
        evidence="declared by the tokenizer's files",
        fix=f"set do_lower_case to {str(not lowers).lower()} in its tokenizer_config.json, or take "
        "the tokenizer that belongs to the model",
    )


def check_vocabulary(source: SourceModel, inputs: TextInputs | ImageInputs) -> Iterator[Finding]:
    """Find a tokenizer whose padding token or size is not that of the model."""
    if isinstance(inputs, ImageInputs) or source.architecture_spec.is_causal:
        return
    tokenizer, config = inputs.tokenizer, source.config
    declared, size = config.pad_token_id, config.vocab_size
    faults: list[str] = []
    if declared is not None and declared != tokenizer.pad_token_id:
        faults.append(f"pads with token {tokenizer.pad_token_id}, and config.json says {declared}")
    if MIN_VOCABULARY < len(tokenizer) < 0.8 * size:
        faults.append(f"has {len(tokenizer):,} tokens, and the model embeds {size:,}")
    for fault in faults:
        yield Finding(
            kind="tokenizer",
            what=f"the tokenizer {fault}",
            confidence="likely",
            evidence="declared in config.json",
            fix="take the tokenizer that belongs to the model",
        )


FINGERPRINT_CHECKS: tuple[FingerprintCheck, ...] = (
    check_pixel_range,
    check_normalization,
    check_casing,
    check_vocabulary,
)
