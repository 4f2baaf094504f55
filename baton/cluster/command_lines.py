"""With which options the process of a replica is started: those of the cluster file, and of the node it is on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from baton.cluster.spec import ClusterSpec, PrefillSpec, RouterSpec, SecuritySpec
from baton.options import RouterOptions, WorkerOptions
from baton.registry_link import MAX_LABEL_CHARS
from core.registry.records import MAX_LABELS
from core.security.tls import PREFILL, ROUTER, TlsFiles

ROLE = "{role}"  # in the paths of certificates: each tier has one of its own
PLACE_LABELS = {  # of a Ray node -> of a worker
    "ray.io/availability-zone": "zone",
    "ray.io/availability-region": "region",
    "ray.io/node-id": "node",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a replica runs. `labels`: those of its Ray node."""

    host: str
    labels: Mapping[str, str]


def worker_options(spec: ClusterSpec, role: str, name: str, checkpoint: Path, place: Place) -> WorkerOptions:
    """A worker listens on a free port of its node and tells the registry. Raises ConfigError."""
    tier: PrefillSpec | RouterSpec = spec.prefill if role == PREFILL else spec.decode  # type: ignore[assignment]
    tls = tls_files(spec.security, role)
    chosen: dict[str, object] = {"threads": 0 if tier.num_gpus else int(tier.num_cpus), **tier.flags}
    chosen["labels"] = _labels(str(chosen.get("labels", "")), place)
    return WorkerOptions(
        name=name,
        role=role,
        model=str(checkpoint),
        listen=f"{place.host}:0",
        served_name=spec.model.served_name or checkpoint.name,
        registry=spec.registry.address(),
        registry_prefix=spec.registry.prefix,
        drain_s=tier.drain_s,
        ticket_key_file=spec.security.ticket_key_file,
        insecure=spec.security.insecure,
        tls_cert=tls.certificate,
        tls_key=tls.key,
        tls_ca=tls.authority,
        **chosen,  # type: ignore[arg-type]
    )


def router_options(spec: ClusterSpec, name: str, checkpoint: Path) -> RouterOptions:
    """Raises ConfigError."""
    tls = tls_files(spec.security, ROUTER)
    return RouterOptions(
        name=name,
        model=str(checkpoint),
        host=spec.router.http_host,
        port=spec.router.http_port,
        served_name=spec.model.served_name or checkpoint.name,
        registry=spec.registry.address(),
        registry_prefix=spec.registry.prefix,
        drain_s=spec.router.drain_s,
        ticket_key_file=spec.security.ticket_key_file,
        insecure=spec.security.insecure,
        tls_cert=tls.certificate,
        tls_key=tls.key,
        tls_ca=tls.authority,
        **spec.router.flags,
    )


def tls_files(security: SecuritySpec, role: str) -> TlsFiles:
    paths = (security.tls_cert, security.tls_key, security.tls_ca)
    return TlsFiles(*(path.replace(ROLE, role) for path in paths))


def _labels(own: str, place: Place) -> str:
    """Those that the file gives, then those of the node; a name that is given keeps its value."""
    found = dict(part.split("=", 1) for part in own.split(",") if "=" in part)
    for name, value in sorted(place.labels.items()):
        ours = PLACE_LABELS.get(name) or (name if "ray.io/" not in name else "")
        fits = ours and len(f"{ours}={value}") <= MAX_LABEL_CHARS and "," not in value + ours
        if fits and len(found) < MAX_LABELS:
            found.setdefault(ours, value)
    return ",".join(f"{name}={value}" for name, value in found.items())
