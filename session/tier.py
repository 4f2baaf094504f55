"""The port between a session and the tier that serves it."""

from __future__ import annotations

from typing import Protocol

from core.messages import Cancel, Lend, Load, PagesChanged, Submit, WorkerInfo


class Tier(Protocol):
    """What a worker's service answers to its sessions. All calls come from the event loop's thread."""

    @property
    def info(self) -> WorkerInfo: ...

    def submit(self, submit: Submit) -> None:
        """Take on an attempt. Raises BatonError: the attempt has then failed, and nothing is held for it."""
        ...

    def cancel(self, cancel: Cancel) -> None:
        """Let go of an attempt, or of some of its choices. Unknown ones are ignored: cancels may come twice."""
        ...

    def lend(self, lend: Lend) -> None:
        """Hand over what is here of it. What cannot be lent is not: nothing depends on it."""
        ...

    def load(self) -> Load: ...

    def page_changes(self) -> PagesChanged | None:
        """What the prefix cache gained and lost since the last call, numbered; None if nothing."""
        ...

    def page_snapshot(self) -> PagesChanged:
        """Everything in the prefix cache, numbered as of the last change."""
        ...

    async def turn(self) -> float:
        """Returns after one turn of the engine's loop, with the seconds that it took. Raises EngineError: stuck."""
        ...
