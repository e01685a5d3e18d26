"""What stands at the hub already, and whether a push may go over it."""

from collections.abc import Collection

from hftl.errors import HubError
from hftl.publish.gates import may_go

RECORD = "hftl.json"
"""Stands wherever hftl has pushed to."""
CARD = "README.md"
"""The one file of ours that the hub's own page may have made."""


class StandsError(HubError):
    """What stands there forbids the push as it was asked for; the same again is refused again."""


def strange(files: Collection[str]) -> list[str]:
    """The files that a push would replace or delete, where hftl has pushed none of them."""
    if RECORD in files:
        return []
    return sorted(name for name in files if may_go(name) and name != CARD)


def check_free(repo_id: str, files: Collection[str]) -> None:
    """Refuses to push over a model that hftl did not publish.

    Args:
        repo_id: where the push goes.
        files: what its head holds.

    Raises:
        StandsError: naming its files.
    """
    found = strange(files)
    if found:
        raise StandsError(
            f"{repo_id} holds a model that hftl did not publish: {', '.join(found)}",
            "Nothing was pushed. Give another --repo-id, or remove it there first",
        )


def check_seen(repo_id: str, files: Collection[str]) -> None:
    """Refuses to show to all what shall stay private; where hftl has pushed before, that is known.

    Args:
        repo_id: where the push goes, which is public already.
        files: what its head holds.

    Raises:
        StandsError: if hftl has not pushed there.
    """
    if RECORD not in files:
        raise StandsError(
            f"{repo_id} is public already, and the push was asked for as a private one",
            "Nothing was pushed. To let all see it: --public, or publish.private: false",
        )
