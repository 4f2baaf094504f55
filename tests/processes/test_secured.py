"""Real processes over TCP with certificates, tickets and keyed digests; and what the wrong ones get."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.certificates import Authority
from tests.chaos.parts import Parts, router, running, worker
from tests.processes.answers import body
from tests.processes.cluster import MODEL, ROOT

LONG = list(range(20, 320))  # far above the local-prefill threshold


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(opened.getsockname()[1]) for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@dataclass(frozen=True)
class Secrets:
    """The files of a cluster."""

    authority: Authority
    key_file: Path

    def flags(self, role: str) -> tuple[str, ...]:
        certificate, key = self.authority.issue(role)
        ca = self.authority.certificate
        tls = ("--tls-cert", str(certificate), "--tls-key", str(key), "--tls-ca", str(ca))
        return ("--ticket-key-file", str(self.key_file), *tls)


@dataclass(frozen=True)
class Secured:
    """One prefill worker, one decode worker, and routers: the right one, one of the wrong role, one of another key."""

    cluster: Parts
    impostor_url: str
    keyless_url: str


def key_file(path: Path) -> Path:
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    ours = Secrets(Authority(folder / "ours"), key_file(folder / "key"))
    other_key = Secrets(ours.authority, key_file(folder / "other-key"))
    p, d, *routers = free_ports(5)
    workers = {"prefill-0": f"127.0.0.1:{p}", "decode-0": f"127.0.0.1:{d}"}
    parts = [
        worker("prefill-0", "prefill", workers["prefill-0"], "--digest", "blake3", *ours.flags("prefill")),
        worker("decode-0", "decode", workers["decode-0"], "--digest", "blake3", *ours.flags("decode")),
        router(workers, "127.0.0.1", routers[0], *ours.flags("router")),
        router(workers, "127.0.0.1", routers[1], *ours.flags("doctor")),
        router(workers, "127.0.0.1", routers[2], *other_key.flags("router")),
    ]
    names = ["router", "impostor", "keyless"]
    parts[2:] = [type(part)(name, part.command, part.flags) for name, part in zip(names, parts[2:], strict=True)]
    urls = [f"http://127.0.0.1:{port}" for port in routers]
    with running(Parts(urls[0], parts), workers=2) as cluster:
        yield Secured(cluster, urls[1], urls[2])


def complete(url: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=body(LONG, 8), timeout=60)


def test_a_completion_crosses_both_workers(secured: Secured) -> None:
    cluster = secured.cluster
    before = cluster.total("baton:handoffs_total", "outcome", "committed")
    answer = complete(cluster.url)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8
    cluster.wait_until(
        "both ends have counted it",
        lambda: cluster.total("baton:handoffs_total", "outcome", "committed") == before + 2,
    )


def test_a_caller_of_the_wrong_role_gets_no_session_and_both_sides_say_why(secured: Secured) -> None:
    why = "role doctor may not call /baton.session.v1.Worker/Tokens"
    said = dict.fromkeys(("prefill-0", "decode-0"), ("refused /baton.session.v1.Worker/Tokens", "role doctor"))
    for name, parts in {"impostor": (why,), **said}.items():
        secured.cluster.wait_until(f"{name} says why", partial(logged, secured.cluster, f"[{name}]", *parts))


def logged(cluster: Parts, *parts: str) -> bool:
    return any(all(part in line for part in parts) for line in cluster.log)


def test_a_router_with_another_key_is_served_nothing(secured: Secured) -> None:
    cluster = secured.cluster
    cluster.wait_until(
        "its sessions are up", lambda: httpx.get(f"{secured.keyless_url}/health", timeout=10).status_code == 200
    )
    answer = complete(secured.keyless_url)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "bad_ticket"), answer.text
    assert "key" not in answer.json()["error"]["message"], "what is wrong inside is for the log"
    cluster.wait_until("it is counted", lambda: cluster.total("baton:tickets_refused_total") > 0)
    assert logged(cluster, "none of our keys has signed")
    cluster.quiesce(2)
    assert complete(cluster.url).status_code == 200, "the right one goes on being served"


@pytest.mark.parametrize(
    ("command", "flags", "says"),
    [
        ("worker", ["--name=w", "--role=decode", "--listen=127.0.0.1:0"], "--ticket-key-file is missing"),
        ("router", ["--workers=w=127.0.0.1:1"], "--ticket-key-file is missing"),
        ("worker", ["--name=w", "--role=decode", "--listen=127.0.0.1:0", "--insecure", "--digest=blake3"], "--digest"),
        ("router", ["--workers=w=127.0.0.1:1", "--insecure", "--tls-cert=x"], "--tls-key and --tls-ca missing"),
        ("router", ["--workers=w=127.0.0.1:1", "--ticket-key-file=/nowhere"], "/nowhere: No such file"),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(command: str, flags: list[str], says: str) -> None:
    argv = [sys.executable, "-m", "baton", command, "--model", str(MODEL), *flags]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert says in done.stderr.splitlines()[-1]
