"""Examine, predict with and compare adapters of plain peft, which writes no config.json."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pictures, sentences, write_csv
from support.planted_defects import drop, reconfigure, retensor
from support.tiny import is_image, save_tiny, tiny_tokenizer
from tokenizers import AddedToken

import hftl
from hftl.doctor.adapter_folder import open_adapter_folder
from hftl.doctor.checks import examine_adapter
from hftl.doctor.examination import Examination
from hftl.doctor.report import run_doctor
from hftl.errors import HftlError, RecipeError
from hftl.inference.compare import compare_models
from hftl.inference.predict_table import predict_table

pytestmark = pytest.mark.usefixtures("loads_in_this_process")

SEQUENCE = {"task_type": "SEQ_CLS"}
IMAGE = {"modules_to_save": ["classifier"]}
NEW_TOKENS = ["zig", "zag", "zog"]
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {**SEQUENCE, "target_modules": ["query", "value"]}),
    "roberta": ("roberta", {**SEQUENCE, "target_modules": "all-linear"}),
    "distilbert": ("distilbert", {**SEQUENCE, "target_modules": ["q_lin", "v_lin"],
                                  "modules_to_save": ["pre_classifier", "classifier"]}),
    "deberta": ("deberta-v2", {**SEQUENCE, "target_modules": ["query_proj"],
                               "modules_to_save": ["pooler", "classifier"]}),
    "modernbert": ("modernbert", {**SEQUENCE, "target_modules": ["Wqkv"],
                                  "modules_to_save": ["head", "classifier"]}),
    "vit": ("vit", {**IMAGE, "target_modules": ["q_proj", "v_proj"]}),
    "dinov2": ("dinov2", {**IMAGE, "target_modules": ["q_proj", "fc1"]}),
    "tokens": ("bert", {"task_type": "TOKEN_CLS", "target_modules": ["key"]}),
    "rslora": ("bert", {**SEQUENCE, "target_modules": ["query"], "use_rslora": True}),
    "dora": ("bert", {**SEQUENCE, "target_modules": ["query"], "use_dora": True}),
    "patterns": ("bert", {**SEQUENCE, "target_modules": ["query", "value"],
                          "rank_pattern": {"layer.1.attention.self.query": 2},
                          "alpha_pattern": {"value": 3}}),
    "embeddings": ("bert", {**SEQUENCE, "target_modules": ["query", "word_embeddings"]}),
    "new words": ("bert", {**SEQUENCE, "target_modules": ["query"],
                           "trainable_token_indices": {"word_embeddings": [5, 6]}}),
    "ia3": ("bert", {**SEQUENCE, "peft_type": "IA3", "target_modules": ["key", "output.dense"],
                     "feedforward_modules": ["output.dense"]}),
    "resized": ("bert", {**SEQUENCE, "target_modules": ["query"]}),
    "whole-module": ("electra", {**SEQUENCE, "target_modules": ["query"],
                                 "modules_to_save": ["classifier", "embeddings_project"]}),
    "regression": ("bert", {**SEQUENCE, "target_modules": ["query"]}),
    "causal": ("causal", {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}),
    "away": ("bert", {**SEQUENCE, "target_modules": ["query"]}),
}  # fmt: skip
GOOD = [name for name in MADE if name not in ("causal", "away")]


def save_causal(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=55, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def make(name: str, base: Path, folder: Path) -> Any:
    """Save an adapter as peft does, the base named by its path, and return the model."""
    import transformers
    from peft import get_peft_config, get_peft_model

    model_type, settings = MADE[name]
    kind = {"CAUSAL_LM": "CausalLM", "TOKEN_CLS": "TokenClassification"}.get(
        settings.get("task_type", ""), "SequenceClassification")  # fmt: skip
    kind = "ImageClassification" if model_type in ("vit", "dinov2") else kind
    labels = {} if kind == "CausalLM" else {"num_labels": 1 if name == "regression" else 3}
    torch.manual_seed(1)
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(base, **labels)
    if name == "resized":
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens([AddedToken(token) for token in NEW_TOKENS])
        model.resize_token_embeddings(len(tokenizer))
        tokenizer.save_pretrained(folder)
    rank = {} if "peft_type" in settings else {"r": 4}
    adapted: Any = get_peft_model(model, get_peft_config({"peft_type": "LORA", **rank, **settings}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(folder, save_embedding_layers=name == "resized")
    return adapted.eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bases")
    kinds = sorted({model_type for model_type, _ in MADE.values()} - {"causal"})
    return {kind: save_tiny(kind, place / kind) for kind in kinds} | {
        "causal": save_causal(place / "causal")
    }


@pytest.fixture(scope="module")
def adapters(
    bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Any]]:
    """Return each folder, and the model that was saved in it."""
    place = tmp_path_factory.mktemp("adapters")
    saved = {name: (place / name, make(name, bases[MADE[name][0]], place / name)) for name in MADE}
    reconfigure(place / "away", base_model_name_or_path="somebody/unknown-base")
    assert not any((folder / "config.json").exists() for folder, _ in saved.values())
    return saved


def lines(examination: Examination, severity: str) -> set[tuple[str, str]]:
    return {(one.kind, one.what) for one in examination.findings if one.severity == severity}


def inputs_of(name: str) -> list[Any]:
    texts = [text for text, _ in sentences(4)]
    if name == "resized":
        texts = [f"{text} {token}" for text, token in zip(texts, [*NEW_TOKENS, "zig"], strict=True)]
    return [text.split() for text in texts] if name == "tokens" else texts


@pytest.mark.parametrize("name", GOOD)
def test_good_adapter_has_no_defect(name: str, adapters: dict[str, tuple[Path, Any]]) -> None:
    examination = examine_adapter(adapters[name][0])
    assert not lines(examination, "defect") and not examination.unexamined
    assert examination.exit_code == 0
    kinds = {kind for kind, _ in lines(examination, "warning")}
    assert kinds <= {"base", "labels", "tokenizer", "card", "fresh"}


@pytest.mark.parametrize("name", GOOD)
def test_predictions_are_those_of_peft(
    name: str, adapters: dict[str, tuple[Path, Any]], bases: dict[str, Path], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder, model = adapters[name]
    with caplog.at_level(logging.WARNING, "hftl"):
        predictor = hftl.load(folder)
    images = is_image(MADE[name][0])
    assert predictor.task == {"tokens": "token-classification", "regression": "regression"}.get(
        name, "classification")  # fmt: skip
    assert ("LABEL_0" in caplog.text) == (name != "regression")
    given = inputs_of(name)
    if images:
        given = sorted(pictures(tmp_path / "pictures", 2).rglob("*.png"))
    answers = predictor.predict(given)
    expected = logits_of(model, bases[MADE[name][0]], folder, given, images)
    for answer, row in zip(answers, expected, strict=True):
        if name == "regression":
            assert answer["label"] == pytest.approx(row[0], abs=1e-4)
        elif name == "tokens":
            assert len(answer["label"]) == len(given[0])
            assert answer["score"][0] == pytest.approx(softmax(row[1]).max(), abs=1e-4)
        else:
            assert list(answer["scores"]) == ["LABEL_0", "LABEL_1", "LABEL_2"]
            assert list(answer["scores"].values()) == pytest.approx(list(softmax(row)), abs=1e-4)


def softmax(row: np.ndarray) -> np.ndarray:
    return np.exp(row - row.max()) / np.exp(row - row.max()).sum()


def logits_of(model: Any, base: Path, folder: Path, given: list[Any], images: bool) -> np.ndarray:
    """Return the logits of the saved model by transformers alone."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoTokenizer

    with torch.no_grad():
        if images:
            processor = AutoImageProcessor.from_pretrained(base, backend="pil")
            return np.concatenate([
                model(**processor(Image.open(path), return_tensors="pt")).logits.numpy()
                for path in given
            ])  # fmt: skip
        own = folder if (folder / "tokenizer.json").exists() else base
        tokenizer = AutoTokenizer.from_pretrained(own)
        words = isinstance(given[0], list)
        return np.concatenate([
            model(**tokenizer(one, is_split_into_words=words, return_tensors="pt")).logits.numpy()
            for one in given
        ])  # fmt: skip


def test_adapter_of_another_task_is_refused(adapters: dict[str, tuple[Path, Any]]) -> None:
    with pytest.raises(RecipeError, match="CAUSAL_LM|no trained head"):
        hftl.load(adapters["causal"][0])
    assert not lines(examine_adapter(adapters["causal"][0]), "defect")


def test_missing_base_can_be_given(
    adapters: dict[str, tuple[Path, Any]], bases: dict[str, Path]
) -> None:
    folder = adapters["away"][0]
    examination = examine_adapter(folder)
    assert not examination.defects and examination.exit_code == 5
    with pytest.raises(HftlError, match="somebody/unknown-base"):
        hftl.load(folder)
    assert not examine_adapter(folder, str(bases["bert"])).defects
    assert hftl.load(folder, bases["bert"]).predict(["a fine film"])


def test_fixed_adapter_predicts_without_further_advice(
    adapters: dict[str, tuple[Path, Any]], bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters["bert"][0], tmp_path / "bert"))
    assert run_doctor(open_adapter_folder(folder), None, True, lambda line: None) == 0
    assert (folder / "tokenizer.json").exists()
    table = write_csv(tmp_path / "rows.csv", ["text"], [[text] for text, _ in sentences(3)])
    assert predict_table(str(folder), table, None)


def test_compare_scores_several_on_one_base(
    adapters: dict[str, tuple[Path, Any]], bases: dict[str, Path], tmp_path: Path
) -> None:
    rows = [(text, f"LABEL_{n % 3}") for n, (text, _) in enumerate(sentences(12))]
    table = write_csv(tmp_path / "rows.csv", ["text", "label"], rows)
    names = ("bert", "resized", "dora", "ia3", "patterns", "rslora")
    together = compare_models([str(adapters[name][0]) for name in names], table, None)
    alone = [compare_models([str(adapters[name][0])], table, None) for name in names]
    shown = [
        line.split()[1] for line in together.splitlines() if str(adapters["bert"][0].parent) in line
    ]
    assert shown == [text.splitlines()[-2].split()[1] for text in alone]
    assert compare_models([str(adapters["away"][0])], table, None, str(bases["bert"]))


def set_token(folder: Path, number: int) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["added_tokens"].append(tree["added_tokens"][0] | {"id": number, "content": "[NEW]"})
    (folder / "tokenizer.json").write_text(json.dumps(tree))


def write_card(folder: Path) -> None:
    (folder / "README.md").write_text("---\nbase_model: org/other\n---\n# It\n")


def tokenizer_beyond(folder: Path) -> None:
    tiny_tokenizer(folder)
    set_token(folder, 55)


DAMAGED: list[tuple[str, str, str, Callable[[Path], None]]] = [
    ("bert", "base-shape", "layer.1", lambda f: drop(f, "layer.1.")),
    ("bert", "corrupt", "lora_B", lambda f: drop(f, "layer.1.attention.self.query.lora_B")),
    ("bert", "fresh", "classifier", lambda f: drop(f, "classifier")),
    ("vit", "fresh", "classifier", lambda f: drop(f, "classifier")),
    ("dinov2", "rank", "lora_A", lambda f: reconfigure(f, r=8)),
    ("distilbert", "fresh", "pre_classifier", lambda f: drop(f, "pre_classifier")),
    ("dora", "config", "use_dora", lambda f: reconfigure(f, use_dora=False)),
    ("bert", "config", "use_dora", lambda f: reconfigure(f, use_dora=True)),
    ("roberta", "names", "--fix", lambda f: retensor(
        f, lambda k, t: (k.replace(".weight", ".default.weight") if "lora_" in k else k, t))),
    ("patterns", "rank", "rank_pattern", lambda f: reconfigure(f, rank_pattern={})),
    ("ia3", "base-shape", "ia3_l", lambda f: drop(f, "layer.0.")),
    ("tokens", "base-shape", "lora_", lambda f: reconfigure(f, target_modules=["query", "key"])),
    ("modernbert", "base-shape", "target_modules", lambda f: reconfigure(
        f, target_modules=["nothing"])),
    ("rslora", "untrained", "lora_B", lambda f: retensor(
        f, lambda k, t: (k, t.zero_() if "lora_B" in k else t))),
    ("bert", "tokenizer", "[NEW]", tokenizer_beyond),
    ("bert", "base", "path of another machine", lambda f: reconfigure(
        f, base_model_name_or_path="/somewhere/else/bert")),
]  # fmt: skip
ANSWERS = ("untrained", "tokenizer")
"""Damage that leaves a model which answers as it was saved."""


@pytest.mark.parametrize(("name", "kind", "said", "damage"), DAMAGED)
def test_damage_is_named_and_refused(
    name: str, kind: str, said: str, damage: Callable[[Path], None],
    adapters: dict[str, tuple[Path, Any]], tmp_path: Path,
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(adapters[name][0], tmp_path / name))
    damage(folder)
    defects = [one for one in examine_adapter(folder).defects if one.kind == kind]
    assert any(said in f"{one.what} {one.where} {one.fix}" for one in defects)
    if kind not in ANSWERS:
        with pytest.raises(HftlError):
            hftl.load(folder)


def test_tensor_names_that_hold_the_adapters_name_are_fixed(
    adapters: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    for name in ("roberta", "dora"):
        folder = Path(shutil.copytree(adapters[name][0], tmp_path / name))
        before = hftl.load(folder).predict(["a fine film"])
        retensor(folder, lambda k, t: (
            k.replace(".lora_A.weight", ".lora_A.default.weight").replace(
                ".lora_magnitude_vector", ".lora_magnitude_vector.default.weight"), t))  # fmt: skip
        with pytest.raises(HftlError, match="--fix"):
            hftl.load(folder)
        assert run_doctor(open_adapter_folder(folder), None, True, lambda line: None) == 0
        assert hftl.load(folder).predict(["a fine film"]) == before


def test_card_of_another_base_is_a_warning(
    adapters: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters["bert"][0], tmp_path / "bert"))
    write_card(folder)
    reconfigure(folder, base_model_name_or_path="org/base")
    examination = examine_adapter(folder)
    assert not examination.defects
    warnings = lines(examination, "warning")
    assert any(kind == "base" and "org/other" in what for kind, what in warnings)
