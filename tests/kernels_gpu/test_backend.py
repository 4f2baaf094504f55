"""How a process comes by backend `triton`: options, the pool's size and place, and an engine that runs on it."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from baton import backends, loaded_model, serve
from baton.backends import Backend, backend_of
from baton.loaded_model import PoolWish
from baton.local_engine import EngineWish, LocalEngine, load_with_bar
from core.clock import monotonic_s
from core.errors import ConfigError, TooLittleMemory
from core.layout import PageLayout
from core.sampling import SamplingParams
from engine import device_pool
from engine.config import read_config
from engine.device_pool import (
    LargestStep,
    frames_over,
    largest_batches,
    pages_beside,
    pool_on_device,
    pool_over,
    step_bytes,
)
from engine.triton_ops import triton_ops
from engine.weights import load_model
from kvtransfer.device_cuda import CudaDevice
from kvtransfer.device_in_memory import InMemoryDevice
from kvtransfer.device_memory import DeviceMemory
from kvtransfer.digest import digest_page, plain
from kvtransfer.frames import PROOF_FRAMES, Frames
from router.generation import GenerationRequest
from tests.kernels_gpu.conftest import COMPILED
from tests.run_rows import prompt
from tests.tiny_models import MAX_POSITIONS, VOCABULARY, save_tiny

LAYOUT = PageLayout(2, 3, 16, 8, "float32")


@pytest.fixture(params=[False, True], ids=["no GPU", "GPU"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    monkeypatch.setenv(backends.INTERPRETER, "0")
    return bool(request.param)


def without(*names: str) -> Callable[[str], ModuleSpec | None]:
    return lambda name: None if name in names else find_spec("json" if name.startswith("cuda") else name)


def test_auto_takes_triton_where_a_gpu_is(
    gpu: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "find_spec", without())
    assert backend_of("auto", "auto") == (Backend("triton", "cuda") if gpu else Backend())
    assert backend_of("auto", "cpu") == Backend("torch", "cpu")
    assert backend_of("torch", "auto") == Backend("torch", "cpu")
    for missing in ("triton", "cuda", "cuda.bindings"):
        monkeypatch.setattr(backends, "find_spec", without(missing))
        assert backend_of("auto", "auto") == Backend("torch", "cpu")
    assert ("there is a GPU, and it is not used: cuda.bindings not installed" in caplog.text) == gpu


def test_what_cannot_be_is_refused_by_its_flag(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--backend torch" if gpu else "--device cuda"):
        backend_of("torch", "cuda")
    monkeypatch.setattr(backends, "find_spec", without("cuda.bindings"))
    with pytest.raises(ConfigError, match="cuda.bindings not installed" if gpu else "needs a GPU"):
        backend_of("triton", "auto")
    with pytest.raises(ConfigError, match="cuda.bindings not installed" if gpu else "--device cuda"):
        backend_of("auto", "cuda")
    monkeypatch.setenv(backends.INTERPRETER, "1")
    assert backend_of("triton", "cpu") == Backend("triton", "cpu"), "the interpreter needs no CUDA"
    monkeypatch.setattr(backends, "find_spec", without("triton"))
    with pytest.raises(ConfigError, match="triton not installed"):
        backend_of("triton", "cpu")


def test_a_pool_on_a_device_is_one_block(device: torch.device) -> None:
    pool = pool_on_device(LAYOUT, 5, device)
    assert pool.shape == (5, 2, 3, 2, 16, 8) and pool.is_contiguous() and not pool.any()
    assert pool.untyped_storage().nbytes() == 5 * LAYOUT.page_bytes
    memory = bytearray(3 * LAYOUT.page_bytes)
    frames_over(memoryview(memory), LAYOUT)[1] = 1.0
    assert not any(memory[: LAYOUT.page_bytes]) and any(memory[LAYOUT.page_bytes :])


def test_a_pool_lies_over_the_block_that_is_handed_off(device: torch.device) -> None:
    """What the engine writes there is what a peer fetches, and nothing else is in its tensor."""
    memory: DeviceMemory = CudaDevice() if COMPILED else InMemoryDevice()
    layout = PageLayout(2, 3, 16, 8, "bfloat16")
    frames = Frames.on_device(layout, 5, memory)
    assert frames.block is not None and frames.block.size_bytes == (5 + PROOF_FRAMES) * layout.page_bytes
    pool = pool_over(frames.block.address, layout, 5, device)
    assert pool.shape == (5, 2, 3, 2, 16, 8) and pool.is_contiguous() and not pool.any()
    pool[3] = torch.arange(pool[3].numel(), device=device).view(pool[3].shape)
    if COMPILED:
        torch.cuda.synchronize()
    content = pool[3].view(torch.uint8).cpu().numpy().tobytes()
    assert frames.digests([3], plain().of) == [digest_page(memoryview(content), layout, 0, plain().of)]
    frames.write(2, content)
    assert torch.equal(pool[2], pool[3]) and not pool[4].any()
    frames.epochs[4] = 7
    assert frames.epoch(4) == 7 and frames.epoch(frames.pattern) == 0
    with pytest.raises(AssertionError, match="on a device"):
        frames.buffer  # noqa: B018
    del pool
    frames.close()


def test_the_largest_step_runs_over_two_pages(tmp_path: Path, device: torch.device) -> None:
    model = load_model(save_tiny("llama3", tmp_path), device=str(device), ops=triton_ops())
    config = model.config
    layout = PageLayout(config.kv_heads, config.layers, 16, config.head_dim, "float32")
    step = LargestStep(tokens=40, rows=2)
    assert (step_bytes(model, layout, step, device) > 0) == (device.type == "cuda")
    long = largest_batches(LargestStep(MAX_POSITIONS + 5, 3), config, 16)
    assert [len(row.ids) for row in long[0].rows] == [MAX_POSITIONS, 5] and len(long[1].rows) == 3


def test_the_pool_takes_what_the_step_leaves() -> None:
    assert pages_beside(1000 * LAYOUT.page_bytes, 60 * LAYOUT.page_bytes, LAYOUT, 64) == 900
    with pytest.raises(TooLittleMemory, match="smaller steps"):
        pages_beside(1000 * LAYOUT.page_bytes, 958 * LAYOUT.page_bytes, LAYOUT, 64)


@pytest.mark.parametrize("share,free,wanted", [(1.0, 900, 838), (0.5, 900, 440), (0.5, 300, 238)])
def test_workers_that_share_a_gpu_take_a_part_of_it_each(
    share: float, free: int, wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is free counts only as far as the part reaches, weights included: the others may not have taken theirs."""
    monkeypatch.setattr(device_pool, "step_bytes", lambda *_: 60 * LAYOUT.page_bytes)
    monkeypatch.setattr(device_pool, "KEPT_SHARE", 0.0)
    page = LAYOUT.page_bytes
    says = {"mem_get_info": (free * page, 1200 * page), "memory_reserved": 98 * page, "empty_cache": None}
    for name, said in says.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, said=said: said)
    model = load_model(save_tiny("llama3", tmp_path))
    place = loaded_model._Place("cpu", share)
    assert loaded_model._pages_on_device(model, LAYOUT, 64, place, (512, 256), None) == wanted
    with pytest.raises(ConfigError, match="--gpu-share"):
        PoolWish(gpu_share=0.0)


def test_the_launcher_passes_on_what_computes_and_shares_the_gpu(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    args = parser.parse_args(["m", "--prefill", "1", "--decode", "3", "--backend", "triton", "--device", "cuda"])
    folder = save_tiny("llama3", tmp_path)
    workers = serve.Launcher(args, folder, read_config(folder), tmp_path)._workers()
    assert {(w.backend, w.device, w.gpu_share, w.transport) for w in workers} == {("triton", "cuda", 0.25, "local")}


def generated(folder: Path, backend: str, device: str) -> list[int]:
    wish = EngineWish("float32", PoolWish(pages=70), 1, 64, backend, device)
    loaded = load_with_bar(folder, wish, show=False)
    assert loaded.backend == Backend(backend, device)
    params = SamplingParams(max_tokens=4, temperature=0.8, top_k=40, seed=3, ignore_eos=True)
    request = GenerationRequest("a" * 32, tuple(prompt(20, VOCABULARY)), params, deadline_s=monotonic_s() + 600)

    async def run() -> list[int]:
        async with LocalEngine(loaded, wish) as generator:
            return [token.token_id async for step in generator.generate(request) for token in step.tokens]

    return asyncio.run(run())


def test_an_engine_on_the_backend_gives_the_reference_tokens(tmp_path: Path, device: torch.device) -> None:
    folder = save_tiny("llama3", tmp_path)
    expected = generated(folder, "torch", "cpu")
    assert len(expected) == 4 and generated(folder, "triton", device.type) == expected
