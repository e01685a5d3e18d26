"""The base that an adapter goes on: public, pinned, and of the weights that it was trained on."""

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hftl import places, rundir
from hftl.errors import HubError, RecipeError
from hftl.publish.patience import AnsweredError, asking

WEIGHTS = "model*.safetensors"


def pinned_base(source: dict[str, Any]) -> tuple[str, str]:
    """The base's public id and its commit, once both are seen to be right.

    Args:
        source: the record's section.

    Raises:
        RecipeError: if the source model has no public id.
        HubError: if nobody but us can see it, the commit is not there, or its weights are others.
    """
    base = source["published_as"]
    if base is None:
        raise RecipeError(
            "the source model has no public id, so nobody could load the adapter",
            "Set source.published_as and run again",
        )
    info = _seen_by_all(base, source["revision"])
    theirs = {s.rfilename: s.lfs.sha256 for s in info.siblings or []
              if s.lfs is not None and fnmatch(s.rfilename, WEIGHTS)}  # fmt: skip
    # What came from there at that commit is what stands there.
    if source["model"] != base and theirs != _ours(source):
        _compare_tensors(base, str(info.sha), source["weights_sha256"])
    return base, str(info.sha)


def _seen_by_all(base: str, revision: str | None) -> Any:
    """What the hub tells of the base to anyone, who has no token."""
    from huggingface_hub import HfApi

    at = base if revision is None else f"{base} at {revision}"
    try:
        with asking(f"reading the base {at}"):
            return HfApi().model_info(base, revision=revision, files_metadata=True, token=False)
    except AnsweredError as error:
        if error.status not in (401, 403, 404):
            raise
        raise HubError(
            f"the base {at} is not public on the hub, so nobody could load the adapter",
            "Correct source.published_as and source.revision, or publish the base first",
        ) from error


def _ours(source: dict[str, Any]) -> dict[str, str]:
    """The hashes of the weight files that were trained on; none where they are gone."""
    folder = places.find(source["model"], "source.model")
    return {} if folder is None else {p.name: rundir.sha256(p) for p in folder.glob(WEIGHTS)}


def _compare_tensors(base: str, revision: str, expected: str) -> None:
    """Files that differ may hold the same tensors: fetches the hub's and looks."""
    from huggingface_hub import snapshot_download

    from hftl.model.source import checkpoint_sha256

    with asking(f"fetching the weights of the base {base}"):
        folder = snapshot_download(
            base, revision=revision, allow_patterns=[WEIGHTS, "pytorch_model*.bin"], token=False
        )
    if checkpoint_sha256(Path(folder)) != expected:
        raise HubError(
            f"the base {base} at {revision[:8]} has other weights on the hub than the adapter was "
            "trained on",
            "Correct source.published_as and source.revision",
        )
