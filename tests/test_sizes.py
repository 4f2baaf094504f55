"""The size budget holds, and the script that measures it counts code, not comments or docstrings."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def sizes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sizes", ROOT / ".ci" / "sizes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # dataclasses look their module up by name
        patch.setitem(sys.modules, "sizes", module)
        spec.loader.exec_module(module)
    return module


def test_every_package_is_within_its_budget(sizes: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert sizes.main(ROOT) == 0, capsys.readouterr().err


def test_comments_docstrings_and_blank_lines_are_not_counted(sizes: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    head = '"""Doc\nof two lines."""\n\n# why\nx = 1  # a\n\n\n'
    path.write_text(head + 'def f(\n    a,\n):\n    """Doc."""\n    return a\n')
    file = sizes.measure(path, "a.py")
    assert file.lines == 5
    assert [function.lines for function in file.functions] == [4]


def test_a_long_function_a_long_file_and_many_longish_functions_are_breaches(sizes: ModuleType, tmp_path: Path) -> None:
    def function(name: str, lines: int) -> str:
        return f"def {name}():\n" + "    x = 1\n" * (lines - 1)

    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "long.py").write_text(function("f", 41))
    (tmp_path / "p" / "large.py").write_text("x = 1\n" * 301)
    (tmp_path / "p" / "fine.py").write_text(function("g", 40) + "x = 1\n" * 260)
    found = list(sizes.breaches("p", sizes.package_files(tmp_path, "p")))
    assert len(found) == 3
    assert "long.py:1 f: 41 lines" in found[1] and "large.py: 301" in found[0] and "90th percentile is 41" in found[2]


def test_percentile_is_the_nearest_rank(sizes: ModuleType) -> None:
    assert sizes.percentile(range(1, 11), 0.9) == 9
    assert sizes.percentile([7], 0.5) == 7
    assert sizes.percentile([], 0.5) == 0
