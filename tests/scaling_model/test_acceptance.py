"""What the scaling policies have to reach over the model of a fleet, in virtual time.

Against the peak-sized fleet: nearly as many requests served well, in clearly fewer worker-hours. Against the mean-sized
one and one policy for both tiers: more of them. And no swings.
"""

from __future__ import annotations

from functools import cache

import pytest

from bench.scaling.__main__ import main
from bench.scaling.contest import Row, run
from bench.scaling.judge import steps_of
from bench.scaling.machine import Machine, Slo
from bench.scaling.traffic import Traffic, workloads

MACHINE, SLO = Machine(), Slo()
BURSTS_S = (600.0, 1200.0)


@cache
def traffic(name: str) -> Traffic:
    return next(t for t in workloads() if t.name == name)


@cache
def row(name: str, contender: str) -> Row:
    return run(traffic(name), contender, MACHINE, SLO)


@pytest.mark.parametrize(("name", "hours"), [("sine", 0.75), ("shift", 0.85), ("ramp", 0.9)])
def test_nearly_what_the_peak_sized_fleet_serves_in_fewer_worker_hours(name: str, hours: float) -> None:
    own, peak = row(name, "Baton").verdict, row(name, "peak-sized").verdict
    assert own.attainment >= peak.attainment - 0.02
    assert own.worker_hours <= hours * peak.worker_hours


@pytest.mark.parametrize("name", ["burst", "sine", "shift", "noise"])
def test_more_than_the_mean_sized_fleet_serves(name: str) -> None:
    own, mean = row(name, "Baton").verdict, row(name, "mean-sized").verdict
    assert own.attainment > mean.attainment + 0.005


@pytest.mark.parametrize(("name", "fewer"), [("sine", 1.0), ("shift", 0.7)])
def test_what_one_policy_for_both_tiers_serves_takes_more_workers(name: str, fewer: float) -> None:
    """Set so that it serves as many requests well as it can. Both tiers grow and shrink with the sine."""
    own, lavish = row(name, "Baton").verdict, row(name, "one policy, lavish").verdict
    assert own.attainment >= lavish.attainment
    assert own.worker_hours <= fewer * lavish.worker_hours


def test_one_policy_for_both_tiers_with_as_many_workers_serves_less() -> None:
    """Over the three workloads together, since it has one setting for all; its total is within a tenth of ours."""
    names = ("burst", "sine", "shift")
    own = [row(name, "Baton").verdict for name in names]
    frugal = [row(name, "one policy, frugal").verdict for name in names]
    total = sum(v.worker_hours for v in own)
    assert sum(v.worker_hours for v in frugal) == pytest.approx(total, rel=0.1)
    weights = [len(traffic(name).arrivals) for name in names]
    served = [sum(v.attainment * n for v, n in zip(vs, weights, strict=True)) / sum(weights) for vs in (own, frugal)]
    assert served[0] > served[1] + 0.1
    assert own[2].attainment > frugal[2].attainment + 0.1 and own[2].worker_hours < frugal[2].worker_hours, "the shift"


def test_a_burst_is_answered_within_five_seconds_and_over_before_it_ends() -> None:
    """What comes while the first new workers start cannot be served in time; what comes afterwards is."""
    course = row("burst", "Baton").course
    for began_s in BURSTS_S:
        for tier in (0, 1):
            ups = [at_s for at_s, by in steps_of(course, tier) if by > 0 and at_s >= began_s]
            grown = [m.seen.desired[tier] for m in course.moments if m.seen.now_s <= began_s][-1]
            assert (ups and ups[0] <= began_s + 5.0) or grown > 1, "unless the last burst's workers are still there"
        late = [
            job
            for job in course.jobs
            if began_s + MACHINE.start_s + 30 <= job.arrival.at_s < began_s + 120 and (job.first_token_s or 99) > 2.0
        ]
        assert not late


@pytest.mark.parametrize("name", ["burst", "sine", "shift", "ramp", "noise", "idle"])
def test_nothing_swings(name: str) -> None:
    own = row(name, "Baton").verdict
    assert own.swings == 0
    assert own.taken_back <= 1
    assert own.decisions_per_h <= 150


def test_an_idle_fleet_is_left_at_its_least_and_serves() -> None:
    own = row("idle", "Baton")
    assert own.verdict.attainment == 1.0 and own.verdict.decisions_per_h == 0
    assert own.verdict.worker_hours == pytest.approx(1.0, abs=0.01)


def test_tiers_follow_their_own_signals() -> None:
    """While prompts are long the prefill tier is the larger one; then it shrinks, and decode has grown."""
    course = row("shift", "Baton").course
    before, after = (next(m.seen.desired for m in course.moments if m.seen.now_s >= at_s) for at_s in (780, 1500))
    assert before[0] >= before[1] + 2
    assert after[0] < before[0] and after[1] > before[1]


def test_every_change_of_size_has_its_reason() -> None:
    for name in ("burst", "shift"):
        for moment in row(name, "Baton").course.moments:
            for decision, desired in zip(moment.decisions, moment.seen.desired, strict=True):
                if decision.desired > desired:
                    words = ("tokens/s arrive", "pages projected", "ITL is", "grants a second", "queue wait is")
                    assert any(word in decision.reason for word in words)
                if decision.desired < desired:
                    assert "were enough for 120 s" in decision.reason


def test_the_command_prints_a_row_for_each_and_draws(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    picture, rows = tmp_path / "p.svg", tmp_path / "rows.json"
    assert main(["--only", "idle", "--picture", "idle", "--plot", str(picture), "--json", str(rows)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + 5 and printed[4].startswith("| idle | Baton | 1 + 1 | 100.0% |")
    assert picture.read_text().count("<polyline") == 4
    assert rows.read_text().count('"attainment"') == 5
    assert main(["--only", "none", "--trace", str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err
