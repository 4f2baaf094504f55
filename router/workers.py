"""What the router knows of its workers, and to which request a worker's message goes.

A link per worker delivers what the worker says; the saga reads it from the inbox of its attempt. Nothing here waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from core.clock import Clock
from core.errors import WorkerLost
from core.hashing import block_hashes, root_hash
from core.messages import (
    Cancel,
    Lend,
    Load,
    PagesChanged,
    Peer,
    RequestFailed,
    Submit,
    TokenBatch,
    Tokens,
    WorkerId,
    WorkerInfo,
)
from router.choose import Candidate
from router.index import PrefixIndex

MAX_INBOX = 65536


class Link(Protocol):
    """The connection to one worker. Sending never waits; what cannot be sent raises WorkerLost."""

    def submit(self, submit: Submit) -> None: ...

    def cancel(self, cancel: Cancel) -> None: ...

    def lend(self, lend: Lend) -> None: ...


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker has gone, or has been silent for too long."""

    worker: WorkerId


Message = Tokens | RequestFailed | Lost


@dataclass(slots=True)
class Inbox:
    """What the workers of one attempt say to it, in order, each message with its sender."""

    request_id: str
    attempt: int
    workers: tuple[WorkerId, ...]
    next_index: Callable[[], list[int]]  # per choice, what the client has not been given yet
    before: tuple[WorkerId, ...] = ()  # of earlier attempts: their loss is told, and nothing else of them
    messages: asyncio.Queue[tuple[WorkerId, Message]] = field(default_factory=lambda: asyncio.Queue(MAX_INBOX))


@dataclass(slots=True)
class _Worker:
    info: WorkerInfo
    link: Link
    load: Load = field(default_factory=Load)
    index: PrefixIndex = field(default_factory=PrefixIndex)
    unreported_tokens: int = 0
    unreported_requests: int = 0
    draining: bool = False  # as the registry says; its load says it too, a little later
    connected: bool = True  # False between a break of its session and its resumption, or its loss


class Workers:
    """Owned by the router's event loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._workers: dict[WorkerId, _Worker] = {}
        self._inboxes: dict[str, Inbox] = {}
        self.drains_cut_short = 0  # workers that went while they drained, with attempts still on them
        self._changed = asyncio.Event()

    # --- from the links ----------------------------------------------------------------------------------------

    def up(self, info: WorkerInfo, link: Link) -> None:
        """A worker's session is open. Another incarnation of the same name is gone by that."""
        for worker in [w for w in self._workers if w.name == info.worker.name and w != info.worker]:
            self.down(worker)
        if info.worker in self._workers:
            self._workers[info.worker].link = link
            self._workers[info.worker].connected = True
        else:
            self._workers[info.worker] = _Worker(info, link)
        self._notify()

    def broken(self, worker: WorkerId) -> None:
        """Its session broke. What runs there waits for the resumption; what is to be placed goes to others."""
        known = self._workers.get(worker)
        if known is not None:
            known.connected = False

    def down(self, worker: WorkerId) -> None:
        """Its requests hear of it; a message that it sends later finds no inbox."""
        known = self._workers.pop(worker, None)
        if known is None:
            return
        left = self.running(worker)
        if left and (known.draining or known.load.draining):
            self.drains_cut_short += 1
        told = left if known.draining or known.load.draining else [*left, *self._remembered_by(worker)]
        for inbox in told:
            self._deliver(inbox, worker, Lost(worker))
        self._notify()

    def on_batch(self, worker: WorkerId, batch: TokenBatch) -> None:
        for item in batch.items:
            self._dispatch(worker, item)

    def on_failed(self, worker: WorkerId, failed: RequestFailed) -> None:
        self._dispatch(worker, failed)

    def on_load(self, worker: WorkerId, load: Load) -> None:
        known = self._workers.get(worker)
        if known is not None:
            known.load = load
            known.unreported_tokens = known.unreported_requests = 0
            self._notify()

    def on_pages(self, worker: WorkerId, change: PagesChanged) -> bool:
        """False when changes before it have been missed: the link asks for a snapshot."""
        known = self._workers.get(worker)
        return known is None or known.index.apply(change)

    def set_draining(self, workers: frozenset[WorkerId]) -> None:
        """These, and no others, take nothing new."""
        for worker, known in self._workers.items():
            known.draining = worker in workers

    def running(self, worker: WorkerId) -> list[Inbox]:
        """The attempts that a worker has a part in: what a resumed session names."""
        return [inbox for inbox in self._inboxes.values() if worker in inbox.workers]

    def _remembered_by(self, worker: WorkerId) -> list[Inbox]:
        """One that is full would end its attempt for it."""
        return [inbox for inbox in self._inboxes.values() if worker in inbox.before and not inbox.messages.full()]

    # --- for the saga ------------------------------------------------------------------------------------------

    def open(
        self,
        request_id: str,
        attempt: int,
        workers: tuple[WorkerId, ...],
        next_index: Callable[[], list[int]],
        before: Iterable[WorkerId] = (),
    ) -> Inbox:
        """The inbox of a new attempt; whatever older attempts still send is dropped.

        Of the workers `before`, which earlier attempts were taken from, it hears alone that they are lost.
        """
        inbox = self._inboxes[request_id] = Inbox(request_id, attempt, workers, next_index, tuple(before))
        for worker in inbox.before:
            if worker not in self._workers:
                self._deliver(inbox, worker, Lost(worker))
        return inbox

    def close(self, request_id: str) -> None:
        self._inboxes.pop(request_id, None)

    def submit(self, worker: WorkerId, submit: Submit) -> None:
        """Raises WorkerLost."""
        known = self._known(worker)
        known.link.submit(submit)
        known.unreported_tokens += len(submit.prompt_ids)
        known.unreported_requests += 1

    def cancel(self, worker: WorkerId, cancel: Cancel) -> None:
        """To a worker that is gone there is nothing to say."""
        known = self._workers.get(worker)
        if known is not None:
            known.link.cancel(cancel)

    def lend(self, worker: WorkerId, lend: Lend) -> bool:
        """False when it cannot be told: nothing depends on a loan."""
        known = self._workers.get(worker)
        if known is None:
            return False
        try:
            known.link.lend(lend)
        except WorkerLost:
            return False
        return True

    def peer(self, worker: WorkerId) -> Peer:
        """Where other workers reach it. Raises WorkerLost."""
        return Peer(worker, self._known(worker).info.handoff_endpoint)

    def info(self, worker: WorkerId) -> WorkerInfo:
        """Raises WorkerLost."""
        return self._known(worker).info

    def knows(self, worker: WorkerId) -> bool:
        """It is not lost: its session is open, or may be resumed."""
        return worker in self._workers

    def reaches(self, worker: WorkerId) -> bool:
        """Whether its session is open."""
        known = self._workers.get(worker)
        return known is not None and known.connected

    def prefill_rate(self, worker: WorkerId) -> float:
        """Tokens per second, as it reports; 0: unknown."""
        known = self._workers.get(worker)
        return known.load.prefill_tokens_per_s if known is not None else 0.0

    def candidates(self, prompt_ids: tuple[int, ...], salt: bytes) -> list[Candidate]:
        """Every connected worker with what it has of this prompt. Workers of one model share the hashes."""
        hashes: dict[tuple[str, int], list[bytes]] = {}
        found = []
        for worker in self._workers.values():
            if not worker.connected:
                continue
            key = (worker.info.identity, worker.info.page_size)
            if key not in hashes:
                hashes[key] = block_hashes(root_hash(key[0], salt=salt), prompt_ids, key[1])
            cached = worker.index.match(hashes[key]) * worker.info.page_size
            found.append(
                Candidate(
                    worker.info,
                    replace(worker.load, draining=True) if worker.draining else worker.load,
                    min(cached, len(prompt_ids) - 1),
                    worker.unreported_tokens,
                    worker.unreported_requests,
                )
            )
        return found

    def infos(self) -> list[tuple[WorkerInfo, Load]]:
        return [(worker.info, worker.load) for worker in self._workers.values()]

    def attempts_by_pair(self) -> dict[tuple[str, str], int]:
        """The attempts under way that hand pages over, by the names of their prefill and decode workers."""
        found: dict[tuple[str, str], int] = {}
        for inbox in self._inboxes.values():
            if len(inbox.workers) == 2:
                decode, prefill = inbox.workers
                pair = prefill.name, decode.name
                found[pair] = found.get(pair, 0) + 1
        return found

    async def changed(self) -> None:
        """Returns when a worker has come, gone or reported its load."""
        await self._changed.wait()

    # --- inside ------------------------------------------------------------------------------------------------

    def _known(self, worker: WorkerId) -> _Worker:
        if worker not in self._workers:
            raise WorkerLost(f"worker {worker} is gone")
        return self._workers[worker]

    def _dispatch(self, worker: WorkerId, item: Tokens | RequestFailed) -> None:
        inbox = self._inboxes.get(item.request_id)
        if inbox is not None and inbox.attempt == item.attempt and worker in inbox.workers:
            self._deliver(inbox, worker, item)

    def _deliver(self, inbox: Inbox, worker: WorkerId, message: Message) -> None:
        """A full inbox has a client that has not read 65,536 messages: the attempt ends like a lost worker's."""
        if inbox.messages.full():
            self._inboxes.pop(inbox.request_id, None)
            inbox.messages.get_nowait()
            message = Lost(worker)
        inbox.messages.put_nowait((worker, message))

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
