"""How compute threads wait for each other: asleep. Measured on two cores that others use too, a decode step in which
they spin instead takes twenty times as long.
"""

from __future__ import annotations

import os
from types import MappingProxyType

ENVIRONMENT = MappingProxyType({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"})


def wait_asleep() -> None:
    """For this process and its children; what the user has set stays. Without effect once torch is loaded."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
