"""Hold what a curve and a ranking cost against the passes over the rows that they need.

    python benchmarks/evidence.py zoo --work runs/evidence --budget 60
    python benchmarks/analysis_cost.py assets/movies/movies.csv --zoo runs/evidence/zoo

Goals: a curve of 6 sizes and 5 seeds takes at most 1.25 times one plain pass beyond its solvers,
and ranking 8 sources at most 1.1 times 8 plain passes; a second call passes nothing. A plain pass
extracts the features of the last layer alone, its tokenizer and model loaded anew; it hashes
nothing, and reading the table is not counted. Seconds are the processor's, so other work on the
machine hardly counts. Results: benchmarks/results/analysis_cost.json.
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from evidence_zoo import make_context, make_recipe

from hftl.analysis import feature_store
from hftl.analysis.curve import CurveOptions, compute_curve
from hftl.analysis.feature_store import FeatureStore
from hftl.analysis.rank import rank_sources
from hftl.config.recipe import Recipe
from hftl.models.source import load_tokenizer
from hftl.pipeline.analyses import find_curve_arm
from hftl.pipeline.pipeline import silence_libraries
from hftl.runtime.imports import freeze_imports
from hftl.runtime.run_folder import to_json, write_text

SOURCES = ("minilm", "shuffled", "noisy", "random", "cased", "on-movies", "on-tweets", "on-amazon")
SIZES, DRAWS = (5, 10, 20, 40, 80, 160), 5
CURVE_ROWS, RANK_ROWS = 2000, 1000
"""Texts that are passed; those of a ranking are as many as `hftl rank` reads by default."""
RESULTS = Path(__file__).parent / "results" / "analysis_cost.json"


class PassCounter:
    """Count the rows that encoders run over for a feature store."""

    def __init__(self) -> None:
        self.rows = 0
        compute = feature_store.compute_layer_features

        def count(built: Any, encoded: list[Any], *more: Any) -> Any:
            self.rows += len(encoded)
            return compute(built, encoded, *more)

        feature_store.compute_layer_features = count


def time_call(call: Callable[[], object]) -> float:
    """Return the processor's seconds of a call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def write_rows(table: Path, target: Path, count: int) -> None:
    """Write so many rows of a table, drawn at random."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    random.Random(0).shuffle(rows)
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows[:count])


def time_plain_pass(recipe: Recipe, splits: tuple[str, ...], most: int) -> float:
    """Return the seconds of extracting the features of the last layer, of rows of some splits."""
    context = make_context(recipe)
    rows = [row for split in splits for row in context.prepared.rows[split]][:most]

    def run() -> None:
        load_tokenizer(context.source)
        context.extract_features("mean", 0, rows)

    return time_call(run)


def measure_curve(zoo: Path, table: Path, folder: Path, counter: PassCounter) -> dict[str, float]:
    """Return the seconds of a curve, of the same again, and of a plain pass over its rows."""
    recipe = make_recipe(str(zoo / "minilm"), table, 0.5, None, {}, grouped=False)
    context = make_context(recipe)
    store = FeatureStore(context, folder)

    def make_curve(draws: int, sizes: tuple[int, ...], most: int, store: FeatureStore) -> object:
        find = partial(find_curve_arm, recipe, store)
        return compute_curve(
            recipe, context, store, CurveOptions(sizes, draws, most_rows=most), find
        )

    rows = sum(len(context.prepared.rows[split]) for split in ("train", "test"))
    # The first call imports what it needs, once a command: that is not counted.
    make_curve(2, (2, 4), 60, FeatureStore(context, folder / "few"))
    before = counter.rows
    first = time_call(lambda: make_curve(DRAWS, SIZES, rows, store))
    passed = counter.rows - before
    again = time_call(lambda: make_curve(DRAWS, SIZES, rows, store))
    make_curve(2, (7, *SIZES), rows, store)
    return {
        "rows": rows, "passed": passed, "passed_later": counter.rows - before - passed,
        "first": first, "again": again,
        "plain": time_plain_pass(recipe, ("train", "test"), rows),
    }  # fmt: skip


def measure_rank(
    zoo: Path, table: Path, folder: Path, counter: PassCounter, most: int
) -> dict[str, float]:
    """Return the seconds of ranking eight sources, of the same again, and of eight plain passes."""
    names = [str(zoo / name) for name in SOURCES]
    recipes = [make_recipe(name, table, 0.1, None, {}, grouped=False) for name in names]
    rank_sources(recipes[0], names[:1], folder / "few", 60)
    before = counter.rows
    first = time_call(lambda: rank_sources(recipes[0], names, folder, most))
    passed = counter.rows - before
    again = time_call(lambda: rank_sources(recipes[0], names, folder, most))
    rows = passed // len(names)
    return {
        "rows": rows, "passed": passed, "passed_later": counter.rows - before - passed,
        "first": first, "again": again,
        "plain": sum(time_plain_pass(recipe, ("train",), rows) for recipe in recipes),
    }  # fmt: skip


def format_table(curve: dict[str, float], rank: dict[str, float]) -> list[str]:
    """Return the lines of both measurements."""
    beyond = curve["first"] - curve["again"]
    return [
        f"curve, {len(SIZES)} sizes x {DRAWS} seeds, {curve['rows']} texts: {curve['passed']} rows "
        f"passed, {curve['passed_later']} by more sizes; beyond its solvers {beyond:.1f} s, "
        f"{beyond / curve['plain']:.2f} of a plain pass (goal 1.25), they {curve['again']:.0f} s",
        f"rank, {len(SOURCES)} sources, {rank['rows']} texts: {rank['passed']} rows passed, "
        f"{rank['passed_later']} by a second call; {rank['first']:.1f} s, "
        f"{rank['first'] / rank['plain']:.2f} of as many plain passes (goal 1.10); scores "
        f"{rank['again']:.1f} s",
    ]


def main() -> None:
    """Measure both once."""
    parser = argparse.ArgumentParser(description="Measure the cost of a curve and a ranking.")
    parser.add_argument("table", type=Path)
    parser.add_argument("--zoo", type=Path, default=Path("runs/evidence/zoo"))
    options = parser.parse_args()
    silence_libraries()
    freeze_imports()  # As every command does.
    counter = PassCounter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A tenth is validation; of the ranking's another tenth is test.
        write_rows(options.table, folder / "curve.csv", -(-CURVE_ROWS * 10 // 9))
        write_rows(options.table, folder / "rank.csv", -(-RANK_ROWS * 10 // 8))
        curve = measure_curve(options.zoo, folder / "curve.csv", folder / "a", counter)
        rank = measure_rank(options.zoo, folder / "rank.csv", folder / "b", counter, RANK_ROWS)
    lines = format_table(curve, rank)
    write_text(RESULTS, to_json({"curve": curve, "rank": rank, "table": lines}))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
