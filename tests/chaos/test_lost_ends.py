"""P and D as real processes over real transports, killed and stopped in each state and at every k-th page.

The end that lives gives everything back, keeps what it has verified and nothing else, and serves the next
incarnation.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import Callable
from random import Random

import pytest
from kvtransfer_pair import Prompt, Receiving, Sending, content, prompt_of

from core.errors import BatonError, PeerLost
from core.messages import Peer, WorkerId
from kvtransfer.messages import HandoffKey
from kvtransfer.states import State
from tests.chaos.ends import (
    HEAD_DIM,
    RECEIVER,
    SOURCE,
    WIDE,
    endpoint_of,
    process_of,
    quiet,
    receiver_here,
    source_here,
    tell,
)
from tests.chaos.table import Row, Table
from tests.chaos.transports import NAMES

FULL_PAGES = 12
TOKENS = FULL_PAGES * 16 + 5
KEY, AGAIN = HandoffKey("r", 1), HandoffKey("r", 2)
STATES = ["queued", "granted", "streaming", "sealed"]
POINTS = [*STATES, *(f"page {number}" for number in range(1, FULL_PAGES + 1, 2))]
QUICK_POINTS = {"sealed", "page 7"}
WITHIN_S = 20.0

SIGNALS = pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
TRANSPORTS = pytest.mark.parametrize("transport", NAMES)


def skip_unless(chaos_full: bool, transport: str, point: str) -> None:
    """Shared memory has tests of its own for this."""
    if transport == "shm" and not (chaos_full and point in STATES):
        pytest.skip("only in each state, and only with --chaos-full")
    if not chaos_full and point not in QUICK_POINTS:
        pytest.skip("only with --chaos-full")


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not holds():
            await asyncio.sleep(0.0005)


@TRANSPORTS
@SIGNALS
@pytest.mark.parametrize("point", POINTS)
async def test_the_source_is_lost(
    chaos_full: bool, table: Table, transport: str, what: signal.Signals, point: str
) -> None:
    skip_unless(chaos_full, transport, point)
    row = table.row(f"{what.name} of P", f"each state, each page; {transport}")
    async with receiver_here(transport) as (d, endpoint):
        prompt = prompt_of(Random(1), TOKENS)
        arguments = ("d", 1, endpoint, transport, HEAD_DIM)
        taken = d.pool.allocate(d.pool.reusable - FULL_PAGES) if point == "queued" else None
        asked = counted(d, "reserve")
        d.expect(KEY, prompt, Peer(WorkerId("p", 1), ""))
        async with process_of(SOURCE, "p", 1, *arguments) as p:
            tell(p, KEY.request_id, KEY.attempt, TOKENS, 1, 1, 0.02)
            await until(lambda: asked() and has_come_to(d, point))
            p.send_signal(what)
            began_s = time.monotonic()
            await d.until_ended(KEY, WITHIN_S)
            judge(d, row)
            if taken is not None:
                d.pool.release_all(taken)
            await quiet(d)
            row.recovered_s.append(time.monotonic() - began_s)
            assert_only_what_was_verified_is_kept(d)
            saved = len(d.pool.lookup(prompt.hashes))
            await next_incarnation(d, prompt, saved, arguments)


def counted(end: object, name: str) -> Callable[[], int]:
    """How often this method of it is called from now on."""
    inner, calls = getattr(end, name), itertools.count()
    last = [next(calls)]

    def counting(*args: object) -> object:
        last[0] = next(calls)
        return inner(*args)

    setattr(end, name, counting)
    return lambda: last[0]


def has_come_to(d: Receiving, point: str) -> bool:
    counts = d.link.counts()
    if point in STATES:
        return counts[point] > 0 or (point == "sealed" and bool(d.commits))
    return len(d.pool.known_hashes()) >= int(point.removeprefix("page "))


def judge(d: Receiving, row: Row) -> None:
    """Aborted with the one error that blames P, or committed whole just before."""
    row.runs += 1
    if KEY in d.committed:
        row.survived += 1
        d.drop(KEY)
        assert not d.wrong
        return
    row.lost += 1
    error, blames = d.aborted[KEY]
    assert isinstance(error, PeerLost) and blames == WorkerId("p", 1)


def assert_only_what_was_verified_is_kept(d: Receiving) -> None:
    for name in d.pool.known_hashes():
        (page,) = d.pool.lookup([name])
        assert d.frames.page(page) == content(name, WIDE)


async def next_incarnation(d: Receiving, prompt: Prompt, saved: int, arguments: tuple[object, ...]) -> None:
    """It serves the request, and sends only what is missing."""
    d.expect(AGAIN, prompt, Peer(WorkerId("p", 2), ""))
    async with process_of(SOURCE, "p", 2, *arguments) as p:
        tell(p, AGAIN.request_id, AGAIN.attempt, TOKENS, 1, 4, 0.0)
        await d.until_ended(AGAIN, WITHIN_S)
        assert AGAIN in d.committed, d.aborted
        assert d.receipts[AGAIN].transferred_tokens == TOKENS - 16 * saved
        d.drop(AGAIN)
        assert not d.wrong
        await quiet(d)


@TRANSPORTS
@SIGNALS
@pytest.mark.parametrize("point", POINTS)
async def test_the_receiver_is_lost(
    chaos_full: bool, table: Table, transport: str, what: signal.Signals, point: str
) -> None:
    skip_unless(chaos_full, transport, point)
    row = table.row(f"{what.name} of D", f"each state, each page; {transport}")
    async with source_here(transport) as p, contextlib.AsyncExitStack() as stack:
        prompt = prompt_of(Random(1), TOKENS)
        room = FULL_PAGES if point == "queued" else 4 * FULL_PAGES
        d = await stack.enter_async_context(process_of(RECEIVER, 1, transport, HEAD_DIM, room))
        endpoint = await endpoint_of(d)
        tell(d, KEY.request_id, KEY.attempt, TOKENS, 1, 1)
        written = counted(p, "write")
        task = asyncio.create_task(
            p.prefill(KEY, prompt, Peer(WorkerId("d", 1), endpoint), chunk_pages=1, chunk_s=0.02)
        )
        await until(lambda: source_has_come_to(p, point, written()))
        if point == "queued":
            await asyncio.sleep(0.2)  # and it has asked, and been told that there is no room
        d.send_signal(what)
        began_s = time.monotonic()
        row.runs += 1
        try:
            await asyncio.wait_for(task, WITHIN_S)
        except BatonError:
            assert point == "queued"
        await quiet(p)
        row.recovered_s.append(time.monotonic() - began_s)
        error = p.closed[KEY][1] if KEY in p.closed else None
        assert error is None or isinstance(error, PeerLost), error
        row.survived += KEY in p.closed and error is None
        row.lost += KEY not in p.closed or error is not None
        await next_receiver(p, transport)


def source_has_come_to(p: Sending, point: str, written: int) -> bool:
    if point in STATES:
        return p.link.counts()[point] > 0 or KEY in p.closed
    return written >= int(point.removeprefix("page "))


async def next_receiver(p: Sending, transport: str) -> None:
    """Another incarnation gets the request whole."""
    async with process_of(RECEIVER, 2, transport, HEAD_DIM, 4 * FULL_PAGES) as d:
        endpoint = await endpoint_of(d)
        tell(d, AGAIN.request_id, AGAIN.attempt, TOKENS, 1, 1)
        await p.prefill(AGAIN, prompt_of(Random(1), TOKENS), Peer(WorkerId("d", 2), endpoint), chunk_s=0.0)
        await until(lambda: AGAIN in p.closed)
        assert p.closed[AGAIN] == (State.COMMITTED, None)
        await quiet(p)
