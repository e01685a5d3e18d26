"""Define what the record holds of an adaptation: its corpus, its losses, and what the guard saw."""

from typing import Literal

from pydantic import Field

from hftl.config.adapt import Method, Objective
from hftl.data.facts import OpenPart, RecordPart
from hftl.train.facts import Number


class CorpusFacts(OpenPart):
    """Describe the corpus of one adaptation."""

    origin: Literal["train", "unlabeled"] = Field(alias="from")
    documents: int
    held_out_documents: int | None = None
    tokens: int | None = None
    leaked: int
    transductive: bool
    fingerprint: str


class LossChange(RecordPart):
    """Compare a loss before and after; `fall` is the share by which it fell."""

    before: float
    after: float
    fall: float
    perplexity: tuple[float | None, float | None] | None = None
    """Of masked tokens; null beyond the range of floats."""


class GuardFigures(RecordPart):
    """Describe the guard of one adaptation."""

    kind: str
    tolerance: Number
    before: float | None
    after: float | None


class AdaptEvaluation(RecordPart):
    """Hold the losses and the guard's score at one step."""

    step: int
    target: float
    general: float | None
    guard: float | None


class AdaptStage(OpenPart):
    """Describe one adaptation: how it was made, what it did, what was taken over."""

    objective: Objective
    method: Method
    kept: Literal["adapted", "original"]
    why: str | None
    """The reason where the original weights were kept."""
    step: int
    steps: int
    learning_rate: float
    transductive: bool
    relative: bool = False
    tolerance: Number
    corpus: CorpusFacts
    loss: LossChange
    general: LossChange | None
    guard: GuardFigures
    history: list[AdaptEvaluation]
    weights_sha256: str | None = None


class AdaptedBase(RecordPart):
    """Name the adapted base that an adapter applies to; its id is known once it is pushed."""

    weights_sha256: str
    published_as: str | None = None
    revision: str | None = None
