"""The router's pure parts: which workers are chosen, what an index says, what is emitted, how much may be retried."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.options import RouterOptions
from baton.router_process import terms_of
from core.messages import FinishReason, Load, PagesChanged, Role, Token, Tokens, WorkerId, WorkerInfo
from router.choose import Candidate, Loan, Need, Terms, choose
from router.index import PrefixIndex
from router.progress import Progress
from router.retries import PairHealth, RetryBudget
from router.threshold import LEAST_TOKENS, MOST_TOKENS, Threshold

RATE = 1000.0


def worker(name: str, role: Role, cached_tokens: int = 0, **load: object) -> Candidate:
    info = WorkerInfo(WorkerId(name, 1), role, "model", "layout", 16, 1000, 4096, name)
    return Candidate(info, Load(prefill_tokens_per_s=RATE, pages={"free": 900}, **load), cached_tokens)  # type: ignore[arg-type]


def names(placement: object) -> tuple[str | None, str | None]:
    prefill, decode = placement.prefill, placement.decode  # type: ignore[attr-defined]
    return (prefill.name if prefill else None), decode.name


P0, P1 = worker("p0", Role.PREFILL), worker("p1", Role.PREFILL, waiting_tokens=5000)
D0, D1 = worker("d0", Role.DECODE), worker("d1", Role.DECODE, running_requests=20)


class TestChoose:
    def test_long_prompts_go_to_the_least_loaded_pair(self) -> None:
        assert names(choose([P1, P0, D1, D0], Need(1000, 10), Terms())) == ("p0", "d0")

    def test_short_and_cached_prompts_stay_on_decode(self) -> None:
        assert names(choose([P0, D0], Need(127, 10), Terms())) == (None, "d0")
        assert names(choose([P0, D0], Need(128, 10), Terms())) == ("p0", "d0")
        cached = worker("d0", Role.DECODE, cached_tokens=960)
        assert names(choose([P0, cached], Need(1000, 10), Terms())) == (None, "d0")

    def test_a_cached_prefix_is_worth_a_queue(self) -> None:
        knows = worker("p1", Role.PREFILL, cached_tokens=900, waiting_tokens=500)
        assert names(choose([P0, knows, D0], Need(1000, 10), Terms())) == ("p1", "d0")

    def test_failed_shunned_and_draining_are_avoided(self) -> None:
        other = worker("p1", Role.PREFILL)
        need = Need(1000, 10, excluded=frozenset({P0.worker}))
        assert names(choose([P0, other, D0], need, Terms())) == ("p1", "d0")
        need = Need(1000, 10, shunned=frozenset({(P0.worker, D0.worker)}))
        assert names(choose([P0, other, D0], need, Terms())) == ("p1", "d0")
        draining = worker("d0", Role.DECODE, draining=True)
        assert names(choose([P0, draining, D1], Need(1000, 10), Terms())) == ("p0", "d1")

    def test_nobody_is_none(self) -> None:
        assert choose([], Need(10, 10), Terms()) is None
        assert choose([D0], Need(1000, 10), Terms()) is None, "a long prompt waits for a prefill worker"
        assert choose([P0], Need(10, 10), Terms()) is None

    def test_what_was_sent_since_the_last_report_counts(self) -> None:
        busy = Candidate(P0.info, P0.load, 0, unreported_tokens=4000)
        idle = worker("p9", Role.PREFILL, waiting_tokens=100)
        assert names(choose([busy, idle, D0], Need(1000, 10), Terms())) == ("p9", "d0")

    def test_a_full_pool_is_the_last_resort(self) -> None:
        full = Candidate(D0.info, Load(prefill_tokens_per_s=RATE, pages={"owned": 1000}), 0)
        assert names(choose([P0, full, D1], Need(1000, 10), Terms())) == ("p0", "d1")

    def test_aggregated_workers_need_no_pair(self) -> None:
        one, other = worker("w0", Role.AGGREGATED, waiting_tokens=900), worker("w1", Role.AGGREGATED)
        assert names(choose([one, other], Need(1000, 10), Terms())) == (None, "w1")

    def test_what_prefill_lacks_is_fetched_where_that_is_quicker(self) -> None:
        d0 = worker("d0", Role.DECODE, cached_tokens=816)
        placement = choose([P0, d0, D1], Need(1500, 10), Terms())
        assert placement is not None
        assert names(placement) == ("p0", "d0"), "and it need not be sent the history"
        assert placement.loan == Loan(d0.worker, 816)
        assert placement.cost_s < 0.75, "684 tokens are computed"

    def test_a_lender_need_not_decode(self) -> None:
        d0 = worker("d0", Role.DECODE, cached_tokens=816, running_requests=200)
        placement = choose([P0, d0, D1], Need(1500, 10), Terms())
        assert placement is not None
        assert (names(placement), placement.loan) == (("p0", "d1"), Loan(d0.worker, 816))

    def test_a_prompt_that_is_cached_whole_is_lent_but_for_its_last_page(self) -> None:
        d0 = worker("d0", Role.DECODE, cached_tokens=1023)  # all of it: one token is computed, for its logits
        placement = choose([P0, d0], Need(1024, 10, local_refused=True), Terms())
        assert placement is not None and placement.loan == Loan(d0.worker, 1008)

    @pytest.mark.parametrize(
        ("cached_p", "cached_d", "terms"),
        [
            (0, 96, Terms()),  # less than is worth it
            (720, 816, Terms()),  # prefill has most of it
            (0, 816, Terms(lend_tokens=None)),  # switched off
            (0, 816, Terms(transfer_tokens_per_s=1500.0)),  # slower than half of what computing takes
            (0, 816, Terms(loan_s=0.5)),
        ],
    )
    def test_what_is_not_worth_a_loan_is_computed(self, cached_p: int, cached_d: int, terms: Terms) -> None:
        p0 = worker("p0", Role.PREFILL, cached_tokens=cached_p)
        d0 = worker("d0", Role.DECODE, cached_tokens=cached_d)
        placement = choose([p0, d0], Need(1500, 10), terms)
        assert placement is not None and placement.loan is None

    def test_operators_switch_lending_off(self) -> None:
        options = RouterOptions(model="m", workers="", local_prefill="64")
        assert terms_of(options) == Terms(local_prefill_tokens=64)
        assert terms_of(replace(options, lend="off", local_prefill="auto")) == Terms(lend_tokens=None)

    def test_nobody_borrows_from_a_worker_that_has_failed_it(self) -> None:
        d0, d1 = worker("d0", Role.DECODE, cached_tokens=816), worker("d1", Role.DECODE)
        for need in (
            Need(1500, 10, excluded=frozenset({d0.worker})),
            Need(1500, 10, shunned=frozenset({(P0.worker, d0.worker)})),
        ):
            placement = choose([P0, d0, d1], need, Terms())
            assert placement is not None and (names(placement), placement.loan) == (("p0", "d1"), None)

    def test_local_prefill_and_aggregated_workers_borrow_nothing(self) -> None:
        local = choose([P0, worker("d0", Role.DECODE, cached_tokens=960)], Need(1000, 10), Terms())
        lender = worker("d0", Role.DECODE, cached_tokens=816)
        alone = choose([worker("w0", Role.AGGREGATED), lender], Need(1500, 10), Terms())
        assert local is not None and (local.prefill, local.loan) == (None, None)
        assert alone is not None and (alone.prefill, alone.loan) == (None, None)


class TestThreshold:
    def test_auto_measures_what_a_handoff_costs(self) -> None:
        threshold = Threshold(Terms(), auto=True)
        assert threshold.terms().local_prefill_tokens == 128, "until something is measured"
        for _ in range(100):
            threshold.observe(first_token_s=1.3, queue_s=0.0, computed_tokens=1000, rate=RATE)
        assert threshold.terms().local_prefill_tokens == 300

    def test_auto_stays_within_bounds(self) -> None:
        for took_s, bound in ((0.5, LEAST_TOKENS), (1000.0, MOST_TOKENS)):
            threshold = Threshold(Terms(), auto=True)
            threshold.observe(first_token_s=took_s, queue_s=0.0, computed_tokens=1000, rate=RATE)
            assert threshold.terms().local_prefill_tokens == bound

    def test_a_configured_number_stands(self) -> None:
        threshold = Threshold(Terms(local_prefill_tokens=77))
        threshold.observe(first_token_s=5.0, queue_s=0.0, computed_tokens=10, rate=RATE)
        assert threshold.terms().local_prefill_tokens == 77


BLOCKS = [bytes([i]) * 16 for i in range(20)]


class TestIndex:
    def test_a_gap_degrades_until_a_snapshot(self) -> None:
        index = PrefixIndex()
        assert index.apply(PagesChanged(0, (), snapshot=True))
        assert index.apply(PagesChanged(1, tuple(BLOCKS[:3])))
        assert not index.apply(PagesChanged(3, tuple(BLOCKS[3:5])))
        assert index.degraded
        assert index.match(BLOCKS) == 3
        assert index.apply(PagesChanged(4, tuple(BLOCKS[:5]), snapshot=True))
        assert (index.degraded, index.match(BLOCKS)) == (False, 5)

    @given(st.lists(st.tuples(st.sets(st.sampled_from(BLOCKS)), st.sets(st.sampled_from(BLOCKS)))))
    def test_it_holds_what_was_stored_and_not_removed(self, changes: list[tuple[set[bytes], set[bytes]]]) -> None:
        index, held = PrefixIndex(), set[bytes]()
        index.apply(PagesChanged(0, (), snapshot=True))
        for number, (stored, removed) in enumerate(changes, 1):
            index.apply(PagesChanged(number, tuple(stored), tuple(removed)))
            held = (held | stored) - removed
        present = [block in held for block in BLOCKS]
        assert index.match(BLOCKS) == (present.index(False) if False in present else len(BLOCKS))


class TestProgress:
    @given(st.permutations(list(range(8))), st.integers(0, 7))
    def test_each_index_once_and_in_order(self, order: list[int], repeat: int) -> None:
        """Messages in any order, repeated; what a resumed session brings again fills the gaps."""
        progress, emitted = Progress(1, 8), []
        tokens = [Token(0, i, 100 + i, finish=FinishReason.LENGTH if i == 7 else None) for i in range(8)]
        for i in [*order, *order[repeat:], *range(8)]:
            emitted += progress.accept(Tokens("r", 1, (tokens[i],)))
        assert [token.token_id for token in emitted] == [100 + i for i in range(8)]
        assert progress.is_done

    def test_nothing_follows_a_finish(self) -> None:
        progress = Progress(2, 10)
        progress.finish(0)
        fresh = progress.accept(Tokens("r", 1, (Token(0, 0, 5), Token(1, 0, 6), Token(7, 0, 1))))
        assert [token.choice for token in fresh] == [1]
        assert (progress.finished, progress.next_index(), progress.is_done) == ((0,), [0, 1], False)


class TestRetries:
    def test_retries_are_a_fifth_of_the_load(self) -> None:
        budget = RetryBudget(level=0.0)
        for _ in range(100):
            budget.offered()
        assert sum(budget.take() for _ in range(100)) in (19, 20)

    def test_the_budget_is_shared_and_bounded(self) -> None:
        """At most a fifth of what was offered, beside a few in reserve; a long calm saves up no storm."""
        budget = RetryBudget()
        reserve = sum(budget.take() for _ in range(1000))
        for _ in range(5000):
            budget.offered()
        assert reserve == 10 and sum(budget.take() for _ in range(1000)) == 100

    def test_a_pair_is_shunned_for_a_while(self) -> None:
        health, pair, other = PairHealth(shun_s=10.0, failures=2), (P0.worker, D0.worker), (P1.worker, D0.worker)
        health.failed(pair, 0.0)
        health.failed(other, 0.0)
        assert health.shunned(0.1) == frozenset()
        health.failed(pair, 1.0)
        assert health.shunned(1.1) == {pair} == health.shunned(10.9), "the pair, not its workers"
        assert health.shunned(11.1) == frozenset()

    def test_two_failures_far_apart_are_no_pattern(self) -> None:
        health, pair = PairHealth(shun_s=10.0, failures=2), (P0.worker, D0.worker)
        for at in (0.0, 11.0, 22.0):
            health.failed(pair, at)
            assert health.shunned(at) == frozenset()

    def test_one_request_tries_a_shunned_pair_and_its_end_decides(self) -> None:
        health, pair = PairHealth(shun_s=10.0, failures=2, trial_s=30.0), (P0.worker, D0.worker)
        health.failed(pair, 0.0)
        health.failed(pair, 0.0)
        health.failed(pair, 5.0)  # it was on its way
        assert health.shunned(10.1) == frozenset()
        health.tried(pair, 10.1)
        assert health.shunned(10.2) == {pair}, "others keep away until the trial has ended"
        health.failed(pair, 12.0)
        assert health.shunned(31.9) == {pair} and health.shunned(32.1) == frozenset(), "twice as long"
        health.tried(pair, 33.0)
        assert health.shunned(62.0) == {pair} and health.shunned(63.1) == frozenset(), "a trial that never ended"
        health.tried(pair, 64.0)
        health.worked(pair)
        assert health.shunned(64.1) == frozenset()
        health.failed(pair, 65.0)
        assert health.shunned(65.1) == frozenset(), "as good as any"

    def test_a_pair_that_never_works_is_tried_again_and_again(self) -> None:
        health, pair, now_s, waits_s = PairHealth(), (P0.worker, D0.worker), 0.0, []
        health.failed(pair, now_s)
        for _ in range(8):
            health.failed(pair, now_s)
            began_s = now_s
            while health.shunned(now_s):
                now_s += 1.0
            waits_s.append(now_s - began_s)
            health.tried(pair, now_s)
        assert waits_s == [10.0, 20.0, 40.0, 80.0, 80.0, 80.0, 80.0, 80.0]
