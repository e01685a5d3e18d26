"""Find the spec of a config's architecture, and the sizes that the config names.

To add an architecture, add its entry to `TEXT_ENCODERS` or `DECODERS` in `text_architectures.py`,
or to `IMAGE_ENCODERS` in `image_architectures.py` (without a stock class, where a class token
stands before the patches, to `UNHEADED_ENCODERS`), and a tiny config to `tests/support/tiny.py`:
the tests compare every entry with its model's forward and backward pass. An entry needs a stock
class whose last linear layer reads one vector a row, or pools the logits of all tokens (see
`pooled_logits`), and whose outputs do not depend on padding (YOSO's do).
"""

from typing import Any

from hftl.errors import RecipeError
from hftl.models.architecture_spec import ArchitectureSpec
from hftl.models.image_architectures import IMAGE_ENCODERS, IMAGE_HALVES, UNHEADED_ENCODERS
from hftl.models.text_architectures import DECODERS, TEXT_ENCODERS
from hftl.models.timm_architecture import TIMM_WRAPPER, describe_timm, read_data_config
from hftl.models.vision_language_architectures import VISION_LANGUAGE

TIMM = ArchitectureSpec("timm_model", (), (), "image", adjust=describe_timm)
ARCHITECTURES = TEXT_ENCODERS | DECODERS | IMAGE_ENCODERS | {TIMM_WRAPPER: TIMM}
"""Architectures that transformers has a classification class for."""
UNHEADED = UNHEADED_ENCODERS | VISION_LANGUAGE
"""Architectures that it has none for, which hftl's own head reads."""
READ_AS = {"vit_mae": "vit"}
"""Architectures without a classification class, and the one whose encoder is the same."""


def get_config_spec(config: Any) -> ArchitectureSpec:
    """Return the spec of a config's classification class.

    Raises:
        RecipeError: if the architecture is not supported.
    """
    spec = (ARCHITECTURES | UNHEADED | IMAGE_HALVES).get(config.model_type)
    if spec is not None and getattr(config, "is_decoder", False) and not spec.is_causal:
        raise RecipeError(
            f"source.model: is_decoder in its config makes the encoder {config.model_type!r} a "
            "decoder, which its classification class is not made for",
            "Set is_decoder to false in its config.json, or use another source.model",
        )
    if spec is None:
        raise RecipeError(
            f"source.model: the architecture {config.model_type!r} is not supported: hftl has no "
            "entry for it",
            "Use one of those that `hftl sources` lists, such as bert or vit, or add an entry to "
            "hftl/models/{text,image,vision_language}_architectures.py",
        )
    return spec if spec.adjust is None else spec.adjust(spec, config)


# Sizes that a config names.


def get_encoder_config(config: Any) -> Any:
    """Return the config of the encoder: the part of a composite config whose blocks train.

    That is the vision part of a pair, and the language model's of a vision-language model.
    """
    if config.model_type in VISION_LANGUAGE:
        return config.get_text_config()
    return getattr(config, "vision_config", config)


def get_hidden_size(config: Any) -> int:
    """Return the width of the encoder's last hidden states."""
    encoder = get_encoder_config(config)
    width = getattr(encoder, "hidden_size", None)
    return encoder.hidden_sizes[-1] if width is None else width


def count_shared_layers(config: Any) -> int:
    """Return how many layers share the blocks, as ALBERT's do; 0 where each has its own."""
    return config.num_hidden_layers if hasattr(config, "num_hidden_groups") else 0


def get_max_tokens(config: Any) -> int:
    """Return the longest text that the architecture's positions can hold, in tokens."""
    offset = config.pad_token_id + 1 if get_config_spec(config).has_padding_offset else 0
    return config.max_position_embeddings - offset


def get_patch_size(config: Any) -> int:
    """Return the side of an image patch in pixels; 1 where the encoder has no patches."""
    key = get_config_spec(config).patch_size
    return 1 if key is None else _get_square_side(getattr(get_encoder_config(config), key))


def get_native_image_size(config: Any) -> int | None:
    """Return the side in pixels of the images that the encoder was built for, if the config says.

    Raises:
        RecipeError: if they are not squares.
    """
    if config.model_type == TIMM_WRAPPER:
        size: Any = read_data_config(config)["input_size"][1:]
    else:
        size = getattr(get_encoder_config(config), "image_size", None)
    return None if size is None else _get_square_side(size)


def _get_square_side(size: Any) -> int:
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size,)
    if not sides or not all(type(side) in (int, float) and side % 1 == 0 < side for side in sides):
        raise RecipeError(
            f"source.model: its config.json has images or patches of {size!r} pixels, expected a "
            "whole number above 0",
            "Correct its config.json",
        )
    if len(set(sides)) > 1:
        raise RecipeError(
            f"source.model: it takes images or patches of {sides} pixels, expected squares",
            "Use a source model of square images",
        )
    return int(sides[0])


def build_position_arguments(config: Any, side: int) -> dict[str, bool]:
    """Return the arguments of forward for images of another size than in pre-training."""
    if get_config_spec(config).image_sizes != "argument" or side == get_native_image_size(config):
        return {}
    return {"interpolate_pos_encoding": True}
