"""What is wrong with a Kubernetes cluster for Baton, in words, and what to do next. Pure: facts in, findings out."""

from __future__ import annotations

import re
from collections.abc import Iterable

from baton.doctor_judgement import Finding
from baton.k8s.facts import Facts, Node, Release, Tier

MIN_KUBERNETES = (1, 29)
MIN_RAY = (2, 60)
MIN_OPERATOR = (1, 6)  # the first that takes the name of the Secret with Ray's token
ZONE = "topology.kubernetes.io/zone"
SHM = "/dev/shm"  # noqa: S108  where the pool lies
MEMORY_SHARE = 0.8  # of a pod's limit that /dev/shm may take: it counts against it

DEFINITIONS = (  # API group, version, needed at all, what is without it
    ("ray.io", "v1", True, "install KubeRay: helm install kuberay-operator kuberay/kuberay-operator"),
    (
        "monitoring.coreos.com",
        "v1",
        False,
        "no PodMonitor, no rules: leave monitoring.* off, or install the Prometheus operator",
    ),
    ("gateway.networking.k8s.io", "v1", False, "no HTTPRoute: leave httpRoute.enabled off, or install the Gateway API"),
)


def judge(facts: Facts) -> list[Finding]:
    """What is wrong before hints."""
    found = [
        *_unread(facts),
        *_versions(facts),
        *_definitions(facts),
        *_permissions(facts),
        *_budgets(facts),
        *_places(facts.nodes),
    ]
    if facts.release is None:
        what = f"no release {facts.wanted_release!r} here" if facts.wanted_release else "no release of Baton here"
        advice = "install the chart, or see --namespace and --release; the cluster itself was looked at"
        found.append(Finding(bool(facts.wanted_release), (facts.namespace,), what, advice))
    else:
        found += [*_release(facts, facts.release)]
    return sorted(found, key=lambda finding: not finding.wrong)


def _unread(facts: Facts) -> Iterable[Finding]:
    for what, why in facts.unreadable.items():
        advice = "nothing is said of it; ask as somebody who may read it, or have this Role extended"
        yield Finding(False, (what,), f"cannot be read: {why}", advice)


def _versions(facts: Facts) -> Iterable[Finding]:
    yield from _older("Kubernetes", facts.kubernetes, MIN_KUBERNETES, "upgrade the cluster")
    for image in facts.operators:
        tag = image.rpartition(":")[2]
        yield from _older(f"KubeRay's operator ({image})", tag, MIN_OPERATOR, "upgrade the chart kuberay-operator")
    if not facts.operators and "ray.io" in facts.groups and "deployments" not in facts.unreadable:
        yield Finding(True, (), "no KubeRay operator runs", "install it: a RayService is only a wish without it")
    if facts.release is not None:
        yield from _older(
            "Ray", facts.release.ray_version, MIN_RAY, "older ones kill replicas on SIGTERM: take a newer image"
        )


def _older(what: str, version: str, least: tuple[int, int], advice: str) -> Iterable[Finding]:
    found = re.match(r"v?(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < least:
        yield Finding(True, (), f"{what} is {version}, older than {least[0]}.{least[1]}", advice)


def _definitions(facts: Facts) -> Iterable[Finding]:
    if "API groups" in facts.unreadable:
        return
    for group, version, needed, advice in DEFINITIONS:
        there = facts.groups.get(group)
        if there is None:
            yield Finding(needed, (group,), "is not installed", advice)
        elif version not in there:
            yield Finding(needed, (group,), f"has {', '.join(there)}, not {version}", "upgrade its definitions")


def _permissions(facts: Facts) -> Iterable[Finding]:
    refused = [str(permission) for permission in facts.permissions if not permission.allowed]
    if refused:
        advice = "have a Role with these bound to who installs and looks, or install as somebody else"
        yield Finding(True, (facts.namespace,), f"you may not: {', '.join(refused)}", advice)


def _budgets(facts: Facts) -> Iterable[Finding]:
    for budget in facts.budgets:
        if budget.expected and not budget.allowed:
            advice = (
                "a drain of its nodes waits: raise the tier's min, or lower its pdb.minAvailable, before maintenance"
            )
            yield Finding(False, (budget.name,), "allows no pod to be evicted now", advice)


def _places(nodes: tuple[Node, ...]) -> Iterable[Finding]:
    without = tuple(node.name for node in nodes if ZONE not in node.labels)
    if without and len(nodes) > 1:
        advice = f"label them with {ZONE}: tiers spread over zones, and hand-offs stay within one"
        yield Finding(False, _few(without), "the nodes have no zone", advice)


def _few(names: tuple[str, ...]) -> tuple[str, ...]:
    return names if len(names) <= 5 else (*names[:5], f"and {len(names) - 5} more")


def _release(facts: Facts, release: Release) -> Iterable[Finding]:
    yield from _devices(facts, release)
    yield from _secrets(facts, release)
    yield from _claims(facts, release)
    for tier in release.tiers:
        yield from _memory(tier)


def _devices(facts: Facts, release: Release) -> Iterable[Finding]:
    if "nodes" in facts.unreadable:
        return
    for name in sorted({device for tier in release.tiers for device in tier.devices}):
        asking = [tier for tier in release.tiers if tier.devices.get(name)]
        where = tuple(tier.name for tier in asking)
        there = [node.allocatable.get(name, 0) for node in facts.nodes if node.schedulable]
        wanted = sum(tier.min * tier.devices[name] for tier in asking)
        if not sum(there):
            advice = f"install the device plugin that offers {name}, or correct its name in the values"
            yield Finding(True, where, f"no node has {name}", advice)
            continue
        for tier in asking:
            if tier.devices[name] > max(there):
                advice = "lower what a pod asks for, or add larger nodes"
                what = f"asks for {tier.devices[name]} {name} in a pod; no node has more than {max(there)}"
                yield Finding(True, (tier.name,), what, advice)
        if wanted > sum(there):
            advice = "lower min, or add nodes (an autoscaler of nodes may do that)"
            yield Finding(True, where, f"ask for {wanted} {name} at least; the nodes have {sum(there)}", advice)


def _secrets(facts: Facts, release: Release) -> Iterable[Finding]:
    asked: dict[tuple[str, str], list[str]] = {}
    for tier in release.tiers:
        for pair in tier.secrets:
            asked.setdefault(pair, []).append(tier.name)
    for (name, key), tiers in sorted(asked.items()):
        if f"secret {name}" in facts.unreadable:
            continue
        if name not in facts.secrets:
            yield Finding(
                True, tuple(tiers), f"the Secret {name} is missing", f"kubectl create secret generic {name} ..."
            )
        elif key and key not in facts.secrets[name]:
            has = ", ".join(facts.secrets[name]) or "nothing"
            yield Finding(
                True, tuple(tiers), f"the Secret {name} has no {key} (it has {has})", "add it, or name another key"
            )


def _claims(facts: Facts, release: Release) -> Iterable[Finding]:
    if "claims" in facts.unreadable:
        return
    known = {claim.name: claim for claim in facts.claims}
    for name in sorted({name for tier in release.tiers for name in tier.claims}):
        claim = known.get(name)
        if claim is None:
            yield Finding(
                True, (name,), "the PersistentVolumeClaim is missing", "create it, or see modelCache in the values"
            )
        elif claim.phase != "Bound":
            yield from _unbound(facts, name, claim.storage_class)


def _unbound(facts: Facts, name: str, storage_class: str | None) -> Iterable[Finding]:
    if storage_class is None and not facts.default_class:
        yield Finding(True, (name,), "names no storage class, and the cluster has no default", "set storageClassName")
    elif storage_class and storage_class not in facts.storage_classes:
        has = ", ".join(facts.storage_classes) or "none"
        yield Finding(True, (name,), f"there is no storage class {storage_class}", f"take one of these: {has}")
    else:
        advice = f"kubectl describe pvc {name}: may the class provision ReadWriteMany?"
        yield Finding(False, (name,), "is not bound yet", advice)


def _memory(tier: Tier) -> Iterable[Finding]:
    if tier.name in ("prefill", "decode") and tier.shm_bytes is None:
        advice = (
            "mount an emptyDir with medium Memory at /dev/shm: a container's own has 64 MiB, and the pool lies there"
        )
        yield Finding(True, (tier.name,), f"no volume at {SHM}", advice)
    elif tier.shm_bytes == 0:
        yield Finding(
            False, (tier.name,), f"{SHM} has no size limit", "set shmSize: its pages count as the pod's memory"
        )
    elif tier.memory_bytes and (tier.shm_bytes or 0) > MEMORY_SHARE * tier.memory_bytes:
        what = f"{SHM} may take {tier.shm_bytes} of the {tier.memory_bytes} bytes that the pod may have"
        yield Finding(True, (tier.name,), what, "raise the memory limit, or lower shmSize: the pod would be killed")
