"""Refuse an output that cannot be written before the work, in one line."""

import errno
import os
import sys
from pathlib import Path

import pytest
from support.command import Hftl

from hftl import cli_errors
from hftl.errors import RecipeError
from hftl.inference.compare import compare_models
from hftl.inference.predict_table import predict_table


def unwritable(folder: Path) -> list[Path]:
    """Return a folder, a file whose plot would be one, and a place that only the system writes."""
    (folder / "a.csv").mkdir()
    (folder / "b.png").mkdir()
    return [folder / "a.csv", folder / "b.csv", Path("/proc/c.csv")]


def test_unwritable_output_is_refused_before_any_model_is_loaded(
    tmp_path: Path,
) -> None:
    for output in unwritable(tmp_path):
        with pytest.raises(RecipeError, match="--output"):
            compare_models(["nowhere/at all"], None, output)
    for output in (tmp_path / "a.csv", Path("/proc/c.csv")):
        with pytest.raises(RecipeError, match="--output"):
            predict_table("nowhere/at all", tmp_path / "none.csv", output)


@pytest.mark.parametrize("words", [
    ["predict", "m", __file__, "--output"], ["compare", "m", "--output"],
    ["rank", "r.yaml", "--write"], ["sweep", "r.yaml", "--write"],
])  # fmt: skip
def test_a_missing_folder_is_refused_before_torch_is_imported(
    words: list[str], hftl: Hftl, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("predict_table", "compare"):
        monkeypatch.setitem(sys.modules, f"hftl.inference.{name}", None)
    for name in ("analyses", "pipeline"):
        monkeypatch.setitem(sys.modules, f"hftl.pipeline.{name}", None)
    words = [str(recipe_file) if word == "r.yaml" else word for word in words]
    hftl(*words, tmp_path / "no" / "x.csv").assert_error(2, "x.csv: there is no folder")


def test_refused_command_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nowhere"):
        compare_models(["nowhere/at all"], None, tmp_path / "c.csv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT])
def test_error_of_the_system_is_no_bug(
    code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "gone" / "x.csv")
    assert cli_errors.report_unexpected_error(OSError(code, os.strerror(code), path), False) == 2
    said = capsys.readouterr().err
    assert f"hftl: error: {path}: {os.strerror(code)}." in said and said.count("\n") == 1


def test_interpreter_that_is_gone_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    error = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), sys.executable)
    assert cli_errors.report_unexpected_error(error, debug=False) == 2
    assert capsys.readouterr().err.startswith(f"hftl: error: {sys.executable}: No such file")


def test_missing_file_of_hftl_is_a_bug(tmp_path: Path) -> None:
    assert (
        cli_errors.report_unexpected_error(
            OSError(errno.ENOENT, "gone", str(tmp_path / "x.json")), False
        )
        == 1
    )
