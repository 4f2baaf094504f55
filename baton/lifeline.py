"""A child ends with its launcher, however that ended: it holds the read end of a pipe that only the launcher writes to.

A thread reads it, not the event loop: a loop that hangs must not outlive the launcher either. PR_SET_PDEATHSIG is the
alternative that was rejected: it follows the thread that forked, and knows no orderly shutdown first.
"""

from __future__ import annotations

import os
import signal
import threading
import time

GRACE_S = 3.0


def hold(fd: int | None) -> None:
    """Watch the pipe from a thread of its own."""
    if fd is not None:
        threading.Thread(target=_watch, args=(fd,), name="lifeline", daemon=True).start()


def _watch(fd: int) -> None:
    while os.read(fd, 1):
        pass  # nothing is ever written; end of file is the message
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)
