"""What the faults came to, as rows of the table in docs/reliability.md; printed at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

HEAD = ("fault", "where injected", "runs", "survived", "lost", "wrong", "leaked", "time to recover")


@dataclass
class Row:
    """Requests (or pages) by what became of them. A test fails before it counts any as wrong or leaked."""

    runs: int = 0
    survived: int = 0
    lost: int = 0  # ended with one clear error
    recovered_s: list[float] = field(default_factory=list)


class Table:
    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], Row] = {}

    def row(self, fault: str, where: str) -> Row:
        return self._rows.setdefault((fault, where), Row())

    def lines(self) -> Iterator[str]:
        if self._rows:
            yield f"| {' | '.join(HEAD)} |"
            yield "|---" * len(HEAD) + "|"
        for (fault, where), row in self._rows.items():
            recovered = f"{max(row.recovered_s):.1f} s at most" if row.recovered_s else "–"
            yield f"| {fault} | {where} | {row.runs} | {row.survived} | {row.lost} | 0 | 0 | {recovered} |"
