"""Make records by hand: a whole tree of `record.json`, and its card and report."""

import copy
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hftl.card.card import render_card
from hftl.card.report import ImageLookup, render_report
from hftl.card.validation import validate_card
from hftl.config.recipe import Recipe
from hftl.measure.error_analysis import ErrorAnalysis
from hftl.measure.record import SCHEMA_VERSION, BaselineGain, Gain, Record
from hftl.measure.verdict import VerdictEvidence, decide_verdict

HFTL_KEYS = frozenset(
    """
    base_model base_model_relation base_model_revision library_name pipeline_tag language license
    license_name license_link datasets metrics tags model-index widget co2_eq_emissions
    """.split()
)
"""All that stands in the metadata of a card that hftl writes."""
GAINS: dict[str, dict[str, Any] | None] = {
    "positive": {"value": 0.105, "ci95": [0.071, 0.139]},
    "equivalent": {"value": 0.002, "ci95": [-0.004, 0.008]},
    "negative": {"value": -0.084, "ci95": [-0.121, -0.047]},
    "undetermined": {"value": 0.031, "ci95": [-0.012, 0.074]},
    "one seed": {"value": 0.31, "ci95": None},
    "no baseline": None,
}
PARAMETERS = {
    "lora": 148_226,
    "full": 22_713_986,
    "head": 770,
    "scratch": 22_713_986,
    "classical": 18_412,
}


def make_record(
    case: str = "positive", task: str = "classification", own: str = "lora", **data: Any
) -> dict[str, Any]:
    """Return the tree of a record as `hftl run` writes it, free of local paths."""
    regression = task == "regression"
    metric = "rmse" if regression else "accuracy"
    seeds = [0] if case == "one seed" else [0, 1, 2]
    train = {"path": "reviews.csv", "text": data.pop("text", "text"), "label": "label"}
    recipe = Recipe.parse(
        {
            "source": {"model": "package:some_package/model", "published_as": "org/tiny-MiniLM"},
            "data": {"train": train, "task": task, "shots": 200},
            "finetune": {"strategy": own, "pooling": "mean"},
            "measure": {"metric": metric, "seeds": seeds},
        }
    )
    gain = _make_transfer_gain(case, metric, seeds)
    ladder = _make_ladder(GAINS[case], metric, seeds, own)
    head = next(row["gain_of_own"] for row in ladder if row["arm"] == "head")
    facts = {
        "task": task, "modality": "text", "rows_read": 4000, "bad_rows": 0, "bad_rows_listed": [],
        "hub_revisions": {}, "duplicates": 12, "conflicting": 3, "leaked": 0,
        "labels": [] if regression else ["negative", "positive"], "label_counts": None,
        "splits": {"train": 2391, "validation": 400, "test": 797}, "name": "reviews.csv",
        "labels_read": {"train_per_seed": 400, "total": 2083}, "fingerprint": "0" * 64,
    }  # fmt: skip
    evidence = VerdictEvidence(
        gain=None if gain is None else BaselineGain.model_validate(gain),
        over_head=None if head is None else Gain.model_validate(head),
        reload_difference=2.4e-7,
    )
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": recipe.to_dict(),
        "source": {
            "model": "package:some_package/model", "name": "org/tiny-MiniLM", "local": False,
            "published_as": "org/tiny-MiniLM", "revision": None, "architecture": "bert",
            "weights_sha256": "0" * 64,
        },
        "data": facts | data,
        "check": {"median_tokens": 24, "truncated": 0.0, "unknown_tokens": 0.0, "warnings": []},
        "forward": None,
        "adapt": None,
        "metric": metric,
        "own_arm": own,
        "arms": _make_arms(ladder, metric, seeds),
        "scratch_search": None,
        "ladder": ladder,
        "transfer_gain": gain,
        "forgetting": None,
        "reload_difference": 2.4e-7,
        "verdict": decide_verdict(evidence).to_dict(),
        "published_seed": seeds[-1],
        "environment": {"python": "3.13.1", "platform": "Linux x86_64", "device": "cpu",
                        "dtype": "float32", "packages": {"hftl": "0.1.0", "torch": "2.10.0"}},
        "timings": {},
    }  # fmt: skip


def render(tree: dict[str, Any], place: str = ".") -> str:
    """Return the card of a tree."""
    return render_card(Record.parse(tree), place)


def render_page(
    tree: dict[str, Any], folder: Path, errors: ErrorAnalysis | None = None,
    picture: ImageLookup | None = None,
) -> str:  # fmt: skip
    """Return the report of a tree, whose plots lie under the folder."""
    return render_report(render(tree), folder, Record.parse(tree), errors, picture)


def make_figure(before: float, after: list[float]) -> dict[str, Any]:
    """Return a figure of forgetting, its interval a point either way."""
    mean = sum(after) / len(after)
    change = mean - before
    return {"before": before, "after": mean, "change": change, "per_seed": after,
            "ci95": [change - 0.01, change + 0.01] if len(after) > 1 else None}  # fmt: skip


def add_forgetting(
    record: dict[str, Any], control: str | None = "document", gone: float | None = 0.75
) -> dict[str, Any]:
    """Return the tree of a run with general data and an arm without retention."""
    seeds = len(record["recipe"]["measure"]["seeds"])
    tree = copy.deepcopy(record)
    columns = {"format": None, "text": "text", "label": None}
    tree["recipe"]["data"]["general"] = {"path": "news/nyt.csv", **columns}
    entries: list[dict[str, Any]] = []
    for arm, after in ((record["own_arm"], 0.68), ("head", 0.7)):
        same = make_figure(0.7, [after] * seeds)
        figures: dict[str, Any] = dict.fromkeys(("mlm_loss", "mae_loss", "backward"))
        figures |= {name: make_figure(1.0, [0.91] * seeds) for name in ("neighbours", "cosine")}
        figures |= {"cka": make_figure(1.0, [0.97] * seeds) | {"ci95": None}}
        figures |= {name: make_figure(0.0, [0.123] * seeds) for name in ("kl", "new_kl")}
        probes = {"probe_fixed": make_figure(0.8, [0.75] * seeds), "probe_refitted": None}
        figures["controls"] = {} if control is None else {control: {"same": same, **probes}}
        head = figures["neighbours"] if control is None else same
        forgotten = {"value": -head["change"], "per_seed": [-head["change"]] * seeds,
                     "ci95": head["ci95"] and [-c for c in reversed(head["ci95"])]}  # fmt: skip
        against = {"arm": "head", "gone": gone} if arm != "head" else None
        entries.append({"arm": arm, "figures": figures, "forgotten": forgotten, "against": against})
    tree["forgetting"] = {
        "rows": 670, "new_rows": 797, "documents": "document", "tau": 0.05, "arms": entries,
        "general": {"rows_read": 3901, "known": 2, "documents": "document"},
        "controls": [] if control is None else [{"name": control, "values": 80, "classes": False}],
        "headline": {"figure": "same" if control else "neighbours", "control": control},
        "backward_control": None,
    }  # fmt: skip
    return tree


def make_gain(
    value: float, ci95: list[float] | None, outcome: str = "undetermined",
    metric: str = "accuracy", seeds: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """Return the tree of a gain."""
    return {"metric": metric, "value": value, "ci95": ci95, "seeds": seeds, "p_value": None,
            "relative_error_reduction": 0.263, "outcome": outcome}  # fmt: skip


def _make_transfer_gain(case: str, metric: str, seeds: list[int]) -> dict[str, Any] | None:
    known = GAINS[case]
    if known is None:
        return None
    outcome = "undetermined" if case == "one seed" else case
    gain = make_gain(known["value"], known["ci95"], outcome, metric, len(seeds))
    return gain | {"baseline": "classical", "baselines": {"classical": gain}}


def _make_ladder(
    gain: dict[str, Any] | None, metric: str, seeds: list[int], own: str
) -> list[dict[str, Any]]:
    """Return the own arm, the baselines where there are some, and `head`, the best first."""
    sign = -1 if metric == "rmse" else 1
    score = 0.7254
    gains: dict[str, dict[str, Any]] = {"head": {"value": 0.0213, "ci95": [0.0052, 0.0374]}}
    if gain is not None:
        gains |= {"classical": gain, "scratch": {"value": 0.1834, "ci95": [0.1513, 0.2155]}}
    gains.pop(own, None)
    rows: list[dict[str, Any]] = [
        {"arm": own, "validation": 0.731, "test": score, "gain_of_own": None}
    ]
    for arm, over in gains.items():
        interval = over["ci95"] if len(seeds) > 1 else None
        entry = make_gain(over["value"], interval, metric=metric, seeds=len(seeds))
        test = score - sign * over["value"]
        rows.append({"arm": arm, "validation": 0.6, "test": test, "gain_of_own": entry})
    for row in rows:
        row["sd"] = 0.0112 if len(seeds) > 1 else None
    return sorted(rows, key=lambda row: -sign * row["test"])


def _make_arms(ladder: list[dict[str, Any]], metric: str, seeds: list[int]) -> list[dict[str, Any]]:
    spread = [0.0] if len(seeds) == 1 else [-0.0112, 0.0, 0.0112]
    return [
        {"arm": row["arm"], "seed": seed, "strategy": row["arm"],
         "trainable_parameters": PARAMETERS[row["arm"]], "training": {},
         "metrics": {s: {metric: row[s] + shift} for s in ("validation", "test")}}
        for row in ladder
        for seed, shift in zip(seeds, spread, strict=True)
    ]  # fmt: skip


def validate_own_card(text: str, measured: bool = True) -> list[str]:
    """Return what is wrong with a card that hftl wrote: it holds results, and no other key."""
    findings = validate_card(text)
    if findings:
        return findings
    data = ModelCard(text).data
    strange = sorted(data.to_dict().keys() - HFTL_KEYS)
    findings += [f"the key {key!r} is none that hftl writes" for key in strange]
    if measured and not data.eval_results:
        findings.append("model-index is empty")
    return findings
