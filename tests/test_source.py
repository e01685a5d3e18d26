"""The source model: pinned, on the disk, and known by its weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file

from hftl.errors import HubError, RecipeError
from hftl.model.head import build
from hftl.model.source import find_source, weights_sha256
from hftl.sections import Source

COMMIT = "a" * 40


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], list[Any]]:
    """Makes `org/tiny` a hub id whose snapshot is a copy of a folder; returns what is asked."""

    def serve(folder: Path) -> list[Any]:
        asked: list[Any] = []
        snapshot = tmp_path / "snapshots" / COMMIT

        def download(repo_id: str, revision: str | None, **patterns: Any) -> str:
            assert repo_id == "org/tiny"
            asked.append(revision)
            snapshot.mkdir(parents=True, exist_ok=True)
            for pattern in patterns["allow_patterns"]:
                for file in folder.glob(pattern):
                    (snapshot / file.name).write_bytes(file.read_bytes())
            return str(snapshot)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        return asked

    return serve


def test_a_hub_id_is_pinned_before_its_weights_are_fetched(
    hub: Callable[[Path], list[Any]], tiny_model: Callable[..., Path]
) -> None:
    asked = hub(tiny_model())
    found = find_source(Source(model="org/tiny", revision="v1"))
    assert found.revision == COMMIT and found.public_id == "org/tiny"
    assert asked == ["v1", COMMIT], "the weights come from the commit the config came from"
    assert (found.folder / "model.safetensors").exists()
    assert weights_sha256(found) == weights_sha256(find_source(Source(model=str(tiny_model()))))
    assert build(found, "mean", 2, ["a", "b"], seed=0).fresh == ()


def test_an_unsupported_hub_model_is_refused_before_its_weights_are_fetched(
    hub: Callable[[Path], list[Any]], tmp_path: Path
) -> None:
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path / "gpt2")
    asked = hub(tmp_path / "gpt2")
    with pytest.raises(RecipeError, match="'gpt2' is not supported"):
        find_source(Source(model="org/tiny"))
    assert len(asked) == 1


def test_a_folder_keeps_the_public_revision_it_is_given(tiny_model: Callable[..., Path]) -> None:
    found = find_source(Source(model=str(tiny_model()), published_as="org/tiny", revision=COMMIT))
    assert found.public_id == "org/tiny" and found.revision == COMMIT


def test_without_network_a_hub_id_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise OfflineModeIsEnabled("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(HubError, match="no folder 'org/tiny' here, and the hub gives no model"):
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
    found = {
        n: weights_sha256(find_source(Source(model=str(tmp_path / n)))) for n in ("same", "other")
    }
    assert found["same"] == weights_sha256(source) != found["other"]


def test_a_folder_without_weights_is_refused(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model() / "config.json").read_bytes())
    source = find_source(Source(model=str(tmp_path)))
    with pytest.raises(RecipeError, match="has no weights"):
        weights_sha256(source)
    with pytest.raises(RecipeError, match="does not load"):
        build(source, "mean", 2, ["a", "b"], seed=0)
