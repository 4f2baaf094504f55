"""What there is to know of a cluster before anything is said of it: plain values, as gathered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Permission:
    verb: str
    group: str  # '' is the core
    resource: str
    allowed: bool

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}{'.' + self.group if self.group else ''}"


@dataclass(frozen=True, slots=True)
class Node:
    """`allocatable`: devices alone, by resource name."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    allocatable: Mapping[str, int] = field(default_factory=dict)
    schedulable: bool = True


@dataclass(frozen=True, slots=True)
class Tier:
    """A group of pods of the release. `devices`: asked for by one pod. `secrets`: (name, key), '' for all of it."""

    name: str
    min: int = 1
    max: int = 1
    image: str = ""
    devices: Mapping[str, int] = field(default_factory=dict)
    secrets: tuple[tuple[str, str], ...] = ()
    claims: tuple[str, ...] = ()
    shm_bytes: int | None = None  # None: no volume of its own at /dev/shm; 0: without a limit
    memory_bytes: int = 0  # limit; 0: none


@dataclass(frozen=True, slots=True)
class Release:
    name: str
    ray_version: str
    tiers: tuple[Tier, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    name: str
    storage_class: str | None  # None: the cluster's default
    phase: str


@dataclass(frozen=True, slots=True)
class Budget:
    """A PodDisruptionBudget and what it allows now."""

    name: str
    allowed: int
    expected: int


@dataclass(frozen=True, slots=True)
class Facts:
    """`unreadable`: what could not be read, and why. `secrets`: keys by name; a name that is missing is not in it."""

    namespace: str
    kubernetes: str = ""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # versions by API group
    permissions: tuple[Permission, ...] = ()
    nodes: tuple[Node, ...] = ()
    release: Release | None = None
    wanted_release: str = ""
    secrets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    storage_classes: tuple[str, ...] = ()
    default_class: str = ""
    claims: tuple[Claim, ...] = ()
    budgets: tuple[Budget, ...] = ()
    operators: tuple[str, ...] = ()  # images of KubeRay's operators
    unreadable: Mapping[str, str] = field(default_factory=dict)
