"""The model of a fleet does what a fleet does: it loses nothing, keeps to its pages, and takes its time to start."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from baton.scaling.steady import Decision
from bench.scaling.contest import run
from bench.scaling.deciders import Fixed
from bench.scaling.fleet import Course, Fleet, Seen
from bench.scaling.judge import judge, swings, taken_back
from bench.scaling.machine import Machine, Slo
from bench.scaling.traffic import Arrival, Mix, Traffic, made, recorded, workloads

MACHINE, SLO = Machine(), Slo()


def fixed(traffic: Traffic, sizes: tuple[int, int], machine: Machine = MACHINE) -> Course:
    return Fleet(machine, Fixed(sizes), sizes).run(traffic)


@dataclass
class Scripted:
    """(from when, sizes), in order."""

    script: list[tuple[float, tuple[int, int]]]
    seen: list[Seen] = field(default_factory=list)

    def decide(self, seen: Seen) -> tuple[Decision, Decision]:
        self.seen.append(seen)
        sizes = [sizes for at_s, sizes in self.script if at_s <= seen.now_s][-1]
        return Decision(sizes[0], ""), Decision(sizes[1], "")


def test_one_request_takes_what_its_parts_take() -> None:
    course = fixed(Traffic("one", "", 30.0, (Arrival(1.0, 4000, 101),)), (1, 1))
    (job,) = course.jobs
    assert job.first_token_s == pytest.approx(MACHINE.prefill_s(4000))
    assert job.ended_s is not None and job.first_token_s is not None
    decoding_s = job.ended_s - 1.0 - job.first_token_s - MACHINE.handoff_s
    assert decoding_s == pytest.approx(100 * MACHINE.step_s(1, 4050), rel=0.01)
    assert judge(course, MACHINE, SLO).attainment == 1.0
    assert course.worker_s == (30.0, 30.0)


def test_the_same_seed_is_the_same_run_and_another_is_not() -> None:
    one, same = (workloads(3)[4] for _ in range(2))
    assert one == same and one != workloads(4)[4]
    runs = [judge(run(one, "Baton", MACHINE, SLO).course, MACHINE, SLO) for _ in range(2)]
    assert runs[0] == runs[1]


def test_every_request_ends_however_often_workers_come_and_go() -> None:
    traffic = made("churn", "", 300.0, lambda s: Mix(6.0, 4000, 300), 1)
    script = [(0.0, (3, 2)), (40.0, (2, 4)), (60.0, (5, 1)), (90.0, (2, 2)), (95.0, (6, 3)), (200.0, (3, 1))]
    course = Fleet(MACHINE, Scripted(script), (3, 2)).run(traffic)
    assert len(course.jobs) + course.refused == len(traffic.arrivals)
    assert all(job.ended_s is not None for job in course.jobs)


def test_a_worker_takes_its_time_to_start_and_one_that_drains_finishes_first() -> None:
    script = [(0.0, (1, 1)), (10.0, (2, 2)), (40.0, (1, 1))]
    decider = Scripted(script)
    course = Fleet(MACHINE, decider, (1, 1)).run(Traffic("", "", 60.0, (Arrival(39.0, 1000, 300),) * 2))
    ready = {seen.now_s: (seen.prefill.ready, seen.decode.ready) for seen in decider.seen}
    assert ready[29.0] == (1, 1) and ready[31.0] == (2, 2) and ready[42.0] == (1, 1)
    assert course.worker_s[0] == pytest.approx(60 + 30, abs=0.1)
    assert 60 + 30 + 0.5 < course.worker_s[1] < 60 + 30 + 5, "its sequence had to end"


def test_pages_are_not_given_out_twice_and_grants_are_refused_without_room() -> None:
    """Two sequences fit and growth with them; eight are asked for at once."""
    machine = replace(MACHINE, pages=600)
    decider = Scripted([(0.0, (4, 1))])
    burst = tuple(Arrival(1.0, 4000, 1000) for _ in range(8))
    course = Fleet(machine, decider, (4, 1)).run(Traffic("", "", 300.0, burst))
    assert all(job.ended_s is not None for job in course.jobs)
    assert max(seen.decode.running for seen in decider.seen) == 2
    refused = [seen.decode.refused_grants_per_s for seen in decider.seen]
    assert refused[3] > 1.0 and refused[-1] == 0.0
    assert decider.seen[1].decode.projected_pages > 600, "what is promised counts"
    assert decider.seen[3].prefill.queued_tokens == 0, "what has no room at a decode worker is none of prefill's queue"


def test_swings_are_counted() -> None:
    steps = [(0.0, 2), (30.0, -1), (120.0, -1), (150.0, 1), (400.0, -1)]
    assert (swings(steps), taken_back(steps)) == (1, 1)


def test_recorded_traffic_is_read_in_both_formats(tmp_path: Path) -> None:
    table = tmp_path / "a.csv.gz"
    with gzip.open(table, "wt") as file:
        file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n")
        file.write("2023-11-16 18:15:48.1805900,396,109\n")
    assert recorded(table, 1).arrivals == (Arrival(0.0, 374, 44), Arrival(pytest.approx(1.5), 396, 109))  # type: ignore[arg-type]
    lines = tmp_path / "b.jsonl"
    rows = [{"timestamp": n * 500, "input_length": 10, "output_length": 0, "hash_ids": []} for n in range(3)]
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    assert recorded(lines, 1).arrivals[2] == Arrival(1.0, 10, 1)
    thrice = recorded(lines, 3)
    assert len(thrice.arrivals) == 9 and list(thrice.arrivals) == sorted(thrice.arrivals, key=lambda a: a.at_s)


@pytest.mark.parametrize(("name", "text"), [("x.txt", "1,2"), ("x.csv", ""), ("x.jsonl", "{")])
def test_what_is_no_trace_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"neither|no request|Expecting"):
        recorded(tmp_path / name, 1)
