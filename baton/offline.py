"""`baton batch`: its options, how it is stopped, and its exit code: 0 when every line was answered, 1 otherwise."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import setproctitle

from baton.checkpoint import locate
from baton.quiet_threads import wait_asleep
from core.errors import ConfigError

if TYPE_CHECKING:
    from baton.batch import Job, Tally

EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("input", type=Path, metavar="IN.jsonl", help="one request per line, in OpenAI's batch format")
    add("output", type=Path, metavar="OUT.jsonl", help="one answer per line, as they come; replaced if it is there")
    add("--model", required=True, metavar="PATH_OR_HF_ID", help="folder of a checkpoint, or its id on the hub")
    add("--served-model-name", default="", metavar="NAME", help="what the requests call it; the folder's name if empty")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="type of weights and KV")
    add("--max-context", type=int, default=0, metavar="TOKENS", help="longest prompt and output; 0: the model's own")
    add("--kv-memory", type=float, default=0.0, metavar="GIB", help="memory for KV pages; 0: what is sensible")
    add("--pages", type=int, default=0, help="pages of the pool, instead of --kv-memory")
    add("--page-size", type=int, default=16, metavar="TOKENS", help="tokens per page, a multiple of 16")
    add("--step-tokens", type=int, default=512, metavar="TOKENS", help="prompt tokens computed in one step")
    add("--threads", type=int, default=0, help="compute threads; 0: one per core")
    add("--concurrency", type=int, default=128, metavar="N", help="lines that are answered at a time, at most")


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError, CheckpointError and TooLittleMemory."""
    setproctitle.setproctitle("baton-batch")
    wait_asleep()
    from baton.batch import Tally, count_lines  # only now: this loads torch

    if args.concurrency < 1:
        raise ConfigError(f"--concurrency must be at least 1, got {args.concurrency}")
    tally = Tally(lines=count_lines(args.input))
    if args.output.exists() and args.output.samefile(args.input):
        raise ConfigError(f"{args.output}: the output would replace the input")
    job = _job(args)
    began_s = time.monotonic()
    ended = asyncio.run(_answered(job, tally))
    print(
        f"{'' if ended else 'stopped: '}{tally.ok} of {tally.lines} requests answered, {tally.failed} failed, "
        f"{tally.tokens} tokens in {time.monotonic() - began_s:.1f} s: {args.output}",
        file=sys.stderr,
    )
    return int(tally.ok < tally.lines) if ended else EXIT_INTERRUPTED


def _job(args: argparse.Namespace) -> Job:
    """Loads the model."""
    from baton.batch import Job
    from baton.loaded_model import PoolWish
    from baton.local_engine import EngineWish, load_with_bar

    pool = PoolWish(args.page_size, args.pages, int(args.kv_memory * 2**30), args.max_context)
    wish = EngineWish(args.dtype, pool, args.threads, args.step_tokens)
    checkpoint = locate(args.model)
    loaded = load_with_bar(checkpoint, wish, show=True)
    return Job(args.input, args.output, checkpoint, args.served_model_name, loaded, wish, args.concurrency)


async def _answered(job: Job, tally: Tally) -> bool:
    """False if a signal has stopped it. The handlers are set here, because a shell's `&` has SIGINT ignored."""
    from baton.batch import answer_file

    work = asyncio.create_task(answer_file(job, tally))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        return False
    return True
