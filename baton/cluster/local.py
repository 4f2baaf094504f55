"""`baton serve MODEL --ray`: a Ray cluster on this machine, with a registry, for as long as the command runs."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from baton.cluster.connection import connected
from baton.credentials import write_key
from core.errors import ConfigError, StartupError

RECONNECT_S = "600"  # Ray's own 60 s make an outage of a head that restarts
REDIS_START_S = 10.0
STOP_S = 30.0
REMOVE_S = 10.0
START_S = 1800.0
DRAIN_S = 5.0  # on Ctrl-C: streams may end by themselves for so long
CPUS = 1024  # replicas here ask for none; Serve's own actors need some
OBJECT_STORE_BYTES = 100_000_000  # nothing of ours is put there


def run(args: argparse.Namespace, checkpoint: Path) -> int:
    """Until SIGINT or SIGTERM; then everything that it started ends. Raises ConfigError and StartupError."""
    if args.aggregated:
        raise ConfigError("--ray scales prefill and decode apart: it does not go with --aggregated")
    stop = threading.Event()
    folder = Path(tempfile.mkdtemp(prefix="baton-"))  # 0700: key, registry and Ray's sockets are this user's alone
    _tell_ray(os.environ, folder)
    try:
        with _registry(args.registry, folder) as registry, connected("local", **_ray_options(folder)):
            for number in (signal.SIGINT, signal.SIGTERM):  # after Ray has set its own
                signal.signal(number, lambda *_: stop.set())
            _serve(_plain(args, checkpoint, folder, registry), stop)
    finally:
        _remove(folder)
    return 0


def _serve(plain: dict[str, Any], stop: threading.Event) -> None:
    from baton.cluster.rollout import roll_out, take_down

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        url = roll_out(plain, START_S, say, stop.is_set)
        if url:
            say(f"ready: {plain['model']['served_name']} on {url}   look at it: baton status {url}")
        stop.wait()
    finally:
        with suppress(StartupError):
            take_down(STOP_S, lambda _: None)


def _plain(args: argparse.Namespace, checkpoint: Path, folder: Path, registry: str) -> dict[str, Any]:
    """The cluster file that the flags of `baton serve` come to."""
    worker = {
        "dtype": args.dtype,
        "page_size": args.page_size,
        "pages": args.pages,
        "kv_bytes": int(args.kv_memory * 2**30),
        "max_context": args.max_context,
        "step_tokens": args.step_tokens,
        "threads": args.threads,
        "transport": args.transport,
        "backend": args.backend,
        "device": args.device,
        "gpu_share": 1.0 / (args.prefill + args.decode),
        "prefill_share": args.prefill_share,
        "digest": args.digest,
    }
    local = {} if args.local_prefill == "auto" else {"local_prefill": int(args.local_prefill)}
    router = {"max_context": args.max_context, "local_prefill": args.local_prefill, "lend": args.lend}
    own: dict[str, Any] = {"num_cpus": 0, "drain_s": DRAIN_S}
    tls = {f"tls_{n}": str(Path(args.tls) / f) for n, f in _TLS_FILES} if args.tls else {}
    return {
        "model": {"path": str(checkpoint), "served_name": args.served_model_name or checkpoint.name},
        "registry": {"url": registry},
        "security": {"ticket_key_file": str(write_key(folder)), **tls},
        "router": {**own, "http_host": args.host, "http_port": args.port, "flags": router},
        "prefill": {**own, "min": args.prefill, "max": args.prefill, "flags": {**worker, **local, "nice": 19}},
        "decode": {**own, "min": args.decode, "max": args.decode, "flags": {**worker, **local}},
    }


_TLS_FILES = (("cert", "{role}.crt"), ("key", "{role}.key"), ("ca", "ca.crt"))


def _tell_ray(environment: Any, folder: Path) -> None:
    """What Ray reads from the environment: said, and not left to its version. Its files go with the folder."""
    environment.setdefault("RAY_AUTH_MODE", "token")
    environment.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", RECONNECT_S)
    environment.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    environment["RAY_TMPDIR"] = environment["TMPDIR"] = str(folder)


def _ray_options(folder: Path) -> dict[str, Any]:
    return {
        "num_cpus": CPUS,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": str(folder / "ray"),
    }


def _remove(folder: Path) -> None:
    """Ray's processes that are just ending may write there once more."""
    ends_s = time.monotonic() + REMOVE_S
    while folder.exists() and time.monotonic() < ends_s:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


@contextmanager
def _registry(url: str, folder: Path) -> Iterator[str]:
    """The one that was named, or a redis-server of our own on a socket in the folder. Raises StartupError."""
    if url:
        yield url
        return
    program = shutil.which("redis-server")
    if program is None:
        raise StartupError(
            "--ray needs a registry, and there is no redis-server on PATH: install it (Debian: apt-get install"
            " redis-server), or name a running one with --registry redis://HOST:PORT/0"
        )
    socket = folder / "redis.sock"
    tied = [setpriv, "--pdeathsig", "KILL"] if (setpriv := shutil.which("setpriv")) else []  # ends with us
    plain = ["--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700", "--save", "", "--dir", str(folder)]
    server = subprocess.Popen(
        [*tied, program, *plain], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        ends_s = time.monotonic() + REDIS_START_S
        while not socket.exists():
            if server.poll() is not None or time.monotonic() > ends_s:
                raise StartupError(f"{program} does not start")
            time.sleep(0.02)
        yield f"unix://{socket}"
    finally:
        server.kill()
        server.wait()
