"""Build the card's metadata: what the hub sorts, links and filters by. Unknown is left out.

Also writes results in the formats of leaderboards: the hub's `.eval_results` and Every Eval Ever.
"""

import json
import math
import re
import time
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from hftl.card.markdown import slugify, to_one_line
from hftl.card.wording import find_pipeline_tag, find_public_base, is_pooled
from hftl.config.data import Table
from hftl.config.publish import Benchmark
from hftl.measure.metrics import describe_metric
from hftl.measure.record import Record
from hftl.runtime.paths import TABLE_FORMATS
from hftl.runtime.run_folder import to_json

GENERIC_NAMES = ("data", "dataset", "train", "images", "rows")
"""Last names of paths that say nothing; the one before does."""


class License(TypedDict):
    """Hold the license in the keys of the metadata."""

    license: str | None
    license_name: str | None
    license_link: str | None


class Origin(License):
    """Hold what a model comes from, in the keys of the metadata."""

    base_model: str | None
    base_model_relation: Literal["adapter", "finetune"] | None
    base_model_revision: str | None
    datasets: list[str] | None
    language: str | list[str] | None


class _EvalDataset(TypedDict):
    task_type: str
    dataset_type: str
    dataset_name: str
    dataset_config: str | None
    dataset_revision: str | None
    dataset_split: str


class _Emissions(TypedDict):
    emissions: float
    source: str
    training_type: str
    geographical_location: str | None
    hardware_used: str


def build_metadata(record: Record) -> ModelCardData:
    """Return the metadata of a model with a task, its scores and its gain among them."""
    is_adapter = record.recipe.finetune.spec.trains_adapter
    return ModelCardData(
        library_name=_library_name(record),
        # The task that the model is for. transformers alone would give a pooled model an untrained
        # head; it asks the library's name before it takes this for a pipeline of its own.
        pipeline_tag=find_pipeline_tag(record),
        tags=[
            "hftl",
            "transfer-learning",
            str(record.own_arm),
            *(["domain-adaptation"] if record.adapt else []),
            *build_adapter_tags(record, is_adapter),
        ],
        metrics=[_metric_id(str(record.metric))],
        model_name=format_title(record),
        eval_results=_build_eval_results(record),
        widget=_build_widget(record),
        co2_eq_emissions=_build_emissions(record),
        **build_origin(record, is_adapter),
    )


def _library_name(record: Record) -> str:
    """Return what loads the model with its head; transformers has no class for a pooled one."""
    if record.recipe.finetune.spec.trains_adapter:
        return "peft"
    return "hftl" if is_pooled(record) else "transformers"


def build_origin(record: Record, adapter: bool) -> Origin:
    """Return base, datasets, language and license, as far as they are known."""
    base, revision = find_public_base(record)
    relation: Literal["adapter", "finetune"] = "adapter" if adapter else "finetune"
    return {
        "base_model": base,
        "base_model_relation": relation if base else None,
        "base_model_revision": revision if base else None,
        "datasets": list_hub_datasets(record) or None,
        "language": record.recipe.publish.language,
        **find_license(record),
    }


def find_license(record: Record) -> License:
    """Return the license's keys: what the push was given wins over the recipe."""
    publish = record.recipe.publish
    pushed = record.published and record.published.license
    if pushed is not None and pushed != publish.license:
        return {"license": pushed, "license_name": None, "license_link": None}
    return {
        "license": publish.license,
        "license_name": publish.license_name,
        "license_link": publish.license_link,
    }


def build_adapter_tags(record: Record, adapter: bool) -> list[str]:
    """Return the tag that peft writes and inference providers match an adapter's base by."""
    base, _ = find_public_base(record)
    return [f"base_model:adapter:{base}"] if adapter and base else []


def list_hub_datasets(record: Record) -> list[str]:
    """Return the hub ids among the tables that the model was trained or measured on."""
    names = ["train", "validation", "test", "unlabeled"]
    # General data teach only where something is retained.
    names += ["general"] if record.recipe.retain else []
    tables = {name: getattr(record.recipe.data, name) for name in names}
    ids = [tables[name].path for name in names if name in record.data.hub_revisions]
    return list(dict.fromkeys(ids))


def format_title(record: Record) -> str:
    """Return a name for the model: its source, its data, its strategy."""
    base = record.source.name.rsplit("/", 1)[-1]
    parts = [
        Path(part).stem if Path(part).suffix in TABLE_FORMATS else part
        for part in record.data.name.split("/")
        if part
    ]
    named = [part for part in parts if part not in GENERIC_NAMES]
    data = (named or parts or ["data"])[-1]
    return f"{slugify(base)}-{slugify(data)}-{record.own_arm}"


def _build_eval_results(record: Record) -> list[EvalResult]:
    scores = {str(record.metric): record.own_row.test, **(record.test_metrics or {})}
    common = _describe_eval_dataset(record)
    results = [
        EvalResult(metric_type=_metric_id(name), metric_value=round(value, 4),
                   metric_name=f"test {name}, mean over seeds", **common)
        for name, value in scores.items()
        if value is not None
    ]  # fmt: skip
    gain = record.transfer_gain
    if gain is not None:
        keys = ("metric", "baseline", "seeds", "ci95", "p_value", "outcome")
        facts = gain.to_dict()
        results.append(
            EvalResult(metric_type="transfer_gain", metric_value=round(gain.value, 4),
                       metric_name="Transfer gain", metric_args={k: facts[k] for k in keys},
                       **common)
        )  # fmt: skip
    return results


def _describe_eval_dataset(record: Record) -> _EvalDataset:
    """Return the dataset as the hub wants it; a local one by its own name."""
    data = record.data
    name = "test" if "test" in data.hub_revisions else "train"
    revision = data.hub_revisions.get(name)
    table = getattr(record.recipe.data, name)
    public = bool(revision) and isinstance(table, Table)
    return {
        "task_type": find_pipeline_tag(record),
        "dataset_type": table.path if public else slugify(data.name),
        "dataset_name": to_one_line(data.name),
        "dataset_config": table.name if public else None,
        "dataset_revision": revision,
        "dataset_split": "test",
    }


def _build_widget(record: Record) -> list[dict[str, object]] | None:
    """Return the examples with outputs, which the hub shows as they are."""
    if not record.widget:
        return None
    return [example.to_dict() for example in record.widget]


def _build_emissions(record: Record) -> _Emissions | None:
    """Return the emissions; None where they are not known."""
    grams, stated = record.environment.co2_grams, record.recipe.publish.emissions
    if grams is None or stated is None:
        return None
    return {
        "emissions": float(f"{grams:.4g}"),
        "source": "the energy of all arms and seeds by codecarbon, times "
        f"{stated.grams_per_kwh:g} g per kWh",
        "training_type": "fine-tuning",
        "geographical_location": stated.location,
        "hardware_used": record.environment.device,
    }


def _metric_id(name: str) -> str:
    return name.removeprefix("evaluate:")


# Results in the formats of leaderboards.


EVAL_RESULTS_FOLDER = ".eval_results"
"""Others may add files to it, so ours begin with `hftl-`."""
EVERY_EVAL_EVER_FILE = "every_eval_ever.json"
EVERY_EVAL_EVER_VERSION = "0.3.0"
"""Its schema holds intervals; the hub's format has no key for one."""


# The keys of Every Eval Ever's schema.


class _SourceData(TypedDict):
    dataset_name: str
    source_type: str
    hf_repo: str
    hf_split: str
    samples_number: int


class _MetricConfig(TypedDict):
    metric_id: str
    metric_name: str
    lower_is_better: bool
    score_type: str
    min_score: float | str
    max_score: float | str


class _Interval(TypedDict):
    lower: float
    upper: float
    confidence_level: float
    method: str


class _Uncertainty(TypedDict):
    confidence_interval: _Interval
    num_samples: int


class _Score(TypedDict):
    score: float
    details: dict[str, str]
    uncertainty: NotRequired[_Uncertainty]


class _Result(TypedDict):
    evaluation_name: str
    source_data: _SourceData
    metric_config: _MetricConfig
    score_details: _Score


def find_first_timestamp(folder: Path) -> str:
    """Return when a folder got its benchmark files, in seconds since 1970: before, or now."""
    path = folder / EVERY_EVAL_EVER_FILE
    if not path.exists():
        return str(int(time.time()))
    return json.loads(path.read_text(encoding="utf-8"))["retrieved_timestamp"]


def build_benchmark_files(record: Record, timestamp: str) -> dict[str, str]:
    """Return the files by their paths in the publish folder; none without a benchmark.

    Args:
        record: the publishable record.
        timestamp: seconds since 1970 of when the files were made first, as text.
    """
    benchmark = record.recipe.publish.benchmark
    if benchmark is None:
        return {}
    name = re.sub(r"[^\w.-]+", "-", benchmark.dataset)
    entries = eval_result_entries_to_yaml([_build_hub_result(record, benchmark)])
    results = _format_every_eval_ever(record, benchmark, timestamp)
    return {
        f"{EVAL_RESULTS_FOLDER}/hftl-{name}.yaml": yaml.safe_dump(
            entries, sort_keys=False, allow_unicode=True
        ),
        EVERY_EVAL_EVER_FILE: results,
    }


def _build_hub_result(record: Record, benchmark: Benchmark) -> EvalResultEntry:
    seeds = len(record.recipe.measure.seeds)
    return EvalResultEntry(
        dataset_id=benchmark.dataset,
        task_id=benchmark.task_id,
        value=round(record.own_row.test, 4),
        dataset_revision=record.data.hub_revisions.get("test"),
        notes=f"test {record.metric}, mean over {seeds} seeds",
    )


def _format_every_eval_ever(record: Record, benchmark: Benchmark, timestamp: str) -> str:
    name = format_title(record)
    model = record.published.repo_id if record.published else name
    results = [_build_score_result(record, benchmark)]
    if record.transfer_gain is not None:
        results.append(_build_gain_result(record, benchmark))
    details = {"deployment_type": "self_deployed", "model_availability": "open_weights"}
    if record.source.published_as:
        details["base_model"] = record.source.published_as
    owner = model.split("/")[0] if "/" in model else "unknown"
    return to_json({
        "schema_version": EVERY_EVAL_EVER_VERSION,
        "evaluation_id": f"{benchmark.dataset}/{model}/{timestamp}",
        "retrieved_timestamp": timestamp,
        "source_metadata": {
            "source_name": "hftl", "source_type": "evaluation_run",
            "source_organization_name": owner, "evaluator_relationship": "first_party",
        },
        "eval_library": {"name": "hftl", "version": record.environment.packages["hftl"]},
        "model_info": {"name": name, "id": model, "additional_details": details},
        "evaluation_results": results,
    })  # fmt: skip


def _build_score_result(record: Record, benchmark: Benchmark) -> _Result:
    """Return the mean over seeds; its spread over seeds goes to the details."""
    row = record.own_row
    metric = describe_metric(str(record.metric))
    details = {"seeds": str(len(record.recipe.measure.seeds))}
    if row.sd is not None:
        details["standard_deviation_over_seeds"] = f"{row.sd:.6g}"
    return {
        "evaluation_name": benchmark.task_id,
        "source_data": _build_source_data(record, benchmark),
        "metric_config": {
            "metric_id": _metric_id(metric.name), "metric_name": metric.name,
            "lower_is_better": metric.lower_is_better, "score_type": "continuous",
            "min_score": _format_bound(metric.minimum), "max_score": _format_bound(metric.maximum),
        },
        "score_details": {"score": row.test, "details": details},
    }  # fmt: skip


def _format_bound(bound: float) -> float | str:
    """Return a bound as the format has it: a number, or a word where there is none."""
    if math.isfinite(bound):
        return bound
    return "Infinity" if bound > 0 else "-Infinity"


def _build_gain_result(record: Record, benchmark: Benchmark) -> _Result:
    """Return the transfer gain with its interval."""
    gain = record.transfer_gain
    assert gain is not None
    score: _Score = {
        "score": gain.value,
        "details": {"baseline": gain.baseline, "outcome": gain.outcome},
    }
    if gain.ci95 is not None:
        score["uncertainty"] = {
            "confidence_interval": {
                "lower": gain.ci95[0], "upper": gain.ci95[1], "confidence_level": 0.95,
                "method": "two-way (seed x item) variance components",
            },
            "num_samples": record.data.splits["test"],
        }  # fmt: skip
    return {
        "evaluation_name": f"{benchmark.task_id}, gain over {gain.baseline}",
        "source_data": _build_source_data(record, benchmark),
        "metric_config": {
            "metric_id": "hftl.transfer_gain", "metric_name": f"gain in {gain.metric}",
            "lower_is_better": False, "score_type": "continuous",
            "min_score": _format_bound(-math.inf), "max_score": _format_bound(math.inf),
        },
        "score_details": score,
    }  # fmt: skip


def _build_source_data(record: Record, benchmark: Benchmark) -> _SourceData:
    return {
        "dataset_name": benchmark.dataset.rsplit("/", 1)[-1],
        "source_type": "hf_dataset",
        "hf_repo": benchmark.dataset,
        "hf_split": "test",
        "samples_number": record.data.splits["test"],
    }
