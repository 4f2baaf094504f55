"""How we come to a Ray cluster: a running one by its address, with what can be wrong there said in words."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from core.errors import StartupError


@contextmanager
def connected(address: str, **more: Any) -> Iterator[None]:
    """Within the block Ray is there. `address`: of a cluster, 'auto', or 'local' to start one. Raises StartupError."""
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise StartupError(f"Ray is not installed: pip install 'baton[ray,redis]' ({error})") from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **more)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise StartupError(_why(address, error)) from error
    try:
        yield
    finally:
        ray.shutdown()


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
