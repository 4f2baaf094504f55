"""What the router signs: for each attempt one ticket for its pair, and one for the loan beside it, if there is one."""

from __future__ import annotations

import secrets

from core.messages import Peer
from core.security.tickets import Claims, Purpose, Tickets, prefix_hash, probe_claims
from router.generation import GenerationRequest


class Permits:
    """Over the cluster's keys; without any, tickets are empty, which only workers without keys take."""

    def __init__(self, tickets: Tickets | None) -> None:
        self._tickets = tickets

    def handoff(
        self, request: GenerationRequest, attempt: int, source: Peer | None, receiver: Peer, left_s: float
    ) -> bytes:
        """For both workers of a pair; `source` None: the receiver prefills the prompt itself."""
        return self._sign(Purpose.HANDOFF, request, attempt, source, receiver, request.prompt_ids, left_s)

    def loan(
        self, request: GenerationRequest, attempt: int, lender: Peer, borrower: Peer, tokens: int, left_s: float
    ) -> bytes:
        """For the first `tokens` of the prompt."""
        return self._sign(Purpose.LEND, request, attempt, lender, borrower, request.prompt_ids[:tokens], left_s)

    def probe(self, source: Peer, receiver: Peer) -> bytes:
        """For the receiver to prove the path from this source."""
        if self._tickets is None:
            return b""
        return self._tickets.sign(probe_claims(source, receiver, secrets.token_hex(8)))

    def _sign(
        self,
        purpose: Purpose,
        request: GenerationRequest,
        attempt: int,
        source: Peer | None,
        receiver: Peer,
        ids: tuple[int, ...],
        left_s: float,
    ) -> bytes:
        """Raises BadTicket for a worker whose name or address no ticket can hold."""
        if self._tickets is None:
            return b""
        prefix = prefix_hash(ids, request.salt)
        claims = Claims(purpose, request.request_id, attempt, source, receiver, prefix, len(ids), left_s)
        return self._tickets.sign(claims)
