"""The gRPC end of the receiver: sources dial it. Decodes what they say, encodes what they are told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import asdict, fields
from typing import Any, TypeAlias

import grpc
import grpc.aio

from core.errors import BatonError, FingerprintMismatch, HandoffError, PeerLost
from core.layout import HASH_UNIT_TOKENS, ITEM_BYTES, PageLayout
from core.messages import FinishReason, Receipt, Token, WorkerId
from kvtransfer import messages as m
from kvtransfer.fingerprint import Fingerprint
from kvtransfer.line import Line
from kvtransfer.receiver_link import HandoffReceiver
from kvtransfer.states import State
from wire import handoff_pb2 as pb
from wire import handoff_pb2_grpc

log = logging.getLogger(__name__)

OPEN_S = 5.0  # a source that has dialled says Open within this time
MAX_MESSAGE_BYTES = 256 << 10
RECEIPT_FIELDS = tuple(field.name for field in fields(Receipt))

# For the server that the service is added to. Without them a half-open connection is noticed after two hours.
KEEPALIVE = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # else a minute, which counts while the other direction brings data
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # else our own clients' pings are taken for an attack
)

_OUTCOMES = {State.COMMITTED: pb.OUTCOME_COMMITTED, State.ABORTED: pb.OUTCOME_ABORTED}
_FINISHES = {
    pb.FINISH_REASON_NONE: None,
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}

ServerContext: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def add_handoff_service(server: grpc.aio.Server, receiver: HandoffReceiver) -> HandoffSessions:
    """Serve the receiver's end on the worker's server (made with the options KEEPALIVE).

    What it returns goes to `receiver.start`.
    """
    sessions = HandoffSessions(receiver)
    handoff_pb2_grpc.add_HandoffServicer_to_server(sessions, server)
    return sessions


class HandoffSessions(handoff_pb2_grpc.HandoffServicer):
    """The sessions of all sources with this receiver: one each, of which the newest counts."""

    def __init__(self, receiver: HandoffReceiver) -> None:
        self._receiver = receiver
        self._lines: dict[WorkerId, Line] = {}
        self._known: dict[str, WorkerId] = {}  # the incarnation of each source by name

    # --- the Sessions port -----------------------------------------------------------------------------------

    def send(self, worker: WorkerId, message: m.Message) -> None:
        line = self._lines.get(worker)
        if line is not None:
            line.send(message)

    def hang_up(self, worker: WorkerId) -> None:
        if self._known.get(worker.name) == worker:
            del self._known[worker.name]
        line = self._lines.get(worker)
        if line is not None:
            line.end()

    def close(self) -> None:
        """End every session, so that their calls return before the server stops."""
        for line in self._lines.values():
            line.end()

    # --- the service -----------------------------------------------------------------------------------------

    async def Session(
        self, request_iterator: AsyncIterator[pb.ToReceiver], context: ServerContext
    ) -> AsyncIterator[pb.ToSource]:
        """Open each way, then whatever is to be said, until either side ends it."""
        first = await _first(request_iterator, context)
        try:
            opening = _decode_open(first)
            answer = await self._receiver.greet(opening)
        except HandoffError as error:
            log.warning("refused a session with %s: %s", first.source.name, error)
            yield pb.ToSource(refused=pb.Refused(code=error.code, reason=error.message))
            return
        line = self._enter(opening.source)
        reader = asyncio.create_task(self._read(opening.source, request_iterator, line), name="hand-off reader")
        try:
            yield pb.ToSource(open=_encode_open(answer))
            self._receiver.session_up(opening.source)
            while (message := await line.next()) is not None:
                yield encode(message)
        finally:
            reader.cancel()
            self._leave(opening.source, line)

    def _enter(self, source: WorkerId) -> Line:
        """A new session takes the place of an older one, and a new incarnation that of an older one."""
        earlier = self._known.get(source.name)
        if earlier is not None and earlier != source:
            self._receiver.peer_gone(earlier, PeerLost(f"{source} has taken the place of {earlier}"))
        self._known[source.name] = source
        older = self._lines.get(source)
        if older is not None:
            older.end()
            self._receiver.session_down(source)
        line = self._lines[source] = Line()
        return line

    def _leave(self, source: WorkerId, line: Line) -> None:
        line.end()
        if self._lines.get(source) is line:
            del self._lines[source]
            self._receiver.session_down(source)

    async def _read(self, source: WorkerId, incoming: AsyncIterator[pb.ToReceiver], line: Line) -> None:
        try:
            async for message in incoming:
                if line.ended.is_set():
                    return
                self._receiver.receive(source, decode(message))
        except BatonError as error:
            log.warning("ended the session with %s: %s", source, error)
        except grpc.aio.AioRpcError as error:
            log.info("session with %s broke: %s", source, error.code().name)
        finally:
            line.end()


async def _first(incoming: AsyncIterator[pb.ToReceiver], context: ServerContext) -> pb.Open:
    """The first message. Ends the call unless it is Open, soon."""
    try:
        async with asyncio.timeout(OPEN_S):
            async for message in incoming:
                if message.HasField("open"):
                    return message.open
                break
    except TimeoutError:
        pass
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "a session begins with Open")
    raise AssertionError("abort raises")


# --- coding --------------------------------------------------------------------------------------------------


def decode(message: pb.ToReceiver) -> m.ToReceiver:
    """Raises PeerLost for what no version of ours says: the session is of no use then."""
    if message.ByteSize() > MAX_MESSAGE_BYTES:
        raise PeerLost(f"a message of {message.ByteSize()} bytes")
    kind = message.WhichOneof("message")
    if kind == "next":
        asked = message.next
        return m.Next(_key(asked.key), asked.number, asked.prompt_tokens, asked.choices, asked.ticket)
    if kind == "ready":
        pages = tuple(_decode_entry(entry) for entry in message.ready.pages)
        return m.Ready(_key(message.ready.key), message.ready.number, pages)
    if kind == "sealed":
        return _decode_sealed(message.sealed)
    if kind == "failed":
        failed = message.failed
        return m.Failed(_key(failed.key), failed.number, failed.code, failed.reason)
    if kind == "renew":
        return m.Renew(message.renew.number)
    if kind == "drained":
        return m.Drained(_key(message.drained.key), message.drained.number)
    raise PeerLost(f"an unknown message: {kind}")


def _key(key: pb.Key) -> m.HandoffKey:
    return m.HandoffKey(key.request_id, key.attempt)


def _decode_open(message: pb.Open) -> m.Open:
    """Raises FingerprintMismatch for a layout that this version cannot have."""
    found = message.fingerprint
    sizes = (found.layout.kv_heads, found.layout.layers, found.layout.page_size, found.layout.head_dim)
    if found.layout.dtype not in ITEM_BYTES or found.layout.page_size % HASH_UNIT_TOKENS or min(sizes) < 1:
        raise FingerprintMismatch(f"layout: {sizes} of {found.layout.dtype!r} is none that is known here")
    layout = PageLayout(*sizes, found.layout.dtype, found.layout.parts)
    return m.Open(
        source=WorkerId(message.source.name, message.source.incarnation),
        receiver=WorkerId(message.receiver.name, message.receiver.incarnation),
        fingerprint=Fingerprint(found.identity, layout, found.digest, found.wire_major, found.wire_minor),
        descriptor=message.descriptor,
    )


def _decode_entry(entry: pb.PageEntry) -> m.PageEntry:
    return m.PageEntry(entry.position, entry.block_hash, entry.page, entry.epoch, entry.digests)


def _decode_sealed(sealed: pb.Sealed) -> m.Sealed:
    return m.Sealed(
        key=_key(sealed.key),
        number=sealed.number,
        full_pages=sealed.full_pages,
        tail=_decode_entry(sealed.tail) if sealed.HasField("tail") else None,
        tail_tokens=sealed.tail_tokens,
        tokens=tuple(_decode_token(token) for token in sealed.tokens),
        receipt=Receipt(**{field: getattr(sealed.receipt, field) for field in RECEIPT_FIELDS}),
    )


def _decode_token(token: pb.Token) -> Token:
    """Raises PeerLost for a finish reason of a later version: a choice must not go on that has ended."""
    if token.finish not in _FINISHES or len(token.top_ids) != len(token.top_logprobs):
        raise PeerLost(f"a token that this version does not know: {token.finish}")
    return Token(
        choice=token.choice,
        index=token.index,
        token_id=token.token_id,
        logprob=token.logprob if token.HasField("logprob") else None,
        top=tuple(zip(token.top_ids, token.top_logprobs, strict=True)),
        finish=_FINISHES[token.finish],
    )


def encode(message: m.Message) -> pb.ToSource:
    match message:
        case m.Grant(key, number, prefix_pages):
            return pb.ToSource(grant=pb.Grant(key=_pb_key(key), number=number, prefix_pages=prefix_pages))
        case m.Busy(key, number, retry_after_s):
            return pb.ToSource(busy=pb.Busy(key=_pb_key(key), number=number, retry_after_s=retry_after_s))
        case m.Fetch(key, number, stream, acked):
            return pb.ToSource(fetch=pb.Fetch(key=_pb_key(key), number=number, stream=stream, acked=acked))
        case m.Refused(key, number, stream, code, reason):
            refused = pb.Refused(key=_pb_key(key), number=number, stream=stream, code=code, reason=reason)
            return pb.ToSource(refused=refused)
        case m.Renew(number):
            return pb.ToSource(renew=pb.Renew(number=number))
        case m.Close(key, number, stream, outcome, code, reason):
            close = pb.Close(key=_pb_key(key), number=number, stream=stream, code=code, reason=reason)
            close.outcome = _OUTCOMES[outcome]
            return pb.ToSource(close=close)
    raise AssertionError(f"a receiver does not say {message}")


def _pb_key(key: m.HandoffKey) -> pb.Key:
    return pb.Key(request_id=key.request_id, attempt=key.attempt)


def _encode_open(message: m.Open) -> pb.Open:
    found, layout = message.fingerprint, message.fingerprint.layout
    return pb.Open(
        source=pb.WorkerId(name=message.source.name, incarnation=message.source.incarnation),
        receiver=pb.WorkerId(name=message.receiver.name, incarnation=message.receiver.incarnation),
        fingerprint=pb.Fingerprint(
            wire_major=found.wire_major,
            wire_minor=found.wire_minor,
            identity=found.identity,
            digest=found.digest,
            layout=pb.Layout(**asdict(layout)),
        ),
        descriptor=message.descriptor,
    )
