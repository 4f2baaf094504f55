"""Kubernetes quantities as numbers: "5Gi", "500m", 4. Pure."""

from __future__ import annotations

UNITS = (
    ("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30), ("Ti", 2**40), ("Pi", 2**50), ("Ei", 2**60),
    ("m", 1e-3), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12), ("P", 1e15), ("E", 1e18),
)  # fmt: skip


def whole(quantity: object) -> int:
    """Rounded down; 0 for what is no quantity."""
    text = str(quantity)
    unit, factor = next(((unit, factor) for unit, factor in UNITS if text.endswith(unit)), ("", 1))
    try:
        return int(float(text.removesuffix(unit)) * factor)
    except (ValueError, OverflowError):
        return 0
