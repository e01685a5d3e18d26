"""Our own checks of a model card, of anyone's: what the hub would refuse, and what misleads."""

import math
import re
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from hftl.config.publish import LANGUAGE, LICENSES, PIPELINES, REGION, RELATIONS
from hftl.errors import message_line

OWN_KEYS = frozenset(
    """
    base_model base_model_relation base_model_revision library_name pipeline_tag language license
    license_name license_link datasets metrics tags model-index widget co2_eq_emissions
    """.split()
)
"""All that stands in the metadata of a card that hftl writes."""
PLACEHOLDER = re.compile(r"\[?more information needed\]?", re.IGNORECASE)
HOME = re.compile(r"(?<![\w.:/])(?:/home/|/Users/|/root/|/tmp/)[\w.-]+|\b[A-Za-z]:\\Users\\[\w.-]+")
"""A place on somebody's machine; other paths may well stand in a card's code."""


def card_problems(text: str) -> list[str]:
    """What is wrong with a card, a sentence each with what to do; empty where it is sound.

    Args:
        text: the whole README.md.
    """
    front, problem = _front(text)
    if front is None:
        return [problem]
    checks = (_base, _datasets, _license, _pipeline, _language, _library, _tags, _index)
    found = [problem for check in checks for problem in check(front)]
    return found + _text(text)


def own_card_problems(text: str, measured: bool = True) -> list[str]:
    """The same of a card that hftl wrote, which must also hold results and no key of others.

    Args:
        text: the whole README.md.
        measured: whether the record has scores; an encoder without a task has none.
    """
    found = card_problems(text)
    front, _ = _front(text)
    if front is None:
        return found
    strange = sorted(set(front) - OWN_KEYS)
    if strange:
        found.append(
            f"The metadata have the key {_short(strange[0])}, which hftl does not write; write the "
            "card anew with `hftl card RUN`"
        )
    if measured and not found and not _results(front):
        found.append("model-index is empty; write the card anew with `hftl card RUN`")
    return found


def is_hub_id(text: str) -> bool:
    """Whether the hub may have something of that name; a path on a machine is none."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _front(text: str) -> tuple[dict[str, Any] | None, str]:
    """The metadata; or None and why there are none."""
    block = REGEX_YAML_BLOCK.search(text)
    if block is None:
        return None, "The card has no metadata; begin it with a YAML block between two lines of ---"
    try:
        front = yaml.safe_load(block[2])
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2020-13-45
        first = message_line(error)
        return None, f"The metadata are not YAML: {_short(first)}; quote values with : or #"
    if not isinstance(front, dict) or not all(isinstance(key, str) for key in front):
        return None, "The metadata are no mapping of words; write one `key: value` a line"
    return front, ""


def _base(front: dict[str, Any]) -> list[str]:
    found = _ids(front, "base_model", "a model")
    relation = front.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        known = ", ".join(RELATIONS)
        found.append(f"base_model_relation is {_short(relation)}; write one of {known}")
    if front.get("base_model") is None:
        if front.get("library_name") == "peft":
            found.append("base_model is missing; name the hub id that the adapter goes on")
        elif relation is not None:
            found.append("base_model_relation stands without base_model; name the base")
    return found


def _datasets(front: dict[str, Any]) -> list[str]:
    return _ids(front, "datasets", "a dataset")


def _ids(front: dict[str, Any], key: str, what: str) -> list[str]:
    """Whether every value under a key is a hub id."""
    return [
        f"{key} is {_short(value)}, which is no hub id; name {what} on the hub"
        for value in _listed(front.get(key))
        if not (isinstance(value, str) and is_hub_id(value))
    ]


def _license(front: dict[str, Any]) -> list[str]:
    found = []
    for value in _listed(front.get("license")):
        if value not in LICENSES:
            found.append(
                f"license is {_short(value)}, which the hub does not know; write an identifier "
                "such as apache-2.0, or other with license_name"
            )
        elif value == "other" and not front.get("license_name"):
            found.append("license is other and has no name; set license_name and license_link")
    return found


def _pipeline(front: dict[str, Any]) -> list[str]:
    tag = front.get("pipeline_tag")
    if tag is None or tag in PIPELINES:
        return []
    return [f"pipeline_tag is {_short(tag)}, which is no task of the hub; see hf.co/tasks"]


def _language(front: dict[str, Any]) -> list[str]:
    found = []
    for value in _listed(front.get("language")):
        if isinstance(value, bool):
            found.append('language is read as true or false; quote it, as in "no"')
        elif not isinstance(value, str) or not (
            LANGUAGE.fullmatch(value) or REGION.fullmatch(value)
        ):
            found.append(f"language is {_short(value)}; write an ISO 639 code such as en or de")
    return found


def _library(front: dict[str, Any]) -> list[str]:
    name = front.get("library_name")
    if isinstance(name, str) and re.fullmatch(r"[\w.-]+", name):
        return []
    told = "missing" if name is None else _short(name)
    return [f"library_name is {told}; write peft for an adapter, transformers for a model"]


def _tags(front: dict[str, Any]) -> list[str]:
    found = []
    for tag in _listed(front.get("tags")):
        if not isinstance(tag, str):
            found.append(f"The tag {_short(tag)} is no text; quote it")
        elif tag.startswith("base_model:") and not _names_a_base(tag):
            found.append(f"The tag {_short(tag)} names no hub id; remove it")
    return found


def _names_a_base(tag: str) -> bool:
    return not _ids({"tag": tag.rsplit(":", 1)[-1]}, "tag", "")


def _index(front: dict[str, Any]) -> list[str]:
    try:
        values = [result.metric_value for result in _results(front)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return [f"model-index does not parse: {_short(str(error))}; see hf.co/docs/hub/model-cards"]
    if any(isinstance(value, float) and not math.isfinite(value) for value in values):
        return ["model-index has a value that is no number; leave the metric out"]
    return []


def _results(front: dict[str, Any]) -> list[EvalResult]:
    """The results of the metadata, as the hub reads them."""
    index = front.get("model-index")
    return [] if index is None else model_index_to_eval_results(index)[1]


def _text(text: str) -> list[str]:
    found = []
    if PLACEHOLDER.search(text):
        found.append('It says "More information needed"; leave out what is not known')
    home = HOME.search(text)
    if home:
        found.append(f"It names a place on a machine: {_short(home[0])}; remove it")
    return found


def _listed(value: Any) -> list[Any]:
    """One value or several as a list; none where there is none."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _short(value: Any) -> str:
    """A value as it may stand in a message: one line, not long, nothing a terminal obeys."""
    told = repr(value[:200] if isinstance(value, str) else value)
    return told if len(told) <= 80 else f"{told[:77]}..."
