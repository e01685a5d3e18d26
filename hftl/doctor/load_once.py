"""Load an adapter or model with a random seed, and print its output for a fixed input.

As a script it runs in a fresh process, without hftl, and answers each line of its standard input
by one of JSON:

    {"loads": [FOLDER, BASE, CLASS, SEED, SEED]}  ->  {"outputs": [[...], [...]]}, one load a seed
    {"sample": [FOLDER, BASE, SAMPLE, DEVICE]}    ->  as publish/reload_check.py answers these

FOLDER holds config.json with the labels, and an adapter or nothing more; BASE is the folder of the
weights; CLASS the class of transformers. What no file holds is drawn from a SEED.
"""

import contextlib
import importlib.util
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

ROWS, LENGTH = 2, 8
ANY_SIDE = 64
"""In pixels, of images for an encoder whose config names no side."""
TOKEN_STEP = 7919
"""A prime, so that the ids differ."""


def compute_output(
    folder: Path, base: Path, name: str, seed: int, keep: list[Any] | None = None
) -> list[float]:
    """Return the logits of the fixed input, or a headless model's hidden states, flattened.

    Args:
        folder: see above, as `base` and `name`.
        base: of the weights.
        name: of the class.
        seed: what no file holds is drawn from it.
        keep: receives the model, so that the memory of the next is not that of this one: it would
            hold the same where nothing writes it.
    """
    torch.manual_seed(seed)
    config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = getattr(transformers, name).from_pretrained(
        base, config=config, dtype=torch.float32, ignore_mismatched_sizes=True,
        trust_remote_code=False, use_safetensors=True,
    )  # fmt: skip
    if (folder / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(model, str(folder))
    if keep is not None:
        keep.append(model)
    inputs = build_fixed_input(model.get_base_model() if isinstance(model, PeftModel) else model)
    with torch.inference_mode():
        outputs = model.eval()(**inputs)
    logits = getattr(outputs, "logits", None)
    return (outputs.last_hidden_state if logits is None else logits).flatten().tolist()


def build_fixed_input(model: Any) -> dict[str, torch.Tensor]:
    """Return two rows of token ids, (2, 8) int64, or two images."""
    config = model.config
    if model.main_input_name == "input_ids":
        ids = (
            torch.arange(1, ROWS * LENGTH + 1).reshape(ROWS, LENGTH)
            * TOKEN_STEP
            % config.vocab_size
        )
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inner = getattr(config, "vision_config", config)
    if hasattr(inner, "num_patches"):
        return _build_patches(inner.num_patches, inner.num_channels * inner.patch_size**2)
    size = getattr(inner, "image_size", ANY_SIDE)
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(inner, "num_channels", 3)
    shape = (ROWS, channels, *sides)
    count = ROWS * channels * sides[0] * sides[1]
    return {"pixel_values": torch.arange(count).float().mul(0.7).sin().reshape(shape)}


def _build_patches(count: int, values: int) -> dict[str, torch.Tensor]:
    """Return two square images as SigLIP2 reads them, of so many patches of so many values."""
    pixels = torch.arange(ROWS * count * values).float().mul(0.7).sin()
    return {
        "pixel_values": pixels.reshape(ROWS, count, values),
        "pixel_attention_mask": torch.ones(ROWS, count, dtype=torch.int64),
        "spatial_shapes": torch.full((ROWS, 2), math.isqrt(count)),
    }


def print_outputs(arguments: list[str]) -> None:
    """Print the outputs of one load a seed as JSON; the models are held until the last one's."""
    keep: list[Any] = []
    folder, base, name, *seeds = arguments
    outputs = [compute_output(Path(folder), Path(base), name, int(seed), keep) for seed in seeds]
    print(json.dumps({"outputs": outputs}))  # noqa: T201


def check_sample(arguments: list[str]) -> None:
    """Print what the reload check of publishing prints, by its script, which imports no hftl."""
    script = Path(__file__).parents[1] / "publish" / "reload_check.py"
    spec = importlib.util.spec_from_file_location("reload_check", script)
    assert spec is not None and spec.loader is not None
    reload_check: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = reload_check
    spec.loader.exec_module(reload_check)
    folder, base, sample, device = arguments
    reload_check.main(Path(folder), Path(base), Path(sample), device)


def main() -> None:
    """Answer requests until there are no more."""
    for line in sys.stdin:
        request = json.loads(line)
        # A library may print, too; the answer comes last.
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            if "loads" in request:
                print_outputs(request["loads"])
            else:
                check_sample(request["sample"])
        print(printed.getvalue().splitlines()[-1], flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
