"""What Serve is told of a tier: where its replicas may run, how they are replaced, stopped, watched and scaled.

A worker is one process with all its devices, so one actor asks for them together, on one node. Where nodes have
labels, `prefer` brings prefill and decode workers near each other without keeping them from starting elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import baton
from baton.cluster.spec import ClusterSpec, DecodeSpec, PrefillSpec, RouterSpec, bounds_of
from core.security.tls import DECODE, PREFILL, ROUTER

MARGIN_S = 20.0  # from the end of a drain to the kill: what is left is handed back, the process ends
HEALTH_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 10.0
PUSH_S = 0.5  # how often a replica sends its signals to the controller
LOOK_BACK_S = 2.0  # a replica samples its signals five times in this
NOT_OF_A_PROCESS = ("min", "max", "target", "steady", "surge_percent")  # a change of these restarts nothing
STARTS = 3  # in a row that may fail before the deployment is given up
POLICIES = {ROUTER: "RouterTierPolicy", PREFILL: "PrefillTierPolicy", DECODE: "DecodeTierPolicy"}
# Serve is about to read its interval from this variable; Serve 2.60 still reads the config.
PUSH_VARIABLE = "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"

Tier = RouterSpec | PrefillSpec | DecodeSpec


def options_of(spec: ClusterSpec, name: str) -> dict[str, Any]:
    """The options of the Serve deployment of a tier."""
    tier: Tier = {ROUTER: spec.router, PREFILL: spec.prefill, DECODE: spec.decode}[name]  # type: ignore[assignment]
    options: dict[str, Any] = {
        "name": name,
        "ray_actor_options": actor_options(tier),
        "max_ongoing_requests": 1000,  # redirects only; tokens go another way
        "graceful_shutdown_timeout_s": tier.drain_s + MARGIN_S,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "max_surge_percent": tier.surge_percent,
        "max_constructor_retry_count": STARTS,
        "autoscaling_config": autoscaling(spec, name, tier),
    }
    if isinstance(tier, RouterSpec) and tier.http_port:
        options["max_replicas_per_node"] = 1
    return options


def actor_options(tier: Tier) -> dict[str, Any]:
    """Devices and place of one replica."""
    options: dict[str, Any] = {
        "num_cpus": tier.num_cpus,
        "num_gpus": tier.num_gpus,
        "resources": tier.resources,
        "runtime_env": {"env_vars": {PUSH_VARIABLE: str(PUSH_S)}},
    }
    if tier.prefer:
        options["label_selector"] = {**tier.prefer, **tier.label_selector}
        options["fallback_strategy"] = [{"label_selector": tier.label_selector}]
    elif tier.label_selector:
        options["label_selector"] = tier.label_selector
    return options


def autoscaling(spec: ClusterSpec, name: str, tier: Tier) -> dict[str, Any]:
    """The policy is what is steady: Serve's own delays would only add to it."""
    return {
        "min_replicas": tier.min,
        "max_replicas": tier.max,
        "metrics_interval_s": PUSH_S,  # the variable alone is not enough: see PUSH_VARIABLE
        "look_back_period_s": LOOK_BACK_S,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "policy": {
            "policy_function": f"baton.cluster.policies:{POLICIES[name]}",
            "policy_kwargs": {
                "target": asdict(tier.target),
                "bounds": asdict(bounds_of(tier)),
                "registry": asdict(spec.registry),
            },
        },
    }


def version_of(spec: ClusterSpec, tier: str) -> str:
    """Changes with what the tier's processes are started with: `baton deploy` restarts no other tier."""
    whole = asdict(spec)
    own = {name: value for name, value in whole[tier].items() if name not in NOT_OF_A_PROCESS}
    parts = {"baton": baton.__version__, tier: own, **{n: whole[n] for n in ("model", "registry", "security")}}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
