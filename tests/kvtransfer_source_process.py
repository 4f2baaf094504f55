"""A prefill worker without an engine, as a process: hands over what its standard input asks for. Run by tests.

Each line: request id, attempt, tokens, seed, pages per chunk, seconds per chunk. The receiver is in the arguments.
"""

import asyncio
import sys
from random import Random

from kvtransfer_pair import LAYOUT, XXH3, Sending, prompt_of

from core.clock import monotonic_s
from core.messages import Peer, WorkerId
from kvtransfer.client import HandoffDialer
from kvtransfer.frames import Frames
from kvtransfer.messages import HandoffKey
from kvtransfer.shm import ShmTransport


async def main(me: WorkerId, receiver: Peer) -> None:
    frames = Frames.shared(LAYOUT, 257)
    transport = ShmTransport()
    await transport.serve(frames, XXH3)
    worker = Sending(me, frames, transport, monotonic_s, Random(1), offload=asyncio.to_thread)
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
    _, name, incarnation, receiver_name, receiver_incarnation, endpoint = sys.argv
    asyncio.run(
        main(
            WorkerId(name, int(incarnation)), Peer(WorkerId(receiver_name, int(receiver_incarnation)), endpoint)
        )
    )
