"""Names of transformers 4 in a world of transformers 5: the ViT family was renamed."""

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import torch

from hftl.doctor.adapter_folder import ADAPTER, WEIGHTS, Finding, Patient, defect, several
from hftl.errors import message_line
from hftl.models.parts import TOKENS, auto_class, empty, stock_class
from hftl.models.source import SourceModel

PREFIX = "base_model.model."
MARKS = re.compile(
    r"\.(lora_|ia3_|vera_|hada_|lokr_|oft_|boft_|weight$|bias$|modules_to_save|original_module)"
)
STEPS = (
    (r"\battention\.attention\.(query|key|value)\b", r"attention.\1"),
    (r"\battention\.self\.(query|key|value)\b", r"attention.\1"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"\boutput\.dense\b", "mlp.fc2"),
    (r"\bquery\b", "q_proj"),
    (r"\bkey\b", "k_proj"),
    (r"\bvalue\b", "v_proj"),
)
LISTS = ((r"\bencoder\.layer\.", "layers."), (r"$^", ""))
"""ViT's blocks have moved, DINOv2's have not."""
OLD = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense",
       "encoder.layer.")  # fmt: skip


def module_of(key: str) -> str:
    """The path in the model of the module that a tensor of an adapter belongs to."""
    inside = key.removeprefix(PREFIX)
    mark = MARKS.search(inside)
    return inside[: mark.start()] if mark else inside


def modern(name: str, modules: Iterable[str]) -> str | None:
    """What a module of transformers 4 is called in the model at hand; None if it is not there."""
    known = set(modules)
    return next((text for text in _candidates(name) if text != name and text in known), None)


def _candidates(name: str) -> Iterator[str]:
    """A name under the new rules: the layer's, the list's, or both."""
    moved = name
    for pattern, new in STEPS:
        moved = re.sub(pattern, new, moved)
    for text, (old, new) in product((moved, name), LISTS):
        yield re.sub(old, new, text)


def renamed_keys(keys: Iterable[str], modules: Iterable[str]) -> dict[str, str]:
    """New names of the tensors whose module is in the model under a new name only."""
    known = set(modules)
    found: dict[str, str] = {}
    for key in keys:
        module = module_of(key)
        new = None if module in known else modern(module, known)
        if new is not None:
            found[key] = key.replace(module, new, 1)
    return found


def looks_old(targets: Any) -> bool:
    """Whether target modules are named as the ViT family's were."""
    names = [targets] if isinstance(targets, str) else list(targets or [])
    return any(old in str(name) for name in names for old in OLD)


def targets_of(keys: Iterable[str]) -> list[str]:
    """Full paths of the modules that carry an adapter, which match themselves and no other."""
    return sorted({module_of(key) for key in keys if ".lora_" in key})


def short_targets(paths: Iterable[str]) -> list[str]:
    """The last names of these paths; a name for every layer where all are adapted alike."""
    return sorted({path.rsplit(".", 1)[-1] for path in paths})


def renamed_patterns(patterns: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Keys of rank_pattern or alpha_pattern under the name that matches an adapted layer's path."""
    known = list(paths)
    return {
        next((text for text in _candidates(key) if _matches(text, known)), key): value
        for key, value in patterns.items()
    }


def _matches(pattern: str, paths: list[str]) -> bool:
    """Whether a layer's path ends so, as peft reads the names of its patterns."""
    return any(path == pattern or path.endswith(f".{pattern}") for path in paths)


# Whether the adapter's tensors are those that peft would load on this base.
#
# The stock class is built without weights, peft wraps it as adapter_config.json says, and names and
# shapes of what it would save are compared with what stands in the file. peft itself loads an
# adapter of another depth without a word.


PEFT_TYPES = ("LORA", "IA3", "LN_TUNING", "VERA", "LOHA", "LOKR", "OFT", "BOFT")
"""Kinds of adapter that only put tensors into the model when they are loaded."""
LEFT_OUT = (
    "auto_mapping", "megatron_config", "megatron_core", "runtime_config", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "kasa_config", "velora_config",
)  # fmt: skip
"""Settings that no loading needs, some of which import or fetch what they name."""
SAID_BY_TASK = {
    "SEQ_CLS": "classification", "TOKEN_CLS": TOKENS,
}  # fmt: skip
ADAPTER_NAME = re.compile(
    r"(\.(?:lora|ia3|vera|hada|lokr|oft|boft)_\w+|\.modules_to_save)\.(?!(?:weight|bias)$)[^.]+"
)
"""An adapter's name in the name of a tensor, as in `lora_A.default.weight`."""
WRAPPED = re.compile(r"\.(modules_to_save|original_module)\.")
CANNOT = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, IndexError, re.error)
"""What peft raises on settings that make no sense for a model."""


def model_class(patient: Patient, source: SourceModel) -> Any:
    """The class of transformers that the adapter, or the whole model, was made of.

    None where it is not told, or is none of transformers' own.
    """
    if patient.pooled:
        return auto_class(source.config)
    mapping = patient.settings.get("auto_mapping")
    if isinstance(mapping, dict):
        return _own_class(mapping.get("base_model_class"))
    task = patient.settings.get("task_type")
    if isinstance(task, str) and task in SAID_BY_TASK:
        return stock_class(source.config, SAID_BY_TASK[task])
    if task == "FEATURE_EXTRACTION":
        return auto_class(source.config)
    kinds = patient.config.get("architectures") or [None]
    return _own_class(kinds[0]) or (None if task else stock_class(source.config, "classification"))


def with_labels(patient: Patient, source: SourceModel, kind: Any) -> Any:
    """The base's config with as many labels as the adapter's head has outputs.

    And with as many tokens as the adapter has embeddings, where it brings them, as peft does after
    the vocabulary was resized.
    """
    config = deepcopy(source.config)
    count = outputs_of(patient, source, kind)
    if count is not None:
        config.num_labels = count
    rows = saved_embeddings(patient, kind, config)
    if rows is not None:
        config.vocab_size = rows
    return config


def saved_embeddings(patient: Patient, kind: Any, config: Any) -> int | None:
    """Return how many tokens' embeddings the adapter brings; None where it brings none."""
    if not patient.is_adapter or kind is None or not hasattr(config, "vocab_size"):
        return None
    try:
        model = empty(kind, config)
        table = model.get_input_embeddings()
    except (*CANNOT, NotImplementedError):
        return None
    path = next((name for name, module in model.named_modules() if module is table), None)
    shape = patient.shapes.get(f"{PREFIX}{path}.weight")
    return shape[0] if shape else None


def outputs_of(patient: Patient, source: SourceModel, kind: Any) -> int | None:
    """How many outputs the saved head has; None without one."""
    if kind is None or not kind.__name__.endswith("Classification"):
        return None
    tokens = kind.__name__.endswith("ForTokenClassification")
    anatomy = source.anatomy.for_task(TOKENS) if tokens else source.anatomy
    prefix = PREFIX if patient.is_adapter else ""
    shape = patient.shapes.get(f"{prefix}{anatomy.last_linear}.weight")
    return shape[0] if shape else None


def peft_config(settings: dict[str, Any]) -> Any:
    """peft's config of these settings, without those that import anything.

    Raises:
        ValueError: with the rest of CANNOT, if peft refuses them.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"]]
    known = {field.name for field in fields(kind)} - set(LEFT_OUT)
    return kind(**{key: value for key, value in settings.items() if key in known})


@dataclass(frozen=True)
class ExpectedTensors:
    """Return what peft reads from the file of an adapter: name and shape of every tensor.

    `adapter` are those that must be there. `own` are the base's own tensors, which peft overwrites
    where a file holds them, as it does after the vocabulary was resized.
    """

    adapter: dict[str, tuple[int, ...]]
    own: dict[str, tuple[int, ...]]


def expected_tensors(kind: Any, config: Any, settings: dict[str, Any]) -> ExpectedTensors:
    """Wrap a model without weights as the settings say, and list what peft would load into it.

    Raises:
        ValueError: with the rest of CANNOT, if peft cannot wrap the model so.
    """
    from peft import get_peft_model

    adapter = peft_config(settings)
    if hasattr(adapter, "init_lora_weights"):
        # A decomposition of the base's weights needs their values; shapes do not.
        adapter.init_lora_weights = False
    with torch.device("meta"):
        model: Any = get_peft_model(empty(kind, config), adapter, low_cpu_mem_usage=True)
        return tensors_of(model, "default")


def tensors_of(model: Any, name: str) -> ExpectedTensors:
    """List the tensors that peft loads into a model for its adapter of this name."""
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    state = model.state_dict().items()
    own = {k: v for k, v in state if not is_of_adapter(k) and not WRAPPED.search(k)}
    return ExpectedTensors(
        {key: tuple(tensor.shape) for key, tensor in saved.items()},
        {key: tuple(tensor.shape) for key, tensor in own.items()},
    )


def modules_in(kind: Any, config: Any) -> list[str]:
    """The paths of the class's modules."""
    return [name for name, _ in empty(kind, config).named_modules()]


def fit(patient: Patient, kind: Any, config: Any) -> list[Finding]:
    """Compares the file with what peft expects."""
    try:
        modules = modules_in(kind, config)
    except CANNOT:
        what = f"it was made of {kind.__name__}, which cannot be built of this base's config"
        return [defect("base-shape", what, ADAPTER, "Give the base that it was trained on")]
    old = renamed_keys(patient.shapes, modules)
    if old:
        return [_stale(f"{len(old)} tensors have names of transformers 4", WEIGHTS)]
    try:
        expected = expected_tensors(kind, config, patient.settings)
    except CANNOT as error:
        return [_refused(patient, error, modules)]
    return compare_shapes(patient.shapes, expected)


def compare_shapes(shapes: dict[str, tuple[int, ...]], expected: ExpectedTensors) -> list[Finding]:
    """Compare the tensors of an adapter's file with those that peft loads.

    Returns:
        A finding for each kind of tensor that is missing, left over, or of another shape.
    """
    named = keys_with_adapter_name(shapes, expected)
    if named:
        return [defect(
            "names", f"{len(named)} tensors carry the adapter's own name, as peft neither writes "
            "nor always reads them", min(named), "Rename them: --fix",
        )]  # fmt: skip
    wanted = expected.adapter
    straight = {key for key in shapes.keys() - wanted if expected.own.get(key) == shapes[key]}
    lacking = sorted(wanted.keys() - shapes)
    strange = sorted(shapes.keys() - wanted - straight)
    unlike = sorted(k for k in wanted.keys() & shapes if wanted[k] != shapes[k])
    ranks = [k for k in unlike if _only_rank(k, shapes[k], wanted[k])]
    found = []
    if ranks:
        key = ranks[0]
        found.append(defect(
            "rank", f"{len(ranks)} tensors have another rank than r and rank_pattern say: "
            f"{shapes[key]} where {wanted[key]} is expected", key, "Correct r and rank_pattern",
        ))  # fmt: skip
    dora = [k for k in lacking + strange if ".lora_magnitude_vector" in k]
    if dora:
        found.append(_dora(dora, missing=dora[0] in lacking))
    wrong = [k for k in unlike if k not in ranks]
    wrong += [k for k in lacking + strange if is_of_adapter(k) and k not in dora]
    if wrong:
        found.append(_other_shape(wrong, shapes, expected))
    heads = sorted({module_of(k) for k in lacking if not is_of_adapter(k)})
    if heads:
        found.append(defect(
            "fresh", "modules_to_save names it, and its weights were not saved: they are drawn at "
            "random on every load", several(heads), "Save the adapter again from the trained model",
        ))  # fmt: skip
    idle = [k for k in strange if not is_of_adapter(k)]
    if idle:
        found.append(_no_place(idle, shapes, expected))
    return found


def keys_with_adapter_name(
    shapes: dict[str, tuple[int, ...]], expected: ExpectedTensors
) -> dict[str, str]:
    """Return the names that peft writes for tensors whose names hold that of the adapter."""
    renamed: dict[str, str] = {}
    for key in shapes.keys() - expected.adapter:
        short = ADAPTER_NAME.sub(r"\1", key).replace(".modules_to_save.", ".")
        for name in (short, short.removesuffix(".weight")):
            if name != key and name in expected.adapter and name not in shapes:
                renamed[key] = name
                break
    return renamed


def _dora(keys: list[str], missing: bool) -> Finding:
    """Say how the settings contradict the tensors of a DoRA adapter."""
    if missing:
        what = f"use_dora is set, and {len(keys)} magnitudes are not in the file"
        fix = "Save it again; remove use_dora only if it was trained without"
    else:
        what = f"the file holds {len(keys)} magnitudes of DoRA, which peft passes over"
        fix = "Set use_dora to true in adapter_config.json"
    return defect("config", what, keys[0], fix)


def _other_shape(
    wrong: list[str], shapes: dict[str, tuple[int, ...]], expected: ExpectedTensors
) -> Finding:
    key = wrong[0]
    if all(k in expected.adapter and k not in shapes for k in wrong):
        layers = {module_of(k) for k in wrong}
        partial = {module_of(k) for k in shapes} & layers
        if partial:
            what = f"{len(wrong)} tensors of its layers are not in the file"
            return defect("corrupt", what, key, "Save it again, or fetch it again")
        what = "the base has a layer that the adapter has not"
    elif key not in shapes:
        what = "the base has a layer that the adapter has not"
    elif key not in expected.adapter:
        what = "the adapter has a layer that the base has not"
    else:
        what = f"the adapter has {shapes[key]} where the base takes {expected.adapter[key]}"
    return defect(
        "base-shape", f"{what} ({len(wrong)} tensors; peft may load the rest without a word)", key,
        "Give the base that it was trained on, or save the adapter again",
    )  # fmt: skip


def _no_place(
    keys: list[str], shapes: dict[str, tuple[int, ...]], expected: ExpectedTensors
) -> Finding:
    """Say that tensors of whole modules, which the adapter brings, do not enter the model."""
    key = keys[0]
    if key in expected.own:
        what = f"the adapter has {shapes[key]} where the base takes {expected.own[key]}"
        return defect("base-shape", what, key, "Give the base that it was trained on")
    return defect(
        "fresh", "its weights are in the file, and the model has no such module: peft leaves them "
        "out", several(sorted({module_of(k) for k in keys})), "Give the class it was trained with",
    )  # fmt: skip


def _refused(patient: Patient, error: Exception, modules: list[str]) -> Finding:
    """peft cannot wrap the base: the names are old, or the base is another architecture."""
    from peft.utils.error import PeftError

    targets = patient.settings.get("target_modules")
    unmatched = isinstance(error, PeftError) or "not found in the base model" in str(error)
    if unmatched and looks_old(targets) and set(targets_of(patient.shapes)) <= set(modules):
        return _stale("target_modules match nothing: they are names of transformers 4", ADAPTER)
    if unmatched:
        return defect("base-shape", "target_modules match nothing in the base", ADAPTER,
                      "Give the base that it was trained on")  # fmt: skip
    return defect("config", f"peft refuses it: {message_line(error)}", ADAPTER, "Correct it")


def _stale(what: str, where: str) -> Finding:
    return defect("stale-names", what, where, "Rename them: --fix")


def is_of_adapter(key: str) -> bool:
    """Whether a tensor is of the adapter itself, not of a module that was saved whole."""
    return re.search(r"\.(lora|ia3|vera|hada|lokr|oft|boft)_", key) is not None


def _only_rank(key: str, told: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    if len(told) != len(expected):
        return False
    differ = [
        axis for axis, pair in enumerate(zip(told, expected, strict=True)) if len({*pair}) > 1
    ]
    return (".lora_A" in key and differ == [0]) or (".lora_B" in key and differ == [1])


def _own_class(name: Any) -> Any:
    """A model class of transformers by its name."""
    import transformers

    if not isinstance(name, str) or not re.fullmatch(r"[A-Z]\w*", name):
        return None
    found = getattr(transformers, name, None)
    own = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if own else None
