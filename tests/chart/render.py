"""The chart as Kubernetes would get it: rendered, parsed, and its pods taken out of the RayService."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.chart.tools import run

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "baton"
VALUES = Path(__file__).parent / "values"
CASES = tuple(sorted(path.stem for path in VALUES.glob("*.yaml")))
RELEASE, NAMESPACE = "first", "serving"

Manifest = dict[str, Any]


class Refused(Exception):
    """helm would not render it; the text is what it said."""


@dataclass(frozen=True, slots=True)
class Rendered:
    text: str
    manifests: tuple[Manifest, ...]

    def of(self, kind: str) -> list[Manifest]:
        return [manifest for manifest in self.manifests if manifest["kind"] == kind]

    def one(self, kind: str, name: str | None = None) -> Manifest:
        found = [m for m in self.of(kind) if name is None or m["metadata"]["name"] == name]
        assert len(found) == 1, (kind, name, [m["metadata"]["name"] for m in self.of(kind)])
        return found[0]

    @property
    def cluster(self) -> Manifest:
        config: Manifest = self.one("RayService")["spec"]["rayClusterConfig"]
        return config

    @property
    def groups(self) -> dict[str, Manifest]:
        """The worker groups by name."""
        return {group["groupName"]: group for group in self.cluster["workerGroupSpecs"]}

    @property
    def serve(self) -> Manifest:
        config: Manifest = yaml.safe_load(self.one("RayService")["spec"]["serveConfigV2"])
        return config

    @property
    def arguments(self) -> Manifest:
        """Of the Serve application: its cluster.yaml."""
        arguments: Manifest = self.serve["applications"][0]["args"]
        return arguments

    def pods(self) -> Iterator[tuple[str, Manifest]]:
        """What each kind of pod looks like, as a Pod of its own: validators know nothing of KubeRay."""
        yield "head", _pod("head", self.cluster["headGroupSpec"]["template"])
        for name, group in self.groups.items():
            yield name, _pod(name, group["template"])
        for kind in ("StatefulSet", "Deployment"):
            for manifest in self.of(kind):
                name = manifest["metadata"]["name"]
                yield name, _pod(name, manifest["spec"]["template"])
        for manifest in self.of("Pod"):
            yield manifest["metadata"]["name"], manifest

    def pod(self, name: str) -> Manifest:
        return dict(self.pods())[name]


def _pod(name: str, template: Manifest) -> Manifest:
    metadata = {"name": name, "namespace": NAMESPACE} | template["metadata"]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def case(helm: str, name: str) -> Rendered:
    return render(helm, "-f", str(VALUES / f"{name}.yaml"))


def changed(helm: str, name: str, **values: object) -> Rendered:
    """A case with some values written over, by their first name."""
    return render(helm, "-f", str(VALUES / f"{name}.yaml"), "-f", "-", given=json.dumps(values))


def render_values(helm: str, **values: object) -> Rendered:
    """These values alone, over those of the chart."""
    return render(helm, "-f", "-", given=json.dumps(values))


def render(helm: str, *flags: str, given: str = "") -> Rendered:
    """Raises Refused."""
    done = run([helm, "template", RELEASE, str(CHART), "--namespace", NAMESPACE, *flags], given=given)
    if done.returncode:
        raise Refused(done.stderr)
    manifests = tuple(manifest for manifest in yaml.safe_load_all(done.stdout) if manifest)
    return Rendered(done.stdout, manifests)


def container(pod: Manifest) -> Manifest:
    first: Manifest = pod["spec"]["containers"][0]
    return first


def environment(pod: Manifest) -> dict[str, Any]:
    """Values, or what they come from."""
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in container(pod)["env"]}
