"""A model named by its id on the hub: downloaded once, found again without the hub, and clear words when it is not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_stand_in import SHA, Hub, serving

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "baton-tiny"
UNWANTED = {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "onnx/config.json": b"{}"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in MODEL.iterdir() if path.is_file()}
    files["README.md"] = b"a card, which nobody needs to serve the model"
    with serving(Hub("org/tiny", files | UNWANTED)) as hub:
        yield hub


def baton(home: Path, url: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`baton ...` with this hub and this cache."""
    env = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "baton", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def nobody() -> str:
    """A URL at which nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """What Baton itself says, which is one line, at the end."""
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


def test_a_model_is_downloaded_once_and_found_again_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "org/tiny", "prompt": "x"}}
    (tmp_path / "in.jsonl").write_text(json.dumps(line))
    command = ("batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--model", "org/tiny", "--threads", "1")
    home = tmp_path / "home"
    done = baton(home, hub.url, *command, "--served-model-name", "org/tiny")
    assert done.returncode == 0, done.stderr
    snapshot = home / "hub" / "models--org--tiny" / "snapshots" / SHA
    assert {p.name: p.read_bytes() for p in snapshot.iterdir()} == {
        name: data for name, data in hub.files.items() if name not in UNWANTED and name != "README.md"
    }
    assert not [asked for asked in hub.asked if asked.endswith(tuple(UNWANTED))], "no code, and nothing twice"
    done = baton(home, nobody(), *command, "--served-model-name", "org/tiny")
    assert done.returncode == 0, done.stderr


def test_a_download_that_breaks_off_is_an_error_of_the_checkpoint(hub: Hub, tmp_path: Path) -> None:
    hub.cut.add("model.safetensors")
    done = baton(tmp_path, hub.url, "serve", "org/tiny", "--port", "0")
    assert done.returncode == 3
    assert complaint(done).startswith(f"baton serve: org/tiny: the download from {hub.url} failed: ")


def test_an_id_that_the_hub_does_not_know(hub: Hub, tmp_path: Path) -> None:
    done = baton(tmp_path, hub.url, "serve", "org/other", "--port", "0")
    assert done.returncode == 3
    assert complaint(done) == (
        f"baton serve: org/other: no such folder, and no such model on {hub.url}, or a private one"
    )


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    done = baton(tmp_path, nobody(), "serve", "org/tiny", "--port", "0")
    assert done.returncode == 3
    assert "no such folder, not in the local cache, and http://127.0.0.1" in complaint(done)


@pytest.mark.parametrize("name", ["bad name/x", "a..b", "-x"])
def test_what_is_neither_a_folder_nor_an_id(tmp_path: Path, name: str) -> None:
    done = baton(tmp_path, nobody(), "serve", "--port", "0", "--", name)
    assert done.returncode == 3
    assert complaint(done) == f"baton serve: {name}: neither a folder nor the id of a model"
