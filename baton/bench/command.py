"""What `baton bench` does: prompts drawn, server warmed up, load run with a progress bar, figures shown and written."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from tqdm import tqdm

from baton import endpoint as endpoints
from baton.bench import report
from baton.bench.load import closed_loop, open_loop, poisson_times_s
from baton.bench.metrics import Summary, parse_slo, summarize
from baton.bench.prompts import Prompt, RandomPrompts, load_tokenizer
from baton.bench.stream import Outcome, timed_request
from core.clock import monotonic_s
from core.errors import ConfigError

DEFAULT_CONCURRENCY = 8


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent, and how fast: by `rate_per_s`, or else by `concurrency`."""

    requests: int
    concurrency: int
    rate_per_s: float | None
    warmup: int
    path: str  # completions or chat/completions
    as_ids: bool
    body: Mapping[str, Any]  # what all requests have in common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    endpoints.add_arguments(parser)
    add = parser.add_argument
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument(
        "--concurrency", type=_positive, help=f"requests under way at once (default: {DEFAULT_CONCURRENCY})"
    )
    pace.add_argument("--rate", type=float, metavar="PER_S", help="send by a Poisson process of this rate instead")
    add("--requests", type=_positive, default=64, help="how many requests are measured")
    add("--warmup", type=int, default=1, help="requests sent before, and not measured")
    add("--input-tokens", type=_positive, default=512, help="tokens of each prompt")
    add("--output-tokens", type=_positive, default=64, help="most tokens of each answer")
    add("--tokenizer", metavar="PATH", help="folder with the model's tokenizer.json (default: --model, if a folder)")
    add("--prompts", choices=("text", "ids"), default="text", help="send prompts as text or as token ids")
    add("--endpoint", choices=("completions", "chat"), default="completions", help="which API is loaded")
    add("--ignore-eos", action="store_true", help="let every answer reach its most tokens")
    add("--temperature", type=float, default=0.0, help="sampling temperature")
    add("--seed", type=int, default=0, help="of the prompts and of the arrival times")
    add("--slo", metavar="BOUNDS", help="count the requests that keep these, in ms, as in ttft=500,tpot=50")
    add("--timeout-s", type=float, default=600.0, help="give a request up when nothing comes for so long")
    add("--json", type=Path, metavar="FILE", help="write settings, figures and every request there")


def run(args: argparse.Namespace) -> int:
    """Exit code 1 when any request failed."""
    _check(args)
    slo_ms = parse_slo(args.slo) if args.slo else None
    rng = random.Random(args.seed)
    source = RandomPrompts(load_tokenizer(args.tokenizer or args.model or ""), args.input_tokens, rng)
    prompts = [source.draw() for _ in range(args.warmup + args.requests)]
    outcomes, duration_s = uvloop.run(_drive(args, prompts, rng))
    summary = summarize(outcomes, duration_s, slo_ms)
    print(report.table(summary))
    if args.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        settings.pop("api_key")
        args.json.write_text(json.dumps(report.document(settings, summary, outcomes), indent=1) + "\n")
    return _verdict(summary)


def _verdict(summary: Summary) -> int:
    if summary.failed:
        print(f"\n{summary.failed} requests failed:\n{report.failures(summary)}")
    return 1 if summary.failed else 0


def _check(args: argparse.Namespace) -> None:
    """What argparse cannot say. Raises ConfigError before anything is sent."""
    if args.rate is not None and not args.rate > 0:
        raise ConfigError(f"--rate must be above 0, got {args.rate}", param="rate")
    if args.prompts == "ids" and args.endpoint == "chat":
        raise ConfigError("--prompts ids needs --endpoint completions: a chat message is text", param="prompts")
    if not args.tokenizer and not Path(args.model or "?").is_dir():
        raise ConfigError("--tokenizer must name the folder of the model's tokenizer.json", param="tokenizer")
    if args.json and not args.json.parent.is_dir():
        raise ConfigError(f"--json: no folder {args.json.parent}", param="json")


async def _drive(
    args: argparse.Namespace, prompts: Sequence[Prompt], rng: random.Random
) -> tuple[list[Outcome], float]:
    """Runs the load. Gives the outcomes and the seconds from the first request to the last answer."""
    endpoint = endpoints.from_args(args)
    async with endpoints.open_session(endpoint, idle_s=args.timeout_s) as session:
        model = args.model or await endpoints.served_model(session, endpoint)
        load = _load(args, model)
        bar = tqdm(total=len(prompts), unit="req", desc="warm-up", disable=None)  # None: silent unless on a terminal
        sender = Sender(session, endpoint.url(load.path), load, bar)
        await closed_loop(sender.send, prompts[: load.warmup], load.concurrency)
        bar.set_description("measure")
        start_s = monotonic_s()
        if load.rate_per_s is None:
            outcomes = await closed_loop(sender.send, prompts[load.warmup :], load.concurrency)
        else:
            due_s = poisson_times_s(load.rate_per_s, load.requests, rng)
            outcomes = await open_loop(sender.send, prompts[load.warmup :], due_s)
        duration_s = monotonic_s() - start_s
        bar.close()
    return outcomes, duration_s


def _load(args: argparse.Namespace, model: str) -> Load:
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    body |= {"temperature": args.temperature, **({"ignore_eos": True} if args.ignore_eos else {})}
    body["max_completion_tokens" if args.endpoint == "chat" else "max_tokens"] = args.output_tokens
    return Load(
        requests=args.requests,
        concurrency=args.concurrency or DEFAULT_CONCURRENCY,
        rate_per_s=args.rate,
        warmup=args.warmup,
        path="chat/completions" if args.endpoint == "chat" else "completions",
        as_ids=args.prompts == "ids",
        body=body,
    )


class Sender:
    """Sends one prompt after another as requests of the same kind, and moves the progress bar."""

    def __init__(self, session: aiohttp.ClientSession, url: str, load: Load, bar: tqdm[Any]) -> None:
        self._session = session
        self._url = url
        self._load = load
        self._bar = bar

    async def send(self, prompt: Prompt) -> Outcome:
        outcome = await timed_request(self._session, self._url, self._body(prompt), monotonic_s)
        self._bar.update()
        return outcome

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        if self._load.path == "chat/completions":
            return {**self._load.body, "messages": [{"role": "user", "content": prompt.text}]}
        return {**self._load.body, "prompt": list(prompt.ids) if self._load.as_ids else prompt.text}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
