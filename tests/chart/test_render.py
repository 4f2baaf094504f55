"""What comes out of the chart, case by case: the same from both helms, and each setting where it belongs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from tests.chart import tools
from tests.chart.conftest import Cases
from tests.chart.render import (
    CASES,
    CHART,
    NAMESPACE,
    ROOT,
    VALUES,
    Manifest,
    Rendered,
    changed,
    container,
    environment,
)
from tests.servers import need

NEWEST = max(tools.HELM)
TIERS = ("router", "prefill", "decode")
OURS = ("head", *TIERS)


@pytest.mark.parametrize("name", CASES)
def test_both_helms_render_the_same(cases: Cases, name: str) -> None:
    assert cases(3, name).text == cases(4, name).text


@pytest.mark.parametrize("major", sorted(tools.HELM))
@pytest.mark.parametrize("name", CASES)
def test_lint_has_nothing_to_say(major: int, name: str) -> None:
    done = tools.run([tools.helm(major), "lint", "--strict", str(CHART), "-f", str(VALUES / f"{name}.yaml")])
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_render_depends_on_nothing_but_its_values(cases: Cases, helm: str) -> None:
    assert changed(helm, "everything").text == cases(NEWEST, "everything").text
    assert not (CHART / "charts").exists() and "dependencies" not in yaml.safe_load((CHART / "Chart.yaml").read_text())


def test_each_tier_lands_on_the_pods_of_its_own_group(rendered: Rendered) -> None:
    for tier in TIERS:
        group, asked = rendered.groups[tier], rendered.arguments[tier]
        offered = json.loads(group["rayStartParams"]["resources"].strip("'"))
        assert offered == asked["resources"] == {f"baton_{tier}": 1}
        surge = math.ceil(asked["max"] * asked["surge_percent"] / 100)
        assert (group["minReplicas"], group["maxReplicas"]) == (asked["min"], asked["max"] + surge)
        assert group["replicas"] == group["minReplicas"]
        assert asked["label_selector"].items() <= group.get("labels", {}).items()
    assert rendered.cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_a_pod_outlives_its_node_and_that_a_successors_start_and_its_replica(rendered: Rendered) -> None:
    for tier, successor_s in zip(TIERS, (60, 300, 300), strict=True):
        pod = rendered.pod(tier)
        drain_s = rendered.arguments[tier]["drain_s"]
        node_s = int(environment(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert node_s == successor_s + drain_s + 30
        assert pod["spec"]["terminationGracePeriodSeconds"] >= successor_s + drain_s + 60


def test_secrets_come_by_reference_alone(rendered: Rendered) -> None:
    assert rendered.of("Secret") == []
    for _, pod in rendered.pods():
        for name, value in {} if "env" not in container(pod) else environment(pod).items():
            secret = any(word in name for word in ("PASSWORD", "TOKEN", "AUTH_TOKEN", "REDISCLI_AUTH"))
            assert not secret or "secretKeyRef" in value, name
    assert ":" not in rendered.arguments["registry"]["url"].partition("://")[2].partition("@")[0] or (
        "@" not in rendered.arguments["registry"]["url"]
    )


def test_the_password_of_redis_reaches_whoever_needs_it(cases: Cases) -> None:
    bundled, external = cases(NEWEST, "minimal"), cases(NEWEST, "external-redis")
    for rendered, reference in (
        (bundled, {"name": "baton-secrets", "key": "redis-password"}),
        (external, {"name": "redis-credentials", "key": "password"}),
    ):
        for tier in TIERS:
            assert environment(rendered.pod(tier))["BATON_REGISTRY_PASSWORD"] == {"secretKeyRef": reference}
        gcs = rendered.cluster["gcsFaultToleranceOptions"]
        assert gcs["redisPassword"]["valueFrom"]["secretKeyRef"] == reference
    redis = environment(bundled.pod("first-baton-redis"))
    assert redis["REDIS_PASSWORD"]["secretKeyRef"] == {"name": "baton-secrets", "key": "redis-password"}
    plain = cases(NEWEST, "insecure")
    assert "BATON_REGISTRY_PASSWORD" not in environment(plain.pod("decode"))
    assert "gcsFaultToleranceOptions" not in plain.cluster


def test_an_external_redis_is_reached_with_its_user_and_authority(cases: Cases) -> None:
    rendered = cases(NEWEST, "external-redis")
    url = rendered.arguments["registry"]["url"]
    gcs = rendered.cluster["gcsFaultToleranceOptions"]
    assert url == "rediss://baton@redis.example.org:6380/2?ca=/etc/baton/redis-ca/ca.crt"
    assert (gcs["redisAddress"], gcs["redisUsername"]) == ("rediss://redis.example.org:6380", {"value": "baton"})
    assert environment(rendered.pod("head"))["RAY_REDIS_CA_CERT"] == "/etc/baton/redis-ca/ca.crt"
    assert rendered.of("StatefulSet") == []
    for name in OURS:
        assert "/etc/baton/redis-ca" in mounts(rendered.pod(name))


def test_every_file_that_the_arguments_name_is_mounted(rendered: Rendered) -> None:
    security = rendered.arguments["security"]
    named = {Path(path).parent for key, path in security.items() if key != "insecure" and path}
    for tier in TIERS:
        assert {str(folder) for folder in named} <= set(mounts(rendered.pod(tier)))


def test_each_tier_has_a_certificate_of_its_own(cases: Cases) -> None:
    rendered = cases(NEWEST, "external-redis")
    for tier in TIERS:
        volumes = {volume["name"]: volume for volume in rendered.pod(tier)["spec"]["volumes"]}
        assert volumes["tls"]["secret"]["secretName"] == f"{tier}-tls"
    assert "/etc/baton/tls" not in mounts(rendered.pod("head"))


def test_devices_go_to_workers_and_ipc_lock_only_with_rdma(cases: Cases) -> None:
    rendered = cases(NEWEST, "gpu-rdma")
    for tier in ("prefill", "decode"):
        box = container(rendered.pod(tier))
        for side in ("requests", "limits"):
            assert box["resources"][side]["nvidia.com/gpu"] == box["resources"][side]["rdma/ib"] == "1"
        assert box["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
        assert rendered.arguments[tier]["num_gpus"] == 1
        flags = rendered.arguments[tier]["flags"]
        assert (flags["expect_transport"], flags["ucx_net_devices"], flags["page_size"]) == ("ucx:rc", "mlx5_0:1", 32)
    assert [rendered.arguments[tier]["flags"]["on_fallback"] for tier in ("prefill", "decode")] == ["error", "warn"]
    for case, names in (("gpu-rdma", ("head", "router")), ("minimal", OURS)):
        for name in names:
            box = container(cases(NEWEST, case).pod(name))
            assert "add" not in box["securityContext"]["capabilities"]
            assert set(box["resources"]["limits"]) == {"cpu", "memory"}


def test_no_pod_has_more_rights_than_it_needs(rendered: Rendered) -> None:
    for name, pod in rendered.pods():
        spec, box = pod["spec"], container(pod)["securityContext"]
        assert spec["securityContext"]["runAsNonRoot"] and box["runAsNonRoot"] and box["runAsUser"] >= 999, name
        assert box["readOnlyRootFilesystem"] and not box["allowPrivilegeEscalation"], name
        assert box["capabilities"]["drop"] == ["ALL"] and box["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostIPC", "hostPID", "hostNetwork"} & set(spec), name
        assert name == "head" or not spec["automountServiceAccountToken"] or rendered.of("ClusterRole"), name
        assert not container(pod)["image"].endswith(":latest")
    sidecar = rendered.cluster["autoscalerOptions"]["securityContext"]
    assert sidecar["capabilities"] == {"drop": ["ALL"]} and sidecar["runAsNonRoot"]


def test_shared_memory_and_scratch_are_where_ray_looks_for_them(rendered: Rendered) -> None:
    for name in OURS:
        pod = rendered.pod(name)
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        at = mounts(pod)
        assert volumes[at["/dev/shm"]]["emptyDir"]["medium"] == "Memory" and "/tmp" in at
        assert set(at.values()) == set(volumes), "a volume without a mount, or a mount without a volume"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("minimal", {"emptyDir": {"sizeLimit": "100Gi"}}),
        ("gpu-rdma", {"persistentVolumeClaim": {"claimName": "weights", "readOnly": True}}),
        ("everything", {"persistentVolumeClaim": {"claimName": "first-baton-prod-models"}}),
        ("insecure", {"hostPath": {"path": "/srv/models", "type": "Directory"}}),
    ],
)
def test_models_lie_where_the_values_say(cases: Cases, name: str, source: Manifest) -> None:
    rendered = cases(NEWEST, name)
    for tier in TIERS:
        assert {"name": "models", **source} in rendered.pod(tier)["spec"]["volumes"]
    assert "models" not in mounts(rendered.pod("head")).values()
    assert len(rendered.of("PersistentVolumeClaim")) == (name == "everything")


def test_workers_learn_where_their_node_stands(cases: Cases) -> None:
    rendered = cases(NEWEST, "everything")
    env = environment(rendered.pod("decode"))
    assert env["BATON_NODE_NAME"] == {"fieldRef": {"fieldPath": "spec.nodeName"}} and env["BATON_RACK_LABEL"]
    assert rendered.one("ClusterRole")["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]}]
    assert [n for n in OURS if rendered.pod(n)["spec"]["automountServiceAccountToken"]] == ["head", "prefill", "decode"]
    assert cases(NEWEST, "minimal").of("ClusterRole") == []


def test_a_model_can_be_an_image(helm: str) -> None:
    reference = {"reference": "registry.example.org/models/tiny:1", "pullPolicy": "IfNotPresent"}
    rendered = changed(helm, "minimal", modelCache={"type": "image", "image": reference})
    assert {"name": "models", "image": reference} in rendered.pod("decode")["spec"]["volumes"]
    found = [mount for mount in container(rendered.pod("decode"))["volumeMounts"] if mount["name"] == "models"]
    assert found == [{"name": "models", "mountPath": "/models", "readOnly": True}]


def test_a_budget_is_made_where_it_can_let_somebody_go(rendered: Rendered) -> None:
    """A number: of pods that a RayCluster owns, Kubernetes can take no percentage."""
    budgets = {budget["metadata"]["labels"]["app.kubernetes.io/component"]: budget for budget in rendered.of(
        "PodDisruptionBudget"
    )}  # fmt: skip
    for tier in TIERS:
        least = rendered.arguments[tier]["min"]
        if least == 1:
            assert tier not in budgets
            continue
        spec = budgets[tier]["spec"]
        assert "maxUnavailable" not in spec and 1 <= spec["minAvailable"] < least
        assert selects(spec["selector"], rendered.pod(tier)) and not selects(spec["selector"], rendered.pod("head"))


def test_the_service_reaches_routers_and_nobody_else(rendered: Rendered) -> None:
    [service] = [s for s in rendered.of("Service") if "redis" not in s["metadata"]["name"]]
    chosen = [name for name, pod in rendered.pods() if selects({"matchLabels": service["spec"]["selector"]}, pod)]
    assert chosen == ["router"]
    named = {port["name"]: port["containerPort"] for port in container(rendered.pod("router"))["ports"]}
    assert service["spec"]["ports"][0]["targetPort"] == "http" and named["http"] == 8000


def test_who_may_reach_whom(cases: Cases) -> None:
    rendered = cases(NEWEST, "everything")
    policies = {policy["metadata"]["name"].removeprefix("first-baton-prod"): policy for policy in rendered.of(
        "NetworkPolicy"
    )}  # fmt: skip
    assert set(policies) == {"", "-router", "-head", "-redis"}
    reached = {
        suffix: [name for name, pod in rendered.pods() if selects(policy["spec"]["podSelector"], pod)]
        for suffix, policy in policies.items()
    }
    assert reached == {"": list(OURS), "-router": ["router"], "-head": ["head"], "-redis": ["first-baton-prod-redis"]}
    [redis] = policies["-redis"]["spec"]["ingress"]
    assert redis["ports"] == [{"port": 6379, "protocol": "TCP"}]
    assert [n for n, pod in rendered.pods() if selects(redis["from"][0]["podSelector"], pod)] == list(OURS)
    [clients] = policies["-router"]["spec"]["ingress"]
    assert clients["ports"] == [{"port": 8000, "protocol": "TCP"}]
    assert clients["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}]
    assert policies["-redis"]["spec"]["egress"] == []
    within = policies[""]["spec"]["ingress"][0]
    assert "ports" not in within and selects(within["from"][0]["podSelector"], rendered.pod("decode"))
    assert "Egress" not in case_policy(cases(NEWEST, "minimal"))["spec"]["policyTypes"]
    assert cases(NEWEST, "insecure").of("NetworkPolicy") == []


def case_policy(rendered: Rendered) -> Manifest:
    return rendered.one("NetworkPolicy", "first-baton")


def test_monitors_exist_only_where_they_were_asked_for(cases: Cases) -> None:
    kinds = ("PodMonitor", "PrometheusRule")
    assert not any(cases(NEWEST, "minimal").of(kind) for kind in kinds)
    rendered = cases(NEWEST, "everything")
    monitors = rendered.of("PodMonitor")
    for monitor, name in zip(monitors, (*TIERS, "head"), strict=True):
        pod = rendered.pod(name)
        ports = {port["name"] for port in container(pod)["ports"]}
        assert selects(monitor["spec"]["selector"], pod) and monitor["metadata"]["labels"]["release"] == "prometheus"
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports
    head = environment(rendered.pod("head"))
    assert head["RAY_PROMETHEUS_HOST"] == "http://prometheus.monitoring:9090"
    uid = json.loads((ROOT / "deploy" / "grafana" / "baton.json").read_text())["uid"]
    assert head["RAY_GRAFANA_DATA_DASHBOARD_UID"] == uid


COPIES = [("alerts", "alerts", "*.yaml"), ("dashboards", "grafana", "*.json")]


@pytest.mark.parametrize(("copies", "originals", "names"), COPIES)
def test_the_chart_has_the_alerts_and_dashboards_themselves(copies: str, originals: str, names: str) -> None:
    """helm packs no file from outside the chart, so it has copies: `make chart` renews them."""
    here = {path.name: path.read_bytes() for path in (CHART / "files" / copies).glob("*")}
    assert here == {path.name: path.read_bytes() for path in (ROOT / "deploy" / originals).glob(names)}


def test_alerts_and_dashboards_are_rendered_as_they_are(helm: str) -> None:
    on = {"rules": {"enabled": True, "thresholds": None}, "dashboards": {"enabled": True}}
    rendered = changed(helm, "minimal", monitoring=on)
    shipped = [rule["spec"] for rule in rendered.of("PrometheusRule")]
    assert shipped == [yaml.safe_load(path.read_text()) for path in sorted((CHART / "files" / "alerts").glob("*"))]
    dashboards = [m["data"] for m in rendered.of("ConfigMap") if "-dashboard-" in m["metadata"]["name"]]
    found = {name: json.loads(text) for data in dashboards for name, text in data.items()}
    assert found == {path.name: json.loads(path.read_text()) for path in (CHART / "files" / "dashboards").glob("*")}


def test_thresholds_replace_what_stands_before_their_marks(cases: Cases, helm: str, tmp_path: Path) -> None:
    [changed_rule] = cases(NEWEST, "everything").of("PrometheusRule")
    [plain_rule] = changed(helm, "minimal", monitoring={"rules": {"enabled": True}}).of("PrometheusRule")
    after, before = yaml.safe_dump(changed_rule["spec"], width=1000), yaml.safe_dump(plain_rule["spec"], width=1000)
    for mark, old, new in (("ttftSlo", 'le="2.5"', 'le="1.0"'), ("ttftBudget", "0.01", "0.05")):
        assert values_at(before, mark) == {old} and values_at(after, mark) == {new}
    assert values_at(before, "tokenGapSlo") == values_at(after, "tokenGapSlo") == {'le="0.1"'}
    assert after.count("for: 20m") == before.count("for: 10m") - after.count("for: 10m") > 0
    rules = tmp_path / "rules.yaml"
    rules.write_text(after)
    done = tools.run([need("promtool"), "check", "rules", str(rules)])
    assert done.returncode == 0, done.stdout + done.stderr


def values_at(rules: str, mark: str) -> set[str]:
    """What stands right before a mark."""
    lines = rules.replace('\\"', '"').replace("\\n", "\n").splitlines()
    return {line.partition(f" # threshold {mark}")[0].split()[-1] for line in lines if f"# threshold {mark}" in line}


def test_answers_may_stream_through_ingress_and_gateway(cases: Cases) -> None:
    rendered = cases(NEWEST, "everything")
    ingress, route = rendered.one("Ingress"), rendered.one("HTTPRoute")
    assert ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
    assert route["spec"]["rules"][0]["timeouts"] == {"request": "0s"}
    paths = [path["path"] for path in ingress["spec"]["rules"][0]["http"]["paths"]]
    assert paths == ["/v1"] and ingress["spec"]["tls"] == [{"hosts": ["llm.example.org"], "secretName": "llm-tls"}]


def test_a_new_version_of_the_chart_alone_is_no_new_ray_cluster(rendered: Rendered) -> None:
    """KubeRay replaces the whole cluster when a pod template changes: only what matters to a pod may be in it."""
    for name in OURS:
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(rendered.pod(name)["metadata"]["labels"])


def test_registries_of_another_model_or_image_do_not_meet(helm: str) -> None:
    def prefix(**values: object) -> str:
        found: str = changed(helm, "minimal", **values).arguments["registry"]["prefix"]
        return found

    same = prefix(prefill={"max": 7})
    others = {prefix(model={"path": "/models/other"}), prefix(image={"tag": "0.2.0-cpu"}), same}
    assert len(others) == 3 and prefix() == same and same.startswith(f"{NAMESPACE}-first-baton-")


def test_every_setting_of_a_pod_arrives(cases: Cases) -> None:
    given = yaml.safe_load((VALUES / "everything.yaml").read_text())["router"]
    pod = cases(NEWEST, "everything").pod("router")
    spec, box = pod["spec"], container(pod)
    for name in ("nodeSelector", "affinity", "topologySpreadConstraints", "priorityClassName"):
        assert spec[name] == given[name]
    assert pod["metadata"]["annotations"] == given["podAnnotations"] and pod["metadata"]["labels"]["team"]
    assert given["extraEnv"][0] in box["env"] and given["extraVolumes"][0] in spec["volumes"]
    assert given["extraVolumeMounts"][0] in box["volumeMounts"] and spec["imagePullSecrets"] == [{"name": "pull"}]
    assert spec["terminationGracePeriodSeconds"] == 1200
    gpu = cases(NEWEST, "gpu-rdma").pod("prefill")["spec"]
    assert gpu["runtimeClassName"] == "nvidia" and gpu["tolerations"][0]["key"] == "nvidia.com/gpu"
    head = container(cases(NEWEST, "gpu-rdma").pod("head"))
    assert head["image"].startswith("registry.example.org/team/baton@sha256:")


def test_extra_objects_are_rendered(cases: Cases) -> None:
    names = {manifest["metadata"]["name"] for manifest in cases(NEWEST, "everything").of("ConfigMap")}
    assert {"first-extra", "first-extra-text"} <= names


def test_the_image_is_the_one_for_the_devices(helm: str) -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert container(changed(helm, "minimal").pod("decode"))["image"] == f"baton:{version}-cpu"
    assert container(changed(helm, "minimal", decode={"gpus": 1}).pod("head"))["image"] == f"baton:{version}-cuda"


def mounts(pod: Manifest) -> dict[str, str]:
    """Volumes by where they are mounted."""
    return {mount["mountPath"]: mount["name"] for mount in container(pod).get("volumeMounts", [])}


def selects(selector: Manifest, pod: Manifest) -> bool:
    labels = pod["metadata"]["labels"]
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    return all(labels.get(term["key"]) in term["values"] for term in selector.get("matchExpressions", []))
