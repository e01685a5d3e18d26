"""Check how the source model is found, pinned, read and hashed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from support.planted_defects import rewrite
from transformers import GPT2Config, ViTMAEModel

from hftl.analysis.check import check_unread_blocks
from hftl.config.section import Source
from hftl.data.image_processing import get_image_size, resize_processor
from hftl.errors import HubError, RecipeError
from hftl.models.architectures import get_native_image_size, get_patch_size
from hftl.models.heads import LoadedModel, build_model
from hftl.models.source import (
    SourceModel,
    find_source,
    hash_source_config,
    hash_source_weights,
    load_image_processor,
    load_tokenizer,
)

COMMIT = "a" * 40
Tiny = Callable[..., Path]


def find_folder(folder: Path, **more: Any) -> SourceModel:
    return find_source(Source(model=str(folder), **more))


def build(source: SourceModel, pooling: str = "native") -> LoadedModel:
    return build_model(source, "classification", pooling, 2, ["a", "b"], seed=0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], list[Any]]:
    """Make `org/tiny` a hub id, a copy of a folder; return the requested revisions."""

    def serve(folder: Path) -> list[Any]:
        revisions: list[Any] = []
        snapshot = tmp_path / "snapshots" / COMMIT

        def download(repo_id: str, revision: str | None, **patterns: Any) -> str:
            assert repo_id == "org/tiny"
            revisions.append(revision)
            snapshot.mkdir(parents=True, exist_ok=True)
            for pattern in patterns["allow_patterns"]:
                for file in folder.glob(pattern):
                    shutil.copy(file, snapshot)
            return str(snapshot)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        return revisions

    return serve


def test_hub_id_is_pinned_before_its_weights_are_fetched(hub: Any, bert: Path) -> None:
    revisions = hub(bert)
    source = find_source(Source(model="org/tiny", revision="v1"))
    assert source.revision == COMMIT and source.public_id == "org/tiny"
    assert revisions == ["v1", COMMIT], "the weights come from the commit the config came from"
    assert (source.folder / "model.safetensors").exists()
    assert hash_source_weights(source) == hash_source_weights(find_folder(bert))
    assert build(source, "mean").fresh == ()


def test_unsupported_hub_model_is_refused_before_its_weights_are_fetched(
    hub: Any, tmp_path: Path
) -> None:
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    revisions = hub(tmp_path / "gpt2")
    with pytest.raises(RecipeError, match="'gpt2' is not supported"):
        find_source(Source(model="org/tiny"))
    assert len(revisions) == 1


def test_folder_keeps_the_public_id_and_revision_of_the_recipe(bert: Path) -> None:
    source = find_folder(bert, published_as="org/tiny", revision=COMMIT)
    assert source.public_id == "org/tiny" and source.revision == COMMIT


def test_hub_id_without_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise OfflineModeIsEnabled("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    message = "'org/tiny' here nor in the hub's cache, and HF_HUB_OFFLINE"
    with pytest.raises(HubError, match=message):
        find_source(Source(model="org/tiny"))


def test_hash_of_weights_is_of_their_values_not_of_their_file(bert: Path, tmp_path: Path) -> None:
    tensors = load_file(bert / "model.safetensors")
    first = next(iter(tensors))
    changed = tensors | {first: tensors[first] + 1e-6}
    digests = [hash_source_weights(find_folder(bert))]
    for name, values in (("same", dict(reversed(tensors.items()))), ("other", changed)):
        (tmp_path / name).mkdir()
        shutil.copy(bert / "config.json", tmp_path / name)
        save_file(values, tmp_path / name / "model.safetensors", metadata={"note": "again"})
        digests.append(hash_source_weights(find_folder(tmp_path / name)))
    assert digests[0] == digests[1] != digests[2]


def test_folder_without_weights_is_refused(tmp_path: Path, bert: Path) -> None:
    shutil.copy(bert / "config.json", tmp_path)
    source = find_folder(tmp_path)
    with pytest.raises(RecipeError, match="has no weights"):
        hash_source_weights(source)
    with pytest.raises(RecipeError, match="does not load"):
        build(source, "mean")


def test_file_or_run_in_the_place_of_a_source_is_named(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(RecipeError, match=r"config.json is a file, expected the folder"):
        find_folder(bert / "config.json")
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(RecipeError, match=r"is the folder of a run.*/publish"):
        find_folder(tmp_path)


def test_vit_mae_is_read_as_vit_without_its_decoder(tiny_model: Tiny) -> None:
    source = find_folder(tiny_model("vit_mae"))
    assert (source.architecture, source.model_type) == ("vit_mae", "vit")
    weights = ViTMAEModel.from_pretrained(source.folder).state_dict()
    built = build(source)
    for name, parameter in built.model.named_parameters():
        path = name.removeprefix("vit.")
        assert name.startswith("classifier.") or torch.equal(weights[path], parameter), name
    assert built.fresh == ("classifier",)


@pytest.mark.parametrize("name", ["vit", "clip", "vit_mae"])
def test_processor_comes_with_the_hub_id_and_needs_no_torchvision(
    name: str, hub: Any, tiny_model: Tiny
) -> None:
    hub(tiny_model(name))
    processor = load_image_processor(find_source(Source(model="org/tiny")))
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)


def test_source_without_processor_or_tokenizer_says_so(tiny_model: Tiny, tmp_path: Path) -> None:
    for name in ("bert", "vit"):
        (tmp_path / name).mkdir()
        shutil.copy(tiny_model(name) / "config.json", tmp_path / name)
    with pytest.raises(RecipeError, match="no usable image processor"):
        load_image_processor(find_folder(tmp_path / "vit"))
    with pytest.raises(RecipeError, match="no usable tokenizer"):
        load_tokenizer(find_folder(tmp_path / "bert"))


DAMAGED = {"deep": "[" * 100_000, "list": "[]", "text": '"x"'}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("bert", "config.json", "is no model: "), ("vit", "config.json", "is no model: "),
        ("bert", "tokenizer.json", "has no usable tokenizer: "),
        ("bert", "tokenizer_config.json", "has no usable tokenizer: "),
        ("vit", "preprocessor_config.json", "has no usable image processor: "),
    ],
)  # fmt: skip
def test_source_whose_json_is_no_mapping_is_refused(
    name: str, file: str, message: str, damage: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model(name), tmp_path / "model"))
    (folder / file).write_text(DAMAGED[damage], encoding="utf-8")
    with pytest.raises(RecipeError, match=f"source.model: .* {message}"):
        load_inputs = load_tokenizer if name == "bert" else load_image_processor
        load_inputs(find_folder(folder))


@pytest.mark.parametrize(("kind", "file", "changes", "words"), [
    ("bert", "config.json", {"num_attention_heads": 0}, "does not load"),
    ("bert", "config.json", {"hidden_act": "x"}, "does not load"),
    ("bert", "config.json", {"vocab_size": -1}, "does not load"),
    ("vit", "config.json", {"num_attention_heads": 9**9}, "does not load"),
    ("vit", "config.json", {"image_size": []}, "expected a whole number above 0"),
    ("vit", "config.json", {"patch_size": 0}, "expected a whole number above 0"),
    ("bert", "config.json", {"architectures": 7}, "architectures is 7, expected a list of names"),
    ("bert", "config.json", {"hidden_size": 10**9}, "hidden_size is 1000000000, and no model"),
    ("bert", "config.json", {"vocab_size": 20},
     r"embeddings.word_embeddings.weight of .* has the shape \(\d+, 16\), and its config.json"),
    ("vit", "preprocessor_config.json",
     {"image_processor_type": "Wav2Vec2FeatureExtractor"}, "Wav2Vec2FeatureExtractor reads no im"),
    ("vit", "config.json", {"hidden_size": 21472}, "makes a model of [0-9,]+ numbers"),
    ("vit", "config.json", {"image_size": 800_000}, "makes a model of [0-9,]+ numbers"),
    ("vit", "preprocessor_config.json", {"size": {"height": 10**6, "width": 10**6}},
     "has height=1000000, expected 1 to 16384 pixels"),
    ("vit", "preprocessor_config.json", {"size": {"height": None, "width": 8}}, "size must have"),
])  # fmt: skip
def test_source_whose_settings_fit_no_model_is_refused(
    kind: str, file: str, changes: dict[str, Any], words: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model(kind), tmp_path / "source"))
    rewrite(folder / file, **changes)
    with pytest.raises(RecipeError, match=words) as caught:
        source = find_folder(folder)
        if kind == "vit":
            get_native_image_size(source.config)
            get_patch_size(source.config)
            get_image_size(resize_processor(load_image_processor(source), None))
        build(source)
    assert "\n" not in str(caught.value) and caught.value.fix


@pytest.mark.parametrize(("name", "content", "words"), [
    ("tokenizer.json", "", "tokenizer.json is no JSON: Expecting value"),
    ("tokenizer_config.json", "\ufeff{}", "tokenizer_config.json is no JSON: Unexpected UTF-8 BOM"),
    ("tokenizer_config.json", '{"pad_token": "none of these"}',
     r"pads with 'none of these', which has the number \d+, and the model embeds"),
])  # fmt: skip
def test_tokenizer_whose_file_makes_no_sense_is_named(
    name: str, content: str, words: str, bert: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bert, tmp_path / "source"))
    (folder / name).write_text(content)
    with pytest.raises(RecipeError, match=words):
        load_tokenizer(find_folder(folder))


def test_weights_that_are_a_folder_are_named(bert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert, tmp_path / "source"))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(RecipeError, match="model.safetensors does not open"):
        hash_source_weights(find_folder(folder))


@pytest.mark.parametrize("kind", [
    "bert", "vit", "dinov2", "albert", "modernbert", "distilbert", "llama", "clip", "resnet",
    "swin", "hiera", "pvt_v2", "mobilevit", "efficientnet",
])  # fmt: skip
def test_blocks_that_a_config_leaves_out_are_warned_of(
    kind: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model(kind), tmp_path / "source"))
    run: Any = SimpleNamespace(source=find_folder(folder))
    assert list(check_unread_blocks(run)) == []
    if kind in ("bert", "vit", "llama"):
        rewrite(folder / "config.json", num_hidden_layers=1)
        run = SimpleNamespace(source=find_folder(folder))
        (warning,) = check_unread_blocks(run)
        assert "says 1 layer(s), and its weights hold 3: the last 2 are not read" in warning


def test_config_with_half_a_character_has_a_hash(bert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert, tmp_path / "source"))
    before = hash_source_config(find_folder(folder))
    rewrite(folder / "config.json", note="\ud800")
    assert hash_source_config(find_folder(folder)) != before


@pytest.mark.parametrize(
    ("name", "lost", "needed"),
    [
        ("bert", "encoder.layer.1.output.dense.", True), ("vit", "layernorm.", True),
        ("modernbert", "final_norm.", True), ("vit", "embeddings.", True),
        ("dinov2", "embeddings.mask_token", False),
        ("clip", "vision_model.post_layernorm.", False),
    ],
)  # fmt: skip
def test_checkpoint_may_lack_only_what_no_output_depends_on(
    name: str, lost: str, needed: bool, tiny_model: Tiny, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model(name), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    remaining = {key: value for key, value in tensors.items() if not key.startswith(lost)}
    assert len(remaining) < len(tensors)
    save_file(remaining, folder / "model.safetensors", metadata={"format": "pt"})
    source = find_folder(folder)
    if needed:
        with pytest.raises(RecipeError, match=f"lacks the weights of .*{lost[:-1]}"):
            build(source)
    else:
        assert build(source).fresh == ("classifier",)


def test_the_hash_of_a_config_knows_its_content_and_not_its_names(
    tiny_model: Tiny, tmp_path: Path
) -> None:
    first = hash_source_config(find_folder(tiny_model("clip")))
    folder = Path(shutil.copytree(tiny_model("clip"), tmp_path / "moved"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"transformers_version": "4.0", "_name_or_path": "/elsewhere"}
    config["vision_config"]["_name_or_path"] = "/elsewhere"
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    assert hash_source_config(find_folder(folder)) == first
    config["vision_config"]["hidden_act"] = "relu"
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    assert hash_source_config(find_folder(folder)) != first
