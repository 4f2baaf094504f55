"""The Serve application: `build` makes the three tiers of a cluster file into one graph of deployments.

`serveConfigV2` of KubeRay names it as `import_path: baton.cluster.application:build`, with the file as `args`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict
from typing import Any

from ray import serve

import baton
from baton.cluster.placement import options_of
from baton.cluster.replicas import RouterReplica, WorkerReplica
from baton.cluster.spec import ClusterSpec, parse
from core.security.tls import DECODE, PREFILL, ROUTER

NAME = "baton"
NOT_OF_A_PROCESS = ("min", "max", "target", "steady", "surge_percent")  # a change of these restarts nothing


def build(args: dict[str, Any]) -> serve.Application:
    """`args`: what a cluster file holds. Raises ConfigError."""
    spec = parse(args)
    prefill = _deployment(spec, PREFILL, WorkerReplica).bind(PREFILL, args)
    decode = _deployment(spec, DECODE, WorkerReplica).bind(DECODE, args)
    return _deployment(spec, ROUTER, RouterReplica).bind(args, prefill, decode)


def _deployment(spec: ClusterSpec, tier: str, replica: type) -> serve.Deployment:
    plain: Any = serve.deployment(replica)  # the annotation there is of the decorator alone
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # metrics_interval_s: see PUSH_VARIABLE
        deployment: serve.Deployment = plain.options(**options_of(spec, tier))
    return deployment.options(version=version_of(spec, tier), _internal=True)


def version_of(spec: ClusterSpec, tier: str) -> str:
    """Changes with what the tier's processes are started with: `baton deploy` restarts no other tier."""
    whole = asdict(spec)
    own = {name: value for name, value in whole[tier].items() if name not in NOT_OF_A_PROCESS}
    parts = {"baton": baton.__version__, tier: own, **{n: whole[n] for n in ("model", "registry", "security")}}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
