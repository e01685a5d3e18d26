"""Fuzz each loader for a moment; `python -m tests.campaign --fuzz 10` does so for minutes."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hftl.errors import RecipeError, RunFolderError
from hftl.models.weight_files import hash_checkpoint
from hftl.runtime import run_folder

pytest.importorskip("hypothesis")

from support.fuzzing import LOADERS, change_bytes, fuzz  # noqa: E402 (needs hypothesis)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", LOADERS)
def test_changed_input_is_read_or_refused(name: str, tmp_path: Path) -> None:
    assert fuzz(name, tmp_path, examples=3).count >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADERS)
def test_many_changed_inputs_are_read_or_refused(name: str, tmp_path: Path) -> None:
    assert fuzz(name, tmp_path, seconds=10, examples=50, seed=1).count >= 50


@pytest.mark.parametrize("number", [100, pytest.param(5000, marks=pytest.mark.slow)])
def test_no_changed_weights_are_taken_for_the_written_ones(number: int, tmp_path: Path) -> None:
    """Change one file in so many ways: none crashes, and none is taken for what was written."""
    stage, draw = tmp_path / "arms" / "lora-seed0", random.Random(0)
    tensors = {f"layer.{n}.lora_A.weight": torch.randn(4, 8) for n in range(6)}
    with run_folder.commit_stage(stage, {}) as aside:
        save_file(tensors, aside / "model.safetensors", {"format": "pt"})
    path = stage / "model.safetensors"
    content, digest = path.read_bytes(), hash_checkpoint(stage)
    kinds = ("flip", "cut", "insert", "drop", "repeat", "replace")
    opened = 0
    for _ in range(number):
        # Half of the changes are in the header.
        most = draw.choice([0.4, 1.0])
        made = [(draw.choice(kinds), draw.random() * most, draw.randrange(8), draw.randbytes(4))]
        changed = change_bytes(content, made)
        if changed == content:
            continue
        path.write_bytes(changed)
        with pytest.raises(RunFolderError, match="not what was written"):
            run_folder.read_stage_inputs(stage)
        try:
            other = hash_checkpoint(stage)
        except RecipeError as error:
            assert "does not open" in error.what
            continue
        opened += 1
        if other == digest:
            # The spelling of the header alone has changed.
            same = load_file(path)
            assert all(torch.equal(tensor, same[name]) for name, tensor in tensors.items())
    assert opened
