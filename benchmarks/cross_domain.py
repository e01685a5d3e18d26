"""Train a probe of the frozen MiniLM on each of four domains, and test it on all four.

    python benchmarks/cross_domain.py --work runs/cross

Sentences of any valence but 0, documents whole, a third of them for test; at most 2 400 rows train.
A cell is the accuracy of the probe, its mean over 100 draws of the rows and its standard deviation,
and the correlation of a ridge regression with the valence: where the boundary lies in another
domain hangs on the rows that were drawn, so one draw is no measure of it. Correlations are of the
first draws, and beside the probe's accuracies there stand those of scikit-learn's logistic
regression on the same rows. The features of a domain are stored as they end, so the same command
goes on where it stopped. Results, those of every draw among them:
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
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hftl.analysis.probe import fit_probe
from hftl.pipeline.pipeline import silence_libraries
from hftl.runtime.run_folder import to_json, write_text

SOURCES = {"tweets": "tweets", "amazon": "amazonReviewSnippets", "movies": "movieReviewSnippets",
           "nyt": "nytEditorialSnippets"}  # fmt: skip
DOCUMENTS = ("amazon", "nyt")
TRAIN_ROWS, DRAWS, PEER_DRAWS = 2400, 100, 12
PENALTY = np.array([0.01])
"""C of the reference, on standardised features."""
REFERENCE = np.array([
    ((0.872, 0.803), (0.736, 0.603), (0.689, 0.539), (0.719, 0.537)),
    ((0.749, 0.678), (0.781, 0.703), (0.680, 0.527), (0.666, 0.462)),
    ((0.737, 0.684), (0.718, 0.581), (0.764, 0.663), (0.669, 0.452)),
    ((0.757, 0.694), (0.741, 0.566), (0.701, 0.542), (0.732, 0.599)),
])  # fmt: skip
"""The same measured with transformers and scikit-learn alone, on one draw that is not known."""
RESULTS = Path(__file__).parent / "results" / "cross_domain.json"
Arrays = dict[str, np.ndarray]


def embed_domain(sdist: Path, work: Path, name: str) -> None:
    """Store the frozen features, classes, valences and documents of a domain's rows."""
    table = work / f"{name}.csv"
    build_sentences(SOURCES[name], sdist, table, document=name in DOCUMENTS,
                    unescape=name == "tweets", weakest=1e-9)  # fmt: skip
    context = make_context(make_recipe(MINILM, table, 1 / 3, None, {}, name in DOCUMENTS))
    rows = [row for split in context.prepared.rows.values() for row in split]
    valences = read_valences(table)
    aside = work / f".tmp-{name}.npz"
    np.savez(
        aside, features=context.extract_features("mean", 0, rows),
        labels=context.prepared.encode_targets(rows),
        valences=[valences[row.content[0]] for row in rows],
        documents=[row.content[0] if row.group is None else str(row.group) for row in rows],
    )  # fmt: skip
    aside.rename(work / f"{name}-rows.npz")


def read_valences(table: Path) -> dict[str, float]:
    """Return the valence of every text."""
    with table.open(encoding="utf-8", newline="") as file:
        return {row["text"]: float(row["valence"]) for row in csv.DictReader(file)}


def draw_rows(domain: Arrays, rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    """Return the rows of train and test: a third of the documents are tested."""
    names, document = np.unique(domain["documents"], return_inverse=True)
    is_held = rng.permutation(len(names))[document] < len(names) // 3
    train = rng.permutation(np.flatnonzero(~is_held))[:TRAIN_ROWS]
    return ({key: values[train] for key, values in domain.items()},
            {key: values[is_held] for key, values in domain.items()})  # fmt: skip


def draw_domains(stored: dict[str, Arrays], seed: int) -> list[tuple[Arrays, Arrays]]:
    """Return train and test of every domain in one draw."""
    rng = np.random.default_rng(seed)
    return [draw_rows(domain, rng) for domain in stored.values()]


def cross_probes(drawn: list[tuple[Arrays, Arrays]]) -> np.ndarray:
    """Return the accuracy of each domain's probe on each domain's test, (4, 4)."""
    cells = np.empty((len(drawn), len(drawn)))
    for i, (own, _) in enumerate(drawn):
        probe = fit_probe(own["features"], own["labels"], 2, own["documents"], PENALTY)
        for j, (_, held) in enumerate(drawn):
            cells[i, j] = (probe.logits(held["features"]).argmax(1) == held["labels"]).mean()
    return cells


def cross_ridges(drawn: list[tuple[Arrays, Arrays]]) -> np.ndarray:
    """Return the correlation of each domain's ridge regression on each domain's test, (4, 4)."""
    cells = np.empty((len(drawn), len(drawn)))
    for i, (own, _) in enumerate(drawn):
        ridge = fit_probe(own["features"], own["valences"], 1, own["documents"])
        for j, (_, held) in enumerate(drawn):
            predicted = ridge.logits(held["features"])[:, 0]
            cells[i, j] = np.corrcoef(predicted, held["valences"])[0, 1]
    return cells


def cross_by_scikit_learn(drawn: list[tuple[Arrays, Arrays]]) -> np.ndarray:
    """Return the accuracies of scikit-learn's logistic regression on the same rows, (4, 4)."""
    cells = np.empty((len(drawn), len(drawn)))
    for i, (own, _) in enumerate(drawn):
        solver = LogisticRegression(C=float(PENALTY[0]), tol=1e-8, max_iter=5000)
        peer = make_pipeline(StandardScaler(), solver)
        # Three columns of the encoder hold rounding, which would be scaled up to features.
        columns = own["features"].std(0) > 1e-6
        peer.fit(own["features"][:, columns].astype(np.float64), own["labels"])
        for j, (_, held) in enumerate(drawn):
            cells[i, j] = peer.score(held["features"][:, columns], held["labels"])
    return cells


def count_within(accuracies: np.ndarray) -> np.ndarray:
    """Return how many of the 16 accuracies lie within 2 points of the reference's, (...,).

    Args:
        accuracies: (..., 4, 4).
    """
    return np.sum(abs(accuracies - REFERENCE[..., 0]) <= 0.02, axis=(-2, -1))


def format_table(accuracies: np.ndarray, correlations: np.ndarray, peers: np.ndarray) -> list[str]:
    """Return the lines of the mean table, and of its differences to the reference.

    Args:
        accuracies: (draws, 4, 4).
        correlations: (fewer draws, 4, 4).
        peers: as many, of scikit-learn's accuracies.
    """
    means, spread = accuracies.mean(0), accuracies.std(0, ddof=1)
    lines = ["train on  " + "".join(f"{name:<22}" for name in SOURCES).rstrip()]
    for i, name in enumerate(SOURCES):
        cells = zip(means[i], spread[i], correlations.mean(0)[i], strict=True)
        row = "".join(f"{accuracy:.3f} sd {sd:.3f} | {r:.3f}  " for accuracy, sd, r in cells)
        lines.append(f"{name:<10}{row.rstrip()}")
    for number, (what, own) in enumerate((("accuracy", accuracies), ("correlation", correlations))):
        apart = abs(own.mean(0) - REFERENCE[..., number])
        lines.append(f"mean {what} apart from the reference: {apart.max():.3f} at most, mean "
                     f"{apart.mean():.3f}, {np.sum(apart <= 0.02)} of 16 within .02")  # fmt: skip
    apart = abs(accuracies[: len(peers)] - peers).max()
    lines.append(f"the probe and scikit-learn differ by {apart:.4f} at most in {len(peers)} draws")
    return [*lines, *describe_draws(accuracies)]


def describe_draws(accuracies: np.ndarray) -> list[str]:
    """Say how far draws lie from each other, and the reference from them."""
    counts, number = count_within(accuracies), len(accuracies)
    apart = abs(accuracies[:, None] - accuracies) <= 0.02
    pairs = apart.sum((2, 3))[np.triu_indices(number, 1)]
    own = [measure_reach(one, np.delete(accuracies, place, 0))
           for place, one in enumerate(accuracies)]  # fmt: skip
    reach = measure_reach(REFERENCE[..., 0], accuracies)
    return [
        f"accuracies within .02 in one draw: {counts.min()} to {counts.max()} of 16 of the "
        f"reference's, median {np.median(counts):.0f}; {pairs.min()} to {pairs.max()} of another "
        f"draw's, median {np.median(pairs):.0f}, all 16 in {np.mean(pairs == 16):.1%} of pairs",
        f"the reference is {reach:.1f} standard deviations of a draw from the mean at most; "
        f"{np.mean(np.array(own) > reach):.0%} of {number} draws are further from the others",
    ]


def measure_reach(one: np.ndarray, others: np.ndarray) -> float:
    """Return the distance of a draw from the mean of others in the cell where it is largest, in
    their standard deviations."""
    return float((abs(one - others.mean(0)) / others.std(0, ddof=1)).max())


def main() -> None:
    """Embed what is not stored, and write the table."""
    parser = argparse.ArgumentParser(description="Cross four domains of sentiment.")
    parser.add_argument("--work", type=Path, default=Path("runs/cross"))
    work = parser.parse_args().work
    silence_libraries()
    work.mkdir(parents=True, exist_ok=True)
    missing = [name for name in SOURCES if not (work / f"{name}-rows.npz").exists()]
    with tempfile.TemporaryDirectory() as folder:
        for name in missing:
            embed_domain(download_package(VADER, Path(folder)), work, name)
    stored = {name: dict(np.load(work / f"{name}-rows.npz")) for name in SOURCES}
    drawn = [draw_domains(stored, seed) for seed in range(PEER_DRAWS)]
    correlations = np.stack([cross_ridges(one) for one in drawn])
    peers = np.stack([cross_by_scikit_learn(one) for one in drawn])
    accuracies = np.stack([cross_probes(draw_domains(stored, seed)) for seed in range(DRAWS)])
    lines = format_table(accuracies, correlations, peers)
    result = {
        "mean": accuracies.mean(0).tolist(), "sd": accuracies.std(0, ddof=1).tolist(),
        "draws": accuracies.tolist(), "correlations": correlations.tolist(),
        "scikit_learn": peers.tolist(), "within": count_within(accuracies).tolist(),
        "table": lines,
    }  # fmt: skip
    write_text(RESULTS, to_json(result))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
