"""What a push would send."""

import json
from dataclasses import dataclass
from pathlib import Path

from hftl.errors import RunFolderError
from hftl.publish.gates import check_files


@dataclass(frozen=True)
class Listing:
    """The files with their sizes in bytes, the verdict, and what they load on, if it is known.

    `base_files` are those of a base that the run itself has adapted, which goes first.
    """

    files: list[tuple[str, int]]
    base_files: list[tuple[str, int]]
    decision: str
    reasons: list[str]
    base: str | None


def dry_run(run: Path, words: frozenset[str] = frozenset()) -> Listing:
    """Looks at a finished run's publish folder as a push would.

    Args:
        run: the run folder.
        words: names that may stand in the files, see `leaks.leak`.

    Raises:
        RunFolderError: if there is no publish folder, or a file may not leave the machine.
    """
    folder = run / "publish"
    if not (folder / "hftl.json").exists():
        raise RunFolderError(f"{run} has no publish folder", "Finish it with `hftl run`")
    base = run / "publish-base"
    files = _sizes(folder, words)
    base_files = _sizes(base, words) if base.exists() else []
    told = json.loads((folder / "hftl.json").read_text(encoding="utf-8"))
    verdict = told["verdict"]
    named = base.name if base_files else told["source"]["published_as"]
    if not (folder / "adapter_config.json").exists():
        named = "the model itself"
    return Listing(files, base_files, verdict["decision"], verdict["reasons"], named)


def _sizes(folder: Path, words: frozenset[str]) -> list[tuple[str, int]]:
    return [(name, (folder / name).stat().st_size) for name in check_files(folder, words)]
