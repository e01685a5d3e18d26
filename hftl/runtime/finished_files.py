"""List the files of a finished run with their hashes: record, report and publish folder.

A rewritten file is listed with both hashes while it changes, so that after a kill each file is the
old or the new one."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from hftl.errors import RunFolderError
from hftl.runtime.run_folder import commit_stage, hash_file, read_stage_inputs, to_json, write_text

REPORT_STAGE = Path("phases") / "report"
"""The stage that lists the files of a finished run."""


def check_finished_files(run: Path, only: str | None = None) -> None:
    """Compare a finished run's record, report and publish folder with what was written.

    Args:
        run: the run folder.
        only: the one file to check, by its path in the run.

    Raises:
        RunFolderError: naming the first file that is missing, changed, or not the run's.
    """
    if read_stage_inputs(run / REPORT_STAGE) is None:
        raise RunFolderError(f"{run} is not finished", "Run the same `hftl run` again")
    listed = _read_file_list(run)
    for name, hashes in listed.items():
        known = [hashes] if isinstance(hashes, str) else hashes
        if only in (None, name) and (
            not (run / name).is_file() or hash_file(run / name) not in known
        ):
            raise RunFolderError(
                f"{run / name} is not what was written", "Run the same `hftl run` again to mend it"
            )
    foreign = [p for p in _list_finished_files(run) if _format_relative(run, p) not in listed]
    if foreign and not only:
        raise RunFolderError(f"{min(foreign)} was not written by the run", "Remove it")


def is_finished(run: Path, inputs: str) -> bool:
    """Return whether a run was finished from these inputs, and its files are those written then.

    Args:
        run: the run folder.
        inputs: the hash that `write_finished_files` was given.
    """
    stored = read_stage_inputs(run / REPORT_STAGE)
    if stored is None or stored.get("inputs") != inputs:
        return False
    return _read_file_list(run) == _hash_finished_files(run)


def write_finished_files(run: Path, inputs: str | None = None) -> None:
    """Write the list of the finished files with their hashes.

    Args:
        run: the run folder.
        inputs: a hash of what they come from; None leaves the stored one.
    """
    _write_file_list(run, _hash_finished_files(run), inputs)


def rewrite_finished_files(run: Path, texts: dict[str, str]) -> None:
    """Write finished files again; after a kill each is the old or the new one, and listed.

    Args:
        run: the run folder.
        texts: by path in the run.
    """
    current = _hash_finished_files(run)
    target = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    unchanged = all(current.get(name) == content for name, content in target.items())
    if unchanged and current == _read_file_list(run):
        return
    either = {name: sorted({current.get(name, new), new}) for name, new in target.items()}
    _write_file_list(run, {**current, **either})
    for name, text in texts.items():
        write_text(run / name, text)
    write_finished_files(run)


def _write_file_list(
    run: Path, files: Mapping[str, str | list[str]], inputs: str | None = None
) -> None:
    done = run / REPORT_STAGE
    if inputs is None:
        inputs = (read_stage_inputs(done) or {}).get("inputs")
    with commit_stage(done, {"inputs": inputs}) as aside:
        write_text(aside / "files.json", to_json(files))


def _read_file_list(run: Path) -> dict[str, str | list[str]]:
    """Return the hash of each finished file by path, or two of one that was being rewritten."""
    stored = run / REPORT_STAGE / "files.json"
    return json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}


def _hash_finished_files(run: Path) -> dict[str, str]:
    return {_format_relative(run, path): hash_file(path) for path in _list_finished_files(run)}


def _list_finished_files(run: Path) -> list[Path]:
    folders = (run / "publish", run / "publish-base")
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    return files + [p for p in (run / "record.json", run / "report.html") if p.is_file()]


def _format_relative(run: Path, path: Path) -> str:
    return path.relative_to(run).as_posix()
