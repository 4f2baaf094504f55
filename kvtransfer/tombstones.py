"""Which hand-offs are over: a message for one of them gets its last word again, and an older attempt gets nothing."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

from kvtransfer.messages import HandoffKey

W = TypeVar("W")
K = TypeVar("K")
V = TypeVar("V")


class Tombstones(Generic[W]):
    """The last word on each ended hand-off, for `life_s`; at most `limit` of them, the oldest go first."""

    def __init__(self, life_s: float, limit: int = 65536) -> None:
        self._life_s = life_s
        self._limit = limit
        self._words: OrderedDict[HandoffKey, tuple[float, W]] = OrderedDict()  # key -> (until, last word)
        self._newest: OrderedDict[str, tuple[float, int]] = OrderedDict()  # request id -> (until, attempt)

    def bury(self, key: HandoffKey, word: W, now_s: float) -> None:
        self._words[key] = (now_s + self._life_s, word)
        self._words.move_to_end(key)
        self.saw(key, now_s)

    def word(self, key: HandoffKey) -> W | None:
        found = self._words.get(key)
        return found[1] if found else None

    def saw(self, key: HandoffKey, now_s: float) -> None:
        """This attempt exists: earlier ones of the request are over."""
        newest = max(key.attempt, self.newest(key.request_id))
        self._newest[key.request_id] = (now_s + self._life_s, newest)
        self._newest.move_to_end(key.request_id)

    def newest(self, request_id: str) -> int:
        found = self._newest.get(request_id)
        return found[1] if found else 0

    def superseded(self, key: HandoffKey) -> bool:
        return key.attempt < self.newest(key.request_id)

    def expire(self, now_s: float) -> None:
        _trim(self._words, self._limit, now_s)
        _trim(self._newest, self._limit, now_s)


def _trim(table: OrderedDict[K, tuple[float, V]], limit: int, now_s: float) -> None:
    """Entries lie in the order in which they end."""
    while table and (len(table) > limit or next(iter(table.values()))[0] < now_s):
        table.popitem(last=False)
