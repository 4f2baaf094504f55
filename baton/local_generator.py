"""A router's Generator over the one worker of this process: a session without a wire, a retry or a second worker.

generate --Submit--> tier ... engine ... outlet --tokens, failure--> deliver --> inbox of the request --> Step
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from core.errors import BatonError, EngineError, WorkerError, WorkerLost, leaves
from core.messages import Cancel, RequestFailed, Submit, TokenBatch, Tokens
from router.generation import GenerationRequest, Step
from router.progress import Progress
from session.outlet import Outlet
from session.tier import Tier

ROUTER = "local"
ATTEMPT = 1
MAX_REQUESTS = 200  # below what an outlet queues: none is dropped even when one step fails for all of them


class LocalGenerator:
    """Implements router.generation.Generator. Belongs to the event loop that it is used on."""

    def __init__(self, tier: Tier, outlet: Outlet) -> None:
        self._tier = tier
        self._outlet = outlet
        self._queue, _ = outlet.open(ROUTER, {})
        self._inboxes: dict[str, asyncio.Queue[Tokens | BatonError]] = {}
        self._room = asyncio.Semaphore(MAX_REQUESTS)
        self._broken: BatonError | None = None

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Step]:
        """See router.generation.Generator. Waits while too many others run."""
        async with self._room:
            if self._broken is not None:
                raise self._broken
            try:
                inbox = self._submit(request)
                progress = Progress(request.params.n, request.params.max_tokens)
                while not progress.is_done:
                    item = await inbox.get()
                    if isinstance(item, BatonError):
                        raise item
                    yield Step(progress.accept(item), item.receipt)
            finally:
                self._let_go(request.request_id)

    def finish_choice(self, request_id: str, choice: int) -> None:
        """See router.generation.Generator."""
        self._tier.cancel(Cancel(request_id, ATTEMPT, (choice,)))

    async def deliver(self) -> None:
        """Hands each request what the worker says to it, until cancelled."""
        while (message := await self._queue.messages.get()) is not None:
            if isinstance(message, TokenBatch):
                for item in message.items:
                    self._put(item.request_id, item)
            else:
                self._put(message.request_id, _error_of(message))
        self.fail(WorkerLost("more was said at once than the session holds"))

    def fail(self, error: BatonError) -> None:
        """The worker is gone: the end of every request, and of those that come later."""
        self._broken = error
        for inbox in self._inboxes.values():
            inbox.put_nowait(error)

    def engine_ended(self, task: asyncio.Task[None]) -> None:
        """The callback of the engine's task, which ends by itself only through an error of ours."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(EngineError(f"the engine has stopped: {error!r}"))

    def _submit(self, request: GenerationRequest) -> asyncio.Queue[Tokens | BatonError]:
        """Raises InvalidRequest or NoCapacity."""
        assert request.params.seed is not None, "the caller sets a seed"
        submit = Submit(
            request_id=request.request_id,
            attempt=ATTEMPT,
            prompt_ids=request.prompt_ids,
            params=request.params,
            seed=request.params.seed,
            deadline_s=request.deadline_s,
            salt=request.salt,
            priority=request.priority,
        )
        inbox = self._inboxes[request.request_id] = asyncio.Queue()
        self._outlet.hold(ROUTER, (submit.request_id, ATTEMPT))
        self._tier.submit(submit)
        return inbox

    def _let_go(self, request_id: str) -> None:
        self._tier.cancel(Cancel(request_id, ATTEMPT))
        self._outlet.forget((request_id, ATTEMPT))
        self._inboxes.pop(request_id, None)

    def _put(self, request_id: str, item: Tokens | BatonError) -> None:
        inbox = self._inboxes.get(request_id)
        if inbox is not None:
            inbox.put_nowait(item)


def _error_of(message: RequestFailed) -> BatonError:
    return leaves().get(message.code, WorkerError)(message.message)
