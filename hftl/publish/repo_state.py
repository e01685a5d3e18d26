"""What stands at the hub already, and whether a push may go over it."""

from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hftl.errors import HubError, RecipeError
from hftl.measure.record import SourceFacts
from hftl.publish.checks import is_publishable
from hftl.publish.http_retry import HubResponseError, wrap_hub_errors
from hftl.runtime import paths, run_folder

RECORD_FILE = "hftl.json"
"""Stands wherever hftl has pushed to."""
CARD_FILE = "README.md"
"""The one file of ours that the hub's own page may have made."""


class RepoStateError(HubError):
    """What stands there forbids the push as it was asked for; the same again is refused again."""


def list_foreign_files(files: Collection[str]) -> list[str]:
    """The files that a push would replace or delete, where hftl has pushed none of them."""
    if RECORD_FILE in files:
        return []
    return sorted(name for name in files if is_publishable(name) and name != CARD_FILE)


def check_replaceable(repo_id: str, files: Collection[str]) -> None:
    """Refuses to push over a model that hftl did not publish.

    Args:
        repo_id: where the push goes.
        files: what its head holds.

    Raises:
        StandsError: naming its files.
    """
    found = list_foreign_files(files)
    if found:
        raise RepoStateError(
            f"{repo_id} holds a model that hftl did not publish: {', '.join(found)}",
            "Nothing was pushed. Give another --repo-id, or remove it there first",
        )


def check_visibility(repo_id: str, files: Collection[str]) -> None:
    """Refuses to show to all what shall stay private; where hftl has pushed before, that is known.

    Args:
        repo_id: where the push goes, which is public already.
        files: what its head holds.

    Raises:
        StandsError: if hftl has not pushed there.
    """
    if RECORD_FILE not in files:
        raise RepoStateError(
            f"{repo_id} is public already, and the push was asked for as a private one",
            "Nothing was pushed. To let all see it: --public, or publish.private: false",
        )


# Who we are at the hub, and whether that may write where a push goes.


READ_ONLY_ROLES = ("read", "no_access")
"""Roles in an organisation that write nothing."""


class TokenPermissionError(HubError):
    """There is no token, or it may not do what was asked for."""


def read_account() -> dict[str, Any]:
    """What the hub says of our token, which comes from the environment or `hf auth login`.

    Raises:
        HubError: if there is no token, or the hub does not know it.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise TokenPermissionError(
            "pushing needs a token, and there is none",
            "Log in with `hf auth login`, or set HF_TOKEN",
        )
    with wrap_hub_errors("asking the hub who we are"):
        return HfApi().whoami()


def complete_repo_id(who: dict[str, Any], repo_id: str) -> str:
    """`owner/name`; what has no owner is ours."""
    return repo_id if "/" in repo_id else f"{who['name']}/{repo_id}"


def check_write_permission(who: dict[str, Any], repo_id: str, request: bool = False) -> None:
    """Sees whether the token may push there.

    Args:
        who: what `read_account` gave.
        repo_id: `owner/name`.
        request: whether a pull request is to be opened, which asks for less.

    Raises:
        HubError: saying what it lacks.
    """
    missing = find_missing_permission(who, repo_id, request)
    if missing is not None:
        raise TokenPermissionError(
            f"{repo_id}: {missing}",
            "Use a token that may write there: https://huggingface.co/settings/tokens",
        )


def find_missing_permission(who: dict[str, Any], repo_id: str, request: bool) -> str | None:
    """What the token lacks; None where it lacks nothing that can be seen.

    Args:
        who: what whoami says.
        repo_id: `owner/name`.
        request: whether a pull request is to be opened.
    """
    owner = repo_id.split("/")[0]
    token = (who.get("auth") or {}).get("accessToken") or {}
    role = token.get("role", "write")
    if role == "read":
        return f"the token of {who['name']} is read-only"
    if role == "fineGrained":
        return _find_missing_scope(token.get("fineGrained") or {}, owner, repo_id, request)
    if request or owner == who["name"]:
        return None
    roles = {org["name"]: org.get("roleInOrg") for org in who.get("orgs", [])}
    if owner not in roles:
        return f"{who['name']} is not {owner}, and no member of an organisation of that name"
    if roles[owner] in READ_ONLY_ROLES:
        return f"{who['name']} may only read in the organisation {owner}"
    return None


def _find_missing_scope(
    token: dict[str, Any], owner: str, repo_id: str, request: bool
) -> str | None:
    """A fine-grained token says what it may do with which owner's or which repository's files."""
    wanted = {"repo.write"} | ({"discussion.write"} if request else set())
    if request and wanted & set(token.get("global") or []):
        return None
    for scope in token.get("scoped") or []:
        named = (scope.get("entity") or {}).get("name")
        if named in (owner, repo_id) and wanted & set(scope.get("permissions") or []):
            return None
    return f"the fine-grained token lacks {' or '.join(sorted(wanted))}"


# The base that an adapter goes on: public, pinned, and of the weights that it was trained on.


WEIGHT_FILES = "model*.safetensors"


def resolve_public_base(source: SourceFacts) -> tuple[str, str]:
    """The base's public id and its commit, once both are seen to be right.

    Args:
        source: the record's section.

    Raises:
        RecipeError: if the source model has no public id.
        HubError: if nobody but us can see it, the commit is not there, or its weights are others.
    """
    base = source.published_as
    if base is None:
        raise RecipeError(
            "the source model has no public id, so nobody could load the adapter",
            "Set source.published_as and run again",
        )
    info = _read_public_info(base, source.revision)
    theirs = {s.rfilename: s.lfs.sha256 for s in info.siblings or []
              if s.lfs is not None and fnmatch(s.rfilename, WEIGHT_FILES)}  # fmt: skip
    # What came from there at that commit is what stands there.
    if source.model != base and theirs != _hash_local_weights(source):
        _compare_tensors(base, str(info.sha), source.weights_sha256)
    return base, str(info.sha)


def _read_public_info(base: str, revision: str | None) -> Any:
    """What the hub tells of the base to anyone, who has no token."""
    from huggingface_hub import HfApi

    at = base if revision is None else f"{base} at {revision}"
    try:
        with wrap_hub_errors(f"reading the base {at}"):
            return HfApi().model_info(base, revision=revision, files_metadata=True, token=False)
    except HubResponseError as error:
        if error.status not in (401, 403, 404):
            raise
        raise HubError(
            f"the base {at} is not public on the hub, so nobody could load the adapter",
            "Correct source.published_as and source.revision, or publish the base first",
        ) from error


def _hash_local_weights(source: SourceFacts) -> dict[str, str]:
    """The hashes of the weight files that were trained on; none where they are gone."""
    folder = paths.resolve_local_path(source.model, "source.model")
    return (
        {}
        if folder is None
        else {p.name: run_folder.hash_file(p) for p in folder.glob(WEIGHT_FILES)}
    )


def _compare_tensors(base: str, revision: str, expected: str) -> None:
    """Files that differ may hold the same tensors: fetches the hub's and looks."""
    from huggingface_hub import snapshot_download

    from hftl.models.source import hash_checkpoint

    with wrap_hub_errors(f"fetching the weights of the base {base}"):
        folder = snapshot_download(
            base,
            revision=revision,
            allow_patterns=[WEIGHT_FILES, "pytorch_model*.bin"],
            token=False,
        )
    if hash_checkpoint(Path(folder)) != expected:
        raise HubError(
            f"the base {base} at {revision[:8]} has other weights on the hub than the adapter was "
            "trained on",
            "Correct source.published_as and source.revision",
        )
