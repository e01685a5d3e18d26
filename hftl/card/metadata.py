"""The card's metadata: what the hub sorts, links and filters by. Unknown is left out."""

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hftl.card.kinds import is_pooled, pipeline_tag
from hftl.card.plain import one_line, slug
from hftl.card.valid import is_hub_id

TABLE_SUFFIX = re.compile(r"\.(csv|tsv|jsonl?|ndjson|parquet|txt)$")
NO_NAME = ("data", "dataset", "train", "images", "rows")
"""Last names of places that say nothing; the one before does."""
LICENSE_KEYS = ("license", "license_name", "license_link")
TABLES = ("train", "validation", "test", "unlabeled", "general")


def metadata(record: dict[str, Any]) -> ModelCardData:
    """The metadata of a model with a task, its scores and its gain among them."""
    own = record["own_arm"]
    return ModelCardData(
        library_name=_library(record),
        pipeline_tag="feature-extraction" if is_pooled(record) else pipeline_tag(record),
        tags=[
            "hftl",
            "transfer-learning",
            own,
            *(["domain-adaptation"] if record["adapt"] else []),
            *adapter_tags(record, own == "lora"),
        ],
        metrics=[_metric_id(record["metric"])],
        model_name=title(record),
        eval_results=_eval_results(record),
        widget=_widget(record),
        co2_eq_emissions=_emissions(record),
        **origin(record, own == "lora"),
    )


def _library(record: dict[str, Any]) -> str:
    """Return what loads the model with its answers; transformers has no class for a pooled one."""
    if record["own_arm"] == "lora":
        return "peft"
    return "hftl" if is_pooled(record) else "transformers"


def origin(record: dict[str, Any], adapter: bool) -> dict[str, Any]:
    """What it comes from and may be used under, as far as it is known."""
    base, revision = base_of(record)
    known: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": base and ("adapter" if adapter else "finetune"),
        "base_model_revision": base and revision,
        "datasets": hub_datasets(record) or None,
    }
    known["language"] = record["recipe"]["publish"].get("language")
    return known | license_of(record)


def license_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the license's keys: what the push was given wins over the recipe."""
    stated = {k: record["recipe"]["publish"].get(k) for k in LICENSE_KEYS}
    given = (record.get("published") or {}).get("license")
    if given is None or given == stated["license"]:
        return stated
    return dict.fromkeys(LICENSE_KEYS) | {"license": given}


def adapter_tags(record: dict[str, Any], adapter: bool) -> list[str]:
    """Return the tag that peft writes and inference providers match an adapter's base by."""
    base, _ = base_of(record)
    return [f"base_model:adapter:{base}"] if adapter and base else []


def base_of(record: dict[str, Any]) -> tuple[str | None, str | None]:
    """The public id and the commit of what the published model goes on or comes from.

    Where the run has adapted a base of its own, that is the base, once it is published.
    """
    ours = (record["adapt"] or {}).get("base")
    source = ours or record["source"]
    name = source.get("published_as")
    if not name or not is_hub_id(name):
        return None, None
    return name, source.get("revision")


def hub_datasets(record: dict[str, Any]) -> list[str]:
    """The hub ids among the tables that it learnt from or was measured on."""
    tables, known = record["recipe"]["data"], record["data"]["hub_revisions"]
    # General data teach only where something is retained.
    names = TABLES if record["recipe"]["retain"] else TABLES[:-1]
    ids = [tables[name]["path"] for name in names if name in known]
    return list(dict.fromkeys(ids))


def title(record: dict[str, Any]) -> str:
    """A name for the model: its source, its data, its strategy."""
    base = record["source"]["name"].rsplit("/", 1)[-1]
    parts = [TABLE_SUFFIX.sub("", part) for part in record["data"]["name"].split("/") if part]
    named = [part for part in parts if part not in NO_NAME]
    data = (named or parts or ["data"])[-1]
    return f"{slug(base)}-{slug(data)}-{record['own_arm']}"


def _eval_results(record: dict[str, Any]) -> list[EvalResult]:
    own = next(row for row in record["ladder"] if row["arm"] == record["own_arm"])
    scores = {record["metric"]: own["test"], **(record.get("test_metrics") or {})}
    common = _measured_on(record)
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


def _measured_on(record: dict[str, Any]) -> dict[str, Any]:
    """The dataset as the hub wants it; a local one by its own name."""
    data, tables = record["data"], record["recipe"]["data"]
    name = "test" if "test" in data["hub_revisions"] else "train"
    revision = data["hub_revisions"].get(name)
    table = tables[name]
    return {
        "task_type": pipeline_tag(record),
        "dataset_type": table["path"] if revision else slug(data["name"]),
        "dataset_name": one_line(data["name"]),
        "dataset_config": table["name"] if revision else None,
        "dataset_revision": revision,
        "dataset_split": "test",
    }


def _widget(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the examples with outputs; none where the Hub's task is one of features."""
    return None if is_pooled(record) else record.get("widget") or None


def _emissions(record: dict[str, Any]) -> dict[str, Any] | None:
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
