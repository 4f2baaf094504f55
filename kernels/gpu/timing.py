"""How long a call keeps the GPU busy: events around each of several repeats, cold caches, the median."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

WARM_CALLS = 3  # the first compiles, the next fills what the libraries keep
LEAST_FLUSH_BYTES = 512 << 20  # also so long to read that the host can hand over the call meanwhile
FLUSH_TIMES_L2 = 4


class GpuTimer:
    """Times calls on the current stream of one GPU. Between repeats a buffer larger than the L2 cache is read.

    Read, not written: what waits there to be written back would be the timed call's traffic.
    """

    def __init__(self, device: torch.device, repeats: int = 20) -> None:
        assert device.type == "cuda" and repeats > 0, (device, repeats)
        cache_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
        size = max(LEAST_FLUSH_BYTES, FLUSH_TIMES_L2 * cache_bytes)
        self._flush = torch.zeros(size // 4, dtype=torch.float32, device=device)
        self._sum = torch.zeros((), dtype=torch.float32, device=device)
        self._device = device
        self._repeats = repeats

    def seconds(self, call: Callable[[], object]) -> float:
        """The median, from the moment that the GPU begins the call to its end; the host's part is not in it."""
        with torch.cuda.device(self._device):
            for _ in range(WARM_CALLS):
                call()
            torch.cuda.synchronize()
            pairs = [self._repeat(call) for _ in range(self._repeats)]
            torch.cuda.synchronize()
        times_ms: list[float] = [began.elapsed_time(ended) for began, ended in pairs]
        return statistics.median(times_ms) / 1e3

    def _repeat(self, call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.sum(self._flush, dim=0, out=self._sum)
        began.record()
        call()
        ended.record()
        return began, ended
