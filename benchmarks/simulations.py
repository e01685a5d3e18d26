"""Run the parts of a simulation that a command names, and store and print what they gave."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Part = Callable[[int], list[dict[str, Any]]]
"""Simulates so many runs in each of its settings; returns a row a setting."""


def run_parts(
    description: str | None, parts: Mapping[str, Part], runs: int, into: Path,
    format_table: Callable[[dict[str, Any]], list[str]],
) -> None:  # fmt: skip
    """Run the parts that the command line names, all without names; those left out stay as stored.

    Args:
        description: of the program.
        parts: by name.
        runs: in each setting, unless the command line says otherwise.
        into: the file of results, which holds a list of rows by part, and the table.
        format_table: makes the table of all parts.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("parts", nargs="*", help=", ".join(parts))
    parser.add_argument("--runs", type=int, default=runs, help=f"in a setting, default: {runs}")
    options = parser.parse_args()
    result = json.loads(into.read_text("utf-8")) if into.exists() else {}
    for part in options.parts or parts:
        result[part] = parts[part](options.runs)
        for row in result[part]:
            print(part, row, flush=True)
        result["table"] = format_table(result)
        into.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print("\n".join(result["table"]))
