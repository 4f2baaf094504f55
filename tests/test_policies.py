"""The two tiers' scheduling policies: pure functions of a snapshot."""

from __future__ import annotations

import pytest

from baton.tier import BothPolicies
from decode_service.policy import LONGEST_PAUSE_S, DecodePolicy, LocalBudget
from engine.policy import EngineView, SequenceView
from prefill_service.policy import PrefillPolicy


def sequence(number: int, **fields: object) -> SequenceView:
    """A prompt of 100 tokens that waits, unless told otherwise."""
    plain: dict[str, object] = {
        "sequence_id": number, "running": False, "decoding": False, "uncomputed_tokens": 100, "context_tokens": 100,
        "pages_missing": 7, "pages_held": 0, "priority": 0, "arrived_s": float(number), "deadline_s": 100.0 + number,
    }  # fmt: skip
    return SequenceView(**{**plain, **fields})  # type: ignore[arg-type]


def decoding(number: int, **fields: object) -> SequenceView:
    plain: dict[str, object] = {
        "running": True, "decoding": True, "uncomputed_tokens": 1, "pages_missing": 0, "pages_held": 7,
    }  # fmt: skip
    return sequence(number, **{**plain, **fields})


def view(*sequences: SequenceView, pages: int = 1000, **fields: object) -> EngineView:
    return EngineView(0.0, sequences, pages, 16, **fields)  # type: ignore[arg-type]


class TestPrefill:
    def test_one_prompt_after_the_other_within_the_budget(self) -> None:
        three = view(sequence(2), sequence(1), sequence(3))
        assert PrefillPolicy(step_tokens=80).plan(three).rows == ((1, 100),), "an end is not put off"
        assert PrefillPolicy(step_tokens=79).plan(three).rows == ((1, 79),)
        assert PrefillPolicy(step_tokens=200).plan(three).rows == ((1, 100),), "nor made to wait for others"
        assert PrefillPolicy(step_tokens=201).plan(three).rows == ((1, 100), (2, 100))
        assert PrefillPolicy(step_tokens=500).plan(three).rows == ((1, 100), (2, 100), (3, 100))

    def test_what_has_begun_goes_on_and_urgency_goes_first(self) -> None:
        begun = sequence(5, running=True, uncomputed_tokens=30, pages_missing=0)
        assert PrefillPolicy(64).plan(view(sequence(1), begun)).rows == ((5, 30), (1, 34))
        assert PrefillPolicy(60).plan(view(sequence(1), begun)).rows == ((5, 30),)
        urgent = sequence(9, priority=-1)
        assert PrefillPolicy(64).plan(view(sequence(1), begun, urgent)).rows == ((9, 64),)
        late = sequence(9, deadline_s=50.0)
        assert PrefillPolicy(64).plan(view(sequence(1), late)).rows == ((9, 64),)

    def test_nobody_overtakes_a_prompt_that_finds_no_room(self) -> None:
        assert PrefillPolicy(512).plan(view(sequence(1), sequence(2, pages_missing=1), pages=6)).rows == ()


class TestDecode:
    def test_everybody_who_runs_advances(self) -> None:
        plan = DecodePolicy(local=None).plan(view(*(decoding(i) for i in range(5)), sequence(9)))
        assert plan.rows == tuple((i, 1) for i in range(5))
        assert DecodePolicy(max_rows=2, local=None).plan(view(*(decoding(i) for i in range(5)))).rows == (
            (0, 1),
            (1, 1),
        )

    def test_the_youngest_of_the_least_urgent_gives_way(self) -> None:
        crowd = [decoding(i, pages_missing=1) for i in range(3)]
        assert DecodePolicy(local=None).plan(view(*crowd, pages=2)).preempt == (2,)
        crowd[0] = decoding(0, pages_missing=1, priority=5)
        assert DecodePolicy(local=None).plan(view(*crowd, pages=2)).preempt == (0,)
        alone = DecodePolicy(local=None).plan(view(decoding(1, pages_missing=1), pages=0))
        assert alone.preempt == (), "the last is never preempted"

    def test_local_prefill_draws_on_a_bucket_only_while_others_decode(self) -> None:
        policy = DecodePolicy(local=LocalBudget(tokens_per_s=10.0, burst_tokens=60, level_tokens=60.0))
        assert policy.plan(view(sequence(1))).rows == ((1, 100),), "nobody is disturbed"
        assert policy.plan(view(decoding(0), sequence(1))).rows == ((0, 1), (1, 60))
        assert policy.plan(view(decoding(0), sequence(1))).rows == ((0, 1),), "the bucket is empty"
        later = EngineView(2.0, (decoding(0), sequence(1)), 1000, 16)
        assert policy.plan(later).rows == ((0, 1), (1, 20))

    def test_local_prefill_leaves_a_page_of_growth_to_each_running_sequence(self) -> None:
        policy = DecodePolicy()
        assert policy.plan(view(decoding(0), decoding(1), sequence(2), pages=8)).rows == ((0, 1), (1, 1))
        assert policy.plan(view(decoding(0), decoding(1), sequence(2), pages=9)).rows[2:] == ((2, 100),)

    @pytest.mark.parametrize(
        ("step_s", "share", "waited_s", "pause_s"),
        [
            (0.1, 0.5, 0.4, 0.0),  # it has not waited for long
            (0.1, 0.5, 0.6, 0.1),
            (0.6, 0.5, 0.6, LONGEST_PAUSE_S),
            (1.8, 0.5, 0.6, 0.6),  # never less than a quarter of the time
            (0.1, 0.0, 0.6, 0.0),  # unless it was asked for
        ],
    )
    def test_a_prefill_that_has_waited_gets_its_share(
        self, step_s: float, share: float, waited_s: float, pause_s: float
    ) -> None:
        snapshot = view(decoding(0), step_s=step_s, peer_wait_s=waited_s)
        assert DecodePolicy(prefill_share=share).plan(snapshot).pause_s == pytest.approx(pause_s)

    def test_nobody_waits_for_an_idle_decode(self) -> None:
        assert DecodePolicy().plan(view(step_s=1.0, peer_wait_s=9.0)).pause_s == 0.0


def test_an_aggregated_worker_decodes_first_and_prefills_beside() -> None:
    both = BothPolicies(DecodePolicy(local=None), PrefillPolicy(64))
    assert both.plan(view(decoding(0), sequence(1), sequence(2))).rows == ((0, 1), (1, 64))
    crowd = [decoding(i, pages_missing=1) for i in range(3)]
    plan = both.plan(view(*crowd, sequence(9), pages=2))
    assert (plan.preempt, len(plan.rows)) == ((2,), 2), "no prompt is admitted while somebody has to give way"
