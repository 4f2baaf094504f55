"""The gRPC end of the source: it dials receivers. Encodes what it says, decodes what it is told.

A session belongs to two incarnations. It is dialled again, with growing pauses, whenever it breaks, until the receiver
refuses it, another incarnation answers in its place, or the source hangs up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import asdict, fields
from random import Random
from typing import TypeAlias

import grpc
import grpc.aio

from core.errors import FingerprintMismatch, HandoffError, PeerLost
from core.layout import HASH_UNIT_TOKENS, ITEM_BYTES, PageLayout
from core.messages import FinishReason, Peer, Receipt, Token, WorkerId
from core.security.channels import Channels
from kvtransfer import messages as m
from kvtransfer.chores import Chores
from kvtransfer.fingerprint import Fingerprint
from kvtransfer.line import Line
from kvtransfer.source_link import HandoffSource
from kvtransfer.states import State
from wire import handoff_pb2 as pb
from wire import handoff_pb2_grpc

log = logging.getLogger(__name__)

ANSWER_S = 5.0  # a receiver that was dialled answers within this time
PAUSE_S = (0.05, 1.0)  # first and longest pause before dialling again
MAX_MESSAGE_BYTES = 256 << 10
RECEIPT_FIELDS = tuple(field.name for field in fields(Receipt))

OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # else a minute, which counts while the other direction brings data
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),  # a channel of its own: its back-off is not that of an earlier peer
)

_OUTCOMES = {pb.OUTCOME_COMMITTED: State.COMMITTED, pb.OUTCOME_ABORTED: State.ABORTED}
_FINISHES = {
    None: pb.FINISH_REASON_NONE,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}

Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.ToReceiver, pb.ToSource]"


class HandoffDialer:
    """The sessions of one source. What it is made for goes to `source.start(dialer)`."""

    def __init__(self, source: HandoffSource, random: Random, channels: Channels | None = None) -> None:
        """`channels` None: plain ones."""
        self._channels = channels or Channels()
        self._source = source
        self._random = random
        self._lines: dict[WorkerId, Line] = {}  # of the session that is up, or will be
        self._hung_up: dict[WorkerId, asyncio.Event] = {}
        self._chores = Chores()

    # --- the Dialer port -------------------------------------------------------------------------------------

    def dial(self, peer: Peer) -> None:
        if peer.worker not in self._hung_up:
            hung_up = self._hung_up[peer.worker] = asyncio.Event()
            self._chores.spawn(self._keep(peer, hung_up), f"session with {peer.worker}")

    def send(self, worker: WorkerId, message: m.Message) -> None:
        line = self._lines.get(worker)
        if line is not None:
            line.send(message)

    def hang_up(self, worker: WorkerId) -> None:
        hung_up = self._hung_up.pop(worker, None)
        if hung_up is not None:
            hung_up.set()
        line = self._lines.get(worker)
        if line is not None:
            line.end()

    async def close(self) -> None:
        for worker in list(self._hung_up):
            self.hang_up(worker)
        await self._chores.stop()

    # --- one peer --------------------------------------------------------------------------------------------

    async def _keep(self, peer: Peer, hung_up: asyncio.Event) -> None:
        """One session after another."""
        first_s, longest_s = PAUSE_S
        pause_s = first_s
        while not hung_up.is_set():
            try:
                async with self._channels.open(peer.endpoint, OPTIONS) as channel:
                    if await self._session(peer, handoff_pb2_grpc.HandoffStub(channel)):
                        pause_s = first_s
            except HandoffError as error:
                if self._hung_up.get(peer.worker) is hung_up:  # else it was hung up, and perhaps dialled anew
                    del self._hung_up[peer.worker]
                    self._source.peer_gone(peer.worker, error)
                return
            try:
                await asyncio.wait_for(hung_up.wait(), pause_s * self._random.uniform(0.5, 1.0))
            except TimeoutError:
                pause_s = min(2 * pause_s, longest_s)

    async def _session(self, peer: Peer, stub: handoff_pb2_grpc.HandoffAsyncStub) -> bool:
        """One session from Open to its break; whether it was up. Raises when there can be none with this peer."""
        line = Line()
        call = stub.Session(self._say(peer, line))
        reader = asyncio.create_task(self._read(peer, call, line), name=f"from {peer.worker}")
        hung_up = asyncio.create_task(line.ended.wait(), name=f"end of {peer.worker}")
        try:
            await asyncio.wait((reader, hung_up), return_when=asyncio.FIRST_COMPLETED)
        finally:
            line.end()
            call.cancel()
            hung_up.cancel()
            reader.cancel()
            await asyncio.wait((reader, hung_up))
            up = self._lines.get(peer.worker) is line
            if up:
                del self._lines[peer.worker]
                self._source.session_down(peer.worker)
        broken = None if reader.cancelled() else reader.exception()
        if isinstance(broken, HandoffError):
            raise broken
        if broken is None:
            log.info("session with %s ended", peer.worker)
        elif isinstance(broken, grpc.aio.AioRpcError):
            log.info("session with %s broke: %s", peer.worker, broken.code().name)
        elif isinstance(broken, TimeoutError):
            log.info("session with %s: no answer within %.0f s", peer.worker, ANSWER_S)
        else:
            log.error("session with %s ended by our own fault", peer.worker, exc_info=broken)
        return up

    async def _say(self, peer: Peer, line: Line) -> AsyncIterator[pb.ToReceiver]:
        yield pb.ToReceiver(open=_encode_open(await self._source.opening(peer.worker)))
        while (message := await line.next()) is not None:
            yield encode(message)

    async def _read(self, peer: Peer, call: Call, line: Line) -> None:
        async with asyncio.timeout(ANSWER_S):
            answer = await call.read()
        if not isinstance(answer, pb.ToSource):  # the end of the stream
            return
        await self._check(peer, answer)
        self._lines[peer.worker] = line
        self._source.session_up(peer.worker)
        while isinstance(message := await call.read(), pb.ToSource):
            self._source.receive(peer.worker, decode(message))

    async def _check(self, peer: Peer, answer: pb.ToSource) -> None:
        """Raises HandoffError when there can be no session with this peer."""
        if answer.HasField("refused"):
            mismatch = answer.refused.code == FingerprintMismatch.code
            raise (FingerprintMismatch if mismatch else PeerLost)(answer.refused.reason)
        receiver = WorkerId(answer.open.receiver.name, answer.open.receiver.incarnation)
        if receiver != peer.worker:
            raise PeerLost(f"{receiver} answered at {peer.endpoint} in the place of {peer.worker}")
        theirs = _decode_fingerprint(answer.open.fingerprint)
        await self._source.answered(m.Open(self._source.me, receiver, theirs, answer.open.descriptor))


# --- coding --------------------------------------------------------------------------------------------------


def decode(message: pb.ToSource) -> m.ToSource:
    """Raises PeerLost for what no version of ours says: the session is of no use then."""
    kind = message.WhichOneof("message")
    if kind == "grant":
        grant = message.grant
        return m.Grant(_key(grant.key), grant.number, grant.prefix_pages)
    if kind == "busy":
        return m.Busy(_key(message.busy.key), message.busy.number, message.busy.retry_after_s)
    if kind == "fetch":
        fetch = message.fetch
        return m.Fetch(_key(fetch.key), fetch.number, fetch.stream, fetch.acked)
    if kind == "refused":
        refused = message.refused
        return m.Refused(_key(refused.key), refused.number, refused.stream, refused.code, refused.reason)
    if kind == "renew":
        return m.Renew(message.renew.number)
    if kind == "close" and message.close.outcome in _OUTCOMES:
        close = message.close
        outcome = _OUTCOMES[close.outcome]
        return m.Close(_key(close.key), close.number, close.stream, outcome, close.code, close.reason)
    raise PeerLost(f"an unknown message: {kind}")


def _key(key: pb.Key) -> m.HandoffKey:
    return m.HandoffKey(key.request_id, key.attempt)


def _decode_fingerprint(found: pb.Fingerprint) -> Fingerprint:
    """Raises FingerprintMismatch for a layout that this version cannot have."""
    sizes = (found.layout.kv_heads, found.layout.layers, found.layout.page_size, found.layout.head_dim)
    if found.layout.dtype not in ITEM_BYTES or found.layout.page_size % HASH_UNIT_TOKENS or min(sizes) < 1:
        raise FingerprintMismatch(f"layout: {sizes} of {found.layout.dtype!r} is none that is known here")
    layout = PageLayout(*sizes, found.layout.dtype, found.layout.parts)
    return Fingerprint(found.identity, layout, found.digest, found.wire_major, found.wire_minor)


def encode(message: m.Message) -> pb.ToReceiver:
    match message:
        case m.Next(key, number, tokens, choices, ticket):
            asked = pb.Next(key=_pb_key(key), number=number, prompt_tokens=tokens, choices=choices, ticket=ticket)
            return pb.ToReceiver(next=asked)
        case m.Ready(key, number, pages):
            entries = [_encode_entry(entry) for entry in pages]
            return pb.ToReceiver(ready=pb.Ready(key=_pb_key(key), number=number, pages=entries))
        case m.Sealed():
            return pb.ToReceiver(sealed=_encode_sealed(message))
        case m.Failed(key, number, code, reason):
            return pb.ToReceiver(failed=pb.Failed(key=_pb_key(key), number=number, code=code, reason=reason))
        case m.Renew(number):
            return pb.ToReceiver(renew=pb.Renew(number=number))
        case m.Drained(key, number):
            return pb.ToReceiver(drained=pb.Drained(key=_pb_key(key), number=number))
    raise AssertionError(f"a source does not say {message}")


def _pb_key(key: m.HandoffKey) -> pb.Key:
    return pb.Key(request_id=key.request_id, attempt=key.attempt)


def _encode_open(message: m.Open) -> pb.Open:
    found = message.fingerprint
    return pb.Open(
        source=pb.WorkerId(name=message.source.name, incarnation=message.source.incarnation),
        receiver=pb.WorkerId(name=message.receiver.name, incarnation=message.receiver.incarnation),
        fingerprint=pb.Fingerprint(
            wire_major=found.wire_major,
            wire_minor=found.wire_minor,
            identity=found.identity,
            digest=found.digest,
            layout=pb.Layout(**asdict(found.layout)),
        ),
        descriptor=message.descriptor,
    )


def _encode_entry(entry: m.PageEntry) -> pb.PageEntry:
    return pb.PageEntry(
        position=entry.position,
        block_hash=entry.block_hash,
        page=entry.page,
        epoch=entry.epoch,
        digests=entry.digests,
    )


def _encode_sealed(sealed: m.Sealed) -> pb.Sealed:
    return pb.Sealed(
        key=_pb_key(sealed.key),
        number=sealed.number,
        full_pages=sealed.full_pages,
        tail=_encode_entry(sealed.tail) if sealed.tail else None,
        tail_tokens=sealed.tail_tokens,
        tokens=[_encode_token(token) for token in sealed.tokens],
        receipt=pb.Receipt(**{name: getattr(sealed.receipt, name) for name in RECEIPT_FIELDS}),
    )


def _encode_token(token: Token) -> pb.Token:
    return pb.Token(
        choice=token.choice,
        index=token.index,
        token_id=token.token_id,
        logprob=token.logprob,
        top_ids=[token_id for token_id, _ in token.top],
        top_logprobs=[logprob for _, logprob in token.top],
        finish=_FINISHES[token.finish],
    )
