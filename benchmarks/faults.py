"""Plant every kind of fault in six real data sets, and count which of them are found.

    python benchmarks/faults.py                          # all; minutes on two CPU cores
    python benchmarks/faults.py --only bbc --seconds 180 # one set, and stop after so long

Four sets of texts under MiniLM, two of pictures under a DINOv2-small. Each kind is planted in a few
hundred rows; the sets as they are are searched whole. A fault that rows or declarations show by
themselves is sought by the preflight alone. Results are stored as they end: the same
command goes on where it stopped, and --again plants what is stored once more.

Results: benchmarks/results/faults.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fault_plants import IMAGE_SETS, TEXT_SETS, Plant, list_kinds, plant_fault, read_whole

from hftl import Recipe
from hftl.pipeline.faults import add_source_faults
from hftl.pipeline.pipeline import open_recipe
from hftl.runtime.run_folder import to_json
from hftl.train.facts import Finding

RESULT = Path(__file__).parent / "results" / "faults.json"
NONE = "none"
"""The kind of the sets as they are."""
REAL = {
    "movies": {"leakage"},  # Sentences that differ in a word or two.
    "tweets": {"leakage"},
    "amazon": {"leakage", "groups"},  # Sentences of one review.
    "bbc": {"leakage", "long inputs"},  # The same report in two versions; 332 words.
    "clipart": {"leakage", "near labels"},  # The same drawing in other colours.
    "fashion": {"leakage", "near labels"},
}
"""The faults that the sets really have."""
CONSEQUENCES = {
    "label shift": {"missing class"},  # Of the few rows that are left of a rare class.
    "missing class": {"label shift"},
    "label map": {"label shift"},  # Where shares differ, names that are exchanged exchange them.
    "label errors": {"near labels"},  # Of near copies one alone is flipped.
    "casing": {"tokenizer"},  # Words in upper case are unknown to it.
}
"""What else is true once a fault of a kind is planted."""


def find_faults(plant: Plant) -> list[Finding]:
    """Return what `hftl check` finds, by the preflight alone where that suffices."""
    recipe = Recipe.parse(
        {
            "source": {"model": plant.source},
            "data": plant.data,
            "finetune": {"pooling": "mean" if plant.is_text else "native"},
            "measure": {"seeds": [0], "arms": []},
        }
    )
    context = open_recipe(recipe)
    facts = context.run_preflight(recipe, recipe.arms)
    if plant.needs_features:
        facts = add_source_faults(recipe, context, facts)
    return facts.findings


def examine(name: str, kind: str, assets: Path, models: Path) -> dict[str, Any]:
    """Plant a fault in a set, and return whether it was found, with what, and in which time."""
    with tempfile.TemporaryDirectory() as folder:
        plant = (
            read_whole(name, assets, models)
            if kind == NONE
            else plant_fault(name, kind, assets, models, Path(folder))
        )
        started = time.perf_counter()
        findings = find_faults(plant)
        seconds = time.perf_counter() - started
    own = [f for f in findings if f.kind == plant.kind]
    own = [f for f in own if ("classifier" in f.what) == (kind == "own labels")]
    others = {f.kind for f in findings} - {plant.kind} - REAL[name]
    consequences = others & CONSEQUENCES.get(kind, set())
    costs = [f.cost for f in own if f.cost is not None]
    return {
        "set": name,
        "kind": kind,
        "found": bool(own) if kind != NONE else None,
        "confidence": own[0].confidence if own else None,
        "points": round(100 * costs[0], 1) if costs else None,
        "consequences": sorted(consequences),
        "false": sorted(others - consequences),
        "sentences": [f.sentence for f in (findings if kind == NONE else own)],
        "seconds": round(seconds, 1),
    }


def format_table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return a row a kind and a column a set: the confidence, and the points that it costs.

    In brackets what else is true of a plant; `false` is what is said besides and is not.
    """
    names = [*TEXT_SETS, *IMAGE_SETS]
    kinds = list(dict.fromkeys(one["kind"] for one in results))
    cells = {(one["kind"], one["set"]): one for one in results}
    rows = [["planted", *names]]
    rows += [[kind, *(_format_cell(cells.get((kind, name))) for name in names)] for kind in kinds]
    whole = [cells.get((NONE, name)) for name in names]
    rows.append(["seconds, whole set", *(f"{one['seconds']:.0f}" if one else "" for one in whole)])
    slowest = [[one["seconds"] for one in results if one["set"] == name] for name in names]
    rows.append(["seconds, slowest", *(f"{max(s):.0f}" if s else "" for s in slowest)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines]


def _format_cell(one: dict[str, Any] | None) -> str:
    if one is None:
        return ""
    false = "".join(f"; false: {kind}" for kind in one["false"])
    if one["kind"] == NONE:
        return f"nothing{false}"
    if not one["found"]:
        return f"missed{false}"
    points = "" if one["points"] is None else f" {one['points']:+.0f}"
    more = "".join(f" ({kind})" for kind in one["consequences"])
    return f"{one['confidence']}{points}{more}{false}"


def list_cells() -> list[tuple[str, str]]:
    """Return the sets and kinds of the whole matrix, the sets as they are among them."""
    names = (*TEXT_SETS, *IMAGE_SETS)
    return [(name, kind) for name in names for kind in (NONE, *list_kinds(name))]


def main() -> None:
    """Plant what is not stored yet, and print the table."""
    parser = argparse.ArgumentParser(description="Plant faults and count which are found.")
    parser.add_argument("--assets", type=Path, default=Path("assets"), help="default: assets/")
    parser.add_argument("--models", type=Path, default=None, help="of the DINOv2; default: assets")
    parser.add_argument("--into", type=Path, default=RESULT, help="results, default: results/")
    parser.add_argument("--only", nargs="*", default=[], help="sets")
    parser.add_argument("--kinds", nargs="*", default=[], help="kinds")
    parser.add_argument("--again", action="store_true", help="what is stored, too")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    options = parser.parse_args()
    into: Path = options.into
    results = json.loads(into.read_text())["cells"] if into.exists() else []
    known = {(one["set"], one["kind"]) for one in results}
    started = time.perf_counter()
    for name, kind in list_cells():
        skipped = (options.only and name not in options.only) or (
            options.kinds and kind not in options.kinds
        )
        if skipped or (not options.again and (name, kind) in known):
            continue
        if time.perf_counter() - started > options.seconds:
            return
        one = examine(name, kind, options.assets, options.models or options.assets)
        print(name, kind, _format_cell(one), f"{one['seconds']} s", flush=True)
        results = [old for old in results if (old["set"], old["kind"]) != (name, kind)]
        results.append(one)
        order = [NONE, *list_kinds(TEXT_SETS[0]), *list_kinds(IMAGE_SETS[0])]
        results.sort(key=lambda one: (order.index(one["kind"]), one["set"]))
        stored = {"cells": results, "table": format_table(results)}
        into.write_text(to_json(stored), encoding="utf-8")
    print("\n".join(format_table(results)))


if __name__ == "__main__":
    main()
