"""Own the run folder: one process holds it, and every stage in it is complete or absent.

A stage is written to a temporary folder, hashed into MANIFEST.json and renamed. The manifest also
holds the recipe keys that the stage depends on, so that a changed key is noticed. JSON is written
in one canonical form, so that equal values have equal hashes.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

from filelock import FileLock, Timeout
from pydantic import BaseModel, JsonValue, ValidationError, field_validator

from hftl.errors import LockedError, RecipeError, RunFolderError, is_disk_full
from hftl.runtime import distributed

MANIFEST = "MANIFEST.json"
RUN_FOLDERS = ("phases", "arms", "analysis", "publish", "publish-base", "checkpoints")
RESULTS = (*RUN_FOLDERS, "record.json", "report.html")
RUN_FILES = (*RESULTS, ".replaced", "recipe.yaml", "error.json", "log.txt", ".lock")
"""Every name that a run folder may hold."""
TEMPORARY = ".tmp-"
"""Begins the name of what a killed run may leave half written; the next one removes it."""
DEAL_FOLDER = f"{TEMPORARY}deal"
"""What processes that train arms side by side share while they do."""
BEATS_FOLDER = f"{TEMPORARY}beats"
"""Where processes that share a training report that they go on."""
SEMANTICS = 10
"""Raised when the same recipe and data train, draw, choose or score otherwise than before, or when
the keys of arms change, so that arms of two versions are never averaged. 2 standardises targets,
draws them by their inputs alone, keeps the least error and pads on the right; 3 reads whole
sections; 4 counts the source's config and preprocessing, and the columns of corpora; 5 trains texts
without padding, and LoRA as one function, on a CPU; 6 computes packed blocks of BERT's kind as one
function; 7 gives packed rows of half precision one of few lengths, so that draws of dropout
differ; 8 fits logistic regressions along a path of penalties, trains only the word vectors that a
training reads, and adapts texts without padding; 9 trains scratch for a third of its budget where
validation prefers that; 10 hashes the rules of tokenizers in another form."""

Part = TypeVar("Part", bound=BaseModel)


class StageInputs(TypedDict, total=False):
    """Hold what a stage depends on, as its manifest stores it; each stage has some of these keys.

    Stages that are only compared as a whole store keys of their own.
    """

    recipe: dict[str, JsonValue]
    """The dotted recipe keys that the stage has read, with their values."""
    asked: dict[str, JsonValue]
    """What the recipe itself says of these keys; an arm of `measure` may differ."""
    semantics: int
    weights: str
    config: str
    quantization: str
    """How the source's weights are held, where they are not whole; `config` counts it."""
    preprocessing: str
    data: str
    general: str
    corpus: str
    processes: int
    """Processes that share a step, where checkpoints of another number are of no use."""
    device: str
    precision: str
    """What a training multiplies on and in; of checkpoints alone."""
    inputs: str | None


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """List the files of a complete stage with their sha256, and what it depends on.

    `own` is the hash of both, which older manifests lack: a damaged key is no changed recipe.
    """

    files: dict[str, str]
    reads: dict[str, JsonValue]
    own: str | None = None

    @field_validator("reads")
    @classmethod
    def _check_recipe_keys(cls, reads: dict[str, JsonValue]) -> dict[str, JsonValue]:
        """Refuse recipe keys that are no mapping: they are compared one by one."""
        if not all(isinstance(reads.get(name, {}), dict) for name in ("recipe", "asked")):
            raise ValueError("recipe and asked must be mappings")
        return reads


def create_run_folder(run: Path) -> None:
    """Make the run folder.

    Raises:
        RecipeError: if it cannot be made or written to, holds something else, or lies in another.
        RunFolderError: if it holds a file where a run keeps a folder.
    """
    outer = next((folder for folder in run.resolve().parents if _is_run_folder(folder)), None)
    if outer is not None:
        raise RecipeError(f"{run} lies in the run folder {outer}", "Choose another --output")
    if run.is_dir() and not (run / "recipe.yaml").exists():
        temporary = (DEAL_FOLDER, BEATS_FOLDER, *(f"{TEMPORARY}{name}" for name in RUN_FILES))
        own = {*RUN_FILES, *temporary}
        foreign = sorted(p.name for p in run.iterdir() if p.name not in own)
        if foreign:
            raise RecipeError(
                f"{run} is no run folder: it holds {foreign[0]!r}", "Choose another --output"
            )
    files = [run / name for name in RUN_FOLDERS if (run / name).is_file()]
    if files:
        raise RunFolderError(f"{files[0]} is a file, and a run keeps a folder there", "Remove it")
    try:
        run.mkdir(parents=True, exist_ok=True)
        probe = run / ".lock"
        probe.touch()
    except OSError as error:
        if is_disk_full(error):
            raise
        raise RecipeError(
            f"the output folder {run} cannot be written: {error.strerror}",
            "Choose another --output",
        ) from error


def _is_run_folder(folder: Path) -> bool:
    """Return whether a run has used a folder; a recipe alone may lie anywhere."""
    return all((folder / name).is_file() for name in ("recipe.yaml", ".lock"))


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold the run folder for this process, and remove what a killed one left half written.

    Raises:
        RunFolderError: if another process holds it, or it is no run folder.
    """
    if not (run / ".lock").is_file():
        raise RunFolderError(f"{run} is no run folder", "Finish it with `hftl run`")
    # Without preserve_lock_file a file system without flock would get a lock that survives a kill.
    lock = FileLock(run / ".lock", timeout=0, preserve_lock_file=True)
    try:
        lock.acquire()
    except Timeout as error:
        holder = (run / ".lock").read_text(encoding="utf-8").strip() or "another process"
        raise LockedError(
            f"{run} is in use by {holder}", "Wait for it, or choose another --output"
        ) from error
    try:
        # Written in place: a rename would give the name to a file that nobody holds.
        (run / ".lock").write_text(f"process {os.getpid()}", encoding="utf-8")
        for pattern in (f"{TEMPORARY}*", f"*/{TEMPORARY}*"):
            # One after the other: a temporary folder may hold what is temporary itself.
            for leftover in list(run.glob(pattern)):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield
    finally:
        lock.release()


@contextmanager
def commit_stage(folder: Path, reads: Mapping[str, object]) -> Iterator[Path]:
    """Yield a folder to write into; on success hash its files and rename it to `folder`.

    Args:
        folder: of the stage, replaced as a whole.
        reads: what the stage depends on, see `StageInputs`.

    Raises:
        RunFolderError: on another process than the main one, which alone writes.
    """
    if not distributed.is_main():
        raise RunFolderError(
            f"process {distributed.get_rank()} does not find {folder}, which process 0 has written",
            "Put the run folder on a file system that all machines share",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".tmp-{folder.name}"
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir()
    try:
        yield aside
        content = {"files": _hash_files(aside), "reads": reads}
        write_text(aside / MANIFEST, to_json({**content, "own": fingerprint(content)}))
        replace_folder(aside, folder)
    finally:
        # After an error or a signal: it is renamed by now, or a disk that is full is left full.
        shutil.rmtree(aside, ignore_errors=True)
    _sync_to_disk(folder.parent)


def replace_folder(aside: Path, folder: Path) -> None:
    """Rename a complete folder to `folder`; the one that has the name stays where that fails."""
    if not folder.exists():
        aside.rename(folder)
        return
    old = folder.parent / f".tmp-old-{folder.name}"
    folder.rename(old)
    try:
        aside.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)


@contextmanager
def lock_stage(folder: Path) -> Iterator[None]:
    """Let one process at a time make a stage that several arms read, where arms are dealt out.

    Otherwise there is one process, or all of them make it together.
    """
    shared = folder.parent.parent / DEAL_FOLDER
    if not shared.exists():
        yield
        return
    with FileLock(shared / f"{folder.name}.lock", preserve_lock_file=True):
        yield


def read_stage_inputs(folder: Path) -> StageInputs | None:
    """Return what a complete stage depended on, after checking its files; None where it is absent.

    Raises:
        RunFolderError: if a file of the stage is missing or not what was written.
    """
    if not folder.exists():
        return None
    manifest = read_manifest(folder)
    for name, digest in manifest.files.items():
        if not (folder / name).is_file():
            raise _make_damage_error(folder, name, "missing")
        if hash_file(folder / name) != digest:
            raise _make_damage_error(folder, name, "not what was written")
    return cast(StageInputs, manifest.reads)


def read_manifest(folder: Path) -> Manifest:
    """Return what a complete stage depended on and the hashes of its files, these unchecked.

    Raises:
        RunFolderError: if it cannot be read, or is not what was written.
    """
    try:
        manifest = Manifest.model_validate(read_json(folder / MANIFEST))
    except (OSError, ValueError) as error:
        raise _make_damage_error(folder, MANIFEST, "missing or unreadable") from error
    content = {"files": manifest.files, "reads": manifest.reads}
    if manifest.own not in (None, fingerprint(content)):
        raise _make_damage_error(folder, MANIFEST, "not what was written")
    return manifest


def has_equal(finished: StageInputs, inputs: StageInputs, key: str) -> bool:
    """Return whether both hold the key, with the same value; a key that both lack is not equal."""
    return key in finished and key in inputs and finished.get(key) == inputs.get(key)


def hash_stage(folder: Path) -> str:
    """Return the content hash of a complete stage, by which later stages see that it changed."""
    return hash_file(folder / MANIFEST)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; leave one alone that holds the same text."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; leave one alone that holds the same bytes.

    Raises:
        RunFolderError: if there is a folder of that name.
    """
    if path.is_dir():
        raise RunFolderError(f"{path} is a folder, expected a file", "Remove it")
    if path.exists() and path.read_bytes() == content:
        return
    aside = path.parent / f".tmp-{path.name}"
    try:
        with open(aside, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def reserve_space(path: Path) -> None:
    """Take the disk's space for a file that is written through memory.

    Where the disk is full a write to a page that has no space kills the process.

    Raises:
        OSError: if the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)


def _make_damage_error(part: Path, name: str, how: str) -> RunFolderError:
    return RunFolderError(f"{part / name} is {how}", f"Delete {part} and run again")


def _hash_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file by path, each flushed to the disk first."""
    hashes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _sync_to_disk(path)
        hashes[path.relative_to(folder).as_posix()] = hash_file(path)
    return hashes


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(tree: Any) -> str:
    """Return sorted, indented JSON; a number that is not finite becomes null."""
    return json.dumps(
        _replace_nonfinite(tree), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False
    ) + "\n"  # fmt: skip


def fingerprint(tree: Any) -> str:
    """Return the sha256 (hex) of the canonical JSON of `tree`."""
    # A config of anybody's may hold half of a surrogate pair, which JSON can spell.
    return hashlib.sha256(to_json(tree).encode(errors="surrogatepass")).hexdigest()


class UnreadableJsonError(ValueError):
    """Report that a file holds no JSON; the message says why."""


def read_json(path: Path) -> object:
    """Read a JSON file, which may be anybody's.

    Raises:
        OSError: if it does not open.
        UnreadableJsonError: if it is not UTF-8, no JSON, or nested too deep.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnreadableJsonError(str(error)) from error


def read_part(path: Path, model: type[Part]) -> Part:
    """Read a JSON file of a stage through the model that it was written from.

    Raises:
        RunFolderError: naming the key, if the file is not what such a model holds.
    """
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        finding = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
        key = ".".join(map(str, finding["loc"])) if finding else ""
        what = f"'{key}': {finding['msg'].lower()}" if finding else "missing or unreadable"
        raise RunFolderError(
            f"{path}: {what}", f"Remove {path.parent} and run the same command again"
        ) from error


def _replace_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
