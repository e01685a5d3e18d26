"""Define what every section of a recipe refuses, and the section `source`."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Describe a part of the recipe: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(Section):
    """Name the pretrained model that everything starts from."""

    model: str
    revision: str | None = None
    published_as: str | None = None
