"""`baton status` and `baton top`: what is judged wrong, how a view looks, what is refused from a router."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from aiohttp import web
from rich.console import Console

from baton import cluster_reader, status, top
from baton.cluster_page import BAR_CELLS, MAX_PAIRS, bar, page, screen, seconds, sparkline
from baton.doctor_judgement import Finding
from baton.status_judgement import judge
from core.errors import ConfigError
from router.cluster_view import ClusterView, PairView, RegistryView, RouterView, TierView, WorkerView
from router.recent import Spread

POOL = {"owned": 40, "leased": 10, "quarantined": 0, "cached": 30, "free": 20}
SPREAD = Spread(0.012, 0.35, 1.5, 1234, 60.0, (0.1, None, 0.2, 0.4))
PAIR = PairView("p0", "d0", "shm", "", 7.34e9, 152e-6, "", True, 3)


def worker(name: str, tier: str, state: str = "ready", **others: object) -> WorkerView:
    return replace(
        WorkerView(name, tier, state, "model", pages=POOL, handoffs={"granted": 2}, prefill_tokens_per_s=1000.0),
        **others,
    )  # type: ignore[arg-type]


def tier(name: str, ready: int = 1, desired: int | None = None, starting: int = 0) -> TierView:
    return TierView(name, desired, ready, starting, 0, 0, "pages are short" if desired else "")


WELL = ClusterView(
    model="tiny",
    baton_version="9.9",
    routers=(RouterView("router", answers=True, inflight_requests=4), RouterView("r2", "http://h:1")),
    tiers=(tier("prefill"), tier("decode", 2, 2)),
    workers=(worker("p0", "prefill"), worker("d0", "decode"), worker("d1", "decode")),
    handoffs=(PAIR, PairView("d0", "p0", "", "", 0.0, 0.0, "", False, 0)),
    first_token=SPREAD,
    token_gap=SPREAD,
    registry=RegistryView(True, 0.4),
)


def changed(name: str, **others: object) -> ClusterView:
    """The good view with one worker that is otherwise."""
    workers = tuple(replace(one, **others) if one.name == name else one for one in WELL.workers)  # type: ignore[arg-type]
    return replace(WELL, workers=workers)


# --- judgement -----------------------------------------------------------------------------------------------


def test_nothing_is_wrong_with_a_cluster_that_is_well() -> None:
    assert judge(WELL) == []
    aggregated = replace(WELL, workers=(worker("w0", "aggregated"),), tiers=(tier("aggregated"),), handoffs=())
    assert judge(replace(aggregated, registry=None)) == []


FULL = {"owned": 90, "leased": 6, "cached": 2, "free": 2}
WRONG = {
    "nobody": (replace(WELL, workers=()), "no worker is ready"),
    "no prefill": (replace(WELL, workers=WELL.workers[1:]), "no prefill worker is ready"),
    "no decode": (replace(WELL, workers=WELL.workers[:1]), "no decode worker is ready"),
    "registry": (replace(WELL, registry=RegistryView(False, 12.0)), "was last read 12 s ago"),
    "registry never": (replace(WELL, registry=RegistryView(False, None)), "was never read"),
    "missing": (changed("d1", state="missing"), "has gone"),
    "unreachable": (changed("d1", state="unreachable"), "has no session"),
    "too few": (replace(WELL, tiers=(tier("decode", 1, 3, starting=1),)), "has 1 of 3 workers ready"),
    "full": (changed("d1", pages=FULL), "page pool is full"),
    "queue": (changed("p0", waiting_tokens=11_000), "11000 prompt tokens wait, about 11 s"),
    "model": (changed("d1", identity="other"), "serves another model"),
    "path": (replace(WELL, handoffs=(replace(PAIR, transport="", trouble="no session"),)), "no session"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_once_with_advice(name: str) -> None:
    view, said = WRONG[name]
    found = [finding for finding in judge(view) if finding.wrong]
    assert len(found) == 1 and said in found[0].what and found[0].advice


HINTS = {
    "starting": (replace(WELL, tiers=(tier("decode", 1, 2, starting=1),)), "the rest is starting"),
    "slow": (
        replace(
            WELL,
            handoffs=(PAIR, replace(PAIR, source="d1"), replace(PAIR, receiver="d1", bytes_per_s=PAIR.bytes_per_s / 9)),
        ),
        "9 times slower",
    ),
    "draining": (changed("d1", state="draining", running_requests=2, waiting_requests=1), "3 requests left"),
}


@pytest.mark.parametrize("name", HINTS)
def test_what_takes_its_course_is_a_hint(name: str) -> None:
    view, said = HINTS[name]
    (found,) = judge(view)
    assert not found.wrong and said in found.what


def test_what_is_wrong_comes_first_and_what_several_have_in_common_is_one_finding() -> None:
    workers = (WELL.workers[0], worker("d0", "decode", "draining"), worker("d1", "decode", "missing"))
    found = judge(replace(WELL, workers=(*workers, worker("d2", "decode"), worker("d3", "decode", "missing"))))
    assert [(finding.wrong, finding.where) for finding in found] == [(True, ("d1", "d3")), (False, ("d0",))]


def test_the_path_of_a_worker_that_is_gone_is_no_second_finding() -> None:
    view = replace(changed("d1", state="missing"), handoffs=(PAIR, replace(PAIR, receiver="d1", trouble="no session")))
    assert [finding.where for finding in judge(view)] == [("d1",)]


# --- looks ---------------------------------------------------------------------------------------------------


def shown(view: ClusterView, findings: list[Finding] | None = None, width: int = 140) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(page(view, findings or [], "http://h:1"))
    return console.export_text()


def test_the_page_says_it_all() -> None:
    text = shown(WELL)
    assert re.search(r"^tiny at http://h:1, baton 9\.9: all is well", text)
    for row in (
        r"router +this one +4 +0",
        r"r2 +http://h:1 +- +-",
        r"registry: up, read 0\.4 s ago",
        r"prefill +- +1 +- +- +- +-",
        r"decode +2 +2 +- +- +- +pages are short",
        r"p0 +prefill +ready +0 +0 +0 +2 +- +█{10}▓{2}░{7}·{5} +50% of 100",
        r"p0 +d0 +shm +7\.34 GB/s +152 us +3",
        r"TTFT +12 ms +350 ms +1\.50 s +1,234 requests in 60 s +▃·▅█",
        r"ITL .* tokens in 60 s",
        r"nothing is wrong",
    ):
        assert re.search(row, text), (row, text)
    assert not re.search(r"d0 +p0", text), "a loan's path that nobody has used"


def test_findings_end_the_page_and_are_counted_at_its_top() -> None:
    text = shown(WELL, [Finding(True, ("d1",), "has gone", "look there"), Finding(False, (), "so", "nothing")])
    assert "1 thing is wrong" in text and re.search(r"WRONG +d1: has gone\s+look there\s+hint +so\s+nothing", text)
    text = shown(WELL, [Finding(True, ("d1",), "a", "b"), Finding(True, ("d2",), "c", "d")])
    assert "2 things are wrong" in text


def test_names_from_the_cluster_are_not_markup() -> None:
    view = replace(
        WELL,
        workers=(worker("[red]w[/red]", "prefill"),),
        tiers=(replace(tier("prefill"), reason="[link=x]y[/nope]"),),
        routers=(RouterView("[bold]", "[/bad]"),),
    )
    text = shown(view)
    assert "[red]w[/red]" in text and "[link=x]y[/nope]" in text and "[/bad]" in text


def test_a_view_of_nothing_and_a_narrow_terminal_are_shown_too() -> None:
    assert "no workers" not in shown(ClusterView("", "", (), (), (), ()), width=40)
    assert "p0" in shown(WELL, width=60)


def test_of_many_pairs_those_in_trouble_and_in_use_are_shown() -> None:
    pairs = [replace(PAIR, receiver=f"d{n}", requests=0) for n in range(40)]
    pairs[33] = replace(pairs[33], trouble="no session")
    pairs[37] = replace(pairs[37], requests=9)
    text = shown(replace(WELL, handoffs=tuple(pairs)))
    assert text.index("no session") < text.index("d37") and f"and {40 - MAX_PAIRS} more" in text


def test_the_screen_says_why_it_stands_still() -> None:
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(screen(WELL, [], "http://h:1", "no router at http://h:1"))
    text = console.export_text()
    assert "no router at" in text and "q ends" not in text and "╭─ Workers" in text


def test_a_bar_has_the_shares_of_its_states() -> None:
    for owned in range(0, 1001, 7):
        pages = {"owned": owned, "leased": 1, "cached": 1, "quarantined": 1, "free": 1000 - owned}
        text = bar(pages).plain
        assert len(text) == BAR_CELLS and abs(text.count("█") - BAR_CELLS * owned / 1003) <= 4
        assert all(shape in text for shape in "▓▒░")
    assert bar({}).plain == "" and bar({"free": 5}, 4).plain == "····"


def test_a_sparkline_is_as_high_as_the_values() -> None:
    assert sparkline(replace(SPREAD, history_p90_s=(0.0, 1.0, None, 0.5))) == "▁█·▅"
    assert sparkline(replace(SPREAD, history_p90_s=())) == ""
    assert sparkline(replace(SPREAD, history_p90_s=(0.0, 0.0))) == "▁▁"


def test_seconds_are_short() -> None:
    values = (None, 0.0, 0.00015, 0.0025, 0.25, 1.5, 75.0)
    assert [seconds(value) for value in values] == ["-", "0 us", "150 us", "2.5 ms", "250 ms", "1.50 s", "75 s"]


# --- what routers say ----------------------------------------------------------------------------------------


def body(**others: object) -> bytes:
    return json.dumps({**WELL.plain(), **others}).encode()


def test_a_view_survives_its_journey_and_what_is_new_is_left_out() -> None:
    assert cluster_reader.read(body()) == WELL
    later = WELL.plain()
    later["more"] = 1
    later["tiers"] = [{**one, "more": 1} for one in later["tiers"]]  # type: ignore[attr-defined]
    assert cluster_reader.read(json.dumps(later).encode()) == WELL


def test_control_characters_do_not_reach_the_terminal() -> None:
    view = replace(WELL, model="a\x1b]0;b\x07", tiers=(replace(tier("prefill"), reason="x\r\ny\x9b"),))
    found = cluster_reader.read(json.dumps(view.plain()).encode())
    assert found.model == "a\ufffd]0;b\ufffd" and found.tiers[0].reason == "x\ufffd\ufffdy\ufffd"


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        body(version=2),
        body(tiers=[{"tier": "decode"}]),
        body(workers=[{"name": "a", "tier": "b", "state": 7}]),
        body(first_token=None),
        body(registry=1),
        body(handoffs=3),
    ],
)
def test_anything_else_is_one_clear_error(wrong: bytes) -> None:
    with pytest.raises(ConfigError):
        cluster_reader.read(wrong)


@asynccontextmanager
async def answering(status_code: int, text: bytes) -> AsyncIterator[str]:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status_code, body=text)

    app = web.Application()
    app.router.add_get("/cluster", answer)
    runner = web.AppRunner(app, handle_signals=False)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def ran(command: object, *flags: str) -> tuple[int, str]:
    """Exit code and output of a command, as main would run it."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)  # type: ignore[attr-defined]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = command.run(parser.parse_args(flags))  # type: ignore[attr-defined]
    return code, out.getvalue()


async def test_the_exit_code_tells_well_from_wrong() -> None:
    async with answering(200, body()) as url:
        code, text = await asyncio.to_thread(ran, status, url)
        assert code == 0 and "all is well" in text and "\x1b" not in text
        code, text = await asyncio.to_thread(ran, status, f"http://{url}/", "--json")
        assert code == 0 and json.loads(text)["findings"] == [] and cluster_reader.read(text.encode()) == WELL
    async with answering(200, json.dumps(WRONG["missing"][0].plain()).encode()) as url:
        code, text = await asyncio.to_thread(ran, status, url, "--json")
        assert code == 1 and json.loads(text)["findings"][0]["where"] == ["d1"]


@pytest.mark.parametrize(("code", "said"), [(404, "is it a Baton router"), (401, "answers 401"), (200, "be read")])
async def test_who_tells_of_no_cluster_is_an_error(code: int, said: str) -> None:
    async with answering(code, b"nothing") as url:
        for command in (status, top):
            with pytest.raises(ConfigError, match=said) as found:
                await asyncio.to_thread(ran, command, url)
            assert found.value.exit_code == 2


def test_nobody_there_is_an_error_and_so_is_no_pause() -> None:
    for command in (status, top):
        with pytest.raises(ConfigError, match="no router at http://127"):
            ran(command, "127.0.0.1:1")
    for interval in ("0", "nan", "-1"):
        with pytest.raises(ConfigError, match="interval"):
            ran(top, f"--interval-s={interval}")
