"""Plant every kind of fault in six real data sets, and count which of them are found.

    python benchmarks/faults.py                          # all; minutes on two CPU cores
    python benchmarks/faults.py --only bbc --seconds 180 # one set, and stop after so long

Four sets of texts under MiniLM, two of pictures under a DINOv2-small. Each kind is planted in a few
hundred rows, which are searched without it too: the control. The sets as they are are searched
whole. A fault that rows or declarations show by themselves is sought by the preflight alone.
Results are stored as they end: the same command goes on where it stopped, and --again plants what
is stored once more, against the stored controls.

Results: benchmarks/results/faults.json.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fault_plants import (
    CONTROLS,
    COPIES,
    IMAGE_SETS,
    TEXT_SETS,
    Plant,
    list_kinds,
    plant_fault,
    read_whole,
)

from hftl import Recipe
from hftl.data.prepare import PreparedData
from hftl.pipeline.faults import add_source_faults
from hftl.pipeline.pipeline import open_recipe
from hftl.runtime.run_folder import to_json
from hftl.train.facts import Finding

RESULT = Path(__file__).parent / "results" / "faults.json"
COPIED_KINDS = ("leakage", "near labels")
"""Kinds that are planted by copies of rows; sets have some by themselves."""
NONE = "none"
"""The kind of the sets as they are."""
REAL = {
    "movies": {"leakage"},  # Sentences that differ in a word or two.
    "tweets": {"leakage"},
    "amazon": {"leakage", "groups"},  # Sentences of one review.
    "bbc": {"leakage", "long inputs"},  # The same report in two versions; 332 words.
    "clipart": {"leakage", "near labels"},  # The same drawing in other colours.
    "fashion": {"leakage"},  # The same garment in another shade.
}
"""The faults that the whole sets really have."""
CONSEQUENCES = {
    "label shift": {"missing class"},  # Of the few rows that are left of a rare class.
    "missing class": {"label shift"},
    "label map": {"label shift"},  # Where shares differ, names that are exchanged exchange them.
    "label errors": {"near labels"},  # Of near copies one alone is flipped.
    "near labels": {"leakage"},  # Copies that the split puts into validation.
    "groups": {"leakage"},  # Views of a garment, texts of an author.
    "casing": {"tokenizer"},  # Words in upper case are unknown to it.
}
"""What else is true once a fault of a kind is planted."""


def find_faults(plant: Plant) -> tuple[list[Finding], int]:
    """Return what `hftl check` finds, by the preflight alone where that suffices, and how many of
    the planted copies its pairs hold."""
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
    return facts.findings, count_named_copies(plant, context.prepared)


def count_named_copies(plant: Plant, prepared: PreparedData) -> int:
    """Return how many planted copies are in a pair that the planted kind is about."""
    if plant.copies is None:
        return 0
    table, first = plant.copies
    pairs = [
        pair
        for pair in prepared.near_copies
        if (plant.kind == "leakage") == (pair.split != pair.other_split)
    ]
    rows = {(row.table, row.index) for pair in pairs for row in (pair.row, pair.other)}
    return sum((table, first + number) in rows for number in range(COPIES))


def search(name: str, kind: str, assets: Path, models: Path, is_control: bool) -> dict[str, Any]:
    """Plant a fault in a set, or its control, and return all that is found, in which time."""
    with tempfile.TemporaryDirectory() as folder:
        plant = (
            read_whole(name, assets, models)
            if kind == NONE
            else plant_fault(name, kind, assets, models, Path(folder), is_control)
        )
        started = time.perf_counter()
        findings, named = find_faults(plant)
        seconds = time.perf_counter() - started
    return {
        "set": name, "kind": plant.kind, "findings": findings, "named": named,
        "seconds": round(seconds, 1),
    }  # fmt: skip


def search_control(name: str, rows: str, assets: Path, models: Path) -> dict[str, Any]:
    """Return what is found in the rows that faults are planted in, without any.

    `counts` holds by kind the first number of each finding, such as its rows; the classifier of the
    source is a kind of its own.
    """
    kind = next(kind for kind in list_kinds(name) if CONTROLS[kind] == rows)
    outcome = search(name, kind, assets, models, is_control=True)
    findings: list[Finding] = outcome["findings"]
    return {
        "set": name, "rows": rows, "counts": count_findings(findings),
        "sentences": [f.sentence for f in findings], "seconds": outcome["seconds"],
    }  # fmt: skip


def name_kind(finding: Finding) -> str:
    """Return the kind as it is planted: names of the source's classifier are one of their own."""
    is_own = finding.kind == "label map" and "classifier" in finding.what
    return "own labels" if is_own else finding.kind


def count_findings(findings: Sequence[Finding]) -> dict[str, float]:
    """Return the first number of the findings of each kind, of several the sum; 1 without one."""
    counts: dict[str, float] = {}
    for finding in findings:
        number = re.search(r"\d+(\.\d+)?", finding.what)
        kind = name_kind(finding)
        counts[kind] = counts.get(kind, 0.0) + (float(number[0]) if number else 1.0)
    return counts


def examine(
    name: str, kind: str, assets: Path, models: Path, control: dict[str, Any] | None
) -> dict[str, Any]:
    """Plant a fault in a set, and return whether it was found, with what, and in which time.

    Where the same rows have the kind by themselves it is found if the count grows by half of the
    planted copies at least, and half of them are among the pairs.

    Args:
        name: of the set.
        kind: of the fault; `NONE` searches the set as it is.
        assets: the folder of the texts.
        models: the folder of the pictures and their source.
        control: of the rows, see `search_control`; None for `NONE`.
    """
    result = search(name, kind, assets, models, is_control=False)
    findings: list[Finding] = result["findings"]
    own = [f for f in findings if name_kind(f) == kind]
    counts, before = count_findings(findings), {} if control is None else control["counts"]
    grown = counts.get(kind, 0.0) - before.get(kind, 0.0)
    is_told = kind not in before or min(grown, result["named"]) >= COPIES / 2
    known = REAL[name] if control is None else set(before)
    others = {name_kind(f) for f in findings} - {kind} - known
    consequences = others & CONSEQUENCES.get(kind, set())
    costs = [f.cost for f in own if f.cost is not None]
    return {
        "set": name,
        "kind": kind,
        "found": bool(own) and is_told if kind != NONE else None,
        "confidence": own[0].confidence if own else None,
        "points": round(100 * costs[0], 1) if costs else None,
        "before": before.get(kind),
        "count": counts.get(kind),
        "named": result["named"] if kind in COPIED_KINDS else None,
        "consequences": sorted(consequences),
        "false": sorted(others - consequences),
        "sentences": [f.sentence for f in (findings if kind == NONE else own)],
        "seconds": result["seconds"],
    }


def format_table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return a row a kind and a column a set: the confidence, and the points that it costs.

    Of copies the count without and with the plant, and how many of the planted are named. In
    brackets what else is true of a plant; `false` is what is said besides and is not.
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
    if one["named"] is not None:
        points += f" {one['before'] or 0:.0f} to {one['count']:.0f}, {one['named']} of {COPIES}"
    more = "".join(f" ({kind})" for kind in one["consequences"])
    return f"{one['confidence']}{points}{more}{false}"


def list_controls() -> list[tuple[str, str]]:
    """Return the sets and the rows of them that faults are planted in."""
    names = (*TEXT_SETS, *IMAGE_SETS)
    return [
        (name, rows)
        for name in names
        for rows in dict.fromkeys(CONTROLS[kind] for kind in list_kinds(name))
    ]


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
    into, folders = options.into, (options.assets, options.models or options.assets)
    stored = json.loads(into.read_text()) if into.exists() else {"cells": [], "controls": []}
    started = time.perf_counter()
    for name, kind in list_cells():
        skipped = (options.only and name not in options.only) or (
            options.kinds and kind not in options.kinds
        )
        known = any((one["set"], one["kind"]) == (name, kind) for one in stored["cells"])
        if skipped or (known and not options.again):
            continue
        if time.perf_counter() - started > options.seconds:
            return
        control = None if kind == NONE else find_control(stored, name, CONTROLS[kind], *folders)
        one = examine(name, kind, *folders, control)
        print(name, kind, _format_cell(one), f"{one['seconds']} s", flush=True)
        replace_result(stored["cells"], one, "kind")
        order = [NONE, *list_kinds(TEXT_SETS[0]), *list_kinds(IMAGE_SETS[0])]
        stored["cells"].sort(key=lambda one: (order.index(one["kind"]), one["set"]))
        stored["table"] = format_table(stored["cells"])
        into.write_text(to_json(stored), encoding="utf-8")
    print("\n".join(format_table(stored["cells"])))


def find_control(
    stored: dict[str, Any], name: str, rows: str, assets: Path, models: Path
) -> dict[str, Any]:
    """Return the stored control of a set's rows; search and store it where there is none."""
    for one in stored["controls"]:
        if (one["set"], one["rows"]) == (name, rows):
            return one
    control = search_control(name, rows, assets, models)
    print(
        name, f"{rows} without a fault:", control["counts"], f"{control['seconds']} s", flush=True
    )
    replace_result(stored["controls"], control, "rows")
    return control


def replace_result(results: list[dict[str, Any]], one: dict[str, Any], key: str) -> None:
    """Put a result in the place of the one of the same set and key, or at the end."""
    results[:] = [old for old in results if (old["set"], old[key]) != (one["set"], one[key])]
    results.append(one)


if __name__ == "__main__":
    main()
