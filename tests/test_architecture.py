"""The house stands: each package imports what its floor may, and foreign libraries enter where they are wrapped."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {  # package -> what it may import besides itself; the table of docs/design.md
    "baton": {
        "router", "prefill_service", "decode_service", "session", "engine", "kvtransfer", "kernels", "core", "wire",
    },
    "router": {"core", "wire"},
    "prefill_service": {"session", "engine", "kvtransfer", "core", "wire"},
    "decode_service": {"session", "engine", "kvtransfer", "core", "wire"},
    "session": {"core", "wire"},
    "engine": {"kernels", "core"},
    "kvtransfer": {"kernels", "core", "wire"},
    "kernels": set(),
    "core": set(),
    "wire": set(),
}  # fmt: skip
WITHOUT_TORCH = ("router", "session", "core", "wire")
HOME_OF = {  # foreign library -> the one folder
    "cuda": "kvtransfer/", "kubernetes": "baton/k8s/", "ray": "baton/", "redis": "core/registry/",
    "triton": "kernels/gpu/", "ucxx": "kvtransfer/",
}  # fmt: skip
IN_ONE_FILE = ("cuda", "kubernetes", "redis", "ucxx")
VAGUE_FILES = ("util", "utils", "helper", "helpers", "common", "misc")
MUTABLE_TYPES = ("list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict")
MUTATORS = (
    "append", "extend", "insert", "remove", "pop", "popitem", "clear", "add", "discard", "update", "setdefault",
    "appendleft", "popleft",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    path: str  # relative to the root
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.path.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Import:
    where: str
    source: Source
    module: str  # dotted, with the imported name at its end: what `from a import b` may mean

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def parse(path: str, text: str) -> Source:
    return Source(path, ast.parse(text, filename=path))


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    """Every file of every package that people write: generated ones are left out."""
    paths = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]
    names = [str(path.relative_to(ROOT)) for path in paths if "_pb2" not in path.name]
    return [parse(name, (ROOT / name).read_text(encoding="utf-8")) for name in names]


def imports(source: Source) -> Iterator[Import]:
    """Every import of a file, wherever it stands."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            yield Import(f"{source.path}:{node.lineno}", source, module)


def all_imports(sources: Iterable[Source]) -> list[Import]:
    return [found for source in sources for found in imports(source)]


def floor_breaches(sources: Iterable[Source]) -> list[str]:
    return [
        f"{found.where}: {found.source.package} may not import {found.top}"
        for found in all_imports(sources)
        if found.top in MAY_IMPORT
        and found.top != found.source.package
        and found.top not in MAY_IMPORT[found.source.package]
    ]


def foreign_breaches(sources: Iterable[Source]) -> list[str]:
    found = [item for item in all_imports(sources) if item.top in HOME_OF]
    breaches = [
        f"{item.where}: {item.top} belongs into {HOME_OF[item.top]}"
        for item in found
        if not item.source.path.startswith(HOME_OF[item.top])
    ]
    for library in IN_ONE_FILE:
        files = sorted({item.source.path for item in found if item.top == library})
        if len(files) > 1:
            breaches.append(f"{library} is imported by {', '.join(files)}: one file wraps it")
    return breaches


def generated_breaches(sources: Iterable[Source]) -> list[str]:
    """Generated names stay in the files that own a connection, and in what codes for them."""
    return [
        f"{found.where}: {found.module} outside a server.py, client.py or coding.py"
        for found in all_imports(sources)
        if "_pb2" in found.module and Path(found.source.path).name not in ("server.py", "client.py", "coding.py")
    ]


def environment_breaches(sources: Iterable[Source]) -> list[str]:
    """Flags and environment variables are read in baton/ only."""
    breaches = []
    for source in sources:
        if source.package == "baton":
            continue
        breaches += [f"{found.where}: argparse" for found in imports(source) if found.top in ("argparse", "click")]
        breaches += [
            f"{source.path}:{node.lineno}: os.{node.attr}"
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv")
        ]
        breaches += [
            f"{found.where}: {found.module}"
            for found in imports(source)
            if found.module in ("os.environ", "os.getenv", "sys.argv")
        ]
    return breaches


def name_breaches(sources: Iterable[Source]) -> list[str]:
    """Names that say nothing: a file called utils, a class called Manager or Base."""
    breaches = [
        f"{source.path}: call it for what it decides"
        for source in sources
        if set(Path(source.path).with_suffix("").parts) & set(VAGUE_FILES)
    ]
    return breaches + [
        f"{source.path}:{node.lineno}: class {node.name}"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef) and (node.name.endswith(("Manager", "Base")) or node.name.startswith("Base"))
    ]


def docstring_breaches(sources: Iterable[Source]) -> list[str]:
    return [f"{source.path}: what does it decide?" for source in sources if not ast.get_docstring(source.tree)]


def module_statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run at import, those inside if, try and with included."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for part in ("body", "orelse", "finalbody"):
                yield from module_statements(getattr(node, part, ()))


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
        return name in MUTABLE_TYPES
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def mutable_names(source: Source) -> dict[str, int]:
    """The module-level names that hold a list, dict or set, with their lines."""
    names = {}
    for node in module_statements(source.tree.body):
        if isinstance(node, ast.Assign | ast.AnnAssign) and is_mutable(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id: node.lineno for target in targets if isinstance(target, ast.Name)}
    return names


def mutated_names(source: Source) -> set[str]:
    """The names whose object some statement of the file changes."""
    names = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            names.add(getattr(node.func.value, "id", ""))
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            names.add(getattr(node.value, "id", ""))
        elif isinstance(node, ast.AugAssign):
            names.add(getattr(node.target, "id", ""))
    return names


def state_breaches(sources: Iterable[Source]) -> list[str]:
    """A table is a constant, in capitals, that nothing changes; `global` is never right."""
    breaches = []
    for source in sources:
        mutated = mutated_names(source)
        for name, line in mutable_names(source).items():
            if name in mutated or not (name.isupper() or name.startswith("__")):
                breaches.append(f"{source.path}:{line}: {name} is mutable state of the module")
        breaches += [
            f"{source.path}:{node.lineno}: global" for node in ast.walk(source.tree) if isinstance(node, ast.Global)
        ]
    return breaches


CHECKS = {
    "floors": floor_breaches,
    "foreign libraries": foreign_breaches,
    "generated names": generated_breaches,
    "environment": environment_breaches,
    "names": name_breaches,
    "docstrings": docstring_breaches,
    "module state": state_breaches,
}

BAD = {  # check -> files that must be found, one breach each
    "floors": [
        ("router/a.py", "import torch, engine.pool"),
        ("prefill_service/a.py", "def f():\n    from decode_service import server"),
        ("core/a.py", "from wire import session_pb2"),
    ],
    "foreign libraries": [
        ("engine/a.py", "import ray.serve"),
        ("core/clock.py", "from redis import asyncio"),
        ("kernels/rope.py", "import triton.language as tl"),
    ],
    "generated names": [
        ("session/a.py", "from wire import session_pb2"),
        ("router/a.py", "import wire.session_pb2_grpc"),
    ],
    "environment": [
        ("engine/a.py", "import os\nx = os.environ['A']"),
        ("core/a.py", "import os\n\ndef f(): return os.getenv('A')"),
        ("router/a.py", "import argparse"),
        ("router/b.py", "from os import environ"),
    ],
    "names": [
        ("engine/utils.py", ""),
        ("core/common/a.py", ""),
        ("engine/a.py", "class PoolManager: ..."),
        ("engine/a.py", "class BasePool: ..."),
    ],
    "docstrings": [("engine/a.py", "x = 1")],
    "module state": [
        ("engine/a.py", "seen = []"),
        ("engine/b.py", "SEEN = set()\ndef f(x): SEEN.add(x)"),
        ("engine/c.py", "TABLE: dict[str, int] = {}\ndef f(x): TABLE[x] = 1"),
        ("engine/d.py", "X = 1\ndef f():\n    global X\n    X = 2"),
        ("engine/e.py", "if True:\n    cache = dict()"),
    ],
}


@pytest.mark.parametrize("check", CHECKS)
def test_the_house_stands(check: str, sources: list[Source]) -> None:
    breaches = CHECKS[check](sources)
    assert not breaches, "\n" + "\n".join(breaches)


@pytest.mark.parametrize(
    ("check", "path", "text"), [(check, path, text) for check, files in BAD.items() for path, text in files]
)
def test_each_check_finds_what_it_is_for(check: str, path: str, text: str) -> None:
    assert len(CHECKS[check]([parse(path, text)])) == 1


def test_a_library_is_wrapped_by_one_file() -> None:
    pair = [parse(f"kvtransfer/{name}.py", "import ucxx") for name in "ab"]
    assert foreign_breaches(pair[:1]) == []
    assert foreign_breaches(pair) == ["ucxx is imported by kvtransfer/a.py, kvtransfer/b.py: one file wraps it"]


def test_every_package_is_one_of_the_house(sources: list[Source]) -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert found <= set(MAY_IMPORT)


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_importing_it_loads_neither_torch_nor_what_is_above_it(package: str, sources: list[Source]) -> None:
    modules = [
        source.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for source in sources
        if source.package == package and not source.path.endswith("__main__.py")
    ]
    forbidden = sorted(({"torch", "transformers"} | set(MAY_IMPORT)) - MAY_IMPORT[package] - {package})
    program = (
        "import importlib, sys\n"
        f"for module in {modules!r}: importlib.import_module(module)\n"
        f"loaded = [name for name in {forbidden!r} if name in sys.modules]\n"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
