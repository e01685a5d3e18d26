"""Change files at random and set keys to anything: each loader reads them or ends in one line.

Needs hypothesis. `python tests/support/fuzzing.py "table csv" 60 0` tries one loader for a minute.
"""
# ruff: noqa: E402

import contextlib
import copy
import io
import itertools
import json
import logging
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import transformers
import yaml
from conftest import bench_of, sentences
from hypothesis import strategies as st
from PIL import Image
from support.planted_defects import reconfigure, save, wrapped
from support.published_model import open_context, publish_model, write_data
from support.records import add_forgetting, make_record
from support.tiny import save_tiny

import hftl
from hftl.config.overrides import flatten
from hftl.config.recipe import Recipe
from hftl.data.images import ImageDecodeError, decode_image
from hftl.data.prepare import prepare_data
from hftl.errors import HftlError, is_out_of_memory
from hftl.measure.record import Record
from hftl.pipeline.model_checks import check_models
from hftl.runtime.run_folder import to_json

MAX_MEMORY = 2 << 10
"""MiB that a process may have taken at most."""
MAX_SECONDS = 60
"""That one example may take."""
Changes = list[tuple[str, float, int, bytes]]
Check = Callable[[Any], None]

changes: Any = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "drop", "repeat", "replace"]),
        st.floats(0, 1), st.integers(0, 7), st.binary(min_size=1, max_size=12),
    ),
    min_size=1, max_size=5,
)  # fmt: skip
values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
    | st.sampled_from(["", "0", "nan", "../x", "a" * 400, "\x00", "\ud800", 10**40, -1, 0]),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=6), inside,
                                                                  max_size=3),
    max_leaves=6,
)  # fmt: skip

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


@dataclass
class Tries:
    """Count the examples of a loader, and the seconds of the slowest."""

    count: int = 0
    slowest: float = 0.0

    @contextlib.contextmanager
    def judge(self) -> Iterator[None]:
        """Let a read end well or in one line, in time and within the memory."""
        began = time.monotonic()
        try:
            yield
        except ImageDecodeError as error:
            assert str(error)
        except HftlError as error:
            assert error.exit_code in (2, 3, 4, 5, 6) and "\n" not in str(error), repr(error)
        except (MemoryError, RuntimeError) as error:
            # The command ends with code 7.
            if not is_out_of_memory(error):
                raise
        seconds = time.monotonic() - began
        self.count, self.slowest = self.count + 1, max(self.slowest, seconds)
        assert seconds < MAX_SECONDS
        assert measure_memory() < MAX_MEMORY


def change_bytes(content: bytes, made: Changes) -> bytes:
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


def set_key(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a copy of a tree in which one key, a.b.c, has another value."""
    changed = copy.deepcopy(tree)
    *parents, last = key.split(".")
    here = changed
    for parent in parents:
        here = here[parent]
    here[last] = value
    return changed


def encode_picture(kind: str) -> bytes:
    """Return a picture of noise in a format."""
    sink = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(sink, kind)
    return sink.getvalue()


def encode_table(kind: str) -> bytes:
    """Return a table of labelled texts in a format."""
    if kind == "csv":
        return "\n".join(["text,label", *(f'"{t}",{label}' for t, label in ROWS), ""]).encode()
    if kind == "jsonl":
        return "".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in ROWS).encode()
    sink = io.BytesIO()
    texts, labels = zip(*ROWS, strict=True)
    pq.write_table(pa.table({"text": list(texts), "label": list(labels)}), sink)
    return sink.getvalue()


def read_table(path: Path) -> None:
    """Read a table as a run does."""
    tree = {"source": {"model": "x"}, "data": {"train": {"path": str(path)}}}
    prepare_data(Recipe.parse(tree).data)


def fuzz_bytes(
    file: str, encode: Callable[[], bytes], read: Callable[[Path], object], folder: Path,
    tries: Tries,
) -> tuple[Any, Check]:  # fmt: skip
    """Change the bytes of one file."""
    content, path = encode(), folder / file

    def check(made: Changes) -> None:
        path.write_bytes(change_bytes(content, made))
        with tries.judge():
            read(path)

    return changes, check


def fuzz_recipe_values(folder: Path, tries: Tries) -> tuple[Any, Check]:
    """Set a key of a recipe to anything."""

    def check(drawn: tuple[str, Any]) -> None:
        changed = set_key(RECIPE, *drawn)
        with tries.judge():
            Recipe.parse(changed)

    return st.tuples(st.sampled_from(sorted(flatten(RECIPE))), values), check


def fuzz_record_values(folder: Path, tries: Tries) -> tuple[Any, Check]:
    """Set a key of a record to anything."""
    record = add_forgetting(make_record())

    def check(drawn: tuple[str, Any]) -> None:
        (folder / "record.json").write_text(json.dumps(set_key(record, *drawn)))
        with tries.judge():
            Record.read(folder)

    return st.tuples(st.sampled_from(sorted(flatten(record))), values), check


def save_plain_adapter(folder: Path) -> Path:
    """Save an adapter of PEFT's own on a local base."""
    base = save_tiny("bert", folder / "base")
    lora = {"task_type": "SEQ_CLS", "target_modules": ["query"]}
    return save_on_local_base(save(wrapped(base, "bert", lora), folder / "adapter"), base)


def save_on_local_base(adapter: Path, base: Path) -> Path:
    """Let an adapter name a folder as its base."""
    reconfigure(adapter, base_model_name_or_path=str(base), revision=None)
    return adapter


def publish_tiny(model_type: str, pooling: str, strategy: str, folder: Path) -> Path:
    """Publish a tiny model."""
    base = save_tiny(model_type, folder / "base")
    data = write_data(model_type, "classification", folder)
    publish_model(*open_context(base, folder, pooling, strategy, data), folder)
    publish = folder / "publish"
    return save_on_local_base(publish, base) if strategy == "lora" else publish


def predict(rows: list[Any], folder: Path) -> None:
    """Load a published folder, and predict rows."""
    hftl.load(folder).predict(rows)


def save_source(model_type: str, folder: Path) -> Path:
    """Save a tiny source model, and data beside it."""
    recipe = {"data": write_data(model_type, "classification", folder),
              "measure": {"seeds": [0], "arms": ["head", "lora"]}}  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return save_tiny(model_type, folder / "source")


def check_source(folder: Path) -> None:
    """Check a source model as a run does before it trains."""
    tree = json.loads((folder.parent / "recipe.json").read_text())
    recipe = Recipe.parse(tree | {"source": {"model": str(folder)}})
    context = bench_of(recipe)
    check_models(recipe, context)
    context.extract_features(recipe.finetune.pooling, 0, context.prepared.rows["test"])


def fuzz_folder(
    make: Callable[[Path], Path], use: Callable[[Path], object], folder: Path, tries: Tries
) -> tuple[Any, Check]:
    """Change the bytes of a file of an adapter or a model, or set a key of its settings.

    Args:
        make: writes the folder, and returns its path.
        use: loads a folder, and computes outputs.
        folder: for all of it.
        tries: count the examples.
    """
    sound, target = make(folder), folder / "changed"
    files = {str(path.relative_to(sound)): path.read_bytes() for path in sorted(sound.rglob("*"))
             if path.is_file()}  # fmt: skip
    trees = {name: json.loads(content) for name, content in files.items()
             if name.endswith(".json")}  # fmt: skip
    keys = [(name, key) for name, tree in trees.items() for key in sorted(flatten(tree))]

    def check(drawn: tuple[str, Any] | tuple[tuple[str, str], Any]) -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(sound, target)
        where, change = drawn
        if isinstance(where, str):
            (target / where).write_bytes(change_bytes(files[where], change))
        else:
            name, key = where
            (target / name).write_text(json.dumps(set_key(trees[name], key, change)))
        with tries.judge():
            use(target)

    return (
        st.tuples(st.sampled_from(sorted(files)), changes)
        | st.tuples(st.sampled_from(keys), values),
        check,
    )


READ_TEXTS = partial(predict, ["ab cd", "zzz"])
READ_PICTURES = partial(predict, [Image.new("RGB", (40, 50))])
LOADERS: dict[str, Callable[[Path, Tries], tuple[Any, Check]]] = {
    "recipe bytes": partial(
        fuzz_bytes, "r.yaml", lambda: yaml.safe_dump(RECIPE).encode(), Recipe.load
    ),
    "recipe values": fuzz_recipe_values,
    "record bytes": partial(
        fuzz_bytes, "record.json", lambda: to_json(add_forgetting(make_record())).encode(),
        lambda path: Record.read(path.parent),
    ),
    "record values": fuzz_record_values,
    **{f"table {kind}": partial(fuzz_bytes, f"a.{kind}", partial(encode_table, kind), read_table)
       for kind in ("csv", "jsonl", "parquet")},
    **{f"image {kind}": partial(fuzz_bytes, "a.png", partial(encode_picture, kind),
                                lambda path: decode_image(str(path), None, 10**6))
       for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")},
    "adapter of PEFT": partial(fuzz_folder, save_plain_adapter, READ_TEXTS),
    "adapter published": partial(
        fuzz_folder, partial(publish_tiny, "bert", "mean", "lora"), READ_TEXTS
    ),
    "model of texts": partial(
        fuzz_folder, partial(publish_tiny, "bert", "native", "full"), READ_TEXTS
    ),
    "model of images": partial(
        fuzz_folder, partial(publish_tiny, "vit", "native", "full"), READ_PICTURES
    ),
    "source of texts": partial(fuzz_folder, partial(save_source, "bert"), check_source),
    "source of images": partial(fuzz_folder, partial(save_source, "vit"), check_source),
}  # fmt: skip
"""What each loader is tried with; the first word is the loader."""


def fuzz(name: str, folder: Path, seconds: float = 0, examples: int = 5, seed: int = 0) -> Tries:
    """Try a loader with so many examples, again and again until the time is over.

    Args:
        name: of `LOADERS`.
        folder: an empty one.
        seconds: of all; 0 tries once.
        examples: at once.
        seed: of the first examples; each time has the next one.

    Raises:
        AssertionError: or what the loader raised, with the example that shows it.
    """
    settings = hypothesis.settings(
        max_examples=examples, deadline=None, database=None, print_blob=False,
        suppress_health_check=list[Any](hypothesis.HealthCheck),
    )  # fmt: skip
    tries = Tries()
    given, check = LOADERS[name](folder, tries)
    stop = time.monotonic() + seconds
    for number in itertools.count(1000 * seed):
        hypothesis.seed(number)(settings(hypothesis.given(given)(check)))()
        if time.monotonic() >= stop:
            break
    return tries


def measure_memory() -> int:
    """Return the MiB that this process has taken at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main(name: str, seconds: float, seed: int) -> None:
    """Try a loader in this process, and print what came of it as JSON."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as place:
        tries = fuzz(name, Path(place), seconds, 200, seed)
    print(json.dumps({"tries": tries.count, "slowest": tries.slowest, "memory": measure_memory()}))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
