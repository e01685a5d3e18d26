"""Find what a published file would reveal of this machine and its user, and remove it."""

import getpass
import json
import os
import platform
import re
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
"""Files that hold the words of a language, among them /home/ and names."""
GENERIC_NAMES = frozenset(
    """
    admin administrator codespace docker ec2-user host jovyan local localhost nobody root runner
    ubuntu user users vagrant vscode worker
    """.split()
)
"""Names of users and hosts that reveal nothing."""
MAX_IGNORED_LENGTH = 3
"""Shorter names would be found everywhere."""


def find_leak(path: Path, name: str, words: frozenset[str]) -> str | None:
    """Return the first secret, local path or name of user or host in a file; None without any.

    Of weights the header is read, of images their texts.

    Args:
        path: the file.
        name: its path in the folder.
        words: the user's names that it may contain, such as that of the hub account.

    Raises:
        RunFolderError: if weights are no safetensors.
    """
    text = _read_text(path)
    secret = secrets.find_secret(text)
    if secret is not None:
        return f"a secret: {secret}"
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
    """Return the names of user and host, the host's also without its domain."""
    user = {os.environ.get(key, "") for key in ("USER", "LOGNAME", "USERNAME")}
    try:
        user.add(getpass.getuser())
    except (OSError, KeyError, ImportError):
        # In a container the user id may have no name: KeyError, from Python 3.13 on OSError.
        # Windows has no module to ask: ImportError.
        pass
    user.add(Path.home().name)
    host = platform.node()
    names = {"the user's name": user, "this machine's name": {host, host.partition(".")[0]}}
    return {
        what: {n for n in known if len(n) > MAX_IGNORED_LENGTH} for what, known in names.items()
    }


def _read_text(path: Path) -> str:
    """Return the text in a file."""
    if path.suffix == ".safetensors":
        return _read_safetensors_header(path)
    if path.suffix == ".png":
        return _read_png_text(path)
    return path.read_bytes().decode("utf-8", errors="replace")


def _read_safetensors_header(path: Path) -> str:
    """Return metadata and tensor names as JSON.

    Raises:
        RunFolderError: if the file is no safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = {"metadata": file.metadata(), "tensors": sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise RunFolderError(f"{path} is no safetensors file", "Delete it and run again") from error
    return json.dumps(header, ensure_ascii=False)


def _read_png_text(path: Path) -> str:
    """Return the texts of a PNG, unpacked; of a damaged one all bytes."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()  # texts may follow the pixels
            texts = [*image.info.items(), *dict(image.getexif()).items()]
    except (OSError, SyntaxError, ValueError):
        # Pillow: OSError for a file that is cut short, SyntaxError for a damaged chunk, ValueError
        # for a text that unpacks to too much.
        return path.read_bytes().decode("utf-8", errors="replace")
    return "\n".join(f"{key}: {_decode_text(value)}" for key, value in texts)


def _decode_text(value: Any) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def sanitize_record(record: Record) -> Record:
    """Return the record without places on this machine: a local path becomes its last name."""
    # Through the file's own text, so that its keys are sorted as in a record that was read.
    tree = json.loads(record.to_json())
    # What a bad row says is the user's data, and stays here; the count goes along.
    tree["data"].pop("bad_rows_listed", None)
    for finding in tree["check"].get("findings", []):
        finding.pop("where", None)
    tree["recipe"] = recipe = _strip_paths(tree["recipe"])
    if tree["source"]["local"]:
        recipe["source"]["model"] = tree["source"]["model"] = tree["source"]["name"]
    for part in (tree.get("analysis") or {}).values():
        part["source"] = tree["source"]["name"]
    for split in ("train", "validation", "test", "unlabeled", "general"):
        table = recipe["data"][split] or {}
        if "path" in table and split not in tree["data"]["hub_revisions"]:
            table["path"] = strip_parents(table["path"])
    return Record.parse(tree)


def strip_parents(place: str) -> str:
    """Return a package as it is, a path by its last part."""
    return place if place.startswith(PACKAGE_PREFIX) else Path(place).expanduser().resolve().name


def _strip_paths(value: Any) -> Any:
    """Return nested values in which every string that is a path is replaced by its last part."""
    if isinstance(value, dict):
        return {key: _strip_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strip_paths(item) for item in value]
    path = isinstance(value, str) and is_written_as_path(value)
    return strip_parents(value) if path else value
