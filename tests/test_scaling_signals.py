"""What workers say of their last seconds, and how a tier's signals come of it."""

from __future__ import annotations

import asyncio
import json
import math
import os
from dataclasses import asdict
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.reports import Report, parse, reporter
from baton.scaling.decode import DecodeSignals, DecodeTarget, decode_need
from baton.scaling.prefill import PrefillSignals, PrefillTarget, prefill_need
from baton.scaling.signals import DECODE, PREFILL, decode_signals, prefill_signals
from baton.worker_signals import signals_of
from core.sampling import SamplingParams
from core.telemetry.last_seconds import MAX_SAMPLES, WINDOW_S, Window
from tests.simulation.cluster import SimCluster, request_of
from tests.simulation.test_calm import prompt_of
from tests.simulation.virtual_time import run

P = {
    "draining": 0.0,
    "arriving_tokens_per_s": 100.0,
    "queued_tokens": 50.0,
    "queue_wait_s": 0.5,
    "first_token_s": 1.0,
    "tokens_per_s": 1000.0,
}
D = {
    "draining": 0.0,
    "projected_pages": 300.0,
    "pages_total": 1000.0,
    "running": 4.0,
    "token_gap_s": 0.02,
    "refused_grants_per_s": 0.25,
}


def test_a_tier_of_prefill_workers() -> None:
    slow = P | {"queue_wait_s": 2.0, "tokens_per_s": 500.0}
    unmeasured = P | {"tokens_per_s": 0.0, "queued_tokens": 0.0}
    assert prefill_signals([P, slow, unmeasured]) == PrefillSignals(3, 300.0, 100, 2.0, 1.0, 750.0)


def test_a_tier_of_decode_workers() -> None:
    crowded = D | {"running": 12.0, "token_gap_s": 0.06}
    assert decode_signals([D, crowded]) == DecodeSignals(2, 600, 1000, 16, pytest.approx(0.05), 0.5)  # type: ignore[arg-type]


def test_a_tier_without_workers_asks_for_nothing() -> None:
    assert prefill_need(prefill_signals([]), PrefillTarget()).workers == 0
    assert decode_need(decode_signals([]), DecodeTarget()).workers == 0


def test_a_worker_that_drains_is_not_ready_but_what_it_holds_counts() -> None:
    leaving = D | {"draining": 1.0, "token_gap_s": 9.0, "refused_grants_per_s": 9.0}
    assert decode_signals([D, leaving]) == DecodeSignals(1, 600, 1000, 8, pytest.approx(0.02), 0.25)  # type: ignore[arg-type]
    assert decode_signals([leaving]).ready == 0 and decode_signals([leaving]).pages_per_worker == 1000
    assert prefill_signals([P, P | {"draining": 1.0, "queue_wait_s": 9.0}]) == PrefillSignals(
        1, 100.0, 50, 0.5, 1.0, 1000.0
    )


@pytest.mark.parametrize("broken", [math.nan, math.inf, -1.0, "7", None])
def test_a_report_that_is_no_whole_one_is_left_out(broken: object) -> None:
    for name in PREFILL:
        assert prefill_signals([P, P | {name: broken}]) == prefill_signals([P])  # type: ignore[dict-item]
    for name in DECODE:
        assert decode_signals([D, D | {name: broken}]) == decode_signals([D])  # type: ignore[dict-item]
    lacking = {name: value for name, value in D.items() if name != "running"}
    assert decode_signals([lacking, D]) == decode_signals([D])


NUMBERS = st.one_of(st.floats(), st.integers(-5, 10**6).map(float))


@given(st.lists(st.dictionaries(st.sampled_from(sorted({*PREFILL, *DECODE})), NUMBERS), max_size=4))
def test_whatever_workers_say_the_signals_are_finite(workers: list[dict[str, float]]) -> None:
    for signals in (prefill_signals(workers), decode_signals(workers)):
        for name, value in asdict(signals).items():
            assert value >= 0, name


def test_a_window_forgets_what_is_older_and_is_bounded() -> None:
    now_s = 100.0
    window = Window(lambda: now_s)
    assert window.high() == 0.0 and window.per_s() == 0.0
    for value in range(1, 11):
        window.add(float(value))
    assert window.high() == 9.0, "the 90th percentile of 1 .. 10"
    assert window.high([100.0] * 10) == 100.0
    assert window.per_s() == 55.0 / WINDOW_S, "what came to another worker before is not counted again here"
    now_s += 4.0
    assert window.per_s() == 55.0 / WINDOW_S
    now_s += WINDOW_S
    assert window.values() == []
    for _ in range(MAX_SAMPLES + 5):
        window.add(1.0)
    assert len(window.values()) == MAX_SAMPLES


def test_reports_that_nobody_reads_do_not_hold_the_worker_up() -> None:
    reading, writing = os.pipe()
    report = reporter(writing)
    report(Report("signals", numbers={"running": 3.0}))
    assert parse(os.read(reading, 4096)) == Report("signals", numbers={"running": 3.0})
    for _ in range(10_000):
        report(Report("signals", numbers=P))
    held = os.read(reading, 1 << 20)
    assert all(parse(line) is not None for line in held.splitlines()), "whole lines are lost, or none"
    os.close(reading)
    report(Report("signals"))
    os.close(writing)
    assert parse(json.dumps({"what": "ready"}).encode()) == Report("ready")


def test_what_workers_under_load_say_of_themselves() -> None:
    """Six seconds of twelve prompts of 200 tokens each second, on workers whose steps take 20 ms."""

    async def main() -> tuple[dict[str, float], dict[str, float]]:
        cluster = SimCluster(1, prefill=1, decode=1, pages=2000, step_s=0.02)
        await cluster.start()
        params = SamplingParams(max_tokens=60, temperature=0.0, seed=0)
        for n in range(72):
            prompt = prompt_of(Random(n), 200)
            cluster.spawn(cluster.generate(request_of(f"r{n}", prompt, params)))
            await asyncio.sleep(1 / 12)
        said = [signals_of(cluster.alive[name].worker) for name in ("prefill-0", "decode-0")]
        decode = cluster.alive["decode-0"].worker
        held = decode.pool.counts()["owned"]
        assert said[1]["projected_pages"] > held, "growth counts"
        assert decode.tier.decode is not None and decode.tier.decode.promised_pages > 0, "some wait to be computed"
        await cluster.close()
        return said[0], said[1]

    prefill, decode = run(main())
    assert set(prefill) == set(PREFILL) and set(decode) == set(DECODE)
    assert prefill["arriving_tokens_per_s"] == pytest.approx(2400, rel=0.25)
    assert prefill["queued_tokens"] > 200 and prefill["queue_wait_s"] > 0.1, "more comes than is computed"
    assert prefill["first_token_s"] >= 0.1 and prefill["tokens_per_s"] > 100
    assert decode["running"] > 3 and decode["token_gap_s"] >= 0.02 and decode["pages_total"] == 1999
    assert prefill_signals([prefill]).ready == decode_signals([decode]).ready == 1


def test_a_decode_worker_without_room_says_so_and_is_no_reason_for_more_prefill() -> None:
    async def main() -> tuple[dict[str, float], dict[str, float]]:
        cluster = SimCluster(1, prefill=1, decode=1)
        await cluster.start()
        pool = cluster.alive["decode-0"].worker.pool
        held = pool.allocate(pool.reusable) or []
        stays = [
            cluster.spawn(cluster.generate(request_of(f"r{n}", prompt_of(Random(n), 100), SamplingParams(seed=0))))
            for n in range(8)
        ]
        await asyncio.sleep(3.0)
        said = [signals_of(cluster.alive[name].worker) for name in ("prefill-0", "decode-0")]
        for task in stays:
            task.cancel()
        await asyncio.gather(*stays, return_exceptions=True)
        pool.release_all(held)
        await cluster.close()
        return said[0], said[1]

    prefill, decode = run(main())
    assert decode["refused_grants_per_s"] > 0.5
    assert prefill["queued_tokens"] == 0
    assert decode_need(decode_signals([decode]), DecodeTarget()).workers > 1
    assert math.ceil(prefill_need(prefill_signals([prefill]), PrefillTarget()).workers) <= 1


def test_an_aggregated_worker_says_both() -> None:
    async def main() -> dict[str, float]:
        cluster = SimCluster(1, prefill=0, decode=0, aggregated=1, pages=2000, step_s=0.02)
        await cluster.start()
        params = SamplingParams(max_tokens=60, temperature=0.0, seed=0)
        for n in range(60):
            cluster.spawn(cluster.generate(request_of(f"r{n}", prompt_of(Random(n), 200), params)))
            await asyncio.sleep(1 / 12)
        said = signals_of(cluster.alive["worker-0"].worker)
        await cluster.close()
        return said

    said = run(main())
    assert set(said) == {*PREFILL, *DECODE}
    assert said["arriving_tokens_per_s"] == pytest.approx(2400, rel=0.25)
    assert said["running"] > 0 and said["queued_tokens"] > 0 and said["first_token_s"] > 0 and said["token_gap_s"] > 0
