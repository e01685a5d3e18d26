"""Examine adapters with absurd settings without failing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hftl.doctor import load_check
from hftl.doctor.checks import examine_adapter
from hftl.doctor.report import format_report
from hftl.errors import RecipeError
from hftl.models.config_limits import find_config_fault

BERT_AS_VIT = {
    "base_model_class": "ViTForImageClassification",
    "parent_library": "transformers.models.vit.modeling_vit",
}


@pytest.fixture
def adapter(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a published folder with record and card."""
    monkeypatch.setattr(load_check, "predict_in_fresh_process", lambda *given: [np.zeros(2)] * 2)
    shutil.copytree(finished / "publish", tmp_path / "adapter")
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
def test_record_of_another_shape_is_examined(
    record: dict[str, Any], adapter: Path, tiny_model: Callable[..., Path]
) -> None:
    change(adapter / "hftl.json", **record)
    format_report(examine_adapter(adapter, str(tiny_model())))


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({"task_type": ["x"], "auto_mapping": None}, None),
     ({"auto_mapping": BERT_AS_VIT}, "base-shape")],
)  # fmt: skip
def test_task_or_class_of_another_base_is_a_defect(
    settings: dict[str, Any], kind: str | None, adapter: Path, tiny_model: Callable[..., Path]
) -> None:
    change(adapter / "adapter_config.json", **settings)
    examination = examine_adapter(adapter, str(tiny_model()))
    assert kind is None or kind in {one.kind for one in examination.defects}


def test_labels_numbered_by_no_decimal(adapter: Path, tiny_model: Callable[..., Path]) -> None:
    change(adapter / "config.json", id2label={"²": "a"})
    assert "labels" in {one.kind for one in examine_adapter(adapter, str(tiny_model())).defects}


def test_unreadable_card_is_a_defect(adapter: Path, tiny_model: Callable[..., Path]) -> None:
    (adapter / "README.md").write_text(f"---\n{'[' * 3000}\n---\n")
    assert "card" in {one.kind for one in examine_adapter(adapter, str(tiny_model())).defects}


UNLOADABLE: list[dict[str, Any]] = [
    {"model_type": "nope"}, {"model_type": ["x"]}, {"model_type": {}}, {"model_type": None},
    {"hidden_size": -1}, {"hidden_size": "x"}, {"num_hidden_layers": 1_000_000_000},
    {"num_labels": 1_000_000_000}, {"vocab_size": 1_000_000_000_000},
    {"max_position_embeddings": 1_000_000_000},
]  # fmt: skip


@pytest.mark.parametrize("settings", UNLOADABLE)
def test_whole_model_with_an_absurd_config_is_not_sound(
    settings: dict[str, Any], tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    # transformers goes by a folder's name where the config names no model.
    shutil.copytree(tiny_model(), tmp_path / "bert")
    change(tmp_path / "bert" / "config.json", **settings)
    examination = examine_adapter(tmp_path / "bert")
    assert "config" in {one.kind for one in examination.defects} and examination.exit_code == 4
    assert any(what.startswith("fresh modules") for what in examination.unexamined)


def test_an_architecture_that_hftl_does_not_know_is_no_defect(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    from transformers import GPT2Config

    shutil.copytree(tiny_model(), tmp_path / "model")
    GPT2Config(n_layer=1, n_embd=16, n_head=2).save_pretrained(tmp_path / "model")
    examination = examine_adapter(tmp_path / "model")
    assert examination.exit_code == 0 and "'gpt2' is not supported" in examination.unexamined[0]


def test_base_of_an_impossible_size_is_not_built(
    adapter: Path, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    base = Path(shutil.copytree(tiny_model(), tmp_path / "base"))
    change(base / "config.json", num_hidden_layers=1_000_000_000)
    with pytest.raises(RecipeError, match="num_hidden_layers is 1000000000"):
        examine_adapter(adapter, str(base))
    change(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    change(base / "config.json", num_hidden_layers=3, vocab_size=9_000_000)
    examination = examine_adapter(adapter, str(base))
    assert any("its weights hold" in what for what in examination.unexamined)


MANY = 10**9
ABSURD: list[dict[str, Any]] = [
    {"n_layers": 5000}, {"depths": [2, MANY]}, {"vision_config": {"num_hidden_layers": MANY}},
    {"encoder_layers": MANY}, {"num_experts": MANY},
]  # fmt: skip
USUAL: list[Any] = [
    {"num_hidden_layers": 48, "hidden_size": 4096, "vocab_size": 250_000}, [],
    {"layer_norm_eps": 1e9, "block_size": MANY, "depths": "x", "n_layers": None},
]  # fmt: skip


def test_counts_are_seen_in_every_familys_words() -> None:
    assert all(find_config_fault(config) is not None for config in ABSURD)
    assert all(find_config_fault(config) is None for config in USUAL)
