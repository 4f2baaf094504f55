"""The digest of each page segment, computed where the pages lie: XXH3 of 64 bits, seed 0, equal to the host's.

    frames [N, K, L, 2, P, D], pages [n], heads [low, high), constants from `digest_constants`
    →  digests [n, high - low, 8] uint8, each what xxhash.xxh3_64_digest gives for the segment [L, 2, P, D]

The algorithm, for inputs of more than 240 bytes: eight accumulators of 64 bits, one for each 8-byte lane of a 64-byte
stripe. A stripe adds to each accumulator a product of the halves of its lane, keyed by a secret that moves on by 8
bytes from stripe to stripe, and to its neighbour the lane itself. After 16 stripes (a block of 1024 bytes) the
accumulators are scrambled, which hangs each block on the one before. The last block is not scrambled; the last 64 bytes
count as a stripe with a key of its own. In the end the accumulators are folded into one number.

So what a block adds does not depend on other blocks. The first kernel reads the bytes and sums all blocks of all
segments at once, at the speed of memory; the second walks along each segment over these sums, a sixteenth of the bytes,
with scrambling between. Sums of at most SCRATCH_BYTES wait between the two: longer lists go in turns, small enough that
the second kernel finds the sums in the cache.

Shorter inputs take other ways through XXH3, so segments of 240 bytes or less are refused: those of one layer with 16
tokens and 3 bytes or less per token and head, which no model has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.segments import as_words, dense_segment, word_offset

LEAST_BYTES = 241
DIGEST_BYTES = 8
SCRATCH_BYTES = 16 << 20

STRIPE = tl.constexpr(8)  # words
STRIPES = tl.constexpr(16)  # of a block
BLOCKS = tl.constexpr(8)  # per program of the first kernel: 8 KB
SEGMENTS = tl.constexpr(16)  # per program of the second
AHEAD = tl.constexpr(16)  # blocks whose sums are loaded before their turn comes

PRIME32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
PRIME64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
START = (PRIME32[2], *PRIME64[:4], PRIME32[1], PRIME64[4], PRIME32[0])
SCRAMBLE_PRIME = tl.constexpr(PRIME32[0])
LENGTH_PRIME = tl.constexpr(PRIME64[0])
MIX_PRIME = tl.constexpr(0x165667919E3779F9)
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)

# Where the constants lie in the one tensor of them, in words of 8 bytes.
STRIPE_KEYS = tl.constexpr(0)  # stripe i of a block: 8 words from i on
SCRAMBLE_KEY = tl.constexpr(16)
LAST_KEY = tl.constexpr(24)  # of the last stripe
FOLD_KEY = tl.constexpr(32)
START_AT = tl.constexpr(40)
FOLD_KEY_BYTE, LAST_KEY_BYTE = 11, 121  # where they begin in the secret


def digest_constants(device: torch.device) -> torch.Tensor:
    """[48] int64: the secret as the kernels read it. Made once by who digests again and again."""
    pieces = (SECRET, SECRET[LAST_KEY_BYTE:][:64], SECRET[FOLD_KEY_BYTE:][:64])
    raw = b"".join((*pieces, *(word.to_bytes(8, "little") for word in START)))
    return torch.frombuffer(bytearray(raw), dtype=torch.int64).to(device)


@triton.jit
def _sum_blocks(
    frames, pages, constants, sums, heads,
    page_stride, head_stride, layer_stride, part_stride, slot_stride,
    LENGTH: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """What some blocks of one segment add to the accumulators: sums [segments, blocks, 8]. LENGTH in words."""
    block_words: tl.constexpr = STRIPES * STRIPE
    scrambled: tl.constexpr = (LENGTH - 1) // block_words  # blocks with a scramble after them; one more follows
    last_stripes: tl.constexpr = (
        LENGTH - 1 - scrambled * block_words
    ) // STRIPE  # of the last block, without the very last
    groups: tl.constexpr = (scrambled + BLOCKS) // BLOCKS
    segment, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    entry, head = segment // heads, (segment % heads).to(tl.int64)
    start = frames + tl.load(pages + entry).to(tl.int64) * page_stride + head * head_stride
    block = (group * BLOCKS + tl.arange(0, BLOCKS))[:, None, None, None]
    stripe = tl.arange(0, STRIPES)[None, :, None, None]
    lane = tl.arange(0, STRIPE // 2)[None, None, :, None] * 2 + tl.arange(0, 2)[None, None, None, :]
    is_last = (block == scrambled) & (stripe == STRIPES - 1)
    live = (block < scrambled) | ((block == scrambled) & ((stripe < last_stripes) | (stripe == STRIPES - 1)))
    word = block * block_words + stripe * STRIPE + lane
    if (scrambled + 1) * block_words != LENGTH:  # else the last stripe of all is the last of its block
        word = tl.where(is_last, LENGTH - STRIPE + lane, word)
    at = word_offset(word, layer_stride, part_stride, slot_stride, WIDTH, SLOTS, DENSE)
    data = tl.load(start + at, mask=live, other=0).to(tl.uint64, bitcast=True)
    key = tl.load(constants + STRIPE_KEYS + stripe + lane)
    key = tl.where(is_last, tl.load(constants + LAST_KEY + lane), key).to(tl.uint64, bitcast=True)
    keyed = data ^ key
    product = tl.where(live, (keyed & 0xFFFFFFFF) * (keyed >> 32), 0)
    even_data, odd_data = tl.split(tl.sum(data, axis=1))  # each [blocks, 4]
    even_product, odd_product = tl.split(tl.sum(product, axis=1))
    added = tl.join(even_product + odd_data, odd_product + even_data).to(tl.int64, bitcast=True)
    row = group * BLOCKS + tl.arange(0, BLOCKS)[:, None, None]
    lanes = tl.arange(0, STRIPE // 2)[None, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    to = sums + (segment.to(tl.int64) * (scrambled + 1) + row) * STRIPE + lanes
    tl.store(to, added, mask=row <= scrambled)


@triton.jit
def _scramble(accumulator, key):
    return (accumulator ^ (accumulator >> 47) ^ key) * SCRAMBLE_PRIME


@triton.jit
def _fold_blocks(sums, constants, digests, segments, LENGTH: tl.constexpr):
    """The sums of some segments, block after block, and their digests: [segments] int64, the first byte first."""
    scrambled: tl.constexpr = (LENGTH - 1) // (STRIPES * STRIPE)
    segment = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
    live = (segment < segments)[:, None]
    lane = tl.arange(0, STRIPE)[None, :]
    at = sums + segment.to(tl.int64)[:, None] * ((scrambled + 1) * STRIPE) + lane
    scramble_key = tl.load(constants + SCRAMBLE_KEY + lane).to(tl.uint64, bitcast=True)
    total = tl.load(constants + START_AT + lane + tl.zeros([SEGMENTS, 1], tl.int32)).to(tl.uint64, bitcast=True)
    for _ in range(scrambled // AHEAD):
        for ahead in tl.static_range(AHEAD):  # the loads of a turn do not wait for its scrambles
            added = tl.load(at + ahead * STRIPE, mask=live, other=0).to(tl.uint64, bitcast=True)
            total = _scramble(total + added, scramble_key)
        at += AHEAD * STRIPE
    for _ in range(scrambled % AHEAD):
        total = _scramble(total + tl.load(at, mask=live, other=0).to(tl.uint64, bitcast=True), scramble_key)
        at += STRIPE
    total += tl.load(at, mask=live, other=0).to(tl.uint64, bitcast=True)
    keyed = total ^ tl.load(constants + FOLD_KEY + lane).to(tl.uint64, bitcast=True)
    one, other = tl.split(tl.reshape(keyed, [SEGMENTS, STRIPE // 2, 2]))
    mixed = tl.sum((one * other) ^ tl.umulhi(one, other), axis=1)
    mixed += tl.full([SEGMENTS], LENGTH * 8, tl.uint64) * LENGTH_PRIME
    mixed = (mixed ^ (mixed >> 37)) * MIX_PRIME
    mixed = _first_byte_first(mixed ^ (mixed >> 32))
    tl.store(digests + segment, mixed.to(tl.int64, bitcast=True), mask=segment < segments)


@triton.jit
def _first_byte_first(number):
    """A digest is written from its highest byte on, memory from the lowest."""
    number = ((number & 0x00FF00FF00FF00FF) << 8) | ((number >> 8) & 0x00FF00FF00FF00FF)
    number = ((number & 0x0000FFFF0000FFFF) << 16) | ((number >> 16) & 0x0000FFFF0000FFFF)
    return (number << 32) | (number >> 32)


def segment_digests(
    frames: torch.Tensor,
    pages: torch.Tensor,
    low: int,
    high: int,
    constants: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """[n, high - low, 8] uint8. pages int32 or int64, each of the pool.

    Segments must be a multiple of 16 bytes, more than 240, and each vector of D a multiple of 8. Raises ValueError.
    """
    size = _check(frames, pages, low, high, constants)
    heads = high - low
    if out is None:
        out = torch.empty((len(pages), heads, DIGEST_BYTES), dtype=torch.uint8, device=frames.device)
    assert out.shape == (len(pages), heads, DIGEST_BYTES) and out.is_contiguous(), (out.shape, out.stride())
    assert out.dtype == torch.uint8 and out.device == frames.device, (out.dtype, out.device)
    (words,) = as_words(frames[:, low:high])
    length = size // 8
    blocks = (length - 1) // (STRIPES.value * STRIPE.value) + 1
    turn = max(1, SCRATCH_BYTES // (blocks * heads * STRIPE.value * 8))  # pages
    sums = torch.empty((min(turn, len(pages)) * heads, blocks, STRIPE.value), dtype=torch.int64, device=frames.device)
    digests = out.view(torch.int64).reshape(-1)
    for first in range(0, len(pages), turn):
        some = pages[first : first + turn]
        count = len(some) * heads
        _sum_blocks[(triton.cdiv(blocks, BLOCKS.value) * count,)](
            words, some, constants, sums, heads, *words.stride()[:5],
            LENGTH=length, WIDTH=words.shape[5], SLOTS=words.shape[4], DENSE=dense_segment(words),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        _fold_blocks[(triton.cdiv(count, SEGMENTS.value),)](
            sums, constants, digests[first * heads :], count, LENGTH=length, num_warps=4, enable_fp_fusion=False
        )
    return out


def _check(frames: torch.Tensor, pages: torch.Tensor, low: int, high: int, constants: torch.Tensor) -> int:
    """Bytes of a segment."""
    assert frames.dim() == 6 and frames.shape[3] == 2 and frames.stride(5) == 1, (frames.shape, frames.stride())
    assert 0 <= low < high <= frames.shape[1], (low, high, frames.shape)
    assert pages.dim() == 1 and pages.is_contiguous(), (pages.shape, pages.stride())
    assert pages.dtype in (torch.int32, torch.int64) and pages.device == frames.device, (pages.dtype, pages.device)
    assert constants.shape == (48,) and constants.dtype == torch.int64, (constants.shape, constants.dtype)
    assert constants.device == frames.device, (constants.device, frames.device)
    item = frames.element_size()
    size = frames.shape[2:].numel() * item
    if size < LEAST_BYTES or size % 16:
        raise ValueError(f"a segment of {size} bytes: the digest on the device takes multiples of 16 from 256 on")
    odd = [stride for stride in frames.stride()[:5] if stride * item % 8]
    if odd or frames.shape[5] * item % 8 or frames.data_ptr() % 8:
        raise ValueError(
            f"frames {tuple(frames.shape)} with strides {frames.stride()} of {item} bytes: not whole words of 8"
        )
    return size


def segment_digests_reference(frames: torch.Tensor, pages: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """By the library that the host digests with: the kernels do without it."""
    import xxhash

    bits = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[frames.element_size()]
    segments = frames.view(bits)[pages.long(), low:high].cpu().contiguous().flatten(2).numpy()
    digests = b"".join(xxhash.xxh3_64_digest(segment.tobytes()) for of_page in segments for segment in of_page)
    found = torch.frombuffer(bytearray(digests), dtype=torch.uint8) if digests else torch.empty(0, dtype=torch.uint8)
    return found.view(len(pages), high - low, DIGEST_BYTES).to(frames.device)
