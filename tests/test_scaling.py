"""The scaling of the tiers: pure decisions on synthetic signals, then a fluid model of each tier in a closed loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.scaling.decode import DecodeSignals, DecodeTarget, decode_need
from baton.scaling.prefill import PrefillSignals, PrefillTarget, prefill_need
from baton.scaling.steady import Bounds, Decision, Need, Steady, decide
from core.errors import ConfigError

IDLE = PrefillSignals(1, 0.0, 0, 0.0, 0.0, 1000.0)
QUIET = DecodeSignals(1, 0, 1000, 0, 0.0, 0.0)
BOUNDS = Bounds(1, 8)


def test_an_idle_tier_needs_nothing_and_keeps_its_least() -> None:
    for need in (prefill_need(IDLE, PrefillTarget()), decode_need(QUIET, DecodeTarget())):
        assert need.workers == 0
        assert decide(Steady(), need, 1, BOUNDS, 0.0)[1].desired == 1


@pytest.mark.parametrize(
    ("change", "least", "words"),
    [
        ({"arriving_tokens_per_s": 2400.0}, 3, "2400 tokens/s arrive"),
        ({"queued_tokens": 65000}, 4, "65000 wait and 64000 of them too long: 4.0 workers"),
        ({"queued_tokens": 65000, "tokens_per_s": 0.0}, 4, "at 800 tokens/s"),
        ({"queued_tokens": 4000, "arriving_tokens_per_s": 2400.0, "ready": 4}, 3, "0 of them too long"),
        ({"queue_wait_s": 5.0, "queued_tokens": 10, "ready": 3}, 4, "queue wait is 5.00 s"),
        ({"first_token_s": 5.0, "queue_wait_s": 1.5, "queued_tokens": 10, "ready": 3}, 4, "TTFT is 5.00 s"),
    ],
)
def test_prefill_asks_for_what_it_can_explain(change: dict[str, float], least: int, words: str) -> None:
    need = prefill_need(replace(IDLE, **change), PrefillTarget())
    assert math.ceil(need.workers) == least and words in need.reason


def test_a_wait_that_is_over_is_no_reason_for_more() -> None:
    """Percentiles look back: without a queue, the lateness is history."""
    assert prefill_need(replace(IDLE, queue_wait_s=9.0, first_token_s=9.0), PrefillTarget()).workers == 0


def test_long_prompts_are_no_reason_for_more() -> None:
    """More workers would not make a prompt shorter that nothing waits behind."""
    assert prefill_need(replace(IDLE, first_token_s=9.0, queued_tokens=900), PrefillTarget()).workers == 0


@pytest.mark.parametrize(
    ("change", "least", "words"),
    [
        ({"projected_pages": 2000}, 3, "2000 pages projected"),
        ({"running": 10, "token_gap_s": 0.15, "ready": 2}, 4, "ITL is 150 ms with 2 workers, against 100 ms"),
        ({"running": 10, "token_gap_s": 9.0, "ready": 2}, 4, "ITL is 9000 ms"),
        ({"refused_grants_per_s": 2.0, "ready": 2}, 3, "2.0 grants a second"),
    ],
)
def test_decode_asks_for_what_it_can_explain(change: dict[str, float], least: int, words: str) -> None:
    need = decode_need(replace(QUIET, **change), DecodeTarget())
    assert math.ceil(need.workers) == least and words in need.reason


def test_up_at_once_in_strides_down_late_and_one_at_a_time() -> None:
    state, count, now_s = Steady(), 1, 0.0
    seen = []
    for _ in range(4):
        state, decision = decide(state, Need(7.0, "much"), count, BOUNDS, now_s)
        seen.append(count := decision.desired)
        now_s += 1.0
    assert seen == [3, 6, 7, 7]
    lowered_s = []
    while count > 1 and now_s < 1000:
        state, decision = decide(state, Need(0.5, "little"), count, BOUNDS, now_s)
        if decision.desired < count:
            assert decision.desired == count - 1
            lowered_s.append(now_s)
            count = decision.desired
        now_s += 1.0
    assert lowered_s[0] == pytest.approx(3.0 + BOUNDS.window_s, abs=1.1)
    assert all(later - earlier >= BOUNDS.pause_s for earlier, later in pairwise(lowered_s))


def test_bounds_that_make_no_sense_are_refused() -> None:
    for least, most in ((0, 3), (4, 3)):
        with pytest.raises(ConfigError, match="min <= max"):
            Bounds(least, most)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.1, 30)), max_size=60), st.integers(1, 5), st.integers(0, 9))
def test_a_count_stays_in_bounds_and_never_falls_below_what_is_needed_now(
    needs: list[tuple[float, float]], least: int, more: int
) -> None:
    bounds = Bounds(least, least + more)
    state, count, now_s = Steady(), least, 0.0
    for workers, pause_s in needs:
        now_s += pause_s
        state, decision = decide(state, Need(workers, "x"), count, bounds, now_s)
        assert bounds.least <= decision.desired <= bounds.most
        assert decision.desired >= min(count, math.ceil(workers - bounds.slack), bounds.most)
        assert decision.desired >= count - 1 and decision.reason.startswith("x")
        count = decision.desired


# --- closed loops --------------------------------------------------------------------------------------------


@dataclass
class Course:
    """What a run showed."""

    counts: list[int]
    waits_s: list[float]
    worker_s: float

    @property
    def turns(self) -> int:
        """How often the count went down and then up again, or up and then down."""
        steps = [b - a for a, b in pairwise(self.counts) if b != a]
        return sum(one * other < 0 for one, other in pairwise(steps))


def prefill_run(
    arriving: Callable[[float], float], for_s: float, start_s: float = 5.0, period_s: float = 0.5
) -> Course:
    """A queue of tokens served by workers of 1000 tokens/s, which take `start_s` to start."""
    state, desired, queue, now_s = Steady(), 1, 0.0, 0.0
    ready_at = [0.0]
    course = Course([], [], 0.0)
    while now_s < for_s:
        ready = sum(at <= now_s for at in ready_at)
        served = min(queue + arriving(now_s) * period_s, ready * 1000.0 * period_s)
        queue += arriving(now_s) * period_s - served
        wait_s = queue / (ready * 1000.0)
        signals = PrefillSignals(ready, arriving(now_s), int(queue), wait_s, wait_s + 0.2, 1000.0)
        state, decision = decide(state, prefill_need(signals, PrefillTarget()), desired, BOUNDS, now_s)
        desired = decision.desired
        ready_at = sorted(ready_at)[:desired] + [now_s + start_s] * (desired - len(ready_at))
        course.counts.append(desired)
        course.waits_s.append(wait_s)
        course.worker_s += len(ready_at) * period_s
        now_s += period_s
    return course


def test_a_burst_is_answered_by_the_next_decision_and_ends_without_a_swing() -> None:
    course = prefill_run(lambda s: 4000.0 if 60 <= s < 120 else 200.0, 400)
    at = next(n for n, count in enumerate(course.counts) if count > 1) * 0.5
    assert at <= 61.0
    assert max(course.counts) >= 5 and course.counts[-1] == 1
    assert course.turns == 1, course.counts


def test_a_sine_is_followed_at_less_cost_than_its_peak() -> None:
    course = prefill_run(lambda s: 2500 + 2000 * math.sin(s / 120), 3000)
    late = sum(wait > 2.0 for wait in course.waits_s) / len(course.waits_s)
    assert late < 0.05
    assert course.worker_s < 0.9 * max(course.counts) * 3000
    assert course.turns <= 2 * 3000 / (2 * math.pi * 120) + 3, "a rise and a fall a period, and the start"


def test_a_steady_load_is_given_a_steady_count() -> None:
    course = prefill_run(lambda s: 2000.0, 600)
    settled = course.counts[400:]
    assert len(set(settled)) == 1 and settled[0] in (3, 4)


def test_a_need_at_the_edge_of_a_worker_does_not_flutter() -> None:
    state, count, seen = Steady(), 3, set()
    for n in range(400):
        need = Need(3.0 + 0.08 * math.sin(n), "edge")
        state, decision = decide(state, need, count, BOUNDS, n * 0.5)
        seen.add(count := decision.desired)
    assert seen == {3}


def test_a_decision_has_its_reason() -> None:
    _, decision = decide(Steady(), prefill_need(replace(IDLE, queued_tokens=81000), PrefillTarget()), 1, BOUNDS, 0.0)
    assert decision == Decision(
        3,
        "0 tokens/s arrive, 81000 wait and 80000 of them too long: 5.0 workers at 800 tokens/s;"
        " 5 are needed, no more than doubled at once",
    )


def test_nothing_is_given_up_before_a_whole_window_was_seen() -> None:
    """A controller that begins again knows no peak."""
    state, count = Steady(), 5
    for now_s in range(int(BOUNDS.window_s)):
        state, decision = decide(state, Need(1.0, "little"), count, BOUNDS, 700.0 + now_s)
        assert decision.desired == 5 and decision.reason == "little; 2 would do, but not yet for 120 s"
    _, decision = decide(state, Need(1.0, "little"), count, BOUNDS, 700.0 + BOUNDS.window_s)
    assert decision == Decision(4, "little; 2 were enough for 120 s")


def test_a_worker_is_given_up_only_when_something_of_one_is_left_over() -> None:
    for need, after in ((2.9, 3), (2.7, 3), (1.9, 3), (1.7, 2)):
        state, count = Steady(), 3
        for now_s in range(130):
            state, decision = decide(state, Need(need, "x"), count, BOUNDS, float(now_s))
            count = decision.desired
        assert count == after, need


def test_a_large_tier_is_not_moved_by_a_share_of_it() -> None:
    bounds = Bounds(1, 30)
    assert decide(Steady(), Need(10.9, "noise"), 10, bounds, 0.0)[1].desired == 10
    assert decide(Steady(), Need(11.1, "more"), 10, bounds, 0.0)[1].desired == 11


def test_of_two_reductions_the_second_waits() -> None:
    state = Steady(needs=(), lowered_s=500.0, since_s=0.0)
    assert decide(state, Need(1.0, "x"), 3, BOUNDS, 505.0)[1] == Decision(3, "x; one was given up just now")
    assert decide(state, Need(1.0, "x"), 3, BOUNDS, 510.0)[1].desired == 2


def test_who_starts_counts_as_there() -> None:
    """A queue that outlasts the start of a worker asks for no second one: `current` is what is wanted, not ready."""
    signals = replace(IDLE, queue_wait_s=6.0, queued_tokens=3000, ready=1)
    state, count = Steady(), 1
    for now_s in range(20):
        state, decision = decide(state, prefill_need(signals, PrefillTarget()), count, BOUNDS, float(now_s))
        count = decision.desired
    assert count == 2


def test_a_batch_too_large_asks_for_no_more_than_twice_as_many() -> None:
    need = decode_need(replace(QUIET, running=10, token_gap_s=9.0, ready=3), DecodeTarget())
    assert need.workers == 6


def test_what_is_promised_counts_before_it_runs() -> None:
    need = decode_need(replace(QUIET, projected_pages=3400), DecodeTarget())
    assert need == Need(4.0, "3400 pages projected: 4.0 workers of 850")
