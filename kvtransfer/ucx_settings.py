"""What UCX is told, and which fabric is expected of it.

UCX reads its environment, and then takes what is given here: so everything that decides speed or path is given. The
segment size is worth a factor of five over TCP; both ends are set, since one may not be larger than the other. A
scheme that writes straight into the page (put_zcopy) saves the receiver a copy, and was slower at every segment size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from core.errors import HandoffError
from core.messages import WorkerId

log = logging.getLogger(__name__)

CHOSEN: Mapping[str, str] = MappingProxyType(
    {
        "TCP_TX_SEG_SIZE": "512k",
        "TCP_RX_SEG_SIZE": "512k",
        "RNDV_THRESH": "intra:8K,inter:8K",  # a page waits at its source until it is received, control messages do not
        "RNDV_SCHEME": "auto",
    }
)


FOR_GPUS = ("cuda_copy", "cuda_ipc")  # what moves bytes of a GPU's memory, beside what a list of transports names


def settings(tls: str, net_devices: str, override: Mapping[str, str]) -> dict[str, str]:
    """By UCX's names, without `UCX_`."""
    return {**CHOSEN, "TLS": tls, "NET_DEVICES": net_devices, **override}


def with_gpu(settings: Mapping[str, str]) -> dict[str, str]:
    """For a pool on a GPU. A list that names everything, or what it leaves out ("^..."), stays as it is."""
    named = settings["TLS"].split(",")
    if "all" in named or named[0].startswith("^") or "cuda" in named:
        return dict(settings)
    return {**settings, "TLS": ",".join([*named, *(name for name in FOR_GPUS if name not in named)])}


@dataclass(frozen=True, slots=True)
class Fabric:
    """`expected` begins the name of a transport that must carry a pair ("rc", "cuda_ipc", "tcp"); None: any may."""

    expected: str | None = None
    strict: bool = False  # a fall-back costs the peer; else it is a warning

    def check(self, peer: WorkerId, lanes: Sequence[str]) -> None:
        """Raises HandoffError."""
        shown = ", ".join(lanes) or "unknown"
        log.info("%s is reached over %s", peer, shown)
        if self.expected is None or any(lane.startswith(self.expected) for lane in lanes):
            return
        found = f"{peer} is reached over {shown}, not over {self.expected}"
        if self.strict:
            raise HandoffError(found)
        log.warning("%s", found)
