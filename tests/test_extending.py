"""Check what the README says of adding something to hftl: how many files, which, and that it works.

Each file of `patches/` adds one thing. All are applied to one copy of the package, which a child
process uses. A patch that no longer applies is written anew against the code as it is.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import sentences, write_csv
from support.fresh_process import FreshProcess

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
MOST_FILES = {
    "architecture": 1, "metric": 1, "regularizer": 2, "strategy": 2, "check": 1,
    "doctor finding": 1, "analysis": 2, "command": 2,
}  # fmt: skip
"""The most files of hftl that adding one may touch."""
PATCHES = {name: TESTS / "patches" / f"{name.replace(' ', '-')}.patch" for name in MOST_FILES}


def list_touched(name: str) -> dict[str, bool]:
    """Return the files that a patch touches, and whether each is new."""
    text = PATCHES[name].read_text(encoding="utf-8")
    pairs = re.findall(r"^--- (\S+)\n\+\+\+ b/(\S+)$", text, re.MULTILINE)
    return {path: before == "/dev/null" for before, path in pairs}


def read_row(name: str) -> list[str]:
    """Return the files and folders of hftl that the README names for adding something."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Which file do I touch?")[1]
    (row,) = re.findall(rf"^\| an? {name} \|(.*?)\|", table, re.MULTILINE)
    return re.findall(r"`(hftl/[\w/.]*)`", row)


@pytest.mark.parametrize("name", MOST_FILES)
def test_adding_one_touches_few_files_and_those_that_the_readme_names(name: str) -> None:
    touched = list_touched(name)
    assert 0 < len(touched) <= MOST_FILES[name]
    named = [str(Path(path).parent) + "/" if is_new else path for path, is_new in touched.items()]
    assert sorted(named) == sorted(read_row(name))


def test_every_patch_is_counted() -> None:
    assert sorted(PATCHES.values()) == sorted((TESTS / "patches").iterdir())


def apply_patches(folder: Path) -> None:
    """Copy hftl into a folder and apply every patch, with one line of context at least."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "hftl", folder / "hftl", ignore=ignored)
    # Under a repository git would look for the files there.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    for patch in PATCHES.values():
        applied = subprocess.run(
            ["git", "apply", "-C1", str(patch)], cwd=folder, env=environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert applied.returncode == 0, f"write {patch.name} anew: {applied.stderr}"


def use_extensions(folder: Path, fresh: FreshProcess) -> dict[str, Any]:
    """Return what `support/extended.py` reports of the patched copy."""
    apply_patches(folder)
    write_csv(folder / "reviews.csv", ["text", "label"], sentences(160))
    script = TESTS / "support" / "extended.py"
    used = fresh.run(
        [sys.executable, "-P", str(script), str(folder), fresh.address],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(script.parent)])},
    )
    assert used.returncode == 0, used.stderr
    return json.loads(used.stdout.splitlines()[-1])


def test_what_the_patches_add_works(tmp_path: Path, reload_server: FreshProcess) -> None:
    """One test for all: running a recipe takes most of the time."""
    results = use_extensions(tmp_path, reload_server)
    assert Path(results["package"]).is_relative_to(tmp_path)

    # The check warns; the architecture is read and its arms are planned.
    code, output = results["check"]
    assert code == 0 and "/layoutlm (layoutlm)\n" in output
    assert re.search(r"arms +bias, full, head x seeds \[0\]: 3 to run\n", output)
    assert "warning: 32 validation rows choose the best epoch almost at random" in output

    # The run scores by the metric and trains the strategy after head, before full and scratch.
    code, output = results["measure"]
    assert code == 0, output
    assert re.search(r"\[1/2\] head seed 0 +test kappa -?\d\.\d+", output)
    assert re.search(r"\[2/2\] bias seed 0 +test kappa -?\d\.\d+", output)
    record = json.loads((tmp_path / "run" / "record.json").read_text("utf-8"))
    assert record["metric"] == "kappa" and record["own_arm"] == "bias"
    assert {row["arm"] for row in record["ladder"]} == {"bias", "head"}
    order = results["strategies"]
    assert order.index("gradual") < order.index("bias") < order.index("full")

    # What trains is what the strategy says, under its own key: biases of attention, and the head.
    trained = results["trained"]
    inside = [name for name in trained if name.startswith("layoutlm.encoder.")]
    assert len(inside) == 3 * 5 and all(".attention." in n and n.endswith("bias") for n in inside)
    above = {name for name in trained if name not in inside}
    parts = ("layoutlm.pooler.dense", "classifier")
    assert above == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}

    # Half of a step's rows add half of weight 0.5 times the norm.
    regularizer = results["regularizer"]
    assert regularizer["class"] == "NormPenalty"
    assert regularizer["loss"] == pytest.approx(regularizer["norm"] / 4, rel=1e-4)
    assert record["recipe"]["retain"]["norm"] == {"weight": 0.5}

    code, output = results["doctor"]
    assert code == 4 and "defect, download: a" in output

    code, output = results["spread"]
    value = re.fullmatch(r"spread (\d\.\d+) of 96 rows\n", output)
    assert code == 0 and value and 0 < float(value[1]) < 1

    code, output = results["plan_help"]
    assert code == 0 and "List the arms of a recipe" in output
    assert results["plan"] == [0, "bias: bias, seeds 0\nfull: full, seeds 0\nhead: head, seeds 0\n"]
