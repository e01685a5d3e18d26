"""`hftl doctor`: everything that can be told of an adapter without trusting it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hftl.doctor.adapter_folder import (
    DEFECT,
    MODEL_CONFIG,
    AdapterFolder,
    Finding,
    defect,
    open_adapter_folder,
)
from hftl.doctor.base import check_base_name, find_base
from hftl.doctor.companion_files import check_card, check_companion_files
from hftl.doctor.file_checks import (
    check_finite_weights,
    check_scaling,
    check_trained,
    check_unsafe_files,
)
from hftl.doctor.load_check import (
    check_reload,
    check_uninitialized_weights,
    find_load_obstacle,
    read_whole_model,
)
from hftl.doctor.shape_check import adjust_config, check_fit, count_outputs, find_model_class
from hftl.errors import RecipeError, RunFolderError
from hftl.models.source import SourceModel
from hftl.runtime import run_folder

BLOCKING_KINDS = ("corrupt", "config", "rank", "nan")
"""After one of these there is nothing to learn from a load; nor where the tensors do not fit."""


@dataclass
class Examination:
    """What was found, and what could not be looked at; `source` is the base, if it was at hand."""

    folder: AdapterFolder
    findings: list[Finding] = field(default_factory=list)
    unexamined: list[str] = field(default_factory=list)
    source: SourceModel | None = None
    model_class: Any = None
    config: Any = None
    hub_failed: bool = False

    @property
    def defects(self) -> list[Finding]:
        """The findings that an adapter must not have."""
        return [found for found in self.findings if found.severity == DEFECT]

    @property
    def exit_code(self) -> int:
        """0 sound, 4 defects, 5 nothing was found but the hub did not give the base."""
        return 4 if self.defects else 5 if self.hub_failed else 0


def examine_adapter(place: str | Path, base: str | None = None) -> Examination:
    """Examines an adapter or a whole model; nothing of it is run, and no pickle is opened.

    Args:
        place: a folder, a run folder, or a hub id.
        base: the adapter's base, where it is not the one it names.

    Raises:
        RecipeError: if there is neither an adapter nor a model, or no base where `base` says.
        HubError: if a hub id cannot be had.
    """
    patient, broken = open_adapter_folder(place)
    found = Examination(patient, broken)
    found.unexamined += [patient.unlisted_reason] if patient.unlisted_reason else []
    found.findings += [
        *check_unsafe_files(patient),
        *check_scaling(patient),
        *check_finite_weights(patient),
    ]
    found.findings += check_trained(patient)
    if patient.run is not None and (patient.run / "record.json").exists():
        found.findings += _check_record(patient.run)
    if patient.is_adapter:
        _check_adapter_base(found, base)
    else:
        _check_whole_model(found)
    if found.source is not None:
        _check_on_base(found, found.source)
    outputs = None
    if found.source is not None:
        outputs = count_outputs(patient, found.source, found.model_class)
    embeddings = getattr(found.config, "vocab_size", None)
    found.findings += [
        *check_companion_files(patient, found.source, found.model_class, outputs, embeddings),
        *check_card(patient),
    ]
    return found


def _check_record(run: Path) -> list[Finding]:
    """Whether the record that a run's card rests on is the one that was written."""
    try:
        run_folder.check_finished_files(run, "record.json")
    except RunFolderError as error:
        return [defect("record", error.what, "record.json", error.fix)]
    return []


def _check_adapter_base(found: Examination, base: str | None) -> None:
    if not found.folder.adapter_config:
        found.unexamined.append("the base: adapter_config.json does not open")
        return
    found.findings += check_base_name(found.folder)
    sought, wrong = find_base(found.folder, base)
    found.findings += wrong
    found.source, found.hub_failed = sought.source, sought.hub_failed
    if sought.source is None:
        found.unexamined.append(
            f"fresh modules, shapes, names and reload, which need the base: {sought.reason}"
        )


def _check_whole_model(found: Examination) -> None:
    settings = [one.where for one in found.findings if one.kind == "unsafe"]
    if any(where.endswith(".json") for where in settings) or found.folder.model_config.get(
        "quantization_config"
    ):
        found.unexamined.append("fresh modules and reload: what its settings ask for is not loaded")
        return
    if MODEL_CONFIG not in found.folder.json_files:
        found.unexamined.append(f"fresh modules and reload: {MODEL_CONFIG} does not open")
        return
    try:
        own = read_whole_model(found.folder)
    except RecipeError as error:
        found.unexamined.append(f"fresh modules and reload: {error.what}")
        return
    if isinstance(own, Finding):
        found.findings.append(own)
        found.unexamined.append(f"fresh modules and reload: {MODEL_CONFIG} is of no model")
    else:
        found.source = own


def _check_on_base(found: Examination, source: SourceModel) -> None:
    """What only the base can tell: the fit, fresh modules, and whether a load is repeatable."""
    patient = found.folder
    found.model_class = find_model_class(patient, source)
    why = find_load_obstacle(patient)
    if found.model_class is None:
        why = "it does not say which class of transformers it was made of"
    if not patient.shapes:
        why = "its weights do not open"
    if why:
        found.unexamined.append(f"fresh modules, shapes, names and reload: {why}")
        return
    found.config = adjust_config(patient, source, found.model_class)
    misfits = check_fit(patient, found.model_class, found.config) if patient.is_adapter else []
    found.findings += misfits
    spoilt = [one.kind for one in found.defects if one.kind in BLOCKING_KINDS or one in misfits]
    try:
        found.findings += check_uninitialized_weights(
            patient, source, found.model_class, found.config
        )
    except RecipeError as error:
        spoilt.append("base")
        found.unexamined.append(f"fresh modules: {error.what}")
        if not patient.is_adapter:
            why = error.what.removeprefix("source.model: ")
            found.findings.append(defect("config", why, MODEL_CONFIG, "Save it again"))
    if spoilt:
        found.unexamined.append(f"reload: not tried after a finding of {spoilt[0]}")
    else:
        found.findings += check_reload(patient, source, found.model_class, found.config)
