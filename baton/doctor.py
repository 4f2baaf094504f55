"""`baton doctor`: has a running cluster prove every path between its workers, shows them, and says what is wrong."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import cast

import aiohttp

from baton import endpoint
from baton.credentials import Wish, keys_of, tickets_of, tls_of
from baton.doctor_judgement import Finding, judge
from core.errors import ConfigError, WorkerLost
from core.messages import WorkerInfo
from core.security.channels import Channels
from router.client import Visitor
from router.path_survey import Member, PairPath, PathReply, PathSurvey
from router.permits import Permits

CONNECT_S = 10.0
PROBE_S = 600.0  # of a whole cluster, path after path

EXPLAINED = """\
`baton doctor transport` has every prefill worker reach every decode worker, fetch a test page both ways, check
its bytes, and measure. A server that is under load may go on serving meanwhile: some MiB move per path.

  baton doctor transport                                        a `baton serve` on this machine
  baton doctor transport --url http://router:8000 --json        through any router
  baton doctor transport --workers p=10.0.0.1:7001,d=10.0.0.2:7001
                                                                without a router
"""
EPILOG = """\
FROM has the pages, TO fetches them; most pages go from prefill to decode workers. Exit code: 0 when all is well,
1 when something is wrong, 2 when a flag is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = EXPLAINED, EPILOG
    parser.add_argument("what", choices=("transport",), help="what to look at: the paths between workers")
    parser.add_argument("--url", default="http://localhost:8000", help="address of a router (http://localhost:8000)")
    parser.add_argument("--workers", default="", help="name=address of each worker, separated by commas: no router")
    parser.add_argument("--api-key", help="bearer token, if the router asks for one")
    parser.add_argument("--ticket-key-file", default="", help="with --workers: the file that the workers have")
    for name, what in (("cert", "certificate of a doctor"), ("key", "its private key"), ("ca", "who signs them all")):
        parser.add_argument(f"--tls-{name}", default="", metavar="PEM", help=f"with --workers that use TLS: {what}")
    parser.add_argument("--json", action="store_true", help="print one JSON object: pairs, missing, findings")


def run(args: argparse.Namespace) -> int:
    """0, or 1 when something is wrong. Raises ConfigError."""
    reply = asyncio.run(_ask_workers(args) if args.workers else _ask_router(args))
    findings = judge(reply)
    if args.json:
        print(json.dumps({**asdict(reply), "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print("\n".join([*table(reply.pairs), *said(findings)]))
    return int(any(finding.wrong for finding in findings))


async def _ask_router(args: argparse.Namespace) -> PathReply:
    """Raises ConfigError when there is no router, or one that cannot do this."""
    router = endpoint.from_args(args)
    try:
        async with (
            endpoint.open_session(router, idle_s=PROBE_S) as session,
            session.post(f"{router.base_url}/paths/probe") as response,
        ):
            body = await response.read()
            if response.status != 200:
                raise ConfigError(f"{router.base_url} answers {response.status}: {endpoint.error_message(body)}")
    except (aiohttp.ClientError, TimeoutError) as error:
        reason = endpoint.error_text(error)
        raise ConfigError(f"no server at {router.base_url}: {reason}; see --url and --workers") from error
    try:
        found = json.loads(body)
        return PathReply(tuple(PairPath(**pair) for pair in found["pairs"]), tuple(found["missing"]))
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{router.base_url} does not tell paths: is it a Baton router?") from error


async def _ask_workers(args: argparse.Namespace) -> PathReply:
    """As a router would, without being one. Raises ConfigError."""
    listed: str = args.workers
    wish = cast(Wish, args)
    channels = Channels(tls_of(wish))
    permits = Permits(tickets_of(keys_of(wish)) if args.ticket_key_file else None)
    try:
        endpoints = dict(part.split("=", 1) for part in listed.split(","))
    except ValueError:
        raise ConfigError(f"--workers must be name=address,..., got {listed!r}") from None
    visitors = {name: Visitor(address, channels) for name, address in endpoints.items()}
    try:
        answers = await asyncio.gather(*(v.info(CONNECT_S) for v in visitors.values()), return_exceptions=True)
        there: list[Member] = []
        for name, answer in zip(visitors, answers, strict=True):
            if isinstance(answer, WorkerInfo):
                there.append((answer, visitors[name]))
            elif isinstance(answer, WorkerLost):
                print(f"{name}: {answer.message}", file=sys.stderr)
            else:
                raise answer
        return await PathSurvey(lambda: there, lambda: tuple(visitors), permits).probed()
    finally:
        for visitor in visitors.values():
            await visitor.close()


def table(rows: Sequence[PairPath]) -> list[str]:
    """One line for each path."""
    head = ("FROM", "TO", "PATH", "BANDWIDTH", "PAGE", "LANES")
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _cells(row: PairPath) -> tuple[str, str, str, str, str, str]:
    if not row.transport:
        return row.source, row.receiver, "none" if row.trouble or row.needed else "unused", "-", "-", "-"
    rate, latency = f"{row.bytes_per_s / 1e9:.2f} GB/s", f"{row.latency_s * 1e6:.0f} us"
    return row.source, row.receiver, row.transport, rate, latency, row.lanes or "-"


def said(findings: Sequence[Finding]) -> list[str]:
    """What is wrong, then hints; each with what to do next."""
    lines = []
    for finding in findings:
        where = f"{', '.join(finding.where)}: " if finding.where else ""
        lines += ["", f"{'WRONG' if finding.wrong else 'hint'}  {where}{finding.what}", f"       {finding.advice}"]
    return lines or ["", "every path is as it should be"]
