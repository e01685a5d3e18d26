"""Which token may push where."""

from typing import Any

import pytest

from hftl.publish.checks import Account, complete_repo_id, find_missing_permission


def token(role: str = "write", **fine: Any) -> dict[str, Any]:
    """What whoami says of `me`, a writer in `lab` and a reader in `club`."""
    told: dict[str, Any] = {"role": role} | ({"fineGrained": fine} if fine else {})
    orgs = [{"name": "lab", "roleInOrg": "contributor"}, {"name": "club", "roleInOrg": "read"}]
    return {"name": "me", "orgs": orgs, "auth": {"accessToken": told}}


def scoped(name: str, *permissions: str) -> dict[str, Any]:
    return {"entity": {"type": "any", "name": name}, "permissions": list(permissions)}


WRITE = "repo.write"
CASES: list[tuple[dict[str, Any], str, bool, str | None]] = [
    (token(), "me/model", False, None),
    (token(), "lab/model", False, None),
    (token(), "club/model", False, "may only read in the organisation club"),
    (token(), "them/model", False, "me is not them"),
    (token(), "them/model", True, None),
    (token("read"), "me/model", False, "read-only"),
    (token("read"), "them/model", True, "read-only"),
    (token("fineGrained", scoped=[scoped("me", WRITE)]), "me/model", False, None),
    (token("fineGrained", scoped=[scoped("me/model", WRITE)]), "me/model", False, None),
    (token("fineGrained", scoped=[scoped("me/model", WRITE)]), "me/model-base", False, WRITE),
    (token("fineGrained", scoped=[scoped("me", "repo.content.read")]), "me/model", False, WRITE),
    (token("fineGrained", scoped=[]), "me/model", False, WRITE),
    (token("fineGrained", scoped=[], **{"global": ["discussion.write"]}), "x/y", True, None),
    (token("fineGrained", scoped=[], **{"global": ["discussion.write"]}), "me/y", False, WRITE),
    (token("fineGrained", scoped=[scoped("x/y", "discussion.write")]), "x/y", True, None),
    # What a hub of one's own may leave out speaks against nobody.
    ({"name": "me"}, "me/model", False, None),
]


@pytest.mark.parametrize(("who", "repo_id", "request_", "missing"), CASES)
def test_what_a_token_lacks(
    who: dict[str, Any], repo_id: str, request_: bool, missing: str | None
) -> None:
    found = find_missing_permission(Account.model_validate(who), repo_id, request_)
    assert (found is None) == (missing is None)
    assert (missing or "") in (found or "")


def test_a_name_without_an_owner_is_ours() -> None:
    assert complete_repo_id(Account.model_validate(token()), "model") == "me/model"
    assert complete_repo_id(Account.model_validate(token()), "lab/model") == "lab/model"
