"""Check distances of domains against closed forms written anew, and on samples of known truth."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import make_image_recipe, pictures, sentences, write_csv
from scipy.linalg import sqrtm
from scipy.spatial.distance import jensenshannon, pdist
from scipy.stats import kstest, norm, t
from sklearn.metrics.pairwise import rbf_kernel
from support.command import Hftl
from support.coverage import is_covered
from test_feature_store import forwards

from hftl.analysis import distance
from hftl.analysis.distance import (
    classify_domains,
    compute_frechet,
    compute_mmd,
    compute_shared_variance,
    extrapolate_frechet,
)
from hftl.analysis.domains import compare_domains, find_size_fault, refuse_too_few
from hftl.analysis.facts import DistanceAnalysis
from hftl.analysis.out_of_fold import fit_folds
from hftl.analysis.probe import Probe
from hftl.analysis.word_distance import compute_word_divergence, compute_word_overlap
from hftl.data.rows import Row
from hftl.errors import DataError

pytestmark = pytest.mark.usefixtures("fast_reload")

__all__ = ["forwards"]


def draw(rows: int, width: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    features = np.random.default_rng(seed).normal(size=(rows, width)) * scale
    features[:, 0] += shift
    return features


@pytest.mark.parametrize(("rows", "width"), [(60, 5), (12, 30)])
def test_frechet_is_the_bures_wasserstein_distance(rows: int, width: int) -> None:
    first, second = draw(rows, width, 0), draw(rows, width, 1, 2.0, 1.5)
    a, b = np.cov(first.T), np.cov(second.T)
    gap = first.mean(0) - second.mean(0)
    if rows > width:
        expected = gap @ gap + np.trace(a + b - 2 * sqrtm(a @ b)).real
        assert compute_frechet(first, second) == pytest.approx(expected, abs=1e-6)
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    middle = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b @ root), 0)).sum()
    expected = gap @ gap + np.trace(a) + np.trace(b) - 2 * middle
    assert compute_frechet(first, second) == pytest.approx(expected, abs=1e-6)
    assert compute_frechet(first, first) == pytest.approx(0, abs=1e-8)


def test_extrapolation_takes_the_bias_of_few_rows_away() -> None:
    plain = [compute_frechet(draw(200, 40, s), draw(200, 40, 50 + s)) for s in range(6)]
    corrected = [extrapolate_frechet(draw(200, 40, s), draw(200, 40, 50 + s)) for s in range(6)]
    assert np.mean(plain) > 3.5
    assert abs(np.mean([d.value for d in corrected])) < 0.5
    shifted = extrapolate_frechet(draw(400, 10, 0), draw(400, 10, 1, shift=3.0))
    assert shifted.low < 9.0 < shifted.high


def estimate_mmd_by_loops(first: np.ndarray, second: np.ndarray) -> float:
    pooled = [*first, *second]
    distances = sorted(
        math.dist(pooled[i], pooled[j]) for i in range(len(pooled)) for j in range(i)
    )
    median = float(np.median(distances))

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return math.exp(-(math.dist(x, y) ** 2) / (2 * median**2))

    def mean_within(side: np.ndarray) -> float:
        n = len(side)
        pairs = [kernel(side[i], side[j]) for i in range(n) for j in range(n) if i != j]
        return sum(pairs) / (n * (n - 1))

    cross = np.mean([kernel(x, y) for x in first for y in second])
    return mean_within(first) + mean_within(second) - 2 * float(cross)


def test_mmd_is_the_sum_over_pairs() -> None:
    first, second = draw(20, 3, 0), draw(20, 3, 1, 1.0)
    expected = estimate_mmd_by_loops(first, second)
    # The median of the squares is the square of the median but for an even number of pairs.
    assert compute_mmd(first, second, 9).distance.value == pytest.approx(expected, rel=1e-3)


def test_mmd_is_that_of_scikit_learns_kernel() -> None:
    first, second = draw(30, 4, 0), draw(25, 4, 1, 1.0)
    pooled = np.concatenate([first, second])
    square = np.median(pdist(pooled, "sqeuclidean"))
    own, other, cross = (
        rbf_kernel(x, y, gamma=0.5 / square)
        for x, y in ((first, first), (second, second), (first, second))
    )
    within = [(k.sum() - len(k)) / (len(k) * (len(k) - 1)) for k in (own, other)]
    expected = sum(within) - 2 * cross.mean()
    assert compute_mmd(first, second, 9).distance.value == pytest.approx(expected, abs=1e-12)


def test_mmd_of_equal_domains_is_0_on_average_with_uniform_p_values() -> None:
    results = [compute_mmd(draw(40, 4, s), draw(40, 4, 1000 + s), 99) for s in range(80)]
    values = np.array([r.distance.value for r in results])
    assert abs(values.mean()) < 3 * values.std() / 80**0.5 + 1e-4
    assert kstest([r.p_value for r in results], "uniform").pvalue > 0.01
    apart = compute_mmd(draw(40, 4, 0), draw(40, 4, 1, 3.0), 99)
    assert apart.p_value == pytest.approx(0.01) and apart.distance.low > 0


def test_a_distance_is_0_for_halves_and_2_for_disjoint_domains() -> None:
    """On training rows it would be 2 for all: there are more columns than rows."""
    nulls = [classify_domains(draw(150, 400, s), draw(150, 400, 99 + s)) for s in range(4)]
    assert abs(np.mean([n.a_distance.value for n in nulls])) < 0.15
    assert sum(n.a_distance.low <= 0 <= n.a_distance.high for n in nulls) >= 3
    assert abs(np.mean([n.h_divergence.value for n in nulls])) < 0.15
    apart = classify_domains(draw(150, 20, 0), draw(150, 20, 1, shift=8.0))
    assert apart.a_distance.value > 1.9 and apart.h_divergence.value > 1.9
    between = classify_domains(draw(300, 3, 0), draw(300, 3, 1, shift=2.0))
    # The best classifier of two unit Gaussians 2 apart errs on .1587.
    assert between.a_distance.low < 2 - 4 * 0.1587 < between.a_distance.high


def test_a_document_in_both_folds_does_not_count() -> None:
    """Each document has a place of its own, so its other sentence gives the domain away."""
    places = np.repeat(np.random.default_rng(0).normal(size=(60, 30)), 5, axis=0) * 5
    first, second = places[:150], places[150:]
    groups = np.repeat(np.arange(60).astype(str), 5)
    assert classify_domains(first, second).a_distance.value > 1.0
    assert classify_domains(first, second, groups).a_distance.value < 0.9


def test_words_by_hand() -> None:
    first = [["a", "b"], ["a", "c"], ["d"], ["a"]] * 5
    second = [["a", "x"], ["a", "y"], ["d"], ["z"]] * 5
    overlap = compute_word_overlap(first, second)
    assert overlap.value == pytest.approx(2 / 4)
    p, q = np.array([3, 1, 1, 1, 0, 0, 0]) / 6, np.array([2, 0, 0, 1, 1, 1, 1]) / 6
    divergence = compute_word_divergence(first, second)
    assert divergence.value == pytest.approx(jensenshannon(p, q, base=2) ** 2, abs=1e-6)
    # The delta method by hand: the slope of a word's share is log2(p / m) / 2.
    slopes = [np.where(x > 0, np.log2(np.maximum(x, 1e-9) / ((p + q) / 2)) / 2, 0) for x in (p, q)]
    texts = [[0, 1], [0, 2], [3], [0]], [[0, 4], [0, 5], [3], [6]]
    moved = [[sum(s[w] - s @ x for w in text) for text in side]
             for side, s, x in zip(texts, slopes, (p, q), strict=True)]  # fmt: skip
    moves = np.tile(np.sum(moved, 0) / 30, 5)
    half = t.ppf(0.975, 19) * (20 / 19 * moves @ moves) ** 0.5
    assert divergence.high - divergence.value == pytest.approx(half, rel=1e-6)
    assert compute_word_divergence(first, first).value == pytest.approx(0, abs=1e-9)


def cover_distances(trials: int) -> dict[str, float]:
    """Return how often intervals hold the truth of Gaussians with a known distance."""
    covered: dict[str, list[bool]] = {"mmd": [], "frechet": []}
    big = np.concatenate([draw(1500, 5, 10**6), draw(1500, 5, 10**6 + 1, 1.0)])
    square = float(np.median(pdist(big, "sqeuclidean")))
    # The mean of the kernel of a normal difference of variance 2 in each direction.
    truth = 2 * (square / (square + 2)) ** 2.5 * (1 - math.exp(-1 / (2 * (square + 2))))
    for trial in range(trials):
        seed = 10**7 + 2 * trial
        first, second = draw(200, 5, seed), draw(200, 5, seed + 1, 1.0)
        mmd = compute_mmd(first, second, 1).distance
        covered["mmd"].append(mmd.low <= truth <= mmd.high)
        frechet = extrapolate_frechet(first, second)
        covered["frechet"].append(frechet.low <= 1.0 <= frechet.high)
    return {name: float(np.mean(hits)) for name, hits in covered.items()}


def test_intervals_hold_the_truth() -> None:
    covered = cover_distances(20)
    assert min(covered.values()) >= 0.75, covered


@pytest.mark.slow
def test_intervals_hold_the_truth_in_1000() -> None:
    covered = cover_distances(1000)
    assert all(is_covered(share) for share in covered.values()), covered


def cover_classifiers(trials: int, shift: float, patch: pytest.MonkeyPatch) -> dict[str, float]:
    """Return how often the intervals of A-distance and H-divergence hold what classifiers attain.

    That is their mean over all trials. The best classifier surpasses it where domains are near: at
    a shift of .3 it errs on .440, and those of 320 rows on about .452.
    """
    fitted: list[list[Probe]] = []
    thresholds: list[float] = []
    find = distance._find_best_threshold

    def fit(*args: Any) -> tuple[np.ndarray, list[Probe]]:
        folds, probes = fit_folds(*args)
        fitted.append(probes)
        return folds, probes

    def find_threshold(scores: np.ndarray, domains: np.ndarray) -> float:
        thresholds.append(find(scores, domains))
        return thresholds[-1]

    patch.setattr(distance, "fit_folds", fit)
    patch.setattr(distance, "_find_best_threshold", find_threshold)
    seeds = range(10**7, 10**7 + 2 * trials, 2)
    classified = [
        classify_domains(draw(200, 5, seed), draw(200, 5, seed + 1, shift)) for seed in seeds
    ]
    probes = [probe for one in fitted for probe in one]
    attained = {
        "a_distance": [compute_error(probe, shift) for probe in probes],
        "h_divergence": [
            compute_error(probe, shift, threshold)
            for probe, threshold in zip(probes, thresholds, strict=True)
        ],
    }
    covered = {}
    for name, errors in attained.items():
        truth = 2 - 4 * float(np.mean(errors))
        intervals = [getattr(one, name) for one in classified]
        covered[name] = float(np.mean([one.low <= truth <= one.high for one in intervals]))
    return covered


def compute_error(probe: Probe, shift: float, threshold: float = 0.0) -> float:
    """Return on how many a classifier errs of two unit Gaussians, `shift` apart in one feature."""
    weight = probe.weight[1] - probe.weight[0]
    bias = float(probe.bias[1] - probe.bias[0]) - threshold
    length = float(np.linalg.norm(weight)) or 1.0
    upper = norm.sf((bias + weight[0] * shift) / length)
    return float(norm.cdf(bias / length) + upper) / 2


def test_intervals_of_classifiers_hold_what_they_attain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert min(cover_classifiers(20, 1.0, monkeypatch).values()) >= 0.75


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
def test_intervals_of_classifiers_hold_it_in_2000(
    shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    covered = cover_classifiers(2000, shift, monkeypatch)
    assert is_covered(covered["a_distance"]), covered
    assert is_covered(covered["h_divergence"] - (0.005 if shift == 0 else 0)), covered


def cover_words(trials: int, tilt: float) -> dict[str, float]:
    """Return how often intervals of the words of 200 texts hold the mean of as many others.

    That is over all trials, of frequencies that fall as 1 / rank; `tilt` is by how much,
    in logarithms, the second sample's differ.
    """
    names, rng = np.array([f"w{i}" for i in range(3000)]), np.random.default_rng(5)
    shares = 1 / np.arange(1, 3001)
    both = [shares / shares.sum(), shares * np.exp(tilt * rng.normal(size=3000))]
    both[1] /= both[1].sum()
    drawn: dict[str, list[distance.Distance]] = {"overlap": [], "divergence": []}
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        first, second = (
            [names[rng.choice(3000, n, p=p)].tolist() for n in rng.poisson(15, 200) + 3]
            for p in both
        )
        drawn["overlap"].append(compute_word_overlap(first, second))
        drawn["divergence"].append(compute_word_divergence(first, second))
    means = {name: float(np.mean([one.value for one in every])) for name, every in drawn.items()}
    return {
        name: float(np.mean([one.low <= means[name] <= one.high for one in every]))
        for name, every in drawn.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("tilt", [0.0, 0.5])
def test_intervals_of_words_hold_what_as_many_texts_have_in_1000(tilt: float) -> None:
    covered = cover_words(1000, tilt)
    assert is_covered(covered["divergence"]) and covered["overlap"] > 0.97, covered


def cross_validate_means(shift: float, trials: int, rows: int = 100, width: int = 40) -> np.ndarray:
    """Return cross-validated errors of the difference of means, (trials,), by hand."""
    rng = np.random.default_rng(3)
    sides = rng.normal(size=(2, trials, rows, width)).astype(np.float32)
    sides[1, ..., 0] += shift
    fold, wrong = np.arange(rows) % 5, np.zeros(trials)
    for number in range(5):
        means = sides[:, :, fold != number].mean(2)
        weight = means[1] - means[0]
        middle = (weight * means.mean(0)).sum(1)[:, None]
        scores = np.einsum("strw,tw->str", sides[:, :, fold == number], weight)
        wrong += (scores[0] > middle).sum(1) + (scores[1] <= middle).sum(1)
    return wrong / (2 * rows)


def test_variance_of_a_cross_validated_error_is_that_of_simulations() -> None:
    for shift in (0.0, 0.8):
        errors = cross_validate_means(shift, 1500)
        # The squared length of the noise of a difference of means of 80 rows in 40 columns is 1.
        error, noise = errors.mean(), 1 / (1 + shift**2)
        beyond = errors.var() * 200 - error * (1 - error)
        tolerance = 3 * errors.var() * 200 * (2 / 1500) ** 0.5
        assert abs(beyond - compute_shared_variance(error, noise, 5)) < tolerance
    assert beyond > noise * norm.pdf(norm.ppf(error)) ** 2 + tolerance / 2
    assert compute_shared_variance(0.5, 1.0, 5) == pytest.approx(1 / (2 * np.pi))
    assert compute_shared_variance(0.2, 0.0, 5) == 0.0


def draw_documents(seed: int, documents: int = 30, shift: float = 0.0) -> np.ndarray:
    """Return features of 5 sentences a document, alike within one."""
    rng = np.random.default_rng(seed)
    places = np.repeat(rng.normal(size=(documents, 4)), 5, axis=0)
    places[:, 0] += shift
    return places + 0.3 * rng.normal(size=places.shape)


def compare_documents(trials: int, shift: float) -> list[tuple[float, float, bool, bool]]:
    """Return p-values without and with groups, and whether the intervals hold the truth."""
    groups = np.repeat(np.arange(60).astype(str), 5)
    results = []
    for seed in range(trials):
        first, second = draw_documents(2 * seed), draw_documents(2 * seed + 1, shift=shift)
        alone = compute_mmd(first, second, 99)
        mmd = compute_mmd(first, second, 99, groups=groups)
        frechet = extrapolate_frechet(first, second, groups)
        plain = extrapolate_frechet(first, second)
        results.append((
            alone.p_value, mmd.p_value, frechet.low <= shift**2 <= frechet.high,
            plain.low <= shift**2 <= plain.high,
        ))  # fmt: skip
    return results


def test_sentences_of_a_document_count_once() -> None:
    alone, grouped, held, _ = map(np.array, zip(*compare_documents(25, 0.0), strict=True))
    assert np.mean(alone < 0.05) > 0.5, "rows of documents are not exchangeable"
    assert np.mean(grouped < 0.05) <= 0.2 and np.mean(grouped) > 0.3
    assert np.mean(held) >= 0.8
    mirrored = [first[::-1] for first in (draw_documents(0), draw_documents(1))]
    names = np.repeat(np.arange(60).astype(str), 5)
    order = np.concatenate([np.arange(150)[::-1], 150 + np.arange(150)[::-1]])
    values = [
        compute_mmd(draw_documents(0), draw_documents(1), 9, groups=names).distance.value,
        compute_mmd(*mirrored, 9, groups=names[order]).distance.value,
    ]
    assert values[0] == pytest.approx(values[1]), "the order of documents means nothing"


@pytest.mark.slow
def test_intervals_of_documents_hold_the_truth_in_300() -> None:
    _, grouped, held, plain = map(np.array, zip(*compare_documents(300, 1.0), strict=True))
    assert is_covered(np.mean(held)) and np.mean(plain) < 0.85, (held.mean(), plain.mean())
    assert np.mean(grouped < 0.05) > 0.8


def read(run: Path) -> DistanceAnalysis:
    return DistanceAnalysis.model_validate_json((run / "analysis" / "distance.json").read_text())


def test_distance_command(
    hftl: Hftl, recipe_file: Path, tmp_path: Path, forwards: list[int]
) -> None:
    far = [(f"bad dull poor {i} {'sad' * (i % 7)}", "negative") for i in range(60)]
    other = write_csv(tmp_path / "other.csv", ["text", "label"], far)
    general = write_csv(tmp_path / "more.csv", ["text"], [[t] for t, _ in sentences(90, 5)])
    run = tmp_path / "out"
    words = ["distance", recipe_file, f"data.general={{path: {general}}}"]
    words += ["data.test={fraction: 0.4}"]
    words += ["--to", other, "--output", run]
    outcome = hftl(*words)
    assert outcome.code == 0, outcome.err
    facts = read(run)
    assert [d.name for d in facts.domains] == ["train", "test", "general", str(other)]
    assert len(facts.pairs) == 6 and "saturated" in outcome.out
    by_pair = {(p.first, p.second): p for p in facts.pairs}
    assert by_pair["train", str(other)].mmd_p_value < 0.01
    assert by_pair["train", str(other)].mmd.value > by_pair["train", "test"].mmd.value
    same = by_pair["train", "test"].a_distance
    assert same.ci95 is not None and same.ci95[0] < 0.6
    assert all(d.pieces_per_word == pytest.approx(1.0, abs=0.5) for d in facts.domains)
    assert (run / "analysis" / "distance.png").read_bytes()[:4] == b"\x89PNG"
    passes = len(forwards)
    assert hftl(*words).code == 0 and len(forwards) == passes
    assert read(run) == facts

    hftl(*words[:-2], "--to", "gone.csv", "--output", run).assert_error(3, "--to: gone.csv")
    named = write_csv(tmp_path / "named.csv", ["words"], [["a"]])
    hftl(*words[:-2], "--to", named, "--output", run).assert_error(
        3, "no column 'text'", "Give a table with the columns of data.train"
    )
    few = write_csv(tmp_path / "few.csv", ["text", "label"], far[:5])
    outcome = hftl(*words[:-2], "--to", few, "--output", run)
    assert outcome.code == 0 and len(read(run).pairs) == 6, outcome.err
    assert read(run).left_out == [f"{few} has 5 rows to compare, fewer than 40"]
    assert f"left out: {few} has 5 rows" in " ".join(outcome.out.split())


def test_without_unlabelled_data_a_line_says_what_is_compared(
    hftl: Hftl, recipe_file: Path, tmp_path: Path
) -> None:
    words = [recipe_file, "data.test={fraction: 0.4}", "--output", tmp_path / "out"]
    for command, line in (("distance", "--to TABLE"), ("shift", "to compare it, too")):
        outcome = hftl(command, *words)
        assert outcome.code == 0, outcome.err
        (said,) = [row for row in outcome.out.splitlines() if "no unlabelled data" in row]
        assert "data.unlabeled" in said and line in said
    hftl("adapt", recipe_file, "adapt={objective: mlm, corpus: unlabeled}").assert_error(
        2, "adapt.corpus=unlabeled", "data.unlabeled is null"
    )


def test_a_set_of_three_documents_has_no_halves() -> None:
    rows = [Row((f"text {i}",), "", f"d{i % 3}", i, f"row {i}", "train") for i in range(60)]
    assert find_size_fault(rows) == "3 values of data.group in 60 rows, fewer than 4"
    assert find_size_fault([replace(row, group=f"d{row.index % 4}") for row in rows]) is None


def test_copies_of_train_in_another_table_are_no_distance(
    hftl: Hftl, recipe_file: Path, table: Path, tmp_path: Path
) -> None:
    run = tmp_path / "out"
    words = ["distance", recipe_file, "data.test={fraction: 0.4}", "--to", table, "--output", run]
    assert hftl(*words).code == 0
    pair = next(p for p in read(run).pairs if {p.first, p.second} == {"train", str(table)})
    assert abs(pair.a_distance.value) < 0.8 and pair.mmd_p_value > 0.05


def test_distances_of_pictures(tmp_path: Path, tiny_model: Any) -> None:
    from conftest import bench_of

    recipe = make_image_recipe(
        pictures(tmp_path / "a", 60), tiny_model("vit"), test={"fraction": 0.4}
    )
    other = pictures(tmp_path / "b" / "x", 25).parent
    context = bench_of(recipe)
    facts = compare_domains(recipe, context, tmp_path / "features", [str(other / "x")], 100)
    assert [d.name for d in facts.domains][:2] == ["train", "test"]
    assert facts.pairs[0].word_overlap is None and facts.domains[0].pieces_per_word is None
    assert json.loads(json.dumps(facts.to_dict()))["site"]["pooling"] == "native"


def test_pairs_are_compared_with_pairs_and_sets_need_no_labels(
    hftl: Hftl, recipe_tree: dict[str, Any], tmp_path: Path, tiny_model: Any
) -> None:
    pairs = [(t, f"said {i % 9}", "yn"[i % 2]) for i, (t, _) in enumerate(sentences(160))]
    path = write_csv(tmp_path / "pairs.csv", ["a", "b", "label"], pairs)
    single = write_csv(tmp_path / "single.csv", ["text"], [[t] for t, _ in sentences(90, 3)])
    recipe_tree["data"] |= {
        "train": {"path": str(path), "text": ["a", "b"]}, "test": {"fraction": 0.4},
        "general": {"path": str(single), "text": "text"},
    }  # fmt: skip
    recipe_tree["finetune"]["pooling"] = "native"
    recipe_tree["source"]["model"] = str(tiny_model("distilbert"))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe_tree))
    words, run = ["distance", tmp_path / "r.yaml"], ["--output", tmp_path / "out"]
    hftl(*words, *run).assert_error(2, "data.general has single texts", "data.train pairs")
    outcome = hftl(*words, "data.general=null", "--to", path, *run)
    assert outcome.code == 0, outcome.err
    facts = read(tmp_path / "out")
    copies = next(p for p in facts.pairs if {p.first, p.second} == {"train", str(path)})
    assert abs(copies.a_distance.value) < 0.8, "each row is a pair, as in train"
    assert not facts.site_is_own and "weights that the checkpoint lacks" in outcome.out

    alone = ["data.train.text=a", "data.task=null", "adapt={objective: mlm}"]
    outcome = hftl(*words, *alone, *run)
    assert outcome.code == 0, outcome.err
    (pair,) = read(tmp_path / "out").pairs
    assert (pair.first, pair.second) == ("train", "general")
    hftl(*words, *alone, "data.general=null", *run).assert_error(2, "the only set of rows")


def test_too_few_rows_of_all_other_sets_are_named() -> None:
    refuse_too_few(["test has 5 rows"], 2)
    with pytest.raises(DataError, match="test has 5 rows; general has 3 rows. Give more rows"):
        refuse_too_few(["test has 5 rows", "general has 3 rows"], 1)
