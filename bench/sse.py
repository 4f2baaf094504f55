"""How many streamed tokens per second one core of the router carries.

    python bench/sse.py [--streams 256] [--tokens 512] [--model models/baton-tiny]

The router runs in a process of its own, on one core, through its real HTTP server; its Generator is scripted: like a
decode worker it gives every stream one token per step, and starts the next step when all have taken it. The client, on
another core, reads raw sockets and counts events. Wall time and the router's own CPU time are both printed: on a busy
machine the second is the fair one.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import select
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.messages import FinishReason, Receipt, Token  # noqa: E402
from router.app import Front, build_app  # noqa: E402
from router.generation import GenerationRequest, Step  # noqa: E402
from router.limits import Limits, ServedModel  # noqa: E402
from router.metrics import RouterMetrics  # noqa: E402
from router.server import http_server  # noqa: E402
from router.tokenizer import load_tokenizer  # noqa: E402

TEXT = "The quick brown fox jumps over the lazy dog, and then it returns the sum of both values as a list.\n"


@dataclass
class SteppedGenerator:
    """All streams in lockstep: a step is one token for each, put into its queue."""

    ids: list[int]
    streams: int
    queues: dict[str, asyncio.Queue[Step]] = field(default_factory=dict)
    stepper: asyncio.Task[None] | None = None
    cpu_s: list[float] = field(default_factory=list)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Step]:
        queue: asyncio.Queue[Step] = asyncio.Queue()
        self.queues[request.request_id] = queue
        if len(self.queues) == self.streams:
            self.stepper = asyncio.create_task(self._run(request.params.max_tokens))
        while True:
            step = await queue.get()
            yield step
            if step.tokens[0].finish is not None:
                return

    async def _run(self, tokens: int) -> None:
        started = time.process_time()
        queues = list(self.queues.values())
        self.queues = {}
        for index in range(tokens):
            finish = FinishReason.LENGTH if index + 1 == tokens else None
            receipt = Receipt(computed_tokens=8) if index == 0 else None
            token_id = self.ids[index % len(self.ids)]
            for queue in queues:
                queue.put_nowait(Step((Token(0, index, token_id, None, (), finish),), receipt))
            while any(not queue.empty() for queue in queues):  # noqa: ASYNC110  an event would be one more cost
                await asyncio.sleep(0)
        self.cpu_s.append(time.process_time() - started)
        print(json.dumps({"cpu_s": self.cpu_s[-1]}), flush=True)

    def finish_choice(self, request_id: str, choice: int) -> None: ...


def serve(options: argparse.Namespace) -> None:
    """The router's process."""

    os.sched_setaffinity(0, {options.core})
    tokenizer = load_tokenizer(Path(options.model))
    generator = SteppedGenerator(tokenizer.encode_now(TEXT, add_special_tokens=False), options.streams)
    model = ServedModel(("bench",), 1 << 20, 1 << 20, 0)
    front = Front(model, tokenizer, generator, RouterMetrics("bench"), Limits(max_requests=1 << 20))
    server = http_server(build_app(front))
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.serve([listener]))


def request_bytes(options: argparse.Namespace) -> bytes:
    body = json.dumps(
        {
            "model": "bench",
            "messages": [{"role": "user", "content": "hello"}],
            "stream": True,
            "max_tokens": options.tokens,
        }
    )
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
    ).encode()


def load(port: int, options: argparse.Namespace) -> tuple[float, int, int]:
    """(seconds, events, bytes) of one round of all streams."""
    poll = select.epoll()
    sockets = {}
    for _ in range(options.streams):
        connection = socket.create_connection(("127.0.0.1", port))
        sockets[connection.fileno()] = connection
        poll.register(connection.fileno(), select.EPOLLIN)
    started = time.perf_counter()
    for connection in sockets.values():
        connection.sendall(request_bytes(options))
    events = size = 0
    while sockets:
        for number, _ in poll.poll():
            data = sockets[number].recv(1 << 18)
            events += data.count(b'"delta"')
            size += len(data)
            if not data:
                poll.unregister(number)
                sockets.pop(number).close()
    return time.perf_counter() - started, events, size


def measure(options: argparse.Namespace) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    command = [sys.executable, __file__, "--core", str(cores[0])]
    for name in ("streams", "tokens", "model"):
        command += [f"--{name}", str(getattr(options, name))]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        port = json.loads(server.stdout.readline())["port"]
        rates = []
        for number in range(options.rounds):
            wall_s, events, size = load(port, options)
            cpu_s = json.loads(server.stdout.readline())["cpu_s"]
            assert events >= options.streams * options.tokens * 0.9, events
            total = options.streams * options.tokens
            rates.append(total / cpu_s)
            print(
                f"round {number}: {total / wall_s:,.0f} tokens/s by wall time, {total / cpu_s:,.0f} per CPU second, "
                f"{cpu_s / total * 1e6:.1f} us and {size / total:.0f} bytes a token"
            )
        print(f"median: {statistics.median(rates):,.0f} tokens per second and core, {options.streams} streams")
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default=str(ROOT / "models/baton-tiny"))
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.core is None:
        measure(options)
    else:
        serve(options)


if __name__ == "__main__":
    main()
