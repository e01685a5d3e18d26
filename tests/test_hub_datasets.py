"""Load hub datasets: class ids become names, images stay encoded."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from PIL import Image

from hftl.config.data import Data
from hftl.data.load import load_rows
from hftl.data.rows import BadRows, InputSpec
from hftl.data.tables import load_hub_rows, resolve_revision


def serve(monkeypatch: pytest.MonkeyPatch, dataset: datasets.Dataset) -> list[dict[str, Any]]:
    """Let `load_dataset` return the dataset; return the list of its calls."""
    requests: list[dict[str, Any]] = []

    def answer(path: str, name: str | None, **more: Any) -> datasets.Dataset:
        requests.append({"path": path, "name": name, **more})
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", answer)
    monkeypatch.setattr(
        "hftl.data.tables.resolve_revision", lambda path, revision, key: revision or "0" * 40
    )
    return requests


def test_splits_of_one_dataset_are_of_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=next(commits))
    )
    splits = [resolve_revision("org/pushed", None, f"data.{part}") for part in ("train", "test")]
    assert splits == ["a", "a"]


def section(**more: Any) -> Data:
    train = {"path": "org/set", "format": "hub", "revision": "abc", **more.pop("train", {})}
    return Data.model_validate({"train": train, **more})


def test_class_ids_become_names_also_in_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    names = datasets.ClassLabel(names=["O", "B-X"])
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(names)}
    )
    rows = {"tokens": [["a", "b"], ["c"]], "ner_tags": [[0, 1], [1]]}
    serve(monkeypatch, datasets.Dataset.from_dict(rows, features))
    data = section(task="token-classification", train={"text": "tokens", "label": "ner_tags"})
    loaded = load_rows(data, "train", BadRows(), InputSpec())
    assert [(row.content, row.label) for row in loaded] == [
        (("a", "b"), ("O", "B-X")), (("c",), ("B-X",)),
    ]  # fmt: skip


def test_pictures_are_decoded_by_us_and_named_by_their_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    good = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(good, "PNG")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    cells = [{"bytes": good.getvalue(), "path": None}, {"bytes": b"broken", "path": None}]
    dataset = datasets.Dataset.from_dict({"image": cells, "label": [1, 0]}, features)
    requests = serve(monkeypatch, dataset)
    bad = BadRows(skip=True)
    (row,) = load_rows(section(), "train", bad, InputSpec("image", 4))
    assert row.label == "dog" and row.size == (9, 9)
    assert bad.dropped[0].where == "org/set train row 2"
    assert requests == [{"path": "org/set", "name": None, "split": "train", "revision": "abc"}]


def test_an_id_that_is_no_class_is_no_label(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    serve(monkeypatch, datasets.Dataset.from_dict({"text": ["x", "y"], "label": [-1, 1]}, features))
    labels = [raw.values["label"] for raw in load_hub_rows(section().train, "train")]
    assert labels == [None, "b"]
