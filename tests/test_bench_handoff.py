"""What the bench of hand-offs reads from a stream, and what it says of the targets."""

import http.client
import io
import socket

import pytest

from bench.handoff import Timed, median_of, read_stream, report, timed

MOVED = b'{"overlap":0.875,"exposed_transfer_s":0.002,"transfer_s":0.01,"transferred_bytes":64}'
USAGE = b'{"prompt_tokens":9,"handoff":' + MOVED + b"}"
STREAM = (
    b'data: {"choices":[{"text":"a"}],"usage":null}\n\ndata: {"choices":[{"text":""}],"usage":null}\n\n'
    b'data: {"choices":[],"usage":' + USAGE + b"}\n\ndata: [DONE]\n\n"
)


def reply_of(body: bytes) -> http.client.HTTPResponse:
    class Wire(socket.socket):
        def makefile(self, *_: object, **__: object) -> io.BytesIO:  # type: ignore[override]
            return io.BytesIO(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)

    with Wire() as wire:
        reply = http.client.HTTPResponse(wire)
    reply.begin()
    return reply


def test_a_stream_gives_the_times_of_tokens_and_the_receipt() -> None:
    times_s, usage = read_stream(reply_of(STREAM), 0.0)
    assert len(times_s) == 2 and times_s[0] <= times_s[1]
    assert timed([0.5, 0.6], usage) == Timed(0.5, 0.6, 0.875, 0.002, 0.01, 64)
    assert timed([0.5, 0.6], {"prompt_tokens": 9}) == Timed(0.5, 0.6), "nothing was moved"


def test_an_error_in_the_stream_is_raised() -> None:
    with pytest.raises(RuntimeError, match="no room"):
        read_stream(reply_of(b'data: {"error":{"message":"no room"}}\n\n'), 0.0)


def test_the_targets() -> None:
    together, good = Timed(1.0, 1.1), Timed(1.05, 1.2, hidden=0.875)
    assert report(good, together).count(": met") == 2
    bad = Timed(1.06, 1.2, hidden=0.7)
    assert report(bad, together).count(": missed") == 2
    assert median_of([good, bad, bad]) == bad
