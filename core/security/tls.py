"""Who a service is by its certificate, and what it may ask of another: identities in URIs, and the table of calls.

    spiffe://baton/role/ROLE      a URI among the certificate's names: the role that the authority gave it
    worker.baton                  a DNS name that only workers' certificates carry, and that callers ask for

So a worker knows the role of who calls, and a caller that it has reached a worker, whatever address it dialled. Which
worker it is, incarnations and tickets say.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

WORKER_NAME = "worker.baton"
ROLE_URI = "spiffe://baton/role/"

ROUTER, PREFILL, DECODE, AGGREGATED, DOCTOR = ROLES = ("router", "prefill", "decode", "aggregated", "doctor")

_WORKER, _HANDOFF = "/baton.session.v1.Worker", "/baton.handoff.v1.Handoff"
MAY_CALL: dict[str, frozenset[str]] = {  # what is not here, nobody may call
    f"{_WORKER}/Tokens": frozenset({ROUTER}),
    f"{_WORKER}/Events": frozenset({ROUTER}),
    f"{_WORKER}/Health": frozenset(ROLES),  # a worker's supervisor has the certificate of its worker
    f"{_WORKER}/Metrics": frozenset({ROUTER, DOCTOR}),
    f"{_WORKER}/Paths": frozenset({ROUTER, DOCTOR}),
    f"{_HANDOFF}/Session": frozenset({PREFILL, DECODE}),
}


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. They may be replaced while the service runs: whatever is opened after that has the new ones."""

    certificate: str  # ours, with what lies between it and the authority
    key: str
    authority: str  # who signs the certificates of all services


def role_of(names: Iterable[str]) -> str | None:
    """The role in a certificate's alternative names; None unless there is exactly one, and it is known."""
    found = [name.removeprefix(ROLE_URI) for name in names if name.startswith(ROLE_URI)]
    return found[0] if len(found) == 1 and found[0] in ROLES else None


def may_call(role: str | None, method: str) -> bool:
    return role is not None and role in MAY_CALL.get(method, ())
