"""Run commands of hftl in this process, as a terminal would see them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hftl import cli, cli_errors


class Outcome:
    """Hold a command's exit code and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def assert_error(self, code: int, *words: str) -> None:
        lines = self.err.splitlines()
        assert self.code == code, self.err
        assert len(lines) == 1, self.err
        assert lines[0].startswith("hftl: error: ")
        assert "Traceback" not in self.out + self.err
        for word in words:
            assert word in lines[0]


Hftl = Callable[..., Outcome]


@pytest.fixture
def hftl(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Hftl:
    """Return a function that runs `hftl WORDS` in this process, as from an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*words: Any) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["hftl", *map(str, words)])
        monkeypatch.setattr(cli_errors, "CURRENT_COMMAND", cli_errors.CurrentCommand())
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return Outcome(int(str(stop.value.code)), *capsys.readouterr())

    return call
