"""`baton tune`: measures the attention kernels' configurations on this GPU, and fills the table that serving reads.

Each result is saved at once: Ctrl-C, a time limit or a crash cost one candidate at most, and the same command goes on.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from baton.tuned_table import default_file, installed
from baton.tuning_loop import Case, GpuLost, tune, untried
from core.errors import ConfigError
from kernels.gpu import tuning
from kernels.gpu.tuning import Config, Trial, Tuned

if TYPE_CHECKING:
    import torch

    from kernels.gpu.attention_cases import Call, Heads
    from kernels.gpu.attention_cases import Case as AttentionCase

DTYPES = ("bfloat16", "float16", "float32")
KV_DTYPES = ("auto", "float8_e4m3fn", "int8")
DEFAULT_SHAPE = "32x8x128"  # Llama-3.1-8B
SHAPE = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,3})x([1-9]\d{0,3})")
LARGEST_DIFFERENCE = 0.05  # between a candidate's result and the default's, of the largest value: rounding is far below

EPILOG = f"""\
  baton tune --model PATH              the shapes of a checkpoint
  baton tune --shape 32x8x128 --rows 1,64 --minutes 10
  baton tune --shape 16x8x128 --kv-dtype float8_e4m3fn

Without --model and --shape: {DEFAULT_SHAPE}. The same command again goes on where the last one stopped."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("--model", type=Path, help="checkpoint folder: its heads and its type")
    parser.add_argument("--shape", action="append", metavar="HxKxD", help="query heads, KV heads, head dim; repeatable")
    parser.add_argument("--page-size", type=int, default=16, help="tokens per page, as the server has it (16)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the queries (the model's, else bfloat16)")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="auto", help="of keys and values (auto: --dtype)")
    parser.add_argument("--rows", default="1,8,64,256", help="batch sizes of decode (1,8,64,256)")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after so long; 0: when all is tried (0)")
    parser.add_argument("--out", type=Path, help="file to fill (tuned/ in the user's cache folder, one for each chip)")


def run(args: argparse.Namespace) -> int:
    """0. Raises ConfigError for a wrong flag or file, and where no GPU or no Triton is."""
    cases = cases_of(args)  # first: a wrong flag is told on any machine
    device = require_gpu()
    chip = _chip(device)
    path = args.out or default_file(chip)
    tuned = open_file(path, chip, installed())
    return _fill(path, tuned, cases, device, args.minutes)


def _fill(path: Path, tuned: Tuned, cases: Sequence[AttentionCase], device: torch.device, minutes: float) -> int:
    import torch

    from kernels.gpu.timing import GpuTimer

    ends_s = time.monotonic() + minutes * 60
    total = sum(len(untried(tuned, case)) for case in cases)
    measure = Measurement(device, GpuTimer(device).seconds, torch.cuda.synchronize)
    with tqdm(total=total, unit="config", desc="tuning", disable=None, file=sys.stderr) as bar:

        def tell(case: Case, trial: Trial) -> None:
            bar.set_postfix_str(f"{case.kernel} {case.shape}", refresh=False)
            bar.update()
            if trial.failed is not None:
                bar.write(f"{case.kernel} {dict(trial.config)}: {trial.failed}", file=sys.stderr)

        try:
            tuned = tune(
                tuned, cases, measure, lambda now: tuning.write(path, now), tell,
                lambda: minutes <= 0 or time.monotonic() < ends_s,
            )  # fmt: skip
        except GpuLost as error:
            raise ConfigError(f"a candidate broke the GPU's context ({error}): run the command again") from error
        except KeyboardInterrupt:
            print(f"stopped; what was measured is in {path}", file=sys.stderr)
            raise
    print("\n".join(report(tuned, cases)))
    print(f"written to {path}")
    return 0


class Measurement:
    """Times one candidate on the GPU, after its result was compared with the default's. Keeps one case's inputs."""

    def __init__(
        self, device: torch.device, seconds: Callable[[Call], float], synchronize: Callable[[torch.device], None]
    ) -> None:
        self._device = device
        self._seconds = seconds
        self._synchronize = synchronize
        self._case: AttentionCase | None = None
        self._call_with: Callable[[Config], Call] | None = None
        self._expected: torch.Tensor | None = None

    def __call__(self, case: AttentionCase, config: Config) -> float:
        """Microseconds. Raises what the compiler or the launcher raises, ValueError for a wrong result, GpuLost.

        Raises ConfigError where the case's inputs do not fit.
        """
        try:
            call = self._prepared(case)(config)
            self._compare(call())
            return self._seconds(call) * 1e6
        except Exception:
            try:
                self._synchronize(self._device)
            except RuntimeError as error:
                raise GpuLost(str(error)) from error
            raise

    def _prepared(self, case: AttentionCase) -> Callable[[Config], Call]:
        import torch

        if case != self._case or self._call_with is None:
            self._case = self._call_with = self._expected = None  # its memory is needed now
            try:
                self._call_with = case.prepared(self._device)
            except torch.OutOfMemoryError as error:
                raise ConfigError(f"{case.kernel} {case.shape} does not fit this GPU: give smaller --rows") from error
            self._case = case
        return self._call_with

    def _compare(self, result: torch.Tensor) -> None:
        """The first result of a case is what the others must equal: the default's, where it runs at all."""
        wide = result.float()
        if self._expected is None:
            self._expected = wide.clone()
        difference = float((wide - self._expected).abs().max())
        allowed = LARGEST_DIFFERENCE * float(self._expected.abs().max())
        if not difference <= allowed:
            raise ValueError(f"the result differs from the first one's by {difference:.3g}, more than {allowed:.3g}")


def cases_of(args: argparse.Namespace) -> list[AttentionCase]:
    """What is measured, each shape of the table once. Raises ConfigError."""
    from kernels.gpu.attention_cases import DecodeCase, PrefillCase

    if args.page_size < 16 or args.page_size % 16:
        raise ConfigError(f"--page-size must be a multiple of 16, got {args.page_size}")
    try:
        batches = [int(word) for word in args.rows.split(",")]
    except ValueError as error:
        raise ConfigError(f"--rows must be numbers with commas between them, got {args.rows!r}") from error
    if not all(0 < rows < 1 << 16 for rows in batches):
        raise ConfigError(f"--rows must be above 0 and below {1 << 16}, got {args.rows!r}")
    cases: dict[tuple[str, str], AttentionCase] = {}
    for heads in heads_of(args):
        of_heads: list[AttentionCase] = [*(DecodeCase(heads, rows) for rows in batches), PrefillCase(heads)]
        for case in of_heads:
            cases.setdefault((case.kernel, case.shape), case)
    return list(cases.values())


def heads_of(args: argparse.Namespace) -> list[Heads]:
    """Of the model, and of each --shape. Raises ConfigError, and CheckpointError for the model."""
    from engine.config import read_config
    from kernels.gpu.attention_cases import Heads

    def made(heads: int, kv_heads: int, head_dim: int, dtype: str) -> Heads:
        return Heads(
            heads, kv_heads, head_dim, args.page_size, dtype, dtype if args.kv_dtype == "auto" else args.kv_dtype
        )

    found = []
    if args.model is not None:
        config = read_config(args.model)
        found.append(made(config.heads, config.kv_heads, config.head_dim, args.dtype or config.dtype))
    for text in args.shape or ([] if found else [DEFAULT_SHAPE]):
        match = SHAPE.fullmatch(text)
        if match is None:
            raise ConfigError(f"--shape must be like {DEFAULT_SHAPE}, got {text!r}")
        heads, kv_heads, head_dim = (int(word) for word in match.groups())
        if heads % kv_heads or head_dim % 8 or head_dim > 256:
            raise ConfigError(
                f"--shape {text}: KV heads must divide heads; head dim must be a multiple of 8, at most 256"
            )
        found.append(made(heads, kv_heads, head_dim, args.dtype or "bfloat16"))
    return found


def require_gpu() -> torch.device:
    """Raises ConfigError where nothing can be measured."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("needs an NVIDIA GPU, and torch finds none; without a table the kernels run with defaults")
    if find_spec("triton") is None:
        raise ConfigError("needs triton: pip install 'baton[gpu]'")
    return torch.device("cuda", torch.cuda.current_device())


def _chip(device: torch.device) -> str:
    import torch

    return str(torch.cuda.get_device_name(device))


def open_file(path: Path, chip: str, software: Mapping[str, str]) -> Tuned:
    """What is measured already. Raises ConfigError for a file of another chip or other software, or a broken one."""
    if not path.exists():
        return Tuned(chip, software)
    try:
        tuned = tuning.read(path)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if tuned.chip != chip:
        raise ConfigError(f"{path} was measured on {tuned.chip}, and this is {chip}: give another --out")
    if dict(tuned.software) != dict(software):
        was, now = (" ".join(f"{name} {of[name]}" for name in sorted(of)) for of in (tuned.software, software))
        raise ConfigError(f"{path} was measured with {was}, and here is {now}: remove it, or give another --out")
    return tuned


def report(tuned: Tuned, cases: Sequence[Case]) -> list[str]:
    """One line for each case: the best against the default."""
    lines = []
    for case in cases:
        entry = tuned.entries.get((case.kernel, case.shape))
        best = None if entry is None else entry.best()
        if entry is None or best is None or best.time_us is None:
            lines.append(f"{case.kernel} {case.shape}: nothing measured")
            continue
        first = entry.trials[0].time_us
        gain = "" if first is None else f", default {first:.1f} us"
        left = "" if entry.done else ", more to try"
        changed = {name: value for name, value in best.config.items() if value is not None}
        lines.append(f"{case.kernel} {case.shape}: {best.time_us:.1f} us with {changed}{gain}{left}")
    return lines
