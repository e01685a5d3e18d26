"""Read YAML and apply `key=value` overrides; `1e-4` is a number, a repeated key an error.

Keys are text: labels may be numbers.

PyYAML reads YAML 1.1, in which `1e-4` is a word and `on` is true. ruamel.yaml reads 1.2, but would
be a second YAML library beside the one that writes recipes and cards.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import JsonValue

from hftl.errors import RecipeError, format_error_line

MAX_VALUES = 100_000
"""Values of a recipe, at most, once its aliases are filled in."""
MAX_BYTES = 10_000_000
"""Of a recipe; a device may have no end."""


class _RecipeLoader(yaml.SafeLoader):
    """Load YAML safely, `1e-4` and `on` as YAML 1.2 does, and refuse duplicate keys."""

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> yaml.Node | None:
        """Return the document's node; refuse aliases that make few lines endless."""
        node = super().get_single_node()
        if node is not None and _count_values(node, {}) > MAX_VALUES:
            problem = f"its aliases make more than {MAX_VALUES:,} values"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return node


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return the number of values in a node, those of aliases as often as they are named."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counts:
        # Endless, if this is met again before it is counted.
        counts[id(node)] = MAX_VALUES + 1
        children = [
            child for item in node.value for child in (item if isinstance(item, tuple) else (item,))
        ]
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(node)]


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _construct_mapping(
    loader: _RecipeLoader, node: yaml.MappingNode, deep: bool = False
) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, bool | int | float):
            key = key_node.value  # A label, as in `label_names: {0: bad}`, with its digits.
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is not a word", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is given twice", key_node.start_mark
            )
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_RecipeLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        RecipeError: if it is not YAML; the line is named.
    """
    try:
        return yaml.load(text, _RecipeLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError for a date such as 2020-13-45, RecursionError where it is nested too deep.
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or format_error_line(error)
        raise RecipeError(f"{where}{line}: not valid YAML: {problem}", "Correct it") from error


def read_yaml(path: Path) -> dict[str, object]:
    """Return the mapping in a YAML file.

    Raises:
        RecipeError: if the file is missing, unreadable, not UTF-8, not YAML, or not a mapping.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"recipe {path} does not exist", "Check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"recipe {path} cannot be read: {why}", "Check the file") from error
    if len(content) > MAX_BYTES:
        raise RecipeError(
            f"recipe {path} has more than {MAX_BYTES:,} bytes, which is no recipe", "Check the path"
        )
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise RecipeError(
            f"recipe {path} must be a mapping of sections, got {type(value).__name__}",
            "See recipes/README.md",
        )
    return value


def apply_overrides(tree: dict[str, object], assignments: list[str]) -> dict[str, object]:
    """Set each `dotted.key=value` in `tree` and return it; values are YAML.

    Raises:
        RecipeError: if an assignment has no `=`, or descends into something that is not a mapping.
    """
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise RecipeError(
                f"override {assignment!r} is not key=value", "Write it as finetune.lora.r=16"
            )
        set_key(tree, key.strip(), parse_yaml(value, f"override {key}"))
    return tree


def set_key(tree: dict[str, object] | dict[str, JsonValue], dotted: str, value: object) -> None:
    """Set `a.b.c` in nested mappings, creating missing or null ones; `a.0.b` in a list.

    Raises:
        RecipeError: if a part of the key is neither a mapping nor an index of a list.
    """
    *parents, last = dotted.split(".")
    node: Any = tree
    for depth, name in enumerate(parents):
        here = ".".join(parents[: depth + 1])
        if isinstance(node, list):
            if not (name.isascii() and name.isdigit()) or int(name) >= len(node):
                raise RecipeError(
                    f"{dotted}: {here} is none of a list of {len(node)}", "Count from 0"
                )
            node = node[int(name)]
            continue
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, (dict, list)):
            raise RecipeError(
                f"{dotted}: {here} is {node!r}, not a mapping", f"Set {here} as a whole"
            )
    if isinstance(node, list):
        raise RecipeError(f"{dotted}: it is a list", f"Set {'.'.join(parents)} as a whole")
    node[last] = value


def flatten(tree: Any, prefix: str = "") -> dict[str, JsonValue]:
    """Return nested mappings as `{dotted.key: value}`; an empty mapping is a value."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, JsonValue] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
