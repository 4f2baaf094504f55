"""What the executor computes is what transformers computes, however the rows are cut, mixed and placed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from core.errors import EngineError
from core.sampling import SamplingParams
from engine.batch import Batch, PageCopy, Row, SampleSpec
from engine.weights import load_model
from tests.run_rows import GREEDY, Rig, Run, prompt
from tests.tiny_models import MAX_POSITIONS, TINY, VOCABULARY, save_tiny, tiny_model

BUNDLED = Path(__file__).resolve().parent.parent / "models" / "baton-tiny"
LENGTHS = (1, 15, 16, 17, 255, 256, 257, 700)  # around the borders of pages and chunks
CHUNKS = (16, 100, 512, None)
NEW_TOKENS = 64
LOGIT_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_tiny(name, tmp_path_factory.mktemp(name)) for name in TINY}


def teacher_forced(reference: PreTrainedModel, run: Run) -> torch.Tensor:
    """[new, V] float32: the reference's logits before each new token of the run."""
    with torch.inference_mode():
        logits = reference(torch.tensor([run.ids])).logits[0].float()
    return logits[run.prompt_tokens - 1 : -1]


@pytest.mark.parametrize("name", TINY)
def test_greedy_tokens_and_logits_equal_the_reference(name: str, folders: dict[str, Path]) -> None:
    reference = tiny_model(name)
    model = load_model(folders[name])
    prompts = [prompt(length, VOCABULARY) for length in LENGTHS]
    outputs = []
    for chunk in CHUNKS:
        runs = Rig(model).generate(prompts, NEW_TOKENS, chunk)
        outputs.append([run.output for run in runs])
        if chunk in (CHUNKS[0], CHUNKS[-1]):
            for run in runs:
                expected = teacher_forced(reference, run)
                assert run.output == expected.argmax(-1).tolist(), f"prompt of {run.prompt_tokens} tokens"
                torch.testing.assert_close(torch.stack(run.logits), expected, rtol=0, atol=LOGIT_TOLERANCE)
    assert all(output == outputs[0] for output in outputs[1:]), "the cut into chunks changed a token"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama3", "qwen3", "mistral"])
def test_16_bit_tokens_are_within_a_small_margin(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Each token's logit is within 0.05, and twice the type's own rounding of it, of the reference's best.

    The reference runs the same 16-bit weights in float32.
    """
    model = load_model(save_tiny(name, tmp_path, dtype))
    assert model.dtype == dtype
    reference = tiny_model(name, dtype).float()
    for run in Rig(model).generate([prompt(length, VOCABULARY) for length in (1, 17, 256, 700)], NEW_TOKENS, 100):
        expected = teacher_forced(reference, run)
        chosen = expected.gather(1, torch.tensor(run.output)[:, None])[:, 0]
        best = expected.max(-1).values
        margin = 0.05 + 2 * torch.finfo(dtype).eps * expected.abs().amax(-1)
        assert ((best - chosen) <= margin).all(), float(((best - chosen) - margin).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bundled_model_is_computed_as_the_reference_computes_it(dtype: str) -> None:
    """Trained weights: sharp attention and confident logits, which random ones lack."""
    model = load_model(BUNDLED, dtype)
    reference = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    ids = prompt(700, model.config.vocab_size)
    for run in Rig(model).generate([ids[:length] for length in (1, 16, 257, 700)], 32, 100):
        expected = teacher_forced(reference, run)
        chosen = expected.gather(1, torch.tensor(run.output)[:, None])[:, 0]
        rounding = 2 * torch.finfo(model.dtype).eps * expected.abs().amax(-1)
        assert ((expected.max(-1).values - chosen) <= {"float32": 0.0, "bfloat16": 0.05}[dtype] + rounding).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_convert_to_the_type_asked_for(dtype: str, folders: dict[str, Path]) -> None:
    run = Rig(load_model(folders["qwen3"], dtype)).generate([prompt(40, VOCABULARY)], 8, None)[0]
    difference = (torch.stack(run.logits) - teacher_forced(tiny_model("qwen3"), run)).abs().max()
    assert difference < {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.05}[dtype]


@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_a_mixed_batch_equals_its_rows_alone(name: str, folders: dict[str, Path]) -> None:
    model = load_model(folders[name])
    lengths = (300, 5, 33, 128, 77)
    chunks = (None, 3, 16, None, 50)
    mixed, alone = Rig(model), Rig(model)
    together = [mixed.open(prompt(n, VOCABULARY)) for n in lengths]
    apart = [alone.open(prompt(n, VOCABULARY)) for n in lengths]
    for runs, rig in ((together, mixed), (apart, alone)):
        for run, chunk in list(zip(runs, chunks, strict=True))[:2]:
            rig.advance([run], chunk)  # two rows are past their first chunk, or decode already
        rows = [run.row(chunk) for run, chunk in zip(runs, chunks, strict=True)]
        results = rig.step(rows) if runs is together else [rig.step([row])[0] for row in rows]
        for run, row, result in zip(runs, rows, results, strict=True):
            run.computed += len(row.ids)
            run.ids += [token.token_id for token in result.sampled]
    assert [run.ids for run in together] == [run.ids for run in apart]
    for run, single in zip(together, apart, strict=True):
        used = run.computed
        torch.testing.assert_close(kv_of(mixed, run, used), kv_of(alone, single, used), rtol=0, atol=1e-5)


def kv_of(rig: Rig, run: Run, tokens: int) -> torch.Tensor:
    """[K, L, 2, tokens, D]."""
    return torch.cat([rig.frames[page] for page in run.pages], dim=3)[:, :, :, :tokens]


def test_nothing_but_the_rows_own_slots_is_written(folders: dict[str, Path]) -> None:
    rig = Rig(load_model(folders["qwen2"]))
    runs = rig.generate([prompt(37, VOCABULARY), prompt(16, VOCABULARY)], 3, 20)
    written = {(run.pages[p // 16], p % 16) for run in runs for p in range(run.computed)}
    for page in range(len(rig.frames)):
        for slot in range(16):
            assert rig.frames[page, :, :, :, slot].isnan().any() == ((page, slot) not in written), (page, slot)


def test_copies_run_before_the_rows(folders: dict[str, Path]) -> None:
    rig = Rig(load_model(folders["llama3"]))
    run = rig.open(prompt(20, VOCABULARY))
    rig.advance([run], None)
    fork = Run(99, list(run.ids), [run.pages[0], rig.free.pop(), *run.pages[2:]], 20, computed=20)
    rows = (run.row(None), fork.row(None))
    first, second = rig.executor.execute(Batch(rows, (PageCopy(run.pages[1], fork.pages[1]),)))
    assert first == second and first.error is None
    assert torch.equal(kv_of(rig, run, 21), kv_of(rig, fork, 21))


def test_the_tail_of_a_page_is_zeroed(folders: dict[str, Path]) -> None:
    rig = Rig(load_model(folders["llama3"]))
    run = rig.generate([prompt(20, VOCABULARY)], 1, None)[0]
    before = rig.frames[run.pages[1]].clone()
    rig.executor.zero_tail(run.pages[1], 4)
    after = rig.frames[run.pages[1]]
    assert torch.equal(after[:, :, :, :4], before[:, :, :, :4]) and not after[:, :, :, 4:].any()


def test_verified_positions_are_sampled_as_if_decoded_one_by_one(folders: dict[str, Path]) -> None:
    """A row of drafted tokens: what is sampled at its last k positions."""
    params = SamplingParams(max_tokens=64, temperature=0.9, repetition_penalty=1.3, top_k=40)
    model = load_model(folders["qwen3"])
    slow, fast = Rig(model), Rig(model)
    run = slow.open(prompt(30, VOCABULARY), params=params)
    for _ in range(6):
        slow.advance([run], None)
    draft = fast.open(run.ids[:-1], params=params)
    draft.prompt_tokens = 30
    result = fast.step([draft.row(None, verify_tokens=5)])[0]
    assert [token.token_id for token in result.sampled] == run.output[-5:]


def test_embeddings_stand_in_for_ids(folders: dict[str, Path]) -> None:
    model = load_model(folders["qwen2"])
    rig = Rig(model)
    ids = prompt(21, VOCABULARY)
    by_id, by_vector = rig.open(ids), rig.open(ids)
    rows = [run.row(None) for run in (by_id, by_vector)]
    vectors = model.embed(torch.tensor(ids))
    placeholders = (VOCABULARY + 5,) * 21
    rows[1] = Row(2, placeholders, 0, by_vector.pages, rows[1].sample, embeddings=vectors)
    first, second = rig.step(rows)
    assert first == second and first.error is None
    wrong = rig.step([Row(2, placeholders, 0, by_vector.pages, rows[1].sample, embeddings=vectors[:, :3])])[0]
    assert wrong.error is not None and "embeddings" in wrong.error


def test_only_allowed_tokens_are_sampled(folders: dict[str, Path]) -> None:
    rig = Rig(load_model(folders["llama3"]))
    run = rig.open(prompt(9, VOCABULARY))
    allowed = torch.zeros(VOCABULARY, dtype=torch.bool)
    allowed[[17, 99]] = True
    for params in (GREEDY, SamplingParams(temperature=1.5)):
        spec = SampleSpec(params, 1, tuple(range(30)), run.ids, 9, allowed=allowed)
        result = rig.step([Row(1, tuple(run.ids), 0, run.pages, spec)])[0]
        assert {token.token_id for token in result.sampled} <= {17, 99}


def test_a_row_that_cannot_run_leaves_its_neighbours_alone(folders: dict[str, Path]) -> None:
    rig = Rig(load_model(folders["llama3"]), tokens=2 * MAX_POSITIONS + 64)
    good, bad_id, poisoned = (rig.open(prompt(n, VOCABULARY)) for n in (20, 21, 22))
    rig.frames[poisoned.pages[0]] = float("nan")
    poisoned.computed = 16  # its first page was never written
    too_far = rig.open(prompt(MAX_POSITIONS, VOCABULARY), room=1)
    too_far.computed = MAX_POSITIONS
    too_far.ids.append(3)
    expected = rig.step([good.row(None)])[0]
    bad_id.ids[4] = VOCABULARY
    results = rig.step([poisoned.row(None), bad_id.row(None), good.row(None), too_far.row(None)])
    assert results[2] == expected and expected.error is None
    errors = [results[i].error or "" for i in (0, 1, 3)]
    assert "not finite" in errors[0] and "vocabulary" in errors[1] and "context" in errors[2]
    assert all(not results[i].sampled for i in (0, 1, 3))


def test_a_failure_in_torch_is_an_engine_error(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(load_model(folders["llama3"]))

    def fail(hidden: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(rig.model, "logits", fail)
    with pytest.raises(EngineError, match="out of luck"):
        rig.step([rig.open(prompt(4, VOCABULARY)).row(None)])


def test_chunks_without_a_sample_and_an_empty_batch(folders: dict[str, Path]) -> None:
    rig = Rig(load_model(folders["mistral"]))
    assert rig.step([]) == []
    run = rig.open(prompt(60, VOCABULARY))
    assert rig.step([run.row(16)])[0].sampled == () and rig.model.seen == []
