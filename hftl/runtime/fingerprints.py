"""Write JSON in one canonical form, and hash it."""

import hashlib
import json
import math
from typing import Any


def to_json(tree: Any) -> str:
    """Return sorted, indented JSON; a number that is not finite becomes null."""
    return json.dumps(
        _replace_nonfinite(tree), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False
    ) + "\n"  # fmt: skip


def fingerprint(tree: Any) -> str:
    """Return the sha256 (hex) of the canonical JSON of `tree`."""
    return hashlib.sha256(to_json(tree).encode()).hexdigest()


def _replace_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
