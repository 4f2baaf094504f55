"""`baton top`: a running cluster, live in the terminal."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import aiohttp
from rich.console import Console
from rich.live import Live

from baton import cluster_reader, endpoint
from baton.cluster_page import screen
from baton.endpoint import Endpoint
from baton.status import show
from baton.status_judgement import judge
from core.errors import ConfigError
from router.cluster_view import ClusterView

LEAST_INTERVAL_S = 0.2
QUIT_KEYS = (b"q", b"Q", b"\x04")

EXPLAINED = """\
`baton top` shows what `baton status` shows, again and again: tiers, pools by the state of their pages, queues,
hand-offs for each pair of workers, and the latencies of the last minutes. q or Ctrl-C ends it. When the output is no
terminal, the page of `baton status` is printed every few seconds instead.

  baton top                               a `baton serve` on this machine
  baton top http://router:8000            any router of a cluster
  baton top --interval-s 10 >> cluster.log
"""
EPILOG = """\
A router that stops answering is waited for, and the last view stays. Exit code: 0 when you end it, 2 when no router
answers at the start."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = EXPLAINED, EPILOG
    cluster_reader.add_arguments(parser)
    parser.add_argument("--interval-s", type=float, default=2.0, help="seconds between two views (2)")


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError when there is no router at the start, or the interval is too short."""
    if not args.interval_s >= LEAST_INTERVAL_S:
        raise ConfigError(f"--interval-s must be at least {LEAST_INTERVAL_S}, got {args.interval_s}")
    router = cluster_reader.router_of(args)
    asyncio.run(_watch(router, args.interval_s))
    return 0


@dataclass(slots=True)
class _Sight:
    """What is shown: the last view, and why there is no newer one."""

    view: ClusterView
    trouble: str = ""


async def _watch(router: Endpoint, interval_s: float) -> None:
    """Until a key or a signal ends it."""
    over = asyncio.Event()
    console = Console(highlight=False)
    async with endpoint.open_session(router, idle_s=cluster_reader.ANSWER_S) as session:
        sight = _Sight(await cluster_reader.ask(session, router))
        with _signals(over.set):
            if not console.is_terminal:
                await _print(session, router, sight, over, interval_s)
                return
            with _keys(over.set), Live(console=console, screen=True, auto_refresh=False) as live:
                while not over.is_set():
                    page = screen(sight.view, judge(sight.view), router.base_url, sight.trouble)
                    live.update(page, refresh=True)
                    await _next(session, router, sight, over, interval_s)


async def _print(
    session: aiohttp.ClientSession, router: Endpoint, sight: _Sight, over: asyncio.Event, interval_s: float
) -> None:
    while not over.is_set():
        if sight.trouble:
            print(sight.trouble, flush=True)
        else:
            show(sight.view, judge(sight.view), router.base_url)
            print(flush=True)
        await _next(session, router, sight, over, interval_s)


async def _next(
    session: aiohttp.ClientSession, router: Endpoint, sight: _Sight, over: asyncio.Event, interval_s: float
) -> None:
    """Wait, and look again; a key ends either at once."""
    ended = asyncio.ensure_future(over.wait())
    asked = asyncio.ensure_future(_ask_later(session, router, sight, interval_s))
    try:
        await asyncio.wait((ended, asked), return_when=asyncio.FIRST_COMPLETED)
    finally:
        ended.cancel()
        asked.cancel()
        await asyncio.gather(ended, asked, return_exceptions=True)
    if not asked.cancelled():
        asked.result()


async def _ask_later(session: aiohttp.ClientSession, router: Endpoint, sight: _Sight, pause_s: float) -> None:
    await asyncio.sleep(pause_s)
    try:
        sight.view, sight.trouble = await cluster_reader.ask(session, router), ""
    except ConfigError as error:
        sight.trouble = error.message


@contextmanager
def _signals(end: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM end it like q, so that the terminal is given back as it was."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, end)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextmanager
def _keys(end: Callable[[], None]) -> Iterator[None]:
    """Keys are read as they are typed, and not shown; only when there is a keyboard."""
    if not sys.stdin.isatty():
        yield
        return
    keyboard, loop = sys.stdin.fileno(), asyncio.get_running_loop()
    before = termios.tcgetattr(keyboard)

    def typed() -> None:
        if os.read(keyboard, 1) in (*QUIT_KEYS, b""):
            end()

    tty.setcbreak(keyboard)
    loop.add_reader(keyboard, typed)
    try:
        yield
    finally:
        loop.remove_reader(keyboard)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
