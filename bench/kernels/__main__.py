"""The table of the GPU kernels: what each achieves on this machine, and what share that is of what the machine can do.

    python -m bench.kernels [--quick] [--json out.json]     on a GPU
    python -m bench.kernels --check                         each kernel once on small inputs, against its reference
    python -m bench.kernels --interpret                     the same in Triton's interpreter, without a GPU

Needs Python, torch, numpy and triton, and nothing else. The machine's own copy and bf16 product are measured first.
Times are of the GPU alone: medians of repeats with cold caches. The last lines say which goals are met; those in TB/s
and TFLOP/s are for an H200, the shares of a copy for any chip. Beside: the same work by torch, and by FlashInfer if it
is installed, in the row's unit. `untuned`: no table has this chip and shape (see `baton tune`).

Exit code: 0; 1 when a row failed; 2 without a GPU. A goal that is missed does not fail.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.kernels.rows import Machine, Outcome, Row

EXIT_FAILED, EXIT_NO_GPU = 1, 2


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the rows with goals, few repeats")
    parser.add_argument("--check", action="store_true", help="do not time: results against references")
    parser.add_argument("--interpret", action="store_true", help="--check in the interpreter")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains it")
    parser.add_argument("--alone", action="store_true", help="without other libraries beside")
    parser.add_argument("--table", type=Path, help="file of tuned configurations, before the shipped ones")
    parser.add_argument("--json", type=Path, help="where the table goes as JSON too, each row when it is known")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if find_spec("triton") is None:
        print("bench.kernels: needs triton", file=sys.stderr)
        return EXIT_NO_GPU
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    import torch

    if not args.interpret and not torch.cuda.is_available():
        print("bench.kernels: needs a GPU, and torch finds none (--interpret checks without one)", file=sys.stderr)
        return EXIT_NO_GPU
    from bench.kernels.rows import table_lines

    machine, outcomes = (None, check(args)) if args.check or args.interpret else measure(args)
    print("\n".join(table_lines(machine, outcomes)))
    save(args, machine, outcomes)
    return EXIT_FAILED if any(outcome.status == "failed" for outcome in outcomes) else 0


def chosen_rows(args: argparse.Namespace) -> list[Row]:
    from bench.kernels import attention_rows, pointwise_rows

    rows = [*attention_rows.rows(), *pointwise_rows.rows()]
    return [row for row in rows if (row.quick or not args.quick) and args.only in row.name]


def check(args: argparse.Namespace) -> list[Outcome]:
    import torch

    from bench.kernels.measure import checked
    from bench.kernels.rows import Asked
    from kernels.gpu.tuning import EMPTY

    device = torch.device("cpu" if args.interpret else "cuda")
    return checked(chosen_rows(args), Asked(device, EMPTY, small=True, beside=False))


def measure(args: argparse.Namespace) -> tuple[Machine, list[Outcome]]:
    import torch

    from bench.kernels.measure import Rates, machine_rates, measured
    from bench.kernels.rows import Asked
    from kernels.gpu.timing import GpuTimer
    from kernels.gpu.tuning import load_table

    device = torch.device("cuda", torch.cuda.current_device())
    timer = GpuTimer(device, repeats=10 if args.quick else 30)
    machine = machine_rates(device, timer.seconds)
    asked = Asked(device, load_table(machine.chip, args.table), small=False, beside=not args.alone)

    known: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        print(f"{outcome.name}: {outcome.status} {outcome.reason}", file=sys.stderr, flush=True)
        known.append(outcome)
        save(args, machine, known)

    return machine, measured(chosen_rows(args), asked, Rates(timer.seconds, machine), tell)


def save(args: argparse.Namespace, machine: Machine | None, outcomes: list[Outcome]) -> None:
    """Whoever is ended before the last row leaves the others."""
    if args.json is not None:
        args.json.write_text(json.dumps(described(machine, outcomes), indent=1) + "\n")


def described(machine: Machine | None, outcomes: list[Outcome]) -> dict[str, object]:
    import torch
    import triton

    return {
        "torch": torch.__version__, "triton": triton.__version__, "machine": machine and asdict(machine),
        "rows": [asdict(outcome) for outcome in outcomes],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
