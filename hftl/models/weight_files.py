"""Read the weight files of a checkpoint: shapes, single tensors and the hash of all of them."""

import hashlib
from pathlib import Path
from typing import Any

from hftl.errors import RecipeError

WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
"""Weight files; a checkpoint is read from the first pattern that matches."""


def read_file_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the tensors in a file of safetensors from its header, by their names.

    Raises:
        SafetensorError: if the file does not open.
    """
    from safetensors import safe_open

    # Of either library's tensors the header is the same, and torch takes seconds to import.
    with safe_open(path, "np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def read_tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a checkpoint's tensors.

    Raises:
        SafetensorError: if a file does not open.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        shapes |= read_file_shapes(path)
    return shapes


def read_tensor(folder: Path, name: str) -> Any:
    """Read one tensor of a checkpoint in safetensors as float32; None where there is none."""
    import torch
    from safetensors import safe_open

    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            if name in file.keys():
                return file.get_tensor(name).to(torch.float32)
    return None


def hash_checkpoint(folder: Path) -> str | None:
    """Return the sha256 of a checkpoint's tensors, by name, or of the bytes of pickled weights.

    None where the checkpoint has no weights.

    Raises:
        RecipeError: if a file does not open.
    """
    digest = hashlib.sha256()
    for kind in WEIGHT_PATTERNS:
        files = sorted(folder.glob(kind))
        for file in files:
            if file.suffix == ".safetensors":
                _hash_tensors(file, digest)
            else:
                digest.update(file.read_bytes())
        if files:
            return digest.hexdigest()
    return None


def _hash_tensors(file: Path, digest: Any) -> None:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    except (SafetensorError, OSError) as error:
        raise RecipeError(
            f"source.model: {file} does not open: {error}", "Save it again, or fetch it again"
        ) from error
