"""Reads the facts of a cluster, one bounded question after another. What cannot be read is noted, no more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from baton.k8s.api import Api, Unreadable
from baton.k8s.facts import Budget, Claim, Facts, Node, Permission, Release
from baton.k8s.manifest import is_device, release_of
from baton.k8s.quantity import whole

Json = dict[str, Any]

NEEDED = (  # what installing the chart and looking at it takes: verb, group, resources
    ("create", "", ("services", "serviceaccounts", "configmaps")),
    ("create", "ray.io", ("rayservices",)),
    ("create", "apps", ("statefulsets",)),
    ("create", "policy", ("poddisruptionbudgets",)),
    ("create", "networking.k8s.io", ("networkpolicies",)),
    ("get", "", ("pods", "secrets")),
    ("get", "ray.io", ("rayservices",)),
)
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
INSTANCE = "app.kubernetes.io/instance"
LIMIT = 5000  # of one list


class Gathering:
    """One look at one namespace. `facts` takes seconds."""

    def __init__(self, api: Api, namespace: str, release: str) -> None:
        self._api = api
        self._namespace = namespace
        self._wanted = release
        self._unreadable: dict[str, str] = {}

    def facts(self) -> Facts:
        """Raises Unreadable when the API server does not answer at all."""
        version = self._api.read("/version")
        space = f"namespaces/{self._namespace}"
        release = self._release()
        classes = self._list("storage classes", "/apis/storage.k8s.io/v1/storageclasses")
        default = (_name(c) for c in classes if _metadata(c, "annotations").get(DEFAULT_CLASS) == "true")
        return Facts(
            namespace=self._namespace,
            kubernetes=str(version.get("gitVersion", "")),
            groups=self._groups(),
            permissions=tuple(self._permissions()),
            nodes=tuple(_node(item) for item in self._list("nodes", "/api/v1/nodes")),
            release=release,
            wanted_release=self._wanted,
            secrets=self._secrets(release),
            storage_classes=tuple(_name(item) for item in classes),
            default_class=next(default, ""),
            claims=tuple(_claim(c) for c in self._list("claims", f"/api/v1/{space}/persistentvolumeclaims")),
            budgets=tuple(_budget(b) for b in self._list("budgets", f"/apis/policy/v1/{space}/poddisruptionbudgets")),
            operators=tuple(self._operators()),
            unreadable=self._unreadable,
        )

    def _list(self, what: str, path: str) -> list[Json]:
        try:
            items = self._api.read(f"{path}?limit={LIMIT}").get("items") or []
        except Unreadable as error:
            self._unreadable[what] = error.reason
            return []
        return [item for item in items if isinstance(item, dict)]

    def _groups(self) -> dict[str, tuple[str, ...]]:
        try:
            groups = self._api.read("/apis").get("groups") or []
        except Unreadable as error:
            self._unreadable["API groups"] = error.reason
            return {}
        return {group["name"]: tuple(version["version"] for version in group["versions"]) for group in groups}

    def _permissions(self) -> Iterator[Permission]:
        for verb, group, resources in NEEDED:
            for resource in resources:
                asked = {"namespace": self._namespace, "verb": verb, "group": group, "resource": resource}
                try:
                    answer = self._api.create(
                        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
                        {
                            "apiVersion": "authorization.k8s.io/v1",
                            "kind": "SelfSubjectAccessReview",
                            "spec": {"resourceAttributes": asked},
                        },
                    )
                except Unreadable as error:
                    self._unreadable["permissions"] = error.reason
                    return
                yield Permission(verb, group, resource, bool((answer.get("status") or {}).get("allowed")))

    def _release(self) -> Release | None:
        services = self._list("RayServices", f"/apis/ray.io/v1/namespaces/{self._namespace}/rayservices")
        if self._unreadable.get("RayServices", "").startswith("404"):
            del self._unreadable["RayServices"]  # no such definition: said where definitions are
        for service in services:
            labels = _metadata(service, "labels")
            name = labels.get(INSTANCE, _name(service))
            ours = labels.get("app.kubernetes.io/name") == "baton" if not self._wanted else name == self._wanted
            if ours:
                return release_of(service, name)
        return None

    def _secrets(self, release: Release | None) -> dict[str, tuple[str, ...]]:
        """Names of their entries; what is in them is thrown away here."""
        names = {name for tier in (release.tiers if release else ()) for name, _ in tier.secrets}
        found = {}
        for name in sorted(names):
            try:
                secret = self._api.read(f"/api/v1/namespaces/{self._namespace}/secrets/{name}")
                found[name] = tuple(sorted(secret.get("data") or {}))
            except Unreadable as error:
                if error.status != 404:
                    self._unreadable[f"secret {name}"] = error.reason
        return found

    def _operators(self) -> Iterator[str]:
        for deployment in self._list("deployments", "/apis/apps/v1/deployments"):
            spec: Json = ((deployment.get("spec") or {}).get("template") or {}).get("spec") or {}
            for container in spec.get("containers") or []:
                image = str(container.get("image", ""))
                if "kuberay" in image and "operator" in image:
                    yield image


def _metadata(item: Json, field: str) -> dict[str, str]:
    return (item.get("metadata") or {}).get(field) or {}


def _name(item: Json) -> str:
    return str((item.get("metadata") or {}).get("name", ""))


def _node(item: Json) -> Node:
    there: Json = (item.get("status") or {}).get("allocatable") or {}
    devices = {name: whole(count) for name, count in there.items() if is_device(name)}
    return Node(_name(item), _metadata(item, "labels"), devices, not (item.get("spec") or {}).get("unschedulable"))


def _claim(item: Json) -> Claim:
    storage_class = (item.get("spec") or {}).get("storageClassName")
    return Claim(_name(item), storage_class, str((item.get("status") or {}).get("phase", "")))


def _budget(item: Json) -> Budget:
    status: Json = item.get("status") or {}
    return Budget(_name(item), int(status.get("disruptionsAllowed", 0)), int(status.get("expectedPods", 0)))
