"""A recipe: one YAML file, one experiment, and the arms it asks for."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import PrivateAttr, ValidationError, model_validator

from hftl.config import overrides as yamlfile
from hftl.config import secrets
from hftl.config.adapt import DEFAULT_ADAPT_RATES, Adapt, Stages
from hftl.config.data import Data
from hftl.config.errors import build_recipe_error, suggest_closest
from hftl.config.finetune import Finetune
from hftl.config.measure import BASELINES, STRATEGIES, UNBUILT_ARMS, Measure
from hftl.config.publish import Publish
from hftl.config.retain import Retain
from hftl.config.section import Section
from hftl.config.source import Source
from hftl.config.validation import (
    check_adaptation,
    check_benchmark,
    check_label_smoothing,
    check_pooling,
    check_retain,
)
from hftl.errors import RecipeError

DEFAULT_METRICS = {
    "regression": "pearson", "multi-label": "micro_f1", "token-classification": "f1",
}  # fmt: skip
ARM_SECTIONS = ("finetune", "retain", "adapt")
"""The sections in which an arm may differ from the recipe."""


class Recipe(Section):
    """A whole experiment. `source.model` and `data.train` are required."""

    source: Source
    data: Data
    adapt: Stages | None = None
    finetune: Finetune = Finetune()
    retain: Retain | None = None
    measure: Measure = Measure()
    publish: Publish = Publish()
    _path: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        check_pooling(self.data, self.finetune)
        check_label_smoothing(self.data, self.finetune)
        check_adaptation(self.stages, self.data)
        if self.retain is not None:
            check_retain(self.retain, self.data, self.finetune)
        check_benchmark(self.publish, self.data)
        return self

    @property
    def stages(self) -> list[Adapt]:
        """The adaptations, one after the other; none where `adapt` is null."""
        return list_stages(self.adapt)

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> "Recipe":
        """Reads a recipe file and applies `key=value` overrides.

        Raises:
            RecipeError: naming the file, the key and the closest match.
        """
        tree = _expand_shorthand(yamlfile.read_yaml(Path(path)))
        recipe = cls.parse(yamlfile.apply_overrides(tree, overrides or []), str(path))
        recipe._path = Path(path)
        return recipe

    @classmethod
    def parse(cls, tree: dict[str, Any], where: str = "recipe") -> "Recipe":
        """A recipe from nested mappings.

        Raises:
            RecipeError: naming `where`, the key and the closest match.
        """
        kept = {
            k: v
            for k, v in _expand_shorthand(tree).items()
            if v is not None or k in ("source", "data")
        }
        _refuse_secrets(kept, where)
        try:
            recipe = cls.model_validate(kept)
        except ValidationError as error:
            raise build_recipe_error(error, where, cls) from error
        if recipe.data.unlabeled is not None and not recipe.stages:
            raise RecipeError(
                f"{where}: data.unlabeled is read by adapt, which is null", "Remove one of them"
            )
        plan_arms(recipe, where)
        return recipe

    def default_output(self) -> Path:
        """`runs/<recipe's folder>-<stem>` under the current directory.

        Raises:
            RecipeError: if the recipe was not read from a file.
        """
        if self._path is None:
            raise RecipeError("a recipe made in Python has no name of its own", "Give output=")
        return Path("runs") / f"{self._path.resolve().parent.name}-{self._path.stem}"

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain nested mappings, every default spelt out."""
        return self.model_dump(mode="json")


def list_stages(adapt: Adapt | list[Adapt] | None) -> list[Adapt]:
    """An `adapt` section as a list."""
    if adapt is None:
        return []
    return adapt if isinstance(adapt, list) else [adapt]


@dataclass(frozen=True)
class Arm:
    """One way of training: a name, what it is, its own fine-tuning section, the adaptations that
    come before it, and what keeps it near the original."""

    name: str
    strategy: str
    finetune: Finetune
    stages: tuple[Adapt, ...] = ()
    retain: Retain | None = None


def plan_arms(recipe: Recipe, where: str = "recipe") -> list[Arm]:
    """The recipe's own arm first, then those of `measure.arms` in their order; none without a task.

    `scratch` brings `classical` along, and adaptation `source`, the recipe without it. A bare name
    that equals the own arm's is that arm.

    Raises:
        RecipeError: if two arms have one name, or an entry names neither strategy nor baseline.
    """
    if recipe.data.task is None:
        return []
    strategy = recipe.finetune.strategy
    own = Arm(strategy, strategy, recipe.finetune, tuple(recipe.stages), recipe.retain)
    if strategy == "head" and recipe.retain is not None:
        raise RecipeError(
            f"{where}: retain keeps what trains near the original, and the strategy head trains "
            "nothing of the encoder",
            "Leave retain out, or choose another finetune.strategy",
        )
    if strategy == "head" and (recipe.finetune.layer_decay or recipe.finetune.lr):
        raise RecipeError(
            f"{where}: layer_decay and lr are learning rates, and the strategy head is solved",
            "Leave them out, or choose another finetune.strategy",
        )
    found = [own]
    entries = [_split_entry(entry, where) for entry in recipe.measure.arms]
    if recipe.stages and "source" not in [name for name, _ in entries]:
        entries.insert(0, ("source", {}))
    for name, changes in entries:
        if name == own.name and not changes:
            continue
        arm = _build_arm(recipe, name, changes, where)
        if any(other.name == name for other in found):
            raise RecipeError(
                f"{where}: measure.arms has two arms named {name!r}", "Give one another name"
            )
        found.append(arm)
        if arm.strategy == "scratch" and ("classical", {}) not in entries:
            found.append(Arm("classical", "classical", recipe.finetune))
    return found


def _split_entry(
    entry: str | dict[str, dict[str, Any] | None], where: str
) -> tuple[str, dict[str, Any]]:
    """The name and the changes of an entry."""
    if isinstance(entry, str):
        return entry, {}
    if len(entry) != 1:
        raise RecipeError(
            f"{where}: an entry of measure.arms is a name or one name with its changes, "
            f"got {list(entry)}",
            "Write {name: {key: value}}",
        )
    name, changes = next(iter(entry.items()))
    return name, changes or {}


def _build_arm(recipe: Recipe, name: str, changes: dict[str, Any], where: str) -> Arm:
    if name in UNBUILT_ARMS:
        what = UNBUILT_ARMS[name]
        raise RecipeError(f"{where}: measure.arms: {what} is not built yet", "Remove the arm")
    if not name.replace("_", "").replace("-", "").isalnum() or not name.isascii():
        raise RecipeError(
            f"{where}: measure.arms: {name!r} cannot name a folder", "Use letters, digits, _ and -"
        )
    if name in (*BASELINES, "source") and changes and name != "scratch":
        raise RecipeError(f"{where}: the arm {name!r} takes no changes", "Remove them")
    if name == "source":
        if not recipe.stages:
            raise RecipeError(
                f"{where}: the arm 'source' goes without adaptation, and so does the recipe",
                "Remove the arm",
            )
        changes = {"adapt": None}
    if name not in STRATEGIES + BASELINES and not changes:
        raise RecipeError(
            f"{where}: unknown arm {name!r} in measure.arms"
            + suggest_closest(name, [*STRATEGIES, *BASELINES]),
            f"Known: {', '.join([*STRATEGIES, *BASELINES, 'source'])}",
        )
    tree = recipe.to_dict()
    place = f"{where}: measure.arms.{name}"
    for section, kinds in (("adapt", (dict, list)), ("retain", dict)):
        if isinstance(changes.get(section), kinds):
            # A whole section takes the place of the recipe's; it is no change of its keys.
            changes = dict(changes)
            tree[section] = changes.pop(section)
    if "adapt.method" in changes and isinstance(tree["adapt"], dict):
        _drop_default_rate(tree["adapt"], changes)
    for key, value in yamlfile.flatten(changes).items() if changes else ():
        section = key.split(".")[0]
        if section not in ARM_SECTIONS:
            raise RecipeError(
                f"{place}: {key} cannot differ between arms"
                + suggest_closest(section, list(ARM_SECTIONS)),
                "Change finetune, retain or adapt",
            )
        yamlfile.set_key(tree, key, value)
    if name in STRATEGIES:
        if "finetune.strategy" in yamlfile.flatten(changes):
            raise RecipeError(
                f"{place}: the name {name!r} is its strategy already", "Give the arm another name"
            )
        tree["finetune"]["strategy"] = name
    try:
        changed = Recipe.model_validate(tree)
    except ValidationError as error:
        raise build_recipe_error(error, place, Recipe) from error
    if name in BASELINES:
        return Arm(name, name, changed.finetune)
    if changed.finetune.strategy == "head":
        return Arm(name, "head", changed.finetune, tuple(changed.stages))
    return Arm(
        name, changed.finetune.strategy, changed.finetune, tuple(changed.stages), changed.retain
    )


def _drop_default_rate(adapt: dict[str, Any], changes: dict[str, Any]) -> None:
    """Another method has another usual rate, where the recipe names none of its own."""
    usual = DEFAULT_ADAPT_RATES[adapt["objective"], adapt["method"]]
    training = adapt["training"]
    if "adapt.training.learning_rate" not in changes and training["learning_rate"] == usual:
        del training["learning_rate"]


def _refuse_secrets(tree: dict[str, Any], where: str) -> None:
    """Refuses what the record would keep and a card would show."""
    for key, value in yamlfile.flatten(tree).items():
        found = secrets.find_secret(str(value)) if isinstance(value, (str, list)) else None
        if found is not None:
            raise RecipeError(
                f"{where}: {key} holds a secret: {found}",
                "Leave it out; tokens come from the environment or `hf auth login`",
            )


def _expand_shorthand(tree: dict[str, Any]) -> dict[str, Any]:
    """A copy in which `train: reviews.csv` is `train: {path: reviews.csv}`, and a task that has no
    accuracy worth its name is measured by its own metric where none is given."""
    tree = copy.deepcopy(tree)
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
