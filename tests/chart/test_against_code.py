"""The chart and the code say the same: options, ports, paths, variables, versions, numbers. Each is read from both."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

import baton
from baton.__main__ import COMMANDS
from baton.cluster.spec import DECIDED
from baton.k8s.judgement import MIN_KUBERNETES, MIN_OPERATOR
from baton.k8s.place import NODE_NAME, RACK, RACK_LABEL
from baton.options import RouterOptions, WorkerOptions
from baton.registry_url import PASSWORD
from router import metrics
from tests.chart.conftest import Cases
from tests.chart.render import CHART, ROOT, Manifest, Rendered, changed, container, environment
from tests.chart.tools import run
from tests.redis_server import RedisServer
from tests.servers import need

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
WHOLE = ("resources", "readinessProbe", "annotations", "labels")  # values that go into a manifest as they are
KINDS = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


@pytest.mark.parametrize(("name", "options"), [("workerFlags", WorkerOptions), ("routerFlags", RouterOptions)])
def test_flags_are_the_options_of_the_process(name: str, options: type[Any]) -> None:
    """All but those that other values decide. A new option goes into the schema as well."""
    expected: dict[str, dict[str, Any]] = {}
    for item in fields(options):
        if item.name not in DECIDED:
            expected[item.name] = {"type": KINDS[str(item.type)]}
            if item.metadata["choices"]:
                expected[item.name]["enum"] = list(item.metadata["choices"])
    assert SCHEMA["definitions"][name]["properties"] == expected


def test_every_value_has_its_place_in_the_schema_and_every_place_a_value() -> None:
    differing = list(compare(VALUES, SCHEMA, ""))
    assert differing == []


def compare(values: Manifest, schema: dict[str, Any], path: str) -> list[str]:
    schema = resolved(schema)
    if "properties" not in schema:
        return []
    assert schema["additionalProperties"] is False, path
    optional = {"global"} if not path else set(schema["properties"]) if not values else set()
    found = [f"{path}{name}" for name in set(values) ^ set(schema["properties"]) - optional]
    for name, value in values.items():
        if isinstance(value, dict) and name in schema["properties"]:
            found += compare(value, schema["properties"][name], f"{path}{name}.")
    return found


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").removeprefix("#/definitions/")
    found: dict[str, Any] = SCHEMA["definitions"][name] if name else schema
    return found


def test_every_value_is_used() -> None:
    """By its name, or with the whole that it is a part of. A value that nothing reads would be a lie."""
    read = "".join(path.read_text() for folder in ("templates", "files") for path in (CHART / folder).rglob("*.*"))
    unused = [path for path in leaves(VALUES) if path.rpartition(".")[2] not in read]
    assert unused == []


def leaves(values: Manifest, path: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        deeper = (
            isinstance(value, dict) and value and name not in ("resources", "readinessProbe", "annotations", "labels")
        )
        found += leaves(value, f"{path}{name}.") if deeper else [path + name]
    return found


def test_versions_are_those_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == baton.__version__ == chart["version"]
    assert chart["kubeVersion"] == f">={MIN_KUBERNETES[0]}.{MIN_KUBERNETES[1]}.0-0"
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    assert f"KubeRay's operator ({MIN_OPERATOR[0]}.{MIN_OPERATOR[1]} or" in page


def test_probes_and_monitors_ask_for_what_the_router_serves(cases: Cases) -> None:
    routes = (ROOT / "router" / "app.py").read_text()
    rendered = cases(4, "everything")
    probe = container(rendered.pod("router"))["readinessProbe"]["httpGet"]
    [router, *_] = rendered.of("PodMonitor")
    paths = {probe["path"], router["spec"]["podMetricsEndpoints"][0]["path"]}
    assert paths == {"/health", "/metrics"} and all(f'Route("{path}"' in routes for path in paths)
    named = {port["name"]: port["containerPort"] for port in container(rendered.pod("router"))["ports"]}
    assert named[probe["port"]] == rendered.arguments["router"]["http_port"]
    assert named["serve"] == rendered.serve["http_options"]["port"] != named["http"]
    test = (CHART / "files" / "completion.py").read_text()
    for path in ("/v1/models", "/v1/completions"):
        assert path in test and f'Route("{path}"' in routes


def test_ray_ends_a_replica_and_starts_another_before_its_node_goes(cases: Cases) -> None:
    """Read as text: the module needs Ray."""
    [margin_s] = re.findall(r"^MARGIN_S = ([\d.]+)", (ROOT / "baton/cluster/placement.py").read_text(), re.MULTILINE)
    rendered = cases(4, "minimal")
    for tier in rendered.groups:
        node_s = int(environment(rendered.pod(tier))["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        waits_s = VALUES[tier]["successorSeconds"]
        assert rendered.arguments[tier]["drain_s"] + float(margin_s) + waits_s < node_s


def test_variables_are_those_that_the_code_reads(cases: Cases) -> None:
    given = variables(cases(4, "everything")) | variables(cases(4, "external-redis"))
    extra = {"BATON_LOG"}  # of the values themselves
    assert {name for name in given - extra if name.startswith("BATON_")} == {PASSWORD, NODE_NAME, RACK_LABEL}
    assert VALUES["nodeLabels"]["rackLabel"] == RACK
    checks = (CHART / "templates" / "_checks.tpl").read_text()
    assert {name for name in given - extra if name not in checks} == set(), "extraEnv could contradict these"


def test_variables_of_ray_are_those_that_ray_reads(cases: Cases) -> None:
    """A misspelt one would be ignored, and a pod killed while it drains. Numbers of the GCS are known without RAY_."""
    need("ray")
    found = run([sys.executable, "-c", "import ray; print(ray.__path__[0])"], cwd=ROOT)
    given = variables(cases(4, "everything")) | variables(cases(4, "external-redis"))
    for name in (name for name in given if name.startswith("RAY_")):
        known = name.removeprefix("RAY_") if name.startswith("RAY_gcs") else name
        known = known.replace("_DATA_DASHBOARD_", "_{name}_DASHBOARD_")  # as its source writes all of these
        assert run(["grep", "-rqaF", known, found.stdout.strip()]).returncode == 0, name


def variables(rendered: Rendered) -> set[str]:
    """Of the pods of the Ray cluster."""
    return {name for group in ("head", *rendered.groups) for name in environment(rendered.pod(group))}


def test_an_slo_is_an_edge_of_the_histogram() -> None:
    thresholds = SCHEMA["properties"]["monitoring"]["properties"]["rules"]["properties"]["thresholds"]["properties"]
    assert thresholds["ttftSlo"]["enum"] == list(metrics.TTFT_S)
    assert thresholds["tokenGapSlo"]["enum"] == list(metrics.TOKEN_S)
    marks = set(re.findall(r"# threshold (\w+)$", (ROOT / "deploy/alerts/baton.rules.yaml").read_text(), re.MULTILINE))
    assert set(thresholds) == marks


def test_the_image_has_every_package_and_the_user_of_the_chart() -> None:
    folder = ROOT / "deploy" / "docker"
    ignored = (folder / "Dockerfile.dockerignore").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    files = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert {line[1:] for line in ignored if line.startswith("!")} == packages | files
    dockerfile = (folder / "Dockerfile").read_text()
    user = VALUES["security"]["runAsUser"]
    assert f"USER {user}:{user}" in dockerfile and f"--uid {user}" in dockerfile
    extras = [set(line.split(",")) for line in re.findall(r"extras=([a-z0-9,-]+)", dockerfile)]
    known = set(project["project"]["optional-dependencies"])
    assert extras and all({"ray", "redis", "kubernetes"} <= line <= known for line in extras)
    assert all("ucx" in line for line in extras), "for the CUDA of PyPI's torch"
    assert "bash wget" in dockerfile, "KubeRay's probes and start commands call them"


def test_redis_asks_for_the_password_that_its_pod_was_given(cases: Cases, tmp_path: Path) -> None:
    """The command of the rendered pod, run as it is on a real server; only folder and port are other ones."""
    need("redis-server")
    rendered = cases(4, "minimal")
    box = container(rendered.pod("first-baton-redis"))
    port = RedisServer(tmp_path).port  # a free one
    config = rendered.one("ConfigMap", "first-baton-redis")["data"]["redis.conf"]
    (tmp_path / "redis.conf").write_text(config.replace("/data", str(tmp_path)).replace("6379", str(port)))
    [script] = box["args"]
    password = "a \"b\\c' $d"
    command = [*box["command"], script.replace("/etc/redis", str(tmp_path))]
    environ = {"PATH": "/usr/bin:/bin", "REDIS_PASSWORD": password}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        program, *words = box["readinessProbe"]["exec"]["command"]
        ask = [program, "-p", str(port), *words]
        said = {
            word: subprocess.run(
                ask, env={**environ, "REDISCLI_AUTH": word}, capture_output=True, text=True, timeout=10
            )
            for word in (password, "wrong")
        }
        assert (said[password].returncode, said[password].stdout.strip()) == (0, "PONG")
        assert said["wrong"].returncode != 0
        assert password not in Path(f"/proc/{process.pid}/cmdline").read_text()
    finally:
        process.terminate()
        process.wait(10)


def wait_for(port: int) -> None:
    until_s = time.monotonic() + 10
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < until_s, "redis-server does not start"
        time.sleep(0.02)


def test_notes_name_commands_that_exist(helm: str) -> None:
    values = ["--set", "model.path=/models/tiny,security.existingSecret=s"]
    done = run([helm, "install", "first", str(CHART), "--dry-run=client", "--namespace", "serving", *values])
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    commands = [line.split() for line in notes.splitlines() if line.startswith("  ")]
    assert {words[0] for words in commands} == {"kubectl", "helm", "curl", "baton"}
    ours = [words for words in commands if words[0] == "baton"]
    assert {words[1] for words in ours} <= {command.name for command in COMMANDS} and len(ours) == 2


def test_the_completion_of_helm_test_is_sent_by_python_alone(rendered: Rendered) -> None:
    [pod] = [pod for name, pod in rendered.pods() if name.endswith("-test")]
    box = container(pod)
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test" and box["command"] == ["python", "-c"]
    script, url, patience_s = box["args"]
    assert script.strip() == (CHART / "files" / "completion.py").read_text().strip()
    [service] = [s for s in rendered.of("Service") if "redis" not in s["metadata"]["name"]]
    assert (
        url == f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}" and float(patience_s) > 0
    )


def test_the_release_that_the_doctor_reads_is_the_one_rendered(helm: str) -> None:
    from baton.k8s.manifest import release_of

    release = release_of(changed(helm, "minimal").one("RayService"), "first-baton")
    assert [tier.name for tier in release.tiers] == ["head", "router", "prefill", "decode"]
    assert all(("baton-secrets", "redis-password") in tier.secrets for tier in release.tiers)
    assert all(tier.shm_bytes and tier.shm_bytes < tier.memory_bytes for tier in release.tiers)
