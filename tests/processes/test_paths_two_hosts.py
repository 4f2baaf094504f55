"""The choice of a path between two network namespaces of one machine, and what the doctor says of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import pytest

from tests.chaos.netns import D_END, LINKS, P_END, ROUTER_ADDRESS, Hosts, two_hosts
from tests.chaos.parts import Parts, router, running, worker
from tests.processes.test_paths import doctor, said

PORT, ROUTER_PORT = 7001, 8000
DATA_P, DATA_D = (f"{LINKS['data']}{end}:{PORT}" for end in (P_END, D_END))
CHOICES = {  # flags of both workers: what the doctor exits with, and what it finds wrong
    "auto": ((), 1, "shm cannot be used: the workers are in different network namespaces of one machine"),
    "as expected": (("--expect-transport", "ucx:tcp", "--on-fallback", "error"), 0, ""),
}


def cluster(hosts: Hosts, flags: Sequence[str]) -> AbstractContextManager[Parts]:
    """P on one host, D and the router on the other."""
    flags = ("--ucx-net-devices", "data", *flags)
    on_p, on_d = (("ip", "netns", "exec", host) for host in (hosts.p, hosts.d))
    parts = [
        worker("prefill-0", "prefill", DATA_P, *flags, prefix=on_p),
        worker("decode-0", "decode", DATA_D, *flags, prefix=on_d),
        router({"prefill-0": DATA_P, "decode-0": DATA_D}, ROUTER_ADDRESS, ROUTER_PORT, prefix=on_d),
    ]
    return running(Parts(f"http://{ROUTER_ADDRESS}:{ROUTER_PORT}", parts), workers=2)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("choice", CHOICES)
def test_workers_of_two_namespaces_use_ucx_and_the_doctor_says_what_that_costs(choice: str) -> None:
    flags, code, words = CHOICES[choice]
    with two_hosts() as hosts, cluster(hosts, flags) as running_cluster:
        assert said(running_cluster.url)
        exit_code, found = doctor("--url", running_cluster.url)
        assert exit_code == code, found
        assert [pair["transport"] for pair in found["pairs"]] == ["ucx", "ucx"]
        assert all("tcp/data" in pair["lanes"] for pair in found["pairs"])
        wrong = [finding["what"] for finding in found["findings"] if finding["wrong"]]
        assert (words in wrong[0]) if words else not wrong
