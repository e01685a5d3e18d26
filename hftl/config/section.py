"""Define what every section of a recipe refuses; and `source`."""

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

MAX_SEED = 2**32 - 1
"""The largest seed that numpy's generators take."""
MAX_WEIGHT = 1e12
"""The largest weight of a term of the loss: far more overflows in 32 bits."""
MIN_TEMPERATURE = 1e-6
"""The least that cosines or logits are divided by: far less overflows in 32 bits."""
HUB_ID_PATTERN = re.compile(
    r"(?!.*(--|\.\.|\.git\Z))(\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b", re.ASCII
)
"""What `huggingface_hub.utils.validate_repo_id` takes, whose import is slow; of ASCII alone."""
REVISION_PATTERN = re.compile(r"\w[\w./+@#=,-]*", re.ASCII)
NUMBERS = (int, float, int | None, float | None)
"""Types of keys that hold a number."""
NOT_A_NUMBER = "not_a_number"
"""The type of pydantic's finding that true or false stands for a number; it names the key."""


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
                raise PydanticCustomError(NOT_A_NUMBER, "", {"name": name, "value": value})
        return tree


def find_repeated(values: Sequence[Any]) -> Any:
    """Return the least value that is there twice; None where all differ."""
    return min((value for value in values if values.count(value) > 1), default=None)


def is_hub_id(place: str) -> bool:
    """Return whether the hub may have something of that name; a relative path may have that form,
    too."""
    return HUB_ID_PATTERN.fullmatch(place) is not None


def name_by_label(value: Any) -> Any:
    """Return a mapping with its keys as labels: YAML reads `0: bad` as a number's."""
    return {str(key): entry for key, entry in value.items()} if isinstance(value, dict) else value


class Source(Section):
    """Name the pretrained model that everything starts from."""

    model: str = Field(min_length=1)
    revision: str | None = None
    published_as: str | None = None
    quantization: Literal["4bit"] | None = None
    """4bit: the frozen weights are held in 4 bits by bitsandbytes, under LoRA, on a CUDA GPU."""

    @field_validator("published_as")
    @classmethod
    def _check_hub_id(cls, name: str | None) -> str | None:
        if name is not None and not is_hub_id(name):
            raise ValueError(f"{name!r} is no hub id, such as org/name")
        return name

    @field_validator("revision")
    @classmethod
    def _check_revision(cls, name: str | None) -> str | None:
        if name is not None and not (REVISION_PATTERN.fullmatch(name) and ".." not in name):
            raise ValueError(f"{name!r} is no commit, branch or tag")
        return name
