"""Where one server-sent event ends and the next begins, in bytes as they arrive."""

from __future__ import annotations

DONE = b"[DONE]"


class EventReader:
    """Takes the bytes of a stream in any pieces, and gives the data of each event when it is complete."""

    def __init__(self) -> None:
        self._rest = b""  # the start of an event that is not complete yet

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that end in these bytes; comments and events without data give none."""
        whole, border, rest = (self._rest + data).replace(b"\r\n", b"\n").rpartition(b"\n\n")
        if not border:
            self._rest = rest
            return []
        self._rest = rest
        return [event for block in whole.split(b"\n\n") if (event := _data_of(block))]


def _data_of(block: bytes) -> bytes:
    """The data lines of one event, joined."""
    lines = [line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)
