"""The base that an adapter goes on: named so that others find it, pinned, and the right one."""

from dataclasses import dataclass
from pathlib import Path

from hftl.config.recipe import Recipe
from hftl.config.source import Source
from hftl.doctor.adapter_folder import ADAPTER, RECORD, Finding, Patient, defect, warning
from hftl.doctor.file_checks import loads_foreign_code
from hftl.errors import HftlError, HubError
from hftl.models.source import SourceModel, find_source, weights_sha256
from hftl.runtime import paths


@dataclass
class Sought:
    """What came of looking for the base.

    `why_not` says why there is none to examine on; `hub_trouble` that the hub is the reason.
    """

    source: SourceModel | None = None
    why_not: str | None = None
    hub_trouble: bool = False


def named(patient: Patient) -> tuple[str | None, str | None]:
    """The hub id and revision that the adapter names; None for what is no hub id."""
    name, revision = (patient.settings.get(key) for key in ("base_model_name_or_path", "revision"))
    on_hub = isinstance(name, str) and paths.HUB_ID.fullmatch(name)
    return name if on_hub else None, revision if isinstance(revision, str) else None


def naming(patient: Patient) -> list[Finding]:
    """What is wrong with how the adapter names its base."""
    name = patient.settings.get("base_model_name_or_path")
    fix = "Name its hub id: --base ID --fix"
    if not isinstance(name, str) or not name:
        return [defect("base", "the base is not named, so nobody can load it", ADAPTER, fix)]
    hub_id, revision = named(patient)
    if local_base(patient) is not None:
        what = f"the base is a folder of this machine, which nobody else has: {name}"
        return [warning("base", what, ADAPTER, fix)]
    if hub_id is None:
        return [defect("base", f"the base is a path of another machine: {name}", ADAPTER, fix)]
    if revision is None:
        return [warning(
            "base", f"{hub_id} is not pinned: it may change under the adapter", ADAPTER,
            "Set revision to the commit it was trained on",
        )]  # fmt: skip
    return []


def local_base(patient: Patient) -> Path | None:
    """Return the folder here that an adapter of this machine names as its base, if it is there.

    A pinned hub id is never a folder; a path that an adapter from a hub names is not followed.
    """
    name = patient.settings.get("base_model_name_or_path")
    if patient.remote or not isinstance(name, str) or not name or all(named(patient)):
        return None
    folder = Path(name).expanduser()
    return folder if (folder / "config.json").is_file() else None


def find_base(patient: Patient, given: str | None) -> tuple[Sought, list[Finding]]:
    """Finds the base; a path that an adapter from a hub names is not followed.

    Args:
        patient: the adapter.
        given: what the user says it is.

    Raises:
        HftlError: if what the user gave is not there or no base.
    """
    wanted = Source(model=given) if given else _known(patient)
    hub_id, revision = named(patient)
    here = local_base(patient) if wanted is None else None
    if here is not None:
        wanted = Source(model=str(here))
    by_name = wanted is None and hub_id is not None
    if by_name:
        wanted = Source(model=str(hub_id), revision=revision)
    if wanted is None:
        return Sought(None, "its base is not at hand; give it with --base MODEL"), []
    try:
        # A name that the adapter chose is no folder here, whatever folders there are.
        source = find_source(wanted, on_hub=by_name)
    except HftlError as error:
        if given:
            raise
        return _not_found(error, wanted.model)
    why = _untouchable(source)
    return Sought(None if why else source, why), [] if why else _compared(patient, source, given)


def expected_hash(patient: Patient) -> str | None:
    """The hash of the weights that the adapter was trained on, where hftl has kept it."""
    adapted = patient.recorded("adapt").get("base")
    known = adapted if isinstance(adapted, dict) else patient.recorded("source")
    return known.get("weights_sha256")


def _known(patient: Patient) -> Source | None:
    """Where the base is by the user's own run, or an installed package."""
    if patient.run is not None:
        adapted = patient.run / "publish-base"
        if patient.recorded("adapt").get("base") and adapted.exists():
            return Source(model=str(adapted))
        own = Recipe.load(patient.run / "recipe.yaml").source
        # A relative path holds only where the run was made; a pinned base holds everywhere.
        return own if paths.at_hand(own.model) or named(patient)[1] is None else None
    spec = str(patient.recorded("source").get("model", ""))
    if spec.startswith(paths.PACKAGE) and ".." not in spec and paths.at_hand(spec):
        return Source(model=spec)
    return None


def _not_found(error: HftlError, name: str) -> tuple[Sought, list[Finding]]:
    """An id that the hub does not know is the adapter's fault; a hub that is away is not."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cause = error.__cause__
    unknown = isinstance(cause, (RepositoryNotFoundError, RevisionNotFoundError))
    if unknown and not isinstance(cause, GatedRepoError):
        return Sought(None, f"the hub has no {name}"), [
            defect("base", f"the hub has no {name} of that revision", ADAPTER, "Name the right one")
        ]
    why = error.what.removeprefix("source.model: ")
    return Sought(None, why, isinstance(error, HubError)), []


def _untouchable(source: SourceModel) -> str | None:
    """Why the base is not loaded, where it would not be safe."""
    config = source.config.to_dict()
    key = loads_foreign_code(config)
    if config.get("quantization_config"):
        return f"the base {source.spec} is quantised"
    if key is not None:
        return f"the base {source.spec} brings code of its own ({key}), which is not run"
    if not list(Path(source.folder).glob("model*.safetensors")):
        return f"the base {source.spec} has no weights in safetensors; pickles are not opened"
    return None


def _compared(patient: Patient, source: SourceModel, given: str | None) -> list[Finding]:
    found = []
    hub_id, _ = named(patient)
    if given and not source.local and hub_id not in (None, source.public_id):
        found.append(warning(
            "base", f"it names {hub_id}, and was examined on {given}", ADAPTER,
            "Find out which of them it was trained on",
        ))  # fmt: skip
    expected = expected_hash(patient)
    if expected and weights_sha256(source) != expected:
        found.append(defect(
            "base-weights", f"{source.spec} has other weights than it was trained on", RECORD,
            "Give the right base with --base, or pin the revision it was trained on",
        ))  # fmt: skip
    return found
