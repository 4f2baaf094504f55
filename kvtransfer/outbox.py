"""What must be heard: the source's numbered messages of one hand-off, kept until the receiver says that it has them."""

from __future__ import annotations

from dataclasses import replace

from kvtransfer.messages import Failed, Ready, Sealed

Sure = Ready | Sealed | Failed


class Outbox:
    """Numbers from 1 without gaps, so that one number acknowledges all up to it."""

    def __init__(self) -> None:
        self._last = 0
        self._unheard: dict[int, Sure] = {}

    def put(self, message: Sure) -> Sure:
        """The message with its number."""
        self._last += 1
        message = replace(message, number=self._last)
        self._unheard[self._last] = message
        return message

    def heard(self, number: int) -> bool:
        """The other end has everything up to this number. Whether that was news."""
        known = [have for have in self._unheard if have <= number]
        for have in known:
            del self._unheard[have]
        return bool(known)

    def unheard(self) -> list[Sure]:
        return list(self._unheard.values())

    def clear(self) -> None:
        self._unheard.clear()


class Heard:
    """The receiver's side of it: which numbers have come, in whatever order."""

    def __init__(self) -> None:
        self.up_to = 0  # all of these have come
        self._ahead: set[int] = set()

    def note(self, number: int) -> bool:
        """A message with this number has come. Whether it is new."""
        if number <= self.up_to or number in self._ahead:
            return False
        self._ahead.add(number)
        while self.up_to + 1 in self._ahead:
            self.up_to += 1
            self._ahead.discard(self.up_to)
        return True
