"""Two hosts on one machine: network namespaces joined by two links, each of which can be cut, throttled or half dead.

    namespace P == bad_wire.py == data: 10.231.1.0/24 (gRPC of hand-offs, UCX) == bad_wire.py == namespace D
                ----- control: 10.231.2.0/24 (the router's sessions) -----
    and from D and from P to the test itself: 10.231.3.0/24 and 10.231.4.0/24, which are never touched.

Packets on the data link go through a program that can harm them, one by one. The names of the links are the same on
both sides, so that one setting names a device for both. Needs root.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TIMEOUT_S = 20.0
MTU_BYTES = 9000
WIRE = Path(__file__).with_name("bad_wire.py")
LINKS = {"data": "10.231.1", "control": "10.231.2"}
P_END, D_END = ".1", ".2"
TEST_ADDRESS, ROUTER_ADDRESS = "10.231.3.1", "10.231.3.2"
TEST_ADDRESS_P, ROUTER_ADDRESS_P = "10.231.4.1", "10.231.4.2"


class Hosts:
    """The namespaces, and what can happen to the links between them."""

    def __init__(self) -> None:
        mark = os.getpid() % 10_000
        self.p, self.d = f"bt-p-{mark}", f"bt-d-{mark}"
        self._to_test = {self.d: f"bt-{mark}", self.p: f"bu-{mark}"}
        self._wire: subprocess.Popen[str] | None = None

    def make(self) -> None:
        """Raises OSError where it is not permitted."""
        for name in (self.p, self.d):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        veth = ("type", "veth", "peer", "name", "control", "netns", self.d)
        run("ip", "link", "add", "control", "netns", self.p, *veth)
        self._make_wire()
        for link, net in LINKS.items():
            self._address(self.p, link, net + P_END)
            self._address(self.d, link, net + D_END)
        self._make_test_link(self.d, TEST_ADDRESS, ROUTER_ADDRESS)
        self._make_test_link(self.p, TEST_ADDRESS_P, ROUTER_ADDRESS_P)

    def _make_test_link(self, host: str, ours: str, theirs: str) -> None:
        device = self._to_test[host]
        run("ip", "link", "add", device, "type", "veth", "peer", "name", "test", "netns", host)
        run("ip", "addr", "add", f"{ours}/24", "dev", device)
        run("ip", "link", "set", device, "up")
        self._address(host, "test", theirs)

    def _make_wire(self) -> None:
        command = [sys.executable, str(WIRE), self.p, self.d, "data"]
        pipe = subprocess.PIPE
        self._wire = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert self._wire.stdout is not None and self._wire.stderr is not None
        if not self._wire.stdout.readline():
            raise OSError(self._wire.stderr.read())
        for name in (self.p, self.d):
            run("ip", "-n", name, "link", "set", "data", "mtu", str(MTU_BYTES))

    def _address(self, name: str, device: str, address: str) -> None:
        run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", device)
        run("ip", "-n", name, "link", "set", device, "up")

    def remove(self) -> None:
        """Whatever has been made. The links go with the namespaces."""
        if self._wire is not None:
            self._wire.kill()
            self._wire.communicate(timeout=TIMEOUT_S)
        for name in (self.p, self.d):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=TIMEOUT_S, check=False)
        for device in self._to_test.values():
            subprocess.run(["ip", "link", "del", device], capture_output=True, timeout=TIMEOUT_S, check=False)

    # --- faults ------------------------------------------------------------------------------------------------

    def cut(self, *links: str) -> None:
        """At P's end: D's own address stays, so that what lives on D alone goes on."""
        for link in links:
            run("ip", "-n", self.p, "link", "set", link, "down")

    def mute(self, host: str, *links: str) -> None:
        """What this host sends to the other on these links vanishes; the other way goes on."""
        other = D_END if host == self.p else P_END
        for link in links:
            run("ip", "-n", host, "route", "add", "blackhole", f"{LINKS[link]}{other}/32")

    def throttle(self, rate: str, *links: str) -> None:
        """Both ways, by a token bucket. `rate` as tc writes it."""
        for link in links:
            for host in (self.p, self.d):
                bucket = ("tbf", "rate", rate, "burst", "32kb", "latency", "100ms")
                run("ip", "netns", "exec", host, "tc", "qdisc", "add", "dev", link, "root", *bucket)

    def harm(self, **settings: float) -> dict[str, int]:
        """What the wire does from now on (see bad_wire.Harm). Returns its counts of harmed packets so far."""
        assert self._wire is not None and self._wire.stdin is not None and self._wire.stdout is not None
        self._wire.stdin.write(json.dumps(settings) + "\n")
        self._wire.stdin.flush()
        counts: dict[str, int] = json.loads(self._wire.stdout.readline())
        return counts

    def heal(self) -> None:
        """Every link as it was at first."""
        self.harm()
        for link, net in LINKS.items():
            run("ip", "-n", self.p, "link", "set", link, "up")
            for host, other in ((self.p, D_END), (self.d, P_END)):
                quietly("ip", "-n", host, "route", "del", "blackhole", f"{net}{other}/32")
                quietly("ip", "netns", "exec", host, "tc", "qdisc", "del", "dev", link, "root")


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def quietly(*command: str) -> None:
    """There may be nothing to take back."""
    subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Skips the test where namespaces cannot be made."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        pytest.skip("network namespaces need root, ip and tc")
    hosts = Hosts()
    try:
        try:
            hosts.make()
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield hosts
    finally:
        hosts.remove()
