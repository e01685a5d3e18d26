"""Define what every section of a recipe refuses, in one line a user can act on; and `source`.

A refusal names the key, the closest match and what to do.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from hftl.errors import RecipeError, suggest_closest

MAX_SEED = 2**32 - 1
"""The largest seed that numpy's generators take."""
MAX_WEIGHT = 1e12
"""The largest weight of a term of the loss: far more overflows in 32 bits."""
MIN_TEMPERATURE = 1e-6
"""The least that cosines or logits are divided by: far less overflows in 32 bits."""
NUMBERS = (int, float, int | None, float | None)
"""Types of keys that hold a number."""
UNION_TAGS = ("Fraction", "Table", "one", "several")
"""Parts of a location that name a choice of pydantic's, not a key of the recipe."""


class Section(BaseModel):
    """Describe a part of the recipe: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, tree: Any) -> Any:
        """Refuse true and false for a number: Python takes them for 1 and 0."""
        for name, value in tree.items() if isinstance(tree, dict) else ():
            field = cls.model_fields.get(name) if isinstance(name, str) else None
            if isinstance(value, bool) and field and field.annotation in NUMBERS:
                raise ValueError(f"{name} must be a number, got {str(value).lower()}")
        return tree


def name_by_label(value: Any) -> Any:
    """Return a mapping with its keys as labels: YAML reads `0: bad` as a number's."""
    return {str(key): entry for key, entry in value.items()} if isinstance(value, dict) else value


class Source(Section):
    """Name the pretrained model that everything starts from."""

    model: str
    revision: str | None = None
    published_as: str | None = None
    quantization: Literal["4bit"] | None = None
    """4bit: the frozen weights are held in 4 bits by bitsandbytes, under LoRA, on a CUDA GPU."""


def build_recipe_error(error: ValidationError, where: str, model: type[BaseModel]) -> RecipeError:
    """Return the first finding as a RecipeError; a misspelt key comes before a missing one."""
    findings = error.errors(include_url=False)
    first = min(findings, key=lambda finding: finding["type"] != "extra_forbidden")
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, RecipeError):
        return RecipeError(f"{where}: {raised.what}", raised.fix)
    path = [str(part) for part in first["loc"] if part not in UNION_TAGS]
    return _format_finding(first, where, path, _list_known_keys(model, list(first["loc"][:-1])))


def _format_finding(
    first: ErrorDetails, where: str, path: list[str], known: list[str]
) -> RecipeError:
    key = ".".join(path)
    match first["type"]:
        case "extra_forbidden":
            close = suggest_closest(path[-1], known, "".join(f"{part}." for part in path[:-1]))
            return RecipeError(f"{where}: unknown key '{key}'{close}", f"Known: {', '.join(known)}")
        case "missing":
            return RecipeError(f"{where}: '{key}' is missing", "Add it")
        case "none_required":
            return RecipeError(f"{where}: '{key}' is not built yet", "Remove it or set it to null")
        case "value_error":
            what = first["msg"].removeprefix("Value error, ")
            return RecipeError(f"{where}: '{key}': {what}", "Correct the recipe")
    message = first["msg"][0].lower() + first["msg"][1:]
    return RecipeError(f"{where}: '{key}': {message}, got {first['input']!r}", "Correct the value")


def _list_known_keys(model: type[BaseModel], loc: list[Any]) -> list[str]:
    """Return the keys that are allowed at the location `loc`."""
    here: Any = model
    for part in loc:
        if part == "Fraction":
            # A table whose `path` is misspelt is read as a fraction: name the keys of both.
            return [name for member in _list_union_members(here) for name in member.model_fields]
        if part in ("one", "several") or isinstance(part, int):
            here = _find_model(here)
        elif part in UNION_TAGS:
            here = next(m for m in _list_union_members(here) if m.__name__ == part)
        else:
            owner = _find_model(here)
            field = owner.model_fields.get(part) if owner else None
            here = field.annotation if field else None
    owner = _find_model(here)
    return list(owner.model_fields) if owner else []


def _list_union_members(annotation: Any) -> list[type[BaseModel]]:
    """Return the classes inside `Annotated[A, ...] | Annotated[B, ...]`."""
    parts = getattr(annotation, "__args__", ())
    return [getattr(part, "__origin__", part) for part in parts]


def _find_model(annotation: Any) -> Any:
    """Return the first section inside an annotation, or None."""
    if _is_model(annotation):
        return annotation
    inside = (_find_model(part) for part in getattr(annotation, "__args__", ()))
    return next((model for model in inside if _is_model(model)), None)


def _is_model(annotation: Any) -> bool:
    """Return whether an annotation is a section itself."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
