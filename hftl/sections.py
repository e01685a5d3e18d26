"""The sections of a recipe: their keys, defaults, and what each refuses.

The contract of every key stands in the README and in `hftl schema`. What a later version brings
is refused while it is not built, never ignored.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from hftl import upstream
from hftl.errors import RecipeError
from hftl.explain import closest

STRATEGIES = ("head", "partial", "lora", "full")
BASELINES = ("scratch", "classical", "majority")
NOT_BUILT = {
    "gradual": "gradual unfreezing",
    "zero_shot": "the zero-shot baseline",
}
OWNED = (
    "seed", "data_seed", "output_dir", "push_to_hub", "resume_from_checkpoint", "use_cpu",
    "disable_tqdm", "remove_unused_columns", "label_names",
)  # fmt: skip
UNBUILT_TRAINING = (
    "gradient_checkpointing", "activation_checkpointing", "neftune_noise_alpha", "deepspeed",
    "fsdp", "auto_find_batch_size",
)  # fmt: skip
OWNED_LORA = (
    "task_type", "peft_type", "inference_mode", "base_model_name_or_path", "revision",
    "auto_mapping", "peft_version",
)  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "eva", "corda", "loftq", "lora_ga")
NEEDS_OTHER_DATA = (
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "layer_replication",
    "eva_config", "corda_config", "lora_ga_config", "loftq_config", "megatron_config",
)  # fmt: skip
TRAINING = {"learning_rate": 5.0e-4, "num_train_epochs": 5}
LORA = {"r": 8, "lora_alpha": 16}


class Section(BaseModel):
    """A part of the recipe: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(Section):
    """The source model."""

    model: str
    revision: str | None = None
    published_as: str | None = None


class Table(Section):
    """A dataset: a file, a folder, `package:<import name>/<path>` or a Hub id."""

    path: str
    format: Literal["csv", "jsonl", "parquet", "txt", "textfolder", "imagefolder", "hub"] | None = (
        None
    )
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    text: str | list[str] = "text"
    image: str = "image"
    label: str | list[str] = "label"

    @model_validator(mode="after")
    def _columns(self) -> Self:
        if isinstance(self.text, list) and not 1 <= len(self.text) <= 2:
            raise ValueError("text is one column or two (a sentence pair)")
        if isinstance(self.label, list) and len(self.label) < 2:
            raise ValueError("label is one column, or for multi-label several of 0 and 1")
        return self

    @property
    def texts(self) -> list[str]:
        """The text columns, one or two."""
        return [self.text] if isinstance(self.text, str) else list(self.text)

    @property
    def labels(self) -> list[str]:
        """The label columns: one, or for multi-label several of 0 and 1."""
        return [self.label] if isinstance(self.label, str) else list(self.label)


class Fraction(Section):
    """A share of train, taken by content."""

    fraction: float = Field(gt=0, lt=1)


def _part(value: Any) -> str:
    given = value if isinstance(value, dict) else {}
    return "Table" if isinstance(value, Table) or "path" in given else "Fraction"


Part = Annotated[
    Annotated[Fraction, Tag("Fraction")] | Annotated[Table, Tag("Table")], Discriminator(_part)
]


class Data(Section):
    """What is learnt from, and how it is split."""

    task: Literal["classification", "multi-label", "regression", "token-classification"] | None = (
        "classification"
    )
    train: Table
    validation: Part = Fraction(fraction=0.2)
    test: Part = Fraction(fraction=0.2)
    unlabeled: None = None
    general: None = None
    group: str | None = None
    shots: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    bad_rows: Literal["refuse", "skip"] = "refuse"
    max_length: int = Field(default=128, ge=2)
    image_size: int | None = Field(default=None, ge=1, le=4096)
    augment: Literal["none", "light"] = "none"
    max_pixels: int = Field(default=40_000_000, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _columns_of_train(cls, tree: Any) -> Any:
        """Validation and test tables take from train what they do not say themselves."""
        if not isinstance(tree, dict) or not isinstance(tree.get("train"), dict):
            return tree
        tree = dict(tree)
        inherited = {
            key: tree["train"][key]
            for key in ("format", "name", "revision", "text", "image", "label")
            if key in tree["train"]
        }
        columns = {k: v for k, v in inherited.items() if k in ("text", "image", "label")}
        for part in ("validation", "test"):
            if isinstance(tree.get(part), dict) and "path" in tree[part]:
                same = tree[part].get("path") == tree["train"].get("path")
                tree[part] = (inherited if same else columns) | tree[part]
        return tree

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.task is None:
            raise ValueError("task null (adapt only) is not built yet; name a task")
        tables = [t for t in (self.train, self.validation, self.test) if isinstance(t, Table)]
        for table in tables:
            if isinstance(table.label, list) and self.task != "multi-label":
                raise ValueError("several label columns are for the task multi-label")
            if len(table.texts) > 1 and self.task == "token-classification":
                raise ValueError("token-classification reads one column, of lists of words")
        taken = sum(p.fraction for p in (self.validation, self.test) if isinstance(p, Fraction))
        if taken >= 1:
            raise ValueError(f"the fractions of validation and test add up to {taken:g}")
        return self


class Finetune(Section):
    """What trains, and how. `training` is transformers', `lora` is peft's."""

    strategy: Literal["head", "partial", "gradual", "lora", "full"] = "lora"
    pooling: Literal["native", "mean", "cls"] = "native"
    head_init: Literal["probe", "random"] = "probe"
    blocks: int = Field(default=2, ge=1)
    patience: int | None = Field(default=None, ge=1)
    """Evaluations without improvement on validation before training stops; null: never."""
    lora: dict[str, Any] = LORA
    training: dict[str, Any] = TRAINING

    @field_validator("strategy")
    @classmethod
    def _strategy_built(cls, strategy: str) -> str:
        if strategy in NOT_BUILT:
            raise ValueError(f"{NOT_BUILT[strategy]} is not built yet; use one of {STRATEGIES}")
        return strategy

    @field_validator("training", mode="before")
    @classmethod
    def _training_fields(cls, given: Any) -> dict[str, Any]:
        given = _known("training", given)
        for name, value in given.items():
            if name in OWNED or name.startswith("hub_"):
                raise RecipeError(
                    f"finetune.training.{name} belongs to hftl", "Remove it; see measure.seeds"
                )
            if name in UNBUILT_TRAINING and value:
                raise RecipeError(f"finetune.training.{name} is not built yet", "Remove it")
            if name == "eval_strategy" and value == "no":
                raise RecipeError(
                    "finetune.training.eval_strategy=no leaves no best epoch to keep",
                    "Use epoch or steps",
                )
            if name in ("learning_rate", "num_train_epochs", "per_device_train_batch_size"):
                _positive(f"finetune.training.{name}", value)
        return TRAINING | given

    @field_validator("lora", mode="before")
    @classmethod
    def _lora_fields(cls, given: Any) -> dict[str, Any]:
        given = _known("lora", given)
        for name, value in given.items():
            if name in OWNED_LORA:
                raise RecipeError(f"finetune.lora.{name} belongs to hftl", "Remove it")
            if name in NEEDS_OTHER_DATA and value:
                raise RecipeError(
                    f"finetune.lora.{name} does not fit an encoder's adapter here", "Remove it"
                )
            if name == "r":
                _positive("finetune.lora.r", value)
        start = given.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(CHANGES_BASE):
            raise RecipeError(
                f"finetune.lora.init_lora_weights={start} changes the base's own weights, so the "
                "adapter would not fit the public base",
                "Use true, gaussian or orthogonal",
            )
        return LORA | given


class Search(Section):
    """The learning rates that `scratch` is given a choice of, and its longer budget."""

    learning_rates: list[float] = Field(default=[1.0e-4, 3.0e-4, 1.0e-3], min_length=1)
    epochs_factor: float = Field(default=3, gt=0)


class Measure(Section):
    """What is compared, over which seeds, by which metric."""

    metric: str = "accuracy"
    """A built-in metric or `evaluate:<id>`; where none is given, pearson for regression,
    micro_f1 for multi-label, f1 of entities for token-classification."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0, 1, 2], min_length=1)
    arms: list[str | dict[str, dict[str, Any] | None]] = ["scratch", "head"]
    scratch: Search = Search()

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        twice = {seed for seed in seeds if seeds.count(seed) > 1}
        if twice:
            raise ValueError(f"seed {min(twice)} is given twice")
        return seeds


class Publish(Section):
    """Where the result goes."""

    repo_id: str | None = None
    private: bool = True

    @field_validator("repo_id")
    @classmethod
    def _built(cls, repo_id: str | None) -> str | None:
        if repo_id is not None:
            raise ValueError(
                "the push is not built yet: leave it null, see `hftl publish RUN --dry-run`"
            )
        return repo_id


def _known(kind: str, given: Any) -> dict[str, Any]:
    """`given` with every key known upstream and every value of its type."""
    if not isinstance(given, dict):
        raise ValueError(f"must be a mapping, got {given!r}")
    options = list(upstream.fields(kind))
    for name in given:
        if name not in options:
            raise RecipeError(
                f"unknown key 'finetune.{kind}.{name}'"
                + closest(name, options, f"finetune.{kind}."),
                "The names are those of "
                + ("transformers.TrainingArguments" if kind == "training" else "peft.LoraConfig"),
            )
    return {name: upstream.checked(kind, f"finetune.{kind}.{name}", v) for name, v in given.items()}


def _positive(name: str, value: Any) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise RecipeError(f"{name} must be a number above 0, got {value!r}", "Correct the value")
