"""Push a folder as one commit, so that every commit holds weights, config and card of one run."""

import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from hftl.errors import HubError
from hftl.measure.record import PUBLISHED_FILE
from hftl.publish import http_retry
from hftl.publish.checks import is_publishable
from hftl.publish.http_retry import HubResponseError, UnknownOutcomeError, wrap_hub_errors
from hftl.publish.settings_files import CARD_FILE
from hftl.runtime.paths import get_http_status
from hftl.runtime.run_folder import hash_file

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

MAX_ATTEMPTS = 3
"""How often a commit is sent that does not land."""
CONFLICT = 409
HEAD_MOVED_STATUSES = (CONFLICT, 412)
"""The hub's responses to a commit whose parent is no longer the head."""


@dataclass(frozen=True)
class PushTarget:
    """Describe where a push goes: the full id, the visibility, whether as a pull request."""

    repo_id: str
    public: bool = False
    pull_request: bool = False


@dataclass(frozen=True)
class PushResult:
    """Describe what a push left at the hub: the commit, whether it is new, and its page."""

    commit: str
    is_new: bool
    url: str
    private: bool = True
    replaces: tuple[str, ...] = ()
    """Files of somebody else's model that a pull request would replace."""


MAX_GIT_BYTES = 50_000_000
"""The hub stores larger files in LFS, where their sha256 counts."""
FileDigests = dict[str, tuple[str, ...]]
"""The sha256 and the git hash of every file; of a large one the sha256 alone."""


class RepoStateError(HubError):
    """Forbid a push by what the repository holds; a retry cannot help."""


def push_folder(folder: Path, target: PushTarget, message: str) -> PushResult:
    """Push a publish folder; make no commit where the hub holds the same already.

    Args:
        folder: exactly the files to publish; all checks have passed.
        target: where it goes.
        message: the commit's.

    Raises:
        HubError: if the push failed; the hub then holds its old state, or what the error says.
    """
    digests = compute_digests(folder)
    validate_card_on_hub((folder / CARD_FILE).read_text(encoding="utf-8"))
    before = inspect_target(target)
    info = before or _create_repo(target)
    try:
        result = _commit_files(folder, target, digests, message)
        _verify_commit(target.repo_id, result.commit, digests)
    except RepoStateError:
        raise
    except HubError as error:
        if before is None and info.private:
            what = f"{error.what}; {target.repo_id} was made and is private"
            raise HubError(what, error.fix) from error
        raise
    private = bool(info.private)
    if target.public and private and not target.pull_request:
        private = _make_public(target.repo_id)
    return replace(result, private=private)


def inspect_target(target: PushTarget) -> "ModelInfo | None":
    """Return what the hub says of the repository; None where there is none that we may see.

    Raises:
        HubError: if a pull request is asked for, and there is no repository to open it on.
        RepoStateError: if the repository holds somebody else's model, or is public unasked.
    """
    info = _find_repo(target.repo_id)
    if info is None:
        if target.pull_request:
            raise HubError(
                f"there is no {target.repo_id} to open a pull request on", "Push without --pr"
            )
        return None
    _check_push_allowed(target, info, _list_hashes(target.repo_id, str(info.sha)))
    return info


def compute_digests(folder: Path) -> FileDigests:
    """Return the digests under which the hub may list each file of a folder."""
    return {
        path.relative_to(folder).as_posix(): _compute_file_digests(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _compute_file_digests(path: Path) -> tuple[str, ...]:
    from huggingface_hub.utils.sha import git_hash

    is_small = path.stat().st_size <= MAX_GIT_BYTES
    return (hash_file(path), *([git_hash(path.read_bytes())] if is_small else []))


def holds_files(hashes: dict[str, str], digests: FileDigests) -> bool:
    """Return whether a commit holds these files, and no other file that hftl publishes.

    Args:
        hashes: of every file at the hub its sha256 if it is in LFS, else its git hash.
        digests: of the files to publish.
    """
    published = {name for name in hashes if is_publishable(name)}
    return published <= digests.keys() and all(
        hashes.get(name) in both for name, both in digests.items()
    )


def list_foreign_files(files: Collection[str]) -> list[str]:
    """Return the files that a push would replace or delete, where hftl has pushed none of them."""
    if PUBLISHED_FILE in files:
        return []
    # The hub's own page may have created the card.
    return sorted(name for name in files if is_publishable(name) and name != CARD_FILE)


def check_replaceable(repo_id: str, files: Collection[str]) -> None:
    """Refuse to push over a model that hftl did not publish.

    Args:
        repo_id: where the push goes.
        files: those of its last commit.

    Raises:
        RepoStateError: naming the files.
    """
    foreign = list_foreign_files(files)
    if foreign:
        raise RepoStateError(
            f"{repo_id} holds a model that hftl did not publish: {', '.join(foreign)}",
            "Nothing was pushed. Give another --repo-id, or remove it there first",
        )


def check_visibility(repo_id: str, files: Collection[str]) -> None:
    """Refuse a private push to a public repository, unless hftl has pushed there before.

    Args:
        repo_id: where the push goes, which is public already.
        files: those of its last commit.

    Raises:
        RepoStateError: if hftl has not pushed there.
    """
    if PUBLISHED_FILE not in files:
        raise RepoStateError(
            f"{repo_id} is public already, and the push was asked for as a private one",
            "Nothing was pushed. To let all see it: --public, or publish.private: false",
        )


def validate_card_on_hub(text: str) -> None:
    """Ask the hub whether it accepts a card; nothing is written there.

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


def _find_repo(repo_id: str) -> "ModelInfo | None":
    """Return what the hub says of a repository; None where there is none that we may see."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with wrap_hub_errors(f"reading {repo_id}"):
        try:
            return _create_api().model_info(repo_id)
        except RepositoryNotFoundError:
            return None


def _create_repo(target: PushTarget) -> "ModelInfo":
    """Create a private repository; one that exists by now is used, and inspected later.

    An unanswered request may have created it, or somebody else.

    Raises:
        RepoStateError: if the hub makes it public although it should be private.
    """
    from huggingface_hub.errors import HfHubHTTPError

    is_new = True
    with wrap_hub_errors(f"making {target.repo_id}"):
        try:
            _create_api().create_repo(target.repo_id, private=True)
        except HfHubHTTPError as error:
            if get_http_status(error) != CONFLICT:
                raise
            is_new = False
        info = _create_api().model_info(target.repo_id)
    if is_new and not (info.private or target.public):
        raise RepoStateError(
            f"the hub was asked for a private {target.repo_id} and made it public",
            "Nothing was pushed. Make it private there, or let all see it with --public",
        )
    return info


def _make_public(repo_id: str) -> bool:
    with wrap_hub_errors(f"the commit stands; making {repo_id} public"):
        _create_api().update_repo_settings(repo_id, private=False)
    return False


def _check_push_allowed(target: PushTarget, info: "ModelInfo", files: Collection[str]) -> None:
    """Refuse a push that the repository's content forbids; a pull request replaces nothing."""
    if not target.pull_request:
        check_replaceable(target.repo_id, files)
    if not (info.private or target.public):
        check_visibility(target.repo_id, files)


def _commit_files(
    folder: Path, target: PushTarget, digests: FileDigests, message: str
) -> PushResult:
    """Return the commit that holds the files, which may exist already.

    A commit is sent again only where the last one did not land and nobody else has committed.
    """
    parent: str | None = None
    failure: HubError | None = None
    for attempt in range(MAX_ATTEMPTS + 1):
        info = _read_repo(target.repo_id)
        head = str(info.sha)
        files = _list_hashes(target.repo_id, head)
        landed = head if holds_files(files, digests) else _find_open_request(target, digests)
        if landed is not None:
            url = _format_commit_url(target.repo_id, landed)
            return PushResult(landed, failure is not None, url)
        if attempt == MAX_ATTEMPTS:
            break
        if isinstance(failure, HubResponseError) or parent not in (None, head):
            raise _build_moved_error(target.repo_id) from failure
        parent = head
        _check_push_allowed(target, info, files)
        stale = sorted(name for name in files if is_publishable(name) and name not in digests)
        try:
            operations = _build_operations(folder, digests, stale)
            sent = _send_commit(target, message, head, operations)
            return replace(sent, replaces=tuple(list_foreign_files(files)))
        except UnknownOutcomeError as error:
            failure = error
            time.sleep(http_retry.FIRST_WAIT * 2**attempt)
        except HubResponseError as error:
            if error.status not in HEAD_MOVED_STATUSES:
                raise
            failure = error
    assert failure is not None
    what = f"{failure.what}, and the commit did not land"
    raise HubError(what, "Try again later") from failure


def _build_operations(folder: Path, names: Collection[str], stale: list[str]) -> list[Any]:
    """Return the addition of the files, and the deletion of stale ones of an older push."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    adds = [CommitOperationAdd(name, str(folder / name)) for name in names]
    return [*adds, *map(CommitOperationDelete, stale)]


def _send_commit(target: PushTarget, message: str, head: str, operations: list[Any]) -> PushResult:
    """Send the commit once."""
    with wrap_hub_errors(f"committing to {target.repo_id}"):
        commit = _create_api().create_commit(
            target.repo_id,
            operations,
            commit_message=message,
            parent_commit=head,
            create_pr=target.pull_request,
        )
    return PushResult(commit.oid, True, commit.pr_url or commit.commit_url)


def _find_open_request(target: PushTarget, digests: FileDigests) -> str | None:
    """Return the head of a pull request that holds the files, where one is asked for."""
    if not target.pull_request:
        return None
    with wrap_hub_errors(f"reading the pull requests of {target.repo_id}"):
        refs = _create_api().list_repo_refs(target.repo_id, include_pull_requests=True)
    heads = [ref.target_commit for ref in refs.pull_requests or []]
    return next((h for h in heads if holds_files(_list_hashes(target.repo_id, h), digests)), None)


def _read_repo(repo_id: str) -> "ModelInfo":
    with wrap_hub_errors(f"reading {repo_id}"):
        return _create_api().model_info(repo_id)


def _list_hashes(repo_id: str, commit: str) -> dict[str, str]:
    """Return the sha256 of every file of a commit in LFS, and the git hash of every other."""
    with wrap_hub_errors(f"reading {repo_id} at {commit[:8]}"):
        items = list(_create_api().list_repo_tree(repo_id, recursive=True, revision=commit))
    return {
        item.path: item.lfs.sha256 if item.lfs else item.blob_id
        for item in items
        if hasattr(item, "blob_id")
    }


def _verify_commit(repo_id: str, commit: str, digests: FileDigests) -> None:
    """Compare what the hub holds with what was sent."""
    if not holds_files(_list_hashes(repo_id, commit), digests):
        raise HubError(
            f"{repo_id} at {commit[:8]} does not hold what was sent", "Look at it, and push again"
        )


class _CardError(BaseModel):
    """Hold one finding of the hub."""

    message: str


class _CardAnswer(BaseModel):
    """Hold the hub's answer on a card that it refuses."""

    errors: list[_CardError]


def _format_card_errors(answer: str) -> str:
    """Return the messages in the hub's answer on a card; an answer of another shape as it is."""
    try:
        errors = _CardAnswer.model_validate_json(answer).errors
    except ValidationError:
        return answer
    return "; ".join(error.message for error in errors)


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
