"""The two hosts are joined as they say, each fault is one, and nothing is left of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.chaos.netns import LINKS, Hosts, two_hosts

SERVE = """
import socket
server = socket.create_server(("", 7100))
print("up", flush=True)
while True:
    server.accept()[0].close()
"""
CALL = """
import socket, sys
socket.create_connection((sys.argv[1], 7100), 1.0).close()
"""
SEND = """
import hashlib, socket, sys
there = socket.create_connection((sys.argv[1], 7200), 5.0)
there.sendall(hashlib.shake_128(b"").digest(4_000_000))
there.close()
"""
RECEIVE = """
import hashlib, socket
server = socket.create_server(("", 7200))
print("up", flush=True)
here = server.accept()[0]
got = b"".join(iter(lambda: here.recv(1 << 16), b""))
sent = hashlib.shake_128(b"").digest(4_000_000)
assert len(got) == len(sent)
print(sum(a != b for a, b in zip(got, sent)), flush=True)
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with two_hosts() as hosts:
        yield hosts
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=10, check=True).stdout
    assert hosts.p not in left and hosts.d not in left


@pytest.fixture(scope="module")
def server(hosts: Hosts) -> Iterator[None]:
    """On D. It answers P's calls."""
    command = ["ip", "netns", "exec", hosts.d, sys.executable, "-c", SERVE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        yield
        process.kill()


def reaches(hosts: Hosts, link: str) -> bool:
    command = ["ip", "netns", "exec", hosts.p, sys.executable, "-c", CALL, f"{LINKS[link]}.2"]
    return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0


@pytest.mark.parametrize("fault", ["cut", "p is mute", "d is mute"])
def test_one_link_can_be_broken_and_healed(hosts: Hosts, server: None, fault: str) -> None:
    assert reaches(hosts, "data") and reaches(hosts, "control")
    if fault == "cut":
        hosts.cut("data")
    else:
        hosts.mute(hosts.p if fault == "p is mute" else hosts.d, "data")
    assert not reaches(hosts, "data") and reaches(hosts, "control")
    hosts.heal()
    assert reaches(hosts, "data")


def test_a_link_can_be_throttled(hosts: Hosts, server: None) -> None:
    hosts.throttle("1mbit", "data")
    assert "tbf" in shown(hosts, "data") and "tbf" not in shown(hosts, "control")
    hosts.heal()
    assert "tbf" not in shown(hosts, "data")


def shown(hosts: Hosts, link: str) -> str:
    command = ["ip", "netns", "exec", hosts.p, "tc", "qdisc", "show", "dev", link]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout


def test_packets_are_harmed_one_by_one(hosts: Hosts) -> None:
    """What is lost, repeated or swapped TCP puts right; a flipped bit arrives."""
    command = ["ip", "netns", "exec", hosts.d, sys.executable, "-c", RECEIVE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        hosts.harm(flip=0.1, lose=0.01, repeat=0.02, swap=0.02)
        send = ["ip", "netns", "exec", hosts.p, sys.executable, "-c", SEND, f"{LINKS['data']}.2"]
        subprocess.run(send, timeout=60, check=True)
        changed = int(process.stdout.readline())
        harmed = hosts.harm()
    assert min(harmed[what] for what in ("flipped", "lost", "repeated", "swapped")) > 0
    assert 0 < changed <= harmed["flipped"]
