"""The source model: found, pinned, and described before a weight is read."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hftl import places
from hftl.errors import HubError, RecipeError
from hftl.model.anatomy import Anatomy, anatomy_of
from hftl.sections import Source


@dataclass(frozen=True)
class SourceModel:
    """A pretrained checkpoint.

    `location` is what `from_pretrained` takes, a folder or a hub id with `revision`.
    `public_id` is the hub id that a published adapter names as its base, where there is one.
    """

    spec: str
    location: str
    revision: str | None
    public_id: str | None
    config: Any

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers."""
        return self.config.model_type

    @property
    def anatomy(self) -> Anatomy:
        """Where the architecture's parts lie."""
        return anatomy_of(self.model_type)

    @property
    def load_arguments(self) -> dict[str, Any]:
        """Arguments that every `from_pretrained` of this source gets."""
        return {
            "pretrained_model_name_or_path": self.location,
            "revision": self.revision,
            "trust_remote_code": False,
        }


def find_source(source: Source) -> SourceModel:
    """Finds the checkpoint and reads its config.

    Raises:
        RecipeError: if a folder is missing or holds no model, or the architecture is unsupported.
        HubError: if a hub id is unknown, gated, or the hub cannot be reached.
    """
    from transformers import AutoConfig

    path = places.find(source.model, "source.model")
    if path is not None and not path.exists():
        raise RecipeError(
            f"source.model: the folder {source.model} does not exist", "Check the path"
        )
    location = str(path) if path is not None else source.model
    revision = None if path is not None else source.revision
    try:
        config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if path is None:
            raise _no_hub(source.model, error) from error
        raise RecipeError(
            f"source.model: {source.model} is no model folder: {str(error).splitlines()[0]}",
            "Give a folder with config.json and model.safetensors",
        ) from error
    found = SourceModel(
        source.model,
        location,
        getattr(config, "_commit_hash", None) if path is None else None,
        source.published_as or (source.model if path is None else None),
        config,
    )
    anatomy_of(found.model_type)
    return found


def load_tokenizer(source: SourceModel) -> Any:
    """The source's own tokenizer.

    Raises:
        RecipeError: if the checkpoint ships none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**source.load_arguments)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"source.model: {source.spec} has no usable tokenizer: {str(error).splitlines()[0]}",
            "Save the tokenizer beside the model",
        ) from error


def weights_sha256(source: SourceModel) -> str | None:
    """sha256 over the checkpoint's weight files, by name; None where they are not on the disk."""
    folder = Path(source.location)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source.location, "config.json", revision=source.revision)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as handle:
            digest.update(file.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest() if files else None


def _no_hub(model: str, error: Exception) -> HubError:
    return HubError(
        f"source.model: no folder {model!r} here, and the hub gives no model of that id: "
        f"{str(error).splitlines()[0].strip()}",
        "Check the id or path, the network, and `hf auth login` for a gated model",
    )
