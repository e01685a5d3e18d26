"""Describe each strategy and baseline once: what trains, what it reads, costs and is called.

The recipe, the cache keys, the time estimate, the order of the arms, the gain and the card ask
`STRATEGIES`. A new strategy is an entry here and, where what trains is new, a function that selects
it; a recipe key of its own is a field of `Finetune` in `config/finetune.py` and named in
`own_keys`. Nothing is imported: the recipe's schema is made from this table, and a push reads it
without torch.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import nn

Schedule = Literal["solved", "epochs", "phases", "rate_search"]

NOT_TRAINED = "it is solved, not trained by steps"
NO_ENCODER = "it has no encoder"
NO_LABELS = "it reads no label of train"
NO_WEIGHTS = "it is the most frequent label, however much each weighs"
FROM_RANDOM = "it starts from random weights, at one learning rate of its own"


class ModelParts(Protocol):
    """Provide the parts of a model, from which a strategy selects what trains."""

    @property
    def model(self) -> "nn.Module":
        """Return the whole model."""
        ...

    @property
    def last_linear(self) -> "nn.Linear":
        """Return the head's last layer."""
        ...

    def list_top(self, blocks: int) -> "list[nn.Module]":
        """Return the top blocks and all that follows them; of 0 blocks what follows the last."""
        ...


Selection = Callable[[ModelParts, Any], "Iterable[nn.Module | nn.Parameter]"]
"""Return the modules and parameters that train, of the parts and the recipe's section `finetune`.
"""


def select_nothing(parts: ModelParts, finetune: Any) -> "list[nn.Module]":
    """Select no part: nothing trains, or adapters alone."""
    del parts, finetune
    return []


def select_last_linear(parts: ModelParts, finetune: Any) -> "list[nn.Module]":
    """Select the head's last layer."""
    del finetune
    return [parts.last_linear]


def select_top_blocks(parts: ModelParts, finetune: Any) -> "list[nn.Module]":
    """Select the top `finetune.blocks`, and what follows them."""
    return parts.list_top(finetune.blocks)


def select_everything(parts: ModelParts, finetune: Any) -> "list[nn.Module]":
    """Select the whole model."""
    del finetune
    return [parts.model]


@dataclass(frozen=True)
class StrategySpec:
    """Describe one strategy, or one baseline that it is measured against.

    Attributes:
        name: in recipes, and of the arm.
        schedule: `solved` in closed form by one process; by steps for `training.num_train_epochs`
            (`epochs`), phase after phase (`phases`), or for a longer budget after trying several
            learning rates (`rate_search`). The time estimate follows it.
        trains: selects the parameters that train.
        trains_adapter: LoRA in every block trains, and what is published is a PEFT adapter and
            not a whole model.
        is_baseline: stands beside the transfer and does not start from the source's weights.
        measures_gain: a baseline that the transfer gain is taken over.
        reads_labels: the labels of train decide what it predicts.
        brings: another baseline that runs wherever this one does.
        own_keys: recipe keys that no other strategy reads.
        ignored_keys: further recipe keys that a change of does not matter to, and why.
        model_words: the card's first words about a published model of it.
        arm_words: what the card says of such an arm beside its name, by the kind of the inputs
            (text, words, image) where it differs.
    """

    name: str
    schedule: Schedule
    trains: Selection = select_nothing
    trains_adapter: bool = False
    is_baseline: bool = False
    measures_gain: bool = False
    reads_labels: bool = True
    brings: str | None = None
    own_keys: tuple[str, ...] = ()
    ignored_keys: Mapping[str, str] = field(default_factory=dict)
    model_words: str = ""
    arm_words: str | Mapping[str, str] = ""

    @property
    def is_solved(self) -> bool:
        """Return True where one process solves the arm and nothing trains by steps."""
        return self.schedule == "solved"

    @property
    def changes_encoder(self) -> bool:
        """Return True where training moves the source's encoder, directly or by adapters."""
        return not self.is_baseline and not self.is_solved

    @property
    def trains_encoder_weights(self) -> bool:
        """Return True where the source's own weights move, so that a high rate destroys them."""
        return self.changes_encoder and not self.trains_adapter


TRAINING_KEYS = (
    "finetune.head_init", "finetune.patience", "finetune.layer_decay", "finetune.lr",
    "finetune.freeze_batchnorm",
)  # fmt: skip
_SPECS = (
    # Quick arms first: a run reports them in this order.
    StrategySpec(
        "majority", "solved", is_baseline=True,
        ignored_keys={
            "finetune": NO_ENCODER, "data.max_length": NO_ENCODER, "data.image_size": NO_ENCODER,
            "data.augment": NOT_TRAINED, "finetune.class_weight": NO_WEIGHTS,
        },
        arm_words="always the most frequent answer",
    ),
    StrategySpec(
        "classical", "solved", is_baseline=True, measures_gain=True,
        ignored_keys={
            "finetune": NO_ENCODER, "data.max_length": NO_ENCODER, "data.augment": NOT_TRAINED,
        },
        arm_words={
            "text": "TF-IDF with a linear model",
            "words": "the words' spelling with a linear model",
            "image": "downsampled pixels with a linear model",
        },
    ),
    StrategySpec(
        "head", "solved", select_last_linear,
        ignored_keys=dict.fromkeys(
            (*TRAINING_KEYS, "finetune.focal_gamma", "finetune.training", "data.augment"),
            NOT_TRAINED,
        ),
        model_words="A linear head on the frozen",
        arm_words="the frozen encoder with a linear head",
    ),
    StrategySpec(
        "zero_shot", "solved", select_last_linear, reads_labels=False,
        own_keys=("finetune.zero_shot",),
        ignored_keys={
            **dict.fromkeys(
                (*TRAINING_KEYS, "finetune.focal_gamma", "finetune.training", "data.augment"),
                NOT_TRAINED,
            ),
            "data.shots": NO_LABELS,
            "finetune.class_weight": NO_LABELS,
        },
        model_words="A zero-shot classifier, made of words for its classes, on the frozen",
        arm_words="words for the classes, without any label",
    ),
    StrategySpec(
        "lora", "epochs", trains_adapter=True, own_keys=("finetune.lora",),
        model_words="A LoRA adapter of",
    ),
    StrategySpec(
        "partial", "epochs", select_top_blocks, own_keys=("finetune.blocks",),
        model_words="The top blocks fine-tuned of",
    ),
    StrategySpec(
        "gradual", "phases", select_everything, own_keys=("finetune.gradual",),
        ignored_keys={
            "finetune.training.num_train_epochs": "each phase lasts finetune.gradual.epochs"
        },
        model_words="A gradual fine-tuning of",
    ),
    StrategySpec("full", "epochs", select_everything, model_words="A full fine-tuning of"),
    StrategySpec(
        "scratch", "rate_search", select_everything, is_baseline=True, measures_gain=True,
        brings="classical", own_keys=("measure.scratch",),
        ignored_keys=dict.fromkeys(TRAINING_KEYS, FROM_RANDOM),
        arm_words="the same architecture trained from scratch",
    ),
)  # fmt: skip
STRATEGIES = {spec.name: spec for spec in _SPECS}
"""Every strategy and baseline by name, the quickest first."""
FINETUNE_STRATEGIES = tuple(name for name, spec in STRATEGIES.items() if not spec.is_baseline)
"""The values of `finetune.strategy`."""
BASELINES = tuple(name for name, spec in STRATEGIES.items() if spec.is_baseline)
PROBE_ARM = "head"
"""The arm that is the linear probe: the verdict and the card compare with it."""
ZERO_SHOT_ARM = "zero_shot"
"""The arm without labels; also the name of its head, for `finetune.head_init` and `retain.kl.on`.
"""
GAIN_BASELINES = tuple(spec.name for spec in reversed(_SPECS) if spec.measures_gain)
"""The baselines that a transfer gain is measured over; of equal gains the first is named."""
