"""`baton deploy`: a cluster file onto a running Ray cluster. What is up already is changed, what is not is started."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from baton.cluster.connection import connected
from baton.cluster.spec import load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, metavar="CLUSTER.YAML", help="what the cluster is to be: see deploy/cluster.yaml"
    )
    parser.add_argument("--address", default="auto", help="of the Ray cluster: auto finds the one of this node")
    parser.add_argument("--wait-s", type=float, default=1800.0, help="how long to wait until everything is up")


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError and StartupError."""
    plain = with_whole_path(load(args.file))
    with connected(args.address):
        from baton.cluster.rollout import roll_out

        url = roll_out(plain, args.wait_s, lambda line: print(line, flush=True))
    print(f"ready: {url}   look at it: baton status {url}", flush=True)
    return 0


def with_whole_path(plain: dict[str, Any]) -> dict[str, Any]:
    """A folder is looked for from here, not from where the workers run."""
    folder = Path(plain["model"]["path"])
    if folder.is_dir():
        return {**plain, "model": {**plain["model"], "path": str(folder.resolve())}}
    return plain
