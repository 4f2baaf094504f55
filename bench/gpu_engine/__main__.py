"""Tokens per second and the host's time per step of the engine on a GPU: random weights of known shapes, no checkpoint.

    python -m bench.gpu_engine [--quick] [--json out.json]
    python -m bench.gpu_engine --tiny [--backend torch]     a tiny model, without a GPU: does the harness work?

Needs Python, torch, numpy and triton, and nothing else. Decode goes through CUDA graphs, as in a server: batches of 1
and 64 at 1,536 tokens of context; prefill is one prompt of 2,048 tokens. Weights are random: only the speed is real.
Host time of a step: execute() from batch to tokens, less what its kernels take on the GPU. Goals in tokens are for an
H200. The hand-off between two processes on one GPU has a bench of its own, `bench.ipc`.

Exit code: 0; 1 when a row failed; 2 without a GPU. A goal that is missed does not fail.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from bench.gpu_engine.steps import Load, Timed
    from engine.config import ModelConfig

EXIT_FAILED, EXIT_NO_GPU = 1, 2
H200 = "H200"
HOST_GOAL_S = 0.5e-3
GOALS = {  # tokens per second on an H200
    ("Llama-3.1-8B", "decode 1 at 1.5k"): 215.0,
    ("Llama-3.1-8B", "decode 64 at 1.5k"): 7000.0,
    ("Llama-3.1-8B", "prefill 2k"): 40000.0,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    model: str
    load: str
    status: Literal["timed", "absent", "failed"]
    reason: str = ""
    tokens_per_s: float = 0.0
    step_ms: float = 0.0
    device_ms: float | None = None
    host_ms: float | None = None
    goals: tuple[str, ...] = ()  # "pass: ..." or "miss: ..."


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", help="Llama-3.1-8B or Qwen3-0.6B; repeatable; both without it")
    parser.add_argument("--backend", choices=("triton", "torch"), default="triton", help="torch: with --tiny only")
    parser.add_argument("--page-size", type=int, default=16, help="tokens per page")
    parser.add_argument("--max-context", type=int, default=8192, help="longest context that the executor must serve")
    parser.add_argument("--steps", type=int, default=0, help="timed steps; 0: 100, with --quick 30, with --tiny 3")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, Triton's interpreter")
    parser.add_argument("--table", type=Path, help="file of tuned configurations, before the shipped ones")
    parser.add_argument("--json", type=Path, help="where the rows go as JSON too, each when it is known")
    args = parser.parse_args(argv)
    if args.backend == "torch" and not args.tiny:
        parser.error("--backend torch runs with --tiny only")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.backend == "triton" and find_spec("triton") is None:
        print("bench.gpu_engine: needs triton", file=sys.stderr)
        return EXIT_NO_GPU
    if args.tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    import torch

    if not args.tiny and not torch.cuda.is_available():
        print("bench.gpu_engine: needs a GPU, and torch finds none (--tiny runs without one)", file=sys.stderr)
        return EXIT_NO_GPU
    device = torch.device("cpu") if args.tiny else torch.device("cuda", torch.cuda.current_device())
    chip = "CPU" if args.tiny else str(torch.cuda.get_device_name(device))
    outcomes = []
    for outcome in run(args, chip, device):
        outcomes.append(outcome)
        print(f"{outcome.model} {outcome.load}: {outcome.status} {outcome.reason}", file=sys.stderr, flush=True)
        if args.json is not None:
            described = {"chip": chip, "torch": torch.__version__, "rows": [asdict(outcome) for outcome in outcomes]}
            args.json.write_text(json.dumps(described, indent=1) + "\n")
    print("\n".join(table_lines(chip, outcomes)))
    return EXIT_FAILED if any(outcome.status == "failed" for outcome in outcomes) else 0


def run(args: argparse.Namespace, chip: str, device: torch.device) -> Iterator[Outcome]:
    import torch

    from bench.gpu_engine.shapes import MODELS, TINY

    torch.manual_seed(0)
    models = {"tiny": TINY} if args.tiny else {name: MODELS[name] for name in args.model or MODELS}
    for name, config in models.items():
        yield from of_model(name, config, args, chip, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def of_model(
    name: str, config: ModelConfig, args: argparse.Namespace, chip: str, device: torch.device
) -> Iterator[Outcome]:
    """Every load over one executor, one after the other."""
    from bench.gpu_engine.executors import executor_of
    from bench.gpu_engine.steps import pages_needed, timed
    from kernels.gpu.tuning import EMPTY, load_table

    loads, warm = loads_of(args), 1 if args.tiny else 10
    steps = args.steps or (3 if args.tiny else 30 if args.quick else 100)
    config = replace(config, max_positions=min(config.max_positions, args.max_context))
    most = max(load.rows for load in loads)
    try:
        pages = pages_needed(loads, args.page_size, warm + steps)
        table = EMPTY if args.tiny else load_table(chip, args.table)
        executor = executor_of(config, args.backend, pages, args.page_size, most, device, table)
    except ModuleNotFoundError as error:
        yield Outcome(name, "all", "absent", f"({error.name})")
        return
    except Exception as error:  # noqa: BLE001  (the row says it, and the next model has its turn)
        yield Outcome(name, "all", "failed", reason_of(error))
        return
    for load in loads:
        try:
            found = timed(load, config, executor, args.page_size, warm, steps, device)
        except Exception as error:  # noqa: BLE001  (as above)
            yield Outcome(name, load.name, "failed", reason_of(error))
        else:
            yield outcome_of(name, load, found, chip)


def loads_of(args: argparse.Namespace) -> list[Load]:
    from bench.gpu_engine.steps import Load

    if args.tiny:
        return [Load("decode 1", 1, 20), Load("decode 3 drawn", 3, 20, temperature=0.8), Load("prefill", 1, 0, 24)]
    return [
        Load("decode 1 at 1.5k", 1, 1536), Load("decode 64 at 1.5k", 64, 1536),
        Load("decode 64 at 1.5k, drawn", 64, 1536, temperature=0.8), Load("prefill 2k", 1, 0, 2048),
    ]  # fmt: skip


def outcome_of(model: str, load: Load, found: Timed, chip: str) -> Outcome:
    goals, wanted = [], GOALS.get((model, load.name))
    if wanted is not None and H200 in chip:
        goals.append(f"{verdict(found.tokens_per_s >= wanted)}: {found.tokens_per_s:.0f} tok/s, goal >= {wanted:.0f}")
    if found.host_s is not None:
        host = f"{found.host_s * 1e3:.2f} ms of the host per step"
        goals.append(f"{verdict(found.host_s <= HOST_GOAL_S)}: {host}, goal <= {HOST_GOAL_S * 1e3:.1f}")
    return Outcome(
        model, load.name, "timed", "", found.tokens_per_s, found.step_s * 1e3, in_ms(found.device_s),
        in_ms(found.host_s), tuple(goals),
    )  # fmt: skip


def verdict(holds: bool) -> str:
    return "pass" if holds else "miss"


def in_ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def table_lines(chip: str, outcomes: Sequence[Outcome]) -> list[str]:
    lines = [chip, "", "| model | load | tok/s | step | device | host |", "|---|---|---|---|---|---|"]
    for one in outcomes:
        if one.status != "timed":
            lines.append(f"| {one.model} | {one.load} | {one.status} {one.reason} | | | |")
            continue
        device, host = ("?" if ms is None else f"{ms:.2f} ms" for ms in (one.device_ms, one.host_ms))
        lines.append(
            f"| {one.model} | {one.load} | {one.tokens_per_s:.0f} | {one.step_ms:.2f} ms | {device} | {host} |"
        )
    goals = [f"{goal} ({one.model}, {one.load})" for one in outcomes for goal in one.goals]
    return [*lines, *([""] if goals else []), *goals]


if __name__ == "__main__":
    sys.exit(main())
