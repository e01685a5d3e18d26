"""The section `publish` of a recipe: where the result goes."""

import re
from typing import Self

from pydantic import Field, field_validator, model_validator

from hftl.explain import closest
from hftl.hubwords import LANGUAGE, LICENSES
from hftl.sections.section import Section

REPO_ID = re.compile(
    r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(?<![-.])(?<!\.git)", re.ASCII
)
LONGEST_ID = 91
"""The hub's 96 characters, less those of `-base`."""


class Benchmark(Section):
    """A registered benchmark of the hub, whose test set `data.test` is."""

    dataset: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
    task_id: str = Field(pattern=r"^[\w.-]+$")
    """As the dataset's eval.yaml names it."""


class Emissions(Section):
    """The place where the energy came from, which nothing here can find out."""

    location: str = Field(pattern=r"^[\w ,.()'-]+$")
    """As exactly as is known, for instance `Quebec, Canada`."""
    grams_per_kwh: float = Field(ge=0, allow_inf_nan=False)
    """CO2 equivalents of the location's electricity."""


class Publish(Section):
    """Where the result goes, and whether it stays private there."""

    repo_id: str | None = None
    private: bool = True
    license: str | None = None
    """The hub's identifier; `other` needs license_name."""
    license_name: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    license_link: str | None = Field(default=None, pattern=r"^(LICENSE(\.md)?|https://[^\s<>\"]+)$")
    language: str | list[str] | None = None
    """ISO 639 codes of what it reads."""
    examples: bool = False
    """True lets the card show rows of test, those that the model gets wrong among them."""
    benchmark: Benchmark | None = None
    emissions: Emissions | None = None

    @field_validator("license")
    @classmethod
    def _known_license(cls, license: str | None) -> str | None:
        if license is not None and license not in LICENSES:
            close = closest(license.lower(), list(LICENSES))
            raise ValueError(f"the hub knows no license {license!r}{close}")
        return license

    @field_validator("language")
    @classmethod
    def _known_language(cls, language: str | list[str] | None) -> str | list[str] | None:
        for code in [language] if isinstance(language, str) else language or []:
            if not LANGUAGE.fullmatch(code):
                raise ValueError(f"{code!r} is no ISO 639 code, such as en, de or multilingual")
        return language

    @model_validator(mode="after")
    def _named_license(self) -> Self:
        if (self.license == "other") != (self.license_name is not None):
            raise ValueError("license_name belongs to license: other, and is needed there")
        return self

    @field_validator("repo_id")
    @classmethod
    def _hub_id(cls, repo_id: str | None) -> str | None:
        if repo_id is not None and not (REPO_ID.fullmatch(repo_id) and len(repo_id) <= LONGEST_ID):
            raise ValueError(f"{repo_id!r} is no repository of a hub, give it as owner/name")
        return repo_id
