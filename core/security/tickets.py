"""The router's written permission for one attempt: who may hand which prompt's pages to whom.

    version 1 | purpose 1 | attempt 4 | tokens 4 | lifetime 4 (ms) | prefix 32 | tenant | request | source? | receiver
    | HMAC-SHA256 32

Numbers are little-endian; a text has its length before it in one byte; a worker is name, incarnation, endpoint. The
code covers every byte before it and is looked at first, so that nothing a stranger wrote is ever parsed.

A ticket names incarnations: one that was made for a worker is worth nothing to its successor. Its lifetime counts from
when a worker first sees it, since clocks of machines are never compared.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import math
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields

from core.errors import BadTicket
from core.messages import Peer, WorkerId

VERSION = 1
MAX_BYTES = 2048
MAC_BYTES = 32
PREFIX_BYTES = 32
MAX_SHOWN_CHARS = 160
_LABEL = b"baton ticket\0"  # the key signs nothing else that begins like this
_HEAD = struct.Struct(f"<BBIII{PREFIX_BYTES}s")
_NUMBER = struct.Struct("<Q")
PROBE_LIFETIME_S = 60.0
_LOOSE = ("tenant", "lifetime_s")  # what a worker does not know for itself


class Purpose(enum.Enum):
    """What the pages move for."""

    HANDOFF = 1  # the whole prompt, from the prefill worker to the decode worker; or nothing moves: a local prefill
    LEND = 2  # the prompt's beginning, from a worker that has it cached to the one that computes the rest
    PROBE = 3  # a test page alone, to prove the path


@dataclass(frozen=True, slots=True)
class Claims:
    """What a ticket says. Router and worker make it each from what they know, and it must come out the same."""

    purpose: Purpose
    request_id: str
    attempt: int
    source: Peer | None  # whose pages move; None: the receiver computes them itself
    receiver: Peer
    prefix: bytes  # prefix_hash of the token ids that it is about
    tokens: int  # how many they are
    lifetime_s: float  # a duration
    tenant: str = ""


def prefix_hash(prompt_ids: Sequence[int], salt: bytes) -> bytes:
    """Names token ids under a tenant's salt."""
    h = hashlib.sha256(len(salt).to_bytes(4, "little") + salt)
    h.update(array("I", prompt_ids))
    return h.digest()


def probe_claims(source: Peer, receiver: Peer, nonce: str = "") -> Claims:
    """For the receiver to reach this source and fetch its test page. `nonce`: since each ticket is good once."""
    prefix = bytes(PREFIX_BYTES)
    return Claims(Purpose.PROBE, "probe", 1, source, receiver, prefix, 0, PROBE_LIFETIME_S, tenant=nonce)


class Tickets:
    """Signs and reads tickets under shared keys: the first signs, any is accepted."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        assert keys, "without a key there are no tickets"
        self._keys = tuple(keys)

    def sign(self, claims: Claims) -> bytes:
        """Raises BadTicket for what no ticket can hold: a text or a number that is too long."""
        try:
            body = _encode(claims)
        except (struct.error, OverflowError, ValueError) as error:
            raise BadTicket(f"no ticket can say this: {error}") from None
        return body + _mac(self._keys[0], body)

    def open(self, ticket: bytes) -> Claims:
        """What it says. Raises BadTicket unless one of our keys has signed every byte of it."""
        if not ticket:
            raise BadTicket("no ticket")
        if not _HEAD.size + MAC_BYTES <= len(ticket) <= MAX_BYTES:
            raise BadTicket(f"{len(ticket)} bytes are no ticket")
        body, mac = ticket[:-MAC_BYTES], ticket[-MAC_BYTES:]
        good = [hmac.compare_digest(mac, _mac(key, body)) for key in self._keys]  # every key, whichever it is
        if not any(good):
            raise BadTicket("a ticket that none of our keys has signed: routers and workers need the same key file")
        return _decode(body)

    def check(self, ticket: bytes, expected: Claims) -> Claims:
        """What it says, when it is a ticket for exactly this; its tenant and lifetime are its own.

        `expected.lifetime_s` is how long it will be used: no longer than the ticket allows. Raises BadTicket, naming
        what differs.
        """
        claims = self.open(ticket)
        wrong = [
            _difference(field.name, expected, claims)
            for field in fields(Claims)
            if field.name not in _LOOSE and getattr(expected, field.name) != getattr(claims, field.name)
        ]
        if not expected.lifetime_s <= claims.lifetime_s:  # also when it is no number
            wrong.append(_difference("lifetime_s", expected, claims))
        if wrong:
            raise BadTicket("a ticket for something else; " + "; ".join(wrong))
        return claims


def _difference(name: str, expected: Claims, claims: Claims) -> str:
    here, there = (str(getattr(side, name))[:MAX_SHOWN_CHARS] for side in (expected, claims))
    return f"{name}: {here} here, {there} in the ticket"


def _mac(key: bytes, body: bytes) -> bytes:
    return hmac.digest(key, _LABEL + body, "sha256")


def _encode(claims: Claims) -> bytes:
    lifetime_ms = max(0, math.floor(claims.lifetime_s * 1000) + 1)  # more, so that rounding refuses nobody
    if len(claims.prefix) != PREFIX_BYTES:
        raise struct.error(f"a prefix hash of {len(claims.prefix)} bytes")
    head = _HEAD.pack(VERSION, claims.purpose.value, claims.attempt, claims.tokens, lifetime_ms, claims.prefix)
    source = b"\0" if claims.source is None else b"\1" + _encode_peer(claims.source)
    return head + _text(claims.tenant) + _text(claims.request_id) + source + _encode_peer(claims.receiver)


def _encode_peer(peer: Peer) -> bytes:
    return _text(peer.worker.name) + _NUMBER.pack(peer.worker.incarnation) + _text(peer.endpoint)


def _text(value: str) -> bytes:
    """Raises OverflowError when it is too long."""
    encoded = value.encode()
    return len(encoded).to_bytes(1, "little") + encoded


def _decode(body: bytes) -> Claims:
    """Raises BadTicket for what a later version has signed."""
    version, purpose, attempt, tokens, lifetime_ms, prefix = _HEAD.unpack_from(body)
    if version != VERSION:
        raise BadTicket(f"a ticket of version {version}, not {VERSION}: update router or worker")
    reader = _Reader(body, _HEAD.size)
    try:
        tenant, request_id = reader.text(), reader.text()
        source = reader.peer() if reader.flag() else None
        receiver = reader.peer()
        meant = Purpose(purpose)
    except (ValueError, struct.error):
        raise BadTicket("a ticket that is signed, and cannot be read") from None
    if not reader.at_end:
        raise BadTicket("a ticket with more in it than this version knows")
    lifetime_s = lifetime_ms / 1000
    return Claims(meant, request_id, attempt, source, receiver, prefix, tokens, lifetime_s, tenant)


class _Reader:
    """Takes a body apart. Raises ValueError at its end."""

    def __init__(self, body: bytes, at: int) -> None:
        self._body = body
        self._at = at

    @property
    def at_end(self) -> bool:
        return self._at == len(self._body)

    def take(self, size: int) -> bytes:
        part = self._body[self._at : self._at + size]
        if len(part) != size:
            raise ValueError("it ends too early")
        self._at += size
        return part

    def flag(self) -> bool:
        """One byte, 0 or 1."""
        return (b"\0", b"\1").index(self.take(1)) == 1

    def text(self) -> str:
        return self.take(self.take(1)[0]).decode()

    def peer(self) -> Peer:
        name = self.text()
        (incarnation,) = _NUMBER.unpack(self.take(_NUMBER.size))
        return Peer(WorkerId(name, incarnation), self.text())
