"""A hand-off between two processes on one GPU, by CUDA IPC: milliseconds per GB, and what every fetch costs beside.

    python -m bench.ipc [--json out.json]
    python -m bench.ipc --stand-in          without a GPU, over host memory: does the harness work? No figure counts.

Needs Python, torch with its cuda-bindings, numpy and triton, and nothing else. The source is a process of its own: it
fills a pool of 2 MiB pages (Llama-3.1-8B's) and serves it. This process fetches by the transport that workers use, so
that the time has everything in it from the call to the digests of what has landed: the way to the copying thread,
epochs, copy, digests. Each size is fetched once to warm up, then three times: the median counts. All digests are
compared with the source's. The goal is for an H200.

Exit code: 0; 1 when bytes were wrong or something failed; 2 without a GPU. A goal that is missed does not fail.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core.layout import PageLayout
    from core.messages import WorkerId
    from kvtransfer.digest import SegmentDigest
    from kvtransfer.frames import Frames
    from kvtransfer.transport import Transport

ROOT = Path(__file__).resolve().parent.parent
EXIT_FAILED, EXIT_NO_GPU = 1, 2
GOAL_MS_PER_GB, GOAL_FIXED_MS = 1.5, 1.0
TIMES = 3
PAGES = (1, 64, 512)  # of each fetch: 2 MiB, 128 MiB, 1 GiB
PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Found:
    """Medians, by pages of a fetch."""

    chip: str
    page_bytes: int
    fetch_ms: dict[int, float]
    source_digest_ms_per_gb: float

    @property
    def ms_per_gb(self) -> float:
        """Of what a large fetch takes more than a small one."""
        few, many = min(self.fetch_ms), max(self.fetch_ms)
        return (self.fetch_ms[many] - self.fetch_ms[few]) / ((many - few) * self.page_bytes / 1e9)

    @property
    def fixed_ms(self) -> float:
        few = min(self.fetch_ms)
        return max(0.0, self.fetch_ms[few] - self.ms_per_gb * few * self.page_bytes / 1e9)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ipc", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stand-in", action="store_true", help="over host memory, without a GPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--source", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    _without_host_digests()
    if args.source:
        asyncio.run(source(args.stand_in))
        return 0
    missing = None if args.stand_in else why_not()
    if missing:
        print(f"bench.ipc: {missing} (--stand-in runs without)", file=sys.stderr)
        return EXIT_NO_GPU
    try:
        found = asyncio.run(receiver(args.stand_in))
    except Exception as error:  # noqa: BLE001  (drivers fail in many ways; what they say is the result)
        print(f"bench.ipc: failed: {type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILED
    print("\n".join(lines(found)))
    if args.json is not None:
        figures = {**asdict(found), "ms_per_gb": found.ms_per_gb, "fixed_ms": found.fixed_ms}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def why_not() -> str:
    """What a GPU's run lacks; empty: nothing."""
    for module in ("torch", "triton", "cuda"):
        if find_spec(module) is None:
            return f"needs {module}"
    import torch

    return "" if torch.cuda.is_available() else "needs a GPU, and torch finds none"


def _without_host_digests() -> None:
    """Digests are the GPU's here, so the host's libraries may be missing: what stands for them is only their names."""
    for name in ("xxhash", "blake3"):
        if find_spec(name) is None:
            module = ModuleType(name)
            vars(module)["xxh3_64_digest"] = stand_in_digest
            sys.modules[name] = module


def stand_in_digest(data: memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def page_layout(stand_in: bool) -> PageLayout:
    from core.layout import PageLayout

    return PageLayout(2, 1, 16, 64, "bfloat16") if stand_in else PageLayout(8, 32, 16, 128, "bfloat16")


def pool(stand_in: bool) -> Frames:
    from kvtransfer.device_cuda import CudaDevice
    from kvtransfer.device_in_memory import InMemoryDevice
    from kvtransfer.frames import Frames

    frames = Frames.on_device(page_layout(stand_in), max(PAGES), InMemoryDevice() if stand_in else CudaDevice())
    if not stand_in:
        frames.warm_up()
    return frames


def ends(stand_in: bool) -> tuple[WorkerId, WorkerId, SegmentDigest]:
    from core.messages import WorkerId
    from kvtransfer.digest import plain

    return WorkerId("source", 1), WorkerId("receiver", 1), stand_in_digest if stand_in else plain().of


async def source(stand_in: bool) -> None:
    """Says how it is reached and what its digests are; serves until its standard input closes."""
    from kvtransfer.cuda_ipc import CudaIpcTransport
    from kvtransfer.proof import pattern

    frames, (_, peer, of) = pool(stand_in), ends(stand_in)
    for page in range(frames.pages):
        frames.write(page, pattern(page.to_bytes(8, "little"), frames.layout.page_bytes))
    transport = CudaIpcTransport()
    await transport.serve(frames, of)
    indices, times_s = range(frames.pages), []
    for _ in range(1 + TIMES):
        began_s = time.perf_counter()
        digests = frames.digests(indices, of)
        times_s.append(time.perf_counter() - began_s)
    gigabytes = frames.pages * frames.layout.page_bytes / 1e9
    said = {
        "descriptor": (await transport.invite(peer)).hex(),
        "digests": [digest.hex() for digest in digests],
        "digest_ms_per_gb": statistics.median(times_s[1:]) * 1e3 / gigabytes,
    }
    print(json.dumps(said), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await transport.close()


async def receiver(stand_in: bool) -> Found:
    """Raises HandoffError and RuntimeError."""
    from kvtransfer.cuda_ipc import CudaIpcTransport

    flags = ["--stand-in"] * stand_in
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.ipc", "--source", *flags, cwd=ROOT, limit=1 << 24,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdin is not None
    frames, (peer, _, of) = pool(stand_in), ends(stand_in)
    transport = CudaIpcTransport()
    try:
        await transport.serve(frames, of)
        async with asyncio.timeout(PATIENCE_S):
            line = await process.stdout.readline()
        if not line:
            raise RuntimeError("the source has ended before it said where its pool is")
        said = json.loads(line)
        await transport.meet(peer, bytes.fromhex(said["descriptor"]))
        fetch_ms = {pages: await _fetch_ms(transport, peer, pages, said["digests"]) for pages in PAGES}
        await transport.forget(peer)
    finally:
        await transport.close()
        process.stdin.close()  # it ends, and only then is its block gone
        await process.wait()
    return Found(chip(stand_in), frames.layout.page_bytes, fetch_ms, said["digest_ms_per_gb"])


async def _fetch_ms(transport: Transport, peer: WorkerId, pages: int, digests: Sequence[str]) -> float:
    """The median. To other pages than those that they come from."""
    from kvtransfer.transport import Piece

    pieces = [Piece(page, 0, max(PAGES) - 1 - page) for page in range(pages)]
    times_s = []
    for _ in range(1 + TIMES):
        began_s = time.perf_counter()
        arrivals = await transport.fetch(peer, 1, pieces)
        times_s.append(time.perf_counter() - began_s)
        wrong = [page for page, got in enumerate(arrivals) if got != bytes.fromhex(digests[page])]
        if wrong:
            raise RuntimeError(f"{len(wrong)} of {pages} pages did not arrive as they were: {arrivals[wrong[0]]!r}")
    return statistics.median(times_s[1:]) * 1e3


def chip(stand_in: bool) -> str:
    if stand_in:
        return "stand-in in host memory: no figure counts"
    import torch

    return str(torch.cuda.get_device_name())


def lines(found: Found) -> list[str]:
    size_mib = found.page_bytes / 2**20
    rows = [f"| {pages} | {pages * size_mib:.1f} MiB | {ms:.2f} ms |" for pages, ms in found.fetch_ms.items()]
    return [
        found.chip, "", "| pages | bytes | fetch |", "|---|---|---|", *rows, "",
        f"{verdict(found.ms_per_gb, GOAL_MS_PER_GB)}: {found.ms_per_gb:.2f} ms per GB, goal <= {GOAL_MS_PER_GB}",
        f"{verdict(found.fixed_ms, GOAL_FIXED_MS)}: {found.fixed_ms:.2f} ms fixed, goal <= {GOAL_FIXED_MS:.1f}",
        f"the source's digests, beside its compute: {found.source_digest_ms_per_gb:.2f} ms per GB",
    ]  # fmt: skip


def verdict(value: float, goal: float) -> str:
    return "pass" if value <= goal else "miss"


if __name__ == "__main__":
    sys.exit(main())
