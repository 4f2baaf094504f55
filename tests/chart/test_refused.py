"""Values that contradict each other are refused by helm, in words that say what to do; names that do not exist, too."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chart import tools
from tests.chart.render import Refused, changed

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("no model", {"model": {"path": ""}}, "model.path is missing"),
    ("no secret", {"security": {"existingSecret": ""}}, "create secret generic baton-secrets"),
    ("only some certificates", {"security": {"tls": {"router": "a"}}}, "for each of router, prefill and decode"),
    ("min over max", {"decode": {"min": 5, "max": 2}}, "decode.min is 5 and decode.max is 2"),
    ("killed while it drains", {"decode": {"terminationGracePeriodSeconds": 600}}, "a drain of 900 s need 1260"),
    ("nobody may go", {"router": {"pdb": {"minAvailable": 2}}}, "no pod could ever be evicted"),
    ("shared memory over memory", {"prefill": {"shmSize": "4Gi"}}, "prefill.shmSize 4Gi must be less than"),
    ("no memory limit", {"head": {"resources": {"limits": {"memory": None}}}}, "head.resources.limits.memory"),
    ("an old Ray", {"ray": {"version": "2.53.0"}}, "only from 2.60.0 on"),
    ("a variable of ours", {"decode": {"extraEnv": [{"name": "HF_TOKEN", "value": "x"}]}}, "HF_TOKEN is set by the"),
    ("Redis nowhere", {"redis": {"mode": "external"}}, "redis.external.url is missing"),
    (
        "a password in sight",
        {"redis": {"mode": "external", "external": {"url": "redis://me:pw@redis:6379"}}},
        "redis.external.url has a password",
    ),
    (
        "an authority without TLS",
        {"redis": {"mode": "external", "external": {"url": "redis://redis:6379", "caSecret": "ca"}}},
        "caSecret is for rediss",
    ),
    (
        "sentinels for Ray",
        {"redis": {"mode": "external", "external": {"url": "redis+sentinel://a:1,b:2/main"}}},
        "ray.gcsFaultTolerance.redisAddress is missing",
    ),
    ("shm over RDMA", {"rdma": {"enabled": True}, "decode": {"flags": {"transport": "shm"}}}, "exclude each other"),
    ("GPUs without CUDA", {"decode": {"gpus": 1}, "image": {"tag": "1-cpu"}}, "the build without CUDA"),
    ("a claim without a name", {"modelCache": {"type": "existingClaim"}}, "modelCache.existingClaim"),
    ("a folder without a path", {"modelCache": {"type": "hostPath"}}, "modelCache.hostPath"),
    ("an image without a name", {"modelCache": {"type": "image"}}, "modelCache.image.reference"),
    ("an ingress without a host", {"ingress": {"enabled": True}}, "ingress.host is missing"),
    ("a route without a gateway", {"httpRoute": {"enabled": True}}, "httpRoute.parentRefs is empty"),
]

UNKNOWN: list[tuple[str, dict[str, Any]]] = [
    ("decode", {"decode": {"replica": 1}}),
    ("flag", {"decode": {"flags": {"page_sise": 16}}}),
    ("flag", {"decode": {"flags": {"listen": "0.0.0.0:1"}}}),
    ("choice", {"decode": {"flags": {"transport": "pigeon"}}}),
    ("type", {"prefill": {"flags": {"page_size": "16"}}}),
    ("router", {"router": {"gpus": 1}}),
    ("tag", {"image": {"tag": "latest"}}),
    ("digest", {"image": {"digest": "sha256:12"}}),
    ("mode", {"redis": {"mode": "none"}}),
    ("url", {"redis": {"external": {"url": "http://redis"}}}),
    ("token", {"hfToken": {"value": "hf_secret"}}),
    ("top", {"gateway": {}}),
    ("uid", {"security": {"runAsUser": 0}}),
    ("upgrade", {"upgrade": {"type": "Recreate"}}),
    ("zero", {"prefill": {"min": 0}}),
]


@pytest.mark.parametrize(("values", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_contradiction_is_refused_in_words(helm: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused) as refused:
        changed(helm, "minimal", **values)
    assert message in str(refused.value)


@pytest.mark.parametrize("major", sorted(tools.HELM))
@pytest.mark.parametrize("values", [case[1] for case in UNKNOWN], ids=[str(case) for case in UNKNOWN])
def test_the_schema_lets_nothing_else_in(major: int, values: dict[str, Any]) -> None:
    with pytest.raises(Refused) as refused:
        changed(tools.helm(major), "minimal", **values)
    assert "schema" in str(refused.value)
