"""What each guard is for: with one switched off its own scenario goes wrong, and no other; with all on, none does.

    epoch        a page was given up and filled anew between its Ready and its fetch
    place        the source's engine mixed two prompts up
    digest       the fabric flipped bits
    quarantine   a fetch was given up, and its bytes come late
    step         a request was cancelled while a step of it ran

Each scenario says whether what was served, or what lies in somebody's pages, is what should be there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import pytest
from kvtransfer_pair import Pair, content, memory_pair, prompt_of
from simulation.virtual_time import run

from core.errors import DigestMismatch, PlaceMismatch, StalePage
from core.hashing import root_hash
from core.messages import Receipt
from core.sampling import SamplingParams
from decode_service.policy import DecodePolicy
from engine.batch import Batch, RowResult
from engine.engine import Engine, StepReport
from engine.hashchain import LAYOUT, HashChainExecutor, kv_of, reference_tokens
from engine.pool import PagePool
from engine.sequence import Sequence
from kvtransfer.intake import Guards
from kvtransfer.memory import CALM, Mischief
from kvtransfer.messages import HandoffKey

GUARDS = ("epoch", "place", "digest", "quarantine", "step")
KEY = HandoffKey("r", 1)
TOKENS = 16  # one page
_RECEIPT = Receipt(computed_tokens=TOKENS)
VOCABULARY = 997
Off = frozenset[str]


async def _pair(off: Off, mischief: Mischief) -> Pair:
    guards = Guards(place="place" not in off, digest="digest" not in off, quarantine="quarantine" not in off)
    return await memory_pair(1, mischief=mischief, guards=guards, check_epoch="epoch" not in off)


async def _hand_over(pair: Pair, name: bytes | None = None, meanwhile: Callable[[int], None] | None = None) -> bool:
    """One page, under this name instead of its own. Whether nothing wrong was served."""
    prompt = prompt_of(Random(1), TOKENS)
    pair.d.expect(KEY, prompt, pair.to_p)
    await pair.p.link.offer(KEY, pair.to_d, TOKENS, 1, 10.0)
    (page,) = pair.p.pool.allocate(1) or ()
    pair.p.link.ready(KEY, [pair.p.write(0, name or prompt.hashes[0], page)])
    await asyncio.sleep(0.0)  # the digest is of what was written
    if meanwhile is not None:
        meanwhile(page)
    if KEY not in pair.d.aborted:
        pair.p.link.seal(KEY, None, (), _RECEIPT)
    await pair.d.until_ended(KEY)
    await pair.close()
    return not pair.d.wrong


async def epoch(off: Off) -> bool:
    """Without a digest, so that the fence alone stands between the two contents."""
    pair = await _pair(off | {"digest"}, CALM)

    def filled_anew(page: int) -> None:
        pair.p.frames.epochs[page] += 1
        pair.p.frames.page(page)[:] = content(b"another prompt's page")

    right = await _hand_over(pair, meanwhile=filled_anew)
    assert not right or isinstance(pair.d.aborted[KEY][0], StalePage)
    return right


async def place(off: Off) -> bool:
    pair = await _pair(off, CALM)
    other = prompt_of(Random(2), TOKENS)
    right = await _hand_over(pair, name=other.hashes[0])
    assert not right or isinstance(pair.d.aborted[KEY][0], PlaceMismatch)
    return right


async def digest(off: Off) -> bool:
    pair = await _pair(off, Mischief(steps=1, corrupt=1.0, ghosts=False))
    right = await _hand_over(pair)
    assert not right or isinstance(pair.d.aborted[KEY][0], DigestMismatch)
    return right


async def quarantine(off: Off) -> bool:
    """The receiver gives up and uses its pages for something else, while the source does not hear of it."""
    pair = await _pair(off, Mischief(delay_s=0.01, ghost_delay_s=0.001))
    task = pair.submit(KEY, prompt_of(Random(1), 100), chunk_pages=1)
    while not pair.fabric.touched(pair.d.me):
        await asyncio.sleep(0.001)
    pair.network.kill(pair.p.me)
    pair.d.link.cancel(KEY)
    pages = pair.d.pool.allocate(pair.d.pool.reusable) or []
    for page in pages:
        pair.d.frames.page(page)[:] = content(b"%d" % page)
    await asyncio.sleep(1.0)
    whole = all(pair.d.frames.page(page) == content(b"%d" % page) for page in pages)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await pair.close()
    return whole and bool(pages)


async def step(off: Off) -> bool:
    """A request is cancelled during its step, and another is handed off into whatever pages are free."""
    stage = _Stage(step_fence="step" not in off)
    first = stage.add("first", [5] * 20)
    stage.during_step = lambda: stage.replace(first, list(range(100, 120)))
    await stage.until_idle()
    return stage.tokens["second"] == reference_tokens(list(range(100, 120)), stage.params, 0, 0, VOCABULARY)


class _Stage:
    """One engine over the hash chain; something happens during its first step."""

    params = SamplingParams(max_tokens=8, temperature=0.0)

    def __init__(self, *, step_fence: bool) -> None:
        self.pool = PagePool(16)
        self.executor = HashChainExecutor(memoryview(bytearray(16 * LAYOUT.page_bytes)), VOCABULARY)
        self.during_step: Callable[[], None] | None = None
        self.tokens: dict[str, list[int]] = {}
        self.engine = Engine(
            self.executor, self.pool, LAYOUT.page_size, DecodePolicy(), asyncio.get_running_loop().time,
            self.run_blocking, self.report, step_fence=step_fence,
        )  # fmt: skip

    async def run_blocking(self, call: Callable[[Batch], list[RowResult]], batch: Batch) -> list[RowResult]:
        await asyncio.sleep(0.01)
        if self.during_step is not None:
            self.during_step, happens = None, self.during_step
            happens()
        return call(batch)

    def report(self, report: StepReport) -> None:
        for item in report.sampled:
            self.tokens.setdefault(item.sequence.request_id, []).append(item.token.token_id)

    def sequence(self, name: str, ids: list[int]) -> Sequence:
        return Sequence(
            sequence_id=self.engine.new_id(), request_id=name, attempt=1, choices=(0,), ids=ids,
            prompt_tokens=len(ids), params=self.params, seed=0, root=root_hash("model"), end_ids=(),
            arrived_s=0.0, deadline_s=1e9,
        )  # fmt: skip

    def add(self, name: str, ids: list[int]) -> Sequence:
        sequence = self.sequence(name, ids)
        self.engine.add(sequence)
        return sequence

    def replace(self, first: Sequence, ids: list[int]) -> None:
        """Cancel the first; its place is taken by one whose KV, but for the last token, came from a peer."""
        self.engine.remove(first)
        second = self.sequence("second", ids)
        pages = self.pool.allocate(2)
        assert pages is not None
        for position, token_id in enumerate(ids[:-1]):
            self.executor._write(pages, position, kv_of(token_id, position))
        self.engine.adopt(second, pages, len(ids) - 1)

    async def until_idle(self) -> None:
        task = asyncio.create_task(self.engine.run())
        while not self.engine.is_idle:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


SCENARIOS: dict[str, Callable[[Off], Awaitable[bool]]] = {
    "epoch": epoch, "place": place, "digest": digest, "quarantine": quarantine, "step": step,
}  # fmt: skip


def _holds(scenario: str, off: Off) -> bool:
    async def main() -> bool:
        return await SCENARIOS[scenario](off)

    return run(main())


@pytest.mark.parametrize("scenario", GUARDS)
def test_with_every_guard_on_it_holds(scenario: str) -> None:
    assert _holds(scenario, frozenset())


@pytest.mark.parametrize("guard", GUARDS)
def test_a_guard_that_is_off_is_missed_in_its_own_scenario_and_no_other(guard: str) -> None:
    broken = [scenario for scenario in GUARDS if not _holds(scenario, frozenset({guard}))]
    assert broken == [guard]
