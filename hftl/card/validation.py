"""Check a model card, of anyone's: what the hub would refuse, and what misleads."""

import math
import re
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results
from pydantic import BaseModel, ConfigDict, Field

from hftl.config.publish import (
    BASE_MODEL_RELATIONS,
    LANGUAGE_CODE,
    LICENSES,
    PIPELINE_TAGS,
    REGIONAL_LANGUAGE_CODE,
)
from hftl.config.section import is_hub_id
from hftl.errors import format_error_line

PLACEHOLDER = re.compile(r"\[?more information needed\]?", re.IGNORECASE)
LOCAL_PATH = re.compile(
    r"(?<![\w.:/])(?:/home/|/Users/|/root/|/tmp/)[\w.-]+|\b[A-Za-z]:\\Users\\[\w.-]+"
)
"""A place on somebody's machine; other paths may well stand in a card's code."""


class FrontMatter(BaseModel):
    """Hold the metadata of anybody's card: a value is of any type until it is checked."""

    model_config = ConfigDict(extra="allow", frozen=True)

    base_model: object = None
    base_model_relation: object = None
    datasets: object = None
    license: object = None
    license_name: object = None
    pipeline_tag: object = None
    language: object = None
    library_name: object = None
    tags: object = None
    results: Any = Field(default=None, alias="model-index")


def validate_card(text: str) -> list[str]:
    """Return what is wrong with a card, a sentence each with what to do; empty where it is sound.

    Args:
        text: the whole README.md.
    """
    front, problem = _parse_metadata(text)
    if front is None:
        return [problem]
    checks = (
        _check_base,
        _check_datasets,
        _check_license,
        _check_pipeline_tag,
        _check_language,
        _check_library,
        _check_tags,
        _check_model_index,
    )
    findings = [problem for check in checks for problem in check(front)]
    return findings + _check_text(text)


def _parse_metadata(text: str) -> tuple[FrontMatter | None, str]:
    """Return the metadata; or None and why there are none."""
    block = REGEX_YAML_BLOCK.search(text)
    if block is None:
        return None, "The card has no metadata; begin it with a YAML block between two lines of ---"
    try:
        front = yaml.safe_load(block[2])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # `safe_load` raises ValueError for a date such as 2020-13-45, RecursionError where values
        # are nested too deep.
        first = format_error_line(error)
        return None, f"The metadata are not YAML: {_shorten_value(first)}; quote values with : or #"
    if not isinstance(front, dict) or not all(isinstance(key, str) for key in front):
        return None, "The metadata are no mapping of words; write one `key: value` a line"
    return FrontMatter.model_validate(front), ""


def _check_base(front: FrontMatter) -> list[str]:
    findings = _check_hub_ids(front.base_model, "base_model", "a model")
    relation = front.base_model_relation
    if relation is not None and relation not in BASE_MODEL_RELATIONS:
        known = ", ".join(BASE_MODEL_RELATIONS)
        findings.append(f"base_model_relation is {_shorten_value(relation)}; write one of {known}")
    if front.base_model is None:
        if front.library_name == "peft":
            findings.append("base_model is missing; name the hub id that the adapter goes on")
        elif relation is not None:
            findings.append("base_model_relation stands without base_model; name the base")
    return findings


def _check_datasets(front: FrontMatter) -> list[str]:
    return _check_hub_ids(front.datasets, "datasets", "a dataset")


def _check_hub_ids(values: object, key: str, what: str) -> list[str]:
    """Check that a value, or each of several, is a hub id."""
    return [
        f"{key} is {_shorten_value(value)}, which is no hub id; name {what} on the hub"
        for value in _as_list(values)
        if not (isinstance(value, str) and is_hub_id(value))
    ]


def _check_license(front: FrontMatter) -> list[str]:
    findings = []
    for value in _as_list(front.license):
        if value not in LICENSES:
            findings.append(
                f"license is {_shorten_value(value)}, which the hub does not know; "
                "write an identifier "
                "such as apache-2.0, or other with license_name"
            )
        elif value == "other" and not front.license_name:
            findings.append("license is other and has no name; set license_name and license_link")
    return findings


def _check_pipeline_tag(front: FrontMatter) -> list[str]:
    tag = front.pipeline_tag
    if tag is None or tag in PIPELINE_TAGS:
        return []
    return [f"pipeline_tag is {_shorten_value(tag)}, which is no task of the hub; see hf.co/tasks"]


def _check_language(front: FrontMatter) -> list[str]:
    findings = []
    for value in _as_list(front.language):
        if isinstance(value, bool):
            findings.append('language is read as true or false; quote it, as in "no"')
        elif not isinstance(value, str) or not (
            LANGUAGE_CODE.fullmatch(value) or REGIONAL_LANGUAGE_CODE.fullmatch(value)
        ):
            findings.append(
                f"language is {_shorten_value(value)}; write an ISO 639 code such as en or de"
            )
    return findings


def _check_library(front: FrontMatter) -> list[str]:
    name = front.library_name
    if isinstance(name, str) and re.fullmatch(r"[\w.-]+", name):
        return []
    shown = "missing" if name is None else _shorten_value(name)
    return [f"library_name is {shown}; write peft for an adapter, transformers for a model"]


def _check_tags(front: FrontMatter) -> list[str]:
    findings = []
    for tag in _as_list(front.tags):
        if not isinstance(tag, str):
            findings.append(f"The tag {_shorten_value(tag)} is no text; quote it")
        elif tag.startswith("base_model:") and not _is_base_tag(tag):
            findings.append(f"The tag {_shorten_value(tag)} names no hub id; remove it")
    return findings


def _is_base_tag(tag: str) -> bool:
    return not _check_hub_ids(tag.rsplit(":", 1)[-1], "tag", "")


def _check_model_index(front: FrontMatter) -> list[str]:
    try:
        values = [result.metric_value for result in _parse_results(front)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        # The hub's parser checks no types: KeyError where a key is missing, TypeError and
        # AttributeError where a list or mapping is of another type, ValueError from `EvalResult`.
        return [
            f"model-index does not parse: {_shorten_value(str(error))}; "
            "see hf.co/docs/hub/model-cards"
        ]
    if any(isinstance(value, float) and not math.isfinite(value) for value in values):
        return ["model-index has a value that is no number; leave the metric out"]
    return []


def _parse_results(front: FrontMatter) -> list[EvalResult]:
    """Return the results of the metadata, as the hub reads them."""
    return [] if front.results is None else model_index_to_eval_results(front.results)[1]


def _check_text(text: str) -> list[str]:
    findings = []
    if PLACEHOLDER.search(text):
        findings.append('It says "More information needed"; leave out what is not known')
    home = LOCAL_PATH.search(text)
    if home:
        findings.append(f"It names a place on a machine: {_shorten_value(home[0])}; remove it")
    return findings


def _as_list(value: object) -> list[object]:
    """Return one value or several as a list; empty where there is none."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _shorten_value(value: object) -> str:
    """Return a value for a message: one line, not long, without control characters."""
    shown = repr(value[:200] if isinstance(value, str) else value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
