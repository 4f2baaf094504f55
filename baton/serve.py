"""`baton serve`: one model on this machine. Decides which processes there are, in which order, and how they end."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import setproctitle

from baton.checkpoint import locate
from baton.children import Child, Hooks
from baton.credentials import DIGESTS, tls_in, write_key
from baton.loading import LoadingBar
from baton.model_facts import context_tokens
from baton.options import RouterOptions, WorkerOptions, choices_of, to_flags
from baton.ports import bind
from baton.registry_url import for_children
from baton.reports import Report
from core.clock import monotonic_s
from core.errors import ConfigError
from core.security.tls import ROUTER
from engine.config import ModelConfig, read_config

STOP_S = 3.5  # from SIGTERM to SIGKILL of the children
MAX_ROUTERS = 64
TRANSPORTS, BACKENDS, DEVICES = (choices_of(WorkerOptions, name) for name in ("transport", "backend", "device"))
PREFILL_NICE = 19  # on shared cores decode goes first; prefill has a floor (see DecodePolicy)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="PATH_OR_HF_ID", help="folder of a Hugging Face checkpoint, or its id on the hub")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="port to listen on; of several routers the first one's")
    add("--routers", type=int, default=1, metavar="N", help="routers, on ports that follow each other")
    add("--prefill", type=int, default=1, metavar="N", help="prefill workers")
    add("--decode", type=int, default=1, metavar="M", help="decode workers")
    add("--aggregated", action="store_true", help="the same workers (N + M of them), each with both roles")
    add("--served-model-name", default="", metavar="NAME", help="name for clients; the folder's name when left out")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="type of weights and KV")
    add("--max-context", type=int, default=0, metavar="TOKENS", help="longest prompt and output; 0: the model's own")
    add("--kv-memory", type=float, default=0.0, metavar="GIB", help="KV memory of each worker; 0: what is sensible")
    add("--pages", type=int, default=0, help="pages of each worker's pool, instead of --kv-memory")
    add("--page-size", type=int, default=16, metavar="TOKENS", help="tokens per page, a multiple of 16")
    add("--step-tokens", type=int, default=512, metavar="TOKENS", help="prompt tokens computed in one step")
    add(
        "--local-prefill",
        default="128",
        metavar="TOKENS",
        help="prompts with fewer uncached tokens are prefilled on the decode worker; 'auto' measures the threshold",
    )
    add(
        "--lend",
        default="auto",
        choices=("auto", "off"),
        help="prefill workers fetch a conversation's history from decode workers, where that is quicker than computing",
    )
    add("--prefill-share", type=float, default=0.5, help="of shared cores, for a prefill that has waited 500 ms")
    add("--digest", default="xxh3-64", choices=DIGESTS, help="of pages that move; blake3 is keyed, against forgers")
    add("--tls", default="", metavar="DIR", help="mutual TLS, with ca.crt and ROLE.crt, ROLE.key of each role in there")
    add("--transport", default="local", choices=TRANSPORTS, help="how pages move; local: by shared memory")
    add("--backend", default="auto", choices=BACKENDS, help="what computes: torch on the CPU, triton on a GPU")
    add("--device", default="auto", choices=DEVICES, help="where workers compute; one GPU is shared by all of them")
    add("--ray", action="store_true", help="the same on a Ray cluster that it starts here, a deployment for each tier")
    add("--registry", default="", metavar="URL", help="a running Redis, where routers share limits")
    add("--registry-prefix", default="baton", metavar="NAME", help="what its keys begin with there")
    add("--threads", type=int, default=0, help="compute threads of each worker; 0: one per core")


def run(args: argparse.Namespace) -> int:
    setproctitle.setproctitle("baton-launcher")
    _check(args)
    checkpoint = locate(args.model)
    config = read_config(checkpoint)
    for number in range(args.routers):
        bind(args.host, args.port + number).close()
    if args.ray:
        from baton.cluster import local  # Ray is an extra, and slow to import

        return local.run(args, checkpoint)
    folder = Path(tempfile.mkdtemp(prefix="baton-"))  # 0700: only this user reaches the workers' sockets
    try:
        return asyncio.run(Launcher(args, checkpoint, config, folder).serve())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError, naming the flag."""
    if args.prefill < 1 or args.decode < 1:
        raise ConfigError("--prefill and --decode must be at least 1; for one pool of workers use --aggregated")
    if not 1 <= args.routers <= MAX_ROUTERS:
        raise ConfigError(f"--routers must be from 1 to {MAX_ROUTERS}, got {args.routers}")
    if args.page_size < 16 or args.page_size % 16:
        raise ConfigError(f"--page-size must be a multiple of 16, got {args.page_size}")
    if args.local_prefill != "auto" and not args.local_prefill.isdecimal():
        raise ConfigError(f"--local-prefill must be a number of tokens or 'auto', got {args.local_prefill!r}")
    if not 0.0 <= args.prefill_share < 1.0:
        raise ConfigError(f"--prefill-share must be at least 0 and below 1, got {args.prefill_share}")


@dataclass(slots=True)
class _State:
    """What the launcher waits for."""

    ready: asyncio.Event
    stopping: asyncio.Event
    failure: Report | None = None
    waiting: int = 0


class Launcher:
    """Starts the workers and the routers together, says when all are ready, keeps them alive, ends them."""

    def __init__(self, args: argparse.Namespace, checkpoint: Path, config: ModelConfig, folder: Path) -> None:
        self._args = args
        self._checkpoint = checkpoint
        self._config = config
        self._folder = folder
        self._bar = LoadingBar(args.prefill + args.decode)
        self._state = _State(asyncio.Event(), asyncio.Event())
        self._key_file = write_key(folder)
        hooks = Hooks(self._on_report, _print_log, self._on_exit)
        self._registry, secret = for_children(args.registry)
        env = _child_env() | secret
        workers = self._workers()
        self._children = [Child(w.name, "worker", to_flags(w), env, hooks) for w in workers]
        routers = [self._router(workers, number) for number in range(args.routers)]
        self._children += [Child(router.name, "router", to_flags(router), env, hooks) for router in routers]
        self._state.waiting = len(self._children)

    async def serve(self) -> int:
        """The exit code: 0 when it was told to stop, that of a child that cannot start."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._state.stopping.set)
        tasks = [asyncio.create_task(child.supervise(monotonic_s)) for child in self._children]
        announce = asyncio.create_task(self._announce())
        await self._state.stopping.wait()
        self._bar.close()
        for task in (announce, *tasks):
            task.cancel()
        await asyncio.gather(*(child.stop(STOP_S) for child in self._children))
        await asyncio.gather(announce, *tasks, return_exceptions=True)
        failure = self._state.failure
        if failure is not None:
            print(f"baton serve: {failure.message}", file=sys.stderr)
            return failure.exit_code
        return 0

    # --- which processes ---------------------------------------------------------------------------------------

    def _workers(self) -> list[WorkerOptions]:
        args = self._args
        if args.aggregated:
            return [self._worker(f"worker-{i}", "aggregated") for i in range(args.prefill + args.decode)]
        prefills = [self._worker(f"prefill-{i}", "prefill") for i in range(args.prefill)]
        return prefills + [self._worker(f"decode-{i}", "decode") for i in range(args.decode)]

    def _worker(self, name: str, role: str) -> WorkerOptions:
        args, tls = self._args, tls_in(self._args.tls, role)
        return WorkerOptions(
            name=name,
            role=role,
            model=str(self._checkpoint),
            listen=f"unix:{self._folder / name}",
            dtype=args.dtype,
            page_size=args.page_size,
            pages=args.pages,
            kv_bytes=int(args.kv_memory * 2**30),
            max_context=context_tokens(self._config.max_positions, args.max_context),
            step_tokens=args.step_tokens,
            local_prefill=128 if args.local_prefill == "auto" else int(args.local_prefill),
            threads=args.threads,
            transport=args.transport,
            backend=args.backend,
            device=args.device,
            gpu_share=1.0 / (args.prefill + args.decode),
            nice=PREFILL_NICE if role == "prefill" else 0,
            prefill_share=args.prefill_share,
            served_name=args.served_model_name or self._checkpoint.name,
            digest=args.digest,
            drain_s=0.0,
            registry=self._registry,
            registry_prefix=args.registry_prefix,
            ticket_key_file=str(self._key_file),
            tls_cert=tls.certificate,
            tls_key=tls.key,
            tls_ca=tls.authority,
        )

    def _router(self, workers: list[WorkerOptions], number: int) -> RouterOptions:
        args, tls = self._args, tls_in(self._args.tls, ROUTER)
        return RouterOptions(
            name="router" if args.routers == 1 else f"router-{number}",
            model=str(self._checkpoint),
            workers=",".join(f"{w.name}={w.listen}" for w in workers),
            host=args.host,
            port=args.port + number,
            registry=self._registry,
            registry_prefix=args.registry_prefix,
            served_name=args.served_model_name or self._checkpoint.name,
            max_context=context_tokens(self._config.max_positions, args.max_context),
            local_prefill=args.local_prefill,
            drain_s=0.0,
            ticket_key_file=str(self._key_file),
            tls_cert=tls.certificate,
            tls_key=tls.key,
            tls_ca=tls.authority,
            lend=args.lend,
        )

    # --- what they say -----------------------------------------------------------------------------------------

    def _on_report(self, name: str, report: Report) -> None:
        if report.what == "loading":
            self._bar.report(name, report)
        elif report.what == "failed":
            self._state.failure = report
        elif report.what == "ready" and not self._state.ready.is_set():
            self._state.waiting -= 1
            if self._state.waiting == 0:
                self._state.ready.set()

    def _on_exit(self, name: str, code: int, was_ready: bool) -> None:
        """Before everything is ready an end is final: starting again would fail again."""
        if self._state.stopping.is_set():
            return
        if not self._state.ready.is_set():
            if self._state.failure is None:
                self._state.failure = Report("failed", message=f"{name} ended with code {code}", exit_code=1)
            self._state.stopping.set()
            return
        self._state.failure = None
        print(f"baton serve: {name} ended with code {code}; starting it again", file=sys.stderr, flush=True)

    async def _announce(self) -> None:
        await self._state.ready.wait()
        self._bar.close()
        host = "localhost" if self._args.host in ("127.0.0.1", "0.0.0.0", "::1", "::") else self._args.host  # noqa: S104
        url, *others = [f"http://{host}:{self._args.port + number}" for number in range(self._args.routers)]
        model = self._args.served_model_name.split(",")[0] or self._checkpoint.name
        body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
        print(
            f"ready: {model} on {' and '.join([url, *others])}   try: "
            f"curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'",
            flush=True,
        )


def _child_env() -> dict[str, str]:
    """Compute threads wait for each other awake for some 50 microseconds, then asleep.

    Measured on two quiet cores, a decode step of a 0.6B model takes 77 ms so, and 108 ms if they sleep at once. Threads
    that stay awake keep their cores between two steps as well: a prefill beside them took three times as long.
    """
    return {**os.environ, "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "20000", "PYTHONUNBUFFERED": "1"}


def _print_log(name: str, line: str) -> None:
    print(f"[{name}] {line}", file=sys.stderr, flush=True)
