"""How what router and worker say to each other is written on the wire, and read: the router's side of it."""

from __future__ import annotations

from dataclasses import fields

from core.messages import (
    FinishReason,
    Lend,
    Load,
    PathReport,
    Peer,
    Receipt,
    RequestFailed,
    Role,
    Submit,
    Token,
    Tokens,
    WorkerId,
    WorkerInfo,
)
from core.sampling import SamplingParams
from wire import session_pb2 as pb

_RECEIPT = tuple(field.name for field in fields(Receipt))
SAMPLING_FIELDS = tuple(field.name for field in pb.Sampling.DESCRIPTOR.fields)
_ROLES = {pb.ROLE_PREFILL: Role.PREFILL, pb.ROLE_DECODE: Role.DECODE, pb.ROLE_AGGREGATED: Role.AGGREGATED}
_FINISHES = {pb.FINISH_STOP: FinishReason.STOP, pb.FINISH_LENGTH: FinishReason.LENGTH}


def encode_submit(submit: Submit) -> pb.Submit:
    peer = submit.peer
    return pb.Submit(
        request_id=submit.request_id,
        attempt=submit.attempt,
        prompt_ids=submit.prompt_ids,
        sampling=encode_sampling(submit.params),
        seed=submit.seed,
        deadline_s=submit.deadline_s,
        peer=encode_peer(peer) if peer else None,
        emitted=[pb.Ids(ids=ids) for ids in submit.emitted],
        finished=submit.finished,
        salt=submit.salt,
        priority=submit.priority,
        lender=encode_peer(submit.lender) if submit.lender else None,
        lent_tokens=submit.lent_tokens,
        ticket=submit.ticket,
        loan_ticket=submit.loan_ticket,
    )


def encode_lend(lend: Lend) -> pb.Lend:
    return pb.Lend(
        request_id=lend.request_id,
        attempt=lend.attempt,
        prompt_ids=lend.prompt_ids,
        peer=encode_peer(lend.peer),
        deadline_s=lend.deadline_s,
        salt=lend.salt,
        ticket=lend.ticket,
    )


def encode_peer(peer: Peer) -> pb.Peer:
    return pb.Peer(worker=encode_worker(peer.worker), endpoint=peer.endpoint)


def encode_worker(worker: WorkerId) -> pb.WorkerId:
    return pb.WorkerId(name=worker.name, incarnation=worker.incarnation)


def encode_sampling(params: SamplingParams) -> pb.Sampling:
    """All but the stop strings, which the router applies, and the seed, which Submit carries."""
    return pb.Sampling(**{name: getattr(params, name) for name in SAMPLING_FIELDS})


def decode_info(m: pb.Welcome) -> WorkerInfo:
    return WorkerInfo(
        worker=WorkerId(m.worker.name, m.worker.incarnation),
        role=_ROLES[m.role],
        identity=m.identity,
        layout=m.layout,
        page_size=m.page_size,
        pages_total=m.pages_total,
        max_context_tokens=m.max_context_tokens,
        handoff_endpoint=m.handoff_endpoint,
    )


def decode_tokens(m: pb.Tokens) -> Tokens:
    receipt = decode_receipt(m.receipt) if m.HasField("receipt") else None
    return Tokens(m.request_id, m.attempt, tuple(map(decode_token, m.tokens)), receipt)


def decode_token(m: pb.Token) -> Token:
    return Token(
        m.choice,
        m.index,
        m.token_id,
        m.logprob if m.HasField("logprob") else None,
        tuple((likely.token_id, likely.logprob) for likely in m.top),
        _FINISHES.get(m.finish),
    )


def decode_receipt(m: pb.Receipt) -> Receipt:
    return Receipt(**{name: getattr(m, name) for name in _RECEIPT})


def decode_failed(m: pb.RequestFailed) -> RequestFailed:
    blames = WorkerId(m.blames.name, m.blames.incarnation) if m.HasField("blames") else None
    return RequestFailed(m.request_id, m.attempt, m.code, m.message, blames)


def decode_path(m: pb.Path) -> PathReport:
    peer = WorkerId(m.peer.name, m.peer.incarnation)
    return PathReport(peer, m.transport, m.lanes, m.bytes_per_s, m.latency_s, m.proved_s, m.trouble)


def decode_load(m: pb.Load) -> Load:
    return Load(
        m.waiting_requests,
        m.waiting_tokens,
        m.running_requests,
        dict(m.pages),
        m.prefill_tokens_per_s,
        m.step_s,
        dict(m.handoffs),
        m.draining,
    )
