"""What clients ask for: made traffic from a seed, and recorded traffic from a file."""

from __future__ import annotations

import csv
import gzip
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Arrival:
    """Tokens of the prompt that no cache has, and of the answer."""

    at_s: float
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Traffic:
    name: str
    says: str
    for_s: float
    arrivals: tuple[Arrival, ...]  # by time


@dataclass(frozen=True, slots=True)
class Mix:
    """Means; lengths are drawn around them, from half to one and a half times."""

    per_s: float
    input_tokens: int
    output_tokens: int


def made(name: str, says: str, for_s: float, mix: Callable[[float], Mix], seed: int) -> Traffic:
    """A Poisson stream whose rate and lengths follow `mix` of the time."""
    draw = random.Random(f"{name}/{seed}")
    top = max(mix(second).per_s for second in range(int(for_s) + 1)) or 1.0
    arrivals, now_s = [], draw.expovariate(top)
    while now_s < for_s:
        is_now = mix(now_s)
        if draw.random() * top < is_now.per_s:
            means = (is_now.input_tokens, is_now.output_tokens)
            arrivals.append(Arrival(now_s, *(max(1, round(mean * draw.uniform(0.5, 1.5))) for mean in means)))
        now_s += draw.expovariate(top)
    return Traffic(name, says, for_s, tuple(arrivals))


def _noise(seed: int) -> Callable[[float], Mix]:
    """A rate that is another one every ten seconds, without any trend."""
    draw = random.Random(f"rates/{seed}")
    rates = [draw.lognormvariate(math.log(8), 0.35) for _ in range(181)]
    return lambda s: Mix(rates[int(s // 10)], 3000, 250)


def workloads(seed: int = 1) -> list[Traffic]:
    """The made ones, half an hour each or so."""
    return [
        made("burst", "4 requests/s, five times as many for two minutes, twice", 1800.0,
             lambda s: Mix(20.0 if 600 <= s < 720 or 1200 <= s < 1320 else 4.0, 4000, 250), seed),
        made("sine", "1 to 24 requests/s and back in 15 minutes, prompts of 8,000 tokens", 1800.0,
             lambda s: Mix(12.5 - 11.5 * math.cos(2 * math.pi * s / 900), 8000, 250), seed),
        made("shift", "long prompts and short answers, then the reverse, and back", 2400.0, _shift, seed),
        made("ramp", "1 to 20 requests/s within 20 minutes", 1500.0,
             lambda s: Mix(1.0 + 19.0 * min(1.0, s / 1200), 4000, 300), seed),
        made("noise", "8 requests/s on average, another rate every ten seconds", 1800.0, _noise(seed), seed),
        made("idle", "a request a minute", 1800.0, lambda s: Mix(1 / 60, 1000, 200), seed),
    ]  # fmt: skip


def _shift(s: float) -> Mix:
    """From the one to the other within three minutes, every thirteen."""
    share = min(1.0, max(0.0, (s - 800) / 180)) - min(1.0, max(0.0, (s - 1600) / 180))
    long, short = Mix(10.0, 8000, 100), Mix(14.0, 500, 1500)
    return Mix(*(round(a + (b - a) * share) for a, b in zip(_of(long), _of(short), strict=True)))


def _of(mix: Mix) -> tuple[float, int, int]:
    return mix.per_s, mix.input_tokens, mix.output_tokens


def recorded(path: Path, times: int, seed: int = 1) -> Traffic:
    """A trace, each request `times` times within half a minute, so that it fills a fleet.

    Reads CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens, and JSON lines with timestamp (ms),
    input_length, output_length; either may be compressed with gzip. Raises ValueError for anything else.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        kind = path.name.removesuffix(".gz").rpartition(".")[2]
        if kind not in ("csv", "jsonl"):
            raise ValueError(f"{path.name}: neither .csv nor .jsonl")
        rows = list(_csv(file) if kind == "csv" else _json_lines(file))
    if not rows:
        raise ValueError(f"{path.name}: no request in it")
    draw, first_s = random.Random(seed), rows[0].at_s
    copies = [
        Arrival(row.at_s - first_s + draw.uniform(0, 30.0 if times > 1 else 0.0), row.input_tokens, row.output_tokens)
        for row in rows
        for _ in range(times)
    ]
    copies.sort(key=lambda arrival: arrival.at_s)
    says = f"{len(rows)} recorded requests" + (f", each {times} times" if times > 1 else "")
    return Traffic(path.name.partition(".")[0], says, copies[-1].at_s, tuple(copies))


def _csv(lines: Iterable[str]) -> Iterator[Arrival]:
    for row in csv.DictReader(lines):
        at_s = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
        yield Arrival(at_s, max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"])))


def _json_lines(lines: Iterable[str]) -> Iterator[Arrival]:
    for line in lines:
        row = json.loads(line)
        yield Arrival(row["timestamp"] / 1000, max(1, row["input_length"]), max(1, row["output_length"]))
