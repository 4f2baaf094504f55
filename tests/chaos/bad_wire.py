"""A wire between two network namespaces that harms packets, as a program: what netem does, where there is none. Root.

Each end is a TUN device of the name that is given. Bits are flipped in the bytes of pages only, behind the checksum of
TCP, which is put right: such errors get through real networks, from memory of routers and adapters. Where the bytes of
pages are is known by their looks: they are as good as random, and UCX's headers are full of zeros. The control channel
has a port of its own, which is spared. Each line in: a JSON object of settings; each answer: one of counts.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import struct
import sys
from collections import Counter
from dataclasses import dataclass
from random import Random

TUNSETIFF = 0x400454CA
IFF_TUN_NO_PI = 0x1001
CLONE_NEWNET = 0x40000000
MOST_BYTES = 1 << 16
TCP = 6
AROUND = 128  # bytes that must look random for the one in their middle to be flipped
ZEROS = 4  # of so many, at most: random bytes have half a zero among them


@dataclass
class Harm:
    """Shares of the packets."""

    flip: float = 0.0
    lose: float = 0.0
    repeat: float = 0.0
    swap: float = 0.0  # held back until after the next one
    spared_port: int = 0


def open_end(namespace: str, device: str) -> int:
    """The wire's end of a new device in the namespace, which is ours from now on."""
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(there, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns to {namespace}")
    os.close(there)
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN_NO_PI))
    return end


class Wire:
    def __init__(self, random: Random) -> None:
        self.harm = Harm()
        self.counts: Counter[str] = Counter()
        self._random = random
        self._held: bytes | None = None

    def carry(self, packet: bytes) -> list[bytes]:
        """What comes out at the other end, and in which order."""
        harm, chance = self.harm, self._random.random
        if chance() < harm.lose:
            self.counts["lost"] += 1
            return []
        if chance() < harm.flip:
            packet = self._flipped(packet)
        out = [packet]
        if chance() < harm.repeat:
            self.counts["repeated"] += 1
            out.append(packet)
        if self._held is not None:
            out.append(self._held)
            self._held = None
        elif chance() < harm.swap:
            self.counts["swapped"] += 1
            self._held = out.pop(0)
        return out

    def _flipped(self, packet: bytes) -> bytes:
        """One bit of a page's bytes, if there are any."""
        at_tcp = (packet[0] & 15) * 4
        if packet[0] >> 4 != 4 or packet[9] != TCP:
            return packet
        ports = struct.unpack_from("!HH", packet, at_tcp)
        start = at_tcp + (packet[at_tcp + 12] >> 4) * 4
        if self.harm.spared_port in ports or len(packet) - start < 2 * AROUND:
            return packet
        at = self._random.randrange(start + AROUND // 2, len(packet) - AROUND // 2)
        if packet[at - AROUND // 2 : at + AROUND // 2].count(0) > ZEROS:
            return packet
        changed = bytearray(packet)
        changed[at] ^= 1 << self._random.randrange(8)
        _put_checksum(changed, at_tcp)
        self.counts["flipped"] += 1
        return bytes(changed)


def _put_checksum(packet: bytearray, at_tcp: int) -> None:
    """TCP's own, over its pseudo-header: the receiving host takes the packet for good."""
    packet[at_tcp + 16 : at_tcp + 18] = b"\0\0"
    segment = bytes(packet[at_tcp:])
    whole = bytes(packet[12:20]) + struct.pack("!BBH", 0, TCP, len(segment)) + segment + b"\0" * (len(segment) % 2)
    total = sum(struct.unpack(f"!{len(whole) // 2}H", whole))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    struct.pack_into("!H", packet, at_tcp + 16, ~total & 0xFFFF)


def forward(wires: dict[int, tuple[int, Wire]]) -> None:
    """Until standard input ends. `wires`: of each end, the other one and what happens on the way to it."""
    poll = select.poll()
    for end in wires:
        poll.register(end, select.POLLIN)
    poll.register(0, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == 0:
                line = sys.stdin.readline()
                if not line:
                    return
                _obey(line, [wire for _, wire in wires.values()])
                continue
            other, wire = wires[fd]
            for packet in wire.carry(os.read(fd, MOST_BYTES)):
                try:
                    os.write(other, packet)
                except OSError:
                    wire.counts["refused"] += 1  # that end is down


def _obey(line: str, wires: list[Wire]) -> None:
    settings = json.loads(line)
    for wire in wires:
        wire.harm = Harm(**settings)
    print(json.dumps(sum((wire.counts for wire in wires), Counter())), flush=True)


def main() -> None:
    _, one, other, device = sys.argv
    ends = [open_end(one, device), open_end(other, device)]
    print("{}", flush=True)
    forward({ends[0]: (ends[1], Wire(Random(1))), ends[1]: (ends[0], Wire(Random(2)))})


if __name__ == "__main__":
    main()
