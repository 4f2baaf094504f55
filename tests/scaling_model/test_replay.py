"""Recorded signals give the recorded decisions, whoever replays them and however often."""

from __future__ import annotations

import json
from typing import Any

from baton.scaling.decode import DecodeSignals
from baton.scaling.prefill import PrefillSignals
from baton.scaling.steady import Decision
from bench.scaling.contest import own_policies
from bench.scaling.fleet import Seen
from bench.scaling.machine import Slo
from tests.scaling_model.record import RECORD


def recorded() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(RECORD.read_text())
    return rows


def replayed(rows: list[dict[str, Any]]) -> list[tuple[Decision, Decision]]:
    decider = own_policies(Slo())
    return [
        decider.decide(
            Seen(
                row["now_s"], PrefillSignals(**row["prefill"]), DecodeSignals(**row["decode"]),
                (row["desired"][0], row["desired"][1]), 0,
            )
        )
        for row in rows
    ]  # fmt: skip


def test_a_recorded_series_is_decided_as_it_was() -> None:
    rows = recorded()
    for row, decisions in zip(rows, replayed(rows), strict=True):
        assert [Decision(**said) for said in row["decided"]] == list(decisions), row["now_s"]
    assert replayed(rows) == replayed(rows)


def test_the_record_shows_what_it_is_for() -> None:
    """Growth and shrinking of each tier for each of its reasons; else a replay would prove little."""
    rows = recorded()
    sizes = [[row["decided"][tier]["desired"] for row in rows] for tier in (0, 1)]
    for tier in (0, 1):
        assert max(sizes[tier]) >= 2 and sizes[tier] != sorted(sizes[tier]), "it grew, and shrank"
    said = " ".join(decision["reason"] for row in rows for decision in row["decided"])
    for words in ("tokens/s arrive", "queue wait is", "pages projected", "ITL is", "were needed within", "were enough"):
        assert words in said, words
