"""Makes the transports that real workers use, by name."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from kvtransfer.shm import ShmTransport
from kvtransfer.transport import Transport

NAMES = ["shm", "ucx"]


def make_transport(name: str) -> Transport:
    """Skips the test when this machine has no library for it."""
    if name == "shm":
        return ShmTransport()
    skip_without_ucx()
    from kvtransfer.ucx import UcxTransport

    return UcxTransport()


def skip_without_ucx() -> None:
    if find_spec("ucxx") is None:
        pytest.skip("ucxx is not installed")
