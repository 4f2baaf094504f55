"""The options of worker and router processes: parsed once into frozen dataclasses, and written back as flags.

The launcher passes options on to its children as flags, so that a child can also be started by hand.
"""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: Any = MISSING, *, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that is also a flag."""
    metadata = {"help": help, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    name: str = option(help="name of the worker, unique in its cluster")
    role: str = option(help="what it does", choices=("prefill", "decode", "aggregated"))
    model: str = option(help="folder of the checkpoint")
    listen: str = option(help="where routers and peers reach it: unix:/path or host:port; port 0 takes a free one")
    advertise: str = option("", help="where peers reach it, when that is not where it listens")
    transport: str = option(
        "auto",
        help="how pages come and go: local shares memory on one host, shm the host's or cuda a GPU's, as the pool is; "
        "ucx reaches others; auto takes local on one host and ucx otherwise, pair by pair",
        choices=("auto", "local", "shm", "cuda", "ucx"),
    )
    ucx_tls: str = option("all", help="what UCX may run over, as in UCX_TLS: 'tcp', 'rc,cuda', ...")
    ucx_net_devices: str = option("all", help="network devices of UCX, as in UCX_NET_DEVICES: 'mlx5_0:1', 'eth0', ...")
    expect_transport: str = option(
        "", help="what pairs are to use: 'shm', 'cuda', 'ucx', or 'ucx:rc' for a lane; anything else is a fall-back"
    )
    on_fallback: str = option(
        "warn", help="a pair that cannot use what is expected: warn and go on, or refuse it", choices=("warn", "error")
    )
    digest: str = option(
        "xxh3-64",
        help="of pages that move: xxh3-64 against accidents; blake3, with a key, against a hostile network",
        choices=("xxh3-64", "blake3"),
    )
    backend: str = option(
        "auto",
        help="what computes: torch on the CPU, triton on a GPU; auto: triton where a GPU is, and baton[gpu]",
        choices=("auto", "torch", "triton"),
    )
    device: str = option("auto", help="where it computes", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", help="type of weights and KV", choices=("auto", "float32", "bfloat16", "float16"))
    page_size: int = option(16, help="tokens per page, a multiple of 16")
    pages: int = option(0, help="pages of the pool; 0: as kv-bytes allows")
    kv_bytes: int = option(0, help="memory for the pool; 0: eight contexts, at most a quarter of what is free")
    gpu_share: float = option(1.0, help="of its GPU's memory, for weights and pool: less where others share the GPU")
    max_context: int = option(0, help="longest prompt and output together; 0: the model's own")
    step_tokens: int = option(512, help="prompt tokens computed in one step, at most")
    local_prefill: int = option(128, help="decode worker: prompts with fewer uncached tokens are prefilled there")
    max_rows: int = option(256, help="sequences decoded in one step, at most")
    threads: int = option(0, help="compute threads; 0: one per core")
    nice: int = option(0, help="lower the priority of the compute threads by this much")
    prefill_share: float = option(0.5, help="of the cores, left to a prefill on this machine that has waited")
    prefill_patience_s: float = option(0.5, help="how long such a prefill waits before that")
    served_name: str = option("", help="name of the model in metrics")
    registry: str = option(
        "", help="address of the registry: redis://host:port/db, rediss://..., redis+sentinel://...; empty: none"
    )
    registry_prefix: str = option("baton", help="name of the cluster in the registry: what its keys begin with")
    labels: str = option("", help="where it is, for whoever places work: name=value,... such as zone=a,rack=7")
    drain_s: float = option(30.0, help="after SIGTERM: time to finish what it has, before it hands the rest back")
    ticket_key_file: str = option("", help="file with the key of routers' tickets; the same for every service")
    insecure: bool = option(False, help="serve without tickets: only where nobody else can reach the ports")
    tls_cert: str = option("", help="certificate of this service (PEM); with it, all connections are mutual TLS")
    tls_key: str = option("", help="its private key (PEM)")
    tls_ca: str = option("", help="certificate of who signs those of all services (PEM)")
    report_fd: int = option(-1, help="file descriptor for reports to the launcher")
    lifeline_fd: int = option(-1, help="file descriptor whose end of file ends the process")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    name: str = option("router", help="name of the router")
    model: str = option(help="folder of the checkpoint: tokenizer and chat template")
    workers: str = option("", help="name=address of each worker, separated by commas; with a registry not needed")
    registry: str = option(
        "", help="address of the registry: redis://host:port/db, rediss://..., redis+sentinel://...; empty: none"
    )
    registry_prefix: str = option("baton", help="name of the cluster in the registry: what its keys begin with")
    host: str = option("127.0.0.1", help="address to listen on")
    port: int = option(8000, help="port to listen on")
    served_name: str = option("", help="name of the model; the folder's name when empty")
    max_context: int = option(0, help="longest prompt and output together; 0: the model's own")
    local_prefill: str = option("128", help="prompts with fewer uncached tokens are prefilled on decode; or 'auto'")
    lend: str = option(
        "auto",
        help="a prefill worker fetches a conversation's history from the decode worker that has it, if that is quicker",
        choices=("auto", "off"),
    )
    placement_wait_s: float = option(15.0, help="how long a request waits for workers that can take it")
    drain_s: float = option(30.0, help="after SIGTERM: time to finish the requests that it has")
    ticket_key_file: str = option("", help="file with the key of routers' tickets; the same for every service")
    insecure: bool = option(False, help="serve without tickets: only where nobody else can reach the ports")
    tls_cert: str = option("", help="certificate of this service (PEM); with it, all connections are mutual TLS")
    tls_key: str = option("", help="its private key (PEM)")
    tls_ca: str = option("", help="certificate of who signs those of all services (PEM)")
    report_fd: int = option(-1, help="file descriptor for reports to the launcher")
    lifeline_fd: int = option(-1, help="file descriptor whose end of file ends the process")


def add_options(parser: argparse.ArgumentParser, options: type[Any]) -> None:
    """One flag per field."""
    for item in fields(options):
        if item.type == "bool":
            parser.add_argument(_flag(item.name), action="store_true", help=item.metadata["help"])
            continue
        parser.add_argument(
            _flag(item.name),
            type={"int": int, "float": float}.get(str(item.type), str),
            required=item.default is MISSING,
            default=None if item.default is MISSING else item.default,
            choices=item.metadata["choices"],
            help=item.metadata["help"],
        )


def choices_of(options: type[Any], name: str) -> tuple[str, ...]:
    """What one of the options may be."""
    return next(item.metadata["choices"] for item in fields(options) if item.name == name)


def from_args(options: type[T], args: argparse.Namespace) -> T:
    return options(**{item.name: getattr(args, item.name) for item in fields(options)})  # type: ignore[arg-type]


def to_flags(options: WorkerOptions | RouterOptions) -> list[str]:
    """The flags that make these options."""
    values = {_flag(item.name): getattr(options, item.name) for item in fields(options)}
    return [flag if value is True else f"{flag}={value}" for flag, value in values.items() if value is not False]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
