"""Backend `triton` computes the same tokens as the reference, step by step over the same rows and pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import EngineError, StartupError
from core.sampling import SamplingParams
from engine import decode_graphs, triton_executor
from engine.attention_configs import AttentionConfigs
from engine.batch import Batch, PageCopy, Row, RowResult, SampleSpec
from engine.decode_graphs import LAST_SAMPLED
from engine.device_copy import Fence
from engine.row_slots import RowSlots, bucket_for
from engine.triton_executor import TritonExecutor
from engine.triton_ops import triton_ops
from engine.weights import load_model
from kernels.gpu.tuning import EMPTY, Config, Table
from tests.run_rows import GREEDY, Rig, Run, prompt
from tests.tiny_models import VOCABULARY, save_tiny

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "baton-tiny"
MAX_ROWS = 4  # of a captured step, in these tests
LOGPROB_TOLERANCE = 1e-4
NAMES = ("llama3", "qwen3", "mistral", "llama_biased")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_tiny(name, tmp_path_factory.mktemp(name)) for name in NAMES}


class Both:
    """The two executors over pools of the same pages. Every step runs on both, and must have the same outcome."""

    def __init__(
        self, folder: Path, device: torch.device, dtype: str = "auto", tokens: int = 1024, table: Table = EMPTY
    ) -> None:
        self.reference = Rig(load_model(folder, dtype), tokens=tokens)
        model = load_model(folder, dtype, device=str(device), ops=triton_ops())
        self.frames = self.reference.frames.to(device, copy=True)
        configs = AttentionConfigs(model.config, self.frames.shape[4], self.frames.dtype, table)
        self.executor = TritonExecutor(model, self.frames, MAX_ROWS, configs)
        self.fed = 0  # ids that the device had from its last step
        self.buckets: list[int] = []
        self._watch()

    def _watch(self) -> None:
        graphs = self.executor._graphs
        run = graphs.run

        def watched(slots: Sequence[int], ids: Sequence[int], positions: Sequence[int], bucket: int) -> torch.Tensor:
            self.fed += list(ids).count(LAST_SAMPLED)
            self.buckets.append(bucket)
            return run(slots, ids, positions, bucket)

        graphs.run = watched  # type: ignore[method-assign]

    def open(self, length: int, params: SamplingParams = GREEDY) -> Run:
        return self.reference.open(prompt(length, VOCABULARY), 32, params)

    def step(self, rows: Sequence[Row], copies: tuple[PageCopy, ...] = ()) -> list[RowResult]:
        batch = Batch(tuple(rows), copies)
        expected, found = self.reference.executor.execute(batch), self.executor.execute(batch)
        assert [ids_of(result) for result in found] == [ids_of(result) for result in expected]
        for one, other in zip(found, expected, strict=True):
            for token, wanted in zip(one.sampled, other.sampled, strict=True):
                assert token.logprob == pytest.approx(wanted.logprob, abs=LOGPROB_TOLERANCE)
                assert [i for i, _ in token.top] == [i for i, _ in wanted.top]
        return found

    def advance(self, runs: Sequence[Run], chunk: int | None) -> None:
        rows = [run.row(chunk) for run in runs]
        for run, row, result in zip(runs, rows, self.step(rows), strict=True):
            assert result.error is None, result.error
            run.computed += len(row.ids)
            run.ids += [token.token_id for token in result.sampled]

    def finish(self, runs: Sequence[Run], new_tokens: int, chunk: int | None = None) -> None:
        while unfinished := [run for run in runs if len(run.output) < new_tokens]:
            self.advance(unfinished, chunk)


def ids_of(result: RowResult) -> tuple[list[int], str | None]:
    return [token.token_id for token in result.sampled], result.error


@pytest.mark.parametrize("name", NAMES)
def test_prompts_in_chunks_and_decode_give_the_reference_tokens(
    name: str, folders: dict[str, Path], device: torch.device
) -> None:
    """Chunks, mixed steps and decode steps; what is not a row's own slot is not written."""
    both = Both(folders[name], device)
    runs = [both.open(length) for length in (1, 17, 33)]
    both.finish(runs, 4, chunk=16)
    assert both.fed > 0 and set(both.buckets) <= {1, 2, 4}
    written = {(run.pages[p // 16], p % 16) for run in runs for p in range(run.computed)}
    frames = both.frames.cpu()
    for page, slot in ((page, slot) for page in range(len(frames)) for slot in range(16)):
        assert frames[page, :, :, :, slot].isnan().any() == ((page, slot) not in written), (page, slot)
    for run in runs:
        for p in range(run.computed):
            one, other = (each[run.pages[p // 16], :, :, :, p % 16] for each in (frames, both.reference.frames))
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_rows_of_every_sampling_share_steps(folders: dict[str, Path], device: torch.device) -> None:
    """On the device and by the CPU, in one batch; more rows than a captured step has in the second half."""
    both = Both(folders["qwen3"], device, tokens=2048)
    kinds = [
        SamplingParams(max_tokens=9, temperature=1.0),
        SamplingParams(max_tokens=9, temperature=0.8, top_k=20, top_p=0.9),
        SamplingParams(max_tokens=9, temperature=1.2, min_p=0.02, repetition_penalty=1.4, frequency_penalty=0.5),
        SamplingParams(max_tokens=9, temperature=0.7, logprobs=3),
        SamplingParams(max_tokens=9, temperature=0.9, typical_p=0.7),
        GREEDY,
    ]
    runs = [both.open(5 + i, params) for i, params in enumerate(kinds)]
    both.finish(runs[:4], 2)
    both.finish(runs, 3)


def test_choices_verified_positions_and_masks(folders: dict[str, Path], device: torch.device) -> None:
    both = Both(folders["llama3"], device)
    run, other = both.open(18), both.open(33)
    hot = SamplingParams(max_tokens=9, temperature=1.5)
    spec = SampleSpec(hot, -7, (0, 3, 5), run.ids, 18)
    allowed = torch.zeros(VOCABULARY, dtype=torch.bool)
    allowed[[17, 99]] = True
    rows = [replace(run.row(None), sample=spec), other.row(None)]
    assert len(both.step(rows)[0].sampled) == 3
    run.computed, other.computed = 17, 32
    rows = [
        replace(run.row(None), sample=spec),  # several choices from a decode step
        replace(other.row(None), sample=replace(spec, allowed=allowed, history=other.ids)),
    ]
    assert {token.token_id for token in both.step(rows)[1].sampled} <= {17, 99}
    other.computed = 20
    assert len(both.step([other.row(None, verify_tokens=5)])[0].sampled) == 5


def test_a_preempted_and_replayed_sequence_goes_on_as_it_would_have(
    folders: dict[str, Path], device: torch.device
) -> None:
    """Others leave and enter meanwhile: slots change hands, and buckets shrink."""
    both = Both(folders["llama3"], device)
    params = SamplingParams(max_tokens=64, temperature=0.8, top_k=50)
    runs = [both.open(length, params) for length in (15, 3, 6, 17)]
    both.finish(runs, 2)
    straight = both.open(15, params)
    straight.number = 77
    both.finish([straight], 5)
    runs[0].pages = list(reversed(runs[0].pages))  # another list, and other pages for the same tokens
    runs[0].computed = 0
    both.finish([runs[3]], 3)
    both.finish([runs[3], runs[0]], 5)
    assert runs[0].output == straight.output
    newcomer = both.open(12, params)
    both.finish([runs[3], newcomer, runs[0]], 6)
    assert {1, 2, 4} == set(both.buckets)


def test_copies_embeddings_and_rows_that_fail(folders: dict[str, Path], device: torch.device) -> None:
    both = Both(folders["llama3"], device)
    run = both.open(20)
    both.advance([run], None)
    spare = both.reference.free.pop()
    fork = Run(99, list(run.ids), [run.pages[0], spare, *run.pages[2:]], 20, computed=20)
    first, second = both.step((run.row(None), fork.row(None)), (PageCopy(run.pages[1], spare),))
    assert first == second and first.error is None
    ids = prompt(21, VOCABULARY)
    vectors = both.reference.model.embed(torch.tensor(ids))
    by_vector, bad, poisoned = both.open(21), both.open(19), both.open(30)
    bad.ids[3] = VOCABULARY
    poisoned.computed = 16  # its first page was never written
    given = Row(50, (VOCABULARY + 5,) * 21, 0, by_vector.pages, by_vector.row(None).sample, embeddings=vectors)
    results = both.step([given, bad.row(None), poisoned.row(None)])
    assert [result.error is None for result in results] == [True, False, False]
    poisoned.computed = 29
    assert "not finite" in (both.step([poisoned.row(None)])[0].error or "")
    both.executor.zero_tail(run.pages[1], 4)
    assert not both.frames[run.pages[1], :, :, :, 4:].any() and both.frames[run.pages[1], :, :, :, :4].any()
    assert both.step([]) == []
    assert both.step([run.row(16)])[0].error is None


def test_a_failed_step_forgets_its_slots(
    folders: dict[str, Path], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Both(folders["llama3"], device)
    run = both.open(5)
    both.finish([run], 2)

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patched:
        patched.setattr(both.executor._graphs, "run", fail)
        with pytest.raises(EngineError, match="out of luck"):
            both.executor.execute(Batch((run.row(None),)))
    both.finish([run], 4)


def test_a_step_is_over_when_the_device_is_done_with_it(
    folders: dict[str, Path], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that samples nothing, and one that failed half-way: their pages are offered, or given back, next."""
    waited: list[str] = []

    class Watched(Fence):
        def wait(self) -> None:
            waited.append("fence")
            super().wait()

    monkeypatch.setattr(triton_executor, "Fence", Watched)
    both = Both(folders["llama3"], device)
    run = both.open(40)
    launched = both.executor.launch(Batch((run.row(16),)))
    assert launched.sampling is None and not waited
    both.executor.finish(launched)
    assert waited == ["fence"]

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(triton_executor, "rope_write", fail)
    with pytest.raises(EngineError, match="out of luck"):
        both.executor.execute(Batch((run.row(16),)))
    assert waited == ["fence"] * 2


def test_capturing_at_start_writes_nothing(folders: dict[str, Path], device: torch.device) -> None:
    both = Both(folders["qwen3"], device, tokens=64)
    both.executor.capture()
    assert both.buckets == [4, 2, 1] and both.frames.isnan().all()


def test_a_step_that_cannot_be_captured_ends_the_start(
    folders: dict[str, Path], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Both(folders["llama3"], device, tokens=64)

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(both.executor._graphs, "run", fail)
    with pytest.raises(StartupError, match=r"out of memory; where memory ran out, give fewer --pages"):
        both.executor.capture()


def test_tuned_configurations_are_used_and_change_no_token(
    folders: dict[str, Path], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of one row and of some have configurations of their own; a plan follows the tile that was chosen."""
    model = load_model(folders["llama3"]).config
    heads = f"H{model.heads} K{model.kv_heads} D{model.head_dim} P16"
    one = {"block_keys": 16, "num_warps": 2, "num_stages": 2, "splits": 3, "assembly": True}
    some = {**one, "block_keys": 32, "splits": None}
    long = {
        "block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 3, "descriptors": False, "warp_specialize": False,
    }  # fmt: skip
    table: dict[tuple[str, str], Config] = {
        ("decode_attention", f"float32 float32 {heads} M1 R1"): one,
        ("decode_attention", f"float32 float32 {heads} M1 R8"): some,
        ("prefill_attention", f"float32 float32 {heads}"): long,
    }
    used: dict[str, list[Config]] = {"decode_attention": [], "prefill_attention": []}
    for module in (decode_graphs, triton_executor):
        for name in used.keys() & vars(module).keys():
            launch = getattr(module, name)

            def watched(*given: object, name: str = name, launch: Any = launch, **named: Any) -> torch.Tensor:
                used[name].append(asdict(named["config"]))
                return launch(*given, **named)  # type: ignore[no-any-return]

            monkeypatch.setattr(module, name, watched)
    both = Both(folders["llama3"], device, table=table)
    runs = [both.open(length) for length in (3, 19)]
    both.finish(runs, 2)
    assert used["prefill_attention"] and all(config == long for config in used["prefill_attention"])
    both.finish(runs[:1], 3)
    seen = used["decode_attention"]
    assert one in seen and some in seen and all(config in (one, some) for config in seen)


def test_the_bundled_model_goes_on_as_the_reference_does(device: torch.device) -> None:
    """Trained weights: sharp attention and confident logits, which random ones lack."""
    both = Both(BUNDLED, device, dtype="float32", tokens=512)
    both.finish([both.open(20), both.open(7, SamplingParams(max_tokens=9, temperature=0.8, top_p=0.95))], 2)


def test_steps_may_be_launched_before_the_last_is_known(folders: dict[str, Path], device: torch.device) -> None:
    """What the device keeps: launch and finish are apart, and an id may be the one that the slot sampled last."""
    both = Both(folders["llama3"], device)
    run = both.open(10)
    both.finish([run], 2)
    launched = both.executor.launch(Batch((run.row(None),)))
    assert launched.kept and launched.sampling is not None and launched.sampling.ids is not None
    slot = launched.kept[0][1].slot
    assert int(both.executor._graphs._last[slot]) == int(launched.sampling.ids[0])
    result = both.executor.finish(launched)[0]
    assert result == both.reference.executor.execute(Batch((run.row(None),)))[0]


def row(number: int, start: int, pages: Sequence[int]) -> Row:
    return Row(number, (5,), start, pages)


def test_slots_send_only_what_is_new() -> None:
    slots = RowSlots(slots=4, width=8, page_size=16, pool_pages=100)
    first, second = [11, 12, 13], [21, 22]
    held, changes = slots.place([row(1, 17, first), row(2, 5, second)])
    assert [each.slot for each in held] == [0, 1]
    assert changes.tolist() == [[0, 1, 8], [11, 12, 21]]
    assert slots.place([row(2, 6, second), row(1, 18, first)])[1].size == 0
    assert slots.place([row(1, 32, first), row(2, 16, second)])[1].tolist() == [[2, 9], [13, 22]]
    held, changes = slots.place([row(2, 17, second), row(3, 0, [31])])  # 1 has left: 3 takes its slot
    assert [each.slot for each in held] == [1, 0] and changes.tolist() == [[0], [31]]
    moved = [41, 42]
    assert slots.place([row(2, 18, moved), row(3, 1, [31])])[1].tolist() == [[8, 9, 0], [41, 42, 31]]


def test_slots_move_together_when_many_have_left() -> None:
    slots = RowSlots(slots=8, width=2, page_size=16, pool_pages=100)
    pages = {number: [10 + number] for number in range(5)}
    slots.place([row(number, 0, pages[number]) for number in range(5)])
    held, changes = slots.place([row(4, 1, pages[4]), row(2, 1, pages[2])])
    assert [each.slot for each in held] == [0, 1] and changes.tolist() == [[0, 2], [14, 12]]
    assert [bucket_for(n) for n in (1, 2, 3, 5, 129, 256)] == [1, 2, 4, 8, 256, 256]
