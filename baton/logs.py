"""How every process of Baton logs: to stderr, one line each, with the time; the launcher puts the name in front."""

from __future__ import annotations

import asyncio
import logging
import os
import sys


def set_up_logs() -> None:
    """Level from BATON_LOG (default info)."""
    logging.basicConfig(
        stream=sys.stderr,
        level=os.environ.get("BATON_LOG", "info").upper(),
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_news)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def _is_news(record: logging.LogRecord) -> bool:
    """A call that was cancelled because its other end has gone, or because we stop, is no fault: no traceback of it."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, asyncio.CancelledError)
