"""The router's end of the session with one worker over gRPC: keeps it open, resumes it, says when the worker is gone.

connecting --Welcome--> up --stream breaks--> reconnecting --same incarnation within resume_s--> up (resumed)
                         |                         |--another incarnation, or too late--> down
                         `--silent for silence_s---------------------------------------> down
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import grpc
import grpc.aio

from core.clock import Clock
from core.errors import EngineError, WorkerLost
from core.messages import (
    Cancel,
    Lend,
    PagesChanged,
    PathReport,
    Peer,
    Submit,
    TokenBatch,
    WorkerId,
    WorkerInfo,
)
from core.security.channels import Channels
from core.wire_version import MAJOR, MINOR
from router.coding import (
    decode_failed,
    decode_info,
    decode_load,
    decode_path,
    decode_tokens,
    encode_lend,
    encode_submit,
    encode_worker,
)
from router.workers import Workers
from wire import session_pb2 as pb
from wire import session_pb2_grpc

log = logging.getLogger(__name__)

Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.ToWorker, pb.FromWorker]"

CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # else a minute, which counts while the other direction brings data
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 1 << 20),
    ("grpc.max_send_message_length", 17 << 20),
    ("grpc.use_local_subchannel_pool", 1),
)
DENIED_S = 1.0  # a worker that will not have us is asked again, but not as one that may be starting
UNREACHED = 3  # a worker that starts is not there yet, and that is nothing to speak of
WHY_S = 0.2  # to hear why a channel does not become ready
PROBE_S = 20.0  # a worker needs some seconds to find that a peer cannot be reached, and for each path to it


@dataclass(frozen=True, slots=True)
class SessionTimes:
    connect_s: float = 2.0
    retry_s: float = 0.1
    resume_s: float = 1.0  # a break shorter than this is resumed, not a loss
    silence_s: float = 2.5  # a worker sends its load twice a second; SIGSTOP shows as silence
    outbox_messages: int = 4096


class WorkerClient:
    """A router.workers.Link. `run` keeps the session until it is cancelled."""

    def __init__(
        self,
        endpoint: str,
        router: str,
        workers: Workers,
        clock: Clock,
        times: SessionTimes | None = None,
        channels: Channels | None = None,
    ) -> None:
        """`channels` None: plain ones."""
        self._channels = channels or Channels()
        self._trouble = ""  # why there is no session, as last said
        self._unreached = 0  # times in a row
        self._endpoint = endpoint
        self._router = router
        self._workers = workers
        self._clock = clock
        self._times = times or SessionTimes()
        self._worker: WorkerId | None = None  # while it counts as up
        self._outbox: asyncio.Queue[pb.ToWorker] = asyncio.Queue(self._times.outbox_messages)
        self._heard_s = 0.0
        self._broken_s: float | None = None
        self._stub: session_pb2_grpc.WorkerAsyncStub | None = None

    @property
    def worker(self) -> WorkerId | None:
        """While it counts as up."""
        return self._worker

    # --- the link ----------------------------------------------------------------------------------------------

    def submit(self, submit: Submit) -> None:
        self._put(pb.ToWorker(submit=encode_submit(submit)))

    def cancel(self, cancel: Cancel) -> None:
        try:
            self._put(
                pb.ToWorker(
                    cancel=pb.Cancel(request_id=cancel.request_id, attempt=cancel.attempt, choices=cancel.choices)
                )
            )
        except WorkerLost:
            log.info("cancel of %s not sent: the session is broken", cancel.request_id)

    def lend(self, lend: Lend) -> None:
        self._put(pb.ToWorker(lend=encode_lend(lend)))

    def _put(self, message: pb.ToWorker) -> None:
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull:
            raise WorkerLost(f"the session with {self._worker} does not take messages") from None

    async def health(self) -> float:
        """Seconds for one turn of the worker's engine loop. Raises WorkerLost or EngineError."""
        if self._stub is None:
            raise WorkerLost(f"no session with {self._endpoint}")
        try:
            return (await self._stub.Health(pb.HealthRequest(), timeout=5.0)).loop_s
        except grpc.aio.AioRpcError as error:
            raise EngineError(f"{self._worker}: {error.details()}") from None

    async def metrics(self) -> bytes:
        """The worker's metrics text; empty when it cannot be had."""
        if self._stub is None:
            return b""
        try:
            return (await self._stub.Metrics(pb.MetricsRequest(), timeout=1.0)).text
        except grpc.aio.AioRpcError:
            return b""

    async def paths(self, probe: Peer | None, ticket: bytes) -> list[PathReport]:
        """How pages come to this worker; proved anew from one peer, if one is given. Raises WorkerLost."""
        if self._stub is None:
            raise WorkerLost(f"no session with {self._endpoint}")
        return (await ask_paths(self._stub, self._endpoint, probe, ticket, PROBE_S))[1]

    # --- the session -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Connect, and connect again, until cancelled."""
        try:
            while True:
                await self._session()
                if self._worker is not None:
                    self._workers.broken(self._worker)
                self._broken_s = self._broken_s or self._clock()
                if self._clock() - self._broken_s >= self._times.resume_s:
                    self._down()
                await asyncio.sleep(self._times.retry_s)
        finally:
            self._down()

    async def _session(self) -> None:
        """One connection, until it breaks."""
        async with self._channels.open(self._endpoint, CHANNEL_OPTIONS) as channel:
            stub = session_pb2_grpc.WorkerStub(channel)
            try:
                async with asyncio.timeout(self._times.connect_s):
                    await channel.channel_ready()
            except TimeoutError:
                self._unreached += 1
                if self._unreached >= UNREACHED:
                    self._say_trouble(await _why_not(stub))
                return
            self._stub = stub
            try:
                await self._talk()
            except (grpc.aio.AioRpcError, asyncio.IncompleteReadError) as error:
                self._say_trouble(str(error))
                if isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.PERMISSION_DENIED:
                    await asyncio.sleep(DENIED_S)
            finally:
                self._stub = None

    def _say_trouble(self, trouble: str) -> None:
        """Once: it is tried again several times a second."""
        if trouble != self._trouble:
            log.info("no session with %s: %s", self._endpoint, trouble)
            self._trouble = trouble

    async def _talk(self) -> None:
        assert self._stub is not None
        running = [] if self._worker is None else self._workers.running(self._worker)
        resume = [
            pb.Resume(request_id=inbox.request_id, attempt=inbox.attempt, next_index=inbox.next_index())
            for inbox in running
        ]
        hello = pb.Hello(version=pb.Version(major=MAJOR, minor=MINOR), router=self._router, resume=resume)
        call = self._stub.Tokens()  # type: ignore[call-arg]  # the stubs know only calls with an iterator
        try:
            async with asyncio.timeout(self._times.connect_s):
                await call.write(pb.ToWorker(hello=hello))
                first = await call.read()
        except TimeoutError:
            return
        if not isinstance(first, pb.FromWorker) or not first.HasField("welcome"):
            return
        self._up(decode_info(first.welcome))
        sending = asyncio.create_task(self._send(call), name="worker-send")
        events = asyncio.create_task(self._events(), name="worker-events")
        watch = asyncio.create_task(self._watch(call.cancel), name="worker-watch")
        try:
            while isinstance(message := await call.read(), pb.FromWorker):
                self._heard_s = self._clock()
                self._take(message)
        except asyncio.CancelledError:
            if not call.cancelled() or asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
        finally:
            call.cancel()
            await _stop(sending, events, watch)

    async def _send(self, call: Call) -> None:
        """A task that ends with the session: a request iterator would live on, and take a message of the next one's."""
        while True:
            await call.write(await self._outbox.get())

    async def _events(self) -> None:
        """Load and prefix-cache changes; asked for again from a snapshot after a gap."""
        assert self._stub is not None
        request = pb.EventsRequest(version=pb.Version(major=MAJOR, minor=MINOR), router=self._router)
        while True:
            try:
                async for event in self._stub.Events(request):
                    self._heard_s = self._clock()
                    if not self._take_event(event):
                        break
            except grpc.aio.AioRpcError as error:
                log.info("events of %s broke: %s", self._endpoint, error.details())
                return

    async def _watch(self, cut: Callable[[], bool]) -> None:
        """A worker that is silent for too long is down, whatever its sockets say."""
        while True:
            left_s = self._heard_s + self._times.silence_s - self._clock()
            if left_s <= 0:
                break
            await asyncio.sleep(left_s)
        log.warning("worker %s is silent: taken for lost", self._worker)
        self._down()
        cut()

    def _up(self, info: WorkerInfo) -> None:
        if self._worker is not None and self._worker != info.worker:
            self._down()
        self._worker, self._broken_s, self._heard_s, self._trouble = info.worker, None, self._clock(), ""
        self._unreached = 0
        self._workers.up(info, self)

    def _down(self) -> None:
        """What waits to be sent was meant for that incarnation."""
        if self._worker is not None:
            self._workers.down(self._worker)
            self._worker = None
        while not self._outbox.empty():
            self._outbox.get_nowait()

    def _take(self, message: pb.FromWorker) -> None:
        if self._worker is None:
            return  # given up for its silence: this was on its way
        if message.HasField("batch"):
            self._workers.on_batch(self._worker, TokenBatch(tuple(map(decode_tokens, message.batch.items))))
        elif message.HasField("failed"):
            self._workers.on_failed(self._worker, decode_failed(message.failed))

    def _take_event(self, event: pb.Event) -> bool:
        """False when events have been missed."""
        if self._worker is None:
            return True
        if event.HasField("load"):
            self._workers.on_load(self._worker, decode_load(event.load))
            return True
        pages = event.pages
        change = PagesChanged(pages.number, tuple(pages.stored), tuple(pages.removed), pages.snapshot)
        return self._workers.on_pages(self._worker, change)


async def _why_not(stub: session_pb2_grpc.WorkerAsyncStub) -> str:
    """What a channel that does not become ready says to a call: a refused connection, a bad certificate."""
    try:
        await stub.Health(pb.HealthRequest(), timeout=WHY_S)
    except grpc.aio.AioRpcError as error:
        return error.details() or error.code().name
    return "it was slow to answer"


async def _stop(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Visitor:
    """Asks a worker about itself without a session: what a doctor does. Closed at the end."""

    def __init__(self, endpoint: str, channels: Channels) -> None:
        self._endpoint = endpoint
        self._channel = channels.open(endpoint, CHANNEL_OPTIONS)
        self._stub: session_pb2_grpc.WorkerAsyncStub = session_pb2_grpc.WorkerStub(self._channel)

    async def info(self, timeout_s: float) -> WorkerInfo:
        """Who it is. Raises WorkerLost."""
        return (await ask_paths(self._stub, self._endpoint, None, b"", timeout_s))[0]

    async def paths(self, probe: Peer | None, ticket: bytes) -> list[PathReport]:
        """A router.path_survey.PathLink."""
        return (await ask_paths(self._stub, self._endpoint, probe, ticket, PROBE_S))[1]

    async def close(self) -> None:
        await self._channel.close(None)


async def ask_paths(
    stub: session_pb2_grpc.WorkerAsyncStub, endpoint: str, probe: Peer | None, ticket: bytes, timeout_s: float
) -> tuple[WorkerInfo, list[PathReport]]:
    """Who answers, and how pages come to it. Raises WorkerLost."""
    asked = None if probe is None else pb.Peer(worker=encode_worker(probe.worker), endpoint=probe.endpoint)
    request = pb.PathsRequest(probe=asked, ticket=ticket)
    try:
        answer = await stub.Paths(request, timeout=timeout_s, wait_for_ready=True)
    except grpc.aio.AioRpcError as error:
        raise WorkerLost(f"{endpoint} did not tell its paths: {error.details()}") from None
    return decode_info(answer.worker), [decode_path(path) for path in answer.paths]
