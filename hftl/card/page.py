"""A page from its template: metadata first, then the text."""

from functools import cache
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined, Template

from hftl.card.plain import in_table, inert


def rendered(template: str, page: dict[str, Any], metadata: ModelCardData) -> str:
    """The whole card.

    Args:
        template: a file of this folder.
        page: what the template names.
        metadata: what stands before the text.
    """
    return f"---\n{metadata.to_yaml().strip()}\n---\n\n{_template(template).render(**page)}"


@cache
def _template(name: str) -> Template:
    engine = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    engine.filters |= {"first_upper": lambda text: text[:1].upper() + text[1:], "inert": inert}
    engine.filters["in_table"] = in_table
    return engine.from_string(files("hftl.card").joinpath(name).read_text("utf-8"))
