"""What the launcher shows while a model loads: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from baton.reports import Report

LINE_EVERY = 0.25  # of the whole, when there is no terminal


class LoadingBar:
    """One bar for all workers: bytes loaded of the bytes that all of them will load."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._done: dict[str, tuple[int, int]] = {}
        self._bar: tqdm[Any] | None = None
        self._shown = 0.0
        self._terminal = sys.stderr.isatty()

    def report(self, name: str, report: Report) -> None:
        self._done[name] = (report.done, report.total)
        done = sum(d for d, _ in self._done.values())
        total = sum(t for _, t in self._done.values())
        if len(self._done) < self._workers or not total:
            return
        if self._terminal:
            self._draw(done, total)
        elif done / total - self._shown >= LINE_EVERY or (done == total and self._shown < 1.0):
            self._shown = done / total
            print(f"loading: {100 * done // total} %", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="loading", file=sys.stderr)
        self._bar.total = total
        self._bar.n = done
        self._bar.refresh()
