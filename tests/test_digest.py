"""Digests against a forger: whoever changes bytes can recompute xxh3, and needs the key for BLAKE3."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from random import Random

import pytest
from kvtransfer_pair import LAYOUT, PRINT, Pair, memory_pair, prompt_of
from simulation.virtual_time import run

from core.errors import FingerprintMismatch
from core.messages import WorkerId
from kvtransfer import fingerprint
from kvtransfer import messages as m
from kvtransfer.digest import Digest, digest_page, keyed, plain
from kvtransfer.ports import Dialer

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
FORGED_KEY = m.HandoffKey("r", 1)


class Forger:
    """Sits at the source: changes a byte of each page that is named, and the digests to match, as far as it can."""

    def __init__(self, dialer: Dialer, pair: Pair, of: Digest) -> None:
        self._dialer = dialer
        self._pair = pair
        self._of = of
        self.dial = dialer.dial
        self.hang_up = dialer.hang_up

    def send(self, worker: WorkerId, message: m.Message) -> None:
        if isinstance(message, m.Ready):
            message = replace(message, pages=tuple(map(self._forge, message.pages)))
        self._dialer.send(worker, message)

    def _forge(self, entry: m.PageEntry) -> m.PageEntry:
        frames = self._pair.p.frames
        frames.page(entry.page)[entry.position] ^= 1
        return replace(entry, digests=digest_page(frames.buffer, LAYOUT, entry.page, self._of.of))


def hand_over(digest: Digest, forger: Digest | None) -> Pair:
    """One prompt of five pages, through a forger that digests as it can."""

    async def scenario() -> Pair:
        pair = await memory_pair(digest=digest)
        if forger is not None:
            honest = pair.p.link._dialer
            assert honest is not None
            pair.p.link._dialer = Forger(honest, pair, forger)
        try:
            pair.submit(FORGED_KEY, prompt_of(Random(1), 80))
            await pair.d.until_ended(FORGED_KEY)
        finally:
            await pair.close()
        return pair

    return run(scenario())


@pytest.mark.parametrize("digest", [plain(), keyed(KEY)], ids=lambda digest: digest.name)
def test_an_honest_hand_over_is_committed(digest: Digest) -> None:
    pair = hand_over(digest, None)
    assert pair.d.commits == [FORGED_KEY] and pair.d.wrong == []


def test_forged_bytes_pass_a_digest_without_a_key() -> None:
    pair = hand_over(plain(), plain())
    assert pair.d.commits == [FORGED_KEY] and pair.d.wrong == [FORGED_KEY], "or the next test shows nothing"


@pytest.mark.parametrize("forger", [plain(), keyed(OTHER_KEY)], ids=lambda digest: digest.name)
def test_forged_bytes_do_not_pass_a_digest_whose_key_the_forger_lacks(forger: Digest) -> None:
    pair = hand_over(keyed(KEY), forger)
    assert pair.d.commits == []
    error, blames = pair.d.aborted[FORGED_KEY]
    assert (error.code, blames) == ("digest_mismatch", pair.p.me)


def test_forged_bytes_pass_for_one_who_has_the_key() -> None:
    pair = hand_over(keyed(KEY), keyed(KEY))
    assert pair.d.wrong == [FORGED_KEY], "the forger above was stopped by the key alone"


def test_another_key_shows_before_any_byte_moves() -> None:
    mine, theirs = (replace(PRINT, digest=keyed(key).name) for key in (KEY, OTHER_KEY))
    fingerprint.check(mine, replace(PRINT, digest=keyed(KEY).name))
    for other in (theirs, PRINT):
        with pytest.raises(FingerprintMismatch, match="digest: 'blake3:"):
            fingerprint.check(mine, other)


def test_the_name_of_a_keyed_digest_tells_nothing_of_its_key() -> None:
    name = keyed(KEY).name
    assert KEY.hex() not in name and len(name) < 20


def test_a_keyed_digest_depends_on_every_bit() -> None:
    of, segment = keyed(KEY).of, bytearray(64)
    whole = of(memoryview(segment))
    assert len(whole) == keyed(KEY).width == 16
    for bit in range(8 * len(segment)):
        segment[bit // 8] ^= 1 << bit % 8
        assert of(memoryview(segment)) != whole
        segment[bit // 8] ^= 1 << bit % 8
    assert of(memoryview(segment)) == whole


@pytest.mark.parametrize("digest", [plain(), keyed(KEY)], ids=lambda digest: digest.name)
async def test_a_digest_leaves_the_interpreter_to_others(digest: Digest) -> None:
    """Else the event loop would stand still while pages are digested on another thread."""
    segment, over = memoryview(bytearray(256 << 20)), threading.Event()

    def work() -> None:
        digest.of(segment)
        over.set()

    thread = threading.Thread(target=work)
    thread.start()
    turns = 0
    while not over.is_set():
        turns += 1
        await asyncio.sleep(0)
    thread.join()
    assert turns > 20, turns
