"""Writes the recorded signals that `test_replay.py` replays: python -m tests.scaling_model.record

A record is the signals of both tiers at each decision of a run in the model, and what was decided. It is made anew only
when a policy is meant to decide otherwise; the change of the file then shows where.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.scaling.contest import run
from bench.scaling.machine import Machine, Slo
from bench.scaling.traffic import Mix, Traffic, made

RECORD = Path(__file__).with_name("recorded_signals.json")


def traffic() -> Traffic:
    """Calm, seven times as much for a minute, calm for long enough to shrink, then long answers."""

    def mix(s: float) -> Mix:
        if s >= 330:
            return Mix(8.0, 500, 1200)
        return Mix(20.0 if 30 <= s < 90 else 3.0, 4000, 200)

    return made("recorded", "", 420.0, mix, 7)


def rows() -> list[dict[str, Any]]:
    moments = run(traffic(), "Baton", Machine(), Slo()).course.moments
    return [
        {
            "now_s": moment.seen.now_s,
            "desired": list(moment.seen.desired),
            "prefill": asdict(moment.seen.prefill),
            "decode": asdict(moment.seen.decode),
            "decided": [asdict(decision) for decision in moment.decisions],
        }
        for moment in moments
    ]


if __name__ == "__main__":
    RECORD.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows()) + "\n]\n")
