"""What a published folder notes of its use, in hftl.json: checked once, as it is read."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hftl import places
from hftl.data.tags import TagScheme
from hftl.errors import RunFolderError
from hftl.sections.data import Data, Task
from hftl.use.locate import read_json

FILE = "hftl.json"
Texts = str | Annotated[list[str], Field(min_length=1, max_length=2)]
Labels = str | Annotated[list[str], Field(min_length=2)]


class Part(BaseModel):
    """A part of the file: what is not of use here is passed over."""

    model_config = ConfigDict(frozen=True, strict=True)


class Columns(Part):
    """The columns of a table."""

    text: Texts = "text"
    image: str = "image"
    label: Labels = "label"


class Inputs(Part):
    """How inputs are taken."""

    train: Columns = Columns()
    max_length: int = Field(default=Data.model_fields["max_length"].default, ge=2)
    max_pixels: int = Field(default=Data.model_fields["max_pixels"].default, ge=1)


class Asked(Part):
    """The recipe."""

    data: Inputs = Inputs()


class Tags(Part):
    """Say how tags mark entities, see `TagScheme`."""

    name: str
    outside: str | None
    standard: dict[str, str]


class Answers(Part):
    """What the outputs mean."""

    task: Task
    labels: list[str] | None = None
    tag_scheme: Tags | None = None
    label_type: Literal["text", "integer", "boolean"] = "text"


class Base(Part):
    """The model that an adapter goes on."""

    model: str = ""
    weights_sha256: str | None = None


class Adapted(Part):
    """An adaptation; `base` where it changed the base itself."""

    base: Base | None = None


class Notes(Part):
    """Everything; a folder without the file has the defaults."""

    data: Answers | None = None
    recipe: Asked = Asked()
    source: Base = Base()
    adapt: Adapted | None = None
    metric: str | None = None

    @property
    def tag_scheme(self) -> TagScheme | None:
        """The scheme of the tags; None where there is none, or a folder does not say it."""
        tags = self.data and self.data.tag_scheme
        names = set(self.data.labels or []) if self.data else set()
        # One that lacks a tag of the model's, or knows others, is not the model's.
        if tags is None or set(tags.standard) != names:
            return None
        return TagScheme(tags.name, tags.outside, tags.standard)

    @property
    def adapted(self) -> Base | None:
        """The adapted base, where there is one."""
        return self.adapt.base if self.adapt is not None else None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Those of a published folder.

        Raises:
            RunFolderError: naming the key that makes no sense.
        """
        tree = read_json(folder / FILE)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            name, (key, value) = places.called(folder), _at_fault(tree, error)
            raise RunFolderError(
                f"{name} does not load: {FILE} says {repr(value)[:40]} for {key}",
                f"Look closer: hftl doctor {name}",
            ) from error


def _at_fault(tree: Any, error: ValidationError) -> tuple[str, Any]:
    """The dotted key of the first finding, as deep as it stands in the file, and its value."""
    keys: list[str] = []
    for key in map(str, error.errors()[0]["loc"]):
        if not isinstance(tree, dict) or key not in tree:
            break
        tree = tree[key]
        keys.append(key)
    return ".".join(keys), tree
