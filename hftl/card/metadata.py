"""The card's metadata: what the hub sorts, links and filters by. Unknown is left out."""

import re
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from hftl.card.validation import is_hub_id
from hftl.card.wording import find_pipeline_tag, is_pooled, slugify, to_one_line
from hftl.measure.metrics import is_lower_better
from hftl.runtime.fingerprints import to_json

TABLE_SUFFIX = re.compile(r"\.(csv|tsv|jsonl?|ndjson|parquet|txt)$")
GENERIC_NAMES = ("data", "dataset", "train", "images", "rows")
"""Last names of places that say nothing; the one before does."""
LICENSE_KEYS = ("license", "license_name", "license_link")
TABLES = ("train", "validation", "test", "unlabeled", "general")


def build_metadata(record: dict[str, Any]) -> ModelCardData:
    """The metadata of a model with a task, its scores and its gain among them."""
    own = record["own_arm"]
    return ModelCardData(
        library_name=_library_name(record),
        pipeline_tag="feature-extraction" if is_pooled(record) else find_pipeline_tag(record),
        tags=[
            "hftl",
            "transfer-learning",
            own,
            *(["domain-adaptation"] if record["adapt"] else []),
            *build_adapter_tags(record, own == "lora"),
        ],
        metrics=[_metric_id(record["metric"])],
        model_name=format_title(record),
        eval_results=_build_eval_results(record),
        widget=_build_widget(record),
        co2_eq_emissions=_build_emissions(record),
        **build_origin(record, own == "lora"),
    )


def _library_name(record: dict[str, Any]) -> str:
    """Return what loads the model with its answers; transformers has no class for a pooled one."""
    if record["own_arm"] == "lora":
        return "peft"
    return "hftl" if is_pooled(record) else "transformers"


def build_origin(record: dict[str, Any], adapter: bool) -> dict[str, Any]:
    """What it comes from and may be used under, as far as it is known."""
    base, revision = find_public_base(record)
    known: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": base and ("adapter" if adapter else "finetune"),
        "base_model_revision": base and revision,
        "datasets": list_hub_datasets(record) or None,
    }
    known["language"] = record["recipe"]["publish"].get("language")
    return known | find_license(record)


def find_license(record: dict[str, Any]) -> dict[str, Any]:
    """Return the license's keys: what the push was given wins over the recipe."""
    stated = {k: record["recipe"]["publish"].get(k) for k in LICENSE_KEYS}
    given = (record.get("published") or {}).get("license")
    if given is None or given == stated["license"]:
        return stated
    return dict.fromkeys(LICENSE_KEYS) | {"license": given}


def build_adapter_tags(record: dict[str, Any], adapter: bool) -> list[str]:
    """Return the tag that peft writes and inference providers match an adapter's base by."""
    base, _ = find_public_base(record)
    return [f"base_model:adapter:{base}"] if adapter and base else []


def find_public_base(record: dict[str, Any]) -> tuple[str | None, str | None]:
    """The public id and the commit of what the published model goes on or comes from.

    Where the run has adapted a base of its own, that is the base, once it is published.
    """
    ours = (record["adapt"] or {}).get("base")
    source = ours or record["source"]
    name = source.get("published_as")
    if not name or not is_hub_id(name):
        return None, None
    return name, source.get("revision")


def list_hub_datasets(record: dict[str, Any]) -> list[str]:
    """The hub ids among the tables that it learnt from or was measured on."""
    tables, known = record["recipe"]["data"], record["data"]["hub_revisions"]
    # General data teach only where something is retained.
    names = TABLES if record["recipe"]["retain"] else TABLES[:-1]
    ids = [tables[name]["path"] for name in names if name in known]
    return list(dict.fromkeys(ids))


def format_title(record: dict[str, Any]) -> str:
    """A name for the model: its source, its data, its strategy."""
    base = record["source"]["name"].rsplit("/", 1)[-1]
    parts = [TABLE_SUFFIX.sub("", part) for part in record["data"]["name"].split("/") if part]
    named = [part for part in parts if part not in GENERIC_NAMES]
    data = (named or parts or ["data"])[-1]
    return f"{slugify(base)}-{slugify(data)}-{record['own_arm']}"


def _build_eval_results(record: dict[str, Any]) -> list[EvalResult]:
    own = next(row for row in record["ladder"] if row["arm"] == record["own_arm"])
    scores = {record["metric"]: own["test"], **(record.get("test_metrics") or {})}
    common = _describe_eval_dataset(record)
    results = [
        EvalResult(metric_type=_metric_id(name), metric_value=round(value, 4),
                   metric_name=f"test {name}, mean over seeds", **common)
        for name, value in scores.items()
    ]  # fmt: skip
    gain = record["transfer_gain"]
    if gain is not None:
        told = {k: gain[k] for k in ("metric", "baseline", "seeds", "ci95", "p_value", "outcome")}
        results.append(
            EvalResult(metric_type="transfer_gain", metric_value=round(gain["value"], 4),
                       metric_name="Transfer gain", metric_args=told, **common)
        )  # fmt: skip
    return results


def _describe_eval_dataset(record: dict[str, Any]) -> dict[str, Any]:
    """The dataset as the hub wants it; a local one by its own name."""
    data, tables = record["data"], record["recipe"]["data"]
    name = "test" if "test" in data["hub_revisions"] else "train"
    revision = data["hub_revisions"].get(name)
    table = tables[name]
    return {
        "task_type": find_pipeline_tag(record),
        "dataset_type": table["path"] if revision else slugify(data["name"]),
        "dataset_name": to_one_line(data["name"]),
        "dataset_config": table["name"] if revision else None,
        "dataset_revision": revision,
        "dataset_split": "test",
    }


def _build_widget(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the examples with outputs; none where the Hub's task is one of features."""
    return None if is_pooled(record) else record.get("widget") or None


def _build_emissions(record: dict[str, Any]) -> dict[str, Any] | None:
    """Return the emissions in grams, as the Hub reads them; None where they are not known."""
    grams = record["environment"].get("co2_grams")
    stated = record["recipe"]["publish"].get("emissions")
    if grams is None or stated is None:
        return None
    return {
        "emissions": float(f"{grams:.4g}"),
        "source": "the energy of all arms and seeds by codecarbon, times "
        f"{stated['grams_per_kwh']:g} g per kWh",
        "training_type": "fine-tuning",
        "geographical_location": stated["location"],
        "hardware_used": record["environment"]["device"],
    }


def _metric_id(name: str) -> str:
    return name.removeprefix("evaluate:")


# Results in the formats that leaderboards read: the Hub's `.eval_results` and Every Eval Ever.


EVAL_RESULTS_FOLDER = ".eval_results"
"""Others may add files to it, so ours begin with `hftl-`."""
EVERY_EVAL_EVER_FILE = "every_eval_ever.json"
EVERY_EVAL_EVER_VERSION = "0.3.0"
"""Of Every Eval Ever, whose schema holds intervals; the Hub's format has no place for one."""
UNBOUNDED = "Infinity"
FRACTIONS = ("accuracy", "balanced_accuracy", "f1", "macro_f1", "micro_f1", "precision", "recall")
"""Metrics between 0 and 1."""


def build_benchmark_files(record: dict[str, Any], timestamp: str) -> dict[str, str]:
    """Return the files by their paths in the publish folder; none without a benchmark.

    Args:
        record: the publishable record.
        timestamp: seconds since 1970 of when the files were made first, as text.
    """
    benchmark = record["recipe"]["publish"].get("benchmark")
    if benchmark is None:
        return {}
    name = re.sub(r"[^\w.-]+", "-", benchmark["dataset"])
    entries = yaml.safe_dump(
        _build_hub_results(record, benchmark), sort_keys=False, allow_unicode=True
    )
    every_eval = to_json(_build_every_eval_ever(record, benchmark, timestamp))
    return {f"{EVAL_RESULTS_FOLDER}/hftl-{name}.yaml": entries, EVERY_EVAL_EVER_FILE: every_eval}


def _build_hub_results(record: dict[str, Any], benchmark: dict[str, str]) -> list[dict[str, Any]]:
    seeds = len(record["recipe"]["measure"]["seeds"])
    entry = EvalResultEntry(
        dataset_id=benchmark["dataset"],
        task_id=benchmark["task_id"],
        value=round(_find_own_row(record)["test"], 4),
        dataset_revision=record["data"]["hub_revisions"].get("test"),
        notes=f"test {record['metric']}, mean over {seeds} seeds",
    )
    return eval_result_entries_to_yaml([entry])


def _build_every_eval_ever(
    record: dict[str, Any], benchmark: dict[str, str], timestamp: str
) -> dict[str, Any]:
    name = format_title(record)
    model = (record.get("published") or {}).get("repo_id") or name
    gain = record["transfer_gain"]
    results = [
        _build_score_result(record, benchmark),
        *([] if gain is None else [_build_gain_result(record, benchmark)]),
    ]
    details = {"deployment_type": "self_deployed", "model_availability": "open_weights"}
    if record["source"]["published_as"]:
        details["base_model"] = record["source"]["published_as"]
    owner = model.split("/")[0] if "/" in model else "unknown"
    return {
        "schema_version": EVERY_EVAL_EVER_VERSION,
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


def _build_score_result(record: dict[str, Any], benchmark: dict[str, str]) -> dict[str, Any]:
    """Return the mean over seeds; its spread over seeds goes to the details."""
    row = _find_own_row(record)
    metric = record["metric"]
    error = is_lower_better(metric)
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
        "source_data": _build_source_data(record, benchmark),
        "metric_config": {
            "metric_id": metric.removeprefix("evaluate:"), "metric_name": metric,
            "lower_is_better": error, "score_type": "continuous", **bounds,
        },
        "score_details": {"score": row["test"], "details": details},
    }  # fmt: skip


def _build_gain_result(record: dict[str, Any], benchmark: dict[str, str]) -> dict[str, Any]:
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
        "source_data": _build_source_data(record, benchmark),
        "metric_config": {
            "metric_id": "hftl.transfer_gain", "metric_name": f"gain in {gain['metric']}",
            "lower_is_better": False, "score_type": "continuous",
            "min_score": f"-{UNBOUNDED}", "max_score": UNBOUNDED,
        },
        "score_details": score,
    }  # fmt: skip


def _build_source_data(record: dict[str, Any], benchmark: dict[str, str]) -> dict[str, Any]:
    return {
        "dataset_name": benchmark["dataset"].rsplit("/", 1)[-1],
        "source_type": "hf_dataset",
        "hf_repo": benchmark["dataset"],
        "hf_split": "test",
        "samples_number": record["data"]["splits"]["test"],
    }


def _find_own_row(record: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in record["ladder"] if row["arm"] == record["own_arm"])
