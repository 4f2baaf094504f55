"""What a RayService asks of the cluster: devices, Secrets, claims and memory of each group of pods. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from baton.k8s.facts import Release, Tier
from baton.k8s.quantity import whole

Json = dict[str, Any]


def is_device(resource: str) -> bool:
    """Extended resources have a domain; hugepages and the like have none."""
    return "/" in resource and not resource.startswith("kubernetes.io/")


def release_of(service: Json, name: str) -> Release:
    cluster: Json = (service.get("spec") or {}).get("rayClusterConfig") or {}
    head = {"groupName": "head", "replicas": 1, **(cluster.get("headGroupSpec") or {})}
    groups: list[Json] = [head, *(cluster.get("workerGroupSpecs") or [])]
    return Release(name, str(cluster.get("rayVersion", "")), tuple(_tier(group) for group in groups))


def _tier(group: Json) -> Tier:
    pod: Json = (group.get("template") or {}).get("spec") or {}
    containers: list[Json] = [*(pod.get("containers") or []), *(pod.get("initContainers") or [])]
    volumes: list[Json] = pod.get("volumes") or []
    main: Json = containers[0] if containers else {}
    limits: Json = (main.get("resources") or {}).get("limits") or {}
    least = int(group.get("minReplicas", group.get("replicas", 1)) or 0)
    return Tier(
        name=str(group.get("groupName", "")),
        min=least,
        max=int(group.get("maxReplicas", least) or 0),
        image=str(main.get("image", "")),
        devices={name: whole(count) for name, count in limits.items() if is_device(name) and whole(count)},
        secrets=tuple(dict.fromkeys([*_of_env(containers), *_of_volumes(volumes), *_pull(pod)])),
        claims=tuple(v["persistentVolumeClaim"]["claimName"] for v in volumes if v.get("persistentVolumeClaim")),
        shm_bytes=_shm(main, volumes),
        memory_bytes=whole(limits.get("memory", 0)),
    )


def _of_env(containers: Iterable[Json]) -> Iterator[tuple[str, str]]:
    for container in containers:
        for variable in container.get("env") or []:
            ref = (variable.get("valueFrom") or {}).get("secretKeyRef") or {}
            if ref and not ref.get("optional"):
                yield str(ref.get("name", "")), str(ref.get("key", ""))
        for source in container.get("envFrom") or []:
            ref = source.get("secretRef") or {}
            if ref and not ref.get("optional"):
                yield str(ref.get("name", "")), ""


def _of_volumes(volumes: Iterable[Json]) -> Iterator[tuple[str, str]]:
    for volume in volumes:
        secret: Json = volume.get("secret") or {}
        if not secret or secret.get("optional"):
            continue
        items: list[Json] = secret.get("items") or [{"key": ""}]
        for item in items:
            yield str(secret.get("secretName", "")), str(item.get("key", ""))


def _pull(pod: Json) -> Iterator[tuple[str, str]]:
    for ref in pod.get("imagePullSecrets") or []:
        yield str(ref.get("name", "")), ""


def _shm(container: Json, volumes: Iterable[Json]) -> int | None:
    mounts: list[Json] = container.get("volumeMounts") or []
    name = next((mount.get("name") for mount in mounts if mount.get("mountPath") == "/dev/shm"), None)  # noqa: S108
    volume: Json = next((volume for volume in volumes if volume.get("name") == name), {})
    if name is None or not volume:
        return None
    return whole((volume.get("emptyDir") or {}).get("sizeLimit", 0))
