"""The gRPC end of a worker's sessions with routers: decodes what comes down, encodes what goes up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import grpc
import grpc.aio

from core.clock import Clock
from core.errors import BatonError, InvalidRequest
from core.messages import (
    Cancel,
    FinishReason,
    Lend,
    Load,
    PagesChanged,
    PathReport,
    Peer,
    Receipt,
    RequestFailed,
    Role,
    Submit,
    Token,
    TokenBatch,
    Tokens,
    WorkerId,
    WorkerInfo,
)
from core.sampling import SamplingParams
from core.wire_version import MAJOR, MINOR
from session.desk import Desk
from session.feed import Feed
from session.outlet import RouterQueue
from wire import session_pb2 as pb
from wire import session_pb2_grpc

log = logging.getLogger(__name__)

FEED_PERIOD_S = 0.05
MAX_SUBMIT_BYTES = 16 << 20
SERVER_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # else a minute, which counts while the other direction brings data
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_receive_message_length", MAX_SUBMIT_BYTES + (1 << 20)),
    ("grpc.max_send_message_length", 1 << 20),
    ("grpc.so_reuseport", 0),
)
MAX_PROMPT_TOKENS = 4 * 2**20

_ROLES = {Role.PREFILL: pb.ROLE_PREFILL, Role.DECODE: pb.ROLE_DECODE, Role.AGGREGATED: pb.ROLE_AGGREGATED}
_FINISHES = {None: pb.FINISH_UNSPECIFIED, FinishReason.STOP: pb.FINISH_STOP, FinishReason.LENGTH: pb.FINISH_LENGTH}

# Proves the path from a peer first, if one is given, with the ticket for that. Raises BadTicket.
PathsOf = Callable[[Peer | None, bytes], Awaitable[Sequence[PathReport]]]

ServerContext: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class WorkerServicer(session_pb2_grpc.WorkerServicer):
    """One per worker process, for any number of routers."""

    def __init__(self, desk: Desk, clock: Clock, metrics_text: Callable[[], bytes], paths: PathsOf) -> None:
        self._desk = desk
        self._tier = desk.tier
        self._clock = clock
        self._metrics_text = metrics_text
        self._paths = paths
        self._feeds: set[Feed] = set()
        self._closing = asyncio.Event()

    async def Tokens(
        self, request_iterator: AsyncIterator[pb.ToWorker], context: ServerContext
    ) -> AsyncIterator[pb.FromWorker]:
        """One session: Hello first, then whatever comes, until either side ends it."""
        hello = await _hello(request_iterator, context)
        resume = {(r.request_id, r.attempt): tuple(r.next_index) for r in hello.resume}
        queue = self._desk.open(hello.router, resume)
        reader = asyncio.create_task(self._read(hello.router, request_iterator, queue), name="session-reader")
        try:
            yield pb.FromWorker(welcome=_encode_info(self._tier.info))
            while (message := await queue.messages.get()) is not None:
                yield _encode(message)
        finally:
            reader.cancel()
            self._desk.close(hello.router, queue)

    async def Events(self, request: pb.EventsRequest, context: ServerContext) -> AsyncIterator[pb.Event]:
        self.publish()
        feed = Feed(self._tier.page_snapshot(), self._clock)
        self._feeds.add(feed)
        try:
            while not self._closing.is_set():
                if feed.overflowed:
                    feed.replace(self._tier.page_snapshot())
                for event in feed.due(self._tier.load()):
                    yield _encode_event(event)
                await asyncio.sleep(FEED_PERIOD_S)
        finally:
            self._feeds.discard(feed)

    async def Health(self, request: pb.HealthRequest, context: ServerContext) -> pb.HealthReply:
        try:
            return pb.HealthReply(loop_s=await self._tier.turn())
        except BatonError as error:
            await context.abort(grpc.StatusCode[error.grpc_code], error.message)
            raise AssertionError("abort raises") from None

    async def Metrics(self, request: pb.MetricsRequest, context: ServerContext) -> pb.MetricsReply:
        return pb.MetricsReply(text=self._metrics_text())

    async def Paths(self, request: pb.PathsRequest, context: ServerContext) -> pb.PathsReply:
        """How pages come to this worker from each of its peers.

        Who fetches measures, so a worker says only what comes to it. With `probe` it first proves the path from that
        peer, and opens the session if it is the end that dials. So a pair that was never used is proved by asking the
        source, which dials, and then the receiver.
        """
        probe = _decode_peer(request.probe) if request.HasField("probe") else None
        try:
            reports = await self._paths(probe, request.ticket)
        except BatonError as error:
            await context.abort(grpc.StatusCode[error.grpc_code], error.message)
            raise AssertionError("abort raises") from None
        return pb.PathsReply(paths=map(_encode_path, reports), worker=_encode_info(self._tier.info))

    def close(self) -> None:
        """End every stream, so that their calls return before the server stops."""
        self._closing.set()
        self._desk.end_all()

    def publish(self) -> None:
        """Give every feed what the prefix cache gained and lost. Called by the worker after each step."""
        change = self._tier.page_changes()
        if change is not None:
            for feed in self._feeds:
                feed.changed(change)

    async def _read(self, router: str, incoming: AsyncIterator[pb.ToWorker], queue: RouterQueue) -> None:
        async for message in incoming:
            if message.HasField("submit"):
                self._submit(router, message.submit)
            elif message.HasField("cancel"):
                cancel = message.cancel
                self._desk.cancel(Cancel(cancel.request_id, cancel.attempt, tuple(cancel.choices)))
            elif message.HasField("lend"):
                self._lend(router, message.lend)
        queue.end()

    def _submit(self, router: str, message: pb.Submit) -> None:
        try:
            submit = _decode_submit(message)
        except BatonError as error:
            log.warning("a Submit of %s was refused: %s", router, error.message)
            self._desk.refuse(router, (message.request_id, message.attempt), error)
            return
        self._desk.submit(router, submit)

    def _lend(self, router: str, message: pb.Lend) -> None:
        try:
            lend = _decode_lend(message)
        except BatonError as error:
            log.warning("a Lend of %s was refused: %s", router, error.message)
            return
        self._desk.lend(lend)


def add_worker_service(server: grpc.aio.Server, servicer: WorkerServicer) -> None:
    session_pb2_grpc.add_WorkerServicer_to_server(servicer, server)


async def _hello(incoming: AsyncIterator[pb.ToWorker], context: ServerContext) -> pb.Hello:
    """The first message. Ends the call unless it is a Hello of a major version that we speak."""
    async for message in incoming:
        if not message.HasField("hello"):
            break
        if message.hello.version.major != MAJOR:
            theirs, reason = message.hello.version.major, grpc.StatusCode.FAILED_PRECONDITION
            await context.abort(reason, f"wire version {theirs} is not {MAJOR}: update router or worker")
        return message.hello
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a session begins with Hello")
    raise AssertionError("abort raises")


def _decode_submit(m: pb.Submit) -> Submit:
    """Raises InvalidRequest: the limits of the HTTP edge hold here too."""
    if not m.request_id or not m.attempt or not m.prompt_ids or len(m.prompt_ids) > MAX_PROMPT_TOKENS:
        raise InvalidRequest("Submit lacks its id, attempt or prompt")
    return Submit(
        request_id=m.request_id,
        attempt=m.attempt,
        prompt_ids=tuple(m.prompt_ids),
        params=_decode_sampling(m.sampling),
        seed=m.seed,
        deadline_s=m.deadline_s,
        peer=_decode_peer(m.peer) if m.HasField("peer") else None,
        emitted=tuple(tuple(ids.ids) for ids in m.emitted),
        finished=tuple(m.finished),
        salt=m.salt,
        priority=m.priority,
        lender=_decode_peer(m.lender) if m.HasField("lender") else None,
        lent_tokens=m.lent_tokens,
        ticket=m.ticket,
        loan_ticket=m.loan_ticket,
    )


def _decode_lend(m: pb.Lend) -> Lend:
    """Raises InvalidRequest."""
    if not m.request_id or not m.attempt or not m.prompt_ids or len(m.prompt_ids) > MAX_PROMPT_TOKENS:
        raise InvalidRequest("Lend lacks its id, attempt or prompt")
    peer = _decode_peer(m.peer)
    return Lend(m.request_id, m.attempt, tuple(m.prompt_ids), peer, m.deadline_s, m.salt, m.ticket)


def _decode_peer(m: pb.Peer) -> Peer:
    return Peer(WorkerId(m.worker.name, m.worker.incarnation), m.endpoint)


def _decode_sampling(m: pb.Sampling) -> SamplingParams:
    return SamplingParams(
        max_tokens=m.max_tokens,
        min_tokens=m.min_tokens,
        n=m.n,
        temperature=m.temperature,
        top_k=m.top_k,
        top_p=m.top_p,
        min_p=m.min_p,
        typical_p=m.typical_p,
        repetition_penalty=m.repetition_penalty,
        presence_penalty=m.presence_penalty,
        frequency_penalty=m.frequency_penalty,
        logit_bias=dict(m.logit_bias),
        stop_token_ids=tuple(m.stop_token_ids),
        ignore_eos=m.ignore_eos,
        logprobs=m.logprobs if m.HasField("logprobs") else None,
    )


def _encode_info(info: WorkerInfo) -> pb.Welcome:
    return pb.Welcome(
        version=pb.Version(major=MAJOR, minor=MINOR),
        worker=_encode_worker(info.worker),
        role=_ROLES[info.role],
        identity=info.identity,
        layout=info.layout,
        page_size=info.page_size,
        pages_total=info.pages_total,
        max_context_tokens=info.max_context_tokens,
        handoff_endpoint=info.handoff_endpoint,
    )


def _encode_worker(worker: WorkerId) -> pb.WorkerId:
    return pb.WorkerId(name=worker.name, incarnation=worker.incarnation)


def _encode(message: TokenBatch | RequestFailed) -> pb.FromWorker:
    if isinstance(message, TokenBatch):
        return pb.FromWorker(batch=pb.TokenBatch(items=[_encode_tokens(item) for item in message.items]))
    blames = _encode_worker(message.blames) if message.blames else None
    return pb.FromWorker(
        failed=pb.RequestFailed(
            request_id=message.request_id,
            attempt=message.attempt,
            code=message.code,
            message=message.message,
            blames=blames,
        )
    )


def _encode_tokens(item: Tokens) -> pb.Tokens:
    receipt = _encode_receipt(item.receipt) if item.receipt else None
    tokens = [_encode_token(token) for token in item.tokens]
    return pb.Tokens(request_id=item.request_id, attempt=item.attempt, tokens=tokens, receipt=receipt)


def _encode_token(token: Token) -> pb.Token:
    return pb.Token(
        choice=token.choice,
        index=token.index,
        token_id=token.token_id,
        logprob=token.logprob,
        top=[pb.Likely(token_id=token_id, logprob=logprob) for token_id, logprob in token.top],
        finish=_FINISHES[token.finish],
    )


def _encode_receipt(receipt: Receipt) -> pb.Receipt:
    return pb.Receipt(**asdict(receipt))


def _encode_event(event: Load | PagesChanged) -> pb.Event:
    if isinstance(event, PagesChanged):
        return pb.Event(
            pages=pb.PagesChanged(
                number=event.number, stored=event.stored, removed=event.removed, snapshot=event.snapshot
            )
        )
    return pb.Event(
        load=pb.Load(
            waiting_requests=event.waiting_requests,
            waiting_tokens=event.waiting_tokens,
            running_requests=event.running_requests,
            pages=event.pages,
            prefill_tokens_per_s=event.prefill_tokens_per_s,
            step_s=event.step_s,
            handoffs=event.handoffs,
            draining=event.draining,
        )
    )


def _encode_path(report: PathReport) -> pb.Path:
    return pb.Path(
        peer=_encode_worker(report.peer),
        transport=report.transport,
        lanes=report.lanes,
        bytes_per_s=report.bytes_per_s,
        latency_s=report.latency_s,
        proved_s=report.proved_s,
        trouble=report.trouble,
    )
