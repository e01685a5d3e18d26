"""What a file would tell of this machine and its user, were it published."""

import getpass
import json
import os
import platform
import re
import struct
import zlib
from pathlib import Path
from typing import Any

from hftl.config import secrets
from hftl.errors import RunFolderError
from hftl.measure.record import Record
from hftl.runtime.paths import PACKAGE_PREFIX, is_written_as_path

LOCAL_PATH = re.compile(
    r"(?:(?<![\w.:/<])|(?<=file://))(?:~|/[\w.-]+)/[\w./-]+|\b[A-Za-z]:[\\/]+\w[^\s\"']*"
)
VOCABULARY_FILES = re.compile(
    r"tokenizer\.json|vocab\.(json|txt)|merges\.txt|added_tokens\.json|.*\.model"
)
"""Files that hold the words of a language, /home/ and names among them."""
GENERIC_NAMES = frozenset(
    """
    admin administrator codespace docker ec2-user host jovyan local localhost nobody root runner
    ubuntu user users vagrant vscode worker
    """.split()
)
"""Names of users and hosts that tell nothing."""
MAX_IGNORED_LENGTH = 3


def find_leak(path: Path, name: str, words: frozenset[str]) -> str | None:
    """The first secret, local path or name of user or host in a file; None where there is none.

    Of weights the header is read, of pictures their texts.

    Args:
        path: the file.
        name: what it is called in the folder.
        words: names that may stand there although they are the user's, a hub account's for one.

    Raises:
        RunFolderError: if weights are no safetensors.
    """
    text = _read_text(path)
    found = secrets.find_secret(text)
    if found is not None:
        return f"a secret: {found}"
    vocabulary = VOCABULARY_FILES.fullmatch(name)
    local = None if vocabulary else LOCAL_PATH.search(text)
    if local:
        return f"a path of this machine: {local.group()}"
    home = str(Path.home())
    if len(home) > MAX_IGNORED_LENGTH and re.search(rf"(?<![\w.-]){re.escape(home)}[/\\]", text):
        return "the home directory"
    if vocabulary:
        return None
    for what, known in _list_personal_names().items():
        for word in sorted(known - words - GENERIC_NAMES):
            if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text):
                return f"{what}: {word}"
    return None


def _list_personal_names() -> dict[str, set[str]]:
    """The names of user and host, the host's also without its domain."""
    user = {os.environ.get(key, "") for key in ("USER", "LOGNAME", "USERNAME")}
    try:
        user.add(getpass.getuser())
    except (OSError, KeyError, ImportError):
        # A process without a name in the user database has none to tell.
        pass
    user.add(Path.home().name)
    host = platform.node()
    found = {"the user's name": user, "this machine's name": {host, host.partition(".")[0]}}
    return {
        what: {n for n in known if len(n) > MAX_IGNORED_LENGTH} for what, known in found.items()
    }


def _read_text(path: Path) -> str:
    """What a file says in words."""
    content = path.read_bytes() if path.suffix != ".safetensors" else _read_safetensors_header(path)
    if path.suffix == ".png":
        content = _read_png_text(content)
    return content.decode("utf-8", errors="replace")


def _read_safetensors_header(path: Path) -> bytes:
    """A safetensors file begins with the length of its header, 8 bytes, then comes that, JSON."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (struct.error, ValueError, OverflowError, MemoryError) as error:
        raise RunFolderError(f"{path} is no safetensors file", "Delete it and run again") from error
    return json.dumps(header, ensure_ascii=False).encode()


def _read_png_text(png: bytes) -> bytes:
    """The text chunks of a PNG, the packed ones unpacked."""
    found, at = b"", 8
    while at + 8 <= len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        if kind in (b"tEXt", b"iTXt", b"eXIf"):
            found += data + b"\n"
        if kind in (b"zTXt", b"iTXt"):
            found += _unpacked(data)
        at += length + 12
    return found


def _unpacked(data: bytes) -> bytes:
    """What follows the first zlib header in a chunk."""
    start = data.find(b"\x78")
    try:
        return zlib.decompress(data[start:]) if start >= 0 else b""
    except zlib.error:
        return b""


# The record as it may leave this machine.


def sanitize_record(record: Record) -> Record:
    """Return the record without places on this machine: a local path becomes its last name."""
    # Through the file's own text, so that its keys are sorted as in a record that was read.
    tree = json.loads(record.to_json())
    # What a bad row says is the user's data, and stays here; the count goes along.
    tree["data"].pop("bad_rows_listed", None)
    tree["recipe"] = recipe = _strip_paths(tree["recipe"])
    if tree["source"]["local"]:
        recipe["source"]["model"] = tree["source"]["model"] = tree["source"]["name"]
    for split in ("train", "validation", "test", "unlabeled", "general"):
        table = recipe["data"][split] or {}
        if "path" in table and split not in tree["data"]["hub_revisions"]:
            table["path"] = strip_parents(table["path"])
    return Record.parse(tree)


def strip_parents(place: str) -> str:
    """A package as it is, a path by its last name."""
    return place if place.startswith(PACKAGE_PREFIX) else Path(place).expanduser().resolve().name


def _strip_paths(value: Any) -> Any:
    """Nested values in which every string that is a path has become its last name."""
    if isinstance(value, dict):
        return {key: _strip_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strip_paths(item) for item in value]
    path = isinstance(value, str) and is_written_as_path(value)
    return strip_parents(value) if path else value
