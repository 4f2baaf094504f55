"""How fast pages move between two processes of this machine: each transport beside each baseline.

    python -m bench.transfer                    # everything: about ten minutes; NIXL is installed at first
    python -m bench.transfer --quick --transports shm,shm-no-digest --baselines memcpy

A source and a receiver have a pool each, faulted in, larger than any cache. The receiver fetches pages from random
places into random places, 32 a fetch, two fetches at a time, and the time is taken there. All contenders of a page
size are up at once and have turns, in an order that is turned round each time; who has none is stopped. A figure is
the median of its runs. What arrived is checked after each run.

transports  shm, ucx (as they are, with digests: 8 segments a page) and shm-no-digest, ucx-no-digest (what they cost)
baselines   memcpy     one core copies the same pages between two mappings
            socket     a plain TCP connection over loopback, written in steps of 4 MiB, read into the pool
            nixl       NIXL with its UCX back end at default settings, the better of READ and WRITE
            nixl-best  the best of several UCX settings, chosen anew for each page size by a short trial
            nixl-tcp   the best of those that go over TCP, as ours does: shared memory needs no network
            nixl-polled  (not by default) as nixl-best, and its receiver polls instead of having a progress thread
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path

from bench.transfer.contenders import Contender
from bench.transfer.nixl_environment import NixlMissing, nixl_python
from bench.transfer.pools import BATCH_PAGES, UNIT_BYTES
from bench.transfer.quiet import Moment, taken_by_others, verdict
from bench.transfer.report import machine, rows_of, table, verdicts
from bench.transfer.rounds import Measured, Plan, measure

TRANSPORTS = ("shm", "shm-no-digest", "ucx", "ucx-no-digest")
BASELINES = ("memcpy", "socket", "nixl", "nixl-best", "nixl-tcp")
MORE_BASELINES = ("nixl-polled",)
PAGES = "64K,128K,256K,512K,1M,2M"
SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
SEGMENTS = {"UCX_TCP_TX_SEG_SIZE": "512k", "UCX_TCP_RX_SEG_SIZE": "512k"}
NIXL_SETTINGS: tuple[dict[str, str], ...] = (
    {},
    {"UCX_TLS": "posix,sysv,cma,tcp"},
    {"UCX_TLS": "posix,sysv,cma,tcp"} | SEGMENTS,
    {"UCX_TLS": "tcp"},
    {"UCX_TLS": "tcp"} | SEGMENTS,
)
NIXL_CHOICES = {"nixl": NIXL_SETTINGS[:1], "nixl-tcp": NIXL_SETTINGS[3:]}  # others choose from all


def bytes_of(text: str) -> int:
    """`512K`, `2M`, `1G` (binary), or a plain number."""
    number, unit = (text[:-1], SUFFIXES[text[-1].upper()]) if text[-1:].upper() in SUFFIXES else (text, 1)
    return int(number) * unit


def page_sizes(text: str) -> list[int]:
    sizes = [bytes_of(part) for part in text.split(",")]
    if any(size <= 0 or size % UNIT_BYTES for size in sizes):
        raise argparse.ArgumentTypeError(f"page sizes are multiples of {UNIT_BYTES >> 10}K, not {text}")
    return sizes


def names(known: tuple[str, ...]) -> type:
    """An argument type: names out of these, separated by commas."""

    class Names(list[str]):
        def __init__(self, text: str) -> None:
            super().__init__(part for part in text.split(",") if part)
            if unknown := [part for part in self if part not in known]:
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")

    return Names


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.transfer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton" / "bench"
    add = parser.add_argument
    add("--transports", type=names(TRANSPORTS), default=",".join(TRANSPORTS), help="default: all of them")
    known = (*BASELINES, *MORE_BASELINES)
    add("--baselines", type=names(known), default=",".join(BASELINES), help=f"default: {','.join(BASELINES)}")
    add("--pages", type=page_sizes, help=f"page sizes; default: {PAGES}")
    add("--quick", action="store_true", help="256K and 1M pages, three runs of 256M: a first look")
    add("--rounds", type=int, help="runs of each contender and page size; default: 5")
    add("--run", type=bytes_of, metavar="BYTES", help="moved in each run; default: 1G")
    add("--pool", type=bytes_of, metavar="BYTES", default=256 << 20, help="size of each pool; default: 256M")
    add("--cache", type=Path, default=cache, help=f"where NIXL is installed; default: {cache}")
    add("--json", type=Path, metavar="FILE", help="where the rows go: a list of objects")
    args = parser.parse_args(argv)
    args.pages = args.pages or page_sizes("256K,1M" if args.quick else PAGES)
    args.rounds = args.rounds or (3 if args.quick else 5)
    args.run = args.run or (256 << 20 if args.quick else 1 << 30)
    if args.pool < BATCH_PAGES * max(args.pages):
        parser.error(f"--pool must hold {BATCH_PAGES} pages: a fetch may not name one twice")
    return args


def choices_of(wanted: list[str], cache: Path) -> tuple[dict[str, list[Contender]], str]:
    """The contenders by name, each with the settings to choose from; and why NIXL is not among them, if so."""
    own = {name: [Contender.own(name)] for name in wanted if not name.startswith("nixl")}
    if len(own) == len(wanted):
        return own, ""
    try:
        python = nixl_python(cache)
    except NixlMissing as error:
        return own, str(error)
    for name in wanted:
        if name.startswith("nixl"):
            settings = NIXL_CHOICES.get(name, NIXL_SETTINGS)
            progress = "polled" if name == "nixl-polled" else "threaded"
            command = (python, "-m", "bench.transfer.nixl_end", progress)
            own[name] = [Contender(name, command, how, one) for one in settings for how in ("READ", "WRITE")]
    return own, ""


async def run(args: argparse.Namespace) -> dict[int, dict[str, Measured]]:
    wanted = list(dict.fromkeys([*args.transports, *args.baselines]))
    choices, missing = choices_of(wanted, args.cache)
    plan = Plan(args.rounds, args.run, args.pool)
    measured = {}
    for page_bytes in args.pages:
        found = await measure(choices, page_bytes, plan)
        for name in wanted:
            if name not in found:
                found[name] = Measured(note=missing, failed=True)
        measured[page_bytes] = found
    return measured


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    before = Moment.now()
    rows = rows_of(asyncio.run(run(args)), args.transports, args.baselines)
    print(table(rows))
    print(f"\nMedians of {args.rounds} runs of {args.run >> 20} MiB. {machine()}.")
    print(verdict(taken_by_others(before, Moment.now())))
    for line in verdicts(rows):
        print(line)
    if args.json:
        args.json.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
