"""What a child process tells its launcher: one JSON object per line on a pipe of its own, never mixed with logs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class Report:
    """`what`: 'loading' (done, total), 'ready' (endpoint), 'signals' (numbers), 'drained' (its outcome as the message:
    core.telemetry.drain_metrics), or 'failed' (message, exit code)."""

    what: str
    done: int = 0
    total: int = 0
    message: str = ""
    exit_code: int = 0
    endpoint: str = ""  # where a worker is reached
    numbers: dict[str, float] = field(default_factory=dict)  # of a worker: baton.worker_signals


def parse(line: bytes) -> Report | None:
    """None for a line that is no report: a child may die in the middle of one."""
    try:
        fields = json.loads(line)
        return Report(**fields)
    except (ValueError, TypeError):
        return None


def reporter(fd: int | None) -> Callable[[Report], None]:
    """Writes to the launcher's pipe; to nobody when the process was started by hand."""

    if fd is not None:
        os.set_blocking(fd, False)

    def report(item: Report) -> None:
        if fd is None:
            return
        try:
            os.write(fd, json.dumps(asdict(item)).encode() + b"\n")
        except BlockingIOError:
            pass  # the launcher does not read: this line is lost, rather than that the worker waits for it
        except BrokenPipeError:
            pass  # the launcher is gone, and the watch on it ends this process

    return report
