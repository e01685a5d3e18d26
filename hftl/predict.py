"""Predictions with a finished run or a published folder, local or on a hub."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hftl import places, rundir
from hftl.data.text import Pad, encode
from hftl.errors import DataError, HubError, RecipeError, RunFolderError
from hftl.finetune.arm import predictions_of
from hftl.model.anatomy import max_tokens
from hftl.model.cache import logits
from hftl.model.source import find_source, weights_sha256
from hftl.publish import reload
from hftl.recipe import Recipe
from hftl.sections import Source
from hftl.train.hardware import device

Text = str | Sequence[str]


@dataclass(frozen=True)
class Predictor:
    """A loaded model. `names` are the classes, empty for regression; `texts` the text columns."""

    model: nn.Module
    tokenizer: Any
    names: list[str]
    texts: list[str]
    max_length: int
    device: str

    def predict(self, inputs: Iterable[Text]) -> list[dict[str, Any]]:
        """Predicts each text, or pair of texts.

        Returns:
            A mapping for each: `label`, for classes also `score` and `scores` by class name.

        Raises:
            DataError: for an empty text, or another number of texts than the model takes.
        """
        rows: list[Any] = [
            tuple(text) if isinstance(text, (list, tuple)) else (text,) for text in inputs
        ]
        for number, row in enumerate(rows):
            if len(row) != len(self.texts) or not all(
                isinstance(t, str) and t.strip() for t in row
            ):
                raise DataError(
                    f"input {number + 1} is {row!r}, expected {len(self.texts)} text(s), not empty",
                    "Correct it",
                )
        if not rows:
            return []
        encoded = encode(self.tokenizer, rows, self.max_length)
        found = logits(self.model, encoded, Pad(self.tokenizer), self.device)
        return [self._told(row) for row in found]

    def _told(self, found: np.ndarray) -> dict[str, Any]:
        task = "classification" if self.names else "regression"
        predictions, scores = predictions_of(task, found[None])
        if not self.names:
            return {"label": float(predictions[0])}
        by_name = dict(zip(self.names, map(float, scores[0]), strict=True))
        label = self.names[int(predictions[0])]
        return {"label": label, "score": by_name[label], "scores": by_name}


def load(path: str | Path, base: str | Path | None = None) -> Predictor:
    """Loads a run folder, a published folder, or a published hub id.

    Args:
        path: where it is.
        base: an adapter's base model, where it is not the one the folder names.

    Raises:
        RecipeError: if there is nothing to load, or the base cannot be told.
        RunFolderError: if a run has no publish folder yet, or the base has other weights.
        HubError: if a hub id cannot be had.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = _published(path)
    _need_head(folder)
    told = _read_json(folder / "hftl.json")
    recipe = told.get("recipe", {})
    adapter = (folder / "adapter_config.json").exists()
    model = reload.load(folder, _base(folder, told, base) if adapter else None)
    config: Any = AutoConfig.from_pretrained(folder)
    if "data" in told:
        names = told["data"]["labels"]
    else:
        names = [config.id2label[i] for i in range(config.num_labels)]
    text = recipe.get("data", {}).get("train", {}).get("text", "text")
    where = device()
    return Predictor(
        model.to(where),
        AutoTokenizer.from_pretrained(folder),
        names,
        [text] if isinstance(text, str) else text,
        min(recipe.get("data", {}).get("max_length", 128), max_tokens(config)),
        where,
    )


def _published(path: str | Path) -> Path:
    folder = places.find(str(path), "the model to load")
    if folder is None:
        return _download(str(path))
    folder = folder.resolve()
    if not folder.is_dir():
        raise RecipeError(f"there is no folder {path}", "Give a run or a published folder")
    if (folder / "recipe.yaml").exists():
        if not (folder / "publish" / "hftl.json").exists():
            raise RunFolderError(f"{path} is not finished", "Run the same command again")
        rundir.check_finished(folder)
        return folder / "publish"
    if not (folder / "config.json").exists():
        raise RecipeError(f"{path} holds no run and no model", "Give a run or a published folder")
    return folder


def _need_head(folder: Path) -> None:
    """Refuses a bare encoder: its head would be drawn at random."""
    trained = ("adapter_config.json", "head.safetensors")
    kinds = _read_json(folder / "config.json").get("architectures") or []
    if not any((folder / name).exists() for name in trained) and not any(
        kind.endswith("ForSequenceClassification") for kind in kinds
    ):
        raise RecipeError(
            f"{folder.name} has no trained head to predict with", "Give a run or a published folder"
        )


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id))
    except (OSError, ValueError) as error:
        raise HubError(
            f"no folder {repo_id!r} here, and the hub gives no model of that id: "
            f"{str(error).splitlines()[0]}",
            "Check the path or id, and the network",
        ) from error


def _base(folder: Path, told: dict[str, Any], base: str | Path | None) -> Path:
    """The folder of an adapter's base, checked to have the weights it was trained on."""
    adapter = _read_json(folder / "adapter_config.json")
    recipe_file = folder.parent / "recipe.yaml"
    spec = told.get("source", {}).get("model", "")
    if base is not None:
        source = Source(model=str(base))
    elif folder.name == "publish" and recipe_file.exists():
        source = Recipe.load(recipe_file).source
    elif spec.startswith(places.PACKAGE) and _installed(spec):
        source = Source(model=spec)
    elif adapter.get("base_model_name_or_path"):
        source = Source(model=adapter["base_model_name_or_path"], revision=adapter.get("revision"))
    else:
        raise RecipeError(f"{folder} does not say its base model", "Give it: --base MODEL")
    found = find_source(source)
    expected = told.get("source", {}).get("weights_sha256")
    if expected and weights_sha256(found) != expected:
        raise RunFolderError(
            f"the base {source.model} has other weights than this adapter was trained on",
            "Give the right base with --base MODEL",
        )
    return found.folder


def _installed(spec: str) -> bool:
    try:
        return places.find(spec, "base") is not None
    except RecipeError:
        return False


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
