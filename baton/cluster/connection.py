"""How we come to a Ray cluster: a running one by its address, with what can be wrong there said in words."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from core.errors import StartupError

KNOCK_S = 5.0


@contextmanager
def connected(address: str, **more: Any) -> Iterator[None]:
    """Within the block Ray is there. `address`: of a cluster, 'auto', or 'local' to start one. Raises StartupError."""
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise StartupError(f"Ray is not installed: pip install 'baton[ray,redis]' ({error})") from error
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **more)
    except (OSError, RayError, RuntimeError, ValueError) as error:
        raise StartupError(_why(address, error)) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Ray itself tries for a minute and longer to reach a head that is not there. Raises OSError."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()


def _why(address: str, error: Exception) -> str:
    said = str(error).strip().partition("\n")[0]
    if "uthenticat" in str(error) or "token" in str(error):
        return (
            f"the Ray cluster at {address} wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file"
            f" with the cluster's own ({said})"
        )
    if address == "local":
        return f"Ray does not start: {said}; a machine that is very busy may be too slow for it, so try again"
    return (
        f"no Ray cluster at {address}: {said}. Run this on a node of the cluster, or name its head with --address"
        " HOST:6379; `ray start --head` starts a cluster here, `baton serve MODEL --ray` a local one of its own"
    )
