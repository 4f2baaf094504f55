"""Where a choice's text ends: at the first stop string, wherever the token borders fall.

No part of a stop string is ever given out; what is held back is the longest end of the text that may still become one.
The match that is complete first wins, then the longest: the outcome does not depend on how the text arrives.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Text in, text that is certain out. `stopped` once a stop string was seen; nothing more comes then."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        assert stops and all(stops), "no stop strings: needs no filter"
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        assert not self.stopped
        text = self._held + text
        match = self._first_match(text)
        if match is not None:
            start, end = match
            self.stopped = True
            self._held = ""
            return text[: end if self._include else start]
        keep = self._open_prefix(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The choice has ended otherwise: what was held back is text after all."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, int] | None:
        """(start, end) of the match that ends first; of several that end there, the longest."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0:
                end = start + len(stop)
                if best is None or (end, start) < (best[1], best[0]):
                    best = (start, end)
        return best

    def _open_prefix(self, text: str) -> int:
        """The length of the longest end of `text` that some stop string begins with."""
        longest = 0
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while start >= 0 and len(text) - start > longest:
                if stop.startswith(text[start:]):
                    longest = len(text) - start
                    break
                start = text.find(stop[0], start + 1)
        return longest
