"""Build the package, and import an editable install from the parent of the clone."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hftl import __version__

ROOT = Path(__file__).parent.parent
BUILT = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the clone without its history, named as the package is."""
    pytest.importorskip("setuptools", minversion="77")
    clone = tmp_path_factory.mktemp("parent") / "hftl"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "hftl", clone / "hftl", ignore=skipped)
    for name in BUILT:
        shutil.copy(ROOT / name, clone / name)
    return clone


def build(clone: Path, kind: str) -> zipfile.ZipFile:
    """Return the wheel that pip would install."""
    code = f"from setuptools.build_meta import build_{kind} as build; build({kind!r})"
    (clone / kind).mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=clone, check=True, capture_output=True)
    (wheel,) = (clone / kind).glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_an_editable_install_is_imported_from_the_parent_of_the_clone(clone: Path) -> None:
    site = clone.parent / "site"
    build(clone, "editable").extractall(site)
    # Without the site-packages of this process, where hftl may be installed as well.
    code = f"import site; site.addsitedir({str(site)!r}); import hftl; print(hftl.__version__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=clone.parent, env={}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.stdout == f"{__version__}\n", done.stderr


def test_a_wheel_holds_every_module_and_template(clone: Path) -> None:
    wheel = build(clone, "wheel")
    files = {p.relative_to(clone).as_posix() for p in (clone / "hftl").rglob("*") if p.is_file()}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == {name for name in files if "__pycache__" not in name}
    assert {"hftl/card/template.md", "hftl/card/report.html"} <= held
