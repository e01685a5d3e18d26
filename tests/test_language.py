"""Check the language of the code: names that are terms of the field, docstrings without questions.

ruff asks for imperative docstrings (D401), and cannot tell a noun of the field from a pronoun.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("hftl", "benchmarks", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PRIVATE_WORDS = {"told", "found", "kept", "asked", "wanted", "looked", "learnt"}
"""Words that name no thing of the field: `found` was bound 844 times, with as many meanings."""
STORED_KEYS = {("record.py", "kept"), ("guard.py", "kept"), ("run_folder.py", "asked")}
"""Keys of the record and of a stage's files, which keep their names."""
QUESTION = re.compile(r"(What|Whether|Which|Where|How|Who|When|Why)\b")


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and name of every function, class, argument, variable and attribute bound."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.arg(arg=name):
                yield node.lineno, name
            case ast.Name(id=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.alias(asname=str(name)):
                yield node.lineno, name


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and text of every docstring."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_are_terms_of_the_field(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    private = [
        f"{path.name}:{line}: {name}"
        for line, name in bound_names(tree)
        if name.strip("_").lower() in PRIVATE_WORDS and (path.name, name) not in STORED_KEYS
    ]
    assert not private, "name the thing instead: " + ", ".join(private)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_open_with_no_question(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    questions = [
        f"{path.name}:{line}: {text.splitlines()[0]}"
        for line, text in docstrings(tree)
        if QUESTION.match(text)
    ]
    assert not questions, "open with a verb: " + "; ".join(questions)
