"""The section `source` of a recipe: the pretrained model."""

from hftl.config.section import Section


class Source(Section):
    """The source model."""

    model: str
    revision: str | None = None
    published_as: str | None = None
