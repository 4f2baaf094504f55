"""What a worker does with what its routers say: an attempt is taken on, let go of, or left behind."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from core.errors import BatonError
from core.messages import Cancel, Lend, RequestFailed, Submit
from session.outlet import Key, Outlet, RouterQueue
from session.tier import Tier

log = logging.getLogger(__name__)


class Desk:
    """Between the sessions, whatever carries them, and the tier."""

    def __init__(self, tier: Tier, outlet: Outlet) -> None:
        self.tier = tier
        self._outlet = outlet

    def open(self, router: str, resume: Mapping[Key, tuple[int, ...]]) -> RouterQueue:
        """A session begins. What is held for this router and it no longer runs is let go of."""
        queue, dropped = self._outlet.open(router, resume)
        for key in dropped:
            self._drop(key)
        return queue

    def close(self, router: str, queue: RouterQueue) -> None:
        self._outlet.close(router, queue)

    def submit(self, router: str, submit: Submit) -> None:
        """Take it on, or answer with its failure; a second copy changes nothing."""
        key = (submit.request_id, submit.attempt)
        if not self._outlet.hold(router, key):
            return
        try:
            self.tier.submit(submit)
        except BatonError as error:
            self._outlet.send([RequestFailed(*key, error.code, error.message)])

    def refuse(self, router: str, key: Key, error: BatonError) -> None:
        """Answer a Submit that could not even be read."""
        if self._outlet.hold(router, key):
            self._outlet.send([RequestFailed(*key, error.code, error.message)])

    def cancel(self, cancel: Cancel) -> None:
        self.tier.cancel(cancel)
        if not cancel.choices:
            self._outlet.forget((cancel.request_id, cancel.attempt))

    def lend(self, lend: Lend) -> None:
        """Nobody is answered: the peer has the pages, or computes."""
        self.tier.lend(lend)

    def end_all(self) -> None:
        """Close every session: the worker stops, and routers hear it at once."""
        self._outlet.end_all()

    def sweep(self) -> None:
        """Let go of what routers have left behind. Called about once a second."""
        for key in self._outlet.sweep():
            log.warning("the router of request %s attempt %d is gone: cancelled", *key)
            self._drop(key)

    def _drop(self, key: Key) -> None:
        self.tier.cancel(Cancel(*key))
        self._outlet.forget(key)
