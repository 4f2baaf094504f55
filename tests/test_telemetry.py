"""What workers count of hand-offs, and how long a cancelled attempt keeps its pages."""

from prometheus_client.parser import text_string_to_metric_families

from core.errors import Cancelled, StalePage
from core.messages import PathReport, Receipt, WorkerId
from core.telemetry.pair_metrics import MAX_PEERS, OTHERS
from core.telemetry.reclaim import LIMIT, Reclaims
from core.telemetry.worker_metrics import WorkerMetrics

KEY = ("r", 1)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def samples(metrics: WorkerMetrics, name: str) -> dict[tuple[str, ...], float]:
    """By the values of its own labels."""
    return {
        tuple(v for label, v in sorted(sample.labels.items()) if label not in ("model_name", "engine")): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
        if sample.name == name
    }


def test_the_time_to_reclaim_ends_with_the_last_holder() -> None:
    clock, seen = Clock(), []
    reclaims = Reclaims(clock, seen.append)
    pages = [7]
    reclaims.cancelled(KEY)
    reclaims.hold(KEY)  # a lease
    reclaims.hold_until(KEY, lambda: not pages)  # a step
    reclaims.let_go(KEY)
    clock.now_s += 0.25
    reclaims.stepped()
    assert seen == [], "the step that ended was another one"
    pages.clear()
    reclaims.stepped()
    assert seen == [], "the lease is left"
    clock.now_s += 0.5
    reclaims.let_go(KEY)
    assert seen == [0.75]
    reclaims.stepped()
    reclaims.let_go(KEY)
    assert seen == [0.75], "it ended once"


def test_what_nobody_holds_back_is_reclaimed_at_once_and_what_nobody_cancelled_is_not_timed() -> None:
    clock, seen = Clock(), []
    reclaims = Reclaims(clock, seen.append)
    reclaims.hold(("other", 1))  # aborted for another reason
    reclaims.let_go(("other", 1))
    assert seen == []
    reclaims.cancelled(KEY)
    reclaims.hold_until(KEY, lambda: True)
    reclaims.let_go(KEY)
    assert seen == [0.0]


def test_the_table_of_the_cancelled_is_bounded() -> None:
    seen: list[float] = []
    reclaims = Reclaims(Clock(), seen.append)
    for number in range(LIMIT + 10):
        reclaims.cancelled((f"r{number}", 1))
    for number in range(LIMIT + 10):
        reclaims.let_go((f"r{number}", 1))
    assert len(seen) == LIMIT


def test_the_ends_of_a_hand_off_are_told_apart() -> None:
    metrics = WorkerMetrics("m", "w", Clock())
    source, receiver = metrics.handoffs.end("source"), metrics.handoffs.end("receiver")
    for end in (source, receiver):
        end.moved(None, "queued", 0.0)
        end.moved("queued", "granted", 0.5)
    source.moved("granted", "aborted", 2.0)
    source.ended("d", "aborted", "cancelled")
    source.expired("granted")
    assert samples(metrics, "baton:handoffs_total")[("source", "aborted")] == 1
    assert samples(metrics, "baton:handoffs_total")[("receiver", "aborted")] == 0
    in_flight = samples(metrics, "baton:handoffs_in_flight")
    assert {key for key, count in in_flight.items() if count} == {("receiver", "granted")}
    assert samples(metrics, "baton:handoff_deadlines_total")[("source", "granted")] == 1
    assert samples(metrics, "baton:handoff_state_seconds_sum")[("source", "granted")] == 2.0


def test_a_receipt_is_what_the_transfer_metrics_show() -> None:
    metrics = WorkerMetrics("m", "w", Clock())
    metrics.handoffs.taken(
        Receipt(transferred_bytes=800, hidden_bytes=600, transfer_s=0.5, exposed_transfer_s=0.25, transferred_tokens=9)
    )
    metrics.handoffs.taken(Receipt())  # all of it was here already
    assert samples(metrics, "baton:transferred_bytes_total")[()] == 800
    assert samples(metrics, "baton:hidden_bytes_total")[()] == 600
    assert samples(metrics, "baton:transfer_overlap_ratio_sum")[()] == 0.75
    assert samples(metrics, "baton:transfer_overlap_ratio_count")[()] == 1
    assert samples(metrics, "baton:exposed_transfer_seconds_sum")[()] == 0.25
    metrics.reclaims.cancelled(KEY)
    metrics.reclaims.let_go(KEY)
    assert samples(metrics, "baton:cancel_to_reclaim_seconds_count")[()] == 1


def test_a_pair_is_there_from_when_it_is_met_and_only_the_taking_end_counts_it() -> None:
    metrics = WorkerMetrics("m", "d", Clock())
    receiver, lender = metrics.handoffs.end("receiver"), metrics.handoffs.end("lender")
    for end in (receiver, lender):
        end.met("p")
    pairs = samples(metrics, "baton:pair_handoffs_total")
    assert pairs == {("receiver", outcome, "p"): 0 for outcome in ("committed", "cancelled", "failed")}
    assert set(samples(metrics, "baton:handoff_faults_total").values()) == {0}
    receiver.ended("p", "committed", "")
    receiver.ended("p", "aborted", Cancelled.code)
    receiver.ended("p", "aborted", StalePage.code)
    lender.ended("p", "aborted", StalePage.code)
    assert set(samples(metrics, "baton:pair_handoffs_total").values()) == {1}
    receiver.fault("p", StalePage.code)
    assert samples(metrics, "baton:handoff_faults_total")[(StalePage.code, "p")] == 1


def test_pairs_are_bounded() -> None:
    metrics = WorkerMetrics("m", "d", Clock())
    receiver = metrics.handoffs.end("receiver")
    for number in range(2 * MAX_PEERS):
        receiver.met(f"p{number}")
        receiver.ended(f"p{number}", "committed", "")
    pairs = samples(metrics, "baton:pair_handoffs_total")
    assert len(pairs) == 3 * (MAX_PEERS + 1) and pairs[("receiver", "committed", OTHERS)] == MAX_PEERS


def test_a_path_that_is_not_the_best_is_shown_until_it_is() -> None:
    metrics, peer = WorkerMetrics("m", "d", Clock()), WorkerId("p", 1)
    metrics.paths.show([PathReport(peer, "grpc", "", 1.0, 1.0, 0.0, "shm failed: no room")])
    assert samples(metrics, "baton:path_degraded") == {("p", "grpc"): 1}
    metrics.paths.show([PathReport(peer, "", "", 0.0, 0.0, 0.0, "no path; shm: not met")])
    assert samples(metrics, "baton:path_degraded") == {("p", "none"): 1}
    metrics.paths.show([PathReport(peer, "shm", "", 1.0, 1.0, 0.0, "")])
    assert samples(metrics, "baton:path_degraded") == {("p", "shm"): 0}


def test_a_worker_says_its_role() -> None:
    metrics = WorkerMetrics("m", "d", Clock())
    metrics.role("decode")
    assert samples(metrics, "baton:worker_info") == {("decode",): 1}
