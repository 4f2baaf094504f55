"""The benchmark of transfers, with pools and runs so small that its figures mean nothing: rows, notes, errors."""

import json
import os
import sys
from pathlib import Path

import pytest

from bench.transfer import __main__ as command
from bench.transfer import nixl_environment
from bench.transfer.contenders import Contender, Failed, Running
from bench.transfer.nixl_environment import NixlMissing
from bench.transfer.pools import BATCH_PAGES, fill, make_pool, walk, wrong_pages
from bench.transfer.quiet import Moment, taken_by_others, verdict
from bench.transfer.report import Row, verdicts
from bench.transfer.rounds import Plan, measure

PAGE, POOL = 32 << 10, 2 << 20
SMALL = ["--pages", "32K,64K", "--pool", "2M", "--run", "4M", "--rounds", "2"]
FIELDS = {"transport", "page_bytes", "gb_per_s", "baseline", "baseline_gb_per_s", "note"}


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_there_is_a_row_for_each_transport_page_size_and_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = children()
    out = tmp_path / "rows.json"
    flags = ["--transports", "shm,shm-no-digest", "--baselines", "memcpy,socket", "--json", str(out)]
    assert command.main([*SMALL, *flags]) == 0
    rows = json.loads(out.read_text())
    keys = {(row["transport"], row["page_bytes"], row["baseline"]) for row in rows}
    assert len(rows) == len(keys) == 2 * 2 * 2
    assert {size for _, size, _ in keys} == {32 << 10, 64 << 10}
    for row in rows:
        assert set(row) == FIELDS
        assert row["gb_per_s"] > 0 and row["baseline_gb_per_s"] > 0 and row["note"] == ""
    assert sum(line.startswith("| shm") for line in capsys.readouterr().out.splitlines()) == len(rows)
    assert children() == before


def test_a_baseline_that_cannot_be_installed_is_a_row_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(cache: Path) -> str:
        raise NixlMissing("not installed: no such thing")

    monkeypatch.setattr(command, "nixl_python", missing)
    out = tmp_path / "rows.json"
    assert command.main([*SMALL, "--transports", "shm", "--baselines", "nixl", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    found = [(row["baseline_gb_per_s"], row["note"]) for row in rows]
    assert found == [(None, "nixl: not installed: no such thing")] * 2
    assert all(row["gb_per_s"] > 0 for row in rows)
    assert "no such thing" in capsys.readouterr().out


def test_a_failed_installation_says_why_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_environment.venv, "create", lambda *_args, **_options: None)
    for _ in range(2):
        with pytest.raises(NixlMissing, match=r"not installed: .*No such file"):
            nixl_environment.nixl_python(tmp_path)


@pytest.mark.parametrize(
    ("program", "why"), [("raise SystemExit('it broke')", "it broke"), ("print('hello')", "without a word")]
)
async def test_a_contender_that_dies_is_a_note_and_the_others_go_on(program: str, why: str) -> None:
    dying = Contender("nixl", (sys.executable, "-c", program))
    plan = Plan(rounds=2, run_bytes=1 << 20, pool_bytes=POOL)
    measured = await measure({"nixl": [dying, dying], "memcpy": [Contender.own("memcpy")]}, PAGE, plan)
    assert measured["nixl"].gb_per_s is None and why in measured["nixl"].note
    assert len(measured["memcpy"].runs) == 2


async def test_pages_that_arrive_wrong_are_no_figure() -> None:
    program = """
import asyncio
from bench.transfer.orders import obey

class Wrong:
    async def hello(self): return ""
    async def meet(self, hello): pass
    async def move(self, total_bytes, how): return total_bytes, 0.001, 3
    async def close(self): pass

asyncio.run(obey(Wrong()))
"""
    async with Running(Contender("wrong", (sys.executable, "-c", program)), PAGE, POOL) as running:
        with pytest.raises(Failed, match="3 pages"):
            await running.move(1)


def test_what_others_took_is_told_apart_from_our_own() -> None:
    before = Moment(wall_s=100.0, work_s=1000.0, stolen_s=50.0, own_s=1.0)
    after = Moment(wall_s=110.0, work_s=1018.0, stolen_s=51.0, own_s=16.0)
    assert taken_by_others(before, after) == pytest.approx(0.4)  # 3 s of work that was not ours, 1 s stolen, in 10 s
    assert "provisional" in verdict(0.4) and "stand" in verdict(0.05)
    now = Moment.now()
    assert now.work_s > now.own_s > 0


def test_a_walk_names_each_page_once_a_pass_and_its_check_sees_what_is_wrong() -> None:
    frames = make_pool(PAGE, POOL)
    assert frames.pages == 2 * BATCH_PAGES
    batches = list(walk(frames.pages, PAGE, POOL))
    for side in (0, 1):
        assert sorted(pair[side] for batch in batches for pair in batch) == list(range(frames.pages))
    fill(frames)
    assert wrong_pages(frames, [(page, page) for page in range(frames.pages)]) == 0
    frames.page(5)[-1] ^= 1
    assert wrong_pages(frames, [(4, 4), (5, 5), (6, 7)]) == 2
    frames.close()


def test_a_target_is_judged_by_its_worst_page_size_and_not_without_figures() -> None:
    def row(page_bytes: int, rate: float | None) -> Row:
        return Row("shm", page_bytes, rate, "memcpy", 10.0)

    assert list(verdicts([row(64 << 10, 1.0), row(256 << 10, 6.5), row(1 << 20, 8.0)])) == [
        "shm at least 0.6 of memcpy from 256 KiB: met, 0.65 at 256 KiB"
    ]
    assert "MISSED, 0.59 at 1 MiB" in next(iter(verdicts([row(256 << 10, 6.5), row(1 << 20, 5.9)])))
    assert "not measured" in next(iter(verdicts([row(256 << 10, 6.5), row(1 << 20, None)])))
    assert not list(verdicts([row(64 << 10, 1.0)]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--transports", "shm,pigeon"], "pigeon: not among"),
        (["--pages", "48K"], "multiples of 32K"),
        (["--pages", "0"], "multiples of 32K"),
        (["--pages", "2M", "--pool", "32M"], "must hold 32 pages"),
    ],
)
def test_a_wrong_flag_is_a_clear_message(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.parse_args(flags)
    assert message in capsys.readouterr().err
