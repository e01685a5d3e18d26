"""List well-known source models by field and modality, and say which of them hftl loads.

The list is `known_sources.csv`, sorted by field, modality and id. A licence or a size stands there
where it is known for sure; the model's page decides. An entry names the architecture (transformers'
model type), from which it follows whether hftl loads it, or the format of its own that stands in
the way.
"""

import csv
import difflib
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator

from hftl.models.architectures import ARCHITECTURES, READ_AS, UNHEADED
from hftl.runtime.paths import PACKAGE_PREFIX

SourceField = Literal["general", "medical", "microscopy", "satellite", "science", "law", "code"]
SourceModality = Literal["text", "image", "multimodal"]
SHARED_FORMATS = {
    "remote code": "it needs code of its own from the hub, which hftl does not run",
    "open_clip": "it is saved for open_clip, not for transformers",
}
"""Reasons that several entries share, by what the file says."""


class KnownSource(BaseModel):
    """Describe a source model.

    Attributes:
        field: what it was pretrained on.
        modality: what it reads.
        id: on the hub, or the address of one that is on none.
        family: transformers' model type, or the name of another format.
        millions: of parameters; None where that is not known for sure.
        license: its identifier; None where the model's page must be read.
        own_format: why transformers alone does not load it; None where it does.
        package: a Python package that ships the same weights, as `<import name>/<folder>`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    field: SourceField
    modality: SourceModality
    id: str
    family: str
    millions: float | None
    license: str | None
    own_format: str | None
    package: str | None

    @field_validator("millions", "license", "own_format", "package", mode="before")
    @classmethod
    def _read_empty_cell(cls, cell: str) -> str | None:
        return SHARED_FORMATS.get(cell, cell) or None

    @property
    def obstacle(self) -> str | None:
        """Return why hftl does not load it; None where it does."""
        if self.own_format is not None:
            return self.own_format
        if self.family in (*ARCHITECTURES, *UNHEADED, *READ_AS):
            return None
        return f"hftl has no entry for the architecture {self.family!r}"


@cache
def list_known_sources() -> tuple[KnownSource, ...]:
    """Read the list, in its order."""
    with files("hftl.models").joinpath("known_sources.csv").open(encoding="utf-8") as file:
        return tuple(KnownSource.model_validate(row) for row in csv.DictReader(file))


def find_known_source(name: str) -> KnownSource | None:
    """Return the entry of a hub id; None where the list has none."""
    return next((source for source in list_known_sources() if source.id == name), None)


def find_packaged_source(place: str) -> KnownSource | None:
    """Return the entry whose weights the package at a place ships; None where none is listed.

    A push compares them with the hub's, tensor by tensor.
    """
    if not place.startswith(PACKAGE_PREFIX):
        return None
    inside = place.removeprefix(PACKAGE_PREFIX).rstrip("/")
    return next((source for source in list_known_sources() if source.package == inside), None)


def suggest_known_source(name: str) -> str | None:
    """Return the id nearest to a name, of a model that hftl loads; None where none is near.

    The owner counts only where the name has one.
    """
    ids = [source.id for source in list_known_sources() if source.obstacle is None]
    by_name = {(known if "/" in name else known.rpartition("/")[2]): known for known in ids}
    close = difflib.get_close_matches(name, by_name, n=1)
    return by_name[close[0]] if close else None
