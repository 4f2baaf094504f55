"""Where NIXL is installed for the benchmark: a virtual environment of its own, made once, in a cache folder.

Only the library itself and numpy: its other dependency, torch, is needed for tensors alone, and is gigabytes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = ("nixl-cu12==1.5.1", "numpy>=2,<3")
PATIENCE_S = 600.0


class NixlMissing(Exception):
    """Why there is none."""


def nixl_python(cache: Path) -> str:
    """The interpreter that can import it, installed when it has not been before. Raises NixlMissing."""
    folder = cache / REQUIREMENTS[0].replace("==", "-")
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if not stamp.exists():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"installing {REQUIREMENTS[0]} into {folder}", file=sys.stderr)
        install(folder, python)
        stamp.touch()
    return str(python)


def install(folder: Path, python: Path) -> None:
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    command = [*pip, "install", "--quiet", "--no-deps", *REQUIREMENTS]
    try:
        venv.create(folder, with_pip=True, symlinks=True)
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise NixlMissing(f"not installed: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason was given"]
        raise NixlMissing(f"not installed: {lines[-1]}")
