"""The life of a request, from the socket to the last byte. Start reading Baton here.

    read       body -> Call             checked field by field                 (validation.py, openai_*.py)
    admit      a slot within the bounds, or 429                                (admission.py)
    tokenize   texts -> ids, the chat template, the context's length           (tokenizer.py, chat_template.py)
    submit     Generator.generate: choice of workers, hand-off, retry, replay  (saga.py)
    stream     tokens -> text that is certain -> events, or one reply          (output.py, sse.py, reply.py)
    account    tokens and times of the request, however it ended               (metrics.py)

Each step's undo stands beside it, as the end of its `with` block. A client that leaves cancels the block, which
closes the generator's iterator, which frees the pages at every worker.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from core.clock import Clock, monotonic_s
from core.errors import BatonError, Cancelled, NoCapacity
from router.admission import Admission
from router.call import Call
from router.connection import Connection
from router.fan_out import generated
from router.generation import Generator
from router.limits import Limits, ServedModel
from router.metrics import RouterMetrics
from router.model_names import check_model
from router.output import Output
from router.prompts import Prompts
from router.reply import ReplyHead, Shape
from router.sse import EventStream, ReplyParts, ReplyWriter, WholeReply
from router.validation import parse_object

logger = logging.getLogger(__name__)


def random_id() -> str:
    """128 random bits: a request's name can be neither guessed nor chosen by a client."""
    return secrets.token_hex(16)


def random_seed() -> int:
    return secrets.randbits(63)


@dataclass(frozen=True, slots=True)
class Handler:
    """Serves the calls of both endpoints. One per process."""

    model: ServedModel
    limits: Limits
    prompts: Prompts
    generator: Generator
    admission: Admission
    metrics: RouterMetrics
    clock: Clock = monotonic_s
    wall_clock: Callable[[], float] = time.time
    new_id: Callable[[], str] = random_id
    new_seed: Callable[[], int] = random_seed

    async def serve(self, shape: Shape, connection: Connection, request_id: str) -> None:
        """One call. It ends once: with a reply, or with an error that the client can act on."""
        outcome = Cancelled.code  # unless it comes to another end
        try:
            call = shape.parse(parse_object(await connection.body()), self.model, self.limits)  # read
            check_model(call.model, self.model)
            async with connection:  # undo: stops watching the client; that it left is raised as Cancelled
                await self._live(call, shape, connection, request_id)
            outcome = "ok"
        except BatonError as error:
            outcome = error.code
            logger.info("request %s: %s: %s", request_id, error.code, error)
            await connection.fail(error)
        except Exception:  # a mistake of ours ends this request, not the server
            outcome = BatonError.code
            logger.exception("request %s failed", request_id)
            await connection.fail(BatonError("internal error"))
        except asyncio.CancelledError:  # the server stops before the request has ended
            await connection.fail(NoCapacity("the server is stopping", retry_after_s=1.0))
            raise
        finally:
            self.metrics.count_outcome(outcome)

    async def _live(self, call: Call, shape: Shape, connection: Connection, request_id: str) -> None:
        arrived = self.clock()
        with await self.admission.admit(call.choices) as slot:  # admit; undo: the slot is free again
            requests = await self.prompts.requests(call, request_id, self.limits.deadline_s, self.new_seed)  # tokenize
            await slot.queue([len(request.prompt_ids) for request in requests])  # undo: with the slot
            output = Output(call, requests, self.prompts.tokenizer, self.generator.finish_choice)
            writer = self._writer(call, shape, connection, request_id, output)
            with self.metrics.account(requests, output, arrived) as account:  # account; counts any ending
                async with generated(self.generator, requests) as steps:  # submit; undo: cancels at every worker
                    async for number, step in steps:
                        if account.tick(number, self.clock()):
                            slot.started(number)
                        await writer.take(number, step)  # stream; waits for a client that reads slowly
                        if output.done:
                            break
                output.check_complete()
                await writer.end()

    def _writer(self, call: Call, shape: Shape, connection: Connection, request_id: str, output: Output) -> ReplyWriter:
        head = ReplyHead(request_id, int(self.wall_clock()), call.model)
        echo = self.prompts.texts(call) if call.echo else []
        parts = ReplyParts(call, shape, head, output, echo)
        return EventStream(parts, connection) if call.stream else WholeReply(parts, connection)
