"""Which transports a worker has: what --transport asks for, as far as this machine has it."""

from __future__ import annotations

import importlib.util
import logging
import os

from baton.options import WorkerOptions
from core.clock import Clock
from core.errors import ConfigError
from kvtransfer.cuda_ipc import CudaIpcTransport
from kvtransfer.host import this_host
from kvtransfer.path_choice import Expectation
from kvtransfer.paths import Paths, PathTerms
from kvtransfer.shm import ShmTransport
from kvtransfer.transport import Transport

log = logging.getLogger(__name__)


def paths_for(options: WorkerOptions, clock: Clock, on_gpu: bool) -> Paths:
    """`on_gpu`: where the pool is. Raises ConfigError for a transport that is not installed, or cannot read it there,
    or an expectation that cannot be met.
    """
    transports = _of_one_host(options.transport, on_gpu)
    if options.transport == "ucx" or (options.transport == "auto" and _has_ucx()):
        transports["ucx"] = _ucx(options)
    strict = options.on_fallback == "error"
    terms = PathTerms(expect=Expectation.parse(options.expect_transport, tuple(transports), strict=strict))
    return Paths(transports, host=this_host(), clock=clock, terms=terms)


def _of_one_host(wanted: str, on_gpu: bool) -> dict[str, Transport]:
    """The one that reads a pool where it lies, if it is wanted."""
    if on_gpu and wanted == "shm":
        raise ConfigError("--transport shm shares the host's memory, and the pages lie in a GPU's: use local or auto")
    if not on_gpu and wanted == "cuda":
        raise ConfigError("--transport cuda shares a GPU's memory, and the pages lie in the host's: use local or auto")
    if wanted == "ucx":
        return {}
    return {"cuda": CudaIpcTransport()} if on_gpu else {"shm": ShmTransport()}


def _has_ucx() -> bool:
    if importlib.util.find_spec("ucxx") is not None:
        return True
    log.info("ucxx is not installed: pages move through memory that is shared, between workers of one host alone")
    return False


def _ucx(options: WorkerOptions) -> Transport:
    if importlib.util.find_spec("ucxx") is None:
        raise ConfigError("--transport ucx needs ucxx: install the extra `ucx`, or use --transport local on one host")
    # The wheel of UCX sets a variable that this version does not use, and then warns of it on standard output.
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    from kvtransfer.ucx import UcxTransport  # loads UCX, which a worker on one host does without

    return UcxTransport(tls=options.ucx_tls, net_devices=options.ucx_net_devices)
