"""Store the small hub's repositories with git-like commits, and its large files."""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

LFS = re.compile(r".*\.(safetensors|bin|pt|png)")
LARGE = 10_000_000
FIRST = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
"""The files of a new repository."""


@dataclass(frozen=True)
class Blob:
    """A file: its bytes, or of a large one (`lfs`) what stands in its place, and its size."""

    sha256: str
    size: int
    oid: str
    lfs: bool
    content: bytes | None = None

    def listed(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return entry | ({"lfs": lfs} if self.lfs else {})


def git_oid(content: bytes) -> str:
    """Return the name that git gives a blob of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def regular(content: bytes) -> Blob:
    """A file that stands in git itself."""
    return Blob(hashlib.sha256(content).hexdigest(), len(content), git_oid(content), False, content)


def large(sha256: str, size: int) -> Blob:
    """A file that git holds a pointer to."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Blob(sha256, size, git_oid(pointer.encode()), True)


@dataclass
class Commit:
    parent: str | None
    files: dict[str, Blob]
    title: str


@dataclass
class Repo:
    private: bool = True
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, parent: str | None, files: dict[str, Blob], title: str) -> str:
        tree = sorted((path, blob.oid) for path, blob in files.items())
        sha = hashlib.sha1(repr((parent, tree, title, len(self.commits))).encode()).hexdigest()
        self.commits[sha] = Commit(parent, files, title)
        self.refs[ref] = sha
        return sha

    def find(self, revision: str) -> str | None:
        name = revision.removeprefix("refs/heads/")
        return self.refs.get(name) or (name if name in self.commits else None)


@dataclass
class Store:
    """All that the hub holds."""

    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    by_xet: set[str] = field(default_factory=set)

    def create(self, repo_id: str, private: bool) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        files = {path: regular(content) for path, content in FIRST.items()}
        repo.commit("main", None, files, "initial commit")
        return repo

    def put(self, repo_id: str, files: dict[str, bytes], private: bool) -> str:
        """A commit with these files, for the tests."""
        repo = self.repos.get(repo_id) or self.create(repo_id, private)
        blobs = dict(repo.commits[repo.refs["main"]].files)
        for path, content in files.items():
            blobs[path] = regular(content)
            if LFS.fullmatch(path):
                self.objects[blobs[path].sha256] = content
                blobs[path] = large(blobs[path].sha256, len(content))
        return repo.commit("main", repo.refs["main"], blobs, "put")
