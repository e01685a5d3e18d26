"""Define the section `measure` of a recipe: the arms, the seeds and the metric."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from hftl.config.section import MAX_SEED, Section, find_repeated

SEARCH_SHARE = 1 / 3
"""Each rate is tried at this share of scratch's own budget."""


class Search(Section):
    """Set the learning rates that `scratch` is searched over, and its longer budget."""

    learning_rates: list[Annotated[float, Field(gt=0)]] = Field(
        default=[1.0e-4, 3.0e-4, 1.0e-3], min_length=1
    )
    epochs_factor: float = Field(default=3, gt=0)


ArmEntry = Annotated[
    str | dict[str, dict[str, object] | None],
    Field(description="an arm's name, or one with its changes, {name: {key: value}}"),
]

UNLABELLED_ANALYSES = ("distance", "shift")
"""Analyses that need no labels, and read rows besides the splits."""


class Measure(Section):
    """Describe which arms are compared, over which seeds, by which metric."""

    metric: str = "accuracy"
    """A built-in metric or `evaluate:<id>`; where none is given, pearson for regression,
    micro_f1 for multi-label, f1 of entities for token-classification."""
    seeds: list[Annotated[int, Field(ge=0, le=MAX_SEED)]] = Field(default=[0, 1, 2], min_length=1)
    arms: list[ArmEntry] = ["scratch", "head"]
    analyses: list[Literal["probe", "curve", "distance", "shift"]] = []
    """What is made of the source's frozen features, before anything trains, and shown with the
    run; each is a command, too."""
    parallel: Literal["auto", "data", "arms"] = "auto"
    """How several processes share the work: all of them train each arm on other rows (`data`), or
    each takes arms and seeds of its own (`arms`)."""
    scratch: Search = Search()
    equivalence_margin: float | None = Field(default=None, gt=0, lt=float("inf"))
    """The smallest gain that matters, in the metric's unit: an interval inside it is practically
    none. null: .01, of errors without a bound 1 % of the baseline's."""
    forgetting_budget: float | None = Field(default=None, ge=0, le=1)
    """The most that the headline of forgetting may fall by; a fall beyond it, and beyond noise,
    holds the verdict. null: forgetting is measured, and holds nothing."""
    slices: list[Annotated[str, Field(min_length=1)]] = []
    """Columns of the test rows' table: score and gain are measured in each of their values too."""

    thresholds: Literal["f1", "micro_f1"] | None = None
    """The metric that a threshold for each label is fitted for on validation, for multi-label:
    `predict` uses them, and the arms are compared at .5 as without. null: .5."""

    @field_validator("analyses")
    @classmethod
    def _check_distinct_analyses(cls, names: list[str]) -> list[str]:
        repeated = find_repeated(names)
        if repeated is not None:
            raise ValueError(f"{repeated} is given twice")
        return names

    @field_validator("seeds", mode="before")
    @classmethod
    def _refuse_truth_as_seed(cls, seeds: Any) -> Any:
        """Refuse true and false, which Python takes for 1 and 0."""
        for seed in seeds if isinstance(seeds, list) else ():
            if isinstance(seed, bool):
                raise ValueError(f"a seed must be a number, got {str(seed).lower()}")
        return seeds

    @field_validator("seeds")
    @classmethod
    def _check_distinct(cls, seeds: list[int]) -> list[int]:
        repeated = find_repeated(seeds)
        if repeated is not None:
            raise ValueError(f"seed {repeated} is given twice")
        return seeds

    @field_validator("slices")
    @classmethod
    def _check_slices(cls, columns: list[str]) -> list[str]:
        repeated = find_repeated(columns)
        if repeated is not None:
            raise ValueError(f"the column {repeated!r} is named twice")
        return columns
