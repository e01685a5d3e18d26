"""Define the recipe: one YAML file, one experiment, and the arms that it plans.

A recipe is read without importing torch: structure, names and simple types of upstream arguments
are checked here, so that a misspelt key is answered at once. The real `TrainingArguments` and
`LoraConfig` are constructed by `check` and `run`, before anything trains.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import JsonValue, PrivateAttr, ValidationError, model_validator

from hftl.config import secrets
from hftl.config.adapt import DEFAULT_ADAPT_RATES, DEFAULT_MASK_RATIOS, Adapt, Stages
from hftl.config.data import Data
from hftl.config.finetune import Finetune
from hftl.config.measure import Measure
from hftl.config.overrides import apply_overrides, flatten, read_yaml, set_key
from hftl.config.publish import Publish
from hftl.config.refusals import build_recipe_error, show_value
from hftl.config.retain import Retain
from hftl.config.section import Section, Source
from hftl.config.validation import (
    check_corpus_is_read,
    check_quantized_source,
    check_quantized_strategy,
    check_sections,
    check_slices,
    check_solved_strategy,
    check_thresholds,
)
from hftl.errors import RecipeError, suggest_closest
from hftl.finetune.strategies import (
    BASELINES,
    FINETUNE_STRATEGIES,
    STRATEGIES,
    ZERO_SHOT_ARM,
    StrategySpec,
)

DEFAULT_METRICS = {
    "regression": "pearson", "multi-label": "micro_f1", "token-classification": "f1",
}  # fmt: skip
ARM_SECTIONS = ("finetune", "retain", "adapt")
"""The sections in which an arm may differ from the recipe."""
MAX_ARM_NAME = 100
"""Letters of an arm's name: folders are named after it, and hold 255 letters at most."""


@dataclass(frozen=True)
class Arm:
    """Describe one way of training, run once for each seed."""

    name: str
    strategy: str
    finetune: Finetune
    stages: tuple[Adapt, ...] = ()
    """The adaptations that come before it."""
    retain: Retain | None = None

    @property
    def spec(self) -> StrategySpec:
        """Return the facts about the arm's strategy or baseline."""
        return STRATEGIES[self.strategy]

    @property
    def starts_zero_shot(self) -> bool:
        """Return True where training starts from the zero-shot head."""
        return self.finetune.head_init == ZERO_SHOT_ARM and self.spec.changes_encoder

    @property
    def reads_class_words(self) -> bool:
        """Return True where the arm depends on the words for classes."""
        terms = () if self.retain is None else self.retain.kl_terms
        in_loss = any(term.on == ZERO_SHOT_ARM for term in terms)
        return self.strategy == ZERO_SHOT_ARM or self.starts_zero_shot or in_loss


class Recipe(Section):
    """Describe a whole experiment. `source.model` and `data.train` are required."""

    source: Source
    data: Data
    adapt: Stages | None = None
    finetune: Finetune = Finetune()
    retain: Retain | None = None
    measure: Measure = Measure()
    publish: Publish = Publish()
    _path: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        check_sections(self.data, self.stages, self.finetune, self.retain, self.publish)
        check_quantized_source(self.source, self.stages, self.finetune, self.retain)
        check_slices(self.data, self.measure.slices)
        check_thresholds(self.data, self.measure.thresholds)
        return self

    @property
    def stages(self) -> list[Adapt]:
        """Return the adaptations in their order; none where `adapt` is null."""
        if self.adapt is None:
            return []
        return self.adapt if isinstance(self.adapt, list) else [self.adapt]

    @property
    def all_stages(self) -> list[Adapt]:
        """Return the adaptations of the recipe, then those of its arms."""
        return [*self.stages, *(stage for arm in self.arms for stage in arm.stages)]

    @property
    def arms(self) -> list[Arm]:
        """Plan the arms: the recipe's own first, none without a task.

        Raises:
            RecipeError: see `_plan_arms`.
        """
        return _plan_arms(self)

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> "Recipe":
        """Read a recipe file and apply `key=value` overrides.

        Raises:
            RecipeError: naming the file, the key and the closest match.
        """
        tree = _expand_shorthand(read_yaml(Path(path)))
        recipe = cls.parse(apply_overrides(tree, overrides or []), str(path))
        recipe._path = Path(path)
        return recipe

    @classmethod
    def parse(cls, tree: Mapping[str, object], where: str = "recipe") -> "Recipe":
        """Build a recipe from nested mappings, and plan its arms.

        Raises:
            RecipeError: naming `where`, the key and the closest match.
        """
        # A null section is an absent one, but a missing required section is named as missing.
        sections = {
            key: value
            for key, value in _expand_shorthand(tree).items()
            if value is not None or key in ("source", "data")
        }
        try:
            _refuse_secrets(sections)
            _refuse_nonfinite(sections)
            recipe = cls.model_validate(sections)
            check_corpus_is_read(recipe.data, recipe.stages, recipe.measure.analyses)
            _ = recipe.arms
        except ValidationError as error:
            raise build_recipe_error(error, where, cls, sections) from error
        except RecipeError as error:
            raise RecipeError(f"{where}: {error.what}", error.fix) from error
        return recipe

    def default_output(self) -> Path:
        """Return `runs/<recipe's folder>-<stem>` under the current directory.

        Raises:
            RecipeError: if the recipe was not read from a file.
        """
        if self._path is None:
            raise RecipeError("a recipe made in Python has no file name", "Give output=")
        return Path("runs") / f"{self._path.resolve().parent.name}-{self._path.stem}"

    def to_dict(self) -> dict[str, JsonValue]:
        """Return the recipe as nested mappings of JSON values, with every default."""
        return self.model_dump(mode="json")


def _plan_arms(recipe: Recipe) -> list[Arm]:
    """Return the recipe's own arm, then those of `measure.arms` in their order.

    `scratch` brings `classical` along, and adaptation `source`, the recipe without it. A bare name
    that equals the own arm's is that arm.

    Raises:
        RecipeError: if two arms have one name, or an entry names neither strategy nor baseline.
    """
    if recipe.data.task is None:
        return []
    check_solved_strategy(recipe.finetune, recipe.retain)
    check_quantized_strategy(recipe.source, recipe.finetune)
    strategy = recipe.finetune.strategy
    own = Arm(strategy, strategy, recipe.finetune, tuple(recipe.stages), recipe.retain)
    arms = [own]
    entries = [_split_entry(entry) for entry in recipe.measure.arms]
    if recipe.stages and "source" not in [name for name, _ in entries]:
        entries.insert(0, ("source", {}))
    for name, changes in entries:
        if name == own.name and not changes:
            continue
        arm = _build_arm(recipe, name, changes)
        if any(other.name == name for other in arms):
            raise RecipeError(f"measure.arms has two arms named {name!r}", "Give one another name")
        arms.append(arm)
        brought = arm.spec.brings
        if brought is not None and (brought, {}) not in entries:
            arms.append(Arm(brought, brought, recipe.finetune))
    return arms


def _split_entry(
    entry: str | dict[str, dict[str, object] | None],
) -> tuple[str, dict[str, object]]:
    """Return the name and the changes of an entry of `measure.arms`."""
    if isinstance(entry, str):
        return entry, {}
    if len(entry) != 1:
        raise RecipeError(
            f"an entry of measure.arms is a name or one name with its changes, got {list(entry)}",
            "Write {name: {key: value}}",
        )
    name, changes = next(iter(entry.items()))
    return name, changes or {}


def _build_arm(recipe: Recipe, name: str, changes: dict[str, object]) -> Arm:
    """Return an arm: the recipe with its changes, validated as a recipe again."""
    _check_arm_name(recipe, name, changes)
    place = f"measure.arms.{name}"
    tree = _apply_changes(recipe, {"adapt": None} if name == "source" else changes, place)
    if name in FINETUNE_STRATEGIES:
        if "finetune.strategy" in flatten(changes):
            raise RecipeError(
                f"{place}: the name {name!r} is its strategy already", "Give the arm another name"
            )
        set_key(tree, "finetune.strategy", name)
    try:
        changed = Recipe.model_validate(tree)
    except ValidationError as error:
        raise build_recipe_error(error, place, Recipe, tree) from error
    if name in BASELINES:
        return Arm(name, name, changed.finetune)
    strategy, stages = changed.finetune.strategy, tuple(changed.stages)
    # A solved head trains nothing that could be kept near the original.
    retain = None if STRATEGIES[strategy].is_solved else changed.retain
    return Arm(name, strategy, changed.finetune, stages, retain)


def _check_arm_name(recipe: Recipe, name: str, changes: Mapping[str, object]) -> None:
    """Refuse a name that is no folder's, or that says neither strategy nor baseline."""
    if not name.replace("_", "").replace("-", "").isalnum() or not name.isascii():
        raise RecipeError(
            f"measure.arms: {name!r} cannot name a folder", "Use letters, digits, _ and -"
        )
    if len(name) > MAX_ARM_NAME:
        raise RecipeError(
            f"measure.arms: the name {name[:20]}... has {len(name)} letters, and {MAX_ARM_NAME} "
            "are allowed",
            "Give the arm a shorter name",
        )
    takes_changes = name in STRATEGIES and not STRATEGIES[name].is_solved
    if name in (*BASELINES, "source") and changes and not takes_changes:
        raise RecipeError(f"the arm {name!r} takes no changes", "Remove them")
    if name == "source" and not recipe.stages:
        raise RecipeError(
            "the arm 'source' goes without adaptation, and so does the recipe", "Remove the arm"
        )
    known = [*FINETUNE_STRATEGIES, *BASELINES]
    if name not in (*known, "source") and not changes:
        raise RecipeError(
            f"unknown arm {name!r} in measure.arms" + suggest_closest(name, known),
            f"Known: {', '.join([*known, 'source'])}",
        )


def _apply_changes(recipe: Recipe, changes: dict[str, object], place: str) -> dict[str, JsonValue]:
    """Return the recipe as a tree in which the changes of an arm are made."""
    tree = recipe.to_dict()
    for section, kinds in (("adapt", (dict, list)), ("retain", dict)):
        if isinstance(changes.get(section), kinds):
            # A whole section replaces the recipe's; it is not merged with it key by key.
            changes = dict(changes)
            set_key(tree, section, changes.pop(section))
    if not isinstance(changes.get("finetune", {}), dict):
        raise RecipeError(
            f"{place}: 'finetune' must be a mapping, got {show_value(changes['finetune'])}",
            "Write finetune: {strategy: ...}, or finetune.strategy: ...",
        )
    flat = flatten(changes) if changes else {}
    for place_of_stage, stage in _list_stages(tree["adapt"]):
        if {f"{place_of_stage}.objective", f"{place_of_stage}.method"} & flat.keys():
            _drop_stage_defaults(stage)
    for key, value in flat.items():
        section = key.split(".")[0]
        if section not in ARM_SECTIONS:
            raise RecipeError(
                f"{place}: {key} cannot differ between arms"
                + suggest_closest(section, list(ARM_SECTIONS)),
                "Change finetune, retain or adapt",
            )
        set_key(tree, key, value)
    return tree


def _list_stages(adapt: JsonValue) -> list[tuple[str, dict[str, JsonValue]]]:
    """Return each adaptation of a recipe's tree with its key: `adapt`, or `adapt.0` of several."""
    if isinstance(adapt, list):
        named = [(f"adapt.{number}", stage) for number, stage in enumerate(adapt)]
    else:
        named = [("adapt", adapt)]
    return [(key, stage) for key, stage in named if isinstance(stage, dict)]


def _drop_stage_defaults(stage: dict[str, JsonValue]) -> None:
    """Drop the values that are defaults of an adaptation's objective and method: others differ."""
    objective, method = str(stage.get("objective")), str(stage.get("method", "full"))
    training = stage.get("training")
    if isinstance(training, dict):
        rate = DEFAULT_ADAPT_RATES.get((objective, method))
        if training.get("learning_rate") == rate:
            training.pop("learning_rate", None)
    if stage.get("mask_ratio") == DEFAULT_MASK_RATIOS.get(objective):
        stage.pop("mask_ratio", None)


def _refuse_secrets(tree: Mapping[str, object]) -> None:
    """Refuse tokens and passwords, which the record would keep and a card would show."""
    for key, value in flatten(tree).items():
        secret = secrets.find_secret(str(value)) if isinstance(value, (str, list)) else None
        if secret is not None:
            raise RecipeError(
                f"{key} holds a secret: {secret}",
                "Leave it out; tokens come from the environment or `hf auth login`",
            )


def _refuse_nonfinite(tree: Mapping[str, object]) -> None:
    """Refuse infinity and NaN, whatever section or arm holds them: JSON has no such number."""
    for key, value in _iterate_values(tree, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"'{key}' must be a finite number, got {value}", "Correct the value")


def _iterate_values(tree: object, key: str) -> Iterator[tuple[str, object]]:
    """Yield every value in nested mappings and lists with its dotted key."""
    items: list[tuple[object, object]] = []
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        yield key, tree
    for name, value in items:
        yield from _iterate_values(value, f"{key}.{name}" if key else str(name))


def _expand_shorthand(given: Mapping[str, object]) -> dict[str, object]:
    """Return a copy with `train: a.csv` as `train: {path: a.csv}`, and the task's metric.

    The default metric is accuracy except where a task has none worth its name.
    """
    tree = copy.deepcopy(dict(given))
    data = tree.get("data")
    if isinstance(data, dict):
        for part in ("train", "validation", "test", "unlabeled", "general"):
            if isinstance(data.get(part), str):
                data[part] = {"path": data[part]}
        measure = tree.get("measure") or {}
        metric = DEFAULT_METRICS.get(str(data.get("task")))
        if metric and isinstance(measure, dict):
            tree["measure"] = {"metric": metric} | measure
    return tree
