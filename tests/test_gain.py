"""Compute gains: plain mean differences, with interval, p-value, baseline and order."""

import numpy as np
import pytest

from hftl.measure.gain import (
    MARGIN,
    SplitPredictions,
    build_ladder,
    compute_gain,
    compute_transfer_gain,
    find_best_seed,
    score_seeds,
)
from hftl.measure.metrics import METRICS, Metric, find_metric
from hftl.measure.record import BaselineGain
from hftl.measure.statistics import mean_interval
from hftl.train.facts import ArmEntry, SplitMetrics, TrainingFacts

ACCURACY = find_metric("accuracy", "classification")
RMSE = find_metric("rmse", "regression")
ALL = [metric for known in METRICS.values() for metric in known.values()]
REGRESSION = list(METRICS["regression"].values())


TAGS = np.array(["O", "B-X", "B-Y"])


def predicted(rows: int = 80, seeds: int = 3, seed: int = 0, **rates: float) -> SplitPredictions:
    """Draw arms that are right on a row with the given probability."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=rows)
    arms = {}
    for arm, rate in rates.items():
        right = rng.random((seeds, rows)) < rate
        arms[arm] = np.where(right, labels, (labels + rng.integers(1, 3, size=rows)) % 3)
    return SplitPredictions(labels, np.arange(rows), arms)


def numbers(rows: int = 80, seeds: int = 3, seed: int = 0, **noise: float) -> SplitPredictions:
    """Draw arms that miss a target by the given spread."""
    rng = np.random.default_rng(seed)
    labels = rng.normal(size=rows)
    arms = {a: labels + rng.normal(0, spread, (seeds, rows)) for a, spread in noise.items()}
    return SplitPredictions(labels, np.arange(rows), arms)


def score_arms(metric: Metric, split: SplitPredictions) -> list[ArmEntry]:
    """Return the entry of every arm and seed, validation being the same rows as test."""
    entries = []
    for arm, seeds in split.predictions.items():
        for seed, predictions in enumerate(seeds):
            scores = {metric.name: metric.score(split.labels, predictions)}
            entries.append(
                ArmEntry(
                    arm=arm,
                    seed=seed,
                    strategy="full",
                    metrics=SplitMetrics(validation=scores, test=scores),
                    trainable_parameters=1,
                    training=TrainingFacts(),
                )
            )
    return entries


def to_tags(codes: np.ndarray) -> np.ndarray:
    """Return the rows of class ids as tuples of tags."""
    cells = np.empty(codes.shape[:-1], object)
    for place in np.ndindex(cells.shape):
        cells[place] = tuple(map(str, TAGS[codes[place]]))
    return cells


def predict_for(metric: Metric) -> SplitPredictions:
    """Draw predictions of the metric's task, of which lora's are better than scratch's."""
    if metric in REGRESSION:
        return numbers(lora=0.5, scratch=1.0)
    if metric in METRICS["classification"].values():
        return predicted(lora=0.8, scratch=0.6)
    rng = np.random.default_rng(0)
    classes = 2 if metric in METRICS["multi-label"].values() else 3
    labels = rng.integers(classes, size=(80, 3))
    arms = {
        arm: np.where(rng.random((3, 80, 3)) < rate, labels, (labels + 1) % classes)
        for arm, rate in (("lora", 0.9), ("scratch", 0.6))
    }
    if classes == 3:
        labels, arms = to_tags(labels), {arm: to_tags(said) for arm, said in arms.items()}
    return SplitPredictions(labels, np.arange(80), arms)


@pytest.mark.parametrize("metric", ALL, ids=lambda m: m.name)
def test_the_gain_is_the_mean_difference_in_the_middle_of_its_interval(metric: Metric) -> None:
    test = predict_for(metric)
    differences = [
        metric.score(test.labels, own) - metric.score(test.labels, other)
        for own, other in zip(test.predictions["lora"], test.predictions["scratch"], strict=True)
    ]
    gain = compute_gain(metric, test, "lora", "scratch")
    assert gain["value"] == pytest.approx(metric.sign * np.mean(differences))
    assert gain["value"] > 0 and gain["metric"] == metric.name and gain["seeds"] == 3
    low, high = gain["ci95"]
    assert low < gain["value"] < high and (low + high) / 2 == pytest.approx(gain["value"])


@pytest.mark.parametrize("rows", [2, 80, 400])
def test_interval_is_that_of_the_raw_differences(rows: int) -> None:
    test = predicted(rows, lora=0.8, scratch=0.6)
    right = {arm: (said == test.labels).astype(float) for arm, said in test.predictions.items()}
    expected = mean_interval(right["lora"] - right["scratch"])
    expected = np.clip(expected, -1, 1)
    assert compute_gain(ACCURACY, test, "lora", "scratch")["ci95"] == pytest.approx(expected)


def test_interval_of_shares_ends_at_what_they_can_differ_by() -> None:
    labels = np.arange(40) % 2
    arms = {"lora": np.stack([labels, labels]), "scratch": np.stack([labels, 1 - labels])}
    gain = compute_gain(ACCURACY, SplitPredictions(labels, np.arange(40), arms), "lora", "scratch")
    assert (gain["value"], gain["ci95"]) == (0.5, [-1.0, 1.0])


def test_rows_of_a_group_count_as_one_unit() -> None:
    """Ten copies of forty rows know what forty rows know."""
    one = predicted(40, seeds=1, lora=0.8, scratch=0.6)
    few = {arm: np.repeat(said, 3, axis=0) for arm, said in one.predictions.items()}
    many = {arm: np.repeat(said, 10, axis=1) for arm, said in few.items()}
    labels, units = np.repeat(one.labels, 10), np.repeat(one.units, 10)
    single, naive, fair = (
        compute_gain(ACCURACY, SplitPredictions(*test), "lora", "scratch")
        for test in ((one.labels, one.units, few), (labels, np.arange(400), many),
                     (labels, units, many))
    )  # fmt: skip
    assert fair["value"] == naive["value"] == pytest.approx(single["value"])
    assert fair["ci95"] == pytest.approx(single["ci95"])
    assert np.ptp(fair["ci95"]) > 2 * np.ptp(naive["ci95"])


@pytest.mark.parametrize(
    ("test", "seeds"),
    [(predicted(seeds=1, lora=1.0, scratch=0.1), 1),
     (SplitPredictions(np.zeros(9, int), np.zeros(9, int), {"lora": np.zeros((3, 9), int),
                                                     "scratch": np.ones((3, 9), int)}), 3)],
    ids=["one seed", "one group"],
)  # fmt: skip
def test_nothing_to_compare_gives_no_interval(test: SplitPredictions, seeds: int) -> None:
    gain = compute_gain(ACCURACY, test, "lora", "scratch")
    assert gain["ci95"] is None and gain["outcome"] == "undetermined"
    assert gain["seeds"] == seeds and gain["value"] > 0.5


@pytest.mark.parametrize("seeds", [2, 5, 6, 8])
def test_p_value_is_given_from_six_seeds_and_agrees_with_the_interval(seeds: int) -> None:
    """Rates that are close, so that some intervals reach past 0 and some do not."""
    outcomes = set()
    for number in range(40):
        test = predicted(60, seeds, seed=number, lora=0.76, scratch=0.66)
        gain = compute_gain(ACCURACY, test, "lora", "scratch")
        if seeds < 6:
            assert gain["p_value"] is None
            continue
        low, high = gain["ci95"]
        assert (gain["p_value"] <= 0.05) == (low > 0 or high < 0)
        outcomes.add(low > 0)
    assert seeds < 6 or outcomes == {True, False}


def test_p_value_sees_the_items_and_not_the_seeds_alone() -> None:
    """One of 50 items differs, in every seed: the seeds agree, and the items do not."""
    labels = np.zeros(50, int)
    other = np.tile(labels, (8, 1))
    other[:, 7] = 1
    test = SplitPredictions(labels, np.arange(50), {"own": np.tile(labels, (8, 1)), "other": other})
    gain = compute_gain(ACCURACY, test, "own", "other")
    assert gain["value"] == pytest.approx(0.02) and gain["p_value"] > 0.2


@pytest.mark.parametrize(("rows", "sure"), [(3, False), (6, False), (20, True)])
def test_p_value_where_every_item_differs(rows: int, sure: bool) -> None:
    """Without any spread the rule of three bounds both."""
    right, wrong = np.zeros((8, rows), int), np.ones((8, rows), int)
    gain, equal = (
        compute_gain(
            ACCURACY, SplitPredictions(right[0], np.arange(rows), {"own": right, "other": other}),
            "own", "other",
        )
        for other in (wrong, right)
    )  # fmt: skip
    assert (gain["p_value"] <= 0.05) == (gain["ci95"][0] > 0)
    assert (gain["p_value"] < 0.01) == sure
    if rows == 3:
        assert gain["p_value"] == pytest.approx(2 * 0.5**3, abs=0.05), "as a sign test says"
    assert equal["p_value"] == 1


@pytest.mark.parametrize(
    ("metric", "test"),
    [(ACCURACY, predicted(lora=0.8, scratch=0.6)), (RMSE, numbers(lora=0.5, scratch=1.0))],
    ids=["accuracy", "rmse"],
)
def test_relative_error_reduction_is_that_of_the_means(
    metric: Metric, test: SplitPredictions
) -> None:
    own, other = (score_seeds(metric, test, arm).mean() for arm in ("lora", "scratch"))
    if metric is ACCURACY:
        own, other = 1 - own, 1 - other
    gain = compute_gain(metric, test, "lora", "scratch")
    assert gain["relative_error_reduction"] == pytest.approx(1 - own / other)


@pytest.mark.parametrize(
    ("metric", "test", "baseline"),
    [(ACCURACY, predicted(lora=0.9, scratch=0.7, classical=0.3), "scratch"),
     (ACCURACY, predicted(lora=0.9, scratch=0.3, classical=0.7), "classical"),
     (ACCURACY, predicted(lora=0.2, scratch=0.3, classical=0.7), "classical"),
     (ACCURACY, predicted(lora=1.0, scratch=1.0, classical=1.0), "scratch"),
     (RMSE, numbers(lora=0.1, scratch=2.0, classical=0.5), "classical"),
     (ACCURACY, predicted(lora=0.8, head=0.9, majority=0.3, scratch=0.5), "scratch"),
     (ACCURACY, predicted(lora=0.8, head=0.9, classical=0.5), "classical")],
    ids=["scratch", "classical", "behind both", "equal", "error", "scratch alone",
         "classical alone"],
)  # fmt: skip
def test_baseline_has_the_lesser_gain_on_test(
    metric: Metric, test: SplitPredictions, baseline: str
) -> None:
    gain = compute_transfer_gain(metric, test, "lora")
    assert gain is not None and gain["baseline"] == baseline
    assert gain.baselines == {
        arm: compute_gain(metric, test, "lora", arm)
        for arm in ("scratch", "classical") if arm in test.predictions
    }  # fmt: skip
    least = gain.baselines[baseline]
    assert least.value == min(other.value for other in gain.baselines.values())
    assert gain == BaselineGain(**dict(least), baseline=baseline, baselines=gain.baselines)
    without = {arm: said for arm, said in test.predictions.items() if arm not in gain.baselines}
    bare = SplitPredictions(test.labels, test.units, without)
    assert compute_transfer_gain(metric, bare, "lora") is None


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
    ("metric", "test"),
    [(ACCURACY, predicted(head=0.7, lora=0.9, scratch=0.4, classical=0.55)),
     (RMSE, numbers(head=0.7, lora=0.3, scratch=2.0, classical=1.2))],
    ids=["accuracy", "rmse"],
)  # fmt: skip
def test_ladder_has_the_best_on_test_first(metric: Metric, test: SplitPredictions) -> None:
    rows = build_ladder(metric, score_arms(metric, test), test, "lora")
    assert [row["arm"] for row in rows] == ["lora", "head", "classical", "scratch"]
    assert rows[0]["gain_of_own"] is None
    for row in rows:
        scores = [metric.score(test.labels, p) for p in test.predictions[row["arm"]]]
        assert row["test"] == pytest.approx(np.mean(scores))
        assert row["sd"] == pytest.approx(np.std(scores, ddof=1))
    for row in rows[1:]:
        assert row.gain_of_own == compute_gain(metric, test, "lora", row["arm"])


@pytest.mark.parametrize(
    ("wrong", "best"), [([3, 1, 2], 1), ([2, 1, 1], 1), ([0, 0, 0], 0), ([4, 4, 0], 2)]
)
def test_best_seed_is_the_first_of_equals(wrong: list[int], best: int) -> None:
    labels = np.zeros(5, int)
    predictions = np.array([[1] * n + [0] * (5 - n) for n in wrong])
    test = SplitPredictions(labels, np.arange(5), {"lora": predictions})
    assert find_best_seed(ACCURACY, score_arms(ACCURACY, test), "lora") == best
    as_numbers = SplitPredictions(
        labels.astype(float), test.units, {"lora": predictions.astype(float)}
    )
    assert find_best_seed(RMSE, score_arms(RMSE, as_numbers), "lora") == best


def test_margin_of_an_error_is_a_share_of_it() -> None:
    """An rmse of 0.002 against 0.004 is half the error, however small the label's unit."""
    draw = np.random.default_rng(0)
    labels, noise = draw.normal(size=200) * 0.01, draw.normal(size=(2, 200))
    arms = {"own": labels + 0.002 * noise, "other": labels + 0.004 * noise}
    gain = compute_gain(RMSE, SplitPredictions(labels, np.arange(200), arms), "own", "other")
    assert abs(gain["value"]) < MARGIN and gain["outcome"] == "positive"


@pytest.mark.parametrize(("rows", "outcome"), [(48, "undetermined"), (2000, "equivalent")])
def test_arms_that_never_differ_are_not_known_to_be_equal(rows: int, outcome: str) -> None:
    """48 of 48 right in both arms still allows some percent of difference."""
    labels = np.arange(rows) % 2
    right = np.tile(labels, (3, 1))
    test = SplitPredictions(labels, np.arange(rows), {"own": right, "other": right})
    gain = compute_gain(ACCURACY, test, "own", "other")
    assert gain["ci95"] == pytest.approx([-3 / rows, 3 / rows])
    assert gain["outcome"] == outcome
