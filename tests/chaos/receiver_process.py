"""A decode worker without an engine, as a process: takes what its standard input announces. Run by tests.

The arguments: our incarnation, the transport, the pages' head dimension, the pages that are free for hand-offs. The
first line out is its endpoint. Each line in: request id, attempt, tokens, seed, incarnation of the source.
"""

import asyncio
import sys
from dataclasses import replace
from random import Random

import grpc.aio
from kvtransfer_pair import LAYOUT, PRINT, XXH3, Receiving, prompt_of
from kvtransfer_source_process import transport_of

from core.clock import monotonic_s
from core.messages import Peer, WorkerId
from kvtransfer import server
from kvtransfer.frames import Frames
from kvtransfer.messages import HandoffKey


async def main(incarnation: int, transport_name: str, head_dim: int, free_pages: int) -> None:
    layout = replace(LAYOUT, head_dim=head_dim)
    frames, transport = Frames.shared(layout, 257), transport_of(transport_name)
    await transport.serve(frames, XXH3)
    fingerprint = replace(PRINT, layout=layout)
    worker = Receiving(WorkerId("d", incarnation), frames, transport, monotonic_s, fingerprint=fingerprint)
    worker.pool.allocate(worker.pool.reusable - free_pages)
    service = grpc.aio.server(options=server.KEEPALIVE)
    sessions = server.add_handoff_service(service, worker.link)
    worker.link.start(sessions)
    print(f"127.0.0.1:{service.add_insecure_port('127.0.0.1:0')}", flush=True)
    await service.start()
    while line := await asyncio.to_thread(sys.stdin.readline):
        request_id, attempt, tokens, seed, source = line.split()
        prompt = prompt_of(Random(int(seed)), int(tokens))
        worker.expect(HandoffKey(request_id, int(attempt)), prompt, Peer(WorkerId("p", int(source)), ""))
    sessions.close()
    await service.stop(0.0)
    await worker.link.stop()
    await transport.close()


if __name__ == "__main__":
    _, incarnation, transport_name, head_dim, free_pages = sys.argv
    asyncio.run(main(int(incarnation), transport_name, int(head_dim), int(free_pages)))
