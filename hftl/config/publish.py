"""Define the section `publish` of a recipe, with the words that the hub takes in metadata."""

import re
from typing import Self

from pydantic import Field, field_validator, model_validator

from hftl.config.section import Section
from hftl.errors import suggest_closest

LICENSES = tuple(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
    intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
    openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2
    llama3.3 llama4 grok2-community gemma unknown other
    """.split()
)
PIPELINE_TAGS = tuple(
    """
    any-to-any audio-classification audio-text-to-text audio-to-audio automatic-speech-recognition
    biology depth-estimation document-question-answering feature-extraction fill-mask graph-ml
    image-classification image-feature-extraction image-segmentation image-text-to-image
    image-text-to-text image-text-to-video image-to-3d image-to-image image-to-text image-to-video
    keypoint-detection mask-generation multiple-choice object-detection other question-answering
    reinforcement-learning robotics sentence-similarity summarization table-question-answering
    table-to-text tabular-classification tabular-regression tabular-to-text text-classification
    text-generation text-ranking text-retrieval text-to-3d text-to-audio text-to-image
    text-to-speech text-to-video text2text-generation time-series-forecasting token-classification
    translation unconditional-image-generation video-classification video-text-to-text
    video-to-video visual-document-retrieval visual-question-answering voice-activity-detection
    zero-shot-classification zero-shot-image-classification zero-shot-object-detection
    """.split()
)
BASE_MODEL_RELATIONS = ("adapter", "finetune", "merge", "quantized")
"""Relations of a model to its `base_model`."""
LANGUAGE_CODE = re.compile(r"[a-z]{2,3}|multilingual|code")
"""ISO 639-1, 639-2 or 639-3, or the hub's words for many languages and for code."""
REGIONAL_LANGUAGE_CODE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})+")
"""A language with a script or a region, which cards have too."""

REPO_ID_PATTERN = re.compile(
    r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(?<![-.])(?<!\.git)", re.ASCII
)
NAME_WORDS = "a name of letters, digits, '.', '-' and '_'"
MAX_REPO_ID_LENGTH = 91
"""The hub's 96 characters, less those of `-base`."""


class Benchmark(Section):
    """Name a registered benchmark of the hub, whose test set `data.test` is."""

    dataset: str = Field(
        pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$",
        description="a dataset of the hub as owner/name",
    )
    task_id: str = Field(pattern=r"^[\w.-]+$", description=NAME_WORDS)
    """As the dataset's eval.yaml names it."""


class Emissions(Section):
    """State where the energy came from, which hftl cannot find out."""

    location: str = Field(
        pattern=r"^[\w ,.()'-]+$", description="a place in words, such as Quebec, Canada"
    )
    """As exact as possible, for instance `Quebec, Canada`."""
    grams_per_kwh: float = Field(ge=0, allow_inf_nan=False)
    """CO2 equivalents of the location's electricity."""


class Publish(Section):
    """Say where the result goes, and whether it stays private there."""

    repo_id: str | None = None
    private: bool = True
    license: str | None = None
    """The hub's identifier; `other` needs license_name."""
    license_name: str | None = Field(default=None, pattern=r"^[\w.-]+$", description=NAME_WORDS)
    license_link: str | None = Field(
        default=None,
        pattern=r"^(LICENSE(\.md)?|https://[^\s<>\"]+)$",
        description="LICENSE, LICENSE.md or an address that begins with https://",
    )
    language: str | list[str] | None = None
    """ISO 639 codes of what it reads."""
    examples: bool = False
    """True lets the card show rows of test, those that the model gets wrong among them."""
    benchmark: Benchmark | None = None
    emissions: Emissions | None = None

    @field_validator("license")
    @classmethod
    def _check_license(cls, license: str | None) -> str | None:
        if license is not None and license not in LICENSES:
            close = suggest_closest(license.lower(), list(LICENSES))
            raise ValueError(f"the hub knows no license {license!r}{close}")
        return license

    @field_validator("language")
    @classmethod
    def _check_language(cls, language: str | list[str] | None) -> str | list[str] | None:
        for code in [language] if isinstance(language, str) else language or []:
            if not LANGUAGE_CODE.fullmatch(code):
                raise ValueError(f"{code!r} is no ISO 639 code, such as en, de or multilingual")
        return language

    @model_validator(mode="after")
    def _check_license_name(self) -> Self:
        if (self.license == "other") != (self.license_name is not None):
            raise ValueError("license_name belongs to license: other, and is needed there")
        return self

    @field_validator("repo_id")
    @classmethod
    def _check_repo_id(cls, repo_id: str | None) -> str | None:
        if repo_id is not None and not (
            REPO_ID_PATTERN.fullmatch(repo_id) and len(repo_id) <= MAX_REPO_ID_LENGTH
        ):
            raise ValueError(f"{repo_id!r} is no repository of a hub, give it as owner/name")
        return repo_id
