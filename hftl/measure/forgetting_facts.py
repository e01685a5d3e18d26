"""Define what the record holds of forgetting: the figures of every arm against the source model."""

from typing import Literal

from hftl.data.facts import GeneralFacts, RecordPart
from hftl.measure.facts import Interval


class Figure(RecordPart):
    """Compare a figure of the original with that of an arm, the mean over seeds."""

    before: float
    after: float
    change: float
    ci95: Interval | None
    per_seed: list[float]
    floor: float | None = None
    """Of CKA: its value for rows that are paired by chance."""


class ControlFigures(RecordPart):
    """Hold the figures of one control, a label that general rows have."""

    same: Figure
    probe_fixed: Figure | None
    probe_refitted: Figure | None


class ForgettingFigures(RecordPart):
    """Hold every figure of one arm; null where general data or a pretraining head is missing."""

    neighbours: Figure | None = None
    cka: Figure | None = None
    cosine: Figure | None = None
    kl: Figure | None = None
    new_kl: Figure | None = None
    mlm_loss: Figure | None = None
    mae_loss: Figure | None = None
    backward: Figure | None = None
    controls: dict[str, ControlFigures]


class Forgotten(RecordPart):
    """State by how much the headline fell."""

    value: float
    ci95: Interval | None
    per_seed: list[float]


class Reduction(RecordPart):
    """State the share of another arm's forgetting that is gone; null where that is noise."""

    arm: str
    gone: float | None


class ForgettingArm(RecordPart):
    """Describe what one arm has forgotten."""

    arm: str
    figures: ForgettingFigures
    forgotten: Forgotten | None
    against: Reduction | None


class Headline(RecordPart):
    """Name the figure that forgetting is told by."""

    figure: Literal["same", "neighbours"]
    control: str | None


class Control(RecordPart):
    """Describe a label of general rows; `classes` says that a probe is fitted to it."""

    name: str
    values: int
    classes: bool


class ForgettingSection(RecordPart):
    """Describe what each arm has forgotten; `headline` is null without general data."""

    rows: int
    new_rows: int
    documents: str | None
    general: GeneralFacts | None
    controls: list[Control]
    tau: float
    backward_control: str | None = None
    headline: Headline | None
    arms: list[ForgettingArm]
