"""Load the adapter twice in a fresh process, with different random seeds, and compare the outputs.

What no file holds is drawn at random, so it shows as a difference. The process gets a folder with
what loading needs and nothing else of the examined one; one process, as importing its libraries
takes most of the time.
"""

import json
import shutil
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from hftl.doctor.adapter_folder import (
    BLOCKING_KINDS,
    AdapterFolder,
    Finding,
    defect,
    format_names,
    warning,
)
from hftl.doctor.adapter_tensors import IGNORED_SETTINGS, ModelBuildError, translate_build_errors
from hftl.doctor.examination import Examination
from hftl.doctor.load_process import LoadProcess
from hftl.errors import RecipeError, format_error_line
from hftl.measure.record import PUBLISHED_FILE
from hftl.models.architectures import get_config_spec
from hftl.models.config_limits import find_config_fault, find_size_fault
from hftl.models.encoders import build_on_meta, has_prefix
from hftl.models.heads import load_class
from hftl.models.lora_concat import PEFT_PREFIX
from hftl.models.source import SourceModel
from hftl.models.weight_files import read_tensor_shapes
from hftl.publish.checks import measure_reload_difference
from hftl.publish.settings_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG

SEEDS = (20_010_101, 20_020_202)
LOAD_TOLERANCE = 1e-5
"""Largest difference, relative to the largest output where that is above 1."""


def check_reload(examination: Examination) -> list[Finding]:
    """Compare two loads, and the run's sample with its outputs in training."""
    folder, source, config = examination.folder, examination.source, examination.config
    if source is None or config is None:
        return []
    obstacles = [
        one.kind
        for one in examination.defects
        if one.kind in BLOCKING_KINDS or one in examination.misfits
    ]
    obstacles += [] if examination.base_loads else ["base"]
    if obstacles:
        examination.unexamined.append(f"reload: not tried after a finding of {obstacles[0]}")
        return []
    name = examination.model_class.__name__
    with tempfile.TemporaryDirectory() as place:
        clean = Path(place)
        config = type(config).from_dict(config.to_dict() | {"architectures": [name]})
        config.save_pretrained(clean)
        if folder.is_adapter:
            _copy_adapter(folder, clean)
        try:
            first, second = predict_in_fresh_process(
                clean, source.folder, name, examination.process
            )
        except LoadFailedError as error:
            fix = "Correct what stands above; else save it again"
            return [defect("reload", f"it does not load: {error}", folder.place, fix)]
    sample = _check_sample(folder, source, examination.process)
    return [*_compare_outputs(first, second, folder.place), *sample]


class LoadFailedError(Exception):
    """The fresh process failed to load it; the message is the last line that it wrote."""


def predict_in_fresh_process(
    clean: Path, base: Path, name: str, process: LoadProcess | None = None
) -> list[np.ndarray]:
    """Return the outputs of two loads in a fresh process, one a seed.

    Args:
        clean: the folder that is loaded.
        base: the folder of its base.
        name: of the class.
        process: the fresh process, where one was prepared.

    Raises:
        LoadFailedError: if it ends with an error, or not at all.
        OSError: if the system starts no process, which is no fault of the folder.
    """
    arguments = [str(clean), str(base), name, *map(str, SEEDS)]
    if process is not None and process.is_waiting:
        done = process.load(arguments)
    else:
        with closing(LoadProcess()) as started:
            done = started.load(arguments)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise LoadFailedError(last[:300])
    outputs = json.loads(done.stdout.strip().splitlines()[-1])["outputs"]
    return [np.array(output) for output in outputs]


def _copy_adapter(folder: AdapterFolder, clean: Path) -> None:
    settings = folder.adapter_config.settings
    safe = {key: value for key, value in settings.items() if key not in IGNORED_SETTINGS}
    (clean / ADAPTER_CONFIG).write_text(json.dumps(safe), encoding="utf-8")
    shutil.copyfile(folder.path / ADAPTER_WEIGHTS, clean / ADAPTER_WEIGHTS)


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


def _check_sample(
    folder: AdapterFolder, source: SourceModel, process: LoadProcess | None
) -> list[Finding]:
    """Compare the outputs for rows of the run with those of the trained model."""
    sample = None if folder.run is None else folder.run / "phases" / "package" / "sample.json"
    if sample is None or not sample.exists() or MODEL_CONFIG not in folder.files:
        return []
    difference = measure_reload_difference(folder.path, source.folder, sample, "cpu", process)
    if difference <= LOAD_TOLERANCE:
        return []
    what = f"its logits differ by {difference:.2g} from those of the trained model"
    return [defect("reload", what, PUBLISHED_FILE, "Run the same `hftl run` again")]


def check_uninitialized_weights(examination: Examination) -> list[Finding]:
    """Report modules that neither the base nor the adapter holds: every load draws them anew."""
    folder, source, config = examination.folder, examination.source, examination.config
    if source is None or config is None:
        return []
    try:
        missing = _list_missing_weights(source, examination.model_class, config)
    except RecipeError as error:
        examination.base_loads = False
        examination.unexamined.append(f"fresh modules: {error.what}")
        why = error.what.removeprefix("source.model: ")
        return [] if folder.is_adapter else [defect("config", why, MODEL_CONFIG, "Save it again")]
    saved = {key.removeprefix(PEFT_PREFIX) for key in folder.shapes} if folder.is_adapter else set()
    architecture = source.architecture_spec
    encoder = f"{architecture.encoder}."
    names = [
        name
        for name in sorted({key.rsplit(".", 1)[0] for key in missing - saved})
        if not has_prefix(name.removeprefix(encoder), architecture.unused_parts)
    ]
    poolers = [
        n for n in names if _is_unused_pooler(n, examination.model_class, architecture.pooler)
    ]
    names = [name for name in names if name not in poolers]
    findings = []
    if names:
        place, where = "weights", "model.safetensors"
        if folder.is_adapter:
            place, where = "base", ADAPTER_CONFIG
        what = (
            f"{format_names(names)}: not in the {place}, and not saved: drawn at random on every "
            "load"
        )
        fix = "Train and save it: name it in modules_to_save, then train again"
        findings.append(defect("fresh", what, where, fix))
    if poolers and not folder.has_own_head:
        what = f"{poolers[0]} is drawn at random: pooler_output means nothing"
        findings.append(warning("fresh", what, ADAPTER_WEIGHTS, "Use last_hidden_state"))
    return findings


def _list_missing_weights(source: SourceModel, model_class: Any, config: Any) -> set[str]:
    """Return the tensors of the class that the base does not hold.

    Raises:
        RecipeError: if the base does not load.
    """
    try:
        with translate_build_errors():
            _check_size(source, model_class, config)
    except ModelBuildError as error:
        what = f"{source.name} does not load: {format_error_line(error)}"
        raise RecipeError(what, "Correct its config.json") from error
    return set(load_class(source, model_class, config, {})[1])


def _check_size(source: SourceModel, kind: Any, config: Any) -> None:
    """Refuse to build a model far larger than its file: it may not fit into memory."""
    why = find_size_fault(build_on_meta(kind, config), read_tensor_shapes(source.folder))
    if why is not None:
        raise RecipeError(f"{source.name} does not load: {why}", "Correct its config.json")


def _is_unused_pooler(name: str, kind: Any, pooler: str | None) -> bool:
    """Return whether a module is the pooler of a bare encoder, which its hidden states ignore."""
    bare = not kind.__name__.endswith("Classification")
    return bare and pooler is not None and has_prefix(name, (pooler,))


def read_whole_model(folder: AdapterFolder) -> SourceModel | Finding:
    """Return a whole model as its own base, or a finding on why nobody can load it.

    Raises:
        RecipeError: if its config is of an architecture that hftl does not know.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    model_type = folder.model_config.settings.get("model_type")
    if not isinstance(model_type, str):
        # transformers would guess the type from the folder's name.
        return _build_config_defect(f"its model_type is {model_type!r}, expected a name")
    fault = find_config_fault(folder.model_config.settings)
    if fault is not None:
        return _build_config_defect(fault)
    try:
        with translate_build_errors():
            config: Any = AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
    except (ModelBuildError, OSError, StrictDataclassError) as error:
        # OSError where the file does not open, StrictDataclassError for a value of another type.
        return _build_config_defect(format_error_line(error))
    get_config_spec(config)
    path = folder.path
    return SourceModel(str(path), path, None, None, True, config, config.model_type)


def _build_config_defect(why: str) -> Finding:
    return defect(
        "config", f"is of no model: {why}", MODEL_CONFIG, "Save it again, or fetch it again"
    )
