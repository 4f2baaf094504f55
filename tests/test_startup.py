"""What keeps `baton serve` from starting: each cause has its exit code, and one last line that names it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "baton-tiny"


def serve(*arguments: str | Path, port: int = 0) -> tuple[int, str]:
    """The exit code and the last line. A server that starts after all is a failure of the test."""
    command = [sys.executable, "-m", "baton", "serve", "--port", str(port or free_port()), *map(str, arguments)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "" and "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr.splitlines()[-1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert serve(tmp_path / "nowhere") == (3, f"baton serve: {tmp_path / 'nowhere'}: no such folder")


def test_a_folder_without_a_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    code, line = serve(checkpoint)
    assert code == 3 and line.startswith(f"baton serve: {checkpoint}: no config.json")


def test_a_config_that_is_broken_or_incomplete(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    code, line = serve(checkpoint)
    assert code == 3 and line.startswith(f"baton serve: {checkpoint / 'config.json'}: not JSON")
    config = json.loads((MODEL / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"hidden_size": "big"}))
    code, line = serve(checkpoint)
    assert code == 3 and "config.json: hidden_size must be a positive whole number, got 'big'" in line


def test_an_architecture_that_is_not_known(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    code, line = serve(checkpoint)
    assert code == 3 and "'GPT2LMHeadModel' is not known; known are LlamaForCausalLM, Mistral" in line


def test_weights_that_are_cut_short(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, line = serve(checkpoint)
    assert code == 3 and str(weights) in line and "broken safetensors file" in line


def test_a_tokenizer_that_is_missing(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    code, line = serve(checkpoint)
    assert code == 3 and "tokenizer.json is missing" in line


def test_too_little_memory_for_one_sequence() -> None:
    code, line = serve(MODEL, "--kv-memory", "0.001")
    assert code == 4 and "one sequence of 4096 tokens needs 257 pages" in line and "--kv-memory" in line


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert serve(MODEL, port=port) == (
            5,
            f"baton serve: port {port} on 127.0.0.1 is in use: choose another with --port",
        )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max-context", "9999"], "a context of 9999 tokens was asked for; the model has 4096"),
        (["--page-size", "20"], "--page-size"),
        (["--prefill", "0"], "--prefill and --decode"),
        (["--local-prefill", "some"], "--local-prefill"),
        (["--prefill-share", "1"], "--prefill-share"),
    ],
)
def test_options_that_cannot_be(flags: list[str], says: str) -> None:
    code, line = serve(MODEL, *flags)
    assert code == 2 and says in line
