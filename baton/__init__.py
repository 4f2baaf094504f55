"""The front door of Baton: the command line, the launcher, and what a Python program imports from it.

from baton import LLM, SamplingParams
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import Any

from baton.quiet_threads import wait_asleep

__version__ = "0.1.0"

# Loaded when first used: `baton --help` and a router must not wait for torch.
EXPORTS = MappingProxyType(
    {
        "LLM": "baton.llm",
        "RequestOutput": "baton.request_output",
        "SamplingParams": "core.sampling",
    }
)


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module 'baton' has no attribute {name!r}")
    wait_asleep()
    return getattr(importlib.import_module(EXPORTS[name]), name)
