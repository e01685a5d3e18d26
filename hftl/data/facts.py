"""Describe the data of a run: the parts of the record that say what was read, dropped and labelled.

The stage that counts builds the part, its file stores it, and the record embeds it as it is.
"""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Modality = Literal["text", "image"]
LabelType = Literal["text", "integer", "boolean"]
SliceKind = Literal["value", "range", "rare", "missing"]
"""What the rows of a slice share: a value, a range of numbers, values that are each in few rows, or
that they have none."""


class RecordPart(BaseModel):
    """Hold one mapping of the record; `part["key"]` is the plain value, as it stands in JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested mappings of what was set."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]


class OpenPart(RecordPart):
    """Hold a mapping that a phase folder of an earlier version may have fewer or other keys of."""

    model_config = ConfigDict(extra="allow", frozen=True)


class BadRow(RecordPart):
    """Name a row that was dropped, and why."""

    where: str
    why: str


class NarrowCount(RecordPart):
    """Count images of a narrow range, of how many, and hold their least and greatest level.

    12 bits in a 16-bit file are 0 to 15 of 255, which no encoder has seen and which loses most of
    the content. The levels are those of the 8 bits that the encoder gets, so that every depth
    counts alike: grey, colour and floats.
    """

    count: int
    pictures: int
    low: int
    high: int


class TagScheme(RecordPart):
    """Describe how the tags of a task mark entities.

    `name` is one of `labels.SCHEME_MARKERS`, or IO, where a run of words with one tag is one
    entity. `outside` is the tag of words that belong to no entity, None where there is none.
    `standard` maps each tag to the form that seqeval reads, `B-PER` or `O`.
    """

    name: str
    outside: str | None
    standard: dict[str, str]

    def standardize(self, tags: Sequence[str]) -> tuple[str, ...]:
        """Return a row's tags in the form that seqeval reads."""
        return tuple(self.standard[tag] for tag in tags)

    @property
    def types(self) -> list[str]:
        """Return the types of entities, sorted."""
        return sorted({_get_entity_type(tag) for tag in self.standard.values()} - {""})


def _get_entity_type(tag: str) -> str:
    """Return the type of a tag in seqeval's form: `PER` of `B-PER`, `_` of `B`, none of `O`."""
    return "" if tag == "O" else tag[2:] or "_"


class CopyCounts(RecordPart):
    """Count the rows that were dropped as copies or contradictions."""

    duplicates: int
    """Copies of a row that stays."""
    conflicting: int
    """Rows of inputs that have differing labels."""
    contradictory_inputs: int = 0
    """The inputs that these rows repeat, each counted once."""
    distinct_inputs: int = 0
    """All inputs, each counted once."""
    leaked: int
    """Copies in another table than the row that stays."""


class PreparedFacts(CopyCounts):
    """Describe the prepared data; fields with a default may be missing from older run folders."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    task: str | None
    modality: Modality
    rows_read: int
    bad_rows: int
    bad_rows_listed: list[BadRow] = Field(default_factory=list[BadRow])
    """Absent from a published record: what a bad row says is the user's own."""
    near_pictures: int = 0
    narrow_pictures: NarrowCount | None = None
    splits: dict[str, int]
    labels: list[str]
    label_type: LabelType = "text"
    label_counts: dict[str, dict[str, int]] | None
    fingerprint: str
    hub_revisions: dict[str, str | None]
    tag_scheme: TagScheme | None = None
    """Set for token-classification only."""


class LabelCounts(RecordPart):
    """Count the labels that were read: of train by one seed, and in all."""

    train_per_seed: int
    """Of the first seed."""
    train_spread: tuple[int, int] | None = None
    """The least and the most of any seed; null where all have as many."""
    total: int


class DataFacts(PreparedFacts):
    """Describe the rows that were read, dropped and split, by the name of the data."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    labels_read: LabelCounts | None = None


class GeneralFacts(OpenPart):
    """Count the rows of general data by what became of them."""

    rows_read: int
    bad_rows: int = 0
    duplicates: int = 0
    conflicting: int = 0
    known: int
    """Copies of the run's own inputs, which were left out."""
    near: int = 0
    """Near copies of the run's validation and test, which were left out of what is trained on."""
    documents: str | None
    """The column whose rows count as one unit."""
    fingerprint: str = ""
    """Identifies the rows."""
