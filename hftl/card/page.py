"""A page from its template: metadata first, then the text."""

from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from hftl.card.plain import inert


def rendered(template: str, page: dict[str, Any], metadata: ModelCardData) -> str:
    """The whole card.

    Args:
        template: a file of this folder.
        page: what the template names.
        metadata: what stands before the text.
    """
    engine = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    engine.filters |= {"first_upper": lambda text: text[:1].upper() + text[1:], "inert": inert}
    text = files("hftl.card").joinpath(template).read_text("utf-8")
    return f"---\n{metadata.to_yaml().strip()}\n---\n\n{engine.from_string(text).render(**page)}"
