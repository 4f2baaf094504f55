"""What two ucx transports say to each other: the descriptor, asking for pages, and what became of each.

Fixed structures in network order, checked for length; whatever is not exactly one of them is a HandoffError.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import HandoffError

MAGIC, VERSION = b"BUCX", 1
MAX_DESCRIPTOR_BYTES = 4096
MAX_ENTRIES = 32  # of one message
DESCRIPTOR = struct.Struct("!4sHHQQQQ")  # magic, version, address bytes, nonce, control tag, pages, page bytes
HEADER = struct.Struct("!4sHHQQ")  # magic, kind, entries, the sender's nonce, stream
ASK = struct.Struct("!QqQ")  # tag, source page, epoch
VERDICT = struct.Struct("!QHxxxxxxQ")  # tag, what, the epoch found or the size of the pool
ASKS, VERDICTS = 1, 2  # kinds
MAX_MESSAGE_BYTES = HEADER.size + MAX_ENTRIES * max(ASK.size, VERDICT.size)

SENT, OUT_OF_BOUNDS, STALE, FAILED = range(4)  # verdicts


@dataclass(frozen=True, slots=True)
class Descriptor:
    """How one peer reaches one worker of ours. `control_tag` and `nonce` are random and known to that peer alone."""

    address: bytes
    nonce: int
    control_tag: int
    pages: int
    page_bytes: int

    def encode(self) -> bytes:
        head = (MAGIC, VERSION, len(self.address), self.nonce, self.control_tag, self.pages, self.page_bytes)
        return DESCRIPTOR.pack(*head) + self.address

    @classmethod
    def decode(cls, descriptor: bytes) -> Descriptor:
        """Raises HandoffError for anything that `encode` has not written."""
        if not DESCRIPTOR.size < len(descriptor) <= MAX_DESCRIPTOR_BYTES:
            raise HandoffError(f"not a descriptor of a ucx transport: {len(descriptor)} bytes")
        magic, version, size, nonce, tag, pages, page_bytes = DESCRIPTOR.unpack_from(descriptor)
        address = descriptor[DESCRIPTOR.size :]
        if (magic, version, size) != (MAGIC, VERSION, len(address)) or not pages or not page_bytes:
            raise HandoffError("a descriptor of another version of the ucx transport, or broken")
        return cls(address, nonce, tag, pages, page_bytes)


@dataclass(frozen=True, slots=True)
class Ask:
    """Send this page under this tag, if it still has this epoch."""

    tag: int
    page: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """`what` became of a page that was asked for. Said once for each, after the send when there was one."""

    tag: int
    what: int
    found: int


@dataclass(frozen=True, slots=True)
class Control:
    """One message. `nonce` says which worker of the peer's sent it."""

    nonce: int
    stream: int
    asks: tuple[Ask, ...] = ()
    verdicts: tuple[Verdict, ...] = ()


def encode_asks(nonce: int, stream: int, asks: Sequence[Ask]) -> bytes:
    head = HEADER.pack(MAGIC, ASKS, len(asks), nonce, stream)
    return head + b"".join([ASK.pack(ask.tag, ask.page, ask.epoch) for ask in asks])


def encode_verdicts(nonce: int, verdicts: Sequence[Verdict]) -> bytes:
    head = HEADER.pack(MAGIC, VERDICTS, len(verdicts), nonce, 0)
    return head + b"".join([VERDICT.pack(verdict.tag, verdict.what, verdict.found) for verdict in verdicts])


def decode(message: bytes | memoryview) -> Control:
    """Raises HandoffError for anything that the two above have not written."""
    if len(message) < HEADER.size:
        raise HandoffError("a message without a header")
    magic, kind, count, nonce, stream = HEADER.unpack_from(message)
    entry = {ASKS: ASK, VERDICTS: VERDICT}.get(kind)
    if magic != MAGIC or entry is None or not 0 < count <= MAX_ENTRIES:
        raise HandoffError(f"a message of an unknown kind: {kind}, {count} entries")
    rest = message[HEADER.size :]
    if len(rest) != count * entry.size:
        raise HandoffError(f"{len(rest)} bytes for {count} entries")
    if kind == ASKS:
        return Control(nonce, stream, asks=tuple(Ask(*fields) for fields in ASK.iter_unpack(rest)))
    return Control(nonce, stream, verdicts=tuple(Verdict(*fields) for fields in VERDICT.iter_unpack(rest)))
