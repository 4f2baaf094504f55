"""`from baton import LLM`: a model in this process, without a server.

with LLM("models/baton-tiny") as llm:
    for output in llm.generate(["def add(a, b):"], SamplingParams(max_tokens=32)):
        print(output.outputs[0].text)
"""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeAlias

from tqdm import tqdm

from baton.checkpoint import locate
from baton.completer import Completer, Prepared
from baton.loaded_model import PoolWish
from baton.local_engine import EngineWish, LocalEngine, load_with_bar
from baton.loop_thread import LoopThread
from baton.model_facts import served_model
from baton.request_output import RequestOutput
from core.errors import ConfigError, InvalidRequest
from core.sampling import MAX_CHOICES, SamplingParams
from router.call import Call, Prompt
from router.limits import Limits
from router.openai_chat import conversation
from router.openai_completions import DEFAULT_MAX_TOKENS
from router.prompts import Prompts
from router.tokenizer import load_tokenizer
from router.validation import Fields, clean_text, token_ids

Params: TypeAlias = SamplingParams | Sequence[SamplingParams] | None
Message: TypeAlias = Mapping[str, Any]


class LLM:
    """One model, loaded when made, until `close`. Answers are those that a server with this model would give."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        max_context: int = 0,
        pages: int = 0,
        kv_bytes: int = 0,
        page_size: int = 16,
        step_tokens: int = 512,
        threads: int = 0,
        progress: bool = True,
    ) -> None:
        """`model`: a checkpoint's folder or its id on the hub; 0 leaves a size to the model and the machine.

        Raises CheckpointError, ConfigError and TooLittleMemory.
        """
        wish = EngineWish(dtype, PoolWish(page_size, pages, kv_bytes, max_context), threads, step_tokens)
        checkpoint = locate(model)
        self._served = served_model(checkpoint, "", max_context, int(time.time()))
        self._prompts = Prompts(load_tokenizer(checkpoint), self._served)
        engine = LocalEngine(load_with_bar(checkpoint, wish, progress), wish)
        self._loop = LoopThread("baton-llm")
        self._stack = AsyncExitStack()
        generator = self._loop.call(self._stack.enter_async_context(engine))
        self._completer: Completer | None = Completer(self._prompts, generator)  # None: closed
        self._close = weakref.finalize(self, _close, self._loop, self._stack, self._prompts)

    def generate(
        self, prompts: str | Sequence[str] | Sequence[Sequence[int]], params: Params = None, *, progress: bool = True
    ) -> list[RequestOutput]:
        """Completes each prompt, a text or token ids; the outputs are in the order of the prompts.

        Without `params` the model's own defaults hold, with 16 tokens. Raises InvalidRequest before anything is
        generated when a prompt or a parameter is wrong.
        """
        items = [prompts] if isinstance(prompts, str) else list(prompts)
        checked = [self._prompt(item, f"prompts[{i}]") for i, item in enumerate(items)]
        calls = [self._call(p, q, chat=False) for p, q in zip(checked, _spread(params, len(items)), strict=True)]
        return self._loop.call(self._run(calls, progress))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of several, through the model's chat template.

        Without `params` the model's own defaults hold, and the rest of the context is the limit.
        """
        several = bool(messages) and not isinstance(messages[0], Mapping)
        talks: Sequence[Any] = messages if several else [messages]
        checked = [conversation(Fields({"messages": list(map(dict, talk))}), Limits()) for talk in talks]
        calls = [self._call(p, q, chat=True) for p, q in zip(checked, _spread(params, len(talks)), strict=True)]
        return self._loop.call(self._run(calls, progress))

    def close(self) -> None:
        """Ends the engine and gives its memory back. A second call does nothing."""
        self._completer = None  # the last to hold the pool and the weights
        self._close()
        gc.collect()  # a worker's parts hold each other, and a pool is too large to wait for the collector

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prompt(self, prompt: object, param: str) -> Prompt:
        if isinstance(prompt, str):
            return clean_text(prompt, param)
        ids = list(prompt) if isinstance(prompt, Sequence) else prompt
        return token_ids(ids, param, self._served)

    def _call(self, prompt: Prompt, params: SamplingParams | None, *, chat: bool) -> Call:
        return Call(
            model=self._served.names[0],
            prompts=(prompt,),
            params=_checked(params or self._served.defaults),
            max_tokens=None if params is None else params.max_tokens,
            max_tokens_param="max_tokens",
            default_max_tokens=None if chat else DEFAULT_MAX_TOKENS,
            salt=b"",
            add_special_tokens=not chat,
            prompt_param="messages" if chat else "prompt",
        )

    async def _run(self, calls: Sequence[Call], progress: bool) -> list[RequestOutput]:
        """Checks all of them before the first runs."""
        completer = self._completer
        assert completer is not None, "the loop refuses work after close"
        prepared = [await completer.prepare(call) for call in calls]
        async with _bar(len(calls), progress) as bar:
            tasks = [asyncio.create_task(_complete(completer, item, bar)) for item in prepared]
            try:
                return list(await asyncio.gather(*tasks))
            finally:  # one has failed, or all are cancelled: nothing runs on
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


async def _complete(completer: Completer, prepared: Prepared, bar: tqdm[Any]) -> RequestOutput:
    output = await completer.complete(prepared)
    bar.update()
    return output


@asynccontextmanager
async def _bar(total: int, progress: bool) -> AsyncIterator[tqdm[Any]]:
    """One step per prompt; shown on a terminal only."""
    bar = tqdm(total=total, unit="prompt", desc="generating", disable=None if progress else True)
    try:
        yield bar
    finally:
        bar.close()


def _spread(params: Params, prompts: int) -> Sequence[SamplingParams | None]:
    """One for each prompt. Raises ConfigError."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * prompts
    if len(params) != prompts:
        raise ConfigError(f"{len(params)} sampling parameters for {prompts} prompts: give one, or one for each")
    return params


def _checked(params: SamplingParams) -> SamplingParams:
    """Python checks no types: a lone stop string is meant as one, not as its letters. Raises InvalidRequest."""
    stop: object = params.stop
    stops = (stop,) if isinstance(stop, str) else tuple(params.stop)
    if not all(stops):
        raise InvalidRequest("stop: must hold strings that are not empty", param="stop")
    assert params.n <= MAX_CHOICES
    return replace(params, stop=stops, stop_token_ids=tuple(params.stop_token_ids))


def _close(loop: LoopThread, stack: AsyncExitStack, prompts: Prompts) -> None:
    loop.call(stack.aclose())
    loop.close()
    prompts.tokenizer.close()
