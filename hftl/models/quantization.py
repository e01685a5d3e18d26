"""Hold the frozen weights of a source in 4 bits, by bitsandbytes, under LoRA that trains.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314): NormalFloat values, scaled block by block.
"""

from importlib.util import find_spec
from typing import Any

from hftl.errors import RecipeError
from hftl.models.architecture_spec import ArchitectureSpec
from hftl.runtime.hardware import get_device

FIX = "Leave source.quantization out"


def check_quantization() -> None:
    """Refuse 4-bit weights where they cannot be computed with.

    Raises:
        RecipeError: naming what is missing: a CUDA GPU, or bitsandbytes.
    """
    device = get_device()
    if device != "cuda":
        raise RecipeError(
            f"source.quantization=4bit needs a CUDA GPU, and the device here is {device}", FIX
        )
    if find_spec("bitsandbytes") is None:
        raise RecipeError(
            "source.quantization=4bit needs bitsandbytes, which is not installed",
            f"pip install 'hftl[quantization]'. {FIX} otherwise",
        )


def build_quantization_config(spec: ArchitectureSpec) -> Any:
    """Return transformers' settings: every linear layer but those of head and pooler, which train.

    Products are in fp32, so that a row's outputs depend on no other row's and reload the same.

    Args:
        spec: of the model that is loaded.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=list_whole_modules(spec),
    )  # fmt: skip


def list_whole_modules(spec: ArchitectureSpec) -> list[str]:
    """Return the paths of the modules that are not quantized."""
    pooler = [f"{spec.encoder}.{spec.pooler}"] if spec.pooler else []
    return [*spec.head.parts, *pooler]
