"""The documents are true where that can be checked: every file that they name exists, and every function is in it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
CODE = re.compile(r"```.*?```", re.DOTALL)  # whole blocks: diagrams and commands
WORD = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")  # to a file of ours: no scheme
FILE = re.compile(r"(?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|md|toml|proto)")
CALL = re.compile(r"((?:\w+\.)*\w+)\(\)")
PACKAGES = sorted(path.parent for path in ROOT.glob("*/__init__.py"))


def words(text: str) -> Iterator[str]:
    return (found[1] for found in WORD.finditer(CODE.sub("", text)))


def files_in(text: str) -> set[str]:
    return {word for word in words(text) if FILE.fullmatch(word)}


@cache
def names_of(path: Path) -> frozenset[str]:
    """Functions and classes of a file, with the class that they are in."""
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if hasattr(item, "name")}
    return frozenset(names)


def missing_files(text: str) -> list[str]:
    return [name for name in sorted(files_in(text)) if not (ROOT / name).exists() and not is_kind(name)]


def is_kind(name: str) -> bool:
    """A name without a folder means every file that is called so."""
    return "/" not in name and any(next(package.rglob(name), None) for package in PACKAGES)


def missing_names(text: str) -> list[str]:
    """Functions that are in none of the files that their paragraph names; without one, in no file at all."""
    missing = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\d+\. )|\n- ", CODE.sub("", text)):
        named = [ROOT / name for name in files_in(paragraph) if name.endswith(".py")]
        files = named or [path for package in PACKAGES for path in package.rglob("*.py")]
        known = {name for path in files if path.exists() for name in names_of(path)}
        calls = [found[1] for word in words(paragraph) if (found := CALL.fullmatch(word))]
        missing += [call for call in calls if call not in known]
    return missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [link for link in LINK.findall(text) if not (document.parent / link).exists()]
    assert (missing_files(text), missing_names(text), links) == ([], [], [])


def test_the_tour_names_enough_to_be_one() -> None:
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    assert len(files_in(text)) > 40 and sum(bool(CALL.fullmatch(word)) for word in words(text)) > 40


def test_the_checks_find_what_is_wrong() -> None:
    text = "1. `router/gone.py` does it.\n2. `router/saga.py` in `Saga.gone()`, `Saga.generate()`.\n\nAnd `nowhere()`."
    assert missing_files(text) == ["router/gone.py"]
    assert missing_names(text) == ["Saga.gone", "nowhere"]
