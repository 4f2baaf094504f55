"""The small parts of the hand-off, one by one: queues, tombstones, fingerprints, places, counters, background tasks."""

import asyncio
import logging
from dataclasses import replace
from random import Random

import pytest
from kvtransfer_pair import LAYOUT, PRINT, memory_pair, prompt_of
from kvtransfer_tally import Tally
from simulation.virtual_time import run

from core.errors import EngineError, FingerprintMismatch, PlaceMismatch
from core.messages import WorkerId
from kvtransfer import fingerprint
from kvtransfer.chores import Chores
from kvtransfer.device_in_memory import InMemoryDevice
from kvtransfer.digest import algorithm
from kvtransfer.frames import Frames
from kvtransfer.line import Line
from kvtransfer.liveness import LeaseTerms, Liveness
from kvtransfer.messages import Failed, HandoffKey, Renew
from kvtransfer.outbox import Heard, Outbox
from kvtransfer.places import places_of
from kvtransfer.states import ALLOWED, ENDED, Deadlines, State
from kvtransfer.tombstones import Tombstones

KEY = HandoffKey("r", 1)


async def test_a_line_keeps_order_and_a_full_one_ends_its_session() -> None:
    line = Line(limit=3)
    for number in range(3):
        line.send(Renew(number))
    assert [await line.next(), await line.next()] == [Renew(0), Renew(1)]
    line.send(Renew(3))
    line.send(Renew(4))
    assert not line.ended.is_set()
    line.send(Renew(5))
    assert line.ended.is_set()
    line.send(Renew(6))
    assert await line.next() is None and await line.next() is None, "what waited is not said any more"


def test_an_outbox_forgets_what_was_heard_and_nothing_else() -> None:
    outbox, heard = Outbox(), Heard()
    said = [outbox.put(Failed(KEY, 0, "", "")) for _ in range(4)]
    assert [message.number for message in said] == [1, 2, 3, 4]
    for number, up_to in ((2, 0), (4, 0), (1, 2), (1, 2), (3, 4)):
        heard.note(number)
        assert heard.up_to == up_to
    assert outbox.heard(2) and not outbox.heard(2)
    assert [message.number for message in outbox.unheard()] == [3, 4]


def test_tombstones_last_for_their_time_and_are_bounded() -> None:
    tombstones: Tombstones[str] = Tombstones(life_s=10.0, limit=3)
    for attempt in (1, 2):
        tombstones.bury(HandoffKey("r", attempt), f"over {attempt}", 0.0)
    assert tombstones.word(HandoffKey("r", 1)) == "over 1"
    assert tombstones.superseded(HandoffKey("r", 1)) and not tombstones.superseded(HandoffKey("r", 2))
    tombstones.expire(9.0)
    assert tombstones.word(HandoffKey("r", 2)) == "over 2"
    tombstones.expire(11.0)
    assert tombstones.word(HandoffKey("r", 2)) is None and tombstones.newest("r") == 0
    for number in range(5):
        tombstones.bury(HandoffKey(f"s{number}", 1), "over", 12.0)
    tombstones.expire(12.0)
    assert [tombstones.word(HandoffKey(f"s{number}", 1)) for number in range(5)] == [None, None, "over", "over", "over"]


def test_a_peer_is_lost_when_its_session_stays_broken_or_it_falls_silent() -> None:
    liveness = Liveness(LeaseTerms(life_s=10.0, lost_s=2.0, connect_s=5.0))
    silent, broken, never = (WorkerId(name, 1) for name in ("silent", "broken", "never"))
    liveness.meet(never, 0.0)
    for peer in (silent, broken):
        liveness.up(peer, 0.0)
    liveness.down(broken, 1.0)
    assert liveness.lost(2.9) == [] and liveness.lost(3.1) == [broken]
    liveness.up(broken, 3.2)
    assert liveness.lost(5.1) == [never]
    assert set(liveness.lost(10.1)) == {silent, never}
    assert liveness.due(0.0) and not liveness.due(1.0) and liveness.due(2.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("identity", "other"), ("digest", "blake3"), ("wire_major", 99), ("wire_minor", 99)],
)
def test_a_fingerprint_names_what_differs(field: str, value: object) -> None:
    fingerprint.check(PRINT, PRINT)
    with pytest.raises(FingerprintMismatch, match=field):
        fingerprint.check(PRINT, replace(PRINT, **{field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["kv_heads", "layers", "page_size", "head_dim", "dtype", "parts"])
def test_a_fingerprint_compares_every_field_of_the_layout(field: str) -> None:
    other = replace(LAYOUT, **{field: {"page_size": 32, "dtype": "float16"}.get(field, 5)})  # type: ignore[arg-type]
    with pytest.raises(FingerprintMismatch, match=f"layout.{field}"):
        fingerprint.check(PRINT, replace(PRINT, layout=other))


def test_the_previous_minor_version_is_accepted() -> None:
    fingerprint.check(PRINT, replace(PRINT, wire_minor=PRINT.wire_minor + 1))


def test_an_unknown_digest_is_refused() -> None:
    with pytest.raises(FingerprintMismatch, match="xxh3-64"):
        algorithm("crc32")


def test_a_page_has_one_place() -> None:
    prompt = prompt_of(Random(1), 40)
    places = places_of(prompt.ids, prompt.hashes, 16)
    for position, name in enumerate(prompt.names):
        places.check(position, name)
        for other in {0, 1, 2, 3, -1} - {position}:
            with pytest.raises(PlaceMismatch):
                places.check(other, name)
    assert (places.full_pages, places.pages, places.tail_tokens) == (2, 3, 8)


def test_every_state_leads_to_an_end_and_has_a_deadline_until_then() -> None:
    for state in State:
        assert (not ALLOWED[state]) == (state in ENDED)
        assert state in ENDED or State.ABORTED in ALLOWED[state]
    timed = {state for state in State if Deadlines().of(state) is not None}
    assert timed == set(State) - ENDED


def test_every_hand_off_is_counted_once_at_each_end() -> None:
    tally = Tally()

    async def scenario() -> None:
        pair = await memory_pair(1, counters=tally)
        pair.submit(KEY, prompt_of(Random(1), 100))
        await pair.d.until_ended(KEY)
        other = HandoffKey("s", 1)
        stuck = pair.submit(other, prompt_of(Random(2), 100), stop_after=1)
        await asyncio.sleep(0.5)
        pair.p.link.fail(other, EngineError("a step failed"))
        await pair.d.until_ended(other)
        stuck.cancel()
        await asyncio.sleep(1.0)
        await pair.close()

    run(scenario())
    seen = +tally.seen
    assert seen == {
        (State.COMMITTED, ""): 2,
        (State.ABORTED, "engine_error"): 2,
        "pages": 14,
        State.COMMITTED: 2,
        State.ABORTED: 2,
        "let go": 1,  # the source had leased what it had filled; the receiver had nothing under way
    }
    assert all(lasted_s >= 0.0 for times in tally.lasted_s.values() for lasted_s in times)
    assert len(tally.lasted_s[State.QUEUED]) == 4 and len(tally.lasted_s[State.SEALED]) == 2


async def test_a_chore_that_fails_is_logged_and_the_clock_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    chores, calls = Chores(), []

    def fail() -> None:
        calls.append(1)
        raise EngineError("once more")

    with caplog.at_level(logging.ERROR):
        chores.every(0.001, fail, "a clock")
        while len(calls) < 3:
            await asyncio.sleep(0.001)
    assert caplog.text.count("a clock failed") >= 2
    await chores.stop()
    seen = len(calls)
    await asyncio.sleep(0.005)
    assert len(calls) == seen


def test_a_device_is_not_asked_for_the_digests_of_nothing() -> None:
    class Untouched(InMemoryDevice):
        def digests(self, *_: object) -> list[bytes]:
            raise AssertionError("it was asked")

    frames = Frames.on_device(LAYOUT, 4, Untouched())
    assert frames.digests([], algorithm("xxh3-64")) == []
    frames.close()
