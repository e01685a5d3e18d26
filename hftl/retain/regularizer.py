"""Define a regularizer, what it reads of a training, and all that keeps one training near.

A regularizer is a section of the recipe in `config/retain.py`, which names its class, and that
class: `prepare` is called once before training, `loss` for every batch, and the trainer sums.
`pipeline/retention.py` builds them from a recipe.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar, runtime_checkable

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from hftl.config.refusals import build_recipe_error
from hftl.config.retain import EWC, RegularizerSection
from hftl.errors import RecipeError
from hftl.train.facts import FisherFacts, TrainingFacts

Batch = dict[str, Any]
"""What a model's forward takes, and `labels`: tensors, and switches such as the bool
`interpolate_pos_encoding`."""
BATCH_METADATA = ("row", "general", "labelled_tokens")
"""Keys of a batch that regularizers read and the model does not take: the rows' numbers, whether
each is general data, and the tokens that carry a word's label."""
Config = TypeVar("Config", bound=RegularizerSection)
FisherResult = tuple[dict[str, Tensor], FisherFacts]
"""The Fisher information by parameter name, and what the record says of it."""


@dataclass(frozen=True)
class RegularizerContext:
    """Hold what a regularizer may read beside its section of a recipe.

    What costs time is a function, which the regularizers that read it call.

    Args:
        seed: of the training.
        tau: temperature of cosines for this kind of input.
        original_is_start: True if the original is the model that training starts from.
        measure_target_variance: returns the variance of regression targets around the original's
            probe; 1 for classes.
        load_masked_lm: returns the original's masked-LM model and its masking.
        load_causal_lm: returns the original's causal-LM model.
        load_zero_shot_head: returns CLIP's classifier of the task's class names.
        load_fisher: returns the Fisher information by parameter name, and its facts.
    """

    seed: int
    tau: float
    original_is_start: bool
    measure_target_variance: Callable[[], float]
    load_masked_lm: Callable[[], tuple[Any, Any]]
    load_causal_lm: Callable[[], Any]
    load_zero_shot_head: Callable[[], Any]
    load_fisher: Callable[[EWC], FisherResult]


@dataclass(frozen=True)
class TrainingRows:
    """Describe all rows of a training, for the original to run on.

    Args:
        target: number of rows of the target; general rows have the numbers from there on.
        total: number of all rows.
        batches: row numbers, rows of similar length together.
        collate: makes a batch of some row numbers, `labels` included.
        repeats: True if a row is the same in every epoch.
    """

    target: int
    total: int
    batches: list[list[int]]
    collate: Callable[[list[int]], Batch]
    repeats: bool


@dataclass(frozen=True)
class TrainingStart:
    """Describe a training before its first step.

    Args:
        model: not wrapped, at its starting weights.
        reference: the original, where the caller gives one; None: that model is.
        rows: all rows of the training.
        regularizers: all of this training.
        device: of the model.
        autocast: returns the context of the training's precision.
        seed: of random draws.
        shared: what one regularizer computes for others of its kind.
    """

    model: nn.Module
    reference: nn.Module | None
    rows: TrainingRows
    regularizers: Sequence["LossTerm"]
    device: torch.device
    autocast: Callable[[], Any]
    seed: int
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """Describe a batch that the model has run on, and the optimizer step it is part of.

    Args:
        model: not wrapped.
        batch: with `row`, the rows' numbers, and `general`, whether each is general data.
        outputs: what the model returned.
        counts: (batch,) bool, the target's rows that have a label.
        target_rows: their number in the whole step, over all processes.
        ratio: general rows for each row of the target.
        epoch: from 0.
        shared: what one regularizer computes for others of its kind.
    """

    model: nn.Module
    batch: Batch
    outputs: Any
    counts: Tensor
    target_rows: Tensor
    ratio: float
    epoch: int
    shared: dict[str, Any] = field(default_factory=dict)

    def select_rows(self, inputs: str) -> Tensor:
        """Return the rows that are `target`, `general` or `both`: (batch,) bool."""
        general = self.batch["general"]
        if inputs == "target":
            return self.counts & ~general
        return general if inputs == "general" else general | self.counts

    def count_rows(self, inputs: str) -> Tensor:
        """Return the number of such rows in the whole step.

        General rows count by their average number, so that each weighs the same in every step.
        """
        share = {"target": 1.0, "general": self.ratio, "both": 1.0 + self.ratio}[inputs]
        return self.target_rows.clamp(min=1) * share

    @property
    def share(self) -> Tensor:
        """Return the batch's share of the step, by which a penalty on weights counts."""
        return self.counts.sum() / self.target_rows.clamp(min=1)


@runtime_checkable
class LossTerm(Protocol):
    """Add a term to the loss of a training: any object with these two methods does."""

    def prepare(self, start: TrainingStart) -> None:
        """Read what it needs of the original, before anything trains. Collective."""
        ...

    def loss(self, step: Step) -> Tensor:
        """Return what a batch adds to the loss of its step, a float32 scalar with its weight."""
        ...


class Regularizer(ABC, Generic[Config]):
    """Pull a model toward the original: one term of a training's loss.

    Its arguments are the keys of its section of the recipe, in their order.

    Raises:
        RecipeError: for a key or a value that the section refuses.
    """

    section: ClassVar[type[RegularizerSection]]
    config: Config

    def __init__(self, *values: Any, **keys: Any) -> None:
        names, own_name = list(self.section.model_fields), type(self).__name__
        if len(values) > len(names):
            raise TypeError(f"{own_name} takes {', '.join(names)}, got {values}")
        by_name = dict(zip(names, values, strict=False))
        for name in by_name.keys() & keys:
            raise RecipeError(
                f"{own_name}: {name} is given twice, as {by_name[name]!r} and {keys[name]!r}",
                "Give it once",
            )
        keys = by_name | keys
        try:
            self.config = self.section.model_validate(keys)  # pyright: ignore
        except ValidationError as error:
            raise build_recipe_error(error, own_name, self.section, keys) from None

    @classmethod
    def from_config(cls, config: Config, context: RegularizerContext) -> Self:
        """Build the regularizer of a recipe's section."""
        del context
        return cls(**config.model_dump())

    @property
    def weight(self) -> float:
        """Return the weight of the term in the loss."""
        return float(self.config.weight)

    @property
    def facts(self) -> TrainingFacts:
        """Return what the record says of it, beside the recipe."""
        return TrainingFacts()

    @property
    def compares_rows(self) -> bool:
        """Return True if a row's loss depends on the other rows of its batch."""
        return False

    @abstractmethod
    def prepare(self, start: TrainingStart) -> None:
        """Read what it needs of the original, before anything trains. Collective.

        Raises:
            RecipeError: if it cannot regularize this model.
        """

    @abstractmethod
    def loss(self, step: Step) -> Tensor:
        """Return what a batch adds to the loss of its step, a float32 scalar with its weight."""

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """Change the weights after the optimizer's step; nothing by default."""


@dataclass
class Retention:
    """Hold what keeps one training near its original: what the trainer receives.

    The trainer prepares it once; phases of one training share it.

    Args:
        regularizers: terms of the loss; those that add nothing are left out.
        reference: the original, where it is not what the training starts from.
        general: rows that are mixed into every step, or None.
        ratio: general rows for each row of the target.
        general_weight: of the mean loss over labelled general rows, beside the target's mean.
        alphas: shares of the way from the original to the trained weights that are tried.
        facts: for the record.

    Raises:
        RecipeError: for anything that is no `LossTerm`.
    """

    regularizers: Sequence[LossTerm] = ()
    reference: nn.Module | None = None
    general: Any | None = None
    ratio: float = 0.5
    general_weight: float = 1.0
    alphas: tuple[float, ...] = ()
    facts: TrainingFacts = field(default_factory=TrainingFacts)
    _is_prepared: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        for regularizer in self.regularizers:
            if isinstance(regularizer, type) or not isinstance(regularizer, LossTerm):
                raise RecipeError(
                    f"retain holds {regularizer!r}, expected regularizers",
                    "Use KLToOriginal, L2SP and EWC, or an object with prepare and loss",
                )
        self.regularizers = [
            r for r in self.regularizers if not isinstance(r, Regularizer) or r.config.is_active
        ]

    def prepare(
        self, model: nn.Module, rows: TrainingRows, device: torch.device,
        autocast: Callable[[], Any], seed: int,
    ) -> None:  # fmt: skip
        """Prepare every regularizer; a second call does nothing. See `TrainingStart`."""
        if self._is_prepared:
            return
        self._is_prepared = True
        start = TrainingStart(
            model, self.reference, rows, self.regularizers, device, autocast, seed
        )
        for regularizer in self.regularizers:
            regularizer.prepare(start)
        # A reference that every output was read from need not stay in memory.
        self.reference = None

    def compute_loss(self, step: Step) -> Tensor | float:
        """Return what all regularizers add to the loss of a step, for one batch.

        Raises:
            RecipeError: naming a user's term that returns anything but a number.
        """
        return sum(_check_scalar(term, term.loss(step)) for term in self.regularizers)

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Let regularizers change the weights after the optimizer's step."""
        for regularizer in self.regularizers:
            if isinstance(regularizer, Regularizer):
                regularizer.after_step(model, optimizer)


def _check_scalar(term: LossTerm, loss: Any) -> Any:
    """Return what a term adds to the loss, if it is one number.

    Raises:
        RecipeError: naming the class of the term, if it is not.
    """
    is_number = isinstance(loss, (int, float)) and not isinstance(loss, bool)
    if is_number or (isinstance(loss, Tensor) and loss.dim() == 0):
        return loss
    kind = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
    raise RecipeError(
        f"{type(term).__name__}.loss returned {kind}, expected a scalar tensor",
        "Return one number, such as a mean over the batch's rows times step.share",
    )
