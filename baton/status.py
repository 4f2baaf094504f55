"""`baton status`: one page on a running cluster, and what is wrong with it."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from baton import cluster_reader, endpoint
from baton.cluster_page import page
from baton.doctor_judgement import Finding
from baton.endpoint import Endpoint
from baton.status_judgement import judge
from router.cluster_view import ClusterView

PIPED_COLUMNS = 140  # a file has no width; tables do not break at this one

EXPLAINED = """\
`baton status` asks a router what it sees of its cluster, and shows it on one page: routers, tiers with what scaling
has decided, workers with their queues and page pools, the paths that hand-offs take, latencies of the last minute,
and in the end what is wrong and what to do.

  baton status                            a `baton serve` on this machine
  baton status http://router:8000         any router of a cluster; it knows all workers
  baton status --json | jq .findings      for programs: the view of GET /cluster, and the findings
  watch -n 5 baton status, or baton top   again and again
"""
EPILOG = """\
A worker is ready, starting, draining (it finishes what it has), unreachable (announced, but this router has no session
with it) or missing (configured, and not there). HELD is what cannot be had for the asking: pages that sequences own,
that a hand-off reads (leased) or may still write (quarantined); cached pages are given up when room is needed.

Exit code: 0 when all is well, 1 when something is wrong, 2 when no router answers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = EXPLAINED, EPILOG
    cluster_reader.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object: the view, and findings")


def run(args: argparse.Namespace) -> int:
    """0, or 1 when something is wrong. Raises ConfigError, whose exit code is 2."""
    router = cluster_reader.router_of(args)
    view = asyncio.run(_ask(router))
    findings = judge(view)
    if args.json:
        print(json.dumps({**view.plain(), "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        show(view, findings, router.base_url)
    return int(any(finding.wrong for finding in findings))


def show(view: ClusterView, findings: Sequence[Finding], where: str) -> None:
    """On stdout, in colours when that is a terminal."""
    console = Console(width=None if sys.stdout.isatty() else PIPED_COLUMNS, highlight=False)
    console.print(page(view, findings, where))


async def _ask(router: Endpoint) -> ClusterView:
    async with endpoint.open_session(router, idle_s=cluster_reader.ANSWER_S) as session:
        return await cluster_reader.ask(session, router)
