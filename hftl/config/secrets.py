"""Find secrets in what is stored or published, and mask them in what is printed."""

import json
import os
import re
from pathlib import Path
from urllib.parse import quote

SECRET_NAME_PATTERN = re.compile(
    r"TOKEN(?!S|IZER)|SECRET|PASSW|API_?KEY|ACCESS_KEY|CREDENTIAL|PRIVATE_KEY", re.IGNORECASE
)
"""Names of environment variables that hold a secret."""
MIN_SECRET_LENGTH = 8
"""Characters; a shorter value is a setting, and would match everywhere."""
SECRET_VALUE_PATTERN = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\bxox[abprs]-[\w-]{10,}|\bsk-[A-Za-z0-9][\w-]{24,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|(?<=://)[^/\s:@\"']+:[^/\s:@\"']+(?=@)"
)
"""Tokens and keys by their form; the last is of `https://user:password@host`."""


def list_secrets() -> dict[str, str]:
    """Return the secrets that this process could leak, by where they come from."""
    secrets = {
        f"the environment's {name}": value
        for name, value in os.environ.items()
        if SECRET_NAME_PATTERN.search(name)
        and len(value) >= MIN_SECRET_LENGTH
        and not value.startswith(("/", "~"))
    }
    token = _read_token_file()
    return secrets | ({"the hub's token": token} if token else {})


def find_secret(text: str) -> str | None:
    """Name the secret that a text holds, without showing it; None where it holds none."""
    for where, value in list_secrets().items():
        if any(form in text for form in _list_encodings(value)):
            return where
    return "what reads as a token or password" if SECRET_VALUE_PATTERN.search(text) else None


def mask_secrets(text: str) -> str:
    """Return the text with `***` instead of every secret."""
    for value in list_secrets().values():
        for form in _list_encodings(value):
            text = text.replace(form, "***")
    return SECRET_VALUE_PATTERN.sub("***", text)


def _list_encodings(value: str) -> set[str]:
    """Return a value as it is, and as it appears in a URL or in JSON."""
    return {value, quote(value, safe=""), json.dumps(value)[1:-1]}


def _read_token_file() -> str | None:
    """Return the token that `hf auth login` has stored; None without one."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{cache}/huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH", f"{home}/token")).expanduser()
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return token if len(token) >= MIN_SECRET_LENGTH else None
