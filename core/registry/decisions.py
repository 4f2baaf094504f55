"""What scaling has decided for a tier, as whoever decides writes it in the store for routers and people to read.

A decision lives for LIFE_S and is written again while it stands, so that one that nobody stands by any more vanishes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from core.registry.store import Store

VERSION = 1
GROUP = "scaling"
LIFE_S = 15.0
MAX_WORKERS = 1 << 20
MAX_REASON = 300  # characters


@dataclass(frozen=True, slots=True)
class Decision:
    """`desired` is how many workers the tier is to have, `ready` how many it had when that was decided."""

    tier: str
    desired: int
    ready: int
    reason: str

    def encode(self) -> bytes:
        """A longer reason is cut."""
        assert self.tier and 0 <= self.desired <= MAX_WORKERS and 0 <= self.ready <= MAX_WORKERS, self
        plain = {"version": VERSION, **asdict(self), "reason": self.reason[:MAX_REASON]}
        return json.dumps(plain, separators=(",", ":")).encode()


def decode(value: bytes) -> Decision | None:
    """None for what this version cannot read: another version's decision, or anything else that lies in the store."""
    try:
        plain = json.loads(value)
        if plain["version"] != VERSION or set(plain) != {"version", "tier", "desired", "ready", "reason"}:
            return None
        decision = Decision(
            tier=_text(plain["tier"]),
            desired=_workers(plain["desired"]),
            ready=_workers(plain["ready"]),
            reason=_text(plain["reason"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return decision if decision.tier and len(decision.reason) <= MAX_REASON else None


async def publish(store: Store, decision: Decision) -> None:
    """Readers see it for LIFE_S: publish it again before that is over. Raises RegistryAway."""
    await store.put(GROUP, decision.tier, decision.encode(), LIFE_S)


async def read(store: Store) -> dict[str, Decision]:
    """Every living decision by its tier. Raises RegistryAway."""
    found = {name: decode(value) for name, value in (await store.read(GROUP)).items()}
    return {name: decision for name, decision in found.items() if decision is not None and decision.tier == name}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    value.encode()  # a lone surrogate is a ValueError here, and would be one wherever it is shown
    return value


def _workers(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_WORKERS:
        raise ValueError(f"{value!r} is no number of workers")
    return value
