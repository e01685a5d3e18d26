"""Hold what an examination has found so far, which its checks read and add to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from hftl.doctor.adapter_folder import DEFECT, AdapterFolder, Finding
from hftl.doctor.load_process import LoadProcess
from hftl.models.source import SourceModel


@dataclass
class Examination:
    """Collect findings, and what could not be examined.

    `source` is the base, or the whole model itself, where it may be loaded; `model_class` and
    `config` are those that it is loaded with. A check that finds them sets them for those below.
    """

    folder: AdapterFolder
    given_base: str | None = None
    findings: list[Finding] = field(default_factory=list)
    unexamined: list[str] = field(default_factory=list)
    source: SourceModel | None = None
    model_class: Any = None
    config: Any = None
    hub_failed: bool = False
    misfits: list[Finding] = field(default_factory=list)
    """Findings on tensors that do not fit the base, which forbid a load."""
    base_loads: bool = True
    process: LoadProcess | None = None
    """In which it is loaded, where one was prepared."""

    @property
    def defects(self) -> list[Finding]:
        """Return the findings that an adapter must not have."""
        return [finding for finding in self.findings if finding.severity == DEFECT]

    @property
    def exit_code(self) -> int:
        """Return 0 if sound, 4 for defects, 5 if only the hub did not give the base."""
        return 4 if self.defects else 5 if self.hub_failed else 0


Check = Callable[[Examination], Iterable[Finding]]
