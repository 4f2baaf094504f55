"""Whether two workers can share memory: the facts of a host that travel to peers, and what they say together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # drawn when a machine boots; its containers see the same one
NETWORK = Path("/proc/self/ns/net")


@dataclass(frozen=True, slots=True)
class Host:
    """Where a worker runs, as far as shared memory is concerned."""

    boot_id: str
    network: int  # inode of the network namespace: the sockets that hand pools over live in it
    uid: int


def this_host() -> Host:
    return Host(BOOT_ID.read_text().strip(), NETWORK.stat().st_ino, os.getuid())


def why_no_shared_memory(mine: Host, theirs: Host) -> str:
    """Empty when there is no reason."""
    if mine.boot_id != theirs.boot_id:
        return "the workers are on different machines"
    if mine.network != theirs.network:
        return "the workers are in different network namespaces of one machine"
    if mine.uid != theirs.uid:
        return f"the workers belong to different users ({mine.uid} here, {theirs.uid} there)"
    return ""


def same_machine(mine: Host, theirs: Host) -> bool:
    return mine.boot_id == theirs.boot_id
