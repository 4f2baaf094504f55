"""`baton doctor transport`: what it finds wrong, what it prints, how a cluster is surveyed, and how it ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import pytest
from router_front import front, on_socket, say, tiny_tokenizer

from baton import __main__ as cli
from baton import doctor
from baton.doctor_judgement import TCP, Finding, judge
from core.errors import BadTicket, QueueFull, WorkerLost
from core.messages import PathReport, Peer, Role, WorkerId, WorkerInfo
from core.security.gate import Gate
from core.security.tickets import Tickets
from router.path_survey import PairPath, PathReply, PathSurvey
from router.permits import Permits

GOOD = PairPath("p", "d", "ucx", "rc_mlx5/mlx5_0:1", 2e10, 2e-5, 0.1)
SHM = PairPath("p", "d", "shm", "", 5e9, 4e-5, 0.1)


def findings(*rows: PairPath) -> list[Finding]:
    return judge(PathReply(rows))


# --- the judgement ---------------------------------------------------------------------------------------------


def test_a_good_cluster_has_no_findings() -> None:
    assert findings(GOOD, SHM, replace(GOOD, source="d", receiver="p", needed=False)) == []
    assert findings(SHM, PairPath("d", "p", needed=False)) == [], "a path back that nobody needs"


@pytest.mark.parametrize(
    "trouble,advice",
    [
        ("expected shm, got ucx; shm cannot be used: the workers are in different network namespaces of one", "pod"),
        ("shm cannot be used: the workers belong to different users (0 here, 1 there)", "same user"),
        ("expected shm, got ucx; the workers are on different machines", "one machine"),
        ("expected ucx over rc, got tcp/eth0", "ucx_info -d"),
        ("no path; ucx: the pattern of p@7 arrived with other bytes", "failing memory"),
        ("no session with d at unix:/tmp/d within 5 s; the log of either worker says why", "firewalls"),
        ("no path; shm: the peer does not have it", "same --transport"),
        ("shm failed: p@7 is gone", "log"),
        ("d did not tell its paths: no ticket", "--ticket-key-file"),
    ],
)
def test_each_trouble_has_its_advice(trouble: str, advice: str) -> None:
    (finding,) = findings(replace(GOOD, trouble=trouble))
    assert finding.wrong and finding.what == trouble and finding.where == ("p -> d",)
    assert advice in finding.advice


def test_a_pair_that_was_not_proved_is_wrong() -> None:
    (finding,) = findings(PairPath("p", "d"))
    assert finding.wrong and finding.what == "no path was proved"


@pytest.mark.parametrize("lanes,alone", [("tcp/eth0", True), ("tcp/eth0, tcp/lo", True), ("rc/mlx5, tcp/eth0", False)])
def test_tcp_alone_is_a_hint_and_said_once(lanes: str, alone: bool) -> None:
    found = findings(replace(GOOD, lanes=lanes), replace(GOOD, lanes=lanes, receiver="d2"))
    assert [finding.what for finding in found] == [TCP] * alone
    assert all(not finding.wrong and finding.where == ("p -> d", "p -> d2") for finding in found)


def test_one_path_ten_times_slower_than_the_others_is_wrong() -> None:
    others = [replace(GOOD, receiver=f"d{n}") for n in range(3)]
    (finding,) = findings(*others, replace(GOOD, bytes_per_s=2e9), SHM)
    assert finding.wrong and finding.where == ("p -> d",)
    assert finding.what == "10 times slower than the median of the ucx paths"
    (finding,) = findings(*others, replace(GOOD, latency_s=0.01))
    assert finding.wrong and "times the median latency" in finding.what
    assert findings(*others, replace(GOOD, latency_s=0.0009), replace(GOOD, bytes_per_s=5e9)) == []
    assert findings(GOOD, replace(GOOD, bytes_per_s=2e9)) == [], "two have no median"


def test_workers_that_do_not_answer_are_named_before_all() -> None:
    found = judge(PathReply((replace(GOOD, trouble="bad"),), ("d2", "p9")))
    assert found[0].where == ("d2", "p9") and found[0].wrong and len(found) == 2
    (hint,) = judge(PathReply())
    assert not hint.wrong and "no pair" in hint.what


# --- what is printed -------------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_each_path() -> None:
    unused, none = PairPath("d", "p", needed=False), PairPath("p", "x")
    lines = doctor.table((GOOD, replace(SHM, receiver="decode-10"), unused, none))
    assert lines == [
        "FROM  TO         PATH    BANDWIDTH   PAGE   LANES",
        "p     d          ucx     20.00 GB/s  20 us  rc_mlx5/mlx5_0:1",
        "p     decode-10  shm     5.00 GB/s   40 us  -",
        "d     p          unused  -           -      -",
        "p     x          none    -           -      -",
    ]


def test_what_is_wrong_is_said_with_what_to_do() -> None:
    assert doctor.said([]) == ["", "every path is as it should be"]
    lines = doctor.said([Finding(True, ("p -> d",), "slow", "look"), Finding(False, (), "so", "do")])
    assert lines == ["", "WRONG  p -> d: slow", "       look", "", "hint  so", "       do"]


def test_help_is_worth_reading(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert all(word in said for word in ("--workers", "--url", "--json", "Exit code", "baton doctor transport"))


# --- the survey ------------------------------------------------------------------------------------------------


class ScriptedLink:
    """A worker that answers with what it is given, and notes who was probed."""

    def __init__(self, *reports: PathReport) -> None:
        self.reports = reports
        self.probed: list[Peer | None] = []
        self.tickets: list[bytes] = []
        self.lost = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def paths(self, probe: Peer | None, ticket: bytes) -> Sequence[PathReport]:
        self.probed.append(probe)
        self.tickets.append(ticket)
        await self.gate.wait()
        if self.lost:
            raise WorkerLost("no session")
        return self.reports


def info(name: str, role: Role) -> WorkerInfo:
    endpoint = f"unix:/{name}" if role is Role.DECODE else ""
    return WorkerInfo(WorkerId(name, 7), role, "", "", 16, 64, 1024, endpoint)


FROM_P = PathReport(WorkerId("p", 7), "shm", "", 5e9, 4e-5, 0.1, "")


async def test_a_probe_asks_the_dialling_end_first_and_a_look_disturbs_nobody() -> None:
    p, d = ScriptedLink(), ScriptedLink(FROM_P, replace(FROM_P, peer=WorkerId("p", 6), transport="ucx"))
    survey = PathSurvey(lambda: [(info("d", Role.DECODE), d), (info("p", Role.PREFILL), p)], lambda: ("p", "d", "gone"))
    wanted = PathReply((SHM, PairPath("d", "p", needed=False)), ("gone",))
    assert await survey.known() == wanted and p.probed == d.probed == [None]
    assert await survey.probed() == wanted
    assert p.probed[1:] == [Peer(WorkerId("d", 7), "unix:/d")] and d.probed[1:] == [Peer(WorkerId("p", 7), "")]
    d.lost = True
    assert (await survey.known()).pairs[0] == PairPath("p", "d", trouble="no session")


async def test_each_probe_has_a_ticket_of_its_own_for_that_worker_and_peer() -> None:
    tickets = Tickets([b"k" * 32])
    p, d = ScriptedLink(), ScriptedLink(FROM_P)
    members = [(info("p", Role.PREFILL), p), (info("d", Role.DECODE), d)]
    survey = PathSurvey(lambda: members, permits=Permits(tickets))
    await survey.known()
    assert p.tickets == d.tickets == [b""]
    await survey.probed()
    gate, source = Gate(tickets, info("d", Role.DECODE)), Peer(WorkerId("p", 7), "")
    gate.probe(source, d.tickets[1])
    with pytest.raises(BadTicket, match="used before"):
        gate.probe(source, d.tickets[1])
    for wrong in (p.tickets[1], b"", d.tickets[1][:-1]):
        with pytest.raises(BadTicket):
            gate.probe(source, wrong)
    await survey.probed()
    gate.probe(source, d.tickets[2])


async def test_one_probe_at_a_time() -> None:
    p, d = ScriptedLink(), ScriptedLink(FROM_P)
    d.gate.clear()
    survey = PathSurvey(lambda: [(info("p", Role.PREFILL), p), (info("d", Role.DECODE), d)])
    first = asyncio.ensure_future(survey.probed())
    await asyncio.sleep(0.01)
    with pytest.raises(QueueFull):
        await survey.probed()
    d.gate.set()
    assert (await first).pairs[0] == SHM


async def test_aggregated_workers_have_no_pairs() -> None:
    one = ScriptedLink()
    assert await PathSurvey(lambda: [(info("a", Role.AGGREGATED), one)]).probed() == PathReply()


# --- the command -----------------------------------------------------------------------------------------------


def surveying(*reports: PathReport, names: Sequence[str] = ("p", "d")) -> PathSurvey:
    p, d = ScriptedLink(), ScriptedLink(*reports)
    return PathSurvey(lambda: [(info("p", Role.PREFILL), p), (info("d", Role.DECODE), d)], lambda: names)


async def ran(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = await asyncio.to_thread(cli.main, ["doctor", "transport", *argv])
    said = capsys.readouterr()
    return code, said.out, said.err


async def test_a_router_is_asked_over_http(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    async with on_socket(front(tokenizer, say(tokenizer, "hi"), survey=surveying(FROM_P))) as port:
        code, out, _ = await ran(capsys, "--url", f"http://127.0.0.1:{port}")
        assert code == 0 and "p     d   shm" in out and "every path is as it should be" in out
        code, out, _ = await ran(capsys, "--url", f"http://127.0.0.1:{port}", "--json")
        told = json.loads(out)
        assert code == 0 and told["pairs"][0] == asdict(SHM) and told["missing"] == told["findings"] == []
    bad = surveying(replace(FROM_P, trouble="shm failed: broke"), names=("p", "d", "d2"))
    async with on_socket(front(tokenizer, say(tokenizer, "hi"), survey=bad)) as port:
        code, out, _ = await ran(capsys, "--url", f"http://127.0.0.1:{port}")
        assert code == 1 and "WRONG  d2: does not answer" in out and "WRONG  p -> d: shm failed: broke" in out
    tokenizer.close()


async def test_what_cannot_be_asked_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = await ran(capsys, "--url", "http://127.0.0.1:1")
    assert code == 2 and err.startswith("baton doctor: no server at http://127.0.0.1:1") and err.count("\n") == 1
    code, _, err = await ran(capsys, "--workers", "here")
    assert code == 2 and "name=address" in err
    code, _, err = await ran(capsys, "--url", "localhost")
    assert code == 2 and "--url" in err


async def test_workers_that_are_not_there_are_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CONNECT_S", 0.2)
    code, out, _ = await ran(capsys, "--workers", "p=127.0.0.1:1,d=unix:/nowhere/d")
    assert code == 1 and "WRONG  p, d: does not answer" in out
