"""The fields of TrainingArguments and LoraConfig, read without importing them.

Importing transformers takes seconds; a misspelt key should be answered at once. The classes are
plain dataclasses, so their fields and simple types stand in the source.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Optional, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from hftl.errors import RecipeError

SOURCES = {
    "training": [("transformers", "training_args.py", "TrainingArguments")],
    "lora": [
        ("peft", "config.py", "PeftConfigMixin"),
        ("peft", "config.py", "PeftConfig"),
        ("peft", "tuners/lora/config.py", "LoraConfig"),
    ],
}
SIMPLE: dict[str, Any] = {t.__name__: t for t in (int, float, str, bool, list, dict)}


@cache
def fields(kind: str) -> dict[str, Any]:
    """Names and types of the fields of `training` or `lora`; a type we cannot tell is Any."""
    found: dict[str, Any] = {}
    for package, file, name in SOURCES[kind]:
        tree = ast.parse(_source(package, file))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        found[item.target.id] = _type(item.annotation)
    return found


def checked(kind: str, name: str, value: Any) -> Any:
    """`value` as the upstream field's type.

    Raises:
        RecipeError: if it is of another type. `name` is the full dotted key, for the message.
    """
    expected = fields(kind)[name.rsplit(".", 1)[-1]]
    try:
        return TypeAdapter(expected).validate_python(value)
    except ValidationError as error:
        raise RecipeError(
            f"{name} must be {_told(expected)}, got {value!r}", "Correct the value"
        ) from error


def _source(package: str, file: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(
            f"the package {package} is not installed", f"Install it: pip install {package}"
        )
    return (Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8")


def _type(node: ast.expr) -> Any:
    """The annotation as a type where it is built of simple ones, else Any."""
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Name(id=name):
            return SIMPLE.get(name, Any)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _union(_type(left), _type(right))
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return _union(_type(inner), None)
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=parts)):
            return _union(*(_type(part) for part in parts))
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            return list[_type(inner)]
    return Any


def _told(expected: Any) -> str:
    """The type in words: `str or null`."""
    parts = get_args(expected) if get_origin(expected) is Union else (expected,)
    return " or ".join("null" if part is NoneType else part.__name__ for part in parts)


def _union(*types: Any) -> Any:
    if Any in types:
        return Any
    return Optional[Union[types]] if None in types else Union[types]  # noqa: UP007,UP045
