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
