"""The chaos proxy does what it says: else what holds under it shows nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from tests.chaos.proxy import ChaosProxy, proxy_to


@pytest.fixture
async def proxy() -> AsyncIterator[ChaosProxy]:
    """Before a server that sends everything back."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(1 << 16):
                writer.write(piece)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with proxy_to("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        yield proxy
    server.close()


class Talk:
    """One connection through the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def echo(self, data: bytes, within_s: float = 10.0) -> bytes:
        self.writer.write(data)
        return await asyncio.wait_for(self.reader.readexactly(len(data)), within_s)


@pytest.fixture
async def talk(proxy: ChaosProxy) -> AsyncIterator[Talk]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    yield Talk(reader, writer)
    writer.close()


async def test_it_forwards(proxy: ChaosProxy, talk: Talk) -> None:
    data = bytes(range(256)) * 1000
    assert await talk.echo(data) == data
    assert proxy.up.forwarded_bytes == proxy.down.forwarded_bytes == len(data)
    assert proxy.connections == 1


async def test_it_delays_and_throttles(proxy: ChaosProxy, talk: Talk) -> None:
    proxy.up.delay_s = 0.2
    began_s = time.monotonic()
    assert await talk.echo(b"x") == b"x"
    assert time.monotonic() - began_s >= 0.2
    proxy.heal()
    proxy.down.bytes_per_s = 100_000
    began_s = time.monotonic()
    await talk.echo(bytes(40_000))
    assert time.monotonic() - began_s >= 0.3


async def test_half_of_it_can_be_gone(proxy: ChaosProxy, talk: Talk) -> None:
    await talk.echo(b"x")
    proxy.down.swallows = True
    with pytest.raises(TimeoutError):
        await talk.echo(b"lost", within_s=0.3)
    assert proxy.down.swallowed_bytes == 4 and proxy.connections == 1
    proxy.heal()
    with pytest.raises(TimeoutError):
        await talk.echo(b"lost too", within_s=0.3)
    assert proxy.down.swallowed_bytes == 12 and proxy.connections == 1
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await Talk(reader, writer).echo(b"found") == b"found"
    writer.close()


async def test_it_stalls_and_goes_on(proxy: ChaosProxy, talk: Talk) -> None:
    await talk.echo(b"x")
    proxy.up.stalls = True
    await talk.echo(b"y")  # it was reading when it was told
    with pytest.raises(TimeoutError):
        await talk.echo(b"z", within_s=0.3)
    proxy.heal()
    assert await asyncio.wait_for(talk.reader.readexactly(1), 10.0) == b"z"


@pytest.mark.parametrize("reset", [False, True])
async def test_it_cuts_and_takes_new_connections(proxy: ChaosProxy, talk: Talk, reset: bool) -> None:
    await talk.echo(b"x")
    await proxy.cut(reset=reset)
    if reset:
        with pytest.raises(ConnectionResetError):
            await talk.reader.read(1)
    else:
        assert await talk.reader.read(1) == b""
    assert proxy.connections == 0
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await Talk(reader, writer).echo(b"again") == b"again"
    writer.close()


async def test_it_refuses(proxy: ChaosProxy) -> None:
    proxy.refuses = True
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(1), 10.0)
    writer.close()


async def test_it_flips_bits(proxy: ChaosProxy, talk: Talk) -> None:
    proxy.up.flip_share = 1.0
    data = bytes(1000)
    changed = await talk.echo(data)
    assert sum(byte.bit_count() for byte in changed) == proxy.up.flipped > 0
