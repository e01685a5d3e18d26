"""Two fresh processes load the adapter with different random seeds: they must say the same.

They get a folder of their own with what loading needs and nothing else of the patient's.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from hftl.doctor.adapter_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODEL_CONFIG,
    RECORD_FILE,
    AdapterFolder,
    Finding,
    defect,
    format_names,
    warning,
)
from hftl.doctor.shape_check import IGNORED_SETTINGS, PEFT_ERRORS, PEFT_TYPES, PREFIX
from hftl.errors import RecipeError, format_error_line
from hftl.models.encoders import build_on_meta, has_prefix
from hftl.models.heads import load_class
from hftl.models.source import SourceModel, find_config_fault, find_size_fault, read_tensor_shapes
from hftl.publish.checks import measure_reload_difference

SEEDS = (20_010_101, 20_020_202)
LOAD_TOLERANCE = 1e-5
"""The largest difference, relative to the largest output where that is above 1."""
LOAD_TIMEOUT_SECONDS = 600
"""Seconds for one load."""


def check_reload(
    patient: AdapterFolder, source: SourceModel, kind: Any, config: Any
) -> list[Finding]:
    """Compares two loads, and the run's sample with what it gave in training.

    Returns:
        A finding for each that differs, or for a load that failed.
    """
    with tempfile.TemporaryDirectory() as place:
        clean = Path(place)
        config = type(config).from_dict(config.to_dict() | {"architectures": [kind.__name__]})
        config.save_pretrained(clean)
        if patient.is_adapter:
            _copy_adapter(patient, clean)
        try:
            first, second = load_in_processes(clean, source.folder, kind.__name__)
        except LoadFailedError as error:
            return [defect("reload", f"it does not load: {error}", patient.place,
                           "Correct what stands above; else save it again")]  # fmt: skip
    return [*_compare_outputs(first, second, patient.place), *_check_sample(patient, source)]


class LoadFailedError(Exception):
    """A fresh process could not load it; the message is the last line it wrote."""


def load_in_processes(clean: Path, base: Path, name: str) -> list[np.ndarray]:
    """The outputs of fresh processes, one a seed, side by side.

    Raises:
        LoadFailed: if one of them ends with an error, or not at all.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name_ in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTHONPATH"):
        environment.pop(name_, None)
    script = str(Path(__file__).with_name("load_once.py"))
    running = [
        subprocess.Popen(
            [sys.executable, "-P", script, str(clean), str(base), name, str(seed)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for seed in SEEDS
    ]  # fmt: skip
    try:
        return [_read_output(process) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def _read_output(process: "subprocess.Popen[str]") -> np.ndarray:
    try:
        out, err = process.communicate(timeout=LOAD_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise LoadFailedError(f"it took more than {LOAD_TIMEOUT_SECONDS} s") from error
    if process.returncode != 0:
        raise LoadFailedError((err.strip().splitlines() or ["it ended without a word"])[-1][:300])
    return np.array(json.loads(out.strip().splitlines()[-1])["output"])


def _copy_adapter(patient: AdapterFolder, clean: Path) -> None:
    kept = {k: v for k, v in patient.adapter_config.items() if k not in IGNORED_SETTINGS}
    (clean / ADAPTER_CONFIG).write_text(json.dumps(kept), encoding="utf-8")
    shutil.copyfile(patient.folder / ADAPTER_WEIGHTS, clean / ADAPTER_WEIGHTS)


def _compare_outputs(first: np.ndarray, second: np.ndarray, place: str) -> list[Finding]:
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return [defect("nan", "the model's outputs are not finite", place, "Train again")]
    difference = float(np.abs(first - second).max())
    if difference <= LOAD_TOLERANCE * max(1.0, float(np.abs(first).max())):
        return []
    return [defect(
        "reload", f"two loads differ by {difference:.2g}: some of its weights are drawn at random",
        place, "Save every module that the base has not: see modules_to_save",
    )]  # fmt: skip


def _check_sample(patient: AdapterFolder, source: SourceModel) -> list[Finding]:
    """The run's own rows and what the trained model said of them."""
    sample = None if patient.run is None else patient.run / "phases" / "package" / "sample.json"
    if sample is None or not sample.exists() or MODEL_CONFIG not in patient.files:
        return []
    difference = measure_reload_difference(patient.folder, source.folder, sample, "cpu")
    if difference <= LOAD_TOLERANCE:
        return []
    return [
        defect(
            "reload",
            f"its logits differ by {difference:.2g} from those of the trained model",
            RECORD_FILE,
            "Run the same `hftl run` again",
        )
    ]


def find_load_obstacle(patient: AdapterFolder) -> str | None:
    """Why an adapter is not loaded, if so."""
    kind = patient.adapter_config.get("peft_type")
    if patient.is_adapter and kind not in PEFT_TYPES:
        return f"adapters of type {kind} are not loaded"
    return None


# Modules that the base has no weights for: every load draws them anew unless they are saved.


WHERE_READ = ("logits", "last_hidden_state")


def check_uninitialized_weights(
    patient: AdapterFolder, source: SourceModel, kind: Any, config: Any
) -> list[Finding]:
    """Compares what the loader reports as missing with what the adapter saves.

    Raises:
        RecipeError: if the base does not load.
    """
    try:
        _check_size(source, kind, config)
        _, missing = load_class(source, kind, config, {})
    except (*PEFT_ERRORS, SafetensorError) as error:
        if isinstance(error, RecipeError):
            raise
        what = f"{source.name} does not load: {format_error_line(error)}"
        raise RecipeError(what, "Correct its config.json") from error
    saved = {key.removeprefix(PREFIX) for key in patient.shapes} if patient.is_adapter else set()
    lost = sorted({key.rsplit(".", 1)[0] for key in missing - saved})
    architecture = source.architecture_spec
    encoder = f"{architecture.encoder}."
    lost = [
        name for name in lost if not has_prefix(name.removeprefix(encoder), architecture.unused_parts)
    ]
    beside = [name for name in lost if _is_unused_pooler(name, kind, architecture.pooler)]
    found = []
    if set(lost) - set(beside):
        names = [name for name in lost if name not in beside]
        where = ADAPTER_CONFIG if patient.is_adapter else "model.safetensors"
        found.append(
            defect(
                "fresh",
                f"{format_names(names)}: not in the {'base' if patient.is_adapter else 'weights'}, "
                "and not saved: drawn at random on every load",
                where,
                "Train and save it: name it in modules_to_save, then train again",
            )
        )
    if beside and not patient.has_own_head:
        found.append(
            warning(
                "fresh",
                f"{beside[0]} is drawn at random: pooler_output means nothing",
                ADAPTER_WEIGHTS,
                "Use last_hidden_state",
            )
        )
    return found


def _check_size(source: SourceModel, kind: Any, config: Any) -> None:
    """Refuses to fill a model that its file says nothing of: it may be larger than the memory."""
    why = find_size_fault(build_on_meta(kind, config), read_tensor_shapes(source.folder))
    if why is not None:
        raise RecipeError(f"{source.name} does not load: {why}", "Correct its config.json")


def _is_unused_pooler(name: str, kind: Any, pooler: str | None) -> bool:
    """The pooler of a bare encoder: its hidden states do not depend on it."""
    bare = not kind.__name__.endswith("Classification")
    return bare and pooler is not None and has_prefix(name, (pooler,))


# A whole model as its own base.


def read_whole_model(patient: AdapterFolder) -> SourceModel | Finding:
    """The model, or why nobody can load it: its config.json is of none.

    Raises:
        RecipeError: if its config is of an architecture that hftl does not know.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from hftl.models.architectures import get_architecture

    kind = patient.model_config.get("model_type")
    if not isinstance(kind, str):
        # transformers would go by the folder's name.
        return _build_config_defect(f"its model_type is {kind!r}, expected a name")
    why = find_config_fault(patient.model_config)
    if why is not None:
        return _build_config_defect(why)
    folder = Path(patient.folder)
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (*PEFT_ERRORS, OSError, StrictDataclassError) as error:
        return _build_config_defect(format_error_line(error))
    get_architecture(config)
    return SourceModel(str(folder), folder, None, None, True, config, config.model_type)


def _build_config_defect(why: str) -> Finding:
    return defect(
        "config", f"is of no model: {why}", MODEL_CONFIG, "Save it again, or fetch it again"
    )
