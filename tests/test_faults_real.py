"""Plant faults in real data under a real encoder, and find none where none is planted.

The data are those of `benchmarks/assets.py`, in `assets/` or in the folder of `HFTL_ASSETS`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import faults  # noqa: E402  # pyright: ignore[reportMissingImports]
from fault_plants import CONTROLS, COPIES, Plant, read_whole  # noqa: E402  # pyright: ignore[reportMissingImports]

ASSETS = Path(os.environ.get("HFTL_ASSETS", Path(__file__).parents[1] / "assets"))
SECONDS = 60
"""That a check takes at most."""


def require(name: str) -> Plant:
    """Return a set as it is; skip the test where it is not built."""
    whole = read_whole(name, ASSETS, ASSETS)
    for path in [Path(whole.data["train"]["path"]), *([] if whole.is_text else [whole.source])]:
        if not Path(path).exists():
            pytest.skip(f"build {path} with benchmarks/assets.py")
    return whole


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), faults.list_cells())
def test_planted_fault_is_found_and_no_other(name: str, kind: str) -> None:
    require(name)
    rows = None if kind == faults.NONE else CONTROLS[kind]
    control = rows and faults.search_control(name, rows, ASSETS, ASSETS)
    cell = faults.examine(name, kind, ASSETS, ASSETS, control)
    assert cell["found"] is not False and not cell["false"], cell


@pytest.mark.slow
def test_groups_of_real_documents_are_found() -> None:
    whole = require("amazon")
    finding = next(f for f in faults.find_faults(whole)[0] if f.kind == "groups")
    assert finding.fix.startswith("set data.group to 'document'")
    whole.data["group"] = "document"
    assert "groups" not in [f.kind for f in faults.find_faults(whole)[0]]


def test_the_stored_matrix_is_whole_and_every_fault_in_it_found() -> None:
    stored: dict[str, Any] = json.loads(faults.RESULT.read_text("utf-8"))
    cells = {(cell["set"], cell["kind"]): cell for cell in stored["cells"]}
    assert sorted(cells) == sorted(faults.list_cells())
    controls = {(one["set"], one["rows"]): one["counts"] for one in stored["controls"]}
    assert sorted(controls) == sorted(faults.list_controls())
    for place, cell in cells.items():
        assert cell["found"] is not False and not cell["false"], place
        assert cell["seconds"] < SECONDS, place
        if place[1] in faults.COPIED_KINDS:
            assert (place[0], CONTROLS[place[1]]) in controls, place
        before = controls.get((place[0], CONTROLS.get(place[1], "")), {})
        assert cell["before"] == before.get(place[1]), place
        if cell["before"] is not None:
            assert place[1] in faults.COPIED_KINDS, "the rows have no other fault by themselves"
            assert min(cell["count"] - cell["before"], cell["named"]) >= COPIES / 2, place
    assert stored["table"] == faults.format_table(stored["cells"])
