"""A prefill worker without an engine, as a process: hands over what its standard input asks for. Run by tests.

Each line: request id, attempt, tokens, seed, pages per chunk, seconds per chunk. The arguments: our name and
incarnation, the receiver's, its endpoint, then what may be left out: the transport, and the pages' head dimension.
"""

import asyncio
import sys
from dataclasses import replace
from random import Random

from kvtransfer_pair import LAYOUT, PRINT, XXH3, Sending, prompt_of

from core.clock import monotonic_s
from core.messages import Peer, WorkerId
from kvtransfer.client import HandoffDialer
from kvtransfer.cuda_ipc import CudaIpcTransport
from kvtransfer.device_in_memory import InMemoryDevice
from kvtransfer.frames import Frames
from kvtransfer.messages import HandoffKey
from kvtransfer.shm import ShmTransport
from kvtransfer.transport import Transport


def transport_of(name: str) -> Transport:
    if name == "shm":
        return ShmTransport()
    if name == "cuda":
        return CudaIpcTransport()
    from kvtransfer.ucx import UcxTransport

    return UcxTransport()


async def main(me: WorkerId, receiver: Peer, transport: Transport, head_dim: int) -> None:
    layout = replace(LAYOUT, head_dim=head_dim)
    on_device = transport.name == "cuda"
    frames = Frames.on_device(layout, 257, InMemoryDevice()) if on_device else Frames.shared(layout, 257)
    await transport.serve(frames, XXH3)
    fingerprint = replace(PRINT, layout=layout)
    worker = Sending(
        me, frames, transport, monotonic_s, Random(1), fingerprint=fingerprint, offload=asyncio.to_thread
    )
    dialer = HandoffDialer(worker.link, Random(2))
    worker.link.start(dialer)
    tasks = set()
    while line := await asyncio.to_thread(sys.stdin.readline):
        request_id, attempt, tokens, seed, pages, pause_s = line.split()
        prompt = prompt_of(Random(int(seed)), int(tokens))
        prefill = worker.prefill(
            HandoffKey(request_id, int(attempt)), prompt, receiver, chunk_pages=int(pages), chunk_s=float(pause_s)
        )
        tasks.add(asyncio.create_task(prefill))
    await asyncio.gather(*tasks, return_exceptions=True)
    while not worker.link.idle:
        await asyncio.sleep(0.01)
    worker.pool.check()
    print(worker.pool.counts(), flush=True)
    await dialer.close()
    await worker.link.stop()
    await transport.close()


if __name__ == "__main__":
    _, name, incarnation, receiver_name, receiver_incarnation, endpoint, *more = sys.argv
    asyncio.run(
        main(
            WorkerId(name, int(incarnation)),
            Peer(WorkerId(receiver_name, int(receiver_incarnation)), endpoint),
            transport_of(more[0] if more else "shm"),
            int(more[1]) if more[1:] else LAYOUT.head_dim,
        )
    )
