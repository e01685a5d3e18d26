"""Word what a recipe's value must be, and the refusal of one that is not, in one line.

A refusal names the key, what is expected, what came, and what to do, in words of YAML: the messages
of pydantic, which finds the fault, name its own types and the members of its unions.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from hftl.config.section import NOT_A_NUMBER
from hftl.config.upstream_ranges import Range
from hftl.errors import RecipeError, suggest_closest

TYPE_WORDS = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false",
    list: "a list", tuple: "a list", dict: "a mapping", NoneType: "null",
}  # fmt: skip
MAX_SHOWN = 60
"""Characters of a value that are shown."""


def build_recipe_error(
    error: ValidationError, where: str, model: type[BaseModel], tree: Mapping[str, Any]
) -> RecipeError:
    """Return the first finding as a RecipeError; a misspelt key comes before a missing one.

    Args:
        error: as pydantic raised it.
        where: the file, the arm or the class that the values are of.
        model: the section that was built.
        tree: the values it was built from.
    """
    findings = error.errors(include_url=False)
    first = min(findings, key=lambda finding: finding["type"] != "extra_forbidden")
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, RecipeError):
        return RecipeError(f"{where}: {raised.what}", raised.fix)
    keys = _list_keys(first, tree)
    for other in findings:
        # Each member of a union has a finding: that which is deepest has understood the most.
        others = _list_keys(other, tree)
        if others[: len(keys)] == keys and len(others) > len(keys):
            first, keys = other, others
    return _word_finding(first, where, keys, model)


def describe_type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return in words what a key takes: `a whole number of at least 1, or null`.

    Args:
        annotation: of the key.
        metadata: its bounds, as pydantic keeps them beside the annotation.
    """
    said = next((m.description for m in metadata if isinstance(m, FieldInfo)), None)
    words = [said] if said else list(dict.fromkeys(_iterate_words(annotation, metadata)))
    words = sorted(words, key=lambda word: word.startswith("a list"))  # Its entries follow it.
    if _takes_null(annotation):
        words = [*words, "null"]
    *most, last = words
    comma = "," if any(" " in word for word in most) and len(words) > 2 or last == "null" else ""
    return f"{', '.join(most)}{comma} or {last}" if most else last


def show_value(value: object) -> str:
    """Return a value as YAML has it, on one line, and cut where it is long."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        shown = repr(value)
    else:
        try:
            shown = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
        except yaml.YAMLError:
            shown = repr(value)  # Of Python, which no recipe file holds.
        shown = " ".join(shown.removesuffix("...\n").split())
    return shown if len(shown) <= MAX_SHOWN else f"{shown[: MAX_SHOWN - 3]}..."


def _word_finding(
    finding: ErrorDetails, where: str, keys: list[str | int], model: type[BaseModel]
) -> RecipeError:
    """Return the refusal of one key."""
    if finding["type"] == NOT_A_NUMBER:
        keys = [*keys, finding.get("ctx", {})["name"]]
    key = ".".join(map(str, keys))
    owner, annotation, metadata = _find_field(model, keys)
    expected = describe_type(annotation, metadata)
    match finding["type"]:
        case "extra_forbidden":
            known = [name for section in _list_sections(owner) for name in section.model_fields]
            prefix = "".join(f"{part}." for part in keys[:-1])
            close = suggest_closest(str(keys[-1]), known, prefix)
            return RecipeError(f"{where}: unknown key '{key}'{close}", f"Known: {', '.join(known)}")
        case "missing":
            return RecipeError(f"{where}: '{key}' is missing", f"Add it: {expected}")
        case "none_required":
            return RecipeError(f"{where}: '{key}' is not built yet", "Remove it or set it to null")
        case "value_error":
            what = finding["msg"].removeprefix("Value error, ")
            return RecipeError(f"{where}: '{key}': {what}", "Correct the recipe")
    value = finding.get("ctx", {}).get("value", finding["input"])
    is_required = any(isinstance(part, FieldInfo) and part.is_required() for part in metadata)
    if value is None and is_required:
        return RecipeError(f"{where}: '{key}' is missing", f"Add it: {expected}")
    what = f"{where}: '{key}' must be {expected}, got {show_value(value)}"
    return RecipeError(
        what + _suggest_choice(value, annotation), _choose_fix(key, value, annotation)
    )


def _suggest_choice(value: object, annotation: Any) -> str:
    """Return `; did you mean 'lora'?` where a word is nearly one of the choices."""
    choices = [choice for choice in _iterate_choices(annotation) if isinstance(choice, str)]
    return suggest_closest(value, choices) if isinstance(value, str) and choices else ""


def _choose_fix(key: str, value: object, annotation: Any) -> str:
    """Return what to do about a value of the wrong kind."""
    members = _list_members(annotation)
    lists = [member for member in members if get_origin(member) is list]
    if any(_takes_entry(member, value) for member in lists):
        return f"Write {key.rsplit('.', 1)[-1]}: [{value}]"
    if str in members and isinstance(value, bool | int | float):
        return f"Put it in quotes: '{show_value(value)}'"
    names = [name for section in _list_sections(annotation) for name in section.model_fields]
    if names and not isinstance(value, dict):
        return f"Its keys: {', '.join(dict.fromkeys(names))}"
    return "Correct the value"


def _takes_entry(annotation: Any, value: object) -> bool:
    """Return whether a list may hold a value as its only entry."""
    if isinstance(value, bool | list | dict):
        return False
    try:
        TypeAdapter(annotation).validate_python([value])
    except ValidationError:
        return False
    return True


def _list_keys(finding: ErrorDetails, tree: Mapping[str, Any]) -> list[str | int]:
    """Return where a finding is, without the parts that name a member of a union of pydantic's."""
    keys: list[str | int] = []
    here: Any = tree
    for number, part in enumerate(finding["loc"]):
        is_absent = finding["type"] == "missing" and number == len(finding["loc"]) - 1
        if is_absent or _has_key(here, part):
            keys.append(part)
            here = None if is_absent else here[part]
    return keys


def _has_key(value: object, part: str | int) -> bool:
    if isinstance(value, Mapping):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def _find_field(model: type[BaseModel], keys: Sequence[str | int]) -> tuple[Any, Any, list[Any]]:
    """Return the annotation that holds the last key, and that key's own with its metadata."""
    owner: Any = model
    annotation: Any = model
    metadata: list[Any] = []
    for key in keys:
        owner = annotation
        annotation, metadata = _descend(owner, key)
    return owner, annotation, metadata


def _descend(annotation: Any, key: str | int) -> tuple[Any, list[Any]]:
    """Return the annotation and the metadata of a key inside a value; Any where it has none."""
    for member in _list_members(annotation):
        if _is_section(member):
            field = member.model_fields.get(key) if isinstance(key, str) else None
            if field is not None:
                return field.annotation, [field, *field.metadata]
        elif get_origin(member) is Literal:
            continue
        elif get_args(member) and isinstance(key, int) == (get_origin(member) is list):
            return _unwrap(get_args(member)[-1])
    return Any, []


def _unwrap(annotation: Any) -> tuple[Any, list[Any]]:
    """Return an annotation without its metadata, and these."""
    metadata: list[Any] = []
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        for part in more:
            metadata += [part, *part.metadata] if isinstance(part, FieldInfo) else [part]
    return annotation, metadata


def _list_members(annotation: Any) -> list[Any]:
    """Return the members of a union, or the annotation alone, without metadata and null."""
    annotation, _ = _unwrap(annotation)
    if get_origin(annotation) not in (Union, UnionType):
        return [annotation]
    members = [m for part in get_args(annotation) for m in _list_members(part)]
    return [member for member in members if member is not NoneType]


def _takes_null(annotation: Any) -> bool:
    annotation, _ = _unwrap(annotation)
    is_union = get_origin(annotation) in (Union, UnionType)
    return is_union and any(map(_takes_null, get_args(annotation))) or annotation is NoneType


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _list_sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a value may be."""
    return [member for member in _list_members(annotation) if _is_section(member)]


def _iterate_choices(annotation: Any) -> Iterator[object]:
    """Yield the values of every literal among the members."""
    for member in _list_members(annotation):
        if get_origin(member) is Literal:
            yield from get_args(member)


def _iterate_words(annotation: Any, metadata: Sequence[Any]) -> Iterator[str]:
    """Yield what each member of a union is, in words."""
    annotation, own = _unwrap(annotation)
    metadata = [*metadata, *own]
    for member in _list_members(annotation):
        origin, args = get_origin(member) or member, get_args(member)
        if origin is Literal:
            yield from map(str, args)
        elif _is_section(member):
            required = [name for name, f in member.model_fields.items() if f.is_required()]
            yield f"a mapping {{{required[0]}: ...}}" if required else "a mapping"
        elif origin is list:
            yield _describe_list(args, metadata)
        elif origin in (int, float):
            yield _describe_number(origin, metadata)
        elif origin is str and _find_bound(metadata, "min_length"):
            yield "a text that is not empty"
        elif origin is Mapping or origin is dict:
            value = args[-1] if args else Any
            each = describe_type(*_unwrap(value))
            yield "a mapping" if value in (Any, object) else f"a mapping, each value {each}"
        else:
            yield TYPE_WORDS.get(origin, "another value")


def _describe_list(args: tuple[Any, ...], metadata: Sequence[Any]) -> str:
    """Return `a list, each a number above 0`."""
    some = " of one entry or more" if _find_bound(metadata, "min_length") else ""
    return f"a list{some}, each {describe_type(*_unwrap(args[0]))}" if args else f"a list{some}"


def _describe_number(kind: type, metadata: Sequence[Any]) -> str:
    """Return `a whole number of at least 1`."""
    bounds = {
        name: _find_bound(metadata, key)
        for name, key in (("above", "gt"), ("least", "ge"), ("below", "lt"), ("most", "le"))
    }
    finite = {name: b for name, b in bounds.items() if b is not None and math.isfinite(b)}
    return str(Range(**finite, whole=kind is int)).strip()


def _find_bound(metadata: Sequence[Any], name: str) -> Any:
    return next((v for m in metadata if (v := getattr(m, name, None)) is not None), None)
