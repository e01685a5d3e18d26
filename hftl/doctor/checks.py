"""Examine an adapter or a whole model without trusting it: the list of checks of `hftl doctor`.

A check takes the examination and yields findings. To add one, write a function and its line in
`CHECKS`; order matters only where a check reads what an earlier one has set.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hftl.doctor.adapter_folder import (
    AdapterFolder,
    Finding,
    defect,
    open_adapter_folder,
    warning,
)
from hftl.doctor.adapter_tensors import PEFT_TYPES, adjust_config, check_fit, find_model_class
from hftl.doctor.examination import Check, Examination
from hftl.doctor.file_checks import (
    check_adapter_settings,
    check_card,
    check_file_types,
    check_finite_weights,
    check_input_files,
    check_labels,
    check_scaling,
    check_settings,
    check_shard_index,
    check_trained,
    check_vocabulary,
    find_foreign_code_key,
)
from hftl.doctor.load_check import check_reload, check_uninitialized_weights, read_whole_model
from hftl.doctor.load_process import LoadProcess
from hftl.errors import HftlError, HubError, RecipeError, RunFolderError, rename_key
from hftl.measure.record import PUBLISHED_FILE
from hftl.models.source import SourceModel, find_source, hash_source_weights
from hftl.publish.base_reference import BaseReference, resolve_base
from hftl.publish.published_metadata import find_changed_weights
from hftl.publish.settings_files import ADAPTER_CONFIG, MODEL_CONFIG
from hftl.runtime import finished_files
from hftl.runtime.progress import show_activity


def examine_adapter(
    place: str | Path, base: str | None = None, process: LoadProcess | None = None
) -> Examination:
    """Open a folder, a run folder or a hub id, and examine it; see `examine_folder`.

    Raises:
        RecipeError: if there is neither an adapter nor a model, or no base where `base` says.
        HubError: if a hub id cannot be had.
    """
    return examine_folder(open_adapter_folder(place), base, process)


def examine_folder(
    folder: AdapterFolder, base: str | None = None, process: LoadProcess | None = None
) -> Examination:
    """Examine an adapter or a whole model; nothing of it is run, and no pickle is opened.

    Args:
        folder: as it was opened.
        base: the adapter's base, where it is not the one it names.
        process: a fresh one to load it in, where one was prepared.

    Raises:
        RecipeError: if there is no base where `base` says.
        HubError: if that base cannot be had.
    """
    examination = Examination(folder, base, [*folder.faults], process=process)
    examination.unexamined += [folder.unlisted_reason] if folder.unlisted_reason else []
    for check in CHECKS:
        # Reloads take seconds: libraries are imported anew.
        with show_activity(check.__name__.replace("_", " ")):
            examination.findings += list(check(examination))
    if folder.run is not None:
        examination.findings = [_advise_rerun(finding) for finding in examination.findings]
    return examination


def _advise_rerun(finding: Finding) -> Finding:
    """Return a finding on a run's own folder, which `--fix` leaves alone, with what mends it."""
    if not finding.fix.endswith("--fix"):
        return finding
    return replace(finding, fix="Run the same `hftl run` again, which writes the folder anew")


def check_record_unchanged(examination: Examination) -> Iterator[Finding]:
    """Report a record, on which a run's card rests, that is not the one that was written."""
    run = examination.folder.run
    if run is None or not (run / "record.json").exists():
        return
    try:
        finished_files.check_finished_files(run, "record.json")
    except RunFolderError as error:
        yield defect("record", error.what, "record.json", error.fix)


def check_published_weights(examination: Examination) -> Iterator[Finding]:
    """Report tensors that are not those which were published, and which the record describes."""
    folder = examination.folder
    names = [name for name in folder.files if "/" not in name and (folder.path / name).is_file()]
    changed = find_changed_weights(folder.path, names, folder.published_weights)
    if changed is not None:
        name, how = changed
        fix = (
            f"Fetch or copy it again; if it is meant, remove {PUBLISHED_FILE}: it is of other "
            "tensors"
        )
        yield defect("weights", how, name, fix)


def check_base_name(examination: Examination) -> Iterator[Finding]:
    """Report a base that the adapter does not name, or not so that others find the same one."""
    folder = examination.folder
    adapter = folder.adapter_config
    if not adapter.settings:
        return
    fix = "Name its hub id: --base ID --fix"
    if folder.run is not None:
        fix = "Set source.published_as to its hub id and run again"
    if adapter.base_name is None:
        what = "the base is not named, so nobody can load it"
        yield defect("base", what, ADAPTER_CONFIG, fix)
    elif adapter.find_local_base(follow_paths=not folder.is_remote) is not None:
        what = f"the base is a folder of this machine, which nobody else has: {adapter.base_name}"
        yield warning("base", what, ADAPTER_CONFIG, fix)
    elif adapter.base_hub_id is None:
        what = f"the base is a path of another machine: {adapter.base_name}"
        yield defect("base", what, ADAPTER_CONFIG, fix)
    elif adapter.revision is None:
        what = f"{adapter.base_hub_id} is not pinned: it may change under the adapter"
        yield warning("base", what, ADAPTER_CONFIG, "Set revision to the commit it was trained on")


def find_adapter_base(examination: Examination) -> Iterator[Finding]:
    """Set `source` to the adapter's base where that is safe to load; report a wrong one.

    Raises:
        HftlError: if what the user gave as the base is not there or no model.
    """
    folder, given = examination.folder, examination.given_base
    if not folder.is_adapter:
        return
    if not folder.adapter_config.settings:
        examination.unexamined.append("the base: adapter_config.json does not open")
        return
    reference = resolve_base(
        folder.path, folder.adapter_config, folder.recorded_source, folder.has_adapted_base,
        given, follow_paths=not folder.is_remote,
    )  # fmt: skip
    why = "its base is not at hand; give it with --base MODEL"
    if reference is not None:
        try:
            examination.source = find_source(reference.source, reference.on_hub)
            why = _find_unsafe_reason(examination.source)
        except HftlError as error:
            if given:
                raise rename_key(error, "source.model:", "--base:") from error
            why = error.what.removeprefix("source.model: ")
            if _is_unknown_id(error):
                why = f"the hub has no {reference.source.model}"
                yield _build_unknown_base_defect(reference)
            else:
                examination.hub_failed = isinstance(error, HubError)
    if why is not None:
        examination.source = None
        examination.unexamined.append(
            f"fresh modules, shapes, names and reload, which need the base: {why}"
        )


def find_whole_model(examination: Examination) -> Iterator[Finding]:
    """Set `source` to a whole model itself, where that is safe to load."""
    folder = examination.folder
    if folder.is_adapter:
        return
    unsafe = [one.where for one in examination.findings if one.kind == "unsafe"]
    is_quantized = folder.model_config.settings.get("quantization_config")
    if any(where.endswith(".json") for where in unsafe) or is_quantized:
        why = "what its settings ask for is not loaded"
    elif MODEL_CONFIG not in folder.json_files:
        why = f"{MODEL_CONFIG} does not open"
    else:
        try:
            model = read_whole_model(folder)
        except RecipeError as error:
            why = error.what
        else:
            if isinstance(model, SourceModel):
                examination.source = model
                return
            yield model
            why = f"{MODEL_CONFIG} is of no model"
    examination.unexamined.append(f"fresh modules and reload: {why}")


def check_base_weights(examination: Examination) -> Iterator[Finding]:
    """Report a base with another name or other weights than the adapter was trained on."""
    folder, source, given = examination.folder, examination.source, examination.given_base
    if source is None or not folder.is_adapter:
        return
    hub_id = folder.adapter_config.base_hub_id
    if given and not source.is_local and hub_id not in (None, source.public_id):
        what = f"it names {hub_id}, and was examined on {given}"
        fix = "Find out which of them it was trained on"
        yield warning("base", what, ADAPTER_CONFIG, fix)
    if folder.base_sha256 and hash_source_weights(source) != folder.base_sha256:
        what = f"{source.name} has other weights than it was trained on"
        fix = "Give the right base with --base, or pin the revision it was trained on"
        yield defect("base-weights", what, PUBLISHED_FILE, fix)


def find_class_and_config(examination: Examination) -> list[Finding]:
    """Set the class and the config with which the model may be loaded on its base."""
    folder, source = examination.folder, examination.source
    if source is None:
        return []
    examination.model_class = find_model_class(folder, source)
    peft_type = folder.adapter_config.settings.get("peft_type")
    why = None
    if folder.is_adapter and peft_type not in PEFT_TYPES:
        why = f"adapters of type {peft_type} are not loaded"
    if examination.model_class is None:
        why = "it does not say which class of transformers it was made of"
    if not folder.shapes:
        why = "its weights do not open"
    if why is None:
        examination.config = adjust_config(folder, source, examination.model_class)
    else:
        examination.unexamined.append(f"fresh modules, shapes, names and reload: {why}")
    return []


def _is_unknown_id(error: HftlError) -> bool:
    """Return whether the hub does not know an id, which is the adapter's fault, not the hub's."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cause = error.__cause__
    unknown = isinstance(cause, (RepositoryNotFoundError, RevisionNotFoundError))
    return unknown and not isinstance(cause, GatedRepoError)


def _build_unknown_base_defect(reference: BaseReference) -> Finding:
    what = f"the hub has no {reference.source.model} of that revision"
    return defect("base", what, ADAPTER_CONFIG, "Name the right one")


def _find_unsafe_reason(source: SourceModel) -> str | None:
    """Return why it would not be safe to load a base; None where it is."""
    config = source.config.to_dict()
    key = find_foreign_code_key(config)
    if config.get("quantization_config"):
        return f"the base {source.name} is quantised"
    if key is not None:
        return f"the base {source.name} brings code of its own ({key}), which is not run"
    if not list(Path(source.folder).glob("model*.safetensors")):
        return f"the base {source.name} has no weights in safetensors; pickles are not opened"
    return None


CHECKS: tuple[Check, ...] = (
    check_file_types,
    check_settings,
    check_adapter_settings,
    check_shard_index,
    check_scaling,
    check_finite_weights,
    check_trained,
    check_record_unchanged,
    check_published_weights,
    check_base_name,
    find_adapter_base,
    find_whole_model,
    check_base_weights,
    find_class_and_config,
    check_fit,
    check_uninitialized_weights,
    check_reload,
    check_input_files,
    check_vocabulary,
    check_labels,
    check_card,
)
