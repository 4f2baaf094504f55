"""An application on its way up or down: told to Serve, then watched until every tier is as it should be."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.serve.config import ProxyLocation

from baton.cluster.application import NAME, build
from baton.cluster.spec import ClusterSpec, parse
from core.errors import StartupError
from core.security.tls import DECODE, PREFILL, ROUTER

LOOK_S = 0.3
MAX_REASON = 4000  # characters of what Serve says of a failure
ROUTER_CALL_S = 10.0

Say = Callable[[str], None]


def roll_out(plain: dict[str, Any], within_s: float, say: Say, is_over: Callable[[], bool] = lambda: False) -> str:
    """Deploy, or change what is deployed; returns where the routers are reached. `is_over`: give up without an error.

    Raises ConfigError and StartupError.
    """
    spec = parse(plain)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location=ProxyLocation.Disabled)  # routers have HTTP ports of their own
    target = serve.RunTarget(build(plain), name=NAME, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    _watch(spec, within_s, say, is_over)
    return "" if is_over() else _routers_at()


def take_down(within_s: float, say: Say) -> bool:
    """False when there was nothing to take down. Raises StartupError when it is not gone in time."""
    if NAME not in serve.status().applications:
        return False
    serve.delete(NAME, _blocking=False)
    ends_s, said = time.monotonic() + within_s, ""
    while (application := serve.status().applications.get(NAME)) is not None:
        if time.monotonic() > ends_s:
            raise StartupError(f"the cluster still drains after {within_s:.0f} s; it goes on doing so")
        tiers = [f"{name} {sum(d.replica_states.values())}" for name, d in application.deployments.items()]
        if (line := f"draining: {', '.join(tiers)}") != said:
            say(said := line)
        time.sleep(LOOK_S)
    return True


def _watch(spec: ClusterSpec, within_s: float, say: Say, is_over: Callable[[], bool]) -> None:
    """Say what changes until all is up."""
    ends_s, said = time.monotonic() + within_s, dict[str, str]()
    while not is_over():
        application = serve.status().applications[NAME]
        for name in (PREFILL, DECODE, ROUTER):
            line = _line(name, application.deployments.get(name))
            if line != said.get(name):
                say(line)
                said[name] = line
        if application.status == "RUNNING":
            return
        if application.status == "DEPLOY_FAILED":
            raise StartupError(_failure(application))
        if time.monotonic() > ends_s:  # until then an unhealthy one may heal: a worker that has died is being replaced
            unhealthy = application.status == "UNHEALTHY"
            raise StartupError(_failure(application) if unhealthy else _too_late(spec, said, within_s))
        time.sleep(LOOK_S)


def _line(name: str, deployment: Any) -> str:
    if deployment is None:
        return f"{name}: waits"
    states = deployment.replica_states
    up, all_of_them = states.get("RUNNING", 0), sum(states.values())
    others = [f"{count} {state.lower()}" for state, count in states.items() if state != "RUNNING" and count]
    line = f"{name}: {up} of {max(all_of_them, up)} up" + (f" ({', '.join(others)})" if others else "")
    trouble = deployment.message.strip().partition("\n")[0] if "more than" in deployment.message else ""
    return f"{line}: {trouble}" if trouble else line


def _failure(application: Any) -> str:
    """What the processes themselves said, without the frames of those that passed it on."""
    reasons = [d.message for d in application.deployments.values() if d.message and d.status != "HEALTHY"]
    told = [part for reason in (*reasons, application.message) for part in reason.split("core.errors.")[1:]]
    reason = told[0].strip() if told else "\n".join((application.message, *reasons)).strip()
    return f"the cluster does not come up: {reason[-MAX_REASON:]}"


def _too_late(spec: ClusterSpec, said: dict[str, str], within_s: float) -> str:
    wishes = {PREFILL: spec.prefill, DECODE: spec.decode, ROUTER: spec.router}
    asked = [
        f"{name} asks for {tier.num_cpus:g} CPUs, {tier.num_gpus:g} GPUs"
        + "".join(f", {key}: {value}" for key, value in (tier.resources | tier.label_selector).items())
        for name, tier in wishes.items()
    ]
    return (
        f"not up after {within_s:.0f} s: {'; '.join(said.values())}. It goes on trying. `ray status` shows whether the"
        f" cluster has room: {'; '.join(asked)}. The workers' logs are in the Ray dashboard, under Serve"
    )


def _routers_at() -> str:
    handle = serve.get_deployment_handle("router", NAME)
    url: str = handle.process.remote().result(timeout_s=ROUTER_CALL_S)["url"]
    return url
