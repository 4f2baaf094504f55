"""The command line: what --help shows, lazy imports, and how an error becomes one line and an exit code."""

import argparse
import subprocess
import sys
from types import SimpleNamespace

import pytest

import baton
from baton.__main__ import COMMANDS, Command, main, run_command
from core.errors import CheckpointError, PortInUse, QueueFull
from core.sampling import SamplingParams


def failing(error: BaseException) -> SimpleNamespace:
    def run(args: argparse.Namespace) -> int:
        raise error

    return SimpleNamespace(add_arguments=lambda parser: None, run=run)


@pytest.fixture
def run_failing(monkeypatch: pytest.MonkeyPatch):
    def run(error: BaseException) -> int:
        monkeypatch.setitem(sys.modules, "failing_command", failing(error))
        return run_command(Command("fail", "failing_command", "fails"), [])

    return run


def test_help_lists_what_people_use_and_hides_what_the_launcher_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert (f"\n  {command.name} " in shown) is not command.hidden
    assert main([]) == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"baton {baton.__version__}\n"


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["srve"]) == 2
    assert "no command 'srve'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (CheckpointError("no config.json in models/x"), 3, "baton fail: no config.json in models/x\n"),
        (PortInUse("port 8000 is in use"), 5, "baton fail: port 8000 is in use\n"),
        (QueueFull("come back later"), 1, "baton fail: come back later\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    run_failing, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    assert run_failing(error) == code
    assert capsys.readouterr().err == message


def test_a_mistake_of_ours_keeps_its_traceback(run_failing) -> None:
    with pytest.raises(ZeroDivisionError):
        run_failing(ZeroDivisionError())


def test_help_and_version_load_no_library() -> None:
    program = (
        "import sys; from baton.__main__ import main; main(['--help']); main(['version']);"
        "loaded = {'torch', 'aiohttp', 'grpc', 'starlette', 'tokenizers', 'numpy'} & set(sys.modules);"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_output_cut_short_by_its_reader_is_no_traceback() -> None:
    shell = f"{sys.executable} -m baton --help | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr


def test_the_help_of_a_command_shows_defaults_that_mean_something(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["bench", "--help"])
    assert done.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: 512)" in shown
    assert "(default: None)" not in shown and "(default: False)" not in shown


def test_what_a_program_imports_is_loaded_when_it_is_used() -> None:
    assert baton.SamplingParams is SamplingParams
    with pytest.raises(AttributeError, match="no attribute 'Manager'"):
        baton.Manager  # noqa: B018
