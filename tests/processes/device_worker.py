"""A worker whose pool lies on a stand-in device, and whose kernels run in Triton's interpreter: for want of a GPU.

Takes the flags of `baton worker`. Two choices are replaced, which are a GPU's to make: where the pool is, and so which
transports there are. All else is the worker's own.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from baton import worker
from kvtransfer.device_in_memory import InMemoryDevice
from kvtransfer.frames import Frames


def main() -> int:
    paths_for = worker.paths_for

    def frames_for(loaded: Any, *_: object) -> Frames:
        return Frames.on_device(loaded.layout, loaded.pages, InMemoryDevice())

    worker.frames_for = frames_for  # type: ignore[assignment]
    worker.paths_for = lambda options, clock, _: paths_for(options, clock, on_gpu=True)
    parser = argparse.ArgumentParser()
    worker.add_arguments(parser)
    return worker.run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
