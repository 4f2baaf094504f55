"""The simulation itself: a seed replays to the message, and each invariant's judge sees what breaks it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from core.hashing import root_hash
from engine.pool import PagePool
from kvtransfer.intake import Guards
from router.progress import Progress
from router.retries import RetryBudget
from session.outlet import Outlet
from tests.simulation import schedule
from tests.simulation.many import ROOT, play_many, play_safely, replay
from tests.simulation.schedule import Outcome, play


def violations(kinds: list[str], seeds: int = 40) -> set[str]:
    """The invariants that are broken in some of these schedules."""
    found: set[str] = set()
    for seed in range(seeds):
        found |= {violation.split(":")[0] for violation in play_safely(seed, kinds).violations}
        if found:
            break
    return found


@pytest.mark.parametrize("seed", [3, 8])
def test_a_seed_replays_in_another_process(seed: int) -> None:
    """Whatever order sets have there."""

    def elsewhere(hash_seed: int) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
        command = [sys.executable, "-m", "tests.simulation", "--seed", str(seed)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    assert elsewhere(1) == elsewhere(2) == f"{play(seed)}\n"


def test_many_processes_play_every_seed_once() -> None:
    async def main() -> list[Outcome]:
        return [outcome async for outcome in play_many(100, seeds=7, seconds=None, kinds=["kill decode"], jobs=2)]

    outcomes = asyncio.run(main())
    assert sorted(outcome.seed for outcome in outcomes) == list(range(100, 107))
    assert outcomes[0] == play(outcomes[0].seed, ["kill decode"])
    assert replay(outcomes[0], ["kill decode"]).endswith(f"--seed {outcomes[0].seed} --fault 'kill decode'")


def test_wrong_bytes_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.receiver.Guards", lambda: Guards(digest=False))
    assert "I2" in violations(["flip bits"])


def test_pages_that_late_bytes_may_hit_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.receiver.Guards", lambda: Guards(quarantine=False))
    assert violations(["kill prefill", "hung fetches"]) & {"I2", "I3"}


def test_a_repeated_token_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def repeats(self: Progress, item):  # type: ignore[no-untyped-def]
        return item.tokens

    monkeypatch.setattr(Progress, "accept", repeats)
    monkeypatch.setattr(Progress, "is_done", property(lambda self: False))
    assert "I2" in violations([], seeds=1)


def test_a_leaked_lease_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PagePool, "unlease", lambda self, page: None)
    assert "I3" in violations([], seeds=1)


def test_a_cancel_that_reaches_nobody_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "STEPS_ALONE_S", (0.2,))  # long enough to be held for the dead
    monkeypatch.setattr(Outlet, "sweep", lambda self: [])
    assert "I3" in violations(["kill router"])


def test_an_end_that_comes_late_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "LATE_S", -70.0)
    assert "I4" in violations([], seeds=1)


def test_another_tenants_pages_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tenant's prompts have the same names."""
    for module in ("engine.intake", "router.workers"):
        monkeypatch.setattr(f"{module}.root_hash", lambda identity, salt=b"": root_hash(identity))
    assert "I5" in violations([])


def test_a_request_that_kills_without_end_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.saga.POISON_WORKERS", 99)
    assert "I6" in violations(["poison"])


def test_retries_without_a_budget_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetryBudget, "take", lambda self: True)
    monkeypatch.setattr("router.saga.MAX_REPLAYS", 99)
    monkeypatch.setattr("router.saga.POISON_WORKERS", 99)
    assert "I7" in violations(["flip bits", "kill decode", "kill prefill", "stale pages"], seeds=200)


def test_nothing_is_seen_where_nothing_is() -> None:
    """What the others see does not come from the simulation itself."""
    assert not violations([], seeds=3)
