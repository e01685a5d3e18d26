"""Build the cache keys of a run's parts.

A part's key is the whole recipe, flattened, minus the keys that `CacheRules` names with a reason,
so that a new recipe key counts everywhere until somebody says where it does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from hftl.config import overrides
from hftl.config.adapt import Adapt
from hftl.config.recipe import Arm, Recipe
from hftl.config.retain import Retain
from hftl.finetune.context import ExperimentContext
from hftl.finetune.strategies import STRATEGIES
from hftl.measure.record import SCHEMA_VERSION
from hftl.runtime import distributed
from hftl.runtime.hardware import get_device, get_dtype_name
from hftl.runtime.run_folder import SEMANTICS, StageInputs, fingerprint

ENCODING_KEYS = ("data.max_length", "data.image_size", "data.augment")
"""Read by what trains and not by the data phase, whose rows are not encoded yet."""
ROWS_COUNT = "the fingerprint of the rows counts beside the recipe"
PLACE_KEYS = {
    f"data.{table}.{key}": "data count by content, wherever they are"
    for table in ("train", "validation", "test", "unlabeled", "general")
    for key in ("path", "format", "split", "revision", "name")
}


@dataclass(frozen=True)
class CacheRules:
    """Name the recipe keys that a part of a run does not read; it reads all others.

    Attributes:
        unread: the reason by key, or by the start of keys; the longest start decides.
        read: keys that are read although a shorter start of theirs is unread.
    """

    unread: Mapping[str, str]
    read: tuple[str, ...] = ()

    def explain(self, key: str) -> str | None:
        """Return why a change of the key does not matter to the part; None where it does."""
        starts = [s for s in (*self.unread, *self.read) if key == s or key.startswith(f"{s}.")]
        return self.unread.get(max(starts, key=len, default=""))

    def select(self, flat: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
        """Return the flattened recipe without the unread keys."""
        return {key: value for key, value in flat.items() if self.explain(key) is None}


DATA_RULES = CacheRules({
    "source": "the kind of inputs that it reads counts beside the recipe",
    **dict.fromkeys(
        ("adapt", "finetune", "retain", "measure", "publish"), "it comes after the data"
    ),
    **dict.fromkeys(ENCODING_KEYS, "rows are encoded by what trains"),
    "data.unlabeled": "adaptation reads it",
    "data.general": "general rows are a part of their own",
    "data.label_names": "they are words beside the labels, which stay",
    **PLACE_KEYS,
})  # fmt: skip
GENERAL_RULES = CacheRules(
    {
        "source": "the image processor counts beside the recipe",
        **dict.fromkeys(("adapt", "finetune", "retain", "measure", "publish"), "it comes later"),
        "data": ROWS_COUNT,
        **PLACE_KEYS,
    },
    read=("data.general", "data.group", "data.seed", "data.bad_rows"),
)
ADAPT_RULES = CacheRules(
    {
        "source": "the hash of its weights counts beside the recipe",
        **dict.fromkeys(("finetune", "retain", "measure", "publish"), "it comes after adaptation"),
        "data": "the fingerprints of rows and corpora count beside the recipe",
    },
    # A probe guards on the features that fine-tuning pools, fitted on rows that shots draw.
    read=(
        *ENCODING_KEYS, "data.seed", "data.shots", "finetune.pooling", "data.unlabeled.text",
        "data.unlabeled.image", "data.general.text", "data.general.image",
    ),
)  # fmt: skip
ORIGINAL_RULES = CacheRules(
    {
        "source": "the hashes of its weights, config and preprocessing count beside the recipe",
        **dict.fromkeys(
            ("adapt", "finetune", "retain", "measure", "publish"), "the source is as it is"
        ),
        "data": ROWS_COUNT,
        **PLACE_KEYS,
    },
    read=("data.task", "data.max_length", "data.image_size", "data.seed", "data.general"),
)


def get_arm_rules(arm: Arm) -> CacheRules:
    """Return what an arm does not read: keys of other strategies, of data that are rows by now."""
    others = [spec for spec in STRATEGIES.values() if spec is not arm.spec]
    unread = {
        "source": "the hash of its weights counts beside the recipe",
        "data": ROWS_COUNT,
        "measure": "it says which arms run, and measures what they have predicted",
        "publish": "publishing comes after every arm",
        "finetune.cache": "it says how frozen blocks are computed, not what they return",
        **{key: f"{spec.name} alone reads it" for spec in others for key in spec.own_keys},
        **PLACE_KEYS,
    }
    if not arm.spec.changes_encoder and not arm.stages:
        unread["data.general"] = "its encoder is the source's, or none, and forgets nothing"
    read = (
        *ENCODING_KEYS, "data.shots", "data.general", "finetune.class_weight", *arm.spec.own_keys,
    )  # fmt: skip
    if arm.reads_class_words:
        unread.pop("finetune.zero_shot", None)
        read = (*read, "finetune.zero_shot", "data.label_names")
    return CacheRules(unread | dict(arm.spec.ignored_keys), read)


def build_data_key(recipe: Recipe) -> dict[str, JsonValue]:
    """Return the recipe keys, with their values, that the data phase reads."""
    return DATA_RULES.select(flatten_recipe(recipe))


def build_general_key(recipe: Recipe) -> dict[str, JsonValue]:
    """Return the recipe keys, with their values, that the general rows depend on."""
    return GENERAL_RULES.select(flatten_recipe(recipe))


def build_original_key(recipe: Recipe) -> dict[str, JsonValue]:
    """Return the recipe keys, with their values, that the source's embeddings depend on."""
    return ORIGINAL_RULES.select(flatten_recipe(recipe))


def build_adapt_key(recipe: Recipe, stages: Sequence[Adapt], number: int) -> dict[str, JsonValue]:
    """Return the recipe keys, with their values, that one adaptation reads.

    Args:
        recipe: data and pooling.
        stages: the adaptations of an arm, one after the other.
        number: of this one, from 1; it reads those before it, too.
    """
    return ADAPT_RULES.select(_flatten_sections(recipe) | flatten_stages(stages[:number]))


def build_arm_key(recipe: Recipe, arm: Arm) -> dict[str, JsonValue]:
    """Return the recipe keys, with their values, that an arm reads; the same for every seed.

    The search of scratch's learning rate and the choice of a KL weight depend on the same keys.
    """
    flat = _flatten_sections(recipe)
    flat = {key: value for key, value in flat.items() if not key.startswith("finetune.")}
    flat |= overrides.flatten(arm.finetune.model_dump(mode="json"), "finetune")
    flat |= flatten_stages(arm.stages)
    if arm.retain is not None:
        flat |= flatten_retain(arm.retain)
    return get_arm_rules(arm).select(flat)


def build_record_key(recipe: Recipe, stages: Mapping[str, JsonValue], publish: bool) -> str:
    """Return the hash of all that the files of a finished run come from.

    Args:
        recipe: the whole of it.
        stages: the hashes of the finished stages, by name.
        publish: whether there is a publish folder, too.
    """
    inputs = fingerprint({"recipe": recipe.to_dict(), **stages})
    return fingerprint({"inputs": inputs, "publish": publish, "schema_version": SCHEMA_VERSION})


def build_arm_inputs(recipe: Recipe, context: ExperimentContext, arm: Arm) -> StageInputs:
    """Return all that an arm depends on: recipe keys, version, source model and rows."""
    key = build_arm_key(recipe, arm)
    if context.prepared.modality == "image":
        # Images have no tokens.
        key.pop("data.max_length", None)
    inputs: StageInputs = {
        "recipe": key,
        "asked": select_recipe_values(recipe, key),
        **build_context_inputs(context),
    }
    if context.general is not None and any(name.startswith("data.general.") for name in key):
        inputs["general"] = context.general.facts.fingerprint
    if not arm.spec.is_solved:
        inputs["processes"] = distributed.get_world_size()
    return inputs


def build_context_inputs(context: ExperimentContext) -> StageInputs:
    """Return what all that trains depends on beside the recipe: version, source model and rows."""
    inputs: StageInputs = {
        "semantics": SEMANTICS,
        "weights": context.weights_hash,
        "config": context.config_hash,
        "preprocessing": context.preprocessing_hash,
        "data": context.prepared.facts.fingerprint,
    }
    if context.source.quantization is not None:
        inputs["quantization"] = context.source.quantization
    return inputs


def build_checkpoint_key(
    inputs: StageInputs, training: Mapping[str, object], processes: int
) -> StageInputs:
    """Return all that a training's next step depends on, beside what its checkpoint holds.

    Args:
        inputs: of the training.
        training: the recipe's arguments, which name its precision or leave it to the device.
        processes: that share each of its steps.
    """
    return {
        **inputs,
        "processes": processes,
        "device": get_device(),
        "precision": get_dtype_name(training),
    }


def select_recipe_values(recipe: Recipe, reads: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Return what the recipe itself says of the keys that an arm reads."""
    flat = flatten_recipe(recipe)
    return {key: flat.get(key) for key in reads}


def flatten_stages(stages: Sequence[Adapt]) -> dict[str, JsonValue]:
    """Return the adaptations as `adapt.key`, or `adapt.0.key` where there are several."""
    dumped = [stage.model_dump(mode="json") for stage in stages]
    if not dumped:
        return {}
    if len(dumped) == 1:
        return overrides.flatten(dumped[0], "adapt")
    return overrides.flatten({str(i): stage for i, stage in enumerate(dumped)}, "adapt")


def flatten_retain(retain: Retain) -> dict[str, JsonValue]:
    """Return the section of an arm as `retain.key`, or `retain.kl.0.key` of several terms."""
    tree = {
        key: dict(enumerate(value)) if isinstance(value, list) and key == "kl" else value
        for key, value in retain.model_dump(mode="json").items()
        if value is not None
    }
    if retain.replay is not None and not retain.replay.labelled:
        # Without labels there is no loss to weigh.
        tree["replay"] = {"ratio": retain.replay.ratio}
    return overrides.flatten(tree, "retain")


def _flatten_sections(recipe: Recipe) -> dict[str, JsonValue]:
    """Return the recipe by dotted keys, without `adapt` and `retain`, which arms have their own."""
    tree = recipe.to_dict()
    del tree["adapt"], tree["retain"]
    return overrides.flatten(tree)


def flatten_recipe(recipe: Recipe) -> dict[str, JsonValue]:
    """Return the whole recipe by dotted keys."""
    retain = {} if recipe.retain is None else flatten_retain(recipe.retain)
    return _flatten_sections(recipe) | flatten_stages(recipe.stages) | retain
