"""The states of a hand-off, the same on both ends, in code, metrics and traces; and how long each may last.

    QUEUED -> GRANTED -> STREAMING -> SEALED -> COMMITTED
      `---------`----------`-----------`-----> ABORTED

The receiver alone decides COMMITTED. A deadline is counted from the last progress in the state; the request's own
deadline ends any of them.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


class State(enum.Enum):
    QUEUED = "queued"  # known to the receiver, or asked for by the source; nothing is held
    GRANTED = "granted"  # the receiver holds pages for the whole prompt
    STREAMING = "streaming"  # pages move while later ones are computed
    SEALED = "sealed"  # the source has said everything
    COMMITTED = "committed"  # verified, and the receiver's
    ABORTED = "aborted"


ENDED = frozenset({State.COMMITTED, State.ABORTED})

ALLOWED = {
    State.QUEUED: frozenset({State.GRANTED, State.ABORTED}),
    State.GRANTED: frozenset({State.STREAMING, State.ABORTED}),
    State.STREAMING: frozenset({State.SEALED, State.ABORTED}),
    State.SEALED: ENDED,
    State.COMMITTED: frozenset(),
    State.ABORTED: frozenset(),
}


def counts(states: Iterable[State]) -> dict[str, int]:
    """How many hand-offs are in each state, without those that have ended."""
    found = Counter(states)
    return {state.value: found[state] for state in State if state not in ENDED}


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds without progress in a state, then the hand-off is aborted (DeadlineExceeded)."""

    queued_s: float = 300.0  # until the source's turn comes, or between two of its questions
    granted_s: float = 120.0  # until the first page: the source may have a long chunk to compute
    streaming_s: float = 120.0  # between two chunks
    sealed_s: float = 30.0  # until the receiver has verified the rest
    closing_s: float = 5.0  # until the other end has confirmed the end; then it is cut off, if it could still write
    held_s: float = 5.0  # a Next that came before its Submit waits this long for it
    resend_s: float = 1.0  # an unanswered message is sent again: sessions lose messages when they break
    tombstone_s: float = 900.0  # an ended hand-off is remembered this long: above every request's deadline

    def of(self, state: State) -> float | None:
        """None: it has ended."""
        return {
            State.QUEUED: self.queued_s,
            State.GRANTED: self.granted_s,
            State.STREAMING: self.streaming_s,
            State.SEALED: self.sealed_s,
        }.get(state)
