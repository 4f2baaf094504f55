"""The table of tuned configurations, and the loop that fills it: no GPU, and a measure that the test gives."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from baton import tune as command
from baton.tuning_loop import GpuLost, tune, untried
from core.errors import CheckpointError, ConfigError
from kernels.gpu.attention_cases import (
    DECODE_AXES,
    PREFILL_AXES,
    DecodeCase,
    Heads,
    PrefillCase,
    variations,
)
from kernels.gpu.tuning import (
    EMPTY,
    Choice,
    Config,
    Entry,
    Trial,
    Tuned,
    decode_shape,
    file_name,
    load_table,
    lookup,
    read,
    row_class,
    write,
)

CHIP = "NVIDIA H200"
DECODE_DEFAULT: Config = {"block_keys": 64, "num_warps": 4, "num_stages": 3, "splits": None}
PREFILL_DEFAULT: Config = {
    "block_m": 128, "block_n": 128, "num_warps": 8, "num_stages": 2, "descriptors": False, "warp_specialize": False,
}  # fmt: skip
FILE: dict[str, Any] = {
    "version": 1, "chip": CHIP, "software": {"torch": "2.11", "triton": "3.6"},
    "entries": [
        {
            "kernel": "decode_attention", "shape": "s", "done": True,
            "trials": [
                {"config": {"a": 1, "b": False}, "time_us": 30.0},
                {"config": {"a": 2, "b": False}, "failed": "out of shared memory"},
                {"config": {"a": 4, "b": True}, "time_us": 20},
            ],
        },
        {"kernel": "decode_attention", "shape": "t", "done": False, "trials": []},
    ],
}  # fmt: skip


@dataclass(frozen=True)
class SmallCase:
    shape: str = "s"
    kernel: str = "k"
    sizes: tuple[int, ...] = (1, 2, 3, 4)

    def default(self) -> Config:
        return {"size": self.sizes[0]}

    def candidates(self, default: Config) -> Sequence[Config]:
        return [{**default, "size": size} for size in self.sizes]


class Bench:
    """Runs the loop over a file, and tells what was measured."""

    def __init__(self, path: Path, cases: Sequence[SmallCase]) -> None:
        self.path, self.cases = path, cases
        self.asked: list[int] = []
        self.told: list[Trial] = []

    def run(self, outcomes: dict[int, float | BaseException], most: int = 100) -> Tuned:
        def measure(case: SmallCase, config: Config) -> float:
            size = config["size"]
            assert isinstance(size, int)
            self.asked.append(size)
            outcome = outcomes.get(size, 10.0 + size)
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        tuned = read(self.path) if self.path.exists() else Tuned(CHIP)
        return tune(
            tuned, self.cases, measure, lambda now: write(self.path, now), lambda _, trial: self.told.append(trial),
            lambda: len(self.asked) < most,
        )  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "deep" / "table.json", [SmallCase("s"), SmallCase("t", sizes=(5, 6))])


def with_file(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps({**FILE, **changes}))
    return path


def test_the_fastest_of_a_file_is_looked_up_and_nothing_else_is_called_tuned(tmp_path: Path) -> None:
    table = load_table(CHIP, with_file(tmp_path / "mine.json"))
    default = {"a": 9, "b": False}
    assert lookup(table, "decode_attention", "s", default) == Choice({"a": 4, "b": True}, tuned=True)
    assert lookup(table, "decode_attention", "t", default) == Choice(default, tuned=False), "nothing was measured"
    assert lookup(table, "prefill_attention", "s", default) == Choice(default, tuned=False), "another kernel"
    assert lookup(EMPTY, "decode_attention", "s", default) == Choice(default, tuned=False)
    other = {"a": 9, "c": 1}
    assert lookup(table, "decode_attention", "s", other) == Choice(other, tuned=False), "fields of another release"


def test_a_users_entry_comes_before_the_shipped_one_and_leaves_the_others(tmp_path: Path) -> None:
    def tuned(shape: str, size: int) -> Tuned:
        return Tuned(CHIP).with_entry("k", shape, Entry((Trial({"size": size}, time_us=1.0),)))

    shipped, mine = tmp_path / "shipped", tmp_path / "mine.json"
    write(shipped / file_name(CHIP), Tuned(CHIP, {}, {**tuned("s", 1).entries, **tuned("t", 2).entries}))
    write(mine, tuned("s", 3))
    assert dict(load_table(CHIP, mine, shipped)) == {("k", "s"): {"size": 3}, ("k", "t"): {"size": 2}}
    assert dict(load_table(CHIP, tmp_path / "none.json", shipped)) == {("k", "s"): {"size": 1}, ("k", "t"): {"size": 2}}
    assert not load_table("another chip", None, shipped)
    with pytest.raises(ValueError, match="was measured on NVIDIA H200, and this is another chip"):
        load_table("another chip", mine, shipped)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    tuned = read(with_file(tmp_path / "a.json"))
    write(tmp_path / "b.json", tuned)
    assert read(tmp_path / "b.json") == tuned and json.loads((tmp_path / "b.json").read_text()) == FILE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"], "nothing is left beside it"


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"version": 2}, "version is 2"),
        ({"more": 1}, "the file must have the fields"),
        ({"chip": ""}, "chip must be a text"),
        ({"software": {"torch": 2}}, "software must map"),
        ({"entries": {}}, "entries must be a list"),
        ({"entries": FILE["entries"][:1] * 2}, "is there twice"),
        ({"entries": [{**FILE["entries"][0], "done": 1}]}, "done must be true or false"),
        ({"entries": [{**FILE["entries"][0], "trials": [{"config": {}}]}]}, "a trial must have"),
        ({"entries": [{**FILE["entries"][0], "trials": [{"config": {}, "time_us": True}]}]}, "time_us must be"),
        ({"entries": [{**FILE["entries"][0], "trials": [{"config": {}, "time_us": float("nan")}]}]}, "time_us must be"),
        ({"entries": [{**FILE["entries"][0], "trials": [{"config": {"a": [1]}, "time_us": 1}]}]}, "a config must map"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(tmp_path: Path, changes: dict[str, object], wrong: str) -> None:
    path = with_file(tmp_path / "t.json", **changes)
    with pytest.raises(ValueError, match=rf"t\.json: .*{wrong}"):
        read(path)


def test_text_that_is_no_json_is_refused(tmp_path: Path) -> None:
    for text in ("", "{", "[" * 100_000, "\udcff"):
        (tmp_path / "t.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"t\.json"):
            read(tmp_path / "t.json")


def test_everything_is_tried_once_and_saved_at_once(bench: Bench) -> None:
    tuned = bench.run({3: 1.0})
    assert bench.asked == [1, 2, 3, 4, 5, 6] and len(bench.told) == 6
    assert read(bench.path) == tuned and all(entry.done for entry in tuned.entries.values())
    assert load_table(CHIP, bench.path)["k", "s"] == {"size": 3}
    bench.run({})
    assert len(bench.asked) == 6, "nothing is left to try"


def test_an_interrupt_keeps_what_was_measured_and_the_next_run_goes_on(bench: Bench) -> None:
    with pytest.raises(KeyboardInterrupt):
        bench.run({3: KeyboardInterrupt()})
    saved = read(bench.path).entries["k", "s"]
    assert [trial.config for trial in saved.trials] == [{"size": 1}, {"size": 2}] and not saved.done
    assert load_table(CHIP, bench.path)["k", "s"] == {"size": 1}, "half a table serves"
    bench.asked.clear()
    bench.run({})
    assert bench.asked == [3, 4, 5, 6]


def test_a_time_limit_stops_between_two_candidates(bench: Bench) -> None:
    tuned = bench.run({}, most=5)
    assert bench.asked == [1, 2, 3, 4, 5]
    assert tuned.entries["k", "s"].done and not tuned.entries["k", "t"].done
    assert [untried(tuned, case) for case in bench.cases] == [(), ({"size": 6},)]


def test_a_candidate_that_fails_is_noted_and_skipped(bench: Bench) -> None:
    tuned = bench.run({2: RuntimeError("out of resource:\n shared memory"), 3: ValueError("x" * 10_000)})
    trials = read(bench.path).entries["k", "s"].trials
    assert trials[1] == Trial({"size": 2}, failed="RuntimeError: out of resource: shared memory")
    assert len(trials[2].failed or "") == 300 and tuned.entries["k", "s"].done
    best = tuned.entries["k", "s"].best()
    assert best is not None and best.config == {"size": 1}
    bench.run({})
    assert bench.asked == [1, 2, 3, 4, 5, 6], "no second chance"


def test_where_all_fail_there_is_no_configuration(bench: Bench) -> None:
    tuned = bench.run({size: RuntimeError() for size in range(7)})
    assert [entry.best() for entry in tuned.entries.values()] == [None, None]
    assert read(bench.path) == tuned and not load_table(CHIP, bench.path)


def test_a_lost_gpu_ends_the_run_and_the_next_goes_on_behind_its_cause(bench: Bench) -> None:
    with pytest.raises(GpuLost):
        bench.run({2: GpuLost("illegal memory access")})
    bench.asked.clear()
    bench.run({})
    assert bench.asked == [3, 4, 5, 6]
    assert read(bench.path).entries["k", "s"].trials[1].failed == "GpuLost: illegal memory access"


def test_what_the_user_can_mend_is_no_outcome(bench: Bench) -> None:
    with pytest.raises(ConfigError):
        bench.run({2: ConfigError("too large")})
    assert [trial.config for trial in read(bench.path).entries["k", "s"].trials] == [{"size": 1}]


def test_a_write_that_fails_leaves_the_old_file(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bench.run({}, most=2)

    def broken(*_: object, **__: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="no space"):
        bench.run({})
    assert read(bench.path) == before


def test_candidates_begin_with_the_default_and_hold_no_two_equals() -> None:
    assert len({tuple(config.items()) for config in variations(DECODE_DEFAULT, DECODE_AXES)}) == 36
    assert variations({"block_keys": 48}, DECODE_AXES)[0] == {"block_keys": 48}
    assert [config["block_keys"] for config in variations({"block_keys": 48}, DECODE_AXES)] == [48, 32, 64, 128]
    assert variations(PREFILL_DEFAULT, PREFILL_AXES)[0] == PREFILL_DEFAULT


def test_descriptors_are_tried_where_a_page_holds_whole_tiles() -> None:
    def sizes(page_size: int, heads: int = 32) -> set[tuple[object, object]]:
        case = PrefillCase(Heads(heads, 1, 128, page_size))
        found = case.candidates(PREFILL_DEFAULT)
        assert found[0] == PREFILL_DEFAULT
        return {(config["block_m"], config["block_n"]) for config in found if config["descriptors"]}

    assert sizes(16) == set()
    assert sizes(64) == {(64, 32), (64, 64), (128, 32), (128, 64)}
    assert sizes(64, heads=128) == {(128, 32), (128, 64)}, "a program holds all query heads of a KV head"


def test_cases_count_the_least_work_and_have_a_row_of_the_table_each() -> None:
    heads = Heads(32, 8, 128)
    assert DecodeCase(heads, 64, 4096).bytes == 64 * 4096 * 8 * 128 * 2 * 2
    assert DecodeCase(Heads(32, 8, 128, kv_type="int8"), 1, 10).bytes == 10 * 8 * 2 * (128 + 4)
    assert PrefillCase(heads, tokens=8192).flops == 4 * 32 * 128 * 8192 * 8193 // 2
    assert PrefillCase(heads, tokens=2, prefix=3).flops == 4 * 32 * 128 * (4 + 5)
    assert DecodeCase(heads, 5).shape == DecodeCase(heads, 8).shape == "bfloat16 bfloat16 H32 K8 D128 P16 M1 R8"
    assert decode_shape("bfloat16", "int8", 32, 8, 128, 16, 1, 9).endswith("R64")
    assert [row_class(rows) for rows in (1, 2, 8, 9, 64, 65, 4096)] == [1, 8, 8, 64, 64, 256, 256]
    assert file_name("NVIDIA H200 NVL") == "nvidia-h200-nvl.json"


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(argv)


def test_the_command_measures_each_shape_once() -> None:
    cases = command.cases_of(parsed("--shape", "8x2x64", "--shape", "8x2x64", "--rows", "1,2,7", "--kv-dtype", "int8"))
    assert [case.shape for case in cases] == [
        "bfloat16 int8 H8 K2 D64 P16 M1 R1", "bfloat16 int8 H8 K2 D64 P16 M1 R8", "bfloat16 int8 H8 K2 D64 P16",
    ]  # fmt: skip


def test_the_command_takes_the_shape_of_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        command.cases_of(parsed("--model", str(tmp_path)))
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Qwen3ForCausalLM"], "vocab_size": 9, "hidden_size": 64, "intermediate_size": 8,
                "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
                "max_position_embeddings": 99, "torch_dtype": "float16",
            }
        )
    )  # fmt: skip
    shapes = [case.shape for case in command.cases_of(parsed("--model", str(tmp_path), "--rows", "1"))]
    assert shapes == ["float16 float16 H16 K8 D128 P16 M1 R1", "float16 float16 H16 K8 D128 P16"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--shape", "8x3x64"), ("--shape", "8x2"), ("--shape", "8x2x60"), ("--shape", "8x2x512"), ("--rows", "0"),
        ("--rows", "1,a"), ("--page-size", "8"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_told_before_a_gpu_is_looked_for(flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=flags[0]):
        command.run(parsed(*flags))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so() -> None:
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        command.run(parsed())


def test_a_file_of_another_chip_or_other_software_is_not_mixed_in(tmp_path: Path) -> None:
    path = with_file(tmp_path / "t.json")
    assert command.open_file(tmp_path / "none.json", CHIP, {"torch": "1"}) == Tuned(CHIP, {"torch": "1"})
    assert command.open_file(path, CHIP, FILE["software"]) == read(path)
    with pytest.raises(ConfigError, match="give another --out"):
        command.open_file(path, "NVIDIA H100", FILE["software"])
    with pytest.raises(
        ConfigError, match=r"measured with torch 2\.11 triton 3\.6, and here is torch 2\.12 triton 3\.6"
    ):
        command.open_file(path, CHIP, {"torch": "2.12", "triton": "3.6"})
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"t\.json"):
        command.open_file(path, CHIP, {})


class Computed(DecodeCase):
    """A case whose results the test gives, by the number of warps."""

    def prepared(self, device: torch.device) -> Any:
        results = {4: 1.0, 2: 1.01, 8: 2.0}

        def call_with(config: Config) -> Any:
            if config["num_warps"] not in results:
                raise RuntimeError("does not compile")
            return lambda: torch.full((3,), results[int(config["num_warps"] or 0)])

        return call_with


def test_a_result_that_differs_from_the_first_one_is_a_failure() -> None:
    measure = command.Measurement(torch.device("cpu"), lambda call: float(call()[0]) / 1e6, lambda _: None)
    case = Computed(Heads(4, 2, 64), 1)
    assert [measure(case, {"num_warps": warps}) for warps in (4, 2)] == pytest.approx([1.0, 1.01])
    with pytest.raises(ValueError, match=r"differs from the first one's by 1, more than 0\.05"):
        measure(case, {"num_warps": 8})
    assert measure(Computed(Heads(4, 2, 64), 2), {"num_warps": 8}) == pytest.approx(2.0), "another case, other inputs"
    with pytest.raises(RuntimeError, match="does not compile"):
        measure(case, {"num_warps": 16})


def test_an_error_that_the_device_repeats_is_a_lost_gpu() -> None:
    def broken(_: object) -> None:
        raise RuntimeError("illegal memory access")

    measure = command.Measurement(torch.device("cpu"), lambda _: 1.0, broken)
    with pytest.raises(GpuLost, match="illegal memory access"):
        measure(Computed(Heads(4, 2, 64), 1), {"num_warps": 16})


def test_the_report_tells_the_gain_and_what_is_left(bench: Bench) -> None:
    tuned = bench.run({2: 5.0}, most=5)
    lines = command.report(tuned, [*bench.cases, SmallCase("u")])
    assert lines == [
        "k s: 5.0 us with {'size': 2}, default 11.0 us", "k t: 15.0 us with {'size': 5}, default 15.0 us, more to try",
        "k u: nothing measured",
    ]  # fmt: skip


def test_the_table_needs_neither_torch_nor_triton() -> None:
    code = "import sys, kernels.gpu.tuning; sys.exit(any(name in sys.modules for name in ('torch', 'triton')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
