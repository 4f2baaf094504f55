"""What ucx alone has: a process that dies or stops in the middle of a page, nonsense from a peer, lanes, growth."""

import asyncio
import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from kvtransfer_ucx_process import layout_of

from core.errors import ConfigError, HandoffError, PeerLost
from core.messages import WorkerId
from kvtransfer import ucx_library, ucx_settings
from kvtransfer.device_in_memory import InMemoryDevice
from kvtransfer.digest import XXH3_64, algorithm, digest_page
from kvtransfer.frames import Frames
from kvtransfer.transport import Piece
from kvtransfer.ucx import UcxTransport
from kvtransfer.ucx_answering import MAX_SENDS
from kvtransfer.ucx_calls import MEMORY_TYPE_CUDA, OP_FIELD_MEMORY_TYPE, Request, _Parameters
from kvtransfer.ucx_library import Context, Message, Region, Worker
from kvtransfer.ucx_peer import Limits, UcxPeer
from kvtransfer.ucx_settings import Fabric
from kvtransfer.ucx_wire import (
    MAX_DESCRIPTOR_BYTES,
    MAX_ENTRIES,
    SENT,
    STALE,
    Ask,
    Descriptor,
    Verdict,
    decode,
    encode_asks,
    encode_verdicts,
)

pytestmark = pytest.mark.alone

ROOT = Path(__file__).resolve().parent.parent
XXH3 = algorithm(XXH3_64)
P, D = WorkerId("p", 7), WorkerId("d", 8)
LARGE_BYTES, LARGE_PAGES = 8 << 20, 6


@dataclass
class Elsewhere:
    """A source in another process, and our receiver."""

    process: asyncio.subprocess.Process
    receiver: UcxTransport
    ours: Frames

    async def _ask(self, what: str, wanted: str) -> str:
        """UCX itself may say something on the same stream."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{what}\n".encode())
        async for line in self.process.stdout:
            said, _, rest = line.decode().strip().partition(" ")
            if said == wanted:
                return rest
        raise AssertionError("the process has ended")

    async def meet(self) -> None:
        """What the first messages of a session do."""
        await self.receiver.meet(P, bytes.fromhex(await self._ask("invite", "invite")))
        await self._ask(f"meet {(await self.receiver.invite(P)).hex()}", "met")

    def fetch(self, *pages: int, stream: int = 1) -> asyncio.Future[list[Any]]:
        return asyncio.ensure_future(self.receiver.fetch(P, stream, [Piece(page, 0, page) for page in pages]))

    def signal(self, what: signal.Signals) -> None:
        self.process.send_signal(what)

    def right(self, page: int) -> bool:
        return bytes(self.ours.page(page)) == bytes([page % 251 + 1]) * self.ours.layout.page_bytes

    def blank(self, byte: bytes) -> None:
        for page in range(self.ours.pages):
            self.ours.page(page)[:] = byte * self.ours.layout.page_bytes

    def untouched(self, byte: bytes) -> bool:
        size = self.ours.layout.page_bytes
        return all(bytes(self.ours.page(page)) == byte * size for page in range(self.ours.pages))


async def start(page_bytes: int, pages: int, limits: Limits, **options: Any) -> Elsewhere:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "tests" / "kvtransfer_ucx_process.py"), str(page_bytes), str(pages),
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    ours = Frames.shared(layout_of(page_bytes), pages)
    receiver = UcxTransport(net_devices="lo", limits=limits, **options)
    await receiver.serve(ours, XXH3)
    elsewhere = Elsewhere(process, receiver, ours)
    await elsewhere.meet()
    return elsewhere


async def stop(elsewhere: Elsewhere) -> None:
    if elsewhere.process.returncode is None:
        elsewhere.process.kill()
    await elsewhere.process.wait()
    assert elsewhere.process.stdin is not None
    elsewhere.process.stdin.close()
    await elsewhere.receiver.close()
    elsewhere.ours.close()


@pytest.fixture
async def elsewhere() -> AsyncIterator[Elsewhere]:
    elsewhere = await start(LARGE_BYTES, LARGE_PAGES, Limits(grace_s=0.4, slowest_bytes_per_s=100e6, cancel_s=0.1))
    yield elsewhere
    await stop(elsewhere)


async def test_pages_cross_from_one_process_to_another(elsewhere: Elsewhere) -> None:
    arrivals = await elsewhere.fetch(*range(LARGE_PAGES))
    assert all(elsewhere.right(page) for page in range(LARGE_PAGES))
    assert arrivals[2] == digest_page(elsewhere.ours.buffer, elsewhere.ours.layout, 2, XXH3)
    assert await elsewhere.receiver.lanes(P) == ("tcp/lo",)


# --- killed or stopped, with a receive in each of its states ----------------------------------------------------


async def unmatched(elsewhere: Elsewhere, what: signal.Signals, _: pytest.MonkeyPatch) -> asyncio.Future[list[Any]]:
    """It was asked, and has said nothing."""
    elsewhere.signal(what)
    return elsewhere.fetch(*range(LARGE_PAGES))


async def matched(elsewhere: Elsewhere, what: signal.Signals, patch: pytest.MonkeyPatch) -> asyncio.Future[list[Any]]:
    """It has announced a page, we have posted the receive, and no byte has come."""
    receive, posted = Worker.receive, threading.Event()

    def receive_after_the_signal(self: Worker, message: Message, into: Region) -> Request:
        if message.length == LARGE_BYTES and not posted.is_set():
            elsewhere.signal(what)
            posted.set()
        return receive(self, message, into)

    patch.setattr(Worker, "receive", receive_after_the_signal)
    fetch = elsewhere.fetch(*range(LARGE_PAGES))
    await asyncio.get_running_loop().run_in_executor(None, posted.wait)
    return fetch


def begun(elsewhere: Elsewhere) -> int:
    """Pages of which the first byte is here and the last is not."""
    return sum(bool(page[0]) and not page[-1] for page in map(elsewhere.ours.page, range(LARGE_PAGES)))


async def half_filled(elsewhere: Elsewhere, what: signal.Signals, _: pytest.MonkeyPatch) -> asyncio.Future[list[Any]]:
    """Some of a page's bytes have come."""

    def signal_in_the_middle() -> None:
        deadline_s = time.monotonic() + 5.0
        while not begun(elsewhere) and time.monotonic() < deadline_s:
            pass
        elsewhere.signal(what)

    for _attempt in range(20):
        elsewhere.blank(b"\0")
        signalling = asyncio.get_running_loop().run_in_executor(None, signal_in_the_middle)
        fetch = elsewhere.fetch(*range(LARGE_PAGES))
        await signalling
        await asyncio.sleep(0.02)  # what had left is here
        if begun(elsewhere) or what == signal.SIGKILL:
            return fetch
        elsewhere.signal(signal.SIGCONT)
        await fetch
    raise AssertionError("never caught in the middle")


STATES = [unmatched, matched, half_filled]
State = Callable[[Elsewhere, signal.Signals, pytest.MonkeyPatch], Any]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_source_that_dies_or_stops_is_lost_in_time_and_nothing_lands_afterwards(
    elsewhere: Elsewhere, what: signal.Signals, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    began_s = time.monotonic()
    fetch = await state(elsewhere, what, monkeypatch)
    async with asyncio.timeout(3.0):
        with pytest.raises(PeerLost):
            await fetch
    assert time.monotonic() - began_s < 2.5
    elsewhere.blank(b"q")
    if what == signal.SIGSTOP:
        elsewhere.signal(signal.SIGCONT)
    await asyncio.sleep(0.1)
    assert elsewhere.untouched(b"q")
    with pytest.raises(PeerLost, match="cut off"):
        await elsewhere.fetch(0)


@pytest.mark.parametrize("state", STATES)
async def test_a_cancelled_fetch_ends_soon_though_the_source_has_stopped(
    elsewhere: Elsewhere, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = await state(elsewhere, signal.SIGSTOP, monkeypatch)
    began_s = time.monotonic()
    fetch.cancel()
    await asyncio.wait([fetch])
    assert fetch.cancelled() and time.monotonic() - began_s < 0.35
    elsewhere.blank(b"q")
    elsewhere.signal(signal.SIGCONT)
    await asyncio.sleep(0.1)
    assert elsewhere.untouched(b"q")


async def test_a_source_that_pauses_for_less_than_the_grace_is_not_lost(elsewhere: Elsewhere) -> None:
    elsewhere.signal(signal.SIGSTOP)
    fetch = elsewhere.fetch(*range(LARGE_PAGES))
    await asyncio.sleep(0.2)
    elsewhere.signal(signal.SIGCONT)
    await fetch
    assert all(elsewhere.right(page) for page in range(LARGE_PAGES))


async def test_cancelling_one_fetch_leaves_the_others_of_that_peer_alone(elsewhere: Elsewhere) -> None:
    first = elsewhere.fetch(0, 1, 2, stream=1)
    second = elsewhere.fetch(3, 4, 5, stream=2)
    await asyncio.sleep(0.002)
    first.cancel()
    await asyncio.wait([first])
    assert all(isinstance(arrival, bytes) for arrival in await second)
    assert [elsewhere.right(page) for page in (3, 4, 5)] == [True] * 3
    await elsewhere.fetch(0, 1, 2, stream=3)
    assert all(elsewhere.right(page) for page in range(LARGE_PAGES))


async def test_a_stopped_source_that_is_forgotten_can_be_met_again_when_it_goes_on(elsewhere: Elsewhere) -> None:
    elsewhere.signal(signal.SIGSTOP)
    fetch = elsewhere.fetch(0)
    await asyncio.sleep(0.02)
    async with asyncio.timeout(0.5):
        await elsewhere.receiver.forget(P)
    with pytest.raises(PeerLost):
        await fetch
    elsewhere.signal(signal.SIGCONT)
    await elsewhere.meet()
    await elsewhere.fetch(*range(LARGE_PAGES))
    assert all(elsewhere.right(page) for page in range(LARGE_PAGES))


async def test_a_fetch_that_takes_too_long_in_all_is_given_up() -> None:
    elsewhere = await start(LARGE_BYTES, LARGE_PAGES, Limits(grace_s=9.0, fetch_s=0.2))
    elsewhere.signal(signal.SIGSTOP)
    with pytest.raises(PeerLost, match=r"not over after 0\.2 s"):
        await elsewhere.fetch(0)
    elsewhere.signal(signal.SIGCONT)
    assert isinstance((await elsewhere.fetch(1))[0], bytes), "the peer is not cut off for it"
    await stop(elsewhere)


# --- two transports in one process ------------------------------------------------------------------------------


@dataclass
class Couple:
    """A source and a receiver, and how each sees the other."""

    source: UcxTransport
    receiver: UcxTransport
    theirs: Frames
    ours: Frames
    p: WorkerId = P
    d: WorkerId = D

    async def meet(self) -> None:
        await self.receiver.meet(self.p, await self.source.invite(self.d))
        await self.source.meet(self.d, await self.receiver.invite(self.p))

    async def fetch(self, *pages: int, stream: int = 1) -> list[Any]:
        return await self.receiver.fetch(self.p, stream, [Piece(page, 0, page) for page in pages])

    async def close(self) -> None:
        await self.receiver.close()
        await self.source.close()
        self.theirs.close()
        self.ours.close()


async def couple(page_bytes: int = 64 << 10, pages: int = 16, **options: Any) -> Couple:
    layout = layout_of(page_bytes)
    source, receiver = UcxTransport(net_devices="lo"), UcxTransport(**{"net_devices": "lo", **options})
    made = Couple(source, receiver, Frames.shared(layout, pages), Frames.shared(layout, pages))
    await made.source.serve(made.theirs, XXH3)
    await made.receiver.serve(made.ours, XXH3)
    made.theirs.buffer[:] = Random(1).randbytes(len(made.theirs.buffer))
    await made.meet()
    return made


@pytest.fixture
async def pair() -> AsyncIterator[Couple]:
    pair = await couple()
    yield pair
    await pair.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_nothing_is_left_behind() -> None:
    await (await couple()).close()  # what is loaded once stays
    gc.collect()
    files, threads = open_files(), threading.active_count()
    pair = await couple()
    await pair.fetch(*range(16))
    await pair.close()
    gc.collect()
    assert (open_files(), threading.active_count()) == (files, threads)


async def test_ten_thousand_transfers_take_no_more_memory_files_or_threads(pair: Couple) -> None:
    for _ in range(100):
        await pair.fetch(*range(16))
    gc.collect()
    before, files, threads = resident_bytes(), open_files(), threading.active_count()
    for number in range(10_000 // 16):
        await pair.fetch(*range(16), stream=number + 1)
    assert (open_files(), threading.active_count()) == (files, threads)
    assert resident_bytes() - before < 4 << 20
    assert pair.ours.buffer == pair.theirs.buffer


async def test_many_peers_come_and_go(pair: Couple) -> None:
    async def come_and_go(number: int) -> None:
        me = Couple(pair.source, pair.receiver, pair.theirs, pair.ours, WorkerId("p", number), WorkerId("d", number))
        await me.meet()
        await me.fetch(number % 16)
        await me.receiver.forget(me.p)
        await me.source.forget(me.d)

    for number in range(100, 105):
        await come_and_go(number)
    gc.collect()
    before, files = resident_bytes(), open_files()
    for start in range(200, 232, 8):
        await asyncio.gather(*(come_and_go(number) for number in range(start, start + 8)))
    gc.collect()
    assert open_files() == files
    assert resident_bytes() - before < 16 << 20
    assert len(await pair.fetch(1)) == 1


async def test_a_transport_that_has_nothing_to_do_sleeps(pair: Couple) -> None:
    await pair.fetch(*range(16))
    await asyncio.sleep(0.05)
    before_s = time.process_time()
    await asyncio.sleep(1.0)
    assert time.process_time() - before_s < 0.1
    assert len(await pair.fetch(1)) == 1


async def test_two_pairs_move_pages_at_once_and_one_is_cut_off(pair: Couple) -> None:
    other = Couple(pair.source, pair.receiver, pair.theirs, pair.ours, WorkerId("p", 70), WorkerId("d", 80))
    await other.meet()
    first = asyncio.gather(*(pair.fetch(*range(8), stream=n) for n in range(1, 40)))
    second = asyncio.gather(*(other.fetch(*range(8, 16), stream=n) for n in range(1, 40)), return_exceptions=True)
    await asyncio.sleep(0.01)
    await other.source.forget(other.d)
    assert all(len(arrivals) == 8 for arrivals in await first)
    assert all(isinstance(end, PeerLost | list) for end in await second)
    assert pair.ours.page(3) == pair.theirs.page(3)


async def test_a_pair_that_moves_pages_both_ways(pair: Couple) -> None:
    there = pair.fetch(*range(8))
    back = pair.source.fetch(D, 2, [Piece(page, 0, page) for page in range(8, 16)])
    arrivals = await asyncio.gather(there, back)
    assert [len(arrival) for arrival in arrivals] == [8, 8] and pair.ours.buffer == pair.theirs.buffer


async def test_closing_the_source_with_transfers_in_flight_loses_them(pair: Couple) -> None:
    fetches = [asyncio.ensure_future(pair.fetch(*range(16), stream=n)) for n in range(1, 9)]
    await asyncio.sleep(0.002)
    await pair.source.close()
    async with asyncio.timeout(2.0):
        ends = await asyncio.gather(*fetches, return_exceptions=True)
    assert any(isinstance(end, PeerLost) for end in ends)
    assert all(isinstance(end, PeerLost | list) for end in ends)


async def test_a_stream_is_drained_when_its_sends_are_over_and_at_once_when_there_are_none(pair: Couple) -> None:
    async with asyncio.timeout(1.0):
        await pair.source.drain(D, 1)
        fetch = asyncio.ensure_future(pair.fetch(*range(16)))
        await asyncio.sleep(0.001)
        await pair.source.drain(D, 1)
        await fetch
        await pair.source.drain(WorkerId("nobody", 1), 1)


async def test_a_drain_ends_when_a_receiver_that_takes_nothing_is_cut_off(
    pair: Couple, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = UcxPeer._take
    held = []

    def take_no_pages(self: UcxPeer, message: Message, worker: Worker) -> None:
        if message.length == pair.ours.layout.page_bytes:
            held.append(message)
        else:
            take(self, message, worker)

    monkeypatch.setattr(UcxPeer, "_take", take_no_pages)
    fetch = asyncio.ensure_future(pair.fetch(*range(4), stream=3))
    await asyncio.sleep(0.05)
    drain = asyncio.ensure_future(pair.source.drain(D, 3))
    await asyncio.sleep(0.05)
    assert not drain.done()
    await pair.source.forget(D)
    async with asyncio.timeout(1.0):
        await drain
    await pair.receiver.forget(P)
    with pytest.raises(PeerLost):
        await fetch
    assert held


# --- what a peer says ------------------------------------------------------------------------------------------


class Rude:
    """A peer that speaks UCX well and our protocol badly."""

    def __init__(self, theirs: bytes, page_bytes: int) -> None:
        self.theirs = Descriptor.decode(theirs)
        self.context = ucx_library.load().context({"TLS": "tcp", "NET_DEVICES": "lo"})
        self.worker = self.context.worker()
        self.endpoint = self.worker.connect(self.theirs.address)
        self.descriptor = Descriptor(self.worker.address, 5, 6, 16, page_bytes).encode()

    async def say(self, message: bytes, tag: int | None = None) -> None:
        region = Region.of(memoryview(bytearray(message)))
        request = self.endpoint.send(region, self.theirs.control_tag if tag is None else tag)
        deadline_s = time.monotonic() + 1.0
        while not request.done and time.monotonic() < deadline_s:
            self.worker.progress()
            await asyncio.sleep(0)
        for _ in range(50):
            self.worker.progress()
            await asyncio.sleep(0.001)

    def close(self) -> None:
        self.endpoint.close()
        self.worker.close()


NONSENSE = {
    "nothing": b"",
    "noise": bytes(range(200)),
    "a page": b"x" * (64 << 10),
    "a header alone": encode_asks(5, 1, []),
    "an entry cut short": encode_asks(5, 1, [Ask(1, 2, 3)])[:-1],
    "more than it says": encode_asks(5, 1, [Ask(1, 2, 3)]) + b"x",
    "too many": encode_asks(5, 1, [Ask(1, 2, 3)] * (MAX_ENTRIES + 1)),
    "a verdict on nothing": encode_verdicts(5, [Verdict(1, SENT, 0)]),
    "a verdict unheard of": encode_verdicts(5, [Verdict(1, 99, 0)]),
}


@pytest.mark.parametrize("what", NONSENSE)
async def test_a_peer_that_talks_nonsense_is_cut_off_and_the_others_are_not(pair: Couple, what: str) -> None:
    villain = WorkerId("villain", 1)
    rude = Rude(await pair.receiver.invite(villain), 64 << 10)
    await pair.receiver.meet(villain, rude.descriptor)
    fetch = asyncio.ensure_future(pair.receiver.fetch(villain, 1, [Piece(0, 0, 0)]))
    await asyncio.sleep(0.01)
    await rude.say(NONSENSE[what])
    async with asyncio.timeout(2.0):
        with pytest.raises(HandoffError):
            await fetch
    rude.close()
    assert len(await pair.fetch(*range(16))) == 16


async def test_messages_under_unknown_tags_are_dropped(pair: Couple) -> None:
    villain = WorkerId("villain", 1)
    rude = Rude(await pair.receiver.invite(villain), 64 << 10)
    await pair.receiver.meet(villain, rude.descriptor)
    before = bytes(pair.ours.buffer)
    for size in (0, 8, 64 << 10):
        await rude.say(b"z" * size, tag=77)
    assert bytes(pair.ours.buffer) == before
    assert len(await pair.fetch(0)) == 1
    rude.close()


async def test_asking_for_more_than_is_allowed_costs_the_connection(pair: Couple) -> None:
    villain = WorkerId("villain", 1)
    rude = Rude(await pair.source.invite(villain), 64 << 10)
    await pair.source.meet(villain, rude.descriptor)
    for _ in range(MAX_SENDS // MAX_ENTRIES + 2):
        await rude.say(encode_asks(5, 1, [Ask(9, 0, 0)] * MAX_ENTRIES))
    await asyncio.sleep(0.05)
    with pytest.raises(PeerLost, match="at a time"):
        await pair.source.fetch(villain, 1, [Piece(0, 0, 0)])
    rude.close()


@pytest.mark.parametrize("seed", range(20))
def test_no_bytes_make_a_message_or_a_descriptor_of_noise(seed: int) -> None:
    random = Random(seed)
    for _ in range(200):
        noise = random.randbytes(random.randrange(200))
        with pytest.raises(HandoffError):
            decode(noise)
        with pytest.raises(HandoffError):
            Descriptor.decode(noise)


def test_what_is_written_is_read_and_nothing_else() -> None:
    asks, verdicts = [Ask(2**64 - 1, -1, 7), Ask(1, 2, 3)], [Verdict(4, STALE, 2**64 - 1)]
    assert decode(encode_asks(9, 8, asks)).asks == tuple(asks)
    assert decode(encode_verdicts(9, verdicts)).verdicts == tuple(verdicts)
    descriptor = Descriptor(b"a" * 300, 1, 2, 3, 4)
    assert Descriptor.decode(descriptor.encode()) == descriptor
    for broken in (descriptor.encode()[:-1], descriptor.encode() + b"x", b"a" * (MAX_DESCRIPTOR_BYTES + 1)):
        with pytest.raises(HandoffError):
            Descriptor.decode(broken)
    with pytest.raises(HandoffError):
        Descriptor.decode(Descriptor(b"a", 1, 2, 0, 4).encode())


async def test_a_descriptor_that_ucx_cannot_use_is_an_error_of_the_hand_off(pair: Couple) -> None:
    stranger = WorkerId("x", 1)
    with pytest.raises(HandoffError, match="bytes there"):
        await pair.receiver.meet(stranger, Descriptor(b"a", 1, 2, 16, 4096).encode())


async def test_a_worker_that_is_not_there_any_more_is_lost_in_time() -> None:
    pair = await couple(limits=Limits(grace_s=0.5))
    descriptor = await pair.source.invite(WorkerId("d", 9))
    await pair.source.forget(WorkerId("d", 9))
    async with asyncio.timeout(2.0):
        with pytest.raises(PeerLost):
            await pair.receiver.meet(WorkerId("p", 9), descriptor)
            await pair.receiver.fetch(WorkerId("p", 9), 1, [Piece(0, 0, 0)])
    assert len(await pair.fetch(0)) == 1
    await pair.close()


# --- settings ------------------------------------------------------------------------------------------------


async def test_the_lanes_are_those_that_were_asked_for() -> None:
    pair = await couple(tls="tcp", net_devices="lo", fabric=Fabric("tcp", strict=True))
    await pair.fetch(0)
    assert await pair.receiver.lanes(P) == ("tcp/lo",)
    assert pair.receiver.settings["TLS"] == "tcp" and pair.receiver.settings["TCP_TX_SEG_SIZE"]
    await pair.close()


async def test_a_fall_back_is_an_error_where_that_was_asked_for_and_a_warning_elsewhere(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for strict in (False, True):
        pair = await couple(fabric=Fabric("rc", strict=strict))
        if strict:
            with pytest.raises(PeerLost, match="not over rc"):
                async with asyncio.timeout(2.0):
                    while True:
                        await pair.fetch(0)
        else:
            await pair.fetch(0)
            await asyncio.sleep(0.1)
            assert "not over rc" in caplog.text
        await pair.close()


async def test_a_network_device_that_has_gone_does_not_stop_new_peers_from_coming(
    pair: Couple, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    real = Context._open

    def gone_at_first(self: Context) -> Any:
        opened.append(self._context)
        if len(opened) == 1:
            raise ConfigError("UCX cannot open its devices: No such device")
        return real(self)

    monkeypatch.setattr(Context, "_open", gone_at_first)
    other = Couple(pair.source, pair.receiver, pair.theirs, pair.ours, WorkerId("p", 70), WorkerId("d", 80))
    await other.meet()
    assert len(await other.fetch(3)) == 1
    assert opened[0] is not opened[1]


async def test_settings_that_ucx_does_not_take_are_a_mistake_of_the_operator() -> None:
    frames = Frames.shared(layout_of(64 << 10), 2)
    for wrong in ({"settings": {"NO_SUCH_THING": "1"}}, {"tls": "pigeon"}):
        transport = UcxTransport(**wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError):
            await transport.serve(frames, XXH3)
            await transport.invite(D)
        await transport.close()
    frames.close()


@pytest.mark.parametrize(
    "tls,wanted",
    [("tcp", "tcp,cuda_copy,cuda_ipc"), ("rc,cuda_copy", "rc,cuda_copy,cuda_ipc"), ("rc,cuda", "rc,cuda")]
    + [(tls, tls) for tls in ("all", "^tcp")],
)  # fmt: skip
def test_a_list_of_transports_is_widened_for_a_pool_on_a_gpu(tls: str, wanted: str) -> None:
    chosen = ucx_settings.settings(tls, "all", {})
    assert ucx_settings.with_gpu(chosen) == {**chosen, "TLS": wanted} and chosen["TLS"] == tls


async def test_ucx_is_told_which_memory_is_a_gpus() -> None:
    """A pool that says so; the calls themselves are written down, and not made."""

    class OnGpu(InMemoryDevice):
        on_gpu = True

    frames = Frames.on_device(layout_of(64 << 10), 4, OnGpu())
    region = Region.of_pool(frames).part(64 << 10, 64 << 10)
    assert frames.block is not None and (region.address, region.on_gpu) == (frames.block.address + (64 << 10), True)
    calls, told = ucx_library.load().calls, []

    def note(*arguments: Any) -> None:
        given = ctypes.cast(arguments[-1], ctypes.POINTER(_Parameters)).contents
        told.append((given.mask, given.memory_type))

    for name in ("_send", "_receive"):
        setattr(calls, name, note)
    for on_gpu in (False, True):
        calls.send(1, region.address, region.length, 5, on_gpu)
        calls.receive(1, 2, region.address, region.length, on_gpu)
    assert told == [(0, 0)] * 2 + [(OP_FIELD_MEMORY_TYPE, MEMORY_TYPE_CUDA)] * 2
    frames.close()


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ucxx._lib", None)
    with pytest.raises(ConfigError, match=r"pip install 'baton\[ucx\]'"):
        UcxTransport()
