"""What a worker lets in: a valid ticket, for exactly what was asked, once.

A ticket is spent when it is let in, and the last SPENT_LIMIT of them are remembered for as long as the worker lives.
So a copy of a Submit is refused while its ticket is among those; an older one names an attempt that the hand-off's
tombstones may still know, and after that only the incarnation in it protects: a worker that was started again takes no
earlier ticket. Whoever can replay at all can also reach the worker's port, which mutual TLS is there to prevent.
"""

from __future__ import annotations

from collections import OrderedDict

from core.errors import BadTicket
from core.messages import Peer, Submit, WorkerInfo
from core.security.tickets import MAC_BYTES, Claims, Purpose, Tickets, prefix_hash

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
        claims = Claims(
            purpose=Purpose.HANDOFF,
            request_id=submit.request_id,
            attempt=submit.attempt,
            source=source,
            receiver=receiver,
            prefix=prefix_hash(submit.prompt_ids, submit.salt),
            tokens=len(submit.prompt_ids),
            lifetime_s=submit.deadline_s,
        )
        self.spend(submit.ticket, claims)

    def spend(self, ticket: bytes, expected: Claims) -> None:
        """Raises BadTicket unless it is a ticket for exactly this, and has not been here before."""
        if self._tickets is None:
            return
        self._tickets.check(ticket, expected)
        mac = ticket[-MAC_BYTES:]
        if mac in self._spent:
            raise BadTicket(f"the ticket of {expected.request_id} has been used before")
        self._spent[mac] = None
        while len(self._spent) > self._limit:
            self._spent.popitem(last=False)
