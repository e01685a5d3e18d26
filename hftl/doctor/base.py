"""The base that an adapter goes on: named so that others find it, pinned, and the right one."""

from dataclasses import dataclass
from pathlib import Path

from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.doctor.adapter_folder import (
    ADAPTER_CONFIG,
    RECORD_FILE,
    AdapterFolder,
    Finding,
    defect,
    warning,
)
from hftl.doctor.file_checks import find_foreign_code_key
from hftl.errors import HftlError, HubError
from hftl.models.source import SourceModel, find_source, hash_source_weights
from hftl.runtime import paths


@dataclass
class BaseLookup:
    """What came of looking for the base.

    `why_not` says why there is none to examine on; `hub_trouble` that the hub is the reason.
    """

    source: SourceModel | None = None
    reason: str | None = None
    hub_failed: bool = False


def read_base_name(patient: AdapterFolder) -> tuple[str | None, str | None]:
    """The hub id and revision that the adapter names; None for what is no hub id."""
    name, revision = (
        patient.adapter_config.get(key) for key in ("base_model_name_or_path", "revision")
    )
    on_hub = isinstance(name, str) and paths.is_hub_id(name)
    return name if on_hub else None, revision if isinstance(revision, str) else None


def check_base_name(patient: AdapterFolder) -> list[Finding]:
    """What is wrong with how the adapter names its base."""
    name = patient.adapter_config.get("base_model_name_or_path")
    fix = "Name its hub id: --base ID --fix"
    if not isinstance(name, str) or not name:
        return [defect("base", "the base is not named, so nobody can load it", ADAPTER_CONFIG, fix)]
    hub_id, revision = read_base_name(patient)
    if find_local_base(patient) is not None:
        what = f"the base is a folder of this machine, which nobody else has: {name}"
        return [warning("base", what, ADAPTER_CONFIG, fix)]
    if hub_id is None:
        return [
            defect("base", f"the base is a path of another machine: {name}", ADAPTER_CONFIG, fix)
        ]
    if revision is None:
        return [warning(
            "base", f"{hub_id} is not pinned: it may change under the adapter", ADAPTER_CONFIG,
            "Set revision to the commit it was trained on",
        )]  # fmt: skip
    return []


def find_local_base(patient: AdapterFolder) -> Path | None:
    """Return the folder here that an adapter of this machine names as its base, if it is there.

    A pinned hub id is never a folder; a path that an adapter from a hub names is not followed.
    """
    name = patient.adapter_config.get("base_model_name_or_path")
    if patient.is_remote or not isinstance(name, str) or not name or all(read_base_name(patient)):
        return None
    folder = Path(name).expanduser()
    return folder if (folder / "config.json").is_file() else None


def find_base(patient: AdapterFolder, given: str | None) -> tuple[BaseLookup, list[Finding]]:
    """Finds the base; a path that an adapter from a hub names is not followed.

    Args:
        patient: the adapter.
        given: what the user says it is.

    Raises:
        HftlError: if what the user gave is not there or no base.
    """
    wanted = Source(model=given) if given else _find_known_base(patient)
    hub_id, revision = read_base_name(patient)
    here = find_local_base(patient) if wanted is None else None
    if here is not None:
        wanted = Source(model=str(here))
    by_name = wanted is None and hub_id is not None
    if by_name:
        wanted = Source(model=str(hub_id), revision=revision)
    if wanted is None:
        return BaseLookup(None, "its base is not at hand; give it with --base MODEL"), []
    try:
        # A name that the adapter chose is no folder here, whatever folders there are.
        source = find_source(wanted, on_hub=by_name)
    except HftlError as error:
        if given:
            raise
        return _explain_missing_base(error, wanted.model)
    why = _find_unsafe_reason(source)
    return BaseLookup(None if why else source, why), [] if why else _check_base_weights(
        patient, source, given
    )


def get_expected_hash(patient: AdapterFolder) -> str | None:
    """The hash of the weights that the adapter was trained on, where hftl has kept it."""
    adapted = patient.get_record_section("adapt").get("base")
    known = adapted if isinstance(adapted, dict) else patient.get_record_section("source")
    return known.get("weights_sha256")


def _find_known_base(patient: AdapterFolder) -> Source | None:
    """Where the base is by the user's own run, or an installed package."""
    if patient.run is not None:
        adapted = patient.run / "publish-base"
        if patient.get_record_section("adapt").get("base") and adapted.exists():
            return Source(model=str(adapted))
        own = Recipe.load(patient.run / "recipe.yaml").source
        # A relative path holds only where the run was made; a pinned base holds everywhere.
        return own if paths.is_local(own.model) or read_base_name(patient)[1] is None else None
    spec = str(patient.get_record_section("source").get("model", ""))
    if spec.startswith(paths.PACKAGE_PREFIX) and ".." not in spec and paths.is_local(spec):
        return Source(model=spec)
    return None


def _explain_missing_base(error: HftlError, name: str) -> tuple[BaseLookup, list[Finding]]:
    """An id that the hub does not know is the adapter's fault; a hub that is away is not."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cause = error.__cause__
    unknown = isinstance(cause, (RepositoryNotFoundError, RevisionNotFoundError))
    if unknown and not isinstance(cause, GatedRepoError):
        return BaseLookup(None, f"the hub has no {name}"), [
            defect(
                "base",
                f"the hub has no {name} of that revision",
                ADAPTER_CONFIG,
                "Name the right one",
            )
        ]
    why = error.what.removeprefix("source.model: ")
    return BaseLookup(None, why, isinstance(error, HubError)), []


def _find_unsafe_reason(source: SourceModel) -> str | None:
    """Why the base is not loaded, where it would not be safe."""
    config = source.config.to_dict()
    key = find_foreign_code_key(config)
    if config.get("quantization_config"):
        return f"the base {source.name} is quantised"
    if key is not None:
        return f"the base {source.name} brings code of its own ({key}), which is not run"
    if not list(Path(source.folder).glob("model*.safetensors")):
        return f"the base {source.name} has no weights in safetensors; pickles are not opened"
    return None


def _check_base_weights(
    patient: AdapterFolder, source: SourceModel, given: str | None
) -> list[Finding]:
    found = []
    hub_id, _ = read_base_name(patient)
    if given and not source.is_local and hub_id not in (None, source.public_id):
        found.append(warning(
            "base", f"it names {hub_id}, and was examined on {given}", ADAPTER_CONFIG,
            "Find out which of them it was trained on",
        ))  # fmt: skip
    expected = get_expected_hash(patient)
    if expected and hash_source_weights(source) != expected:
        found.append(defect(
            "base-weights", f"{source.name} has other weights than it was trained on", RECORD_FILE,
            "Give the right base with --base, or pin the revision it was trained on",
        ))  # fmt: skip
    return found
