"""The record: every number of a run, with where it came from, in one JSON file.

Two identical runs differ in `describe_environment` and `timings` only; the record's hash leaves them out.
"""

import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hftl.errors import RunFolderError
from hftl.runtime.fingerprints import fingerprint

SCHEMA_VERSION = 1
UNHASHED_KEYS = ("environment", "timings")
PACKAGES = ("hftl", "torch", "transformers", "peft", "accelerate", "datasets", "scikit-learn")


@dataclass(frozen=True)
class Record:
    """What a run found. `tree` is the content of record.json; `folder` the run it stands in."""

    tree: dict[str, Any]
    folder: Path

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """The record of a finished run folder.

        Raises:
            RunFolderError: if it does not read.
        """
        path = folder / "record.json"
        try:
            return cls(dict(json.loads(path.read_text(encoding="utf-8"))), folder)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise RunFolderError(
                f"{path} does not read", "Run the same `hftl run` again to mend it"
            ) from error

    def __getitem__(self, key: str) -> Any:
        return self.tree[key]

    @property
    def transfer_gain(self) -> dict[str, Any]:
        """`{metric, value, ci95, baseline, baselines, seeds, p_value, relative_error_reduction,
        outcome}`; `baselines` holds the gain over each, of which `baseline` has the lesser."""
        return self.tree["transfer_gain"]

    @property
    def verdict(self) -> dict[str, Any]:
        """`{decision: publish | hold, reasons: [...]}`."""
        return self.tree["verdict"]

    @property
    def hash(self) -> str:
        """sha256 of all that two identical runs share."""
        return fingerprint({k: v for k, v in self.tree.items() if k not in UNHASHED_KEYS})


def describe_environment(device: str, dtype: str) -> dict[str, Any]:
    """Versions and hardware, without host or user names."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "dtype": dtype,
        "packages": {name: version(name) for name in PACKAGES},
    }
