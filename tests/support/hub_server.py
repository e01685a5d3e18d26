"""A small hub on this machine: what `huggingface_hub` asks of a model hub, with git-like commits.

By hand: `python -m tests.support.hub_server --port 8000`, then in another shell
`HF_ENDPOINT=http://127.0.0.1:8000 HF_TOKEN=hf_me_write hftl publish RUN --repo-id me/name`, with
`HF_HUB_DISABLE_XET=1` if it is to be read again: what came by Xet is not handed out. An adapter's
base must stand there first: `hf upload me/base FOLDER .`, and `source.published_as: me/base`.
"""

import argparse
import base64
import hashlib
import json
import re
import tempfile
import time
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.hub_faults import Answer, Door, Handler, Refused, Server, as_json
from tests.support.hub_store import LARGE, LFS, Blob, Commit, Repo, large, regular

TOKENS: dict[str, dict[str, Any]] = {
    "hf_me_write": {"name": "me", "role": "write"},
    "hf_me_read": {"name": "me", "role": "read"},
    "hf_other_write": {"name": "other", "role": "write"},
    "hf_me_fine": {"name": "me", "role": "fineGrained", "writes": ["me/fine", "me/fine-base"]},
    "hf_me_open": {
        "name": "me", "role": "fineGrained", "writes": [], "global": ["discussion.write"],
    },
}  # fmt: skip
ORGS = {"me": {"lab": "write", "club": "read"}, "other": {}}


class Hub(Door):
    """The hub: `answer` is one request."""

    def __init__(self, endpoint: str) -> None:
        super().__init__()
        self.endpoint = endpoint
        self.xet = tempfile.mkdtemp(prefix="hub-xet-")

    # -- who asks

    def who(self, headers: Any) -> dict[str, Any] | None:
        given = (headers.get("Authorization") or "").removeprefix("Bearer ")
        if given and given not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS.get(given)

    def may_write(self, who: dict[str, Any] | None, repo_id: str) -> None:
        if who is None:
            raise Refused(401, "Invalid username or password.")
        owner = repo_id.split("/")[0]
        ours = owner == who["name"] or ORGS[who["name"]].get(owner) == "write"
        fine = who["role"] == "write" or repo_id in who.get("writes", [])
        if not (ours and fine):
            raise Refused(403, f"You don't have the rights to write to {repo_id}")

    def repo(self, repo_id: str, who: dict[str, Any] | None) -> Repo:
        repo = self.store.repos.get(repo_id)
        owner = repo_id.split("/")[0]
        sees = who is not None and (owner == who["name"] or owner in ORGS[who["name"]])
        if repo is None or (repo.private and not sees):
            raise Refused(404 if who else 401, "Repository not found", "RepoNotFound")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> tuple[str, Commit]:
        sha = repo.find(unquote(revision))
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    # -- requests

    def answer(self, method: str, url: str, headers: Any, body: bytes) -> Answer:
        parts = urlsplit(url)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        for verbs, pattern, called in ROUTES:
            match = re.fullmatch(pattern, parts.path)
            if match and method in verbs.split():
                named = {key: unquote(value or "") for key, value in match.groupdict().items()}
                who = None if parts.path.startswith("/lfs/") else self.who(headers)
                return called(self, who, named, query, body)
        raise Refused(404, f"no such page: {method} {parts.path}")

    def whoami(self, who: Any, at: dict[str, str], query: Any, body: bytes) -> Answer:
        if who is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        orgs = [{"name": n, "roleInOrg": role} for n, role in ORGS[who["name"]].items()]
        token: dict[str, Any] = {"displayName": "test", "role": who["role"]}
        if who["role"] == "fineGrained":
            token["fineGrained"] = {
                "global": who.get("global", []),
                "scoped": [{"entity": {"type": "model", "name": n},
                            "permissions": ["repo.content.read", "repo.write"]}
                           for n in who["writes"]],
            }  # fmt: skip
        auth = {"type": "access_token", "accessToken": token}
        return as_json({"type": "user", "name": who["name"], "orgs": orgs, "auth": auth})

    def create(self, who: Any, at: dict[str, str], query: Any, body: bytes) -> Answer:
        request = json.loads(body)
        owner = request.get("organization") or (who or {}).get("name", "")
        repo_id = f"{owner}/{request['name']}"
        self.may_write(who, repo_id)
        url = {"url": f"{self.endpoint}/{repo_id}"}
        if repo_id in self.store.repos:
            return as_json(url | {"error": "You already created this model repo"}, 409)
        self.store.create(repo_id, request.get("visibility") == "private" and not self.shows)
        return as_json(url)

    def delete(self, who: Any, at: dict[str, str], query: Any, body: bytes) -> Answer:
        request = json.loads(body)
        repo_id = f"{request.get('organization') or (who or {}).get('name')}/{request['name']}"
        self.may_write(who, repo_id)
        self.repo(repo_id, who)
        del self.store.repos[repo_id]
        return as_json({})

    def settings(self, who: Any, at: dict[str, str], query: Any, body: bytes) -> Answer:
        repo = self.repo(at["id"], who)
        self.may_write(who, at["id"])
        request = json.loads(body)
        repo.private = request.get("visibility", "private") == "private"
        return as_json({"private": repo.private})

    def validate(self, who: Any, at: dict[str, str], query: Any, body: bytes) -> Answer:
        errors = card_errors(json.loads(body)["content"])
        answer = {"errors": [{"message": message} for message in errors], "warnings": []}
        return as_json(answer, 400 if errors else 200)

    def info(self, who: Any, at: dict[str, str], query: Any, body: bytes) -> Answer:
        repo = self.repo(at["id"], who)
        sha, commit = self.commit_of(repo, at.get("rev") or "main")
        siblings = []
        for path, blob in commit.files.items():
            sibling: dict[str, Any] = {"rfilename": path}
            if query.get("blobs"):
                sibling |= {"size": blob.size, "blobId": blob.oid}
                lfs = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 134}
                sibling |= {"lfs": lfs} if blob.lfs else {}
            siblings.append(sibling)
        return as_json({"_id": at["id"], "id": at["id"], "modelId": at["id"], "sha": sha,
                        "private": repo.private, "gated": "auto" if repo.gated else False,
                        "tags": [], "siblings": siblings})  # fmt: skip

    def tree(self, who: Any, at: dict[str, str], query: Any, body: bytes) -> Answer:
        sha, commit = self.commit_of(self.repo(at["id"], who), at["rev"])
        inside = at["path"].strip("/")
        listed = [blob.listed(path) for path, blob in sorted(commit.files.items())
                 if not inside or path.startswith(f"{inside}/")]  # fmt: skip
        if inside and not listed:
            raise Refused(404, f"{inside} does not exist", "EntryNotFound", sha)
        return as_json(listed)

    def refs(self, who: Any, at: dict[str, str], query: Any, body: bytes) -> Answer:
        repo = self.repo(at["id"], who)
        answer: dict[str, Any] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for name, sha in repo.refs.items():
            is_request = name.startswith("refs/pr/")
            ref = name if is_request else f"refs/heads/{name}"
            answer["pullRequests" if is_request else "branches"].append(
                {"name": name, "ref": ref, "targetCommit": sha}
            )
        return as_json(answer)

    def preupload(self, who: Any, at: dict[str, str], query: Any, body: bytes) -> Answer:
        repo = self.repo(at["id"], who)
        if not query.get("create_pr"):
            self.may_write(who, at["id"])
        _, commit = self.commit_of(repo, at["rev"])
        answer = []
        for file in json.loads(body)["files"]:
            lfs = LFS.fullmatch(file["path"]) or file["size"] > LARGE
            stands = commit.files.get(file["path"])
            oid = stands and (stands.sha256 if stands.lfs else stands.oid)
            answer.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular",
                         "shouldIgnore": False, **({"oid": oid} if oid else {})})  # fmt: skip
        return as_json({"files": answer})

    def batch(self, who: Any, at: dict[str, str], query: Any, body: bytes) -> Answer:
        self.repo(at["id"], who)
        request = json.loads(body)
        if who is None or who["role"] == "read":
            raise Refused(403, "You need write access to upload")
        answer = []
        for item in request["objects"]:
            oid, size = item["oid"], item["size"]
            hrefs = {"upload": {"href": f"{self.endpoint}/lfs/{oid}", "header": {}},
                     "verify": {"href": f"{self.endpoint}/lfs-verify/{oid}"}}  # fmt: skip
            there = oid in self.store.objects
            answer.append({"oid": oid, "size": size, **({} if there else {"actions": hrefs})})
        return as_json({"transfer": "basic", "objects": answer})

    def upload(self, who: Any, at: dict[str, str], query: Any, body: bytes) -> Answer:
        if hashlib.sha256(body).hexdigest() != at["oid"]:
            raise Refused(400, "the content has another hash")
        self.store.objects[at["oid"]] = body
        return 200, {}, b""

    def verify(self, who: Any, at: dict[str, str], query: Any, body: bytes) -> Answer:
        if at["oid"] not in self.store.objects:
            raise Refused(404, "the object was not uploaded")
        return as_json({})

    def xet_token(self, who: Any, at: dict[str, str], query: Any, body: bytes) -> Answer:
        self.repo(at["id"], who)
        if not query.get("create_pr"):
            self.may_write(who, at["id"])
        self.store.by_xet.add(at["id"])
        url, until = f"local://{self.xet}", int(time.time()) + 3600
        answer = {"accessToken": "xet", "exp": until, "casUrl": url}
        return as_json(answer, **{"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet",
                                "X-Xet-Token-Expiration": str(until)})  # fmt: skip

    def commit(self, who: Any, at: dict[str, str], query: Any, body: bytes) -> Answer:
        repo = self.repo(at["id"], who)
        request = bool(query.get("create_pr"))
        if not request:
            self.may_write(who, at["id"])
        head, before = self.commit_of(repo, at["rev"])
        header, *changes = [json.loads(line) for line in body.splitlines() if line]
        parent = header["value"].get("parentCommit")
        if parent and parent != head and not request:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(before.files)
        for change in changes:
            self._apply(at["id"], files, change["key"], change["value"])
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        ref = f"refs/pr/{number}" if request else "main"
        sha = repo.commit(ref, head, files, header["value"]["summary"])
        answer = {"success": True, "commitOid": sha,
                "commitUrl": f"{self.endpoint}/{at['id']}/commit/{sha}"}  # fmt: skip
        if request:
            answer["pullRequestUrl"] = f"{self.endpoint}/{at['id']}/discussions/{number}"
        return as_json(answer)

    def _apply(self, repo_id: str, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = regular(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.store.objects and repo_id not in self.store.by_xet:
                raise Refused(400, f"{path}: the object was not uploaded")
            files[path] = large(value["oid"], value["size"])
        elif key == "deletedFile":
            files.pop(path)
        else:
            for inside in [name for name in files if name.startswith(f"{path}/")]:
                files.pop(inside)

    def resolve(self, who: Any, at: dict[str, str], query: Any, body: bytes) -> Answer:
        repo = self.repo(at["id"], who)
        sha, commit = self.commit_of(repo, at["rev"])
        if repo.gated and who is None:
            raise Refused(401, "Access to this model is restricted", "GatedRepo", sha)
        blob = commit.files.get(at["path"])
        if blob is None:
            raise Refused(404, "Entry not found", "EntryNotFound", sha)
        content = self.store.objects.get(blob.sha256) if blob.lfs else blob.content
        if content is None:
            raise Refused(500, "the content lies in Xet storage")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes",
                   "Content-Type": "application/octet-stream"}  # fmt: skip
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        return 200, headers, content


def card_errors(text: str) -> list[str]:
    """List the faults of a card's front matter, as the hub does."""
    import yaml

    match = re.match(r"^\s*---[\r\n]+([\S\s]*?)[\r\n]+---([\r\n]|$)", text)
    try:
        front = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [f"not YAML: {str(error).splitlines()[0]}"]
    errors = []
    bases = front.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", base):
            errors.append(f'"base_model" with value "{base}" is not valid')
    for model in front.get("model-index") or []:
        for result in model.get("results", []):
            if not {"task", "dataset", "metrics"} <= result.keys():
                errors.append('"model-index[0].results" lacks a key')
    return errors


MODEL = r"/api/models/(?P<id>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", r"/api/whoami-v2", Hub.whoami),
    ("POST", r"/api/repos/create", Hub.create),
    ("DELETE", r"/api/repos/delete", Hub.delete),
    ("POST", r"/api/validate-yaml", Hub.validate),
    ("GET", MODEL, Hub.info),
    ("GET", MODEL + r"/revision/(?P<rev>[^/]+)", Hub.info),
    ("GET", MODEL + r"/tree/(?P<rev>[^/]+)(?P<path>(/.*)?)", Hub.tree),
    ("GET", MODEL + r"/refs", Hub.refs),
    ("PUT", MODEL + r"/settings", Hub.settings),
    ("POST", MODEL + r"/preupload/(?P<rev>[^/]+)", Hub.preupload),
    ("GET", MODEL + r"/xet-write-token/(?P<rev>[^/]+)", Hub.xet_token),
    ("POST", MODEL + r"/commit/(?P<rev>[^/]+)", Hub.commit),
    ("POST", r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Hub.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", Hub.upload),
    ("POST", r"/lfs-verify/(?P<oid>\w+)", Hub.verify),
    ("GET HEAD", r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", Hub.resolve),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: a free one, which is printed")
    server = Server(("127.0.0.1", parser.parse_args().port), Handler)
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    Handler.hub = Hub(endpoint)
    print(endpoint, flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
