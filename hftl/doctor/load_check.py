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
    ADAPTER,
    CONFIG,
    RECORD,
    WEIGHTS,
    Finding,
    Patient,
    defect,
    several,
    warning,
)
from hftl.doctor.shape_check import CANNOT, LEFT_OUT, PEFT_TYPES, PREFIX
from hftl.errors import RecipeError, message_line
from hftl.models.heads import load_class
from hftl.models.parts import empty, under
from hftl.models.source import SourceModel, absurd, contradicted, shapes_in
from hftl.publish.checks import reload_difference

SEEDS = (20_010_101, 20_020_202)
ALLOWED = 1e-5
"""The largest difference, relative to the largest output where that is above 1."""
PATIENCE = 600
"""Seconds for one load."""


def reloaded(patient: Patient, source: SourceModel, kind: Any, config: Any) -> list[Finding]:
    """Compares two loads, and the run's sample with what it gave in training.

    Returns:
        A finding for each that differs, or for a load that failed.
    """
    with tempfile.TemporaryDirectory() as place:
        clean = Path(place)
        config = type(config).from_dict(config.to_dict() | {"architectures": [kind.__name__]})
        config.save_pretrained(clean)
        if patient.is_adapter:
            _write_adapter(patient, clean)
        try:
            first, second = loads(clean, source.folder, kind.__name__)
        except LoadFailed as error:
            return [defect("reload", f"it does not load: {error}", patient.place,
                           "Correct what stands above; else save it again")]  # fmt: skip
    return [*_differ(first, second, patient.place), *_sample(patient, source)]


class LoadFailed(Exception):
    """A fresh process could not load it; the message is the last line it wrote."""


def loads(clean: Path, base: Path, name: str) -> list[np.ndarray]:
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
        return [_answer(process) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def _answer(process: "subprocess.Popen[str]") -> np.ndarray:
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise LoadFailed(f"it took more than {PATIENCE} s") from error
    if process.returncode != 0:
        raise LoadFailed((err.strip().splitlines() or ["it ended without a word"])[-1][:300])
    return np.array(json.loads(out.strip().splitlines()[-1])["output"])


def _write_adapter(patient: Patient, clean: Path) -> None:
    kept = {k: v for k, v in patient.settings.items() if k not in LEFT_OUT}
    (clean / ADAPTER).write_text(json.dumps(kept), encoding="utf-8")
    shutil.copyfile(patient.folder / WEIGHTS, clean / WEIGHTS)


def _differ(first: np.ndarray, second: np.ndarray, place: str) -> list[Finding]:
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return [defect("nan", "the model's outputs are not finite", place, "Train again")]
    difference = float(np.abs(first - second).max())
    if difference <= ALLOWED * max(1.0, float(np.abs(first).max())):
        return []
    return [defect(
        "reload", f"two loads differ by {difference:.2g}: some of its weights are drawn at random",
        place, "Save every module that the base has not: see modules_to_save",
    )]  # fmt: skip


def _sample(patient: Patient, source: SourceModel) -> list[Finding]:
    """The run's own rows and what the trained model said of them."""
    sample = None if patient.run is None else patient.run / "phases" / "package" / "sample.json"
    if sample is None or not sample.exists() or CONFIG not in patient.names:
        return []
    difference = reload_difference(patient.folder, source.folder, sample, "cpu")
    if difference <= ALLOWED:
        return []
    return [defect(
        "reload", f"its logits differ by {difference:.2g} from those of the trained model", RECORD,
        "Run the same `hftl run` again",
    )]  # fmt: skip


def loadable(patient: Patient) -> str | None:
    """Why an adapter is not loaded, if so."""
    kind = patient.settings.get("peft_type")
    if patient.is_adapter and kind not in PEFT_TYPES:
        return f"adapters of type {kind} are not loaded"
    return None


# Modules that the base has no weights for: every load draws them anew unless they are saved.


WHERE_READ = ("logits", "last_hidden_state")


def fresh(patient: Patient, source: SourceModel, kind: Any, config: Any) -> list[Finding]:
    """Compares what the loader reports as missing with what the adapter saves.

    Raises:
        RecipeError: if the base does not load.
    """
    try:
        _need_size(source, kind, config)
        _, missing = load_class(source, kind, config, {})
    except (*CANNOT, SafetensorError) as error:
        if isinstance(error, RecipeError):
            raise
        what = f"{source.spec} does not load: {message_line(error)}"
        raise RecipeError(what, "Correct its config.json") from error
    saved = {key.removeprefix(PREFIX) for key in patient.shapes} if patient.is_adapter else set()
    lost = sorted({key.rsplit(".", 1)[0] for key in missing - saved})
    anatomy = source.anatomy
    encoder = f"{anatomy.encoder}."
    lost = [name for name in lost if not under(name.removeprefix(encoder), anatomy.unused)]
    beside = [name for name in lost if _beside(name, kind, anatomy.pooler)]
    found = []
    if set(lost) - set(beside):
        names = [name for name in lost if name not in beside]
        where = ADAPTER if patient.is_adapter else "model.safetensors"
        found.append(defect(
            "fresh", f"{several(names)}: not in the {'base' if patient.is_adapter else 'weights'}, "
            "and not saved: drawn at random on every load", where,
            "Train and save it: name it in modules_to_save, then train again",
        ))  # fmt: skip
    if beside and not patient.pooled:
        found.append(warning(
            "fresh", f"{beside[0]} is drawn at random: pooler_output means nothing", WEIGHTS,
            "Use last_hidden_state",
        ))  # fmt: skip
    return found


def _need_size(source: SourceModel, kind: Any, config: Any) -> None:
    """Refuses to fill a model that its file says nothing of: it may be larger than the memory."""
    why = contradicted(empty(kind, config), shapes_in(source.folder))
    if why is not None:
        raise RecipeError(f"{source.spec} does not load: {why}", "Correct its config.json")


def _beside(name: str, kind: Any, pooler: str | None) -> bool:
    """The pooler of a bare encoder: its hidden states do not depend on it."""
    bare = not kind.__name__.endswith("Classification")
    return bare and pooler is not None and under(name, (pooler,))


# A whole model as its own base.


def whole_model(patient: Patient) -> SourceModel | Finding:
    """The model, or why nobody can load it: its config.json is of none.

    Raises:
        RecipeError: if its config is of an architecture that hftl does not know.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from hftl.models.architectures import anatomy_of

    kind = patient.config.get("model_type")
    if not isinstance(kind, str):
        # transformers would go by the folder's name.
        return _of_no_model(f"its model_type is {kind!r}, expected a name")
    why = absurd(patient.config)
    if why is not None:
        return _of_no_model(why)
    folder = Path(patient.folder)
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (*CANNOT, OSError, StrictDataclassError) as error:
        return _of_no_model(message_line(error))
    anatomy_of(config)
    return SourceModel(str(folder), folder, None, None, True, config, config.model_type)


def _of_no_model(why: str) -> Finding:
    return defect("config", f"is of no model: {why}", CONFIG, "Save it again, or fetch it again")
