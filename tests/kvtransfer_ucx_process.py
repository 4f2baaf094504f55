"""A worker in another process that lends its pool over ucx: what the tests kill, stop and slow down.

    python kvtransfer_ucx_process.py PAGE_BYTES PAGES     asked to invite or to meet on stdin, answers on stdout
"""

import asyncio
import sys

from core.layout import PageLayout
from core.messages import WorkerId
from kvtransfer.digest import XXH3_64, algorithm
from kvtransfer.frames import Frames
from kvtransfer.ucx import UcxTransport

P, D = WorkerId("p", 7), WorkerId("d", 8)


def layout_of(page_bytes: int) -> PageLayout:
    """Two heads, two layers, 16 positions of float32."""
    return PageLayout(kv_heads=2, layers=2, page_size=16, head_dim=page_bytes // (2 * 2 * 2 * 16 * 4), dtype="float32")


async def main() -> None:
    frames = Frames.shared(layout_of(int(sys.argv[1])), int(sys.argv[2]))
    for page in range(frames.pages):
        frames.page(page)[:] = bytes([page % 251 + 1]) * frames.layout.page_bytes
    transport = UcxTransport(net_devices="lo")
    await transport.serve(frames, algorithm(XXH3_64))
    loop = asyncio.get_running_loop()
    while asked := (await loop.run_in_executor(None, sys.stdin.readline)).split():
        if asked[0] == "invite":
            print("invite", (await transport.invite(D)).hex(), flush=True)
        else:
            await transport.meet(D, bytes.fromhex(asked[1]))
            print("met .", flush=True)
    await transport.close()
    frames.close()


if __name__ == "__main__":
    asyncio.run(main())
