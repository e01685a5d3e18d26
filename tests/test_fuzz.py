"""Change files at random and set keys to anything: each loader reads them or ends in one line.

`HFTL_FUZZ_EXAMPLES` is the number of examples of the slow run of each loader.
"""

import copy
import io
import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import sentences
from PIL import Image
from safetensors.torch import load_file, save_file
from support.records import add_forgetting, make_record

import hftl
from hftl.config.overrides import flatten
from hftl.config.recipe import Recipe
from hftl.data.images import ImageDecodeError, decode_image
from hftl.data.prepare import prepare_data
from hftl.errors import HftlError, RecipeError, RunFolderError
from hftl.measure.record import Record
from hftl.models.weight_files import hash_checkpoint
from hftl.runtime import run_folder
from hftl.runtime.run_folder import to_json

hypothesis = pytest.importorskip("hypothesis")
st: Any = pytest.importorskip("hypothesis.strategies")

pytestmark = pytest.mark.filterwarnings("ignore")
MAX_MEMORY = 2 << 30
"""Bytes that this process may have taken at most."""
FAST = hypothesis.settings(
    max_examples=5, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip
SLOW = hypothesis.settings(
    FAST, max_examples=int(os.environ.get("HFTL_FUZZ_EXAMPLES", "1000")), derandomize=False
)
Read = Callable[[Path], object]

ROWS = sentences(12)
RECIPE = {
    "source": {"model": "x", "revision": "main"},
    "data": {"task": "classification", "train": {"path": "a.csv", "text": ["a", "b"]},
             "test": {"fraction": 0.3}, "shots": 4, "seed": 1, "max_length": 32},
    "adapt": [{"objective": "mlm", "method": "lora", "training": {"num_train_epochs": 1}}],
    "finetune": {"strategy": "lora", "lora": {"r": 4, "target_modules": ["query"]},
                 "training": {"learning_rate": 1e-4, "bf16": False}},
    "retain": {"kl": [{"on": "probe", "weight": 0.5}]},
    "measure": {"seeds": [0, 1], "arms": ["head", {"small": {"finetune.lora.r": 2}}]},
    "publish": {"repo_id": "me/model"},
}  # fmt: skip
RECORD = add_forgetting(make_record())
TREES: dict[str, tuple[str, Any]] = {
    "recipe": ("r.yaml", RECIPE), "record": ("record.json", RECORD),
}  # fmt: skip


def encode_picture(kind: str) -> bytes:
    sink = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(sink, kind)
    return sink.getvalue()


def encode_table(kind: str) -> bytes:
    if kind == "csv":
        return "\n".join(["text,label", *(f'"{t}",{label}' for t, label in ROWS), ""]).encode()
    if kind == "jsonl":
        return "".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in ROWS).encode()
    sink = io.BytesIO()
    texts, labels = zip(*ROWS, strict=True)
    pq.write_table(pa.table({"text": list(texts), "label": list(labels)}), sink)
    return sink.getvalue()


def read_table(path: Path) -> object:
    tree = {"source": {"model": "x"}, "data": {"train": {"path": str(path)}}}
    return prepare_data(Recipe.parse(tree).data)


def read_picture(path: Path) -> object:
    return decode_image(str(path), None, 10**6)


def read_record(path: Path) -> object:
    return Record.read(path.parent)


FILES: dict[str, tuple[str, Callable[[], bytes], Read]] = {
    "recipe": ("r.yaml", lambda: yaml.safe_dump(RECIPE).encode(), Recipe.load),
    "record": ("record.json", lambda: to_json(RECORD).encode(), read_record),
    **{kind: (f"a.{kind}", lambda kind=kind: encode_table(kind), read_table)
       for kind in ("csv", "jsonl", "parquet")},
    **{kind: ("a.png", lambda kind=kind: encode_picture(kind), read_picture)
       for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")},
}  # fmt: skip

changes = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "drop", "repeat", "replace"]),
        st.floats(0, 1), st.integers(0, 7), st.binary(min_size=1, max_size=12),
    ),
    min_size=1, max_size=5,
)  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
    | st.sampled_from(["", "0", "nan", "../x", "a" * 400, "\x00", "\ud800", 10**40, -1, 0]),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=6), inside,
                                                                  max_size=3),
    max_leaves=6,
)  # fmt: skip


def change_bytes(content: bytes, made: list[tuple[str, float, int, bytes]]) -> bytes:
    """Return the content after some changes, each at a share of its length."""
    for kind, share, number, extra in made:
        place = int(share * max(0, len(content) - 1))
        head, tail = content[:place], content[place:]
        if kind == "flip" and tail:
            tail = bytes([tail[0] ^ (1 << number)]) + tail[1:]
        elif kind == "cut":
            tail = b""
        elif kind == "insert":
            tail = extra + tail
        elif kind == "drop":
            tail = tail[number + 1 :]
        elif kind == "repeat":
            tail = tail[:40] * (number + 1) + tail
        elif kind == "replace":
            tail = extra + tail[len(extra) :]
        content = head + tail
    return content


def assert_read_or_refused(call: Callable[[], object]) -> None:
    try:
        call()
    except ImageDecodeError as error:
        assert str(error)
    except HftlError as error:
        assert error.exit_code in (2, 3, 4, 5) and "\n" not in str(error), repr(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < MAX_MEMORY


def run_examples(settings: Any, given: Any, check: Callable[..., None]) -> None:
    settings(hypothesis.given(given)(check))()


def fuzz_file(name: str, folder: Path, settings: Any) -> None:
    file, encode, read = FILES[name]
    content, path = encode(), folder / file

    def check(made: Any) -> None:
        path.write_bytes(change_bytes(content, made))
        assert_read_or_refused(lambda: read(path))

    run_examples(settings, changes, check)


def fuzz_values(name: str, folder: Path, settings: Any) -> None:
    file, tree = TREES[name]
    keys, path = sorted(flatten(tree)), folder / file

    def check(drawn: tuple[str, Any]) -> None:
        changed, (key, value) = copy.deepcopy(tree), drawn
        *parents, last = key.split(".")
        here = changed
        for parent in parents:
            here = here[parent]
        here[last] = value
        if name == "record":
            path.write_text(json.dumps(changed))
            assert_read_or_refused(lambda: Record.read(folder))
        else:
            assert_read_or_refused(lambda: Recipe.parse(changed))

    run_examples(settings, st.tuples(st.sampled_from(keys), values), check)


def fuzz_adapter(adapter: Path, folder: Path, settings: Any) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = (adapter / "adapter_model.safetensors").read_bytes()

    def check(drawn: tuple[str | None, Any, Any]) -> None:
        key, value, made = drawn
        target = Path(shutil.copytree(adapter, folder / "adapter", dirs_exist_ok=True))
        changed = config if key is None else config | {key: value}
        (target / "adapter_config.json").write_text(json.dumps(changed))
        content = change_bytes(weights, made) if key is None else weights
        (target / "adapter_model.safetensors").write_bytes(content)
        assert_read_or_refused(lambda: hftl.load(target))

    keys = st.none() | st.sampled_from(sorted(config))
    run_examples(settings, st.tuples(keys, values, changes), check)


@pytest.mark.parametrize("name", FILES)
def test_changed_file_is_read_or_refused(name: str, tmp_path: Path) -> None:
    fuzz_file(name, tmp_path, FAST)


@pytest.mark.parametrize("name", TREES)
def test_any_value_is_read_or_refused(name: str, tmp_path: Path) -> None:
    fuzz_values(name, tmp_path, FAST)


def test_changed_adapter_is_read_or_refused(local_adapter: Path, tmp_path: Path) -> None:
    fuzz_adapter(local_adapter, tmp_path, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_many_changed_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    fuzz_file(name, tmp_path, SLOW)


@pytest.mark.slow
@pytest.mark.parametrize("name", TREES)
def test_many_values_are_read_or_refused(name: str, tmp_path: Path) -> None:
    fuzz_values(name, tmp_path, SLOW)


@pytest.mark.slow
def test_many_changed_adapters_are_read_or_refused(local_adapter: Path, tmp_path: Path) -> None:
    fuzz_adapter(local_adapter, tmp_path, SLOW)


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
