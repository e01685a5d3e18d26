"""The push of one folder: one commit on what stands, so that a reader never sees a half.

A reader of the repository at any commit gets weights, config and card of one and the same run.
"""

import hashlib
import json
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hftl.errors import HubError
from hftl.publish import http_retry
from hftl.publish.checks import is_publishable
from hftl.publish.http_retry import HubResponseError, UnknownOutcomeError, wrap_hub_errors
from hftl.publish.repo_state import (
    RepoStateError,
    check_replaceable,
    check_visibility,
    list_foreign_files,
)
from hftl.runtime.paths import get_http_status

MAX_ATTEMPTS = 3
"""How often a commit is sent that did not land."""
CONFLICT = 409
HEAD_MOVED_STATUSES = (CONFLICT, 412)
"""The hub's answers to a commit on what no longer is the head."""


@dataclass(frozen=True)
class PushTarget:
    """Where a push goes: a full id, whether it shall be public, whether as a pull request."""

    repo_id: str
    public: bool = False
    pull_request: bool = False


@dataclass(frozen=True)
class PushResult:
    """What stands after a push: the commit, whether it is new, and where it can be seen.

    `replaces` are the files of somebody else's model that a pull request would replace.
    """

    commit: str
    is_new: bool
    url: str
    private: bool = True
    replaces: tuple[str, ...] = ()


FileDigests = dict[str, tuple[str, str]]
"""For every file its sha256 and its git hash."""


def push_folder(folder: Path, target: PushTarget, message: str) -> PushResult:
    """Pushes a publish folder; where the same stands already, makes no commit.

    Args:
        folder: exactly what shall stand; gates have been passed.
        target: where.
        message: the commit's.

    Raises:
        HubError: if it could not be pushed; then the old state stands, or what the error says.
    """
    wanted = compute_digests(folder)
    validate_card_on_hub((folder / "README.md").read_text(encoding="utf-8"))
    found = inspect_target(target)
    info = found or _create_repo(target)
    try:
        pushed = _commit_files(folder, target, wanted, message)
        _verify_commit(target.repo_id, pushed.commit, wanted)
    except RepoStateError:
        raise
    except HubError as error:
        if found is None and info.private:
            what = f"{error.what}; {target.repo_id} was made and is private"
            raise HubError(what, error.fix) from error
        raise
    private = bool(info.private)
    if target.public and private and not target.pull_request:
        private = _make_public(target.repo_id)
    return replace(pushed, private=private)


def inspect_target(target: PushTarget) -> Any:
    """What the hub says of the repository; None where there is none that we may see.

    Raises:
        HubError: if a pull request is asked for, and there is none to open it on.
        StandsError: if what it holds is not ours to replace, or all would see what they should not.
    """
    found = _find_repo(target.repo_id)
    if found is None:
        if target.pull_request:
            raise HubError(
                f"there is no {target.repo_id} to open a pull request on", "Push without --pr"
            )
        return None
    _check_push_allowed(target, found, _list_hashes(target.repo_id, str(found.sha)))
    return found


def compute_digests(folder: Path) -> FileDigests:
    """What the hub will call each file of a folder."""
    return {
        path.relative_to(folder).as_posix(): _hash_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def holds_files(found: dict[str, str], wanted: FileDigests) -> bool:
    """Whether a commit holds these files, and of those that hftl publishes no others.

    Args:
        found: for every file at the hub its sha256 if it is a large one, else its git hash.
        wanted: the files that shall stand.
    """
    ours = {name for name in found if is_publishable(name)}
    return ours <= wanted.keys() and all(found.get(n) in both for n, both in wanted.items())


def validate_card_on_hub(text: str) -> None:
    """Ask the hub whether it takes a card; nothing is written there.

    Raises:
        HubError: if it does not.
    """
    from huggingface_hub import ModelCard

    with wrap_hub_errors("checking the card"):
        try:
            ModelCard(text).validate()
        except ValueError as error:
            raise HubError(
                f"the hub refuses the card: {_format_card_errors(str(error))}",
                "Report this with log.txt",
            ) from error


def _find_repo(repo_id: str) -> Any:
    """What the hub says of a repository; None where there is none that we may see."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with wrap_hub_errors(f"reading {repo_id}"):
        try:
            return _create_api().model_info(repo_id)
        except RepositoryNotFoundError:
            return None


def _create_repo(target: PushTarget) -> Any:
    """Make a repository, private; one that is there by now is taken, and looked at later.

    An unanswered request may have made it, or somebody else.

    Raises:
        HubError: if the hub makes it public nevertheless, and all would see what they should not.
    """
    from huggingface_hub.errors import HfHubHTTPError

    made = True
    with wrap_hub_errors(f"making {target.repo_id}"):
        try:
            _create_api().create_repo(target.repo_id, private=True)
        except HfHubHTTPError as error:
            if get_http_status(error) != CONFLICT:
                raise
            made = False
        info = _create_api().model_info(target.repo_id)
    if made and not (info.private or target.public):
        raise RepoStateError(
            f"the hub was asked for a private {target.repo_id} and made it public",
            "Nothing was pushed. Make it private there, or let all see it with --public",
        )
    return info


def _make_public(repo_id: str) -> bool:
    with wrap_hub_errors(f"the commit stands; making {repo_id} public"):
        _create_api().update_repo_settings(repo_id, private=False)
    return False


def _check_push_allowed(target: PushTarget, info: Any, files: Collection[str]) -> None:
    """Sees whether what stands lets the push in; a pull request replaces nothing by itself."""
    if not target.pull_request:
        check_replaceable(target.repo_id, files)
    if not (info.private or target.public):
        check_visibility(target.repo_id, files)


def _commit_files(
    folder: Path, target: PushTarget, wanted: FileDigests, message: str
) -> PushResult:
    """The commit that holds the files, which may stand already."""
    sent_on: str | None = None
    lost: HubError | None = None
    for attempt in range(MAX_ATTEMPTS + 1):
        info = _read_repo(target.repo_id)
        head = str(info.sha)
        files = _list_hashes(target.repo_id, head)
        landed = head if holds_files(files, wanted) else _find_open_request(target, wanted)
        if landed is not None:
            return PushResult(landed, lost is not None, _format_commit_url(target.repo_id, landed))
        if attempt == MAX_ATTEMPTS:
            break
        if isinstance(lost, HubResponseError) or sent_on not in (None, head):
            raise _build_moved_error(target.repo_id) from lost
        sent_on = head
        _check_push_allowed(target, info, files)
        stale = sorted(name for name in files if is_publishable(name) and name not in wanted)
        try:
            sent = _send_commit(target, message, head, _build_operations(folder, wanted, stale))
            return replace(sent, replaces=tuple(list_foreign_files(files)))
        except UnknownOutcomeError as error:
            lost = error
            time.sleep(http_retry.FIRST_WAIT * 2**attempt)
        except HubResponseError as error:
            if error.status not in HEAD_MOVED_STATUSES:
                raise
            lost = error
    assert lost is not None
    raise HubError(f"{lost.what}, and the commit did not land", "Try again later") from lost


def _build_operations(folder: Path, wanted: FileDigests, stale: list[str]) -> list[Any]:
    """The files, and the deletion of what an older push has left over."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    adds = [CommitOperationAdd(name, str(folder / name)) for name in wanted]
    return [*adds, *map(CommitOperationDelete, stale)]


def _send_commit(target: PushTarget, message: str, head: str, operations: list[Any]) -> PushResult:
    """Sends the commit once."""
    with wrap_hub_errors(f"committing to {target.repo_id}"):
        told = _create_api().create_commit(
            target.repo_id,
            operations,
            commit_message=message,
            parent_commit=head,
            create_pr=target.pull_request,
        )
        return PushResult(told.oid, True, told.pr_url or told.commit_url)


def _find_open_request(target: PushTarget, wanted: FileDigests) -> str | None:
    """The head of an open pull request that holds the files, where one is asked for."""
    if not target.pull_request:
        return None
    with wrap_hub_errors(f"reading the pull requests of {target.repo_id}"):
        refs = _create_api().list_repo_refs(target.repo_id, include_pull_requests=True)
        heads = [ref.target_commit for ref in refs.pull_requests or []]
    return next((h for h in heads if holds_files(_list_hashes(target.repo_id, h), wanted)), None)


def _read_repo(repo_id: str) -> Any:
    with wrap_hub_errors(f"reading {repo_id}"):
        return _create_api().model_info(repo_id)


def _list_hashes(repo_id: str, commit: str) -> dict[str, str]:
    """Every file of a commit: the sha256 of a large one, the git hash of another."""
    with wrap_hub_errors(f"reading {repo_id} at {commit[:8]}"):
        tree = _create_api().list_repo_tree(repo_id, recursive=True, revision=commit)
        return {
            item.path: item.lfs.sha256 if item.lfs else item.blob_id
            for item in tree
            if hasattr(item, "blob_id")
        }


def _verify_commit(repo_id: str, commit: str, wanted: FileDigests) -> None:
    """Compares what the hub has with what was sent."""
    if not holds_files(_list_hashes(repo_id, commit), wanted):
        raise HubError(
            f"{repo_id} at {commit[:8]} does not hold what was sent", "Look at it, and push again"
        )


def _format_card_errors(told: str) -> str:
    """What the hub says of a card, in words."""
    try:
        return "; ".join(error["message"] for error in json.loads(told)["errors"])
    except (ValueError, KeyError, TypeError):
        return told


def _build_moved_error(repo_id: str) -> HubError:
    return HubError(
        f"somebody else has committed to {repo_id} meanwhile, and nothing was pushed",
        "Look at what they did, then push again",
    )


def _format_commit_url(repo_id: str, commit: str) -> str:
    return f"{_create_api().endpoint}/{repo_id}/commit/{commit}"


def _create_api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def _hash_file(path: Path) -> tuple[str, str]:
    """sha256 and git's hash of a file, which is read once."""
    plain, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            plain.update(piece)
            git.update(piece)
    return plain.hexdigest(), git.hexdigest()
