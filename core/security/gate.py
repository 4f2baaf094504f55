"""What a worker lets in: a valid ticket, for exactly what was asked, once.

A ticket is spent when it is let in, and the last SPENT_LIMIT of them are remembered for as long as the worker lives.
So a copy of a Submit is refused while its ticket is among those; an older one names an attempt that the hand-off's
tombstones may still know, and after that only the incarnation in it protects: a worker that was started again takes no
earlier ticket. Whoever can replay at all can also reach the worker's port, which mutual TLS is there to prevent.
"""

from __future__ import annotations

from collections import OrderedDict

from core.errors import BadTicket
from core.messages import Lend, Peer, Submit, WorkerInfo
from core.security.tickets import MAC_BYTES, Claims, Purpose, Tickets, prefix_hash, probe_claims

SPENT_LIMIT = 65536


class Gate:
    """One per worker. Owned by the event loop's thread."""

    def __init__(self, tickets: Tickets | None, me: WorkerInfo, limit: int = SPENT_LIMIT) -> None:
        """`tickets`: None lets everything in, for a worker that nobody else can reach, or by an operator's wish."""
        self._tickets = tickets
        self._me = Peer(me.worker, me.handoff_endpoint)
        self._limit = limit
        self._spent: OrderedDict[bytes, None] = OrderedDict()

    def admit(self, submit: Submit, *, as_source: bool) -> None:
        """Raises BadTicket unless the router has permitted this attempt, here and with this peer.

        `as_source`: we compute the prompt and hand it to the peer; else the peer does, or we keep what we compute.
        """
        if self._tickets is None:
            return
        source, receiver = submit.peer, self._me
        if as_source:
            if submit.peer is None:
                raise BadTicket("a prefill worker needs to be told its decode worker")
            source, receiver = self._me, submit.peer
        shown = [(submit.ticket, _claims(Purpose.HANDOFF, submit, source, receiver, submit.prompt_ids))]
        if submit.lender is not None:
            lent = submit.prompt_ids[: submit.lent_tokens]
            shown.append((submit.loan_ticket, _claims(Purpose.LEND, submit, submit.lender, self._me, lent)))
        self._let_in(self._tickets, shown)

    def lend(self, lend: Lend) -> None:
        """Raises BadTicket unless the router has permitted this loan, from here and to this peer."""
        if self._tickets is not None:
            claims = _claims(Purpose.LEND, lend, self._me, lend.peer, lend.prompt_ids)
            self._let_in(self._tickets, [(lend.ticket, claims)])

    def probe(self, source: Peer, ticket: bytes) -> None:
        """Raises BadTicket unless we may reach this peer, and prove the path from it."""
        if self._tickets is not None:
            self._let_in(self._tickets, [(ticket, probe_claims(source, self._me))])

    def _let_in(self, tickets: Tickets, shown: list[tuple[bytes, Claims]]) -> None:
        """All of them or none."""
        for ticket, claims in shown:
            tickets.check(ticket, claims)
            if ticket[-MAC_BYTES:] in self._spent:
                raise BadTicket(f"the ticket of {claims.request_id} has been used before")
        for ticket, _ in shown:
            self._spent[ticket[-MAC_BYTES:]] = None
        while len(self._spent) > self._limit:
            self._spent.popitem(last=False)


def _claims(
    purpose: Purpose, asked: Submit | Lend, source: Peer | None, receiver: Peer, ids: tuple[int, ...]
) -> Claims:
    prefix = prefix_hash(ids, asked.salt)
    return Claims(purpose, asked.request_id, asked.attempt, source, receiver, prefix, len(ids), asked.deadline_s)
