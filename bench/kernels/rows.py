"""What a row of the table is: the work of one kernel at one size, its goal, what it gave, and the words for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from kernels.gpu.tuning import Table

H200 = "H200"  # in the name of the chip that absolute goals are for
Call = Callable[[], object]
Verdict = Literal["pass", "miss", "none", "other chip"]


class WrongResult(Exception):
    """A kernel's result is not its reference's."""


@dataclass(frozen=True, slots=True)
class Work:
    """One kernel with its inputs made. `check` runs it once and raises WrongResult; `beside` holds other libraries'."""

    run: Call
    check: Callable[[], None]
    bytes: int = 0  # that must be read and written at the least
    flops: int = 0
    beside: Mapping[str, Call] = field(default_factory=dict)
    tuned: bool | None = None  # None: the kernel has nothing to tune


@dataclass(frozen=True, slots=True)
class Goal:
    """TB/s or TFLOP/s on an H200, or a share of what the machine copies."""

    value: float = 0.0
    share: float = 0.0

    def text(self, unit: str) -> str:
        return f">= {self.share:.0%} of copy" if self.share else f">= {self.value:g} {unit} ({H200})"


@dataclass(frozen=True, slots=True)
class Asked:
    """How work is to be made: where, how large, from which table of configurations, with other libraries beside."""

    device: torch.device
    table: Table
    small: bool  # sizes that the interpreter ends in seconds
    beside: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """`make` imports the kernel: where that is not there the row is absent."""

    name: str
    unit: Literal["TB/s", "TFLOP/s", "us"]
    make: Callable[[Asked], Work]
    goal: Goal | None = None
    quick: bool = True


@dataclass(frozen=True, slots=True)
class Machine:
    """What the chip was measured to do: bytes read plus bytes written of a large copy, and a large bf16 product."""

    chip: str
    copy_tb_s: float
    matrix_tflop_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one row. `status`: timed; checked to be right; absent or failed, and why. Rates have the row's unit."""

    name: str
    unit: str
    status: Literal["timed", "right", "absent", "failed"]
    reason: str = ""
    time_us: float = 0.0
    value: float = 0.0
    share: float | None = None  # of the machine's copy or matrix rate
    beside: Mapping[str, float | None] = field(default_factory=dict)  # None: it could not run
    goal: str = ""
    verdict: Verdict = "none"
    tuned: bool | None = None


def judge(row: Row, machine: Machine, value: float, share: float | None) -> Verdict:
    """Absolute goals hold for one chip; shares for any."""
    if row.goal is None:
        return "none"
    if row.goal.share:
        return "pass" if share is not None and share >= row.goal.share else "miss"
    if H200 not in machine.chip:
        return "other chip"
    return "pass" if value >= row.goal.value else "miss"


def rate(work: Work, unit: str, seconds: float) -> float:
    """In the unit: microseconds for a row that counts neither bytes nor products."""
    amount = {"TB/s": work.bytes, "TFLOP/s": work.flops}
    return amount[unit] / seconds / 1e12 if unit in amount else seconds * 1e6


def close(found: torch.Tensor, expected: torch.Tensor, allowed: float) -> None:
    """Raises WrongResult when any element is off by more than `allowed` of the largest expected one."""
    wide, right = found.float(), expected.float()
    if wide.shape != right.shape:
        raise WrongResult(f"the shape is {list(wide.shape)}, not {list(right.shape)}")
    worst, largest = float((wide - right).abs().max()), float(right.abs().max())
    if not worst <= allowed * largest:
        raise WrongResult(f"off by {worst:.3g}, and the largest value is {largest:.3g}")


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises WrongResult unless every bit is the same."""
    if not torch.equal(found, expected):
        raise WrongResult(f"{int((found != expected).sum())} of {found.numel()} elements differ")


def table_lines(machine: Machine | None, outcomes: list[Outcome]) -> list[str]:
    """Markdown."""
    lines = []
    if machine is not None:
        lines += [
            f"{machine.chip}: copies {machine.copy_tb_s:.2f} TB/s (read and written), bf16 products "
            f"{machine.matrix_tflop_s:.0f} TFLOP/s", "",
        ]  # fmt: skip
    lines += ["| kernel | time | achieved | of the machine | beside | configuration |", "|---|---|---|---|---|---|"]
    lines += [_line(outcome) for outcome in outcomes]
    judged = [outcome for outcome in outcomes if outcome.verdict in ("pass", "miss")]
    lines += [""] if judged else []
    lines += [f"{one.verdict}: {one.name} {_value(one)}, goal {one.goal}" for one in judged]
    return lines


def _line(outcome: Outcome) -> str:
    if outcome.status != "timed":
        return f"| {outcome.name} | {' '.join((outcome.status, outcome.reason)).strip()} | | | | |"
    share = "" if outcome.share is None else f"{outcome.share:.0%}"
    beside = ", ".join(
        f"{name} {'failed' if value is None else f'{value:.3g}'}" for name, value in outcome.beside.items()
    )
    tuned = {None: "", True: "tuned", False: "untuned"}[outcome.tuned]
    return f"| {outcome.name} | {outcome.time_us:.1f} us | {_value(outcome)} | {share} | {beside} | {tuned} |"


def _value(outcome: Outcome) -> str:
    return "" if outcome.unit == "us" else f"{outcome.value:.3g} {outcome.unit}"
