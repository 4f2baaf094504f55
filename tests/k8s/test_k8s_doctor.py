"""`baton k8s doctor`: what it finds wrong, what it asks of an API server, and what it prints."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import warnings
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

import baton.__main__ as cli
from baton.k8s import command, place
from baton.k8s.api import Api, Unreadable
from baton.k8s.facts import Budget, Claim, Facts, Node, Permission, Release, Tier
from baton.k8s.gathering import NEEDED, Gathering
from baton.k8s.judgement import ZONE, judge
from baton.k8s.manifest import release_of
from baton.k8s.quantity import whole
from core.errors import ConfigError
from core.registry.records import MAX_LABELS
from tests.servers import need

GPU, RDMA, OPERATOR = "nvidia.com/gpu", "rdma/ib", "quay.io/kuberay/operator:v1.6.0"
NODES = tuple(Node(f"n{n}", {ZONE: "a"}, {GPU: 8, RDMA: 1}) for n in range(2))
DECODE = Tier("decode", 1, 4, "baton:1-cuda", {GPU: 1}, (("keys", "ticket.key"),), ("models",), 1 << 30, 8 << 30)
GROUPS = {"ray.io": ("v1",), "monitoring.coreos.com": ("v1",), "gateway.networking.k8s.io": ("v1",)}
GOOD = Facts(
    namespace="llm",
    kubernetes="v1.34.1",
    groups=GROUPS,
    permissions=(Permission("create", "ray.io", "rayservices", True),),
    nodes=NODES,
    release=Release("chat", "2.60.0", (DECODE,)),
    secrets={"keys": ("ticket.key",)},
    storage_classes=("fast",),
    default_class="fast",
    claims=(Claim("models", None, "Bound"),),
    budgets=(Budget("decode", 1, 2),),
    operators=(OPERATOR,),
)


def with_tier(**changes: Any) -> Facts:
    return replace(GOOD, release=Release("chat", "2.60.0", (replace(DECODE, **changes),)))


# --- judgement --------------------------------------------------------------------------------------------------


def test_a_good_cluster_has_no_findings() -> None:
    assert judge(GOOD) == []


@pytest.mark.parametrize(
    "facts,wrong,what,advice",
    [
        (replace(GOOD, kubernetes="v1.27.9"), True, "older than 1.29", "upgrade"),
        (replace(GOOD, operators=("quay.io/kuberay/operator:v1.3.2",)), True, "older than 1.6", "kuberay"),
        (replace(GOOD, operators=()), True, "no KubeRay operator", "install"),
        (replace(GOOD, groups={**GROUPS, "ray.io": ("v1alpha1",)}), True, "has v1alpha1, not v1", "definitions"),
        (replace(GOOD, groups={k: v for k, v in GROUPS.items() if "mon" not in k}), False, "not installed", "rules"),
        (replace(GOOD, groups={k: v for k, v in GROUPS.items() if "gate" not in k}), False, "not installed", "HTTP"),
        (replace(GOOD, permissions=(Permission("get", "", "pods", False),)), True, "you may not: get pods", "Role"),
        (replace(GOOD, release=Release("chat", "2.52.0", (DECODE,))), True, "Ray is 2.52.0", "SIGTERM"),
        (replace(GOOD, release=None), False, "no release of Baton", "chart"),
        (replace(GOOD, release=None, wanted_release="x"), True, "no release 'x'", "--release"),
        (with_tier(devices={"amd.com/gpu": 1}), True, "no node has amd.com/gpu", "plugin"),
        (with_tier(devices={GPU: 9}), True, "no node has more than 8", "larger nodes"),
        (with_tier(min=3, devices={GPU: 8}), True, "ask for 24 nvidia.com/gpu at least; the nodes have 16", "min"),
        (replace(GOOD, nodes=tuple(replace(n, schedulable=False) for n in NODES)), True, "no node has", "plugin"),
        (replace(GOOD, nodes=(NODES[0], Node("n1", {}, {GPU: 8}))), False, "no zone", "label"),
        (replace(GOOD, secrets={}), True, "the Secret keys is missing", "kubectl create secret"),
        (replace(GOOD, secrets={"keys": ("other",)}), True, "no ticket.key (it has other)", "key"),
        (replace(GOOD, claims=()), True, "Claim is missing", "modelCache"),
        (replace(GOOD, claims=(Claim("models", "slow", "Pending"),)), True, "no storage class slow", "fast"),
        (replace(GOOD, claims=(Claim("models", "fast", "Pending"),)), False, "not bound", "describe"),
        (
            replace(GOOD, claims=(Claim("models", None, "Pending"),), default_class=""),
            True,
            "no default",
            "storageClass",
        ),
        (replace(GOOD, budgets=(Budget("decode", 0, 2),)), False, "allows no pod", "minAvailable"),
        (with_tier(shm_bytes=None), True, "no volume at /dev/shm", "Memory"),
        (with_tier(shm_bytes=0), False, "no size limit", "shmSize"),
        (with_tier(shm_bytes=7 << 30), True, "/dev/shm may take", "memory limit"),
        (replace(GOOD, unreadable={"nodes": "403 Forbidden"}, nodes=()), False, "cannot be read: 403", "Role"),
    ],
)
def test_each_trouble_is_found_alone_with_its_remedy(facts: Facts, wrong: bool, what: str, advice: str) -> None:
    (finding,) = judge(facts)
    assert finding.wrong is wrong and what in finding.what and advice in finding.advice


def test_what_is_wrong_comes_first() -> None:
    found = judge(replace(GOOD, budgets=(Budget("decode", 0, 2),), secrets={}))
    assert [finding.wrong for finding in found] == [True, False]


@pytest.mark.parametrize(
    "text,number", [("5Gi", 5 << 30), ("500m", 0), ("1500m", 1), (4, 4), ("2M", 2_000_000), ("x", 0), (None, 0)]
)
def test_quantities(text: object, number: int) -> None:
    assert whole(text) == number


# --- gathering, from an emulated API server ---------------------------------------------------------------------

POD = {
    "containers": [
        {
            "image": "baton:1-cuda",
            "resources": {"limits": {"cpu": "2", "memory": "8Gi", GPU: "1", RDMA: 1}},
            "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
            "env": [
                {"name": "A", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "redis-password"}}},
                {"name": "B", "valueFrom": {"secretKeyRef": {"name": "o", "key": "k", "optional": True}}},
            ],
        }
    ],
    "imagePullSecrets": [{"name": "pull"}],
    "volumes": [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
        {"name": "keys", "secret": {"secretName": "keys", "items": [{"key": "ticket.key", "path": "x"}]}},
        {"name": "models", "persistentVolumeClaim": {"claimName": "models"}},
    ],
}
SERVICE = {
    "metadata": {
        "name": "chat-baton",
        "namespace": "llm",
        "labels": {"app.kubernetes.io/name": "baton", "app.kubernetes.io/instance": "chat"},
    },
    "spec": {
        "rayClusterConfig": {
            "rayVersion": "2.60.0",
            "headGroupSpec": {"template": {"spec": {"containers": [{"image": "baton:1"}]}}},
            "workerGroupSpecs": [
                {"groupName": "decode", "minReplicas": 2, "maxReplicas": 4, "template": {"spec": POD}}
            ],
        }
    },
}
AUTHORIZATION = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
ASKING = tuple(
    (path, body)
    for path, body in (
        ("/apis/ray.io/v1/namespaces/llm/rayservices", SERVICE),
        ("/api/v1/nodes", {"metadata": {"name": "n0"}, "status": {"allocatable": {"cpu": "8", GPU: "8"}}}),
        (
            "/api/v1/nodes",
            {
                "metadata": {"name": "n1", "labels": {ZONE: "a", place.RACK: "r7", "my/rack": "r8"}},
                "spec": {"unschedulable": True},
            },
        ),
        ("/api/v1/namespaces/llm/secrets", {"metadata": {"name": "keys"}, "data": {"ticket.key": "aHVzaA=="}}),
        (
            "/apis/storage.k8s.io/v1/storageclasses",
            {"metadata": {"name": "fast", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}},
        ),
        (
            "/api/v1/namespaces/llm/persistentvolumeclaims",
            {"metadata": {"name": "models"}, "spec": {"storageClassName": "fast"}, "status": {"phase": "Bound"}},
        ),
        (
            "/apis/policy/v1/namespaces/llm/poddisruptionbudgets",
            {"metadata": {"name": "chat-decode"}, "status": {"disruptionsAllowed": 0, "expectedPods": 2}},
        ),
        (
            "/apis/apps/v1/namespaces/ray/deployments",
            {"metadata": {"name": "op"}, "spec": {"template": {"spec": {"containers": [{"image": OPERATOR}]}}}},
        ),
    )
)


@pytest.fixture
async def server() -> AsyncIterator[Any]:
    """An emulated API server with a release. It evaluates no permissions: the test does."""
    need("kmock")
    need("kubernetes")
    import kmock

    async with kmock.KubernetesEmulator() as emulator, kmock.Server(emulator):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of how the emulator reads its own table
            emulator.resources.load_bundled()
        emulator.resources["ray.io/v1/rayservices"] = {"kind": "RayService", "namespaced": True}
        emulator[f"post {AUTHORIZATION}"] << {"status": {"allowed": True}}
        api = api_of(emulator)
        for path, body in ASKING:
            await asyncio.to_thread(api.create, path, body)
        api.close()
        yield emulator


class _Naming(Api):
    """Gives reviews a name each: the emulator stores them, and a real server does not."""

    def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == AUTHORIZATION:
            body = body | {"metadata": {"name": json.dumps(body)}}
        return super().create(path, body)


def api_of(server: Any, timeout_s: float = 5.0) -> Api:
    from kubernetes import client

    settings = client.Configuration()
    settings.host, settings.retries = str(server.url).rstrip("/"), False
    return _Naming(client.ApiClient(settings), timeout_s)


async def gathered(server: Any, release: str = "") -> Facts:
    api = api_of(server)
    try:
        return await asyncio.to_thread(Gathering(api, "llm", release).facts)
    finally:
        api.close()


async def test_facts_are_read_from_an_api_server(server: Any) -> None:
    facts = await gathered(server)
    assert facts.unreadable == {} and facts.kubernetes.startswith("v1.")
    assert facts.groups["ray.io"] == ("v1",) and "v1" in facts.groups["apps"]
    assert facts.nodes[0] == Node("n0", {}, {GPU: 8}) and not facts.nodes[1].schedulable
    assert facts.release == release_of(SERVICE, "chat")
    assert facts.secrets == {"keys": ("ticket.key",)} and "aHVzaA" not in repr(facts) and "hush" not in repr(facts)
    assert facts.storage_classes == ("fast",) and facts.default_class == "fast"
    assert facts.claims == (Claim("models", "fast", "Bound"),) and facts.budgets == (Budget("chat-decode", 0, 2),)
    assert facts.operators == (OPERATOR,)
    assert len(facts.permissions) == sum(len(resources) for _, _, resources in NEEDED)
    assert all(permission.allowed for permission in facts.permissions)
    assert (await gathered(server, "chat")).release == facts.release
    assert (await gathered(server, "other")).release is None


def test_a_rayservice_says_what_its_pods_ask_for() -> None:
    head, decode = release_of(SERVICE, "chat").tiers
    assert (head.name, head.min, head.devices, head.shm_bytes) == ("head", 1, {}, None)
    secrets = (("keys", "redis-password"), ("keys", "ticket.key"), ("pull", ""))
    assert decode == Tier("decode", 2, 4, "baton:1-cuda", {GPU: 1, RDMA: 1}, secrets, ("models",), 1 << 30, 8 << 30)
    assert release_of({}, "x").tiers[0].name == "head"


async def test_what_may_not_be_read_is_noted_and_the_rest_is_said(server: Any) -> None:
    server["get /api/v1/nodes"] << 403
    server["get /api/v1/namespaces/llm/secrets/keys"] << 403
    facts = await gathered(server)
    assert set(facts.unreadable) == {"nodes", "secret keys"} and facts.unreadable["nodes"].startswith("403")
    assert not any("Secret keys" in finding.what for finding in judge(facts)) and facts.claims


# --- the command ------------------------------------------------------------------------------------------------


async def ran(server: Any, capsys: pytest.CaptureFixture[str], **flags: Any) -> tuple[int, str]:
    asked = {"what": "doctor", "namespace": "", "release": "", "context": "", "json": False} | flags
    opening: Callable[[str], tuple[Api, str]] = lambda context: (api_of(server), "llm")  # noqa: E731
    code = await asyncio.to_thread(command.run, argparse.Namespace(**asked), opening)
    return code, capsys.readouterr().out


async def test_the_command_says_what_is_wrong_and_what_to_do(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = await ran(server, capsys)
    assert code == 1 and "namespace llm, 2 nodes, 8 nvidia.com/gpu" in out
    assert "decode   2 to 4 pods, each 1 nvidia.com/gpu, 1 rdma/ib, baton:1-cuda" in out
    assert "WRONG  decode: no node has rdma/ib" in out and "Secret keys has no redis-password" in out
    code, out = await ran(server, capsys, json=True, release="chat")
    told = json.loads(out)
    assert code == 1 and told["release"] == "chat" and told["nodes"]["n0"] == {GPU: 8}
    assert {"wrong", "where", "what", "advice"} == set(told["findings"][0])


async def test_without_an_api_server_it_is_one_line(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server["get /version"] << 503
    with pytest.raises(ConfigError, match="does not answer: 503"):
        await ran(server, capsys)


def test_without_a_cluster_it_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    need("kubernetes")
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    for flags in ([], ["--context", "elsewhere"]):
        assert cli.main(["k8s", "doctor", *flags]) == 2
        said = capsys.readouterr().err
        assert said.startswith("baton k8s: ") and said.count("\n") == 1


# --- the place of a node ----------------------------------------------------------------------------------------


async def test_zone_and_rack_come_from_the_node(server: Any) -> None:
    async def asked(**environ: str) -> dict[str, str]:
        return await asyncio.to_thread(place.labels_from_node, environ, lambda timeout_s: api_of(server, timeout_s))

    assert await asked() == {}
    assert await asked(BATON_NODE_NAME="n1") == {"node": "n1", "zone": "a", "rack": "r7"}
    assert await asked(BATON_NODE_NAME="n1", BATON_RACK_LABEL="my/rack") == {"node": "n1", "zone": "a", "rack": "r8"}
    assert await asked(BATON_NODE_NAME="n0") == {"node": "n0"}


def test_a_silent_api_server_or_none_costs_little_and_is_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    class Silent(Api):
        def __init__(self) -> None: ...

        def read(self, path: str) -> dict[str, Any]:
            raise Unreadable(0, "it timed out")

        def close(self) -> None: ...

    with caplog.at_level(logging.WARNING):
        assert place.labels_from_node({"BATON_NODE_NAME": "n1"}, lambda _: Silent()) == {"node": "n1"}
        assert place.labels_from_node({"BATON_NODE_NAME": "n1"}, lambda _: None) == {"node": "n1"}
    assert "it timed out" in caplog.text and "service account" in caplog.text


def test_a_flag_goes_before_the_node_and_there_are_never_too_many() -> None:
    assert place.merged({"zone": "mine"}, {"zone": "a", "rack": "r"}) == {"zone": "mine", "rack": "r"}
    many = {f"l{n}": "x" for n in range(MAX_LABELS)}
    assert place.merged(many, {"zone": "a"}) == many
