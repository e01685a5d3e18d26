"""Who we are at the hub, and whether that may write where a push goes."""

from typing import Any

from hftl.errors import HubError
from hftl.publish.patience import asking

READERS = ("read", "no_access")
"""Roles in an organisation that write nothing."""


class RightsError(HubError):
    """There is no token, or it may not do what was asked for."""


def account() -> dict[str, Any]:
    """What the hub says of our token, which comes from the environment or `hf auth login`.

    Raises:
        HubError: if there is no token, or the hub does not know it.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise RightsError(
            "pushing needs a token, and there is none",
            "Log in with `hf auth login`, or set HF_TOKEN",
        )
    with asking("asking the hub who we are"):
        return HfApi().whoami()


def full_id(who: dict[str, Any], repo_id: str) -> str:
    """`owner/name`; what has no owner is ours."""
    return repo_id if "/" in repo_id else f"{who['name']}/{repo_id}"


def check_right(who: dict[str, Any], repo_id: str, request: bool = False) -> None:
    """Sees whether the token may push there.

    Args:
        who: what `account` gave.
        repo_id: `owner/name`.
        request: whether a pull request is to be opened, which asks for less.

    Raises:
        HubError: saying what it lacks.
    """
    missing = missing_right(who, repo_id, request)
    if missing is not None:
        raise RightsError(
            f"{repo_id}: {missing}",
            "Use a token that may write there: https://huggingface.co/settings/tokens",
        )


def missing_right(who: dict[str, Any], repo_id: str, request: bool) -> str | None:
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
        return _fine_grained(token.get("fineGrained") or {}, owner, repo_id, request)
    if request or owner == who["name"]:
        return None
    roles = {org["name"]: org.get("roleInOrg") for org in who.get("orgs", [])}
    if owner not in roles:
        return f"{who['name']} is not {owner}, and no member of an organisation of that name"
    if roles[owner] in READERS:
        return f"{who['name']} may only read in the organisation {owner}"
    return None


def _fine_grained(token: dict[str, Any], owner: str, repo_id: str, request: bool) -> str | None:
    """A fine-grained token says what it may do with which owner's or which repository's files."""
    wanted = {"repo.write"} | ({"discussion.write"} if request else set())
    if request and wanted & set(token.get("global") or []):
        return None
    for scope in token.get("scoped") or []:
        named = (scope.get("entity") or {}).get("name")
        if named in (owner, repo_id) and wanted & set(scope.get("permissions") or []):
            return None
    return f"the fine-grained token lacks {' or '.join(sorted(wanted))}"
