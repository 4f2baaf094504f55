"""Those who read the manifests have schemas: Kubernetes for its own kinds, KubeRay and Ray Serve for theirs."""

from __future__ import annotations

import gzip
import json
import os
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from baton.cluster import spec
from tests.chart.conftest import Cases
from tests.chart.render import CASES, ROOT, Manifest, Rendered
from tests.chart.tools import run
from tests.servers import need

KUBERNETES = ("1.30", "1.34")
FOREIGN = {  # kinds of which kubernetes-validate knows nothing: anything else without a schema is a mistake
    "RayService",
    "PodMonitor",
    "PrometheusRule",
    "HTTPRoute",
}


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_knows_every_field(rendered: Rendered, version: str) -> None:
    core = [manifest for manifest in rendered.manifests if manifest["kind"] not in FOREIGN]
    for manifest in (*core, *(pod for _, pod in rendered.pods())):
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_field_that_does_not_exist_is_found(rendered: Rendered) -> None:
    pod = deepcopy(rendered.pod("router"))
    pod["spec"]["containers"][0]["enviroment"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, KUBERNETES[-1], strict=True)


def test_a_kind_without_a_schema_is_found() -> None:
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        kubernetes_validate.validate({"apiVersion": "ray.io/v1", "kind": "RayService"}, KUBERNETES[-1], strict=True)


def test_kuberay_knows_every_field(rendered: Rendered) -> None:
    """Closed on the way down: a field that the definition does not have would be dropped without a word."""
    schema = ray_service_schema(os.environ.get("BATON_SCHEMAS", ""))
    service = deepcopy(rendered.one("RayService"))
    del service["metadata"]
    jsonschema.validate(service, schema)
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="replica"):
        jsonschema.validate(service, schema)


@cache
def ray_service_schema(folder: str) -> dict[str, Any]:
    """Of KubeRay's definition in the folder BATON_SCHEMAS: not ours to keep here."""
    if not folder:
        pytest.skip("BATON_SCHEMAS names no folder with KubeRay's definitions (ray.io_rayservices.yaml.gz)")
    with gzip.open(Path(folder) / "ray.io_rayservices.yaml.gz", "rb") as file:
        loader = yaml.CSafeLoader(file)
        definition = loader.get_data()
    versions = {version["name"]: version for version in definition["spec"]["versions"]}
    schema: dict[str, Any] = closed(versions["v1"]["schema"]["openAPIV3Schema"])
    return schema


def closed(schema: Any) -> Any:
    """The same schema, in which an object has no other properties than those that are listed."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items() if key != "properties"}
    if isinstance(schema.get("properties"), dict):
        inner["properties"] = {name: closed(value) for name, value in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            inner["additionalProperties"] = False
    return inner


def serve_says(*configs: Manifest) -> list[list[str]]:
    need("ray")
    done = run([sys.executable, "-m", "tests.chart.serve_schema"], given=json.dumps(configs), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found: list[list[str]] = json.loads(done.stdout)
    return found


def test_ray_serve_takes_the_application(cases: Cases) -> None:
    found = serve_says(*(cases(4, name).serve for name in CASES))
    assert found == [[] for _ in CASES]


def test_what_serve_would_refuse_or_ignore_is_found(cases: Cases) -> None:
    wrong, ignored = cases(4, "minimal").serve, cases(4, "minimal").serve
    wrong["http_options"]["port"] = "many"
    ignored["http_options"]["prot"] = ignored["applications"][0]["router_prefix"] = 1
    [refused], unknown = serve_says(wrong, ignored)
    assert refused.startswith("http_options.port: ")
    assert unknown == ["http_options.prot", "applications.0.router_prefix"]


def test_baton_takes_the_arguments(rendered: Rendered) -> None:
    cluster = spec.parse(rendered.arguments)
    assert cluster.router.http_port == 8000 and cluster.prefill.resources == {"baton_prefill": 1}
    assert cluster.registry.prefix and cluster.model.path


def test_monitors_and_routes_have_the_shape_that_their_operators_read(rendered: Rendered) -> None:
    """There is no schema of these at hand: what we use of them is little, and is spelt out."""
    for monitor in rendered.of("PodMonitor"):
        assert set(monitor["spec"]) == {"selector", "podMetricsEndpoints"}
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert set(endpoint) == {"port", "path", "interval"}
    for rule in rendered.of("PrometheusRule"):
        assert set(rule["spec"]) == {"groups"}
        for group in rule["spec"]["groups"]:
            assert set(group) <= {"name", "rules", "interval"}
    for route in rendered.of("HTTPRoute"):
        assert set(route["spec"]) == {"parentRefs", "hostnames", "rules"}
        assert route["spec"]["rules"][0]["backendRefs"] == [{"name": "first-baton-prod", "port": 80}]
