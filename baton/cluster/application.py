"""The Serve application: `build` makes the three tiers of a cluster file into one graph of deployments.

`serveConfigV2` of KubeRay names it as `import_path: baton.cluster.application:build`, with the file as `args`.
"""

from __future__ import annotations

import warnings
from typing import Any

from ray import serve

from baton.cluster.placement import options_of, version_of
from baton.cluster.replicas import RouterReplica, WorkerReplica
from baton.cluster.spec import ClusterSpec, parse
from core.security.tls import DECODE, PREFILL, ROUTER

NAME = "baton"


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
