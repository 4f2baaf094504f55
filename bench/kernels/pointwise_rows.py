"""The rows of what moves bytes and computes little: norms, gate, rotation with page write, segments, sampling."""

from __future__ import annotations

import torch

from bench.kernels.rows import Asked, Goal, Row, Work, close, same

COPY_GOAL = Goal(share=0.80)
SEGMENT_GOAL = Goal(share=0.85)
ALLOWED = 0.01  # of the largest value: one rounding to bfloat16
TOKENS, HIDDEN, FEED = 8192, 4096, 14336  # a large prefill step of Llama-3.1-8B
HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 32, 8, 128, 128256
EPS = 1e-5


def rows() -> list[Row]:
    return [
        Row("rms_norm", "TB/s", norm, COPY_GOAL),
        Row("add_rms_norm", "TB/s", add_norm, COPY_GOAL),
        Row("silu_mul", "TB/s", gate, COPY_GOAL),
        Row("rope_write", "TB/s", rotate, COPY_GOAL),
        Row("gather segments", "TB/s", gathered, SEGMENT_GOAL),
        Row("scatter segments", "TB/s", scattered, SEGMENT_GOAL),
        Row("digest of segments", "TB/s", digested),
        Row("sample greedy 64", "us", greedy, quick=False),
        Row("sample top-p 64", "us", drawn),
    ]


def normal(asked: Asked, *shape: int) -> torch.Tensor:
    """bfloat16, the same at each call."""
    generator = torch.Generator(asked.device).manual_seed(len(shape))
    return torch.randn(shape, generator=generator, device=asked.device).to(torch.bfloat16)


def norm(asked: Asked) -> Work:
    from kernels.gpu.rms_norm import rms_norm
    from kernels.rms_norm import rms_norm_reference

    tokens, width = (5, 96) if asked.small else (TOKENS, HIDDEN)
    x, weight = normal(asked, tokens, width), normal(asked, width)
    out = torch.empty_like(x)

    def check() -> None:
        close(rms_norm(x, weight, EPS, out), rms_norm_reference(x, weight, EPS), ALLOWED)

    return Work(
        lambda: rms_norm(x, weight, EPS, out), check, bytes=2 * x.nbytes,
        beside={"torch": lambda: torch.nn.functional.rms_norm(x, (width,), weight, EPS)},
    )  # fmt: skip


def add_norm(asked: Asked) -> Work:
    from kernels.gpu.rms_norm import add_rms_norm, add_rms_norm_reference

    tokens, width = (5, 96) if asked.small else (TOKENS, HIDDEN)
    x, residual, weight = normal(asked, tokens, width), normal(asked, tokens, width) * 0.5, normal(asked, width)
    out = torch.empty_like(x)

    def check() -> None:
        expected = add_rms_norm_reference(x, residual.clone(), weight, EPS)
        for found, right in zip(add_rms_norm(x, residual, weight, EPS, out), expected, strict=True):
            close(found, right, ALLOWED)

    return Work(lambda: add_rms_norm(x, residual, weight, EPS, out), check, bytes=4 * x.nbytes)


def gate(asked: Asked) -> Work:
    from kernels.gpu.silu_mul import silu_mul_packed, silu_mul_wide_reference

    tokens, width = (5, 96) if asked.small else (TOKENS, FEED)
    gate_up = normal(asked, tokens, 2 * width)
    out = torch.empty((tokens, width), dtype=gate_up.dtype, device=asked.device)
    opening, value = gate_up.chunk(2, dim=1)

    def check() -> None:
        close(silu_mul_packed(gate_up, out), silu_mul_wide_reference(opening, value), ALLOWED)

    return Work(
        lambda: silu_mul_packed(gate_up, out), check, bytes=3 * out.nbytes,
        beside={"torch": lambda: torch.nn.functional.silu(opening) * value},
    )  # fmt: skip


def rotate(asked: Asked) -> Work:
    from kernels.gpu.rope_write import rope_write, rope_write_reference
    from kernels.rope import inverse_frequencies

    tokens, heads, kv_heads, page_size = (24, 4, 2, 16) if asked.small else (TOKENS, HEADS, KV_HEADS, 16)
    q = normal(asked, tokens, heads, HEAD_DIM)
    k, v = normal(asked, tokens, kv_heads, HEAD_DIM), normal(asked, tokens, kv_heads, HEAD_DIM) * 2
    pages = -(-tokens // page_size)
    shape = (pages, kv_heads, 2, 2, page_size, HEAD_DIM)
    frames = torch.zeros(shape, dtype=torch.bfloat16, device=asked.device)
    place = torch.arange(tokens, dtype=torch.int32, device=asked.device)
    page, slot = place // page_size, place % page_size
    inv_freq = inverse_frequencies(HEAD_DIM, 500000.0).to(asked.device)

    def run() -> None:
        rope_write(q, k, v, place, inv_freq, frames, 1, page, slot)

    def check() -> None:
        right_q, right_frames = q.clone(), frames.clone()
        rope_write_reference(right_q, k, v, place, inv_freq, right_frames, 1, page, slot)
        run()
        close(q, right_q, ALLOWED)
        close(frames, right_frames, ALLOWED)

    return Work(run, check, bytes=2 * (q.nbytes + k.nbytes + v.nbytes))


def segments(asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of Llama-3.1-8B's frame [N, K, L, 2, P, D], and half of their numbers in no order: 1 GiB."""
    shape = (6, 2, 2, 2, 16, 64) if asked.small else (1024, KV_HEADS, 32, 2, 16, HEAD_DIM)
    frames = torch.empty(shape, dtype=torch.bfloat16, device=asked.device)
    for page in frames:
        page.normal_()
    order = torch.randperm(shape[0], generator=torch.Generator(asked.device).manual_seed(4), device=asked.device)
    return frames, order[: shape[0] // 2]


def gathered(asked: Asked) -> Work:
    from kernels.gpu.segments import gather_segments, gather_segments_reference

    frames, pages = segments(asked)
    heads = frames.shape[1]
    staging = torch.empty((len(pages), *frames.shape[1:]), dtype=frames.dtype, device=asked.device)

    def check() -> None:
        same(gather_segments(frames, pages, 0, heads, staging), gather_segments_reference(frames, pages, 0, heads))

    return Work(
        lambda: gather_segments(frames, pages, 0, heads, staging), check, bytes=2 * staging.nbytes,
        beside={"torch": lambda: torch.index_select(frames, 0, pages, out=staging)},
    )  # fmt: skip


def scattered(asked: Asked) -> Work:
    from kernels.gpu.segments import scatter_segments, scatter_segments_reference

    frames, pages = segments(asked)
    heads = frames.shape[1]
    staging = torch.ones((len(pages), *frames.shape[1:]), dtype=frames.dtype, device=asked.device)

    def check() -> None:
        expected = frames.clone()
        scatter_segments_reference(staging, expected, pages, 0, heads)
        scatter_segments(staging, frames, pages, 0, heads)
        same(frames, expected)

    return Work(
        lambda: scatter_segments(staging, frames, pages, 0, heads), check, bytes=2 * staging.nbytes,
        beside={"torch": lambda: frames.index_copy_(0, pages, staging)},
    )  # fmt: skip


def digested(asked: Asked) -> Work:
    from kernels.gpu.segment_digest import digest_constants, segment_digests, segment_digests_reference

    frames, pages = segments(asked)
    heads, constants = frames.shape[1], digest_constants(asked.device)
    out = torch.empty((len(pages), heads, 8), dtype=torch.uint8, device=asked.device)

    def run() -> torch.Tensor:
        return segment_digests(frames, pages, 0, heads, constants, out)

    def check() -> None:
        same(run(), segment_digests_reference(frames, pages, 0, heads))

    return Work(run, check, bytes=len(pages) * frames[0].nbytes)


def greedy(asked: Asked) -> Work:
    return sampled(asked, temperature=0.0, top_p=1.0)


def drawn(asked: Asked) -> Work:
    return sampled(asked, temperature=0.8, top_p=0.9)


def sampled(asked: Asked, temperature: float, top_p: float) -> Work:
    from kernels.gpu.sample import Draw, pack_draws, sample, sample_reference

    count, vocabulary = (3, 500) if asked.small else (64, VOCABULARY)
    logits = normal(asked, count, vocabulary) * 3
    draws = [Draw(row, temperature=temperature, top_p=top_p) for row in range(count)]
    packed = torch.from_numpy(pack_draws(draws)).to(asked.device)
    noise, filters = temperature > 0, top_p < 1

    def check() -> None:
        same(sample(logits, packed, noise, filters), sample_reference(logits, draws).to(asked.device))

    beside = {"torch argmax": lambda: logits.argmax(-1)} if not noise else {}
    return Work(lambda: sample(logits, packed, noise, filters), check, bytes=logits.nbytes, beside=beside)
