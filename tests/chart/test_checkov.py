"""checkov finds nothing in the manifests and the Dockerfile but what is listed here, each with its reason."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from tests.chart import tools
from tests.chart.render import NAMESPACE, ROOT, Rendered

SKIPPED = {
    "CKV_K8S_8": "liveness of Ray's pods: KubeRay adds it, by the version of Ray; a test pod has none",
    "CKV_K8S_9": "readiness of Ray's pods: KubeRay adds what we leave out; a test pod has none",
    "CKV_K8S_15": "IfNotPresent is right for tags that never move",
    "CKV_K8S_35": "Ray, Redis and the hub's client read secrets from variables only",
    "CKV_K8S_38": "the head's autoscaler talks to the API server; workers do when nodeLabels is on",
    "CKV_K8S_43": "a digest is an option: image.digest",
    "CKV_K8S_40": "the user of Redis is the one that its image has, 999",
    "CKV_DOCKER_2": "Kubernetes has probes of its own; one image has several roles",
    "CKV_DOCKER_7": "the base image is a build argument, with a fixed tag",
}


def checked(folder: Path, framework: str) -> dict[str, list[str]]:
    """The resources that failed, by check."""
    words = ["-d", str(folder), "--framework", framework, "--skip-download", "--compact", "-o", "json", "--quiet"]
    done = tools.run([tools.checkov(), *words], limit_s=110)
    found = json.loads(done.stdout)
    assert found.get("summary", {}).get("parsing_errors") == 0, done.stderr
    assert found["summary"]["passed"] > 5, "it has looked at nothing"
    failed: dict[str, list[str]] = {}
    for item in found["results"]["failed_checks"]:
        failed.setdefault(item["check_id"], []).append(item["resource"])
    return failed


@pytest.mark.timeout(600)  # it may have to be installed first
def test_manifests_have_no_known_weakness(rendered: Rendered, tmp_path: Path) -> None:
    """With the pods of the RayService as Pods of their own: of KubeRay's kinds checkov knows nothing."""
    core = [deepcopy(manifest) for manifest in rendered.manifests if manifest["kind"] != "RayService"]
    for manifest in core:
        manifest["metadata"].setdefault("namespace", NAMESPACE)
    groups = [pod for name, pod in rendered.pods() if name in ("head", *rendered.groups)]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all([*core, *groups]))
    failed = checked(tmp_path, "kubernetes")
    rdma = "ucx_tls" in rendered.arguments["decode"]["flags"]
    asked_for = {"CKV_K8S_25"} if rdma else set()  # IPC_LOCK pins memory for RDMA
    asked_for |= set() if rendered.of("NetworkPolicy") else {"CKV2_K8S_6"}  # networkPolicy.enabled is off
    assert {check: where for check, where in failed.items() if check not in SKIPPED.keys() | asked_for} == {}


@pytest.mark.timeout(600)
def test_the_dockerfile_has_no_known_weakness() -> None:
    failed = checked(ROOT / "deploy" / "docker", "dockerfile")
    assert {check: where for check, where in failed.items() if check not in SKIPPED} == {}
