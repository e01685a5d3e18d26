"""Settings that make no sense are findings or set aside; the doctor itself breaks on none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pushed import made

from hftl.publish.doctor import reloading
from hftl.publish.doctor.examine import examine
from hftl.publish.doctor.told import told

__all__ = ["made"]
BERT_AS_VIT = {
    "base_model_class": "ViTForImageClassification",
    "parent_library": "transformers.models.vit.modeling_vit",
}


@pytest.fixture
def adapter(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that hftl has published, record and card included."""
    monkeypatch.setattr(reloading, "loads", lambda *given: [np.zeros(2)] * 2)
    shutil.copytree(made / "publish", tmp_path / "adapter")
    return tmp_path / "adapter"


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | settings))


@pytest.mark.parametrize(
    "record",
    [
        {"data": "x"}, {"data": {"labels": 5}}, {"data": {"labels": {"a": 1}}}, {"adapt": 7},
        {"adapt": {"base": "x"}}, {"source": []}, {"source": {"model": ["package:x"]}},
    ],
)  # fmt: skip
def test_a_record_of_another_shape(
    record: dict[str, Any], adapter: Path, tiny_model: Callable[..., Path]
) -> None:
    change(adapter / "hftl.json", **record)
    told(examine(adapter, str(tiny_model())))


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({"task_type": ["x"], "auto_mapping": None}, None),
     ({"auto_mapping": BERT_AS_VIT}, "base-shape")],
)  # fmt: skip
def test_a_task_or_class_that_is_none_of_the_base(
    settings: dict[str, Any], kind: str | None, adapter: Path, tiny_model: Callable[..., Path]
) -> None:
    change(adapter / "adapter_config.json", **settings)
    found = examine(adapter, str(tiny_model()))
    assert kind is None or kind in {one.kind for one in found.defects}


def test_labels_numbered_by_no_decimal(adapter: Path, tiny_model: Callable[..., Path]) -> None:
    change(adapter / "config.json", id2label={"²": "a"})
    assert "labels" in {one.kind for one in examine(adapter, str(tiny_model())).defects}


def test_a_card_deeper_than_can_be_read(adapter: Path, tiny_model: Callable[..., Path]) -> None:
    (adapter / "README.md").write_text(f"---\n{'[' * 3000}\n---\n")
    assert "card" in {one.kind for one in examine(adapter, str(tiny_model())).defects}


@pytest.mark.parametrize("size", [-1, "x"])
def test_a_whole_model_of_an_impossible_size(
    size: Any, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    shutil.copytree(tiny_model(), tmp_path / "model")
    change(tmp_path / "model" / "config.json", hidden_size=size)
    assert any(what.startswith("fresh modules") for what in examine(tmp_path / "model").unexamined)
