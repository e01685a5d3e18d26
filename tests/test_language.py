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
STORED_KEYS = {("facts.py", "kept"), ("guard.py", "kept"), ("run_folder.py", "asked")}
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


@pytest.fixture(scope="module")
def findings() -> dict[str, list[str]]:
    """Return names that are no terms and docstrings that ask, with file and line; one pass."""
    names: list[str] = []
    questions: list[str] = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        where = path.relative_to(ROOT).as_posix()
        names += [
            f"{where}:{line}: {name}"
            for line, name in bound_names(tree)
            if name.strip("_").lower() in PRIVATE_WORDS and (path.name, name) not in STORED_KEYS
        ]
        questions += [
            f"{where}:{line}: {text.splitlines()[0]}"
            for line, text in docstrings(tree)
            if QUESTION.match(text)
        ]
    return {"names": names, "questions": questions}


def test_names_are_terms_of_the_field(findings: dict[str, list[str]]) -> None:
    assert len(FILES) > 400
    assert not findings["names"], "name the thing instead: " + ", ".join(findings["names"])


def test_docstrings_open_with_no_question(findings: dict[str, list[str]]) -> None:
    assert not findings["questions"], "open with a verb: " + "; ".join(findings["questions"])


def test_finds_what_it_forbids() -> None:
    tree = ast.parse('def find(kept, *, x=1):\n    """Where rows lie."""\n    told = kept')
    assert {name for _, name in bound_names(tree)} & PRIVATE_WORDS == {"kept", "told"}
    assert [bool(QUESTION.match(text)) for _, text in docstrings(tree)] == [True]
