"""One supervised child process: started, heard, restarted with a back-off, ended with its launcher."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.reports import Report, parse
from core.clock import Clock

log = logging.getLogger(__name__)

BACKOFF_S = (0.2, 10.0)  # first and longest
HEALTHY_S = 30.0  # a child that has run so long starts again from the first
MAX_LOG_LINE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the launcher does with what a child says."""

    on_report: Callable[[str, Report], None]
    on_log: Callable[[str, str], None]
    on_exit: Callable[[str, int, bool], None]  # name, exit code, whether it had been ready


class Child:
    """Runs `baton COMMAND flags` under a name until it is cancelled. Restarts it when it ends."""

    def __init__(self, name: str, command: str, flags: Sequence[str], env: dict[str, str], hooks: Hooks) -> None:
        self.name = name
        self._command = command
        self._flags = flags
        self._env = env
        self._hooks = hooks
        self._process: asyncio.subprocess.Process | None = None
        self.ready = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def supervise(self, clock: Clock) -> None:
        """Start, and start again after a pause that doubles while it keeps failing."""
        pause_s = BACKOFF_S[0]
        while True:
            began_s = clock()
            code = await self.live()
            self._hooks.on_exit(self.name, code, self.ready)
            self.ready = False
            if clock() - began_s > HEALTHY_S:
                pause_s = BACKOFF_S[0]
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, BACKOFF_S[1])

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await process.wait()
        except TimeoutError:
            log.warning("%s did not end within %.0f s: killed", self.name, grace_s)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def live(self) -> int:
        """One life of the process, for those that do not want it restarted; its exit code."""
        report_in, report_out = os.pipe()
        lifeline_in, lifeline_out = os.pipe()
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "baton",
                self._command,
                *self._flags,
                f"--report-fd={report_out}",
                f"--lifeline-fd={lifeline_in}",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(report_out, lifeline_in),
                env=self._env,
                limit=MAX_LOG_LINE_BYTES,
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which ends its children in order
            )
        finally:
            os.close(report_out)
            os.close(lifeline_in)
        try:
            assert process.stdout is not None
            listening = asyncio.gather(self._hear(report_in), self._relay(process.stdout))
            code = await process.wait()
            await listening
            return code
        finally:
            os.close(lifeline_out)

    async def _hear(self, fd: int) -> None:
        reader = asyncio.StreamReader(limit=MAX_LOG_LINE_BYTES)
        pipe = os.fdopen(fd, "rb")
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            while line := await reader.readline():
                report = parse(line)
                if report is not None:
                    self.ready = self.ready or report.what == "ready"
                    self._hooks.on_report(self.name, report)
        finally:
            transport.close()

    async def _relay(self, output: asyncio.StreamReader) -> None:
        """Its log lines, with its name in front; a line too long for the buffer is passed on in pieces."""
        while True:
            try:
                line = await output.readuntil(b"\n")
            except asyncio.IncompleteReadError as rest:
                line = rest.partial
            except asyncio.LimitOverrunError as overrun:
                line = await output.readexactly(max(1, overrun.consumed))
            if not line:
                return
            self._hooks.on_log(self.name, line.decode(errors="replace").rstrip("\n"))
