"""`hftl doctor`: everything that can be told of an adapter without trusting it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hftl.doctor.adapter_folder import CONFIG, DEFECT, Finding, Patient, defect, opened
from hftl.doctor.base import find_base, naming
from hftl.doctor.companion_files import card, company
from hftl.doctor.file_checks import not_finite, scaling, unsafe, untrained
from hftl.doctor.load_check import fresh, loadable, reloaded, whole_model
from hftl.doctor.shape_check import fit, model_class, outputs_of, with_labels
from hftl.errors import RecipeError, RunFolderError
from hftl.models.source import SourceModel
from hftl.runtime import run_folder

SPOILS_LOADING = ("corrupt", "config", "rank", "nan")
"""After one of these there is nothing to learn from a load; nor where the tensors do not fit."""


@dataclass
class Examination:
    """What was found, and what could not be looked at; `source` is the base, if it was at hand."""

    patient: Patient
    findings: list[Finding] = field(default_factory=list)
    unexamined: list[str] = field(default_factory=list)
    source: SourceModel | None = None
    kind: Any = None
    config: Any = None
    hub_trouble: bool = False

    @property
    def defects(self) -> list[Finding]:
        """The findings that an adapter must not have."""
        return [found for found in self.findings if found.severity == DEFECT]

    @property
    def exit_code(self) -> int:
        """0 sound, 4 defects, 5 nothing was found but the hub did not give the base."""
        return 4 if self.defects else 5 if self.hub_trouble else 0


def examine(place: str | Path, base: str | None = None) -> Examination:
    """Examines an adapter or a whole model; nothing of it is run, and no pickle is opened.

    Args:
        place: a folder, a run folder, or a hub id.
        base: the adapter's base, where it is not the one it names.

    Raises:
        RecipeError: if there is neither an adapter nor a model, or no base where `base` says.
        HubError: if a hub id cannot be had.
    """
    patient, broken = opened(place)
    found = Examination(patient, broken)
    found.unexamined += [patient.unlisted] if patient.unlisted else []
    found.findings += [*unsafe(patient), *scaling(patient), *not_finite(patient)]
    found.findings += untrained(patient)
    if patient.run is not None and (patient.run / "record.json").exists():
        found.findings += _as_recorded(patient.run)
    if patient.is_adapter:
        _seek_base(found, base)
    else:
        _own_base(found)
    if found.source is not None:
        _on_base(found, found.source)
    outputs = None
    if found.source is not None:
        outputs = outputs_of(patient, found.source, found.kind)
    embeddings = getattr(found.config, "vocab_size", None)
    found.findings += [
        *company(patient, found.source, found.kind, outputs, embeddings),
        *card(patient),
    ]
    return found


def _as_recorded(run: Path) -> list[Finding]:
    """Whether the record that a run's card rests on is the one that was written."""
    try:
        run_folder.check_finished(run, "record.json")
    except RunFolderError as error:
        return [defect("record", error.what, "record.json", error.fix)]
    return []


def _seek_base(found: Examination, base: str | None) -> None:
    if not found.patient.settings:
        found.unexamined.append("the base: adapter_config.json does not open")
        return
    found.findings += naming(found.patient)
    sought, wrong = find_base(found.patient, base)
    found.findings += wrong
    found.source, found.hub_trouble = sought.source, sought.hub_trouble
    if sought.source is None:
        found.unexamined.append(
            f"fresh modules, shapes, names and reload, which need the base: {sought.why_not}"
        )


def _own_base(found: Examination) -> None:
    settings = [one.where for one in found.findings if one.kind == "unsafe"]
    if any(where.endswith(".json") for where in settings) or found.patient.config.get(
        "quantization_config"
    ):
        found.unexamined.append("fresh modules and reload: what its settings ask for is not loaded")
        return
    if CONFIG not in found.patient.jsons:
        found.unexamined.append(f"fresh modules and reload: {CONFIG} does not open")
        return
    try:
        own = whole_model(found.patient)
    except RecipeError as error:
        found.unexamined.append(f"fresh modules and reload: {error.what}")
        return
    if isinstance(own, Finding):
        found.findings.append(own)
        found.unexamined.append(f"fresh modules and reload: {CONFIG} is of no model")
    else:
        found.source = own


def _on_base(found: Examination, source: SourceModel) -> None:
    """What only the base can tell: the fit, fresh modules, and whether a load is repeatable."""
    patient = found.patient
    found.kind = model_class(patient, source)
    why = loadable(patient)
    if found.kind is None:
        why = "it does not say which class of transformers it was made of"
    if not patient.shapes:
        why = "its weights do not open"
    if why:
        found.unexamined.append(f"fresh modules, shapes, names and reload: {why}")
        return
    found.config = with_labels(patient, source, found.kind)
    misfits = fit(patient, found.kind, found.config) if patient.is_adapter else []
    found.findings += misfits
    spoilt = [one.kind for one in found.defects if one.kind in SPOILS_LOADING or one in misfits]
    try:
        found.findings += fresh(patient, source, found.kind, found.config)
    except RecipeError as error:
        spoilt.append("base")
        found.unexamined.append(f"fresh modules: {error.what}")
        if not patient.is_adapter:
            why = error.what.removeprefix("source.model: ")
            found.findings.append(defect("config", why, CONFIG, "Save it again"))
    if spoilt:
        found.unexamined.append(f"reload: not tried after a finding of {spoilt[0]}")
    else:
        found.findings += reloaded(patient, source, found.kind, found.config)
