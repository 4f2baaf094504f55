"""What a hand-off costs a request in a served system: the same engine disaggregated and aggregated, in turn.

    python -m bench.handoff MODEL [--threads 2] [--json out.json]

Two servers are up at once, with the same weights, chunks and threads: one prefill and one decode worker, and two
aggregated ones, of which one is idle. One request at a time; each prompt is random and new, so that nothing of it is
cached. Runs alternate; a figure is the median of the runs' medians.

added TTFT      first token, disaggregated less aggregated; the prefill worker says it, before the pages have moved
added 2nd       second token, which decode says after the hand-off: what the client waits for it in all
hidden          share of the hand-off's bytes that were verified before the prompt was computed, by the receipts
exposed         from the end of the prompt to the commit, by the receipts

Targets: added TTFT at most 5 % of prefill (the aggregated TTFT) and 5 ms; at eight chunks, 80 % of the bytes hidden.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START_S = 300.0  # large weights on a busy machine
REQUEST_S = 600.0
WARM_REQUESTS = 4  # the first ones find cold pages, cold code, and no session between the workers
TTFT_SHARE, TTFT_S, HIDDEN_SHARE = 0.05, 0.005, 0.8  # the targets


@dataclass(frozen=True, slots=True)
class Timed:
    """One request. Seconds from its sending."""

    first_s: float
    second_s: float
    hidden: float = 0.0  # share of the bytes
    exposed_s: float = 0.0
    transfer_s: float = 0.0
    moved_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    port: int

    def ask(self, prompt: list[int]) -> Timed:
        """Raises RuntimeError with what the server said, when that was no answer."""
        body = {
            "model": "bench", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_S)
        try:
            began_s = time.monotonic()
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            if reply.status != 200:
                raise RuntimeError(f"{self.name}: {reply.status} {reply.read(500)!r}")
            times_s, usage = read_stream(reply, began_s)
        finally:
            connection.close()
        if len(times_s) < 2 or usage["prompt_tokens"] != len(prompt) or usage["prompt_tokens_details"]["cached_tokens"]:
            raise RuntimeError(f"{self.name}: {len(times_s)} chunks, {usage}")
        return timed(times_s, usage)


def read_stream(reply: http.client.HTTPResponse, began_s: float) -> tuple[list[float], Mapping[str, Any]]:
    """When each token came, and the usage at the end. Raises RuntimeError for an error in the stream."""
    times_s: list[float] = []
    usage: Mapping[str, Any] = {}
    for line in reply:
        now_s = time.monotonic()
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[len(b"data: ") :])
        if "error" in event:
            raise RuntimeError(str(event["error"]))
        if event["choices"]:
            times_s.append(now_s - began_s)
        usage = event.get("usage") or usage
    return times_s, usage


def timed(times_s: list[float], usage: Mapping[str, Any]) -> Timed:
    moved = usage.get("handoff")
    if moved is None:
        return Timed(times_s[0], times_s[1])
    figures = (moved["overlap"], moved["exposed_transfer_s"], moved["transfer_s"], moved["transferred_bytes"])
    return Timed(times_s[0], times_s[1], *figures)


@contextmanager
def serving(name: str, args: argparse.Namespace, *flags: str) -> Iterator[Server]:
    """A server of its own, until the block ends. Raises RuntimeError when it does not start."""
    port = free_port()
    command = [
        sys.executable, "-m", "baton", "serve", str(args.model), "--port", str(port), "--served-model-name", "bench",
        "--threads", str(args.threads), "--step-tokens", str(args.prompt_tokens // args.chunks),
        "--max-context", str(args.prompt_tokens + 64), "--local-prefill", "1", *flags,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=sys.stderr, stdin=subprocess.DEVNULL) as process:
        try:
            wait_until_ready(name, port, process)
            yield Server(name, port)
        finally:
            process.send_signal(signal.SIGTERM)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(name: str, port: int, process: subprocess.Popen[bytes]) -> None:
    ends_s = time.monotonic() + START_S
    while time.monotonic() < ends_s and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.2)
    raise RuntimeError(f"{name} did not start")


def median_of(runs: list[Timed]) -> Timed:
    return Timed(*(statistics.median(getattr(run, field.name) for run in runs) for field in fields(Timed)))


def measure(servers: list[Server], args: argparse.Namespace) -> dict[str, list[Timed]]:
    """Each server's runs: the median request of each."""
    dice = random.Random(args.seed)
    ids = range(10, vocabulary(args.model) - 100)

    def run(server: Server, requests: int) -> Timed:
        return median_of([server.ask(dice.choices(ids, k=args.prompt_tokens)) for _ in range(requests)])

    for server in servers:
        run(server, WARM_REQUESTS)
    runs: dict[str, list[Timed]] = {server.name: [] for server in servers}
    for number in range(args.rounds):
        for server in servers if number % 2 == 0 else reversed(servers):
            runs[server.name].append(run(server, args.requests))
            print(f"round {number + 1} {server.name}: {runs[server.name][-1]}", file=sys.stderr)
    return runs


def vocabulary(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def report(apart: Timed, together: Timed) -> str:
    """A row per figure: what was measured, the target, and whether it was met."""
    allowed_s = TTFT_SHARE * together.first_s + TTFT_S
    added_s = apart.first_s - together.first_s
    rows = [
        ("TTFT aggregated", f"{together.first_s * 1e3:.1f} ms", ""),
        ("TTFT disaggregated", f"{apart.first_s * 1e3:.1f} ms", ""),
        ("added TTFT", f"{added_s * 1e3:.1f} ms", f"<= {allowed_s * 1e3:.1f} ms: {met(added_s <= allowed_s)}"),
        ("added 2nd token", f"{(apart.second_s - together.second_s) * 1e3:.1f} ms", ""),
        ("bytes moved", f"{apart.moved_bytes / 2**20:.1f} MiB", ""),
        ("bytes hidden", f"{apart.hidden:.1%}", f">= {HIDDEN_SHARE:.0%}: {met(apart.hidden >= HIDDEN_SHARE)}"),
        ("transfer", f"{apart.transfer_s * 1e3:.1f} ms", ""),
        ("exposed transfer", f"{apart.exposed_s * 1e3:.1f} ms", ""),
    ]
    lines = ["| figure | median | target |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} | {target} |" for name, value, target in rows])


def met(holds: bool) -> str:
    return "met" if holds else "missed"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--chunks", type=int, default=8, help="steps of each prompt")
    parser.add_argument("--threads", type=int, default=0, help="compute threads of each worker; 0: one per core")
    parser.add_argument("--requests", type=int, default=5, help="of each run")
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs of each server")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where every run's figures go")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    with ExitStack() as stack:
        apart = stack.enter_context(serving("disaggregated", args))
        together = stack.enter_context(serving("aggregated", args, "--aggregated"))
        runs = measure([apart, together], args)
    print(report(median_of(runs["disaggregated"]), median_of(runs["aggregated"])))
    if args.json:
        args.json.write_text(json.dumps({name: [asdict(run) for run in of] for name, of in runs.items()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
