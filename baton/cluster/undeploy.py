"""`baton undeploy`: takes a cluster down. Its workers finish what they have, within the drain times of its file."""

from __future__ import annotations

import argparse

from baton.cluster.connection import connected


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", default="auto", help="of the Ray cluster: auto finds the one of this node")
    parser.add_argument("--wait-s", type=float, default=1800.0, help="how long to wait until everything has ended")


def run(args: argparse.Namespace) -> int:
    """Raises StartupError."""
    with connected(args.address):
        from baton.cluster.rollout import take_down

        was_there = take_down(args.wait_s, lambda line: print(line, flush=True))
    print("gone" if was_there else "nothing is deployed", flush=True)
    return 0
