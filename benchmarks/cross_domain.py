"""Train a probe of the frozen MiniLM on each of four domains, and test it on all four.

    python benchmarks/cross_domain.py --work runs/cross

Sentences of any valence but 0, documents whole, a third of them for test; at most 2 400 rows train.
A cell is the accuracy of the probe and the correlation of a ridge regression with the valence. A
domain's features are stored as they end, so the same command goes on where it stopped. Results:
benchmarks/results/cross_domain.json.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np
from asset_package import VADER, download_package
from asset_text import build_sentences
from evidence_zoo import MINILM, make_context, make_recipe

from hftl.analysis.probe import fit_probe
from hftl.pipeline.pipeline import silence_libraries
from hftl.runtime.run_folder import to_json, write_text

SOURCES = {"tweets": "tweets", "amazon": "amazonReviewSnippets", "movies": "movieReviewSnippets",
           "nyt": "nytEditorialSnippets"}  # fmt: skip
DOCUMENTS = ("amazon", "nyt")
TRAIN_ROWS, TEST_ROWS = 2400, 1800
REFERENCE = {
    "tweets": ((0.872, 0.803), (0.736, 0.603), (0.689, 0.539), (0.719, 0.537)),
    "amazon": ((0.749, 0.678), (0.781, 0.703), (0.680, 0.527), (0.666, 0.462)),
    "movies": ((0.737, 0.684), (0.718, 0.581), (0.764, 0.663), (0.669, 0.452)),
    "nyt": ((0.757, 0.694), (0.741, 0.566), (0.701, 0.542), (0.732, 0.599)),
}
"""The same measured with transformers and scikit-learn alone, on another split."""
RESULTS = Path(__file__).parent / "results" / "cross_domain.json"
Table = dict[str, list[tuple[float, float]]]


def embed_domain(sdist: Path, work: Path, name: str) -> None:
    """Store the frozen features, classes and valences of a domain's train and test."""
    table = work / f"{name}.csv"
    build_sentences(SOURCES[name], sdist, table, document=name in DOCUMENTS,
                    unescape=name == "tweets", weakest=1e-9)  # fmt: skip
    recipe = make_recipe(MINILM, table, 1 / 3, None, {}, name in DOCUMENTS)
    context = make_context(recipe)
    valences = read_valences(table)
    arrays = {}
    for split, most in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
        rows = context.prepared.rows[split][:most]
        arrays[f"{split}_features"] = context.extract_features("mean", 0, rows)
        arrays[f"{split}_labels"] = context.prepared.encode_targets(rows)
        arrays[f"{split}_valences"] = np.array([valences[row.content[0]] for row in rows])
    aside = work / f".tmp-{name}.npz"
    np.savez(aside, **arrays)
    aside.rename(work / f"{name}.npz")


def read_valences(table: Path) -> dict[str, float]:
    """Return the valence of every text."""
    with table.open(encoding="utf-8", newline="") as file:
        return {row["text"]: float(row["valence"]) for row in csv.DictReader(file)}


def cross_domains(work: Path) -> Table:
    """Return accuracy and correlation of each domain's probes on each domain's test."""
    stored = {name: np.load(work / f"{name}.npz") for name in SOURCES}
    table: Table = {}
    for name, own in stored.items():
        features = own["train_features"]
        probe = fit_probe(features, own["train_labels"], 2, None)
        ridge = fit_probe(features, own["train_valences"], 1, None)
        table[name] = []
        for held in stored.values():
            hits = probe.logits(held["test_features"]).argmax(1) == held["test_labels"]
            predicted = ridge.logits(held["test_features"])[:, 0]
            correlation = np.corrcoef(predicted, held["test_valences"])[0, 1]
            table[name].append((float(hits.mean()), float(correlation)))
    return table


def format_table(table: Table) -> list[str]:
    """Return the lines of the table, and of its differences to the reference."""
    lines = ["train on  " + "".join(f"{name:<16}" for name in table).rstrip()]
    for name, cells in table.items():
        row = "".join(f"{accuracy:.3f} | {r:.3f}   " for accuracy, r in cells).rstrip()
        lines.append(f"{name:<10}{row}")
    gaps = np.abs(np.array([table[name] for name in table])
                  - np.array([REFERENCE[name] for name in table]))  # fmt: skip
    for number, what in enumerate(("accuracy", "correlation")):
        apart = gaps[:, :, number]
        lines.append(f"apart from the reference in {what}: {apart.max():.3f} at most, mean "
                     f"{apart.mean():.3f}, {np.sum(apart <= 0.02)} of 16 within .02")  # fmt: skip
    return lines


def main() -> None:
    """Measure what is not stored, and write the table."""
    parser = argparse.ArgumentParser(description="Cross four domains of sentiment.")
    parser.add_argument("--work", type=Path, default=Path("runs/cross"))
    work = parser.parse_args().work
    silence_libraries()
    work.mkdir(parents=True, exist_ok=True)
    missing = [name for name in SOURCES if not (work / f"{name}.npz").exists()]
    with tempfile.TemporaryDirectory() as folder:
        for name in missing:
            embed_domain(download_package(VADER, Path(folder)), work, name)
    table = cross_domains(work)
    lines = format_table(table)
    write_text(RESULTS, to_json({"cells": table, "table": lines}))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
