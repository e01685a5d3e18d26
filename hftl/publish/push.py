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
from hftl.publish.checks import may_go
from hftl.publish.http_retry import AnsweredError, UnknownFateError, asking
from hftl.publish.repo_state import StandsError, check_free, check_seen, strange
from hftl.runtime.paths import status_of

TRIES = 3
"""How often a commit is sent that did not land."""
CONFLICT = 409
MOVED = (CONFLICT, 412)
"""The hub's answers to a commit on what no longer is the head."""


@dataclass(frozen=True)
class Target:
    """Where a push goes: a full id, whether it shall be public, whether as a pull request."""

    repo_id: str
    public: bool = False
    request: bool = False


@dataclass(frozen=True)
class Pushed:
    """What stands after a push: the commit, whether it is new, and where it can be seen.

    `replaces` are the files of somebody else's model that a pull request would replace.
    """

    commit: str
    new: bool
    url: str
    private: bool = True
    replaces: tuple[str, ...] = ()


Digests = dict[str, tuple[str, str]]
"""For every file its sha256 and its git hash."""


def push(folder: Path, target: Target, message: str) -> Pushed:
    """Pushes a publish folder; where the same stands already, makes no commit.

    Args:
        folder: exactly what shall stand; gates have been passed.
        target: where.
        message: the commit's.

    Raises:
        HubError: if it could not be pushed; then the old state stands, or what the error says.
    """
    wanted = digests(folder)
    check_card_at_hub((folder / "README.md").read_text(encoding="utf-8"))
    found = look(target)
    info = found or _create(target)
    try:
        pushed = _commit(folder, target, wanted, message)
        _check(target.repo_id, pushed.commit, wanted)
    except StandsError:
        raise
    except HubError as error:
        if found is None and info.private:
            what = f"{error.what}; {target.repo_id} was made and is private"
            raise HubError(what, error.fix) from error
        raise
    private = bool(info.private)
    if target.public and private and not target.request:
        private = _make_public(target.repo_id)
    return replace(pushed, private=private)


def look(target: Target) -> Any:
    """What the hub says of the repository; None where there is none that we may see.

    Raises:
        HubError: if a pull request is asked for, and there is none to open it on.
        StandsError: if what it holds is not ours to replace, or all would see what they should not.
    """
    found = _info(target.repo_id)
    if found is None:
        if target.request:
            raise HubError(
                f"there is no {target.repo_id} to open a pull request on", "Push without --pr"
            )
        return None
    _allowed(target, found, _files(target.repo_id, str(found.sha)))
    return found


def digests(folder: Path) -> Digests:
    """What the hub will call each file of a folder."""
    return {
        path.relative_to(folder).as_posix(): _digests(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stands(found: dict[str, str], wanted: Digests) -> bool:
    """Whether a commit holds these files, and of those that hftl publishes no others.

    Args:
        found: for every file at the hub its sha256 if it is a large one, else its git hash.
        wanted: the files that shall stand.
    """
    ours = {name for name in found if may_go(name)}
    return ours <= wanted.keys() and all(found.get(n) in both for n, both in wanted.items())


def check_card_at_hub(text: str) -> None:
    """Ask the hub whether it takes a card; nothing is written there.

    Raises:
        HubError: if it does not.
    """
    from huggingface_hub import ModelCard

    with asking("checking the card"):
        try:
            ModelCard(text).validate()
        except ValueError as error:
            raise HubError(
                f"the hub refuses the card: {_messages(str(error))}", "Report this with log.txt"
            ) from error


def _info(repo_id: str) -> Any:
    """What the hub says of a repository; None where there is none that we may see."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with asking(f"reading {repo_id}"):
        try:
            return _api().model_info(repo_id)
        except RepositoryNotFoundError:
            return None


def _create(target: Target) -> Any:
    """Make a repository, private; one that is there by now is taken, and looked at later.

    An unanswered request may have made it, or somebody else.

    Raises:
        HubError: if the hub makes it public nevertheless, and all would see what they should not.
    """
    from huggingface_hub.errors import HfHubHTTPError

    made = True
    with asking(f"making {target.repo_id}"):
        try:
            _api().create_repo(target.repo_id, private=True)
        except HfHubHTTPError as error:
            if status_of(error) != CONFLICT:
                raise
            made = False
        info = _api().model_info(target.repo_id)
    if made and not (info.private or target.public):
        raise StandsError(
            f"the hub was asked for a private {target.repo_id} and made it public",
            "Nothing was pushed. Make it private there, or let all see it with --public",
        )
    return info


def _make_public(repo_id: str) -> bool:
    with asking(f"the commit stands; making {repo_id} public"):
        _api().update_repo_settings(repo_id, private=False)
    return False


def _allowed(target: Target, info: Any, files: Collection[str]) -> None:
    """Sees whether what stands lets the push in; a pull request replaces nothing by itself."""
    if not target.request:
        check_free(target.repo_id, files)
    if not (info.private or target.public):
        check_seen(target.repo_id, files)


def _commit(folder: Path, target: Target, wanted: Digests, message: str) -> Pushed:
    """The commit that holds the files, which may stand already."""
    sent_on: str | None = None
    lost: HubError | None = None
    for attempt in range(TRIES + 1):
        info = _seen(target.repo_id)
        head = str(info.sha)
        files = _files(target.repo_id, head)
        landed = head if stands(files, wanted) else _requested(target, wanted)
        if landed is not None:
            return Pushed(landed, lost is not None, _page(target.repo_id, landed))
        if attempt == TRIES:
            break
        if isinstance(lost, AnsweredError) or sent_on not in (None, head):
            raise _moved(target.repo_id) from lost
        sent_on = head
        _allowed(target, info, files)
        stale = sorted(name for name in files if may_go(name) and name not in wanted)
        try:
            sent = _send(target, message, head, _operations(folder, wanted, stale))
            return replace(sent, replaces=tuple(strange(files)))
        except UnknownFateError as error:
            lost = error
            time.sleep(http_retry.FIRST_WAIT * 2**attempt)
        except AnsweredError as error:
            if error.status not in MOVED:
                raise
            lost = error
    assert lost is not None
    raise HubError(f"{lost.what}, and the commit did not land", "Try again later") from lost


def _operations(folder: Path, wanted: Digests, stale: list[str]) -> list[Any]:
    """The files, and the deletion of what an older push has left over."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    adds = [CommitOperationAdd(name, str(folder / name)) for name in wanted]
    return [*adds, *map(CommitOperationDelete, stale)]


def _send(target: Target, message: str, head: str, operations: list[Any]) -> Pushed:
    """Sends the commit once."""
    with asking(f"committing to {target.repo_id}"):
        told = _api().create_commit(
            target.repo_id,
            operations,
            commit_message=message,
            parent_commit=head,
            create_pr=target.request,
        )
        return Pushed(told.oid, True, told.pr_url or told.commit_url)


def _requested(target: Target, wanted: Digests) -> str | None:
    """The head of an open pull request that holds the files, where one is asked for."""
    if not target.request:
        return None
    with asking(f"reading the pull requests of {target.repo_id}"):
        refs = _api().list_repo_refs(target.repo_id, include_pull_requests=True)
        heads = [ref.target_commit for ref in refs.pull_requests or []]
    return next((h for h in heads if stands(_files(target.repo_id, h), wanted)), None)


def _seen(repo_id: str) -> Any:
    with asking(f"reading {repo_id}"):
        return _api().model_info(repo_id)


def _files(repo_id: str, commit: str) -> dict[str, str]:
    """Every file of a commit: the sha256 of a large one, the git hash of another."""
    with asking(f"reading {repo_id} at {commit[:8]}"):
        tree = _api().list_repo_tree(repo_id, recursive=True, revision=commit)
        return {
            item.path: item.lfs.sha256 if item.lfs else item.blob_id
            for item in tree
            if hasattr(item, "blob_id")
        }


def _check(repo_id: str, commit: str, wanted: Digests) -> None:
    """Compares what the hub has with what was sent."""
    if not stands(_files(repo_id, commit), wanted):
        raise HubError(
            f"{repo_id} at {commit[:8]} does not hold what was sent", "Look at it, and push again"
        )


def _messages(told: str) -> str:
    """What the hub says of a card, in words."""
    try:
        return "; ".join(error["message"] for error in json.loads(told)["errors"])
    except (ValueError, KeyError, TypeError):
        return told


def _moved(repo_id: str) -> HubError:
    return HubError(
        f"somebody else has committed to {repo_id} meanwhile, and nothing was pushed",
        "Look at what they did, then push again",
    )


def _page(repo_id: str, commit: str) -> str:
    return f"{_api().endpoint}/{repo_id}/commit/{commit}"


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def _digests(path: Path) -> tuple[str, str]:
    """sha256 and git's hash of a file, which is read once."""
    plain, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            plain.update(piece)
            git.update(piece)
    return plain.hexdigest(), git.hexdigest()
