"""Refuse published models and bases that are incomplete or hold pickles."""

import json
import os
import pickle
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bench_of, sentences, write_csv
from PIL import Image
from safetensors.torch import load_file, save_file
from support.planted_defects import drop, reconfigure, retensor, rewrite, save, wrapped
from support.published_model import open_context, publish_model, write_data
from support.tiny import save_tiny, tiny_config, tiny_tokenizer
from transformers import AutoTokenizer

import hftl
from hftl import cli
from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.doctor.checks import examine_adapter
from hftl.errors import DataError, HftlError, RecipeError, RunFolderError
from hftl.inference import load_predictor
from hftl.inference.compare import compare_models
from hftl.inference.predict_table import predict_table
from hftl.models.source import find_source, load_tokenizer

KINDS = {
    "text": ("bert", "native", "full"), "image": ("vit", "native", "full"),
    "lora": ("bert", "native", "lora"), "image-lora": ("vit", "native", "lora"),
    "pooled": ("bert", "mean", "full"), "pooled-lora": ("bert", "mean", "lora"),
}  # fmt: skip
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def made(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Return a published folder of each kind, on a local base."""
    place = tmp_path_factory.mktemp("made")
    for name, (model_type, pooling, strategy) in KINDS.items():
        folder = place / name
        folder.mkdir()
        data = write_data(model_type, "classification", folder)
        publish_model(
            *open_context(tiny_model(model_type), folder, pooling, strategy, data), folder
        )
        if strategy == "lora":
            base = str(tiny_model(model_type))
            reconfigure(folder / "publish", base_model_name_or_path=base, revision=None)
    return {name: place / name / "publish" for name in KINDS}


def change(
    folder: Path, edit: Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]
) -> None:
    """Change the tensors of a whole model."""
    path = folder / "model.safetensors"
    before = load_file(path)
    pairs = [edit(key, tensor) for key, tensor in before.items()]
    assert any(not p or p[1] is not t for p, t in zip(pairs, before.values(), strict=True))
    save_file({p[0]: p[1].contiguous() for p in pairs if p}, path, {"format": "pt"})


def without(word: str) -> Damage:
    return lambda folder: change(folder, lambda k, t: None if word in k else (k, t))


def wider(word: str) -> Damage:
    return lambda folder: change(folder, lambda k, t: (k, torch.cat([t, t]) if word in k else t))


def added(key: str) -> Damage:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(load_file(path) | {key: torch.ones(2)}, path, {"format": "pt"})

    return edit


def head(**tensors: torch.Tensor | None) -> Damage:
    def edit(folder: Path) -> None:
        path = folder / "head.safetensors"
        rest = {k: v for k, v in (load_file(path) | tensors).items() if v is not None}
        save_file(rest, path, {"pooling": "mean"})

    return edit


def extra_tensor(folder: Path, key: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {key: torch.ones(2)}, path, {"format": "pt"})


def with_dora(folder: Path) -> None:
    """Add tensors of DoRA, without `use_dora`."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    magnitudes = {
        key.replace(".lora_A.weight", ".lora_magnitude_vector"): torch.ones(16)
        for key in tensors if "query.lora_A" in key
    }  # fmt: skip
    save_file(tensors | magnitudes, path, {"format": "pt"})


DAMAGED: list[tuple[str, str, Damage]] = [
    ("text", "classifier.weight", without("classifier.weight")),
    ("text", "classifier.bias", without("classifier.bias")),
    ("text", "bert.encoder.layer.1.output.dense.weight", without("layer.1.output.dense.weight")),
    ("text", "bert.pooler.dense", without("pooler")),
    ("text", "classifier.weight", wider("classifier.weight")),
    ("text", "bert.encoder.layer.2", lambda f: rewrite(f / "config.json", num_hidden_layers=2)),
    ("text", "bert.encoder.layer.3", lambda f: rewrite(f / "config.json", num_hidden_layers=4)),
    ("text", "classifier.out_proj.weight", added("classifier.out_proj.weight")),
    ("text", "bert.", lambda f: rewrite(f / "config.json", hidden_size=32)),
    ("image", "classifier.weight", without("classifier.weight")),
    ("image", "vit.layers.0.mlp.fc1.weight", without("layer.0.intermediate.dense.weight")),
    ("image", "vit.embeddings.cls_token", wider("cls_token")),
    ("lora", "classifier", lambda f: drop(f, "classifier")),
    ("lora", "layer.1", lambda f: drop(f, "layer.1.")),
    ("lora", "self.query.lora_B", lambda f: drop(f, "1.attention.self.query.lora_B")),
    ("lora", "lora_magnitude_vector", with_dora),
    ("lora", ".lora_A", lambda f: reconfigure(f, r=4)),
    ("lora", "lora_magnitude_vector", lambda f: reconfigure(f, use_dora=True)),
    ("lora", "strange", lambda f: extra_tensor(f, "base_model.model.bert.strange.weight")),
    ("lora", ".lora_A.default.weight", lambda f: retensor(
        f, lambda k, t: (k.replace("lora_A", "lora_A.default"), t))),
    ("lora", "target_modules", lambda f: reconfigure(f, target_modules=["nothing"])),
    ("lora", "bert.", lambda f: rewrite(f / "config.json", hidden_size=32)),
    ("lora", "encoder.layer.2", lambda f: rewrite(f / "config.json", num_hidden_layers=2)),
    ("image-lora", "classifier", lambda f: drop(f, "classifier")),
    ("image-lora", "layers.1", lambda f: drop(f, "layers.1.")),
    ("pooled", "encoder.layer.1.output.dense.weight", without("layer.1.output.dense.weight")),
    ("pooled", "no trained head", lambda f: (f / "head.safetensors").unlink()),
    ("pooled", "head.safetensors", head(weight=torch.ones(2, 32))),
    ("pooled", "bias", head(bias=None)),
    ("pooled-lora", "layer.1", lambda f: drop(f, "layer.1.")),
    ("pooled-lora", "no trained head", lambda f: (f / "head.safetensors").unlink()),
]  # fmt: skip


def refused(folder: Path, base: Path | None = None) -> str:
    """Return the message of predict and compare, which must both refuse."""
    said = []
    table = write_csv(folder.parent / "rows.csv", ["text", "label"], sentences(4))
    for use in (
        lambda: predict_table(str(folder), table, None, None if base is None else str(base)),
        lambda: compare_models([str(folder)], table, None),
    )[: 2 if base is None else 1]:
        with pytest.raises(HftlError) as caught:
            use()
        assert caught.value.exit_code in (2, 4) and caught.value.fix
        said.append(caught.value.what)
    assert len(set(said)) == 1, said
    return said[0]


@pytest.mark.parametrize("kind", KINDS)
def test_sound_folder_loads(kind: str, made: dict[str, Path]) -> None:
    hftl.load(made[kind])


OWN_FUNCTIONS = [
    ("text", "load_predictor._infer_task"), ("text", "load_predictor.find_inputs_folder"),
    ("text", "load_predictor.read_label_curves"), ("text", "load_predictor.get_max_tokens"),
    ("image", "load_predictor.get_image_size"), ("text", "load._read_quantization"),
    ("lora", "load.compare_shapes"), ("pooled", "load.get_hidden_size"),
]  # fmt: skip


def fail(*_: object, **__: object) -> None:
    raise TypeError("not of the folder")


@pytest.mark.parametrize(("kind", "name"), OWN_FUNCTIONS)
def test_error_in_code_of_hftl_is_no_fault_of_the_folder(
    kind: str, name: str, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"hftl.inference.{name}", fail)
    with pytest.raises(TypeError, match="not of the folder"):
        hftl.load(made[kind])


def test_error_in_code_of_hftl_ends_a_command_as_a_bug(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    table = write_csv(tmp_path / "rows.csv", ["text", "label"], sentences(4))
    monkeypatch.setattr(load_predictor, "get_max_tokens", fail)
    monkeypatch.setattr(sys, "argv", ["hftl", "predict", str(made["text"]), str(table)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1 and "a bug in hftl" in capsys.readouterr().err


SETTINGS = [
    (kind, file)
    for kind, files in (
        ("text", ("config.json", "tokenizer_config.json")), ("pooled", ("config.json",)),
        ("image", ("config.json", "preprocessor_config.json")),
        ("lora", ("config.json", "adapter_config.json")),
    )
    for file in files
]  # fmt: skip
SENSELESS = (None, True, -1, 3, 0.5, "x", [], ["x"], {}, {"x": "y"})


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "file"), SETTINGS)
def test_any_setting_of_a_published_folder_is_read_or_refused(
    kind: str, file: str, made: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made[kind], tmp_path / "publish"))
    content = (folder / file).read_text()
    bugs = []
    for key in json.loads(content):
        for value in SENSELESS:
            rewrite(folder / file, **{key: value})
            try:
                hftl.load(folder)
            except HftlError as error:
                assert error.exit_code in (2, 4, 5) and error.fix, f"{key} = {value!r}: {error}"
            except Exception as error:  # noqa: BLE001 (what may not come)
                frame = traceback.extract_tb(error.__traceback__)[-1]
                bugs.append(f"{key} = {value!r}: {error!r} in {frame.name}, line {frame.lineno}")
            (folder / file).write_text(content)
    assert bugs == []


TOKENIZER_FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "no JSON of a tokenizer": (
        "tokenizer.json", lambda tree: tree.update(added_tokens={}), "expected a sequence"),
    "unknown word without a token": (
        "tokenizer.json", lambda tree: tree["model"].update(unk_token="none"), "UNK"),
    "token beyond the vocabulary": (
        "tokenizer.json",
        lambda tree: tree["post_processor"]["special_tokens"]["[SEP]"].update(ids=[9999]),
        "its vocabulary lacks"),
    "no ids": (
        "tokenizer_config.json", lambda tree: tree.update(model_input_names=["x"]),
        "expected names with input_ids"),
    "no padding": (
        "tokenizer_config.json", lambda tree: tree.update(pad_token=None), "padding token"),
}  # fmt: skip


@pytest.mark.parametrize("fault", TOKENIZER_FAULTS)
def test_tokenizer_that_makes_no_sense_is_refused(
    fault: str, made: dict[str, Path], tmp_path: Path
) -> None:
    file, damage, word = TOKENIZER_FAULTS[fault]
    folder = Path(shutil.copytree(made["text"], tmp_path / "publish"))
    tree = json.loads((folder / file).read_text())
    damage(tree)
    (folder / file).write_text(json.dumps(tree))
    with pytest.raises(HftlError, match=word) as caught:
        hftl.load(folder)
    assert caught.value.exit_code in (2, 4) and caught.value.fix
    with pytest.raises(RecipeError, match=word):
        load_tokenizer(find_source(Source(model=str(folder))))


def test_config_of_an_absurd_model_is_refused_before_it_is_built(
    made: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made["text"], tmp_path / "publish"))
    rewrite(folder / "config.json", num_hidden_layers=10**8)
    with pytest.raises(RunFolderError, match="config.json: num_hidden_layers is 100000000"):
        hftl.load(folder)
    shutil.copy(made["text"] / "config.json", folder)
    rewrite(folder / "config.json", intermediate_size=9_000_000)
    with pytest.raises(RunFolderError, match="makes a model of [0-9,]+ numbers"):
        hftl.load(folder)


def test_token_that_the_model_does_not_embed_is_refused_by_its_input(
    made: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made["text"], tmp_path / "publish"))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["brandnew"])
    tokenizer.save_pretrained(folder)
    model = hftl.load(folder)
    assert len(model.predict(["ab cd"])) == 1
    with pytest.raises(DataError, match="input 2: the token 'brandnew' has the number"):
        model.predict(["ab cd", "brandnew"])


def test_weights_that_are_no_numbers_are_named(made: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made["text"], tmp_path / "publish"))
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(HftlError, match="not finite") as caught:
        hftl.load(folder).predict(["ab cd"])
    assert caught.value.exit_code == 6 and "weights" in caught.value.fix


@pytest.mark.parametrize("settings", [
    {"image_mean": [0.5, 0.5]}, {"image_mean": "half"}, {"rescale_factor": "x"}, {"resample": 77},
    {"image_std": [0, 0, 0]}, {"size": "large"},
])  # fmt: skip
def test_image_processor_of_senseless_settings_is_refused(
    settings: dict[str, Any], made: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made["image"], tmp_path / "publish"))
    rewrite(folder / "preprocessor_config.json", **settings)
    with pytest.raises(HftlError) as caught:
        # Some settings are read with the first picture.
        hftl.load(folder).predict([Image.new("RGB", (40, 50))])
    assert caught.value.exit_code in (2, 4) and caught.value.fix


@pytest.mark.parametrize(("tensors", "metadata"), [
    ({}, None), ({}, {"pooling": "none"}), ({}, {"pooling": "cls+mean", "prefix_tokens": "-1"}),
    ({"projection": torch.ones(64)}, {"pooling": "mean"}),
])  # fmt: skip
def test_head_that_makes_no_sense_is_refused(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None, made: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(made["pooled"], tmp_path / "publish"))
    path = folder / "head.safetensors"
    save_file(load_file(path) | tensors, path, metadata)
    rewrite(folder / "hftl.json", weight_files=None)
    with pytest.raises(RunFolderError, match=r"head\.safetensors"):
        hftl.load(folder)


@pytest.mark.parametrize(("kind", "named", "damage"), DAMAGED)
def test_missing_unknown_or_misshapen_tensor_is_refused(
    kind: str, named: str, damage: Damage, made: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made[kind], tmp_path / "publish"))
    damage(folder)
    assert named in refused(folder)


@pytest.mark.parametrize(
    ("kind", "model_type", "more", "named"),
    [
        ("lora", "bert", {"hidden_size": 32}, "(32,)"),
        ("lora", "bert", {"num_hidden_layers": 2}, "layer.2"),
        ("lora", "bert", {"num_hidden_layers": 4}, "layer.3"),
        ("lora", "bert", {"max_position_embeddings": 80}, "position_embeddings"),
        ("lora", "distilbert", {}, "bert"),
        ("image-lora", "vit", {"hidden_size": 32}, "embeddings"),
        ("pooled-lora", "bert", {"hidden_size": 32}, "lora_"),
        ("pooled-lora", "bert", {"num_hidden_layers": 4}, "layer.3"),
    ],
)
def test_unfitting_base_is_refused(
    kind: str, model_type: str, more: dict[str, Any], named: str, made: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    from transformers import AutoModel

    base = save_tiny(model_type, tmp_path / "base")
    AutoModel.from_config(tiny_config(model_type, **more)).save_pretrained(base)
    folder = Path(shutil.copytree(made[kind], tmp_path / "publish"))
    assert named in refused(folder, base)


LORA = {"task_type": "SEQ_CLS", "target_modules": ["query"]}


class Hostile:
    """Make a file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def as_checkpoint(path: Path, mark: Path) -> None:
    torch.save({"x": Hostile(mark)}, path)


def as_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Hostile(mark)))


def as_noise(path: Path, mark: Path) -> None:
    path.write_bytes(b"no pickle at all")


def as_nothing(path: Path, mark: Path) -> None:
    path.write_bytes(b"")


FORMS = [as_checkpoint, as_pickle, as_noise, as_nothing]


@pytest.mark.parametrize("write", FORMS)
def test_pickle_in_a_published_folder_is_refused(
    write: Callable[..., None], tmp_path: Path
) -> None:
    base, mark = save_tiny("bert", tmp_path / "base"), tmp_path / "mark"
    table = write_csv(tmp_path / "rows.csv", ["text", "label"], sentences(4))
    adapter = save(wrapped(base, "bert", LORA), tmp_path / "adapter")
    rewrite(adapter / "adapter_config.json", base_model_name_or_path=str(base), revision=None)
    whole = tmp_path / "whole"
    wrapped(base, "bert", LORA).merge_and_unload().save_pretrained(whole)
    tiny_tokenizer(whole)
    for folder, kind in ((adapter, "adapter_model"), (whole, "pytorch_model")):
        write(folder / "training_args.bin", mark)
        hftl.load(folder)  # which is passed over
        (folder / f"{kind.replace('pytorch_', '')}.safetensors").unlink()
        write(folder / f"{kind}.bin", mark)
        for use in (lambda: hftl.load(folder), lambda: compare_models([str(folder)], table, None)):  # noqa: B023
            with pytest.raises(HftlError, match=r"pickle.* hftl doctor") as caught:
                use()
            assert caught.value.exit_code == 4
        assert "unsafe" in {one.kind for one in examine_adapter(folder).defects}
    assert not mark.exists()


@pytest.mark.parametrize("write", FORMS)
def test_pickle_as_source_or_base_is_refused(write: Callable[..., None], tmp_path: Path) -> None:
    base, mark = save_tiny("bert", tmp_path / "base"), tmp_path / "mark"
    adapter = save(wrapped(base, "bert", LORA), tmp_path / "adapter")
    (base / "model.safetensors").unlink()
    write(base / "pytorch_model.bin", mark)
    table = write_csv(tmp_path / "rows.csv", ["text", "label"], sentences(40))
    recipe = Recipe.parse({"source": {"model": str(base)}, "data": {"train": {"path": str(table)}}})
    with pytest.raises(HftlError, match="pickle") as caught:
        bench_of(recipe).build_model("native", 0)
    assert caught.value.exit_code == 2
    with pytest.raises(HftlError, match="pickle"):
        hftl.load(adapter, base)
    assert "pickles are not opened" in examine_adapter(adapter, str(base)).unexamined[0]
    assert not mark.exists()
