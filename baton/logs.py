"""How every process of Baton logs: to stderr, one line each, with the time; the launcher puts the name in front."""

from __future__ import annotations

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
    logging.getLogger("asyncio").setLevel(logging.WARNING)
