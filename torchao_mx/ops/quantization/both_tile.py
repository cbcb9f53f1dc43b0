"""Device functions of ``quantization/quantize_both.py``: quantize a tile along its rows or its columns.

They restate ``reference/recipes.py``, and use ``tile.py`` for blocks and elements.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from torchao_mx.ops.core.launch import KernelFormat
from torchao_mx.ops.quantization import tile
from torchao_mx.reference import recipes

PHILOX_ROUNDS = tl.constexpr(recipes.PHILOX_ROUNDS)


class Form(NamedTuple):
    """The stored outputs of one direction: the constexpr ``FORM``.

    ``outputs`` are pointers to packed elements, scales and values, and to the per-tensor scale.
    """

    format: KernelFormat
    mode: str
    per_tensor: str
    packed: bool
    values: bool


@triton.jit
def random_words(seed, row, k0, TILE_K: tl.constexpr):
    """``[rows, TILE_K]`` words of ``reference.random_words``, starting at the columns ``k0``."""
    four = (k0 // 4 + tl.arange(0, TILE_K // 4))[None, :]
    none = row[:, None] * 0 + four * 0
    counter = none + four, none + row[:, None], none, none
    a, b, c, d = tl.philox(seed, *counter, n_rounds=PHILOX_ROUNDS)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # a b c d when flattened
    return words.to(tl.int32, bitcast=True).reshape(row.shape[0], TILE_K)


@triton.jit
def round_stochastically(y, random, FORMAT: tl.constexpr):
    """Round y to the element grid as ``reference.round_stochastically``; a NaN block loses its NaNs."""
    SMALLEST: tl.constexpr = 2.0 ** (2 - (1 << (FORMAT.exponent_bits - 1)))
    DROPPED: tl.constexpr = 23 - FORMAT.mantissa_bits
    magnitude = tl.minimum(tl.abs(y), FORMAT.elem_max)
    is_small = magnitude < SMALLEST
    bits = tile.bits_of(tl.where(is_small, magnitude + SMALLEST, magnitude))
    grid = tile.float_of((bits + random) & -(1 << DROPPED))
    grid = tl.where(is_small, grid - SMALLEST, grid)
    return tile.float_of(tile.bits_of(grid) | (tile.bits_of(y) & (-2147483648)))


@triton.jit
def values(y, scale, RANDOM: tl.constexpr, FORMAT: tl.constexpr):
    """The values of the codes of ``y``, by the fewest instructions; with RANDOM, y is already rounded."""
    if RANDOM:
        pass
    elif FORMAT.exponent_bits > 2 and FORMAT.has_fp8_instructions:
        y = tile.decode(tile.encode(y, FORMAT), FORMAT)
    else:
        grid = tile.round_to_grid(y, FORMAT)
        y = tile.float_of(tile.bits_of(grid) | (tile.bits_of(y) & (-2147483648)))
    return y * scale


@triton.jit
def rows_in_order(TILE_M: tl.constexpr, BLOCK: tl.constexpr, STACK: tl.constexpr):
    """Return the order of a tile's rows: ``[4, STACK, blocks, BLOCK / 4 / STACK]`` of rows 4 apart.

    Triton gives the last axes to threads and warps, and the first axes to a thread's registers. So a thread
    holds four neighbours of a column, which it packs, and STACK such fours per block, which share one scale.
    """
    QUADS: tl.constexpr = BLOCK // 4 // STACK
    BLOCKS: tl.constexpr = TILE_M // BLOCK
    at = tl.arange(0, TILE_M)
    quad, block = at % QUADS, at // QUADS % BLOCKS
    stacked, row = at // (QUADS * BLOCKS) % STACK, at // (TILE_M // 4)
    return block * BLOCK + (stacked * QUADS + quad) * 4 + row


@triton.jit
def encode_fours(y, FORMAT: tl.constexpr):
    """Pack ``[4, R, C]`` into ``[R, C]`` words (int32) of four codes, the first in the lowest bits."""
    first, second = tl.split(y.reshape(2, 2, y.shape[1], y.shape[2]).permute(0, 2, 3, 1))
    two = tile.encode_two(first, second, FORMAT)
    return tl.sum(two << (tl.arange(0, 2) * 2 * FORMAT.elem_bits)[:, None, None], axis=0)


@triton.jit
def store_row_words(
    x_ptr,
    index_ptr,
    outputs,
    m0,
    M,
    k0,
    K,
    x_strides,
    FORM: tl.constexpr,
    TILE: tl.constexpr,
    EVEN: tl.constexpr,
    GATHERED: tl.constexpr,
    SHORT_MANTISSA: tl.constexpr,
):
    """Store the tile's rows in e2m1: a thread loads whole blocks and computes each scale once."""
    FORMAT: tl.constexpr = FORM.format
    MODE: tl.constexpr = FORM.mode
    PER_TENSOR: tl.constexpr = FORM.per_tensor
    BLOCK: tl.constexpr = FORMAT.block_size
    BLOCKS: tl.constexpr = TILE.k // BLOCK
    WORDS: tl.constexpr = BLOCK // 8
    q_ptr, s_ptr, _, pts_ptr = outputs
    stride_m, stride_k = x_strides
    at = tl.arange(0, TILE.m * BLOCKS)
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
    amax = tile.max_magnitude(x, 2, FORMAT.has_fp8_instructions)
    amax = tile.max_magnitude(amax, 1, FORMAT.has_fp8_instructions)
    byte, multiplier = tile.block_scale(amax, pts, MODE, SHORT_MANTISSA, FORMAT)
    # After the words, these stores would keep registers alive: a tenth slower on an H200.
    tl.store(s_ptr + row * (K // BLOCK) + block, byte.to(tl.uint8), mask=inside)
    packed = tile.encode_words(x * multiplier[:, None, None])
    is_nan = (byte == FORMAT.nan_scale)[:, None]
    packed = tl.where(is_nan, tile.E2M1_NAN_WORD, packed)
    q_ptrs = (q_ptr + row * (K // 8) + block * WORDS)[:, None] + word[None, :]
    tl.store(q_ptrs, packed, mask=inside[:, None])


@triton.jit
def store_rows(
    x,
    words,
    outputs,
    row,
    inside_m,
    k0,
    k,
    inside_k,
    K,
    FORM: tl.constexpr,
    TILE: tl.constexpr,
    EVEN: tl.constexpr,
    SHORT_MANTISSA: tl.constexpr,
    RANDOM: tl.constexpr,
):
    """Store a tile ``x [TILE_M, TILE_K]`` in blocks along K, to the rows ``row [TILE_M]`` (int64).

    Packed rows are fp8 here; :func:`store_row_words` stores e2m1 rows.
    """
    FORMAT: tl.constexpr = FORM.format
    MODE: tl.constexpr = FORM.mode
    PER_TENSOR: tl.constexpr = FORM.per_tensor
    BLOCK: tl.constexpr = FORMAT.block_size
    TILE_M: tl.constexpr = TILE.m
    TILE_K: tl.constexpr = TILE.k
    BLOCKS: tl.constexpr = TILE_K // BLOCK
    q_ptr, s_ptr, v_ptr, pts_ptr = outputs
    x = x.reshape(TILE_M * BLOCKS, BLOCK)
    pts = tile.load_per_tensor_scale(pts_ptr, 0, PER_TENSOR)
    amax = tile.max_magnitude(x, 1, FORMAT.has_fp8_instructions)
    byte, multiplier = tile.block_scale(amax, pts, MODE, SHORT_MANTISSA, FORMAT)
    y = x * multiplier[:, None]
    if RANDOM:
        random = words & ((1 << (23 - FORMAT.mantissa_bits)) - 1)
        y = round_stochastically(y, random.reshape(TILE_M * BLOCKS, BLOCK), FORMAT)
    if FORM.packed and FORMAT.elem_bits == 8:
        if RANDOM:
            y = tl.where((byte == 255)[:, None], float("nan"), y)
        block = k0 // BLOCK + tl.arange(0, BLOCKS)
        s_ptrs = s_ptr + row[:, None] * (K // BLOCK) + block[None, :]
        mask = inside_m[:, None] & ((block < K // BLOCK) | EVEN)[None, :]
        tl.store(s_ptrs, byte.to(tl.uint8).reshape(TILE_M, BLOCKS), mask=mask)
        packed = tile.encode_bytes(y, FORMAT)
        q_ptrs = q_ptr + row[:, None] * K + k[None, :]
        mask = inside_m[:, None] & inside_k[None, :]
        tl.store(q_ptrs, packed.reshape(TILE_M, TILE_K), mask=mask)
    if FORM.values:
        scale = tile.scale_value(byte, pts, FORMAT)
        value = values(y, scale[:, None], RANDOM, FORMAT)
        v_ptrs = v_ptr + row[:, None] * K + k[None, :]
        value = value.to(v_ptr.dtype.element_ty).reshape(TILE_M, TILE_K)
        tl.store(v_ptrs, value, mask=inside_m[:, None] & inside_k[None, :])


@triton.jit
def store_columns(
    x,
    words,
    outputs,
    m0,
    m,
    M,
    k,
    inside_k,
    K,
    FORM: tl.constexpr,
    TILE: tl.constexpr,
    EVEN: tl.constexpr,
    SHORT_MANTISSA: tl.constexpr,
    RANDOM: tl.constexpr,
):
    """Store ``x [TILE_M, TILE_K]``, its rows :func:`rows_in_order`, in blocks along M; packed, transposed."""
    FORMAT: tl.constexpr = FORM.format
    MODE: tl.constexpr = FORM.mode
    PER_TENSOR: tl.constexpr = FORM.per_tensor
    BLOCK: tl.constexpr = FORMAT.block_size
    TILE_M: tl.constexpr = TILE.m
    TILE_K: tl.constexpr = TILE.k
    STACK: tl.constexpr = TILE.stack
    BLOCKS: tl.constexpr = TILE_M // BLOCK
    QUADS: tl.constexpr = BLOCK // 4 // STACK
    q_ptr, s_ptr, v_ptr, pts_ptr = outputs
    shape: tl.constexpr = (4, STACK, BLOCKS, QUADS, TILE_K)
    x = x.reshape(shape)
    pts = tile.load_per_tensor_scale(pts_ptr, 0, PER_TENSOR)
    amax = tile.max_magnitude(x, 0, FORMAT.has_fp8_instructions)
    amax = tile.max_magnitude(amax, 0, FORMAT.has_fp8_instructions)
    amax = tile.max_magnitude(amax, 1, FORMAT.has_fp8_instructions)
    byte, multiplier = tile.block_scale(amax, pts, MODE, SHORT_MANTISSA, FORMAT)
    y = x * multiplier[None, None, :, None, :]
    if RANDOM:
        random = (words.to(tl.uint32, bitcast=True) >> (9 + FORMAT.mantissa_bits)).to(tl.int32)
        random = random.reshape(shape)
        y = round_stochastically(y, random, FORMAT)
    if FORM.packed:
        if RANDOM:
            y = tl.where((byte == 255)[None, None, :, None, :], float("nan"), y)
        blocks = tl.cdiv(M, BLOCK)
        block = m0 // BLOCK + tl.arange(0, BLOCKS)
        s_ptrs = s_ptr + k[None, :].to(tl.int64) * blocks + block[:, None]
        mask = ((block < blocks) | EVEN)[:, None] & inside_k[None, :]
        tl.store(s_ptrs, byte.to(tl.uint8), mask=mask)
        PER_BLOCK: tl.constexpr = BLOCK // 4
        UNITS: tl.constexpr = TILE_M // 4
        packed = encode_fours(y.reshape(4, UNITS, TILE_K), FORMAT)
        packed = packed.reshape(STACK, BLOCKS, QUADS, TILE_K)
        if FORMAT.elem_bits == 4:
            is_nan = (byte == FORMAT.nan_scale)[None, :, None, :]
            packed = tl.where(is_nan, tile.E2M1_NAN_WORD, packed).to(tl.int16)
        packed = packed.permute(3, 1, 0, 2).reshape(TILE_K, UNITS)
        index = m0 // 4 + tl.arange(0, UNITS)
        row_units = blocks * PER_BLOCK
        q_ptrs = q_ptr + k[:, None].to(tl.int64) * row_units + index[None, :]
        tl.store(q_ptrs, packed, mask=inside_k[:, None] & ((index < row_units) | EVEN)[None, :])
    if FORM.values:
        scale = tile.scale_value(byte, pts, FORMAT)
        value = values(y, scale[None, None, :, None, :], RANDOM, FORMAT)
        value = value.to(v_ptr.dtype.element_ty).reshape(TILE_M, TILE_K)
        v_ptrs = v_ptr + m.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(v_ptrs, value, mask=((m < M) | EVEN)[:, None] & inside_k[None, :])
