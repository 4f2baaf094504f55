"""Whether the code is still small: prints lines by package, and fails on a file or a function that is over budget.

A line counts when it holds a token that is neither comment nor docstring. `kernels` and `tests` are shown apart:
a kernel is as long as its operation is. Generated files are not counted at all.
"""

from __future__ import annotations

import ast
import io
import math
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 40
MAX_P90_LINES = 25
PACKAGES = (
    "baton", "router", "prefill_service", "decode_service", "session", "engine", "kvtransfer", "core", "wire",
)  # fmt: skip
APART = ("kernels", "tests")
LAYOUT_TOKENS = frozenset(
    {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
)


@dataclass(frozen=True, slots=True)
class Function:
    where: str
    lines: int


@dataclass(frozen=True, slots=True)
class File:
    path: str
    lines: int
    functions: tuple[Function, ...]


def code_lines(source: str, tree: ast.Module) -> frozenset[int]:
    """The numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT_TOKENS:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return frozenset(lines)


def measure(path: Path, name: str) -> File:
    """The code lines of a file and of each function in it, decorators left out."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source, filename=name)
    lines = code_lines(source, tree)
    functions = tuple(
        Function(f"{name}:{node.lineno} {node.name}", len(lines & set(range(node.lineno, (node.end_lineno or 0) + 1))))
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return File(name, len(lines), functions)


def package_files(root: Path, package: str) -> list[File]:
    """Every file of a package but the generated ones."""
    found = sorted((root / package).rglob("*.py"))
    return [measure(path, str(path.relative_to(root))) for path in found if "_pb2" not in path.name]


def percentile(values: Sequence[int], share: float) -> int:
    """The smallest value that at least this share of the values do not exceed; 0 for none."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else 0


def row(package: str, files: Sequence[File]) -> str:
    """One line of the table."""
    functions = [function.lines for file in files for function in file.functions]
    largest = max(files, key=lambda file: file.lines, default=File("-", 0, ()))
    spread = f"{percentile(functions, 0.5):4d} {percentile(functions, 0.9):4d} {max(functions, default=0):4d}"
    total = sum(file.lines for file in files)
    return f"{package:16s} {len(files):5d} {total:7d}   {spread}   {largest.lines:4d} {largest.path}"


def breaches(package: str, files: Sequence[File]) -> Iterator[str]:
    """What is over budget in one package."""
    for file in files:
        if file.lines > MAX_FILE_LINES:
            yield f"{file.path}: {file.lines} code lines, over {MAX_FILE_LINES}"
        for function in file.functions:
            if function.lines > MAX_FUNCTION_LINES:
                yield f"{function.where}: {function.lines} lines, over {MAX_FUNCTION_LINES}"
    p90 = percentile([function.lines for file in files for function in file.functions], 0.9)
    if p90 > MAX_P90_LINES:
        yield f"{package}: one function in ten has over {MAX_P90_LINES} lines (the 90th percentile is {p90})"


def main(root: Path) -> int:
    """Prints the table, then what is over budget. 1 when anything is."""
    counted = {package: package_files(root, package) for package in (*PACKAGES, *APART)}
    print("package          files   lines    p50  p90  max   largest file")
    for package in PACKAGES:
        print(row(package, counted[package]))
    print(row("total", [file for package in PACKAGES for file in counted[package]]))
    for package in APART:
        print(row(package, counted[package]))
    found = [breach for package in PACKAGES for breach in breaches(package, counted[package])]
    for breach in found:
        print(breach, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
