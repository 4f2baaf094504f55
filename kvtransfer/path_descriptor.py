"""What one worker's paths tell a peer's: the descriptor of each transport, the host, and how to know its pattern."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from core.errors import HandoffError
from kvtransfer.host import Host

VERSION = 1
SEED_BYTES = 8
MAX_BYTES = 32 << 10  # control messages are at most 256 KiB
MAX_TRANSPORTS = 8
MAX_NAME_CHARS = 32


@dataclass(frozen=True, slots=True)
class PathDescriptor:
    """As JSON: {"version": 1, "host": {...}, "pages": n, "seed": hex, "transports": {name: base64}}.

    `host` names a device only where the pool is on one: a worker that knows of none understands all others, and hears
    from such a pool that it is another kind of descriptor.
    """

    host: Host
    pages: int  # of the pool: says which frame is the pattern
    seed: bytes  # of what is in it
    transports: Mapping[str, bytes]

    def encode(self) -> bytes:
        """Raises HandoffError when a transport's own descriptor is too large for a message."""
        encoded = {name: base64.b64encode(inner).decode() for name, inner in self.transports.items()}
        host = asdict(self.host)
        if not self.host.device:
            del host["device"]
        fields = {"host": host, "pages": self.pages, "seed": self.seed.hex(), "transports": encoded}
        text = json.dumps({"version": VERSION, **fields}).encode()
        if len(text) > MAX_BYTES:
            raise HandoffError(f"a descriptor of {len(text)} bytes, over {MAX_BYTES}")
        return text

    @classmethod
    def decode(cls, descriptor: bytes) -> PathDescriptor:
        """Raises HandoffError for anything that `encode` has not written."""
        if len(descriptor) > MAX_BYTES:
            raise HandoffError(f"a descriptor of {len(descriptor)} bytes, over {MAX_BYTES}")
        try:
            fields = json.loads(descriptor)
            version = fields.pop("version")
            if version != VERSION:
                raise HandoffError(f"paths of version {version!r}, not {VERSION}: update one of the workers")
            return _checked(**fields)
        except (ValueError, TypeError, KeyError, AttributeError, binascii.Error) as error:
            raise HandoffError(f"not a descriptor of paths: {error!r}") from error


def _checked(host: dict[str, object], pages: int, seed: str, transports: dict[str, str]) -> PathDescriptor:
    """Raises ValueError or TypeError."""
    found = Host(**host)  # type: ignore[arg-type]
    of_host = ((found.device, str), (found.boot_id, str), (found.network, int), (found.uid, int))
    kinds = (*of_host, (pages, int), (seed, str))
    if any(type(value) is not kind for value, kind in kinds) or pages < 1 or len(transports) > MAX_TRANSPORTS:
        raise ValueError("a field of another kind")
    if any(len(name) > MAX_NAME_CHARS for name in transports):
        raise ValueError("the name of a transport")
    drawn = bytes.fromhex(seed)
    if len(drawn) != SEED_BYTES:
        raise ValueError("a seed of another length")
    decoded = {name: base64.b64decode(inner, validate=True) for name, inner in transports.items()}
    return PathDescriptor(found, pages, drawn, decoded)
