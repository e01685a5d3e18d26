"""Data flows one way: a module imports only what stands above it in the design's order."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ORDER = [
    "errors", "hub_errors", "processes", "energy", "secrets", "explain", "yamlfile", "hubwords",
    "sections", "recipe", "record", "places", "rundir", "progress", "metrics", "statistics",
    "data", "model", "analyse", "check", "retain", "train", "adapt", "finetune", "measure",
    "card", "publish", "show", "use", "init", "phases", "pipeline", "failure", "cli", "__main__",
]  # fmt: skip
ROOT = Path(__file__).parent.parent / "hftl"
FILES = [p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: use an absolute import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_only_earlier_stages(path: Path) -> None:
    here = ORDER.index(path.relative_to(ROOT).with_suffix("").parts[0])
    ours = [name for name in imported(path) if name.startswith("hftl.")]
    late = [
        name
        for name in ours
        if name.split(".")[1] in ORDER and ORDER.index(name.split(".")[1]) > here
    ]
    assert not late, f"{path} imports a later stage: {late}"
