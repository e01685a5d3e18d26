"""Results in the formats that leaderboards read: the Hub's `.eval_results` and Every Eval Ever."""

import re
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from hftl.card.metadata import title
from hftl.metrics import less_is_better
from hftl.record import to_json

FOLDER = ".eval_results"
"""Others may add files to it, so ours begin with `hftl-`."""
EVERY_EVAL = "every_eval_ever.json"
SCHEMA_VERSION = "0.3.0"
"""Of Every Eval Ever, whose schema holds intervals; the Hub's format has no place for one."""
UNBOUNDED = "Infinity"
FRACTIONS = ("accuracy", "balanced_accuracy", "f1", "macro_f1", "micro_f1", "precision", "recall")
"""Metrics between 0 and 1."""


def benchmark_files(record: dict[str, Any], timestamp: str) -> dict[str, str]:
    """Return the files by their paths in the publish folder; none without a benchmark.

    Args:
        record: the publishable record.
        timestamp: seconds since 1970 of when the files were made first, as text.
    """
    benchmark = record["recipe"]["publish"].get("benchmark")
    if benchmark is None:
        return {}
    name = re.sub(r"[^\w.-]+", "-", benchmark["dataset"])
    entries = yaml.safe_dump(_entries(record, benchmark), sort_keys=False, allow_unicode=True)
    every_eval = to_json(_every_eval(record, benchmark, timestamp))
    return {f"{FOLDER}/hftl-{name}.yaml": entries, EVERY_EVAL: every_eval}


def _entries(record: dict[str, Any], benchmark: dict[str, str]) -> list[dict[str, Any]]:
    seeds = len(record["recipe"]["measure"]["seeds"])
    entry = EvalResultEntry(
        dataset_id=benchmark["dataset"],
        task_id=benchmark["task_id"],
        value=round(_own_row(record)["test"], 4),
        dataset_revision=record["data"]["hub_revisions"].get("test"),
        notes=f"test {record['metric']}, mean over {seeds} seeds",
    )
    return eval_result_entries_to_yaml([entry])


def _every_eval(
    record: dict[str, Any], benchmark: dict[str, str], timestamp: str
) -> dict[str, Any]:
    name = title(record)
    model = (record.get("published") or {}).get("repo_id") or name
    gain = record["transfer_gain"]
    results = [_score(record, benchmark), *([] if gain is None else [_gain(record, benchmark)])]
    details = {"deployment_type": "self_deployed", "model_availability": "open_weights"}
    if record["source"]["published_as"]:
        details["base_model"] = record["source"]["published_as"]
    owner = model.split("/")[0] if "/" in model else "unknown"
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": f"{benchmark['dataset']}/{model}/{timestamp}",
        "retrieved_timestamp": timestamp,
        "source_metadata": {
            "source_name": "hftl", "source_type": "evaluation_run",
            "source_organization_name": owner, "evaluator_relationship": "first_party",
        },
        "eval_library": {"name": "hftl", "version": record["environment"]["packages"]["hftl"]},
        "model_info": {"name": name, "id": model, "additional_details": details},
        "evaluation_results": results,
    }  # fmt: skip


def _score(record: dict[str, Any], benchmark: dict[str, str]) -> dict[str, Any]:
    """Return the mean over seeds; its spread over seeds goes to the details."""
    row = _own_row(record)
    metric = record["metric"]
    error = less_is_better(metric)
    fraction = metric in FRACTIONS
    bounds = {
        "min_score": 0.0 if error or fraction else f"-{UNBOUNDED}",
        "max_score": 1.0 if fraction else UNBOUNDED,
    }
    details = {"seeds": str(len(record["recipe"]["measure"]["seeds"]))}
    if row["sd"] is not None:
        details["standard_deviation_over_seeds"] = f"{row['sd']:.6g}"
    return {
        "evaluation_name": benchmark["task_id"],
        "source_data": _source(record, benchmark),
        "metric_config": {
            "metric_id": metric.removeprefix("evaluate:"), "metric_name": metric,
            "lower_is_better": error, "score_type": "continuous", **bounds,
        },
        "score_details": {"score": row["test"], "details": details},
    }  # fmt: skip


def _gain(record: dict[str, Any], benchmark: dict[str, str]) -> dict[str, Any]:
    """Return the transfer gain with its interval."""
    gain = record["transfer_gain"]
    score: dict[str, Any] = {
        "score": gain["value"],
        "details": {"baseline": gain["baseline"], "outcome": gain["outcome"]},
    }
    if gain["ci95"] is not None:
        score["uncertainty"] = {
            "confidence_interval": {
                "lower": gain["ci95"][0], "upper": gain["ci95"][1], "confidence_level": 0.95,
                "method": "two-way (seed x item) variance components",
            },
            "num_samples": record["data"]["splits"]["test"],
        }  # fmt: skip
    return {
        "evaluation_name": f"{benchmark['task_id']}, gain over {gain['baseline']}",
        "source_data": _source(record, benchmark),
        "metric_config": {
            "metric_id": "hftl.transfer_gain", "metric_name": f"gain in {gain['metric']}",
            "lower_is_better": False, "score_type": "continuous",
            "min_score": f"-{UNBOUNDED}", "max_score": UNBOUNDED,
        },
        "score_details": score,
    }  # fmt: skip


def _source(record: dict[str, Any], benchmark: dict[str, str]) -> dict[str, Any]:
    return {
        "dataset_name": benchmark["dataset"].rsplit("/", 1)[-1],
        "source_type": "hf_dataset",
        "hf_repo": benchmark["dataset"],
        "hf_split": "test",
        "samples_number": record["data"]["splits"]["test"],
    }


def _own_row(record: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in record["ladder"] if row["arm"] == record["own_arm"])
