"""Hand-offs over real gRPC on loopback: coding, resumption, refusals, incarnations."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import fields, replace
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest
from kvtransfer_pair import LAYOUT, PRINT, ROOT, XXH3, Receiving, Sending, content, prompt_of

from core.clock import monotonic_s
from core.errors import FingerprintMismatch, PeerLost
from core.layout import PageLayout
from core.messages import FinishReason, Peer, Receipt, Token, WorkerId
from kvtransfer import client, server
from kvtransfer import messages as m
from kvtransfer.fingerprint import Fingerprint
from kvtransfer.frames import Frames
from kvtransfer.liveness import LeaseTerms, Timing
from kvtransfer.memory import MemoryFabric, MemoryTransport
from kvtransfer.places import tail_hash
from kvtransfer.source_link import READY_BYTES, pages_per_ready
from kvtransfer.states import State
from wire import handoff_pb2 as pb
from wire import handoff_pb2_grpc

KEY = m.HandoffKey("r", 3)
ENTRY = m.PageEntry(5, b"h" * 16, 17, 2**40, b"d" * 16)
TOKENS = (
    Token(0, 4, 99, -0.25, ((99, -0.25), (1, -2.5)), FinishReason.STOP),
    Token(1, 4, 98, None, (), FinishReason.LENGTH),
    Token(2, 4, 97),
)
RECEIPT = Receipt(1, 2, 3, 4, 5, 0.5, 0.25, 6, 7, 0.75)
TO_RECEIVER: list[m.ToReceiver] = [
    m.Next(KEY, 1, 100, 4, b"ticket"),
    m.Ready(KEY, 2, (ENTRY, replace(ENTRY, position=6))),
    m.Sealed(KEY, 3, 6, ENTRY, 4, TOKENS, RECEIPT),
    m.Sealed(KEY, 3, 6, None, 0, (), Receipt()),
    m.Failed(KEY, 4, "engine_error", "it broke"),
    m.Renew(7),
    m.Drained(KEY, 0),
]
TO_SOURCE: list[m.ToSource] = [
    m.Grant(KEY, 1, 3),
    m.Busy(KEY, 1, 0.25),
    m.Fetch(KEY, 9, 12, 3),
    m.Refused(KEY, 2, 12, "digest_mismatch", "page 3"),
    m.Renew(7),
    m.Close(KEY, 3, 12, State.COMMITTED),
    m.Close(KEY, 3, 12, State.ABORTED, "cancelled", "the client left"),
]


@pytest.mark.parametrize("message", TO_RECEIVER, ids=lambda message: type(message).__name__)
def test_what_a_source_says_arrives_as_it_was(message: m.ToReceiver) -> None:
    assert server.decode(pb.ToReceiver.FromString(client.encode(message).SerializeToString())) == message


@pytest.mark.parametrize("message", TO_SOURCE, ids=lambda message: type(message).__name__)
def test_what_a_receiver_says_arrives_as_it_was(message: m.ToSource) -> None:
    assert client.decode(pb.ToSource.FromString(server.encode(message).SerializeToString())) == message


def test_the_receipt_has_every_field_on_the_wire() -> None:
    assert {field.name for field in fields(Receipt)} == {field.name for field in pb.Receipt.DESCRIPTOR.fields}


def test_a_message_of_a_later_version_ends_the_session() -> None:
    with pytest.raises(PeerLost):
        server.decode(pb.ToReceiver())
    with pytest.raises(PeerLost):
        client.decode(pb.ToSource(close=pb.Close(outcome=9)))  # type: ignore[arg-type]
    with pytest.raises(PeerLost):
        server.decode(pb.ToReceiver(sealed=pb.Sealed(tokens=[pb.Token(finish=9)])))  # type: ignore[arg-type]


QUICK = Timing(lease=LeaseTerms(lost_s=1.0, connect_s=1.0, tick_s=0.05))


class Host:
    """A decode worker with its gRPC server on a loopback port."""

    def __init__(self, worker: WorkerId, fabric: MemoryFabric, fingerprint: Fingerprint = PRINT) -> None:
        transport = MemoryTransport(worker, fabric)
        self.frames = Frames.anonymous(LAYOUT, 65)
        self.worker = Receiving(worker, self.frames, transport, monotonic_s, timing=QUICK, fingerprint=fingerprint)
        self.endpoint = ""
        self.server: grpc.aio.Server | None = None

    async def listen(self, port: int = 0) -> int:
        await self.worker.transport.serve(self.frames, XXH3)
        self.server = grpc.aio.server(options=server.KEEPALIVE)
        self.worker.link.start(server.add_handoff_service(self.server, self.worker.link))
        port = self.server.add_insecure_port(f"127.0.0.1:{port}")
        await self.server.start()
        self.endpoint = f"127.0.0.1:{port}"
        return port

    @property
    def peer(self) -> Peer:
        return Peer(self.worker.me, self.endpoint)

    async def close(self) -> None:
        assert self.server is not None
        await self.server.stop(0.0)
        await self.worker.link.stop()
        await self.worker.transport.close()


class Caller:
    """A prefill worker with its gRPC client."""

    def __init__(self, worker: WorkerId, fabric: MemoryFabric) -> None:
        frames = Frames.anonymous(LAYOUT, 65)
        transport = MemoryTransport(worker, fabric)
        fabric.join(worker, frames, XXH3)
        self.worker = Sending(worker, frames, transport, monotonic_s, Random(1), timing=QUICK)
        self.dialer = client.HandoffDialer(self.worker.link, Random(2))
        self.worker.link.start(self.dialer)

    @property
    def peer(self) -> Peer:
        return Peer(self.worker.me, "")

    async def close(self) -> None:
        await self.dialer.close()
        await self.worker.link.stop()
        await self.worker.transport.close()


@pytest.fixture
def fabric() -> MemoryFabric:
    return MemoryFabric(Random(0))


@pytest.fixture
async def host(fabric: MemoryFabric) -> AsyncIterator[Host]:
    host = Host(WorkerId("d", 1), fabric)
    await host.listen()
    yield host
    await host.close()


@pytest.fixture
async def caller(fabric: MemoryFabric) -> AsyncIterator[Caller]:
    caller = Caller(WorkerId("p", 1), fabric)
    yield caller
    await caller.close()


async def idle(*links: Any) -> None:
    async with asyncio.timeout(10.0):
        while not all(link.idle for link in links):
            await asyncio.sleep(0.01)


async def hand_over(caller: Caller, host: Host, key: m.HandoffKey, tokens: int) -> None:
    prompt = prompt_of(Random(tokens), tokens)
    host.worker.expect(key, prompt, caller.peer)
    await caller.worker.prefill(key, prompt, host.peer)
    await host.worker.until_ended(key, 10.0)
    host.worker.drop(key)


async def test_many_hand_offs_share_one_session(caller: Caller, host: Host) -> None:
    keys = [m.HandoffKey(f"r{n}", 1) for n in range(20)]
    await asyncio.gather(*(hand_over(caller, host, key, 20 + 3 * n) for n, key in enumerate(keys)))
    assert sorted(host.worker.commits) == sorted(keys) and not host.worker.wrong
    await idle(caller.worker.link, host.worker.link)
    assert {outcome for outcome, _ in caller.worker.closed.values()} == {State.COMMITTED}
    for pool in (caller.worker.pool, host.worker.pool):
        pool.check()
        assert pool.counts()["owned"] == pool.counts()["leased"] == pool.counts()["quarantined"] == 0


async def test_a_receiver_that_comes_back_finds_the_hand_off_where_it_was(caller: Caller, host: Host) -> None:
    prompt = prompt_of(Random(1), 100)
    key = m.HandoffKey("r", 1)
    host.worker.expect(key, prompt, caller.peer)
    prefill = asyncio.create_task(caller.worker.prefill(key, prompt, host.peer, chunk_pages=1, chunk_s=0.05))
    await asyncio.sleep(0.1)
    line = next(iter(caller.dialer._lines.values()))
    line.end()  # the connection breaks, for both
    await prefill
    await host.worker.until_ended(key, 10.0)
    assert host.worker.commits == [key] and not host.worker.wrong


async def test_a_receiver_that_is_not_there_is_lost_in_time(caller: Caller) -> None:
    nobody = Peer(WorkerId("d", 1), "127.0.0.1:9")
    with pytest.raises(PeerLost):
        await caller.worker.prefill(m.HandoffKey("r", 1), prompt_of(Random(1), 40), nobody)


async def test_another_incarnation_does_not_answer(caller: Caller, host: Host) -> None:
    stranger = Peer(WorkerId("d", 2), host.endpoint)
    with pytest.raises(PeerLost):
        await caller.worker.prefill(m.HandoffKey("r", 1), prompt_of(Random(1), 40), stranger)
    await hand_over(caller, host, m.HandoffKey("s", 1), 40)  # and the right one does


async def test_workers_of_two_models_part_at_once_and_say_why(caller: Caller, fabric: MemoryFabric) -> None:
    layout = PageLayout(kv_heads=4, layers=1, page_size=16, head_dim=2, dtype="uint8")
    other = Host(WorkerId("d", 1), fabric, Fingerprint("another", layout, PRINT.digest))
    await other.listen()
    differences = "identity: 'another' here, 'model' there.*kv_heads: 4 here, 2 there"
    with pytest.raises(FingerprintMismatch, match=differences):
        await caller.worker.prefill(m.HandoffKey("r", 1), prompt_of(Random(1), 40), other.peer)
    await other.close()


async def test_a_new_source_of_the_same_name_ends_what_the_old_one_held(
    caller: Caller, host: Host, fabric: MemoryFabric
) -> None:
    key = m.HandoffKey("r", 1)
    prompt = prompt_of(Random(1), 100)
    host.worker.expect(key, prompt, caller.peer)
    prefill = asyncio.create_task(caller.worker.prefill(key, prompt, host.peer, stop_after=1))
    while host.worker.link.counts()["streaming"] == 0:
        await asyncio.sleep(0.01)
    successor = Caller(WorkerId("p", 2), fabric)
    await hand_over(successor, host, m.HandoffKey("s", 1), 40)
    error, blames = host.worker.aborted[key]
    assert isinstance(error, PeerLost) and blames == WorkerId("p", 1)
    prefill.cancel()
    await asyncio.gather(prefill, return_exceptions=True)
    await successor.close()


async def test_a_call_that_does_not_begin_with_open_is_ended(host: Host) -> None:
    async with grpc.aio.insecure_channel(host.endpoint) as channel:
        call = handoff_pb2_grpc.HandoffStub(channel).Session(iter([pb.ToReceiver(renew=pb.Renew(number=1))]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize("kv_heads", [1, 8, 128])
def test_a_prompt_with_thousands_of_pages_is_said_in_small_messages(width: int, kv_heads: int) -> None:
    digests = b"d" * width * kv_heads
    entry = m.PageEntry(2**32 - 1, b"h" * 16, 2**32 - 1, 2**64 - 1, digests)
    ready = m.Ready(m.HandoffKey("r" * 200, 2**31), 2**31, (entry,) * pages_per_ready(len(digests)))
    assert READY_BYTES // 2 < client.encode(ready).ByteSize() < server.MAX_MESSAGE_BYTES


def test_the_tail_is_named_by_all_that_comes_before_it() -> None:
    assert tail_hash([], ()) == b""
    assert len({tail_hash([], (1,)), tail_hash([ROOT], (1,)), tail_hash([ROOT], (1, 2)), content(b"")}) == 4
