"""What a cluster file may say: the arguments of the Serve application, checked before anything is started.

docs/cluster.md explains each key; deploy/cluster.yaml is an example.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from baton.cluster.reading import read
from baton.options import RouterOptions, WorkerOptions
from baton.scaling.decode import DecodeTarget
from baton.scaling.prefill import PrefillTarget
from baton.scaling.steady import Bounds
from core.errors import ConfigError

MAX_WORKERS = 1024  # of a tier
DECIDED = frozenset(  # options that other keys of the file, or the place where a worker runs, decide
    {
        "name", "role", "model", "listen", "advertise", "workers", "host", "port", "served_name", "registry",
        "registry_prefix", "drain_s", "ticket_key_file", "insecure", "tls_cert", "tls_key", "tls_ca", "report_fd",
        "lifeline_fd",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """`path`: a folder that every node has, or the id of a model on the hub."""

    path: str
    served_name: str = ""


@dataclass(frozen=True, slots=True)
class RegistrySpec:
    """The address itself, or a file on every node (a mounted secret) that holds it."""

    url: str = ""
    url_file: str = ""
    prefix: str = "baton"

    def __post_init__(self) -> None:
        if bool(self.url) == bool(self.url_file):
            raise ConfigError("one of url and url_file is needed: the workers of a cluster find each other there")

    def address(self) -> str:
        """Reads the file, on the node where it is asked. Raises ConfigError."""
        if not self.url_file:
            return self.url
        try:
            return Path(self.url_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"registry.url_file {self.url_file}: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class SecuritySpec:
    """Files lie on every node. `insecure` must be said."""

    ticket_key_file: str = ""
    insecure: bool = False
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""

    def __post_init__(self) -> None:
        if not self.ticket_key_file and not self.insecure:
            raise ConfigError(
                "ticket_key_file is missing: a file on every node with what `openssl rand -hex 32` writes; or say"
                " insecure: true, where nobody else can reach the ports"
            )
        if len({bool(self.tls_cert), bool(self.tls_key), bool(self.tls_ca)}) > 1:
            raise ConfigError("TLS takes all of tls_cert, tls_key and tls_ca")


@dataclass(frozen=True, slots=True)
class SteadySpec:
    """How reluctant a tier is to shrink: see baton/scaling/steady.py."""

    window_s: float = 120.0
    pause_s: float = 10.0


@dataclass(frozen=True, slots=True)
class TierSpec:
    """What all tiers have in common. Devices and memory are those of one worker.

    A worker is placed where `label_selector` matches, and of those nodes preferably where `prefer` matches too.
    """

    min: int = 1
    max: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    label_selector: dict[str, str] = field(default_factory=dict)
    prefer: dict[str, str] = field(default_factory=dict)
    drain_s: float = 120.0
    start_s: float = 1800.0  # the longest that loading may take
    surge_percent: int = 25  # so many more workers while an update goes on; 0: old ones go before new ones come
    env: dict[str, str] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.max <= MAX_WORKERS:
            raise ConfigError(f"1 <= min <= max <= {MAX_WORKERS} does not hold for {self.min} and {self.max}")
        for name in ("num_cpus", "num_gpus", "drain_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name):g}")
        if not 0 <= self.surge_percent <= 100:
            raise ConfigError(f"surge_percent must be from 0 to 100, got {self.surge_percent}")
        if self.start_s <= 0:
            raise ConfigError(f"start_s must be positive, got {self.start_s:g}")


@dataclass(frozen=True, slots=True)
class RouterTarget:
    """`requests`: under way at one router."""

    requests: float = 256.0


@dataclass(frozen=True, slots=True)
class RouterSpec(TierSpec):
    """`http_port` 0 takes any free port. Two routers with one fixed port are never on one node."""

    http_host: str = "0.0.0.0"  # noqa: S104 - routers are what clients reach
    http_port: int = 8000
    drain_s: float = 30.0
    surge_percent: int = 0  # a node's fixed port is free again only when the old router has ended
    target: RouterTarget = field(default_factory=RouterTarget)
    steady: SteadySpec = field(default_factory=SteadySpec)

    def __post_init__(self) -> None:
        TierSpec.__post_init__(self)
        if not 0 <= self.http_port < 65536:
            raise ConfigError(f"http_port must be from 0 to 65535, got {self.http_port}")
        check_flags(RouterOptions, self.flags)


@dataclass(frozen=True, slots=True)
class PrefillSpec(TierSpec):
    max: int = 4
    target: PrefillTarget = field(default_factory=PrefillTarget)
    steady: SteadySpec = field(default_factory=SteadySpec)

    def __post_init__(self) -> None:
        TierSpec.__post_init__(self)
        check_flags(WorkerOptions, self.flags)


@dataclass(frozen=True, slots=True)
class DecodeSpec(TierSpec):
    max: int = 4
    drain_s: float = 900.0
    target: DecodeTarget = field(default_factory=DecodeTarget)
    steady: SteadySpec = field(default_factory=SteadySpec)

    def __post_init__(self) -> None:
        TierSpec.__post_init__(self)
        check_flags(WorkerOptions, self.flags)


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """A whole cluster: one model, one registry, three tiers."""

    model: ModelSpec
    registry: RegistrySpec
    security: SecuritySpec
    router: RouterSpec = field(default_factory=RouterSpec)
    prefill: PrefillSpec = field(default_factory=PrefillSpec)
    decode: DecodeSpec = field(default_factory=DecodeSpec)


def parse(plain: object) -> ClusterSpec:
    """From plain data: a YAML file, or the `args` of a Serve application. Raises ConfigError, naming the key."""
    return read(ClusterSpec, plain, "")


def load(path: Path) -> dict[str, Any]:
    """The plain data of a cluster file, checked. Raises ConfigError."""
    import yaml

    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    try:
        parse(plain)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None
    return dict(plain)


def bounds_of(tier: RouterSpec | PrefillSpec | DecodeSpec) -> Bounds:
    return Bounds(tier.min, tier.max, tier.steady.window_s, tier.steady.pause_s)


def check_flags(options: type[RouterOptions] | type[WorkerOptions], flags: dict[str, Any]) -> None:
    """Raises ConfigError for what is no option, or is not to be said here, or has another type."""
    known = {item.name: item for item in fields(options)}
    for name, value in flags.items():
        if name in DECIDED and name in known:
            raise ConfigError(f"flags.{name}: other keys of the file, or the node, decide this")
        if name not in known:
            allowed = ", ".join(n for n in known if n not in DECIDED)
            raise ConfigError(f"flags.{name}: there is no such option; there are {allowed}")
        kinds = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}[str(known[name].type)]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"flags.{name} must be {known[name].type}, got {value!r}")
        choices = known[name].metadata["choices"]
        if choices and value not in choices:
            raise ConfigError(f"flags.{name} must be one of {', '.join(choices)}, got {value!r}")
