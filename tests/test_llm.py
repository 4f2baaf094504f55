"""`baton.LLM` on the model that comes with Baton: its answers are those of transformers, its errors name the cause."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from baton import LLM, SamplingParams
from baton.available_memory import available_bytes
from baton.loaded_model import PoolWish, load
from core.errors import CheckpointError, ConfigError, ContextTooLong, InvalidRequest, TooLittleMemory

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "baton-tiny"
PROMPTS = ["def add(a, b):", "import os\n", "class Stack:\n    def push(self, item):\n", "x", "# " + "word " * 300]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
ENDLESS = replace(GREEDY, logit_bias={0: -100.0, 2: -100.0})  # whatever the model has learnt, it never ends by itself


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(MODEL), dtype="float32", threads=1, progress=False) as model:
        yield model


def test_greedy_tokens_are_those_of_transformers_in_float32(llm: LLM) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for output in llm.generate(PROMPTS, GREEDY):
        ids = torch.tensor([output.prompt_token_ids])
        mask = torch.ones_like(ids)
        wanted = model.generate(ids, attention_mask=mask, max_new_tokens=GREEDY.max_tokens, do_sample=False)
        assert list(output.outputs[0].token_ids) == wanted[0, ids.shape[1] :].tolist()


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS, [replace(ENDLESS, max_tokens=3 * i + 1) for i in range(len(PROMPTS))])
    assert [output.prompt for output in outputs] == PROMPTS
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3 * i + 1 for i in range(len(PROMPTS))]
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}


def test_a_batch_and_each_prompt_alone_give_the_same(llm: LLM) -> None:
    together = llm.generate(PROMPTS, GREEDY)
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in PROMPTS]
    assert [o.outputs for o in together] == [o.outputs for o in alone]
    assert alone[-1].cached_tokens > 0, "its prefix was computed for the first call"


def test_token_ids_do_as_well_as_text(llm: LLM) -> None:
    by_text = llm.generate(PROMPTS[0], GREEDY)[0]
    by_ids = llm.generate([list(by_text.prompt_token_ids)], GREEDY)[0]
    assert by_ids.outputs == by_text.outputs and by_ids.prompt is None


def test_choices_differ_and_a_seed_gives_them_again(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, n=4, temperature=2.0, seed=7)
    first, again = (llm.generate(PROMPTS[0], params)[0] for _ in range(2))
    assert [choice.index for choice in first.outputs] == [0, 1, 2, 3]
    assert len({choice.token_ids for choice in first.outputs}) > 1
    assert first.outputs == again.outputs
    assert llm.generate(PROMPTS[0], replace(params, seed=8))[0].outputs != first.outputs


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[0], ENDLESS)[0].outputs[0].text
    stop = whole[5:8]
    choice = llm.generate(PROMPTS[0], replace(ENDLESS, stop=(stop,)))[0].outputs[0]
    assert choice.text == whole[: whole.index(stop)] and choice.finish_reason == "stop"
    assert llm.generate(PROMPTS[0], replace(ENDLESS, stop=stop))[0].outputs[0] == choice  # type: ignore[arg-type]


def test_logprobs_name_the_token_and_the_likeliest(llm: LLM) -> None:
    choice = llm.generate(PROMPTS[0], replace(GREEDY, logprobs=3))[0].outputs[0]
    assert choice.logprobs is not None and len(choice.logprobs) == len(choice.token_ids)
    for token, token_id in zip(choice.logprobs, choice.token_ids, strict=True):
        assert token.token_id == token_id == token.top[0][0], "greedy takes the likeliest"
        assert token.logprob == token.top[0][2] <= 0 and len(token.top) == 3
    assert llm.generate(PROMPTS[0], GREEDY)[0].outputs[0].logprobs is None


def test_chat_goes_through_the_template(llm: LLM) -> None:
    talk = [{"role": "user", "content": "Repeat: hello"}]
    one = llm.chat(talk, GREEDY)
    assert [o.outputs for o in llm.chat([talk, talk], GREEDY)] == [one[0].outputs] * 2
    ids = one[0].prompt_token_ids
    text = "<|im_start|>user\nRepeat: hello<|im_end|>\n<|im_start|>assistant\n"
    assert llm.generate(text, replace(GREEDY, max_tokens=1))[0].prompt_token_ids == ids


def test_without_parameters_the_models_own_hold(llm: LLM) -> None:
    assert len(llm.generate("x = ")[0].outputs[0].token_ids) <= 16


@pytest.mark.parametrize(
    ("prompts", "params", "error", "says"),
    [
        (["x", "y" * 100_000], GREEDY, ContextTooLong, "maximum context length is 4096"),
        (["x", [1, 2]], GREEDY, None, ""),
        ([[1, 3072]], GREEDY, InvalidRequest, "outside 0 to 3071"),
        ([[]], GREEDY, InvalidRequest, "must not be empty"),
        (["x", 5], GREEDY, InvalidRequest, "prompts[1]"),
        (["x"], [GREEDY, GREEDY], ConfigError, "2 sampling parameters for 1 prompts"),
        (["x"], replace(GREEDY, stop=("",)), InvalidRequest, "stop"),
        (["x"], replace(GREEDY, stop_token_ids=(5000,)), InvalidRequest, "between 0 and 3071"),
        (["x"], replace(GREEDY, max_tokens=4096), ContextTooLong, "maximum context length"),
    ],
)
def test_what_is_wrong_is_said_and_the_next_call_works(
    llm: LLM, prompts: list[str], params: SamplingParams, error: type[Exception] | None, says: str
) -> None:
    if error is not None:
        with pytest.raises(error) as raised:
            llm.generate(prompts, params)
        assert says in str(raised.value)
    assert len(llm.generate(["x"], replace(GREEDY, max_tokens=2))) == 1


def test_more_prompts_than_run_at_once_and_more_than_the_pool_holds() -> None:
    wanted = [f"value {i} = " for i in range(260)]
    with LLM(str(MODEL), max_context=64, pages=40, threads=1, progress=False) as small:
        outputs = small.generate(wanted, replace(GREEDY, max_tokens=8, ignore_eos=True))
    assert [output.prompt for output in outputs] == wanted
    assert {len(output.outputs[0].token_ids) for output in outputs} == {8}


def test_it_works_where_a_loop_runs_already_and_ends_with_the_program() -> None:
    program = (
        "import asyncio, baton\n"
        "assert 'torch' not in __import__('sys').modules\n"
        f"llm = baton.LLM({str(MODEL)!r}, threads=1, progress=False)\n"
        "async def cell(): return llm.generate('x', baton.SamplingParams(max_tokens=3, ignore_eos=True))\n"
        "print(len(asyncio.run(cell())[0].outputs[0].token_ids))\n"  # and no close(): the program ends all the same
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def test_close_may_come_twice_and_ends_it(llm: LLM) -> None:
    other = LLM(str(MODEL), threads=1, max_context=64, progress=False)
    other.close()
    other.close()
    with pytest.raises(RuntimeError):
        other.generate("x")


def test_the_pool_is_sized_by_what_is_asked_and_what_is_free() -> None:
    def pages(available: int = 10**12, **wish: int) -> int:
        return load(MODEL, "auto", PoolWish(**wish), available=lambda: available).pages

    one, page_bytes = 1 + 4096 // 16, 4 * 6 * 2 * 16 * 32 * 2
    weights = 3_250_000 * 2 * 2  # more than they are
    assert pages() == 1 + 8 * 4096 // 16, "eight contexts"
    assert pages(pages=300) == 300
    assert pages(kv_bytes=300 * page_bytes) == 300
    assert pages(max_context_tokens=512) == 1 + 8 * 512 // 16
    assert pages(available=weights + one * page_bytes) == one, "a quarter is too little: one context all the same"
    assert one < pages(available=weights + 8 * one * page_bytes) < 3 * one, "at most a quarter"
    for wish in ({"pages": one - 1}, {"kv_bytes": 1000}, {"available": weights // 2}):
        with pytest.raises(TooLittleMemory):
            pages(**wish)
    with pytest.raises(ConfigError):
        pages(max_context_tokens=5000)
    with pytest.raises(ConfigError):
        pages(page_size=24)


def test_available_memory_minds_the_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4000 kB\nMemAvailable: 3000 kB\n")
    assert available_bytes(meminfo, tmp_path) == 3000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, tmp_path) == 3000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    assert available_bytes(meminfo, tmp_path) == 700_000
    assert available_bytes() > 0


def test_a_model_that_is_not_there_is_an_error_of_the_checkpoint() -> None:
    with pytest.raises(CheckpointError):
        LLM("/nowhere")
