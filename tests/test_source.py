"""Check how the source model is found, pinned, read and hashed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file

from hftl.config.section import Source
from hftl.errors import HubError, RecipeError
from hftl.models.heads import build_model
from hftl.models.source import find_source, hash_source_weights, load_processor, load_tokenizer

COMMIT = "a" * 40


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
                    (snapshot / file.name).write_bytes(file.read_bytes())
            return str(snapshot)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        return revisions

    return serve


def test_a_hub_id_is_pinned_before_its_weights_are_fetched(
    hub: Callable[[Path], list[Any]], tiny_model: Callable[..., Path]
) -> None:
    revisions = hub(tiny_model())
    source = find_source(Source(model="org/tiny", revision="v1"))
    assert source.revision == COMMIT and source.public_id == "org/tiny"
    assert revisions == ["v1", COMMIT], "the weights come from the commit the config came from"
    assert (source.folder / "model.safetensors").exists()
    assert hash_source_weights(source) == hash_source_weights(
        find_source(Source(model=str(tiny_model())))
    )
    assert build_model(source, "classification", "mean", 2, ["a", "b"], seed=0).fresh == ()


def test_an_unsupported_hub_model_is_refused_before_its_weights_are_fetched(
    hub: Callable[[Path], list[Any]], tmp_path: Path
) -> None:
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path / "gpt2")
    revisions = hub(tmp_path / "gpt2")
    with pytest.raises(RecipeError, match="'gpt2' is not supported"):
        find_source(Source(model="org/tiny"))
    assert len(revisions) == 1


def test_a_folder_keeps_the_public_revision_it_is_given(tiny_model: Callable[..., Path]) -> None:
    source = find_source(Source(model=str(tiny_model()), published_as="org/tiny", revision=COMMIT))
    assert source.public_id == "org/tiny" and source.revision == COMMIT


def test_without_network_a_hub_id_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise OfflineModeIsEnabled("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        HubError, match="'org/tiny' here nor in the hub's cache, and HF_HUB_OFFLINE"
    ):
        find_source(Source(model="org/tiny"))


def test_weights_are_known_by_their_values_not_by_their_file(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = find_source(Source(model=str(tiny_model())))
    tensors = load_file(source.folder / "model.safetensors")
    for name in ("same", "other"):
        (tmp_path / name).mkdir()
        config = (source.folder / "config.json").read_bytes()
        (tmp_path / name / "config.json").write_bytes(config)
    save_file(dict(reversed(tensors.items())), tmp_path / "same" / "model.safetensors",
              metadata={"note": "written again"})  # fmt: skip
    first = next(iter(tensors))
    changed = tensors | {first: tensors[first] + torch.ones_like(tensors[first]) * 1e-6}
    save_file(changed, tmp_path / "other" / "model.safetensors")
    digests = {
        n: hash_source_weights(find_source(Source(model=str(tmp_path / n))))
        for n in ("same", "other")
    }
    assert digests["same"] == hash_source_weights(source) != digests["other"]


def test_a_folder_without_weights_is_refused(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model() / "config.json").read_bytes())
    source = find_source(Source(model=str(tmp_path)))
    with pytest.raises(RecipeError, match="has no weights"):
        hash_source_weights(source)
    with pytest.raises(RecipeError, match="does not load"):
        build_model(source, "classification", "mean", 2, ["a", "b"], seed=0)


def test_vit_mae_is_read_as_vit_and_keeps_its_name(tiny_model: Callable[..., Path]) -> None:
    """Every weight of the encoder is the checkpoint's, and the decoder's are left out."""
    from transformers import ViTMAEModel

    source = find_source(Source(model=str(tiny_model("vit_mae"))))
    assert (source.architecture, source.model_type) == ("vit_mae", "vit")
    weights = ViTMAEModel.from_pretrained(source.folder).state_dict()
    built = build_model(source, "classification", "native", 2, ["a", "b"], seed=0)
    for name, parameter in built.model.named_parameters():
        path = name.removeprefix("vit.")
        assert name.startswith("classifier.") or torch.equal(weights[path], parameter), name
    assert built.fresh == ("classifier",)


@pytest.mark.parametrize("name", ["vit", "clip", "vit_mae"])
def test_the_processor_comes_with_the_hub_id_and_needs_no_torchvision(
    name: str, hub: Callable[[Path], list[Any]], tiny_model: Callable[..., Path]
) -> None:
    hub(tiny_model(name))
    processor = load_processor(find_source(Source(model="org/tiny")))
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)


def test_a_model_without_processor_or_tokenizer_says_so(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("bert", "vit"):
        (tmp_path / name).mkdir()
        config = (tiny_model(name) / "config.json").read_bytes()
        (tmp_path / name / "config.json").write_bytes(config)
    with pytest.raises(RecipeError, match="no usable image processor"):
        load_processor(find_source(Source(model=str(tmp_path / "vit"))))
    with pytest.raises(RecipeError, match="no usable tokenizer"):
        load_tokenizer(find_source(Source(model=str(tmp_path / "bert"))))


@pytest.mark.parametrize(
    ("name", "lost"),
    [("bert", "encoder.layer.1.output.dense"), ("vit", "layernorm"), ("modernbert", "final_norm"),
     ("vit", "embeddings")],
)  # fmt: skip
def test_a_checkpoint_that_lacks_a_part_of_the_encoder_is_refused(
    name: str, lost: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    for file in tiny_model(name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    remaining = {key: value for key, value in tensors.items() if not key.startswith(f"{lost}.")}
    assert len(remaining) < len(tensors)
    save_file(remaining, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = find_source(Source(model=str(tmp_path)))
    with pytest.raises(RecipeError, match=f"lacks the weights of .*{lost}"):
        build_model(source, "classification", "native", 2, ["a", "b"], seed=0)


@pytest.mark.parametrize(("name", "unused"), [("dinov2", "mask_token"), ("clip", "post_layernorm")])
def test_a_part_that_no_output_depends_on_may_be_missing(
    name: str, unused: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    for file in tiny_model(name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    remaining = {key: value for key, value in tensors.items() if unused not in key}
    assert len(remaining) < len(tensors)
    save_file(remaining, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = find_source(Source(model=str(tmp_path)))
    assert build_model(source, "classification", "native", 2, ["a", "b"], seed=0).fresh == (
        "classifier",
    )
