"""Whether two workers can share memory: the facts of a host that travel to peers, and what they say together.

Whether two GPUs reach each other, and whether their driver exports memory from one container to another, is not told
beforehand: the proof of a path finds out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # drawn when a machine boots; its containers see the same one
NETWORK = Path("/proc/self/ns/net")


@dataclass(frozen=True, slots=True)
class Host:
    """Where a worker runs and its pages lie, as far as shared memory is concerned."""

    boot_id: str
    network: int  # inode of the network namespace: the sockets that hand pools over live in it
    uid: int
    device: str = ""  # that has the pool: its own name, the same for all processes; empty: it lies in the host's memory


def this_host() -> Host:
    return Host(BOOT_ID.read_text().strip(), NETWORK.stat().st_ino, os.getuid())


def why_no_shared_memory(mine: Host, theirs: Host) -> str:
    """Between two pools in their host's memory. Empty when there is no reason."""
    if mine.device and theirs.device:
        return "both pools lie in a GPU's memory"
    return _one_lies_elsewhere(mine, theirs) or _why_not_one_host(mine, theirs)


def why_no_shared_device(mine: Host, theirs: Host) -> str:
    """Between two pools in memory of GPUs, of one or of two. Empty when there is no reason."""
    if not mine.device and not theirs.device:
        return "no pool lies in a GPU's memory"
    return _one_lies_elsewhere(mine, theirs) or _why_not_one_host(mine, theirs)


def _one_lies_elsewhere(mine: Host, theirs: Host) -> str:
    if bool(mine.device) == bool(theirs.device):
        return ""
    where, other = ("a GPU's memory", "the host's") if mine.device else ("the host's memory", "a GPU's")
    return f"our pages lie in {where}, the peer's in {other}"


def _why_not_one_host(mine: Host, theirs: Host) -> str:
    if mine.boot_id != theirs.boot_id:
        return "the workers are on different machines"
    if mine.network != theirs.network:
        return "the workers are in different network namespaces of one machine"
    if mine.uid != theirs.uid:
        return f"the workers belong to different users ({mine.uid} here, {theirs.uid} there)"
    return ""


def same_machine(mine: Host, theirs: Host) -> bool:
    return mine.boot_id == theirs.boot_id
