"""The one thread that makes UCX progress: when it polls, when it sleeps, and how commands reach it.

It takes no lock of anybody's. It sleeps on the event descriptors of all workers and one of its own for commands;
after something has moved it goes on polling for a moment, since more is on its way.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from core.clock import Clock

log = logging.getLogger(__name__)
T = TypeVar("T")

LOOK_EVERY_S = 0.02  # how often deadlines are looked at, while there are any
GLANCE_EVERY = 16  # polls between two looks at the workers that sleep


class Polled(Protocol):
    """What the thread drives."""

    @property
    def fd(self) -> int: ...

    @property
    def waiting(self) -> bool:
        """Something is under way that has a deadline."""
        ...

    def poll(self) -> bool:
        """Do what can be done now; whether anything moved."""
        ...

    def rest(self) -> bool:
        """Ready to sleep until `fd` is readable; False when there is more to do first."""
        ...

    def look(self, now_s: float) -> None:
        """Give up what has taken too long."""
        ...


class ProgressThread:
    def __init__(self, clock: Clock, spin_s: float) -> None:
        self._clock = clock
        self._spin_s = spin_s
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._all: dict[int, Polled] = {}
        self._awake: dict[int, Polled] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="baton-ucx", daemon=True)
        self._thread.start()

    # --- from other threads ------------------------------------------------------------------------------------

    def post(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        os.eventfd_write(self._wake, 1)

    def call(self, command: Callable[[], T]) -> Future[T]:
        """Its result, or what it raised."""
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(command())
            except Exception as error:  # noqa: BLE001  (it is the caller's)
                answer.set_exception(error.with_traceback(None))

        self.post(run)
        return answer

    def stop(self) -> None:
        """Return when the thread has ended; every command that was posted has been run."""
        if self._thread.is_alive():
            self.post(lambda: setattr(self, "_stopped", True))
            self._thread.join()
            self._epoll.close()
            os.close(self._wake)

    # --- in the thread -----------------------------------------------------------------------------------------

    def add(self, polled: Polled) -> None:
        self._all[polled.fd] = self._awake[polled.fd] = polled
        self._epoll.register(polled.fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """Before `fd` is closed."""
        if self._all.pop(fd, None) is not None:
            self._awake.pop(fd, None)
            self._epoll.unregister(fd)

    def rouse(self, polled: Polled) -> None:
        """A command has given it something to do."""
        if polled.fd in self._all:
            self._awake[polled.fd] = polled

    def _run(self) -> None:
        moved_s = looked_s = self._clock()
        polls = 0
        while not self._stopped or self._commands:
            try:
                self._run_commands()
                now_s = self._clock()
                if self._poll():
                    moved_s = now_s
                if now_s - looked_s >= LOOK_EVERY_S:
                    looked_s = now_s
                    self._look(now_s)
                polls += 1
                if now_s - moved_s >= self._spin_s and self._rest():
                    self._sleep()
                elif polls % GLANCE_EVERY == 0:
                    self._notice(0.0)
            except Exception:  # the loop's top: one peer's trouble is not the others'
                log.exception("the UCX thread goes on")

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _poll(self) -> bool:
        moved = False
        for polled in list(self._awake.values()):
            moved |= polled.poll()
        return moved

    def _rest(self) -> bool:
        """Let those sleep that have nothing to do; whether all do."""
        for fd, polled in list(self._awake.items()):
            if polled.rest():
                self._awake.pop(fd, None)
        return not (self._awake or self._commands or self._stopped)

    def _sleep(self) -> None:
        waiting = any(polled.waiting for polled in self._all.values())
        self._notice(LOOK_EVERY_S if waiting else None)

    def _notice(self, timeout_s: float | None) -> None:
        for fd, _ in self._epoll.poll(timeout_s):
            if fd == self._wake:
                os.eventfd_read(self._wake)
            elif fd in self._all:
                self._awake[fd] = self._all[fd]

    def _look(self, now_s: float) -> None:
        for polled in list(self._all.values()):
            polled.look(now_s)
