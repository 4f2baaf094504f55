"""The text the model learns from: sources of the Python standard library."""

from __future__ import annotations

import ast
import collections
import keyword
import pathlib
import re
import sysconfig
import textwrap

HELDOUT = (
    "bisect.py",
    "colorsys.py",
    "fnmatch.py",
    "heapq.py",
    "queue.py",
    "sched.py",
    "shlex.py",
    "textwrap.py",
)
SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
HERE = pathlib.Path(__file__).resolve().parent


def stdlib_files() -> list[pathlib.Path]:
    """Every module of the running Python's standard library, tests and tables left out, sorted by path."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = sorted(path for path in root.rglob("*.py"))
    return [path for path in found if not SKIPPED & set(path.relative_to(root).parts)]


def is_heldout(path: pathlib.Path) -> bool:
    """Whether a module is kept out of the training text."""
    return path.name in HELDOUT and path.parent == pathlib.Path(sysconfig.get_paths()["stdlib"])


def read(path: pathlib.Path) -> str:
    """A module's text; what is not UTF-8 is replaced."""
    return path.read_text(encoding="utf-8", errors="replace")


def training_texts() -> list[str]:
    """The modules that are trained on, one text each."""
    return [read(path) for path in stdlib_files() if not is_heldout(path)]


def heldout_text() -> str:
    """The held-out modules in one text, as committed in heldout.txt."""
    return (HERE / "heldout.txt").read_text(encoding="utf-8")


def write_heldout() -> None:
    """Write heldout.txt from the running Python's held-out modules."""
    parts = [read(path) for path in stdlib_files() if is_heldout(path)]
    (HERE / "heldout.txt").write_text("\n".join(parts), encoding="utf-8")


def common_words(texts: list[str], count: int) -> list[str]:
    """The most frequent lower-case words of 3 to 8 letters, Python's keywords left out, sorted."""
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(re.findall(r"(?<![A-Za-z])[a-z]{3,8}(?![A-Za-z])", text))
    ranked = [word for word, _ in counts.most_common() if not keyword.iskeyword(word)]
    return sorted(ranked[:count])


def functions(text: str, max_lines: int = 16, methods: bool = False) -> list[tuple[str, str]]:
    """Short functions of a module, each as (signature and docstring, body); methods lose their indentation."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    lines = text.splitlines()
    found = []
    for node in ast.walk(tree) if methods else tree.body:
        if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
            continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if not body or not 2 <= node.end_lineno - node.lineno < max_lines or body[0].lineno == node.lineno:
            continue
        cut = body[0].lineno - node.lineno
        whole = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).split("\n")
        found.append(("\n".join(whole[:cut]), "\n".join(whole[cut:])))
    return found
