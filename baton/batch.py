"""Answers a file of requests through the router's own application, in this process and without HTTP.

Lines are read as there is room, asked several at a time, and written as they are answered: each with one write, so
that the output is whole lines whenever the work is stopped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from starlette.types import ASGIApp
from tqdm import tqdm

import baton
from baton.batch_line import TOO_MANY_REQUESTS, Answer, Question, answered, id_of, not_asked, parse_line
from baton.completer import DEADLINE_S
from baton.in_process import post
from baton.loaded_model import LoadedModel
from baton.local_engine import EngineWish, LocalEngine
from baton.local_generator import MAX_REQUESTS
from baton.model_facts import served_model
from core.errors import BatonError, ConfigError
from core.sampling import MAX_CHOICES
from router.app import Front, build_app
from router.generation import Generator
from router.limits import Limits, ServedModel
from router.metrics import RouterMetrics
from router.tokenizer import ModelTokenizer, load_tokenizer

UNBOUNDED = 2**62
PATIENCE_S = 0.2  # before a line is asked again that the front had no room for

LIMITS = Limits(
    max_body_bytes=256 * 2**20,
    max_prompts=4096,
    max_choices=MAX_CHOICES,
    max_requests=UNBOUNDED,  # nobody else is there: the window bounds what is in flight
    max_queued_tokens=UNBOUNDED,
    deadline_s=DEADLINE_S,
)


@dataclass(slots=True)
class Tally:
    """How far the batch is."""

    lines: int = 0  # in the input
    ok: int = 0
    failed: int = 0
    tokens: int = 0

    def add(self, answer: Answer) -> None:
        self.ok += answer.ok
        self.failed += not answer.ok
        self.tokens += answer.tokens


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be answered, and by what."""

    source: Path
    target: Path
    checkpoint: Path
    names: str  # that the requests may call the model by, separated by commas; the folder's when empty
    loaded: LoadedModel
    wish: EngineWish
    window: int  # lines that are answered at a time


async def answer_file(job: Job, tally: Tally) -> None:
    """Fills the target and the tally. Raises ConfigError for files, and CheckpointError for the tokenizer."""
    model = served_model(job.checkpoint, job.names, job.wish.pool.max_context_tokens, int(time.time()))
    tokenizer = load_tokenizer(job.checkpoint)
    try:
        with _opened(job.source, "rb") as lines, _opened(job.target, "wb") as out:
            async with LocalEngine(job.loaded, job.wish) as generator:
                app = build_app(_front(model, tokenizer, generator))
                await Batch(app, lines, out, tally).run(min(job.window, MAX_REQUESTS))
    finally:
        tokenizer.close()


def count_lines(source: Path) -> int:
    """Lines with something in them. Raises ConfigError."""
    with _opened(source, "rb") as lines:
        return sum(1 for line in lines if line.strip())


def _opened(path: Path, mode: str) -> IO[bytes]:
    try:
        return path.open(mode)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


def _front(model: ServedModel, tokenizer: ModelTokenizer, generator: Generator) -> Front:
    metrics = RouterMetrics(model.names[0])
    return Front(model, tokenizer, generator, metrics, LIMITS, version=baton.__version__)


class Batch:
    """Asks the lines of one file."""

    def __init__(self, app: ASGIApp, lines: IO[bytes], out: IO[bytes], tally: Tally) -> None:
        self._app = app
        self._lines = lines
        self._out = out
        self._tally = tally
        self._ids: set[str] = set()

    async def run(self, window: int) -> None:
        """Returns when every line has its answer. Cancelled, it leaves those that it has."""
        bar = tqdm(total=self._tally.lines, unit="request", desc="answering", disable=None)
        numbered = _numbered(self._lines)
        askers = [asyncio.create_task(self._ask_on(numbered, bar)) for _ in range(window)]
        try:
            await asyncio.gather(*askers)
        finally:
            for asker in askers:
                asker.cancel()
            await asyncio.gather(*askers, return_exceptions=True)
            bar.close()

    async def _ask_on(self, numbered: Iterator[tuple[int, bytes]], bar: tqdm[Any]) -> None:
        """One line after the other, of those that nobody has taken."""
        for number, line in numbered:
            answer = await self._answer(number, line)
            self._out.write(answer.text.encode())
            self._out.flush()
            self._tally.add(answer)
            bar.set_postfix(tokens=self._tally.tokens, failed=self._tally.failed, refresh=False)
            bar.update()

    async def _answer(self, number: int, line: bytes) -> Answer:
        try:
            question = parse_line(line, self._ids)
        except BatonError as error:
            return not_asked(id_of(line), number, error)
        return await self._ask(question)

    async def _ask(self, question: Question) -> Answer:
        while True:
            reply = await post(self._app, question.url, question.body)
            if reply.status != TOO_MANY_REQUESTS:
                return answered(question, reply)
            await asyncio.sleep(PATIENCE_S)


def _numbered(lines: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines with something in them, counted from 1 with the empty ones."""
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())
