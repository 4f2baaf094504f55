"""The next token of each draw, chosen where the logits are: temperature, top-k, top-p, min-p, Gumbel-max by Philox.

    logits [M, V] of any floating type, draws [C, FIELDS] int32 from `pack_draws`  →  ids [C] int64, on their device

Draw c is from logits row `row`: several choices of one request share a row. Temperature 0 is greedy. A row with a
number that is not finite gives -1. Nothing is synchronised with the host, and nothing depends on how the vocabulary is
split over the chip, so the outcome is a function of the logits and the draw.

The choice is that of engine.sampler for rows whose logits are taken as they are. What stays with the CPU path, row
by row, is for the caller to decide: penalties, bias, suppressed ids and masks change the logits first; logprobs and
typical-p are not computed here. Step for step the same as there:

    scaled = (logit - best) / temperature, in float32, division rounded to nearest; the best is 0
    top-k: all that are at least the k-th largest, equals included                                       exact
    nucleus: the mass before an id, likelier ones and equals of lower id, is below top_p                 see below
    min-p: scaled >= log(min_p)                                                                          exact
    noise: the 24-bit uniform of Philox4x32-10, two logarithms in float64, rounded to float32            see below
    the best of scaled + noise in float32, of equals the lowest id                                       exact

Two places can differ from the CPU. Its nucleus adds float32 probabilities in order; here masses are whole numbers of
2**-44, which add up the same in every order: an id whose mass before it is within about 1e-6 of top_p may fall on the
other side. And the float64 logarithm of a GPU may differ from the CPU's in its last bit, which moves the float32 noise
only where that bit decides the rounding: of the 2**24 noises a few at most, each by one unit in the last place.

top-k and top-p need no sort: a bisection over the bits of the scaled logits, of which those that any noise could lift
to the top are collected first. All scaled logits are <= 0, so their bits without the sign order them, best first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from kernels.gumbel import REACH, gumbel_noise

FIELDS = 9  # of a packed draw, in the order of Draw
MAX_VOCABULARY = 1 << 18  # the sum of so many masses of 2**44 stays below 2**63
BLOCK = 1024  # ids per turn of a program
LISTED = 8192  # likely scaled logits kept per draw; a draw with more reads its logits again and again
TARGET_PROGRAMS = 264  # two per multiprocessor of a large chip
MAX_SPLITS = 64
FUSED = False  # a bound that is a product is rounded before it is compared, in every kernel alike

_NEAR = REACH + 1e-3  # scaled logits below -_NEAR never win: engine.filters says the same
_LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)


class Draw(NamedTuple):
    """One token to choose. `seed` is 64 bits wide, signed; `position` is that of the new token."""

    row: int
    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0
    position: int = 0

    @property
    def filters(self) -> bool:
        return self.temperature > 0.0 and (self.top_k > 0 or self.top_p < 1.0)


def pack_draws(draws: Sequence[Draw]) -> npt.NDArray[np.int32]:
    """[C, FIELDS]: what the kernels read. Floats as their bits; min_p as its logarithm."""
    packed = np.zeros((len(draws), FIELDS), dtype=np.int32)
    if not draws:
        return packed
    rows, temperatures, top_k, top_p, min_p, seeds, choices, positions = zip(*draws, strict=True)
    packed[:, 0] = rows
    packed[:, 1] = _bits([0.0 if t == 0.0 else max(t, _LEAST_TEMPERATURE) for t in temperatures])
    packed[:, 2] = top_k
    packed[:, 3] = _bits(top_p)
    packed[:, 4] = _bits([-math.inf if p == 0.0 else math.log(p) for p in min_p])
    packed[:, 5:7] = np.array(seeds, dtype=np.int64).view(np.int32).reshape(-1, 2)  # low word, high word
    packed[:, 7] = choices
    packed[:, 8] = positions
    return packed


def _bits(values: Sequence[float]) -> npt.NDArray[np.int32]:
    return np.array(values, dtype=np.float32).view(np.int32)


def sample_reference(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """[C] int64 on the CPU, by sorting, in the words of the contract."""
    return torch.tensor([_choose(logits[draw.row].float().cpu().numpy(), draw) for draw in draws], dtype=torch.int64)


def _choose(logits: npt.NDArray[np.float32], draw: Draw) -> int:
    if not np.isfinite(logits).all():
        return -1
    if draw.temperature == 0.0:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / np.float32(max(draw.temperature, _LEAST_TEMPERATURE))
    order = np.argsort(-scaled, kind="stable")
    if 0 < draw.top_k < len(order):
        order = order[: np.count_nonzero(scaled >= scaled[order[draw.top_k - 1]])]
    if draw.top_p < 1.0:
        mass = np.exp(scaled[order].astype(np.float64))
        before = np.cumsum(mass) - mass
        order = order[before < np.float64(np.float32(draw.top_p)) * mass.sum()]
    if draw.min_p > 0.0:
        order = order[scaled[order] >= np.float32(math.log(draw.min_p))]
    ids = np.sort(order)
    noisy = scaled[ids] + gumbel_noise(ids, draw.seed, draw.choice, draw.position)
    return int(ids[noisy.argmax()])


# --- what is read ----------------------------------------------------------------------------------------------------


@triton.jit
def _field(draws, draw, index: tl.constexpr):
    return tl.load(draws + draw * 9 + index)


@triton.jit
def _number(draws, draw, index: tl.constexpr):
    return tl.load(draws + draw * 9 + index).to(tl.float32, bitcast=True)


@triton.jit
def _row(logits, row_stride, draws, draw):
    return logits + _field(draws, draw, 0).to(tl.int64) * row_stride


@triton.jit
def _best_of_row(best, draw, splits, SPLITS: tl.constexpr):
    """The largest logit; NaN when one is not finite."""
    index = tl.arange(0, SPLITS)
    parts = tl.load(best + draw * splits + index, mask=index < splits, other=float("-inf"))
    spoiled = tl.sum((parts != parts).to(tl.int32), 0) > 0
    return tl.where(spoiled, float("nan"), tl.max(tl.where(parts != parts, 0.0, parts), 0))


@triton.jit
def _scaled(row, ids, inside, top, temperature):
    """(logit - best) / temperature as the CPU rounds it; -inf outside."""
    value = tl.load(row + ids, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, tl.div_rn(value - top, temperature), float("-inf"))


# --- the best logit --------------------------------------------------------------------------------------------------


@triton.jit
def _best_kernel(
    logits, row_stride, draws, best, best_ids, vocabulary, splits, chunk,
    BLOCK: tl.constexpr,
):  # fmt: skip
    draw, split = tl.program_id(0), tl.program_id(1)
    row = _row(logits, row_stride, draws, draw)
    first = split * chunk
    last = tl.minimum(first + chunk, vocabulary)
    top, top_id, spoiled = float("-inf"), first, 0
    for start in range(first, last, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        inside = ids < last
        value = tl.load(row + ids, mask=inside, other=0.0).to(tl.float32)
        spoiled += tl.sum((inside & ~(tl.abs(value) <= 3.4028234663852886e38)).to(tl.int32), 0)
        value = tl.where(inside, value, float("-inf"))
        here = tl.max(value, 0)
        here_id = tl.min(tl.where(value == here, ids, vocabulary), 0)
        better = here > top  # ids ascend: of equals the first stays
        top = tl.where(better, here, top)
        top_id = tl.where(better, here_id, top_id)
    tl.store(best + draw * splits + split, tl.where(spoiled > 0, float("nan"), top))
    tl.store(best_ids + draw * splits + split, top_id)


# --- top-k and top-p -------------------------------------------------------------------------------------------------


@triton.jit
def _is_filtered(draws, draw, vocabulary):
    top_k = _field(draws, draw, 2)
    return (_number(draws, draw, 1) > 0.0) & (((top_k > 0) & (top_k < vocabulary)) | (_number(draws, draw, 3) < 1.0))


@triton.jit
def _list_kernel(
    logits, row_stride, draws, best, listed, counts, vocabulary, splits, chunk,
    NEAR: tl.constexpr, LISTED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Collects what noise could lift to the top. In any order: only counts and whole sums are taken of it."""
    draw, split = tl.program_id(0), tl.program_id(1)
    if _is_filtered(draws, draw, vocabulary):
        row = _row(logits, row_stride, draws, draw)
        top = _best_of_row(best, draw, splits, SPLITS)
        temperature = _number(draws, draw, 1)
        first = split * chunk
        last = tl.minimum(first + chunk, vocabulary)
        for start in range(first, last, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            scaled = _scaled(row, ids, ids < last, top, temperature)
            near = (scaled >= -NEAR).to(tl.int32)
            found = tl.sum(near, 0)
            if found > 0:
                place = tl.atomic_add(counts + draw, found) + tl.cumsum(near, 0) - 1
                tl.store(listed + draw * LISTED + place, scaled, mask=(near > 0) & (place < LISTED))


@triton.jit
def _count_up_to(bound, from_list, listed, row, size, top, temperature, BLOCK: tl.constexpr):
    """How many have a magnitude of at most `bound`."""
    total = 0
    for start in range(0, size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        inside = ids < size
        if from_list:
            scaled = tl.load(listed + ids, mask=inside, other=float("-inf"))
        else:
            scaled = _scaled(row, ids, inside, top, temperature)
        magnitude = scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        total += tl.sum((inside & (magnitude <= bound)).to(tl.int32), 0)
    return total


@triton.jit
def _mass_below(bound, from_list, listed, row, size, top, temperature, BLOCK: tl.constexpr):
    """The mass of all whose magnitude is less than `bound`, in units of 2**-44."""
    total = tl.zeros((), dtype=tl.int64)
    for start in range(0, size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        inside = ids < size
        if from_list:
            scaled = tl.load(listed + ids, mask=inside, other=float("-inf"))
        else:
            scaled = _scaled(row, ids, inside, top, temperature)
        magnitude = scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        mass = (tl.exp(scaled) * 17592186044416.0).to(tl.int64)
        total += tl.sum(tl.where(inside & (magnitude < bound), mass, 0), 0)
    return total


@triton.jit
def _equals_up_to(last_id, magnitude, row, top, temperature, BLOCK: tl.constexpr):
    """How many ids up to `last_id` have this magnitude."""
    total = 0
    for start in range(0, last_id + 1, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        inside = ids <= last_id
        own = _scaled(row, ids, inside, top, temperature).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        total += tl.sum((inside & (own == magnitude)).to(tl.int32), 0)
    return total


@triton.jit
def _bounds_kernel(
    logits, row_stride, draws, best, listed, counts, bounds, vocabulary, splits,
    NEAR_BITS: tl.constexpr, LISTED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """bounds [C, 2]: the largest magnitude that stays, and the last id that stays of those that have it."""
    draw = tl.program_id(0)
    furthest = tl.full((), NEAR_BITS, tl.int32)
    last_id = vocabulary
    if _is_filtered(draws, draw, vocabulary):
        row = _row(logits, row_stride, draws, draw)
        mine = listed + draw * LISTED
        top = _best_of_row(best, draw, splits, SPLITS)
        temperature, top_k, top_p = _number(draws, draw, 1), _field(draws, draw, 2), _number(draws, draw, 3)
        count = tl.load(counts + draw)
        fits = count <= LISTED
        infinity = tl.full((), 0x7F800000, tl.int32)
        least = infinity  # magnitude of the k-th largest
        if (top_k > 0) & (top_k < vocabulary):
            from_list = fits & (count >= top_k)
            size = tl.where(from_list, count, vocabulary)
            low = tl.zeros((), tl.int32)  # the least bound with k of them is in low .. least
            while low < least:
                middle = low + (least - low) // 2
                enough = _count_up_to(middle, from_list, mine, row, size, top, temperature, BLOCK) >= top_k
                least = tl.where(enough, middle, least)
                low = tl.where(enough, low, middle + 1)
        furthest = tl.minimum(furthest, least)
        if top_p < 1.0:
            of_list = fits & (least <= NEAR_BITS)
            size = tl.where(of_list, count, vocabulary)
            total = _mass_below(least + 1, of_list, mine, row, size, top, temperature, BLOCK)
            limit = top_p.to(tl.float64) * total.to(tl.float64)
            size = tl.where(fits, count, vocabulary)
            low = tl.zeros((), tl.int32)  # the largest bound with less than the limit before it is in low .. furthest
            while low < furthest:
                middle = furthest - (furthest - low) // 2
                mass = _mass_below(middle, fits, mine, row, size, top, temperature, BLOCK)
                stays = mass.to(tl.float64) < limit
                low = tl.where(stays, middle, low)
                furthest = tl.where(stays, furthest, middle - 1)
            before = _mass_below(furthest, fits, mine, row, size, top, temperature, BLOCK)
            equals = _count_up_to(furthest, fits, mine, row, size, top, temperature, BLOCK)
            equals -= _count_up_to(furthest - 1, fits, mine, row, size, top, temperature, BLOCK)
            each = (tl.exp((furthest | -2147483648).to(tl.float32, bitcast=True)) * 17592186044416.0).to(tl.int64)
            room = tl.ceil((limit - before.to(tl.float64)) / tl.maximum(each, 1).to(tl.float64))
            if room < equals.to(tl.float64):  # the nucleus ends between equals
                kept = room.to(tl.int32)
                first = tl.zeros((), tl.int32)
                last_id = vocabulary - 1
                while first < last_id:
                    middle = (first + last_id) // 2
                    enough = _equals_up_to(middle, furthest, row, top, temperature, BLOCK) >= kept
                    last_id = tl.where(enough, middle, last_id)
                    first = tl.where(enough, first, middle + 1)
    tl.store(bounds + draw * 2, furthest)
    tl.store(bounds + draw * 2 + 1, last_id)


# --- noise -----------------------------------------------------------------------------------------------------------


@triton.jit
def _noise(first, draws, draw, BLOCK: tl.constexpr):
    """Gumbel noise [BLOCK] float32 of the ids first .. first + BLOCK - 1; `first` is a multiple of 4.

    Each counter gives four ids their words: kernels.philox in 32-bit arithmetic.
    """
    a = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    d = a ^ a
    b = d + tl.load(draws + draw * 9 + 8).to(tl.uint32)  # position
    c = d + tl.load(draws + draw * 9 + 7).to(tl.uint32)  # choice
    key_0 = tl.load(draws + draw * 9 + 5).to(tl.uint32, bitcast=True)
    key_1 = tl.load(draws + draw * 9 + 6).to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        high, low = tl.umulhi(a, 0xD2511F53), a * 0xD2511F53
        a = tl.umulhi(c, 0xCD9E8D57) ^ b ^ key_0
        b = c * 0xCD9E8D57
        c = high ^ d ^ key_1
        d = low
        key_0 = key_0 + 0x9E3779B9
        key_1 = key_1 + 0xBB67AE85
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,))  # a, b, c, d of each counter in turn
    uniform = ((words >> 8).to(tl.float64) + 0.5) * 5.9604644775390625e-08
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def _draw_kernel(
    logits, row_stride, draws, best, best_ids, bounds, noisy, noisy_ids, vocabulary, splits, chunk,
    FILTERS: tl.constexpr, NEAR_BITS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    draw, split = tl.program_id(0), tl.program_id(1)
    place = draw * splits + split
    temperature = _number(draws, draw, 1)
    if temperature == 0.0:
        tl.store(noisy + place, tl.load(best + place))
        tl.store(noisy_ids + place, tl.load(best_ids + place))
    else:
        row = _row(logits, row_stride, draws, draw)
        top = _best_of_row(best, draw, splits, SPLITS)
        least = _number(draws, draw, 4)
        furthest = tl.full((), NEAR_BITS, tl.int32)
        last_id = vocabulary
        if FILTERS:
            furthest = tl.load(bounds + draw * 2)
            last_id = tl.load(bounds + draw * 2 + 1)
        first = split * chunk
        last = tl.minimum(first + chunk, vocabulary)
        winner, winner_id = float("-inf"), first
        for start in range(first, last, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            inside = ids < last
            scaled = _scaled(row, ids, inside, top, temperature)
            magnitude = scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            stays = inside & (scaled >= least)
            stays &= (magnitude < furthest) | ((magnitude == furthest) & (ids <= last_id))
            if tl.sum(stays.to(tl.int32), 0) > 0:  # most blocks of a sure model hold no candidate
                value = tl.where(stays, scaled + _noise(start, draws, draw, BLOCK), float("-inf"))
                here = tl.max(value, 0)
                here_id = tl.min(tl.where(value == here, ids, vocabulary), 0)
                better = here > winner
                winner = tl.where(better, here, winner)
                winner_id = tl.where(better, here_id, winner_id)
        tl.store(noisy + place, tl.where(top == top, winner, float("nan")))
        tl.store(noisy_ids + place, winner_id)


@triton.jit
def _pick_kernel(best, best_ids, out, vocabulary, splits, SPLITS: tl.constexpr):
    draw = tl.program_id(0)
    top = _best_of_row(best, draw, splits, SPLITS)
    index = tl.arange(0, SPLITS)
    inside = index < splits
    values = tl.load(best + draw * splits + index, mask=inside, other=float("-inf"))
    ids = tl.load(best_ids + draw * splits + index, mask=inside, other=vocabulary)
    chosen = tl.min(tl.where(inside & (values == top), ids, vocabulary), 0)
    tl.store(out + draw, tl.where(top == top, chosen, -1).to(tl.int64))


# --- the launcher ----------------------------------------------------------------------------------------------------


def sample(
    logits: torch.Tensor,
    draws: torch.Tensor,
    noise: bool = True,
    filters: bool = True,
    out: torch.Tensor | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """[C] int64. `noise` False: all draws are greedy; `filters` False: none has top-k or top-p.

    Both only leave kernels out that would have nothing to do: five launches at most, two when all are greedy.
    """
    assert logits.dim() == 2 and logits.stride(1) == 1 and logits.is_floating_point(), (logits.shape, logits.stride())
    assert draws.dim() == 2 and draws.shape[1] == FIELDS and draws.is_contiguous(), (draws.shape, draws.stride())
    assert draws.dtype == torch.int32 and draws.device == logits.device, (draws.dtype, draws.device, logits.device)
    count, vocabulary, device = draws.shape[0], logits.shape[1], logits.device
    assert 0 < vocabulary <= MAX_VOCABULARY, vocabulary
    ids = torch.empty(count, dtype=torch.int64, device=device) if out is None else out
    assert ids.shape == (count,) and ids.dtype == torch.int64 and ids.is_contiguous(), (ids.shape, ids.dtype)
    if not count:
        return ids
    blocks = -(-vocabulary // BLOCK)
    wanted = splits or -(-TARGET_PROGRAMS // count)
    chunk = -(-blocks // min(blocks, wanted, MAX_SPLITS)) * BLOCK
    splits = -(-vocabulary // chunk)
    padded = triton.next_power_of_2(splits)
    grid, common = (count, splits), (logits, logits.stride(0), draws)
    best, best_ids = _partials(count, splits, device)
    _best_kernel[grid](*common, best, best_ids, vocabulary, splits, chunk, BLOCK=BLOCK, enable_fp_fusion=FUSED)
    if noise:
        near_bits = int(np.float32(_NEAR).view(np.int32))
        bounds = draws  # not read without filters
        if filters:
            listed = torch.empty(count, LISTED, dtype=torch.float32, device=device)
            counts = torch.zeros(count, dtype=torch.int32, device=device)
            bounds = torch.empty(count, 2, dtype=torch.int32, device=device)
            _list_kernel[grid](
                *common, best, listed, counts, vocabulary, splits, chunk,
                NEAR=_NEAR, LISTED=LISTED, SPLITS=padded, BLOCK=BLOCK, enable_fp_fusion=FUSED,
            )  # fmt: skip
            _bounds_kernel[(count,)](
                *common, best, listed, counts, bounds, vocabulary, splits,
                NEAR_BITS=near_bits, LISTED=LISTED, SPLITS=padded, BLOCK=BLOCK, enable_fp_fusion=FUSED,
            )  # fmt: skip
        noisy, noisy_ids = _partials(count, splits, device)
        _draw_kernel[grid](
            *common, best, best_ids, bounds, noisy, noisy_ids, vocabulary, splits, chunk,
            FILTERS=filters, NEAR_BITS=near_bits, SPLITS=padded, BLOCK=BLOCK, enable_fp_fusion=FUSED,
        )  # fmt: skip
        best, best_ids = noisy, noisy_ids
    _pick_kernel[(count,)](best, best_ids, ids, vocabulary, splits, SPLITS=padded, enable_fp_fusion=FUSED)
    return ids


def _partials(count: int, splits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.empty(count, splits, dtype=torch.float32, device=device)
    return values, torch.empty(count, splits, dtype=torch.int32, device=device)
