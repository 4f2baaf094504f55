"""From a row to its outcome: checked once on small inputs, or timed on this GPU against what the GPU can do."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from bench.kernels.rows import Asked, Call, Machine, Outcome, Row, Work, judge, rate

COPY_BYTES = 1 << 30
NEEDED = ("numpy", "torch", "triton")  # without another library a row is absent, as without its kernel
MATRIX = 8192  # rows and columns of the product


class Rates(NamedTuple):
    seconds: Callable[[Call], float]  # of one call on the GPU
    machine: Machine


def machine_rates(device: torch.device, seconds: Callable[[Call], float]) -> Machine:
    """What one row's share is of."""
    name = str(torch.cuda.get_device_name(device))
    return Machine(name, copy_tb_s(device, seconds), matrix_tflop_s(device, seconds))


def copy_tb_s(device: torch.device, seconds: Callable[[Call], float]) -> float:
    """A copy larger than any cache: bytes read and bytes written."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source)) / 1e12


def matrix_tflop_s(device: torch.device, seconds: Callable[[Call], float]) -> float:
    """A bf16 product as large as those of a prefill step."""
    left = torch.randn((MATRIX, MATRIX), dtype=torch.bfloat16, device=device)
    right = torch.randn((MATRIX, MATRIX), dtype=torch.bfloat16, device=device)
    product = torch.empty_like(left)
    return 2 * MATRIX**3 / seconds(lambda: torch.mm(left, right, out=product)) / 1e12


def checked(rows: Sequence[Row], asked: Asked) -> list[Outcome]:
    """Each row's kernel once against its reference."""
    return [_outcome(row, asked, None) for row in rows]


def measured(rows: Sequence[Row], asked: Asked, rates: Rates, tell: Callable[[Outcome], None]) -> list[Outcome]:
    """Each row timed. One that fails leaves the others their turn."""
    outcomes = []
    for row in rows:
        outcomes.append(_outcome(row, asked, rates))
        tell(outcomes[-1])
        torch.cuda.empty_cache()
    return outcomes


def _outcome(row: Row, asked: Asked, rates: Rates | None) -> Outcome:
    try:
        work = row.make(asked)
        if rates is not None:
            return _timed(row, work, rates)
        work.check()
        return Outcome(row.name, row.unit, "right", tuned=work.tuned)
    except ModuleNotFoundError as error:
        if error.name in NEEDED:
            return Outcome(row.name, row.unit, "failed", _reason(error))
        return Outcome(row.name, row.unit, "absent", f"({error.name})")
    except Exception as error:  # noqa: BLE001  (compilers raise what they like; the row says it)
        return Outcome(row.name, row.unit, "failed", _reason(error))


def _timed(row: Row, work: Work, rates: Rates) -> Outcome:
    taken_s = rates.seconds(work.run)
    value = rate(work, row.unit, taken_s)
    most = {"TB/s": rates.machine.copy_tb_s, "TFLOP/s": rates.machine.matrix_tflop_s}.get(row.unit)
    share = None if most is None else value / most
    beside = {name: _beside(work, row, call, rates) for name, call in work.beside.items()}
    return Outcome(
        row.name, row.unit, "timed", "", taken_s * 1e6, value, share, beside,
        "" if row.goal is None else row.goal.text(row.unit), judge(row, rates.machine, value, share), work.tuned,
    )  # fmt: skip


def _beside(work: Work, row: Row, call: Call, rates: Rates) -> float | None:
    try:
        return rate(work, row.unit, rates.seconds(call))
    except Exception:  # noqa: BLE001  (another library's trouble is not this row's)
        return None


def _reason(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__} at {where.filename.rpartition('/')[2]}:{where.lineno}: {text}"
