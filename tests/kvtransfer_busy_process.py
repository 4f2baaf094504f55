"""A prefill worker whose steps take their thread, or the whole interpreter, for long. Run by tests.

Arguments: name, incarnation, the receiver's name, incarnation and endpoint; then `thread` or `interpreter`, and seconds
of each stretch. It opens a session with the receiver and steps until its standard input closes.
"""

import asyncio
import ctypes
import sys
import threading
from random import Random

from kvtransfer_pair import LAYOUT, XXH3, Sending

from core.clock import monotonic_s
from core.messages import Peer, WorkerId
from kvtransfer.client import HandoffDialer
from kvtransfer.frames import Frames
from kvtransfer.liveness import LeaseTerms, Timing
from kvtransfer.shm import ShmTransport

LIBRARIES = {"thread": ctypes.CDLL, "interpreter": ctypes.PyDLL}  # the second keeps the interpreter's lock in a call
TIMING = Timing(lease=LeaseTerms(life_s=60.0, renew_s=0.2, tick_s=0.05))


def step(kind: str, stretch_s: float, over: threading.Event) -> None:
    sleep = LIBRARIES[kind](None).usleep
    while not over.is_set():
        sleep(int(stretch_s * 1e6))


async def main(me: WorkerId, receiver: Peer, kind: str, stretch_s: float) -> None:
    transport = ShmTransport()
    await transport.serve(Frames.shared(LAYOUT, 9), XXH3)
    worker = Sending(me, Frames.shared(LAYOUT, 9), transport, monotonic_s, Random(1), timing=TIMING)
    dialer = HandoffDialer(worker.link, Random(2))
    worker.link.start(dialer)
    worker.link.meet(receiver)
    over = threading.Event()
    asked = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
    await asyncio.sleep(0.5)
    stepping = threading.Thread(target=step, args=(kind, stretch_s, over))
    stepping.start()
    await asked
    over.set()
    stepping.join()
    await dialer.close()
    await worker.link.stop()
    await transport.close()


if __name__ == "__main__":
    _, name, incarnation, receiver_name, receiver_incarnation, endpoint, kind, stretch = sys.argv
    asyncio.run(
        main(
            WorkerId(name, int(incarnation)),
            Peer(WorkerId(receiver_name, int(receiver_incarnation)), endpoint),
            kind,
            float(stretch),
        )
    )
