"""What the receiver answers about a hand-off that has ended there, or has not begun: the request may still come."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import BatonError, Cancelled, HandoffError, leaves
from core.messages import WorkerId
from kvtransfer.messages import Close, Drained, Failed, HandoffKey, Next, Ready, Refused, Sealed
from kvtransfer.states import State
from kvtransfer.tombstones import Tombstones

HELD_LIMIT = 1024  # of Next messages that came before their Submit

Final = Close | Refused


@dataclass(frozen=True, slots=True)
class Held:
    """A Next that came before its Submit."""

    peer: WorkerId
    message: Next
    until_s: float


class Strangers:
    """Tombstones, and questions that wait for their request."""

    def __init__(self, tombstone_s: float, held_s: float) -> None:
        self._held_s = held_s
        self._tombstones: Tombstones[Final] = Tombstones(tombstone_s)
        self._told: Tombstones[bool] = Tombstones(tombstone_s)  # those whose end the request has been told
        self._held: dict[HandoffKey, Held] = {}

    @property
    def waiting(self) -> int:
        return len(self._held)

    def told(self, key: HandoffKey) -> bool:
        """It was submitted before, and has had its end."""
        return self._told.word(key) is not None

    def admit(self, key: HandoffKey, now_s: float) -> BatonError | None:
        """A request has come. The error that it ends with, when it has ended before it began."""
        word = self._tombstones.word(key)
        if word is None and self._tombstones.superseded(key):
            word = self.bury(_superseded(key), now_s)
        if word is None:
            self._tombstones.saw(key, now_s)
            return None
        self._told.bury(key, True, now_s)
        return leaves().get(word.code, Cancelled)(word.message)

    def question_of(self, key: HandoffKey) -> Held | None:
        """The Next that has waited for this request."""
        return self._held.pop(key, None)

    def answer(
        self, peer: WorkerId, message: Next | Ready | Sealed | Failed | Drained, now_s: float
    ) -> Final | None:
        """What to say to a message about no hand-off of ours. None: nothing, or nothing yet."""
        key = message.key
        word = self._tombstones.word(key)
        if isinstance(message, Drained):
            return None
        if word is not None:
            return word
        if isinstance(message, Failed):  # when it is submitted here, it has failed already
            self._held.pop(key, None)
            return self.bury(Close(key, 0, 0, State.ABORTED, message.code, message.message), now_s)
        if self._tombstones.superseded(key):
            return _superseded(key)
        if not isinstance(message, Next) or len(self._held) >= HELD_LIMIT:
            return _unknown(key)
        earlier = self._held.get(key)
        self._held[key] = Held(peer, message, earlier.until_s if earlier else now_s + self._held_s)
        return None

    def bury(self, final: Final, now_s: float, *, told: bool = False) -> Final:
        """The last word on a hand-off; the first one said stands."""
        if told:
            self._told.bury(final.key, True, now_s)
        word = self._tombstones.word(final.key)
        if word is None:
            self._tombstones.bury(final.key, final, now_s)
        return word or final

    def expire(self, now_s: float) -> list[tuple[WorkerId, Refused]]:
        """Give up what has waited too long; returns what to say of it."""
        self._tombstones.expire(now_s)
        self._told.expire(now_s)
        over = [held for held in self._held.values() if held.until_s < now_s]
        for held in over:
            del self._held[held.message.key]
            self.bury(_unknown(held.message.key), now_s)
        return [(held.peer, _unknown(held.message.key)) for held in over]


def _unknown(key: HandoffKey) -> Refused:
    return Refused(key, 0, 0, HandoffError.code, f"{key} was never submitted here")


def _superseded(key: HandoffKey) -> Refused:
    return Refused(key, 0, 0, Cancelled.code, f"{key}: a later attempt has taken over")
