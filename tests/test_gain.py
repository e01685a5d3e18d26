"""The gain is the plain mean difference; its interval, baseline and order are what they claim."""

import numpy as np
import pytest

from hftl.measure.gain import (
    MARGIN,
    SplitPredictions,
    build_ladder,
    compute_gain,
    compute_mean_score,
    compute_transfer_gain,
    find_best_seed,
)
from hftl.measure.metrics import METRICS, Metric, find_metric
from hftl.measure.record import BaselineGain
from hftl.measure.statistics import mean_interval

ACCURACY = find_metric("accuracy", "classification")
RMSE = find_metric("rmse", "regression")
ALL = [metric for known in METRICS.values() for metric in known.values()]
REGRESSION = list(METRICS["regression"].values())


def predicted(rows: int = 80, seeds: int = 3, seed: int = 0, **rates: float) -> SplitPredictions:
    """Arms that are right on a row with the given probability."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=rows)
    arms = {}
    for arm, rate in rates.items():
        right = rng.random((seeds, rows)) < rate
        arms[arm] = np.where(right, labels, (labels + rng.integers(1, 3, size=rows)) % 3)
    return SplitPredictions(labels, np.arange(rows), arms)


def numbers(rows: int = 80, seeds: int = 3, seed: int = 0, **noise: float) -> SplitPredictions:
    """Arms that miss a target by the given spread."""
    rng = np.random.default_rng(seed)
    labels = rng.normal(size=rows)
    arms = {a: labels + rng.normal(0, spread, (seeds, rows)) for a, spread in noise.items()}
    return SplitPredictions(labels, np.arange(rows), arms)


def names(rows: int = 80, seeds: int = 3, **rates: float) -> SplitPredictions:
    """Arms that are right on a name of several with the given probability."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=(rows, 3))
    arms = {
        arm: np.where(rng.random((seeds, rows, 3)) < rate, labels, 1 - labels)
        for arm, rate in rates.items()
    }
    return SplitPredictions(labels, np.arange(rows), arms)


def tags(rows: int = 80, seeds: int = 3, **rates: float) -> SplitPredictions:
    """Arms that are right on a word with the given probability."""
    rng = np.random.default_rng(0)
    known = np.array(["O", "B-X", "B-Y"])
    ids = rng.integers(3, size=(rows, 4))

    def told(found: np.ndarray) -> np.ndarray:
        cells = np.empty(found.shape[:-1], object)
        for place in np.ndindex(cells.shape):
            cells[place] = tuple(map(str, known[found[place]]))
        return cells

    arms = {
        arm: told(np.where(rng.random((seeds, rows, 4)) < rate, ids, (ids + 1) % 3))
        for arm, rate in rates.items()
    }
    return SplitPredictions(told(ids), np.arange(rows), arms)


def told_of(metric: Metric) -> SplitPredictions:
    if metric in REGRESSION:
        return numbers(lora=0.5, scratch=1.0)
    if metric in METRICS["multi-label"].values():
        return names(lora=0.9, scratch=0.6)
    if metric in METRICS["token-classification"].values():
        return tags(lora=0.9, scratch=0.6)
    return predicted(lora=0.8, scratch=0.6)


@pytest.mark.parametrize("metric", ALL, ids=lambda m: m.name)
def test_value_is_the_mean_difference_and_positive_is_better(metric: Metric) -> None:
    told = told_of(metric)
    differences = [
        metric.score(told.labels, own) - metric.score(told.labels, other)
        for own, other in zip(told.predictions["lora"], told.predictions["scratch"], strict=True)
    ]
    found = compute_gain(metric, told, "lora", "scratch")
    assert found["value"] == pytest.approx(metric.sign * np.mean(differences))
    assert found["value"] > 0 and found["metric"] == metric.name and found["seeds"] == 3
    assert compute_gain(metric, told, "scratch", "lora")["value"] == pytest.approx(-found["value"])


@pytest.mark.parametrize("metric", ALL, ids=lambda m: m.name)
def test_interval_is_centred_on_the_value(metric: Metric) -> None:
    found = compute_gain(metric, told_of(metric), "lora", "scratch")
    low, high = found["ci95"]
    assert low < found["value"] < high
    assert (low + high) / 2 == pytest.approx(found["value"])


@pytest.mark.parametrize("rows", [2, 80, 400])
def test_interval_is_that_of_the_raw_differences(rows: int) -> None:
    told = predicted(rows, lora=0.8, scratch=0.6)
    right = {arm: (found == told.labels).astype(float) for arm, found in told.predictions.items()}
    expected = mean_interval(right["lora"] - right["scratch"])
    assert compute_gain(ACCURACY, told, "lora", "scratch")["ci95"] == pytest.approx(expected)


def test_rows_of_a_group_count_as_one_unit() -> None:
    """Ten copies of forty rows know what forty rows know."""
    one = predicted(40, seeds=1, lora=0.8, scratch=0.6)
    thrice = {arm: np.repeat(found, 3, axis=0) for arm, found in one.predictions.items()}
    few = SplitPredictions(one.labels, one.units, thrice)
    copies = {arm: np.repeat(found, 10, axis=1) for arm, found in few.predictions.items()}
    labels = np.repeat(few.labels, 10)
    alone = SplitPredictions(labels, np.arange(400), copies)
    grouped = SplitPredictions(labels, np.repeat(np.arange(40), 10), copies)
    single, naive, fair = (
        compute_gain(ACCURACY, t, "lora", "scratch") for t in (few, alone, grouped)
    )
    assert fair["value"] == naive["value"] == pytest.approx(single["value"])
    assert fair["ci95"] == pytest.approx(single["ci95"])
    assert np.ptp(fair["ci95"]) > 2 * np.ptp(naive["ci95"])


@pytest.mark.parametrize(
    ("told", "seeds"),
    [(predicted(seeds=1, lora=1.0, scratch=0.1), 1),
     (SplitPredictions(np.zeros(9, int), np.zeros(9, int), {"lora": np.zeros((3, 9), int),
                                                     "scratch": np.ones((3, 9), int)}), 3)],
    ids=["one seed", "one group"],
)  # fmt: skip
def test_nothing_to_compare_gives_no_interval(told: SplitPredictions, seeds: int) -> None:
    found = compute_gain(ACCURACY, told, "lora", "scratch")
    assert found["ci95"] is None and found["outcome"] == "undetermined"
    assert found["seeds"] == seeds and found["value"] > 0.5


@pytest.mark.parametrize(
    ("own", "other", "outcome"),
    [(0.9, 0.4, "positive"), (0.4, 0.9, "negative"), (0.62, 0.6, "undetermined")],
)
def test_outcome(own: float, other: float, outcome: str) -> None:
    told = predicted(100, lora=own, scratch=other)
    assert compute_gain(ACCURACY, told, "lora", "scratch")["outcome"] == outcome


@pytest.mark.parametrize("seeds", [2, 5, 6, 8])
def test_p_value_is_given_from_six_seeds_and_agrees_with_the_interval(seeds: int) -> None:
    """Rates that are close, so that some intervals reach past 0 and some do not."""
    outcomes = set()
    for number in range(40):
        told = predicted(60, seeds, seed=number, lora=0.76, scratch=0.66)
        found = compute_gain(ACCURACY, told, "lora", "scratch")
        if seeds < 6:
            assert found["p_value"] is None
            continue
        low, high = found["ci95"]
        assert (found["p_value"] <= 0.05) == (low > 0 or high < 0)
        outcomes.add(low > 0)
    assert seeds < 6 or outcomes == {True, False}


def test_p_value_sees_the_items_and_not_the_seeds_alone() -> None:
    """One of 50 items differs, in every seed: the seeds agree, and the items do not."""
    labels = np.zeros(50, int)
    other = np.tile(labels, (8, 1))
    other[:, 7] = 1
    told = SplitPredictions(labels, np.arange(50), {"own": np.tile(labels, (8, 1)), "other": other})
    found = compute_gain(ACCURACY, told, "own", "other")
    assert found["value"] == pytest.approx(0.02) and found["p_value"] > 0.2


@pytest.mark.parametrize(("rows", "sure"), [(3, False), (6, False), (20, True)])
def test_p_value_where_every_item_differs(rows: int, sure: bool) -> None:
    """Without any spread the rule of three bounds both."""
    arms = {"own": np.zeros((8, rows), int), "other": np.ones((8, rows), int)}
    found = compute_gain(
        ACCURACY, SplitPredictions(np.zeros(rows, int), np.arange(rows), arms), "own", "other"
    )
    assert (found["p_value"] <= 0.05) == (found["ci95"][0] > 0)
    assert (found["p_value"] < 0.01) == sure
    if rows == 3:
        assert found["p_value"] == pytest.approx(2 * 0.5**3, abs=0.05), "as a sign test says"
    same = arms | {"other": arms["own"]}
    equal = compute_gain(
        ACCURACY, SplitPredictions(np.zeros(rows, int), np.arange(rows), same), "own", "other"
    )
    assert equal["p_value"] == 1


def test_relative_error_reduction_is_that_of_the_means() -> None:
    told = predicted(lora=0.8, scratch=0.6)
    own, other = (compute_mean_score(ACCURACY, told, arm) for arm in ("lora", "scratch"))
    found = compute_gain(ACCURACY, told, "lora", "scratch")["relative_error_reduction"]
    assert found == pytest.approx(1 - (1 - own) / (1 - other))


def test_relative_error_reduction_of_an_error() -> None:
    told = numbers(lora=0.5, scratch=1.0)
    own, other = (compute_mean_score(RMSE, told, arm) for arm in ("lora", "scratch"))
    found = compute_gain(RMSE, told, "lora", "scratch")["relative_error_reduction"]
    assert found == pytest.approx(1 - own / other) and 0 < found < 1


@pytest.mark.parametrize(
    ("test", "baseline"),
    [(predicted(lora=0.9, scratch=0.7, classical=0.3), "scratch"),
     (predicted(lora=0.9, scratch=0.3, classical=0.7), "classical"),
     (predicted(lora=0.2, scratch=0.3, classical=0.7), "classical")],
    ids=["scratch", "classical", "behind both"],
)  # fmt: skip
def test_baseline_has_the_lesser_gain_on_test(test: SplitPredictions, baseline: str) -> None:
    found = compute_transfer_gain(ACCURACY, test, "lora")
    assert found is not None and found["baseline"] == baseline
    assert found.baselines == {
        arm: compute_gain(ACCURACY, test, "lora", arm) for arm in ("scratch", "classical")
    }
    least = found.baselines[baseline]
    assert least.value == min(gain.value for gain in found.baselines.values())
    assert found == BaselineGain(**dict(least), baseline=baseline, baselines=found.baselines)


def test_of_equal_gains_that_over_scratch_is_named() -> None:
    test = predicted(lora=1.0, scratch=1.0, classical=1.0)
    gain = compute_transfer_gain(ACCURACY, test, "lora")
    assert gain is not None and gain.baseline == "scratch" and len(gain.baselines) == 2


def test_baseline_of_an_error_is_the_one_with_less() -> None:
    test = numbers(lora=0.1, scratch=2.0, classical=0.5)
    found = compute_transfer_gain(RMSE, test, "lora")
    assert found is not None and found["baseline"] == "classical"
    assert found["value"] == pytest.approx(found["baselines"]["classical"]["value"]) and (
        found["value"] < found["baselines"]["scratch"]["value"]
    )


@pytest.mark.parametrize("present", ["scratch", "classical"])
def test_one_baseline_is_the_baseline(present: str) -> None:
    told = predicted(lora=0.8, head=0.9, majority=0.3, **{present: 0.5})
    found = compute_transfer_gain(ACCURACY, told, "lora")
    assert found is not None and found["baseline"] == present
    assert list(found["baselines"]) == [present]


def test_without_a_baseline_there_is_no_gain() -> None:
    told = predicted(lora=0.8, head=0.5, majority=0.3)
    assert compute_transfer_gain(ACCURACY, told, "lora") is None


def test_positive_only_where_the_gains_over_both_baselines_are() -> None:
    """Scratch's seeds vary so much that it may be as good; the lesser gain is over classical."""
    rows = 400
    labels = np.zeros(rows, int)

    def wrong(*shares: float) -> np.ndarray:
        return np.stack([(np.arange(rows) < share * rows).astype(int) for share in shares])

    arms = {"lora": wrong(0.1, 0.1, 0.1), "classical": wrong(0.3, 0.3, 0.3)}
    sure = compute_transfer_gain(ACCURACY, SplitPredictions(labels, np.arange(rows), arms), "lora")
    arms |= {"scratch": wrong(0.05, 0.1, 0.9)}
    unsure = compute_transfer_gain(
        ACCURACY, SplitPredictions(labels, np.arange(rows), arms), "lora"
    )
    assert sure is not None and unsure is not None
    assert unsure["baseline"] == "classical" and unsure["ci95"] == sure["ci95"]
    assert sure["outcome"] == "positive" and unsure["outcome"] == "undetermined"
    assert unsure["baselines"]["scratch"]["outcome"] == "undetermined"


@pytest.mark.parametrize(
    ("metric", "told"),
    [(ACCURACY, predicted(head=0.7, lora=0.9, scratch=0.4, classical=0.55)),
     (RMSE, numbers(head=0.7, lora=0.3, scratch=2.0, classical=1.2))],
    ids=["accuracy", "rmse"],
)  # fmt: skip
def test_ladder_has_the_best_on_test_first(metric: Metric, told: SplitPredictions) -> None:
    rows = build_ladder(metric, told, told, "lora")
    assert [row["arm"] for row in rows] == ["lora", "head", "classical", "scratch"]
    assert rows[0]["gain_of_own"] is None
    for row in rows:
        scores = [metric.score(told.labels, p) for p in told.predictions[row["arm"]]]
        assert row["test"] == pytest.approx(np.mean(scores))
        assert row["sd"] == pytest.approx(np.std(scores, ddof=1))
    for row in rows[1:]:
        assert row.gain_of_own == compute_gain(metric, told, "lora", row["arm"])


def test_ladder_tells_validation_apart_from_test() -> None:
    row = build_ladder(ACCURACY, predicted(lora=0.2), predicted(lora=0.9), "lora")[0]
    assert row["validation"] < 0.5 < row["test"]


def test_ladder_of_one_seed_has_no_spread() -> None:
    told = predicted(seeds=1, lora=0.8, scratch=0.5)
    assert [row["sd"] for row in build_ladder(ACCURACY, told, told, "lora")] == [None, None]


@pytest.mark.parametrize(
    ("wrong", "best"), [([3, 1, 2], 1), ([2, 1, 1], 1), ([0, 0, 0], 0), ([4, 4, 0], 2)]
)
def test_best_seed_is_the_first_of_equals(wrong: list[int], best: int) -> None:
    labels = np.zeros(5, int)
    predictions = np.array([[1] * n + [0] * (5 - n) for n in wrong])
    told = SplitPredictions(labels, np.arange(5), {"lora": predictions})
    assert find_best_seed(ACCURACY, told, "lora") == best
    as_numbers = SplitPredictions(
        labels.astype(float), told.units, {"lora": predictions.astype(float)}
    )
    assert find_best_seed(RMSE, as_numbers, "lora") == best


def test_margin_of_an_error_is_a_share_of_it() -> None:
    """An rmse of 0.002 against 0.004 is half the error, however small the label's unit."""
    generator = np.random.default_rng(0)
    labels = generator.normal(size=200) * 0.01
    noise = generator.normal(size=(2, 200))
    told = SplitPredictions(
        labels, np.arange(200), {"own": labels + 0.002 * noise, "other": labels + 0.004 * noise}
    )
    found = compute_gain(METRICS["regression"]["rmse"], told, "own", "other")
    assert abs(found["value"]) < MARGIN and found["outcome"] == "positive"


def test_arms_that_never_differ_are_not_known_to_be_equal() -> None:
    """48 of 48 right in both arms still allows some percent of difference."""
    for rows, expected in ((48, "undetermined"), (2000, "equivalent")):
        labels = np.arange(rows) % 2
        told = SplitPredictions(
            labels,
            np.arange(rows),
            {"own": np.stack([labels] * 3), "other": np.stack([labels] * 3)},
        )
        found = compute_gain(METRICS["classification"]["accuracy"], told, "own", "other")
        assert found["ci95"] == pytest.approx([-3 / rows, 3 / rows])
        assert found["outcome"] == expected
