"""The benches of the GPU: what they say of goals and failures, and that they run, in the interpreter, with little."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bench import ipc as ipc_bench
from bench.gpu_engine import __main__ as engine_bench
from bench.gpu_engine.shapes import MODELS, TINY, random_weights
from bench.gpu_engine.steps import Load, Timed, pages_needed, timed
from bench.kernels import __main__ as kernels_bench
from bench.kernels import measure
from bench.kernels.measure import Rates, checked, measured
from bench.kernels.rows import (
    Asked,
    Goal,
    Machine,
    Outcome,
    Row,
    Work,
    WrongResult,
    close,
    judge,
    rate,
    same,
    table_lines,
)
from engine.batch import Batch, RowResult, SampledToken
from kernels.gpu import timing
from kernels.gpu.tuning import EMPTY

ROOT = Path(__file__).resolve().parent.parent
H200 = Machine("NVIDIA H200", 4.0, 800.0)
OTHER = Machine("NVIDIA L4", 0.2, 100.0)
ASKED = Asked(torch.device("cpu"), EMPTY, small=True)
NOT_NEEDED = (
    "aiohttp", "blake3", "grpc", "huggingface_hub", "prometheus_client", "google", "rich", "safetensors", "tokenizers",
    "tqdm", "xxhash", "yaml",
)  # fmt: skip
BLOCKED = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({NOT_NEEDED!r}))
sys.argv[1:] = sys.argv[2:]
runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
"""


def run_blocked(module: str, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    """A bench in a process that has Python, torch, numpy and triton, and no other library of ours."""
    code = BLOCKED.replace("MODULE", repr(module))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, "-", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=110, check=False)


def a_row(
    goal: Goal | None = None, beside: Mapping[str, Callable[[], object]] | None = None, check: Any = lambda: None
) -> Row:
    work = Work(lambda: None, check, bytes=10**9, beside=beside or {}, tuned=False)
    return Row("a row", "TB/s", lambda _: work, goal)


def at(machine: Machine, seconds: float = 1e-3) -> Rates:
    """Every call takes as long; whatever it raises comes out."""

    def timed(call: Callable[[], object]) -> float:
        call()
        return seconds

    return Rates(timed, machine)


def outcome_of(row: Row, rates: Rates) -> Outcome:
    (outcome,) = measured([row], ASKED, rates, lambda _: None)
    return outcome


def test_absolute_goals_are_for_one_chip_and_shares_for_any() -> None:
    for machine, value, share, verdicts in (
        (H200, 3.9, 0.975, ("pass", "pass")), (H200, 3.0, 0.75, ("miss", "miss")),
        (OTHER, 0.19, 0.95, ("other chip", "pass")), (OTHER, 0.1, 0.5, ("other chip", "miss")),
    ):  # fmt: skip
        found = tuple(judge(a_row(goal), machine, value, share) for goal in (Goal(value=3.9), Goal(share=0.8)))
        assert found == verdicts
    assert judge(a_row(), H200, 1.0, None) == "none"


def test_a_rate_is_what_must_be_done_over_the_time() -> None:
    work = Work(lambda: None, lambda: None, bytes=4 * 10**12, flops=6 * 10**12)
    assert [rate(work, unit, 2.0) for unit in ("TB/s", "TFLOP/s", "us")] == [2.0, 3.0, 2e6]


def test_a_row_says_its_rate_its_share_and_what_stands_beside() -> None:
    def broken() -> None:
        raise RuntimeError("no such layout")

    outcome = outcome_of(a_row(Goal(share=0.2), {"torch": lambda: None, "other": broken}), at(H200))
    assert (outcome.value, outcome.share, outcome.verdict, outcome.tuned) == (1.0, 0.25, "pass", False)
    assert outcome.beside == {"torch": 1.0, "other": None}
    assert table_lines(H200, [outcome])[2:] == [
        "| kernel | time | achieved | of the machine | beside | configuration |", "|---|---|---|---|---|---|",
        "| a row | 1000.0 us | 1 TB/s | 25% | torch 1, other failed | untuned |", "",
        "pass: a row 1 TB/s, goal >= 20% of copy",
    ]  # fmt: skip


def test_a_kernel_that_is_not_there_is_absent_and_one_that_breaks_has_failed() -> None:
    def absent(_: Asked) -> Work:
        raise ModuleNotFoundError("no", name="kernels.gpu.none")

    def lacks(_: Asked) -> Work:
        raise ModuleNotFoundError("no", name="numpy")

    def wrong() -> None:
        raise WrongResult("off by 1")

    rows = [Row("a", "us", absent), Row("b", "us", lacks), a_row(check=wrong), a_row()]
    outcomes = checked(rows, ASKED)
    assert [outcome.status for outcome in outcomes] == ["absent", "failed", "failed", "right"]
    assert "WrongResult" in outcomes[2].reason and "off by 1" in outcomes[2].reason
    assert table_lines(None, outcomes)[2] == "| a | absent (kernels.gpu.none) | | | | |"


def test_a_row_that_fails_leaves_the_others_their_turn() -> None:
    def broken(_: Asked) -> Work:
        raise RuntimeError("out of memory")

    told: list[Outcome] = []
    outcomes = measured([Row("a", "us", broken), a_row()], ASKED, at(H200), told.append)
    assert [outcome.status for outcome in outcomes] == ["failed", "timed"] and told == outcomes


def test_what_was_known_when_the_time_was_up_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both benches: the second row does not come to its end."""
    path = tmp_path / "rows.json"

    def kernels(*given: Any) -> list[Outcome]:
        given[-1](Outcome("first", "TB/s", "timed"))
        raise TimeoutError

    monkeypatch.setattr(measure, "machine_rates", lambda device, seconds: OTHER)
    monkeypatch.setattr(measure, "measured", kernels)
    monkeypatch.setattr(timing, "GpuTimer", lambda device, repeats: argparse.Namespace(seconds=None))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(TimeoutError):
        kernels_bench.measure(kernels_bench.parse_args(["--json", str(path)]))
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == ["first"]

    def engine(*given: object) -> Iterator[engine_bench.Outcome]:
        yield engine_bench.Outcome("m", "first", "timed")
        raise TimeoutError

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the bench sets it, and this process wants it back as it was
    monkeypatch.setattr(engine_bench, "run", engine)
    with pytest.raises(TimeoutError):
        engine_bench.main(["--tiny", "--backend", "torch", "--json", str(path)])
    assert [row["load"] for row in json.loads(path.read_text())["rows"]] == ["first"]


def test_results_are_compared() -> None:
    one = torch.tensor([1.0, -4.0])
    close(one + 0.03, one, 0.01)
    same(one, one.clone())
    for found in (one + 0.05, torch.tensor([1.0, float("nan")]), one[:1]):
        with pytest.raises(WrongResult):
            close(found, one, 0.01)
    with pytest.raises(WrongResult, match="1 of 2"):
        same(one, torch.tensor([1.0, 4.0]))


def test_every_kernel_is_right_in_the_interpreter_with_torch_and_triton_alone(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run_blocked("bench.kernels", "--interpret", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) >= 14 and {row["status"] for row in rows} <= {"right", "absent"}, done.stdout
    assert {row["name"] for row in rows if row["status"] == "right"} >= {"decode bf16 64 x 4k", "prefill causal 8k"}


@pytest.mark.parametrize("bench", [kernels_bench, engine_bench])
def test_without_a_gpu_there_is_a_clear_error(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "needs a GPU" in err


class Counts:
    """An executor that checks what it is given, and counts up from each row's last id."""

    def __init__(self, page_size: int, pages: int, error: str | None = None) -> None:
        self.page_size, self.pages, self.error = page_size, pages, error
        self.batches: list[Batch] = []

    def execute(self, batch: Batch) -> list[RowResult]:
        self.batches.append(batch)
        held = [page for row in batch.rows for page in row.pages]
        assert len(held) == len(set(held)) and min(held) > 0 and max(held) < self.pages, "a page of their own each"
        for row in batch.rows:
            assert row.sample is not None and len(row.sample.history) == row.start + len(row.ids)
            assert tuple(row.sample.history[row.start :]) == row.ids
            assert row.start + len(row.ids) <= len(row.pages) * self.page_size
        if self.error is not None:
            return [RowResult(error=self.error) for _ in batch.rows]
        return [RowResult((SampledToken((row.ids[-1] + 1) % TINY.vocab_size),)) for row in batch.rows]


def run_load(load: Load, executor: Counts, steps: int = 4) -> Timed:
    return timed(load, TINY, executor, executor.page_size, 1, steps, torch.device("cpu"))


def test_decode_goes_on_from_what_was_sampled_and_prefill_begins_anew() -> None:
    decode, prefill = Load("d", 3, context=30), Load("p", 2, prompt_tokens=20)
    pages = pages_needed([decode, prefill], 16, 5)
    assert pages == 1 + 3 * 3, "30 tokens and 13 steps behind them"
    executor = Counts(16, pages)
    found = run_load(decode, executor)
    assert [[(row.ids, row.start) for row in batch.rows] for batch in executor.batches] == [
        [((1 + step,), 30 + step)] * 3 for step in range(5)
    ]
    assert found.tokens == 3 and found.device_s is None and found.host_s is None and found.tokens_per_s > 0
    executor.batches.clear()
    assert run_load(prefill, executor).tokens == 40
    assert {(len(row.ids), row.start) for batch in executor.batches for row in batch.rows} == {(20, 0)}


def test_a_row_that_fails_fails_the_load() -> None:
    with pytest.raises(RuntimeError, match="not finite"):
        run_load(Load("d", 1, context=3), Counts(16, 9, "the model's logits are not finite"))


def test_the_hosts_time_is_what_the_device_did_not_take() -> None:
    found = Timed(step_s=4e-3, device_s=3.7e-3, tokens=64)
    load = Load("decode 64 at 1.5k", 64, 1536)
    good = engine_bench.outcome_of("Llama-3.1-8B", load, found, "NVIDIA H200")
    assert good.host_ms == pytest.approx(0.3) and good.goals == (
        "pass: 16000 tok/s, goal >= 7000", "pass: 0.30 ms of the host per step, goal <= 0.5",
    )  # fmt: skip
    slow = engine_bench.outcome_of("Llama-3.1-8B", load, Timed(10e-3, 5e-3, 64), "NVIDIA H200")
    assert [goal[:4] for goal in slow.goals] == ["miss", "miss"]
    other = engine_bench.outcome_of("Llama-3.1-8B", load, found, "NVIDIA L4")
    assert len(other.goals) == 1, "tokens are for another chip"
    unknown = engine_bench.outcome_of("Qwen3-0.6B", load, Timed(4e-3, None, 64), "NVIDIA H200")
    assert unknown.goals == () and unknown.host_ms is None
    assert engine_bench.table_lines("NVIDIA H200", [good, unknown])[4:] == [
        "| Llama-3.1-8B | decode 64 at 1.5k | 16000 | 4.00 ms | 3.70 ms | 0.30 ms |",
        "| Qwen3-0.6B | decode 64 at 1.5k | 16000 | 4.00 ms | ? | ? |", "",
        "pass: 16000 tok/s, goal >= 7000 (Llama-3.1-8B, decode 64 at 1.5k)",
        "pass: 0.30 ms of the host per step, goal <= 0.5 (Llama-3.1-8B, decode 64 at 1.5k)",
    ]  # fmt: skip


def test_the_shapes_are_those_of_their_names() -> None:
    meta = {name: random_weights(config, torch.device("meta")) for name, config in MODELS.items()}
    counts = {name: sum(tensor.numel() for tensor in weights.values()) for name, weights in meta.items()}
    assert counts == {"Llama-3.1-8B": 8_030_261_248, "Qwen3-0.6B": 596_049_920}
    assert all(len(config.windows) == config.layers for config in (*MODELS.values(), TINY))
    names = [load.name for load in engine_bench.loads_of(argparse.Namespace(tiny=False))]
    assert names == ["decode 1 at 1.5k", "decode 64 at 1.5k", "decode 64 at 1.5k, drawn", "prefill 2k"]
    with pytest.raises(SystemExit):
        engine_bench.parse_args(["--backend", "torch"])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_bench_of_the_engine_runs_with_torch_and_triton_alone(backend: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "out.json"
    done = run_blocked("bench.gpu_engine", "--tiny", "--backend", backend, "--steps", "1", "--json", out)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["status"] for row in rows] == ["timed", "timed", "timed"], done.stdout


def test_the_bench_of_the_hand_off_runs_with_torch_and_triton_alone(tmp_path: Path) -> None:
    """Over the stand-in: two processes, the transport and its digests. Without a GPU the real one refuses."""
    out = tmp_path / "out.json"
    done = run_blocked("bench.ipc", "--stand-in", "--json", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no figure counts" in done.stdout and "ms per GB, goal <= 1.5" in done.stdout
    figures = json.loads(out.read_text())
    assert set(figures["fetch_ms"]) == {"1", "64", "512"} and figures["fixed_ms"] >= 0
    refused = run_blocked("bench.ipc")
    assert refused.returncode == 2 and "needs" in refused.stderr


def test_what_a_fetch_costs_is_split_into_what_grows_and_what_does_not() -> None:
    found = ipc_bench.Found("chip", 10**6, {1: 0.9015, 1001: 2.4015}, 0.1)
    assert found.ms_per_gb == pytest.approx(1.5) and found.fixed_ms == pytest.approx(0.9)
    said = "\n".join(ipc_bench.lines(found))
    assert "pass: 0.90 ms fixed" in said and "ms per GB" in said
    slow = ipc_bench.Found("chip", 10**6, {1: 1.0, 1001: 4.0}, 0.1)
    assert "miss: 3.00 ms per GB" in "\n".join(ipc_bench.lines(slow))


def run_script(tmp_path: Path, **failing: int) -> tuple[int, list[str]]:
    """bench/h200.sh with a Python that only notes what it is asked: the exit code, and the modules in their order."""
    stub = tmp_path / "python"
    codes = "".join(f"*{word}*) exit {code};; " for word, code in failing.items())
    stub.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\ncase "$*" in {codes}esac\n')
    stub.chmod(0o755)
    env = {**os.environ, "PYTHON": str(stub), "OUT": str(tmp_path / "out")}
    done = subprocess.run([ROOT / "bench" / "h200.sh"], env=env, capture_output=True, timeout=60, check=False)
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    return done.returncode, [words[1] + " " + words[2] for words in asked if words[0] == "-m"]


def test_the_script_checks_first_and_goes_on_behind_what_fails(tmp_path: Path) -> None:
    tests = ["pytest -q"] * len(list((ROOT / "tests" / "kernels_gpu").glob("test_*.py")))
    order = ["bench.kernels --check", *tests, "bench.kernels --quick", "bench.ipc --json", "bench.gpu_engine --quick"]
    assert run_script(tmp_path) == (0, order)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.txt")) == [
        "check.txt", "engine.txt", "ipc.txt", "kernels.txt", "tests.txt",
    ]  # fmt: skip
    (tmp_path / "asked").unlink()
    assert run_script(tmp_path, check=3) == (1, order)


def test_without_a_gpu_the_script_says_so(tmp_path: Path) -> None:
    assert run_script(tmp_path, is_available=1) == (1, [])


def test_the_parts_of_the_script_end_within_nine_minutes() -> None:
    limits = re.findall(r"^ *part \w+ (\d+) ", (ROOT / "bench" / "h200.sh").read_text(), re.MULTILINE)
    assert len(limits) == 5 and sum(int(limit) + 5 for limit in limits) <= 535, "each has 5 s to end when it is told to"
