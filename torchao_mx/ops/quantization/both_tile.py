"""Device functions on a tile that is quantized along its rows or along its columns: ``quantization/quantize_both.py``'s.

They restate ``reference/recipes.py``, and use ``tile.py`` for blocks and elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchao_mx.ops.quantization import tile
from torchao_mx.reference import recipes

PHILOX_ROUNDS = tl.constexpr(recipes.PHILOX_ROUNDS)


@triton.jit
def random_words(seed, row, k0, TILE_K: tl.constexpr):
    """``[rows, TILE_K]`` words of ``reference.random_words``, from the columns ``k0`` on."""
    four = (k0 // 4 + tl.arange(0, TILE_K // 4))[None, :]
    none = row[:, None] * 0 + four * 0
    counter = none + four, none + row[:, None], none, none
    a, b, c, d = tl.philox(seed, *counter, n_rounds=PHILOX_ROUNDS)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # flattened, a b c d
    return words.to(tl.int32, bitcast=True).reshape(row.shape[0], TILE_K)


@triton.jit
def round_stochastically(y, random, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr,
                         ELEM_MAX: tl.constexpr):  # fmt: skip
    """``reference.round_stochastically``: y on the grid of the elements. A NaN, of a block of them, is lost."""
    SMALLEST: tl.constexpr = 2.0 ** (2 - (1 << (EXPONENT_BITS - 1)))
    DROPPED: tl.constexpr = 23 - MANTISSA_BITS
    magnitude = tl.minimum(tl.abs(y), ELEM_MAX)
    is_small = magnitude < SMALLEST
    bits = tile.bits_of(tl.where(is_small, magnitude + SMALLEST, magnitude))
    grid = tile.float_of((bits + random) & -(1 << DROPPED))
    grid = tl.where(is_small, grid - SMALLEST, grid)
    return tile.float_of(tile.bits_of(grid) | (tile.bits_of(y) & (-2147483648)))


@triton.jit
def values(y, scale, RANDOM: tl.constexpr, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr,
           ELEM_MAX: tl.constexpr, FP8_INSTRUCTIONS: tl.constexpr):  # fmt: skip
    """What the codes of ``y`` stand for, by the fewest instructions; RANDOM has rounded y already."""
    if RANDOM:
        pass
    elif EXPONENT_BITS > 2 and FP8_INSTRUCTIONS:
        code = tile.encode(y, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX, FP8_INSTRUCTIONS)
        y = tile.decode(code, EXPONENT_BITS, MANTISSA_BITS, FP8_INSTRUCTIONS)
    else:
        grid = tile.round_to_grid(y, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX)
        y = tile.float_of(tile.bits_of(grid) | (tile.bits_of(y) & (-2147483648)))
    return y * scale


@triton.jit
def rows_in_order(TILE_M: tl.constexpr, BLOCK: tl.constexpr, STACK: tl.constexpr):
    """The order in which a tile holds its rows: ``[4, STACK, blocks, BLOCK / 4 / STACK]`` of rows 4 apart.

    Triton gives the last axes to threads and warps and the first ones to a thread's registers. So a thread holds
    four neighbours of a column, which it packs, and STACK of those of a block, for which it computes a scale once.
    """
    QUADS: tl.constexpr = BLOCK // 4 // STACK
    BLOCKS: tl.constexpr = TILE_M // BLOCK
    at = tl.arange(0, TILE_M)
    quad, block = at % QUADS, at // QUADS % BLOCKS
    stacked, row = at // (QUADS * BLOCKS) % STACK, at // (TILE_M // 4)
    return block * BLOCK + (stacked * QUADS + quad) * 4 + row


@triton.jit
def encode_fours(y, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, ELEM_MAX: tl.constexpr,
                 FP8_INSTRUCTIONS: tl.constexpr):  # fmt: skip
    """``[4, R, C]`` to ``[R, C]`` words (int32) of four codes, the first in the lowest bits."""
    BITS: tl.constexpr = 1 + EXPONENT_BITS + MANTISSA_BITS
    first, second = tl.split(y.reshape(2, 2, y.shape[1], y.shape[2]).permute(0, 2, 3, 1))
    two = tile.encode_two(first, second, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX, FP8_INSTRUCTIONS)
    return tl.sum(two << (tl.arange(0, 2) * 2 * BITS)[:, None, None], axis=0)


@triton.jit
def store_row_words(x_ptr, index_ptr, q_ptr, s_ptr, pts_ptr, m0, M, k0, K, stride_m, stride_k,
                    EVEN: tl.constexpr, GATHERED: tl.constexpr, TILE_M: tl.constexpr,
                    TILE_K: tl.constexpr, PER_TENSOR: tl.constexpr, MODE: tl.constexpr,
                    SHORT_MANTISSA: tl.constexpr, EXPONENT_BITS: tl.constexpr,
                    MANTISSA_BITS: tl.constexpr, MAX_EXPONENT: tl.constexpr, ELEM_MAX: tl.constexpr,
                    BLOCK: tl.constexpr, E8M0: tl.constexpr,
                    FP8_INSTRUCTIONS: tl.constexpr):  # fmt: skip
    """The tile's rows in e2m1: loaded so that a thread holds whole blocks, and computes each scale once."""
    BLOCKS: tl.constexpr = TILE_K // BLOCK
    WORDS: tl.constexpr = BLOCK // 8
    at = tl.arange(0, TILE_M * BLOCKS)
    row = m0 + at // BLOCKS
    inside = row < M
    if GATHERED:
        row = tl.load(index_ptr + row, mask=inside, other=-1)
        inside &= row >= 0
    row = row.to(tl.int64)
    block = k0 // BLOCK + at % BLOCKS
    inside = inside & (block < K // BLOCK) | EVEN
    word = tl.arange(0, WORDS)
    elem = (word * 8)[None, :, None] + tl.arange(0, 8)[None, None, :]
    x_ptrs = (x_ptr + row * stride_m + (block * BLOCK).to(tl.int64) * stride_k)[
        :, None, None
    ] + elem * stride_k
    x = tl.load(x_ptrs, mask=inside[:, None, None], other=0.0).to(tl.float32)
    pts = tile.load_per_tensor_scale(pts_ptr, 0, PER_TENSOR)
    amax = tile.max_magnitude(tile.max_magnitude(x, 2, FP8_INSTRUCTIONS), 1, FP8_INSTRUCTIONS)
    byte, multiplier = tile.block_scale(
        amax, pts, MODE, SHORT_MANTISSA, EXPONENT_BITS, MANTISSA_BITS, MAX_EXPONENT, ELEM_MAX, E8M0,
        FP8_INSTRUCTIONS,
    )  # fmt: skip
    # Behind the words these stores would keep registers: a tenth slower on an H200.
    tl.store(s_ptr + row * (K // BLOCK) + block, byte.to(tl.uint8), mask=inside)
    packed = tile.encode_words(x * multiplier[:, None, None])
    is_nan = (byte == (255 if E8M0 else 0x7F))[:, None]
    packed = tl.where(is_nan, tile.E2M1_NAN_WORD, packed)
    q_ptrs = (q_ptr + row * (K // 8) + block * WORDS)[:, None] + word[None, :]
    tl.store(q_ptrs, packed, mask=inside[:, None])


@triton.jit
def store_rows(x, words, q_ptr, s_ptr, v_ptr, pts_ptr, row, inside_m, k0, k, inside_k, K,
               EVEN: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr, PACKED: tl.constexpr, VALUES: tl.constexpr,
               PER_TENSOR: tl.constexpr, MODE: tl.constexpr, SHORT_MANTISSA: tl.constexpr,
               RANDOM: tl.constexpr, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr,
               MAX_EXPONENT: tl.constexpr, ELEM_MAX: tl.constexpr, BLOCK: tl.constexpr,
               E8M0: tl.constexpr, FP8_INSTRUCTIONS: tl.constexpr):  # fmt: skip
    """A tile ``x [TILE_M, TILE_K]`` in blocks along K, to the rows ``row [TILE_M]`` (int64); PACKED: fp8."""
    BLOCKS: tl.constexpr = TILE_K // BLOCK
    x = x.reshape(TILE_M * BLOCKS, BLOCK)
    pts = tile.load_per_tensor_scale(pts_ptr, 0, PER_TENSOR)
    byte, multiplier = tile.block_scale(
        tile.max_magnitude(x, 1, FP8_INSTRUCTIONS), pts, MODE, SHORT_MANTISSA, EXPONENT_BITS, MANTISSA_BITS,
        MAX_EXPONENT, ELEM_MAX, E8M0, FP8_INSTRUCTIONS,
    )  # fmt: skip
    y = x * multiplier[:, None]
    if RANDOM:
        random = (words & ((1 << (23 - MANTISSA_BITS)) - 1)).reshape(TILE_M * BLOCKS, BLOCK)
        y = round_stochastically(y, random, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX)
    if PACKED:
        if RANDOM:
            y = tl.where((byte == 255)[:, None], float("nan"), y)
        block = k0 // BLOCK + tl.arange(0, BLOCKS)
        s_ptrs = s_ptr + row[:, None] * (K // BLOCK) + block[None, :]
        mask = inside_m[:, None] & ((block < K // BLOCK) | EVEN)[None, :]
        tl.store(s_ptrs, byte.to(tl.uint8).reshape(TILE_M, BLOCKS), mask=mask)
        packed = tile.encode_bytes(y, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX, FP8_INSTRUCTIONS)
        q_ptrs = q_ptr + row[:, None] * K + k[None, :]
        mask = inside_m[:, None] & inside_k[None, :]
        tl.store(q_ptrs, packed.reshape(TILE_M, TILE_K), mask=mask)
    if VALUES:
        scale = tile.scale_value(byte, pts, E8M0, FP8_INSTRUCTIONS)
        value = values(
            y, scale[:, None], RANDOM, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX, FP8_INSTRUCTIONS
        )
        v_ptrs = v_ptr + row[:, None] * K + k[None, :]
        value = value.to(v_ptr.dtype.element_ty).reshape(TILE_M, TILE_K)
        tl.store(v_ptrs, value, mask=inside_m[:, None] & inside_k[None, :])


@triton.jit
def store_columns(x, words, q_ptr, s_ptr, v_ptr, pts_ptr, m0, m, M, k, inside_k, K,
                  EVEN: tl.constexpr, STACK: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
                  PACKED: tl.constexpr, VALUES: tl.constexpr,
                  PER_TENSOR: tl.constexpr, MODE: tl.constexpr, SHORT_MANTISSA: tl.constexpr,
                  RANDOM: tl.constexpr, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr,
                  MAX_EXPONENT: tl.constexpr, ELEM_MAX: tl.constexpr, BLOCK: tl.constexpr,
                  E8M0: tl.constexpr, FP8_INSTRUCTIONS: tl.constexpr):  # fmt: skip
    """A tile ``x [TILE_M, TILE_K]``, its rows :func:`rows_in_order`, in blocks along M; packed, transposed."""
    BITS: tl.constexpr = 1 + EXPONENT_BITS + MANTISSA_BITS
    BLOCKS: tl.constexpr = TILE_M // BLOCK
    QUADS: tl.constexpr = BLOCK // 4 // STACK
    shape: tl.constexpr = (4, STACK, BLOCKS, QUADS, TILE_K)
    x = x.reshape(shape)
    pts = tile.load_per_tensor_scale(pts_ptr, 0, PER_TENSOR)
    amax = tile.max_magnitude(tile.max_magnitude(x, 0, FP8_INSTRUCTIONS), 0, FP8_INSTRUCTIONS)
    byte, multiplier = tile.block_scale(
        tile.max_magnitude(amax, 1, FP8_INSTRUCTIONS), pts, MODE, SHORT_MANTISSA, EXPONENT_BITS, MANTISSA_BITS,
        MAX_EXPONENT, ELEM_MAX, E8M0, FP8_INSTRUCTIONS,
    )  # fmt: skip
    y = x * multiplier[None, None, :, None, :]
    if RANDOM:
        random = (words.to(tl.uint32, bitcast=True) >> (9 + MANTISSA_BITS)).to(tl.int32)
        random = random.reshape(shape)
        y = round_stochastically(y, random, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX)
    if PACKED:
        if RANDOM:
            y = tl.where((byte == 255)[None, None, :, None, :], float("nan"), y)
        blocks = tl.cdiv(M, BLOCK)
        block = m0 // BLOCK + tl.arange(0, BLOCKS)
        s_ptrs = s_ptr + k[None, :].to(tl.int64) * blocks + block[:, None]
        tl.store(
            s_ptrs,
            byte.to(tl.uint8),
            mask=((block < blocks) | EVEN)[:, None] & inside_k[None, :],
        )
        PER_BLOCK: tl.constexpr = BLOCK // 4
        UNITS: tl.constexpr = TILE_M // 4
        packed = encode_fours(
            y.reshape(4, UNITS, TILE_K), EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX, FP8_INSTRUCTIONS
        )
        packed = packed.reshape(STACK, BLOCKS, QUADS, TILE_K)
        if BITS == 4:
            is_nan = (byte == (255 if E8M0 else 0x7F))[None, :, None, :]
            packed = tl.where(is_nan, tile.E2M1_NAN_WORD, packed).to(tl.int16)
        packed = packed.permute(3, 1, 0, 2).reshape(TILE_K, UNITS)
        index = m0 // 4 + tl.arange(0, UNITS)
        row_units = blocks * PER_BLOCK
        q_ptrs = q_ptr + k[:, None].to(tl.int64) * row_units + index[None, :]
        tl.store(q_ptrs, packed, mask=inside_k[:, None] & ((index < row_units) | EVEN)[None, :])
    if VALUES:
        scale = tile.scale_value(byte, pts, E8M0, FP8_INSTRUCTIONS)
        value = values(
            y,
            scale[None, None, :, None, :],
            RANDOM,
            EXPONENT_BITS,
            MANTISSA_BITS,
            ELEM_MAX,
            FP8_INSTRUCTIONS,
        )
        value = value.to(v_ptr.dtype.element_ty).reshape(TILE_M, TILE_K)
        v_ptrs = v_ptr + m.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(v_ptrs, value, mask=((m < M) | EVEN)[:, None] & inside_k[None, :])
