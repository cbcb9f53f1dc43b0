"""Device functions on a tile that is quantized along its rows or along its columns: ``ops/quantize_both.py``'s.

They restate ``reference/recipes.py``, and use ``_tile.py`` for blocks and elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchao_mx.ops import _tile


@triton.jit
def random_words(seed, row, k0, TILE_K: tl.constexpr):
    """``[rows, TILE_K]`` words of ``reference.random_words``, from the columns ``k0`` on."""
    four = (k0 // 4 + tl.arange(0, TILE_K // 4))[None, :]
    none = row[:, None] * 0 + four * 0
    a, b, c, d = tl.philox(seed, none + four, none + row[:, None], none, none)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # flattened, a b c d
    return words.to(tl.int32, bitcast=True).reshape(row.shape[0], TILE_K)


@triton.jit
def round_stochastically(y, random, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr,
                         ELEM_MAX: tl.constexpr):  # fmt: skip
    """``reference.round_stochastically``: y on the grid of the elements."""
    SMALLEST: tl.constexpr = 2.0 ** (2 - (1 << (EXPONENT_BITS - 1)))
    DROPPED: tl.constexpr = 23 - MANTISSA_BITS
    magnitude = tl.minimum(tl.abs(y), ELEM_MAX)
    is_small = magnitude < SMALLEST
    bits = _tile.bits_of(tl.where(is_small, magnitude + SMALLEST, magnitude))
    bits = (bits + (random << (DROPPED - 16)) + (1 << (DROPPED - 17))) & -(1 << DROPPED)
    grid = _tile.float_of(bits)
    grid = tl.where(is_small, grid - SMALLEST, grid)
    grid = _tile.float_of(_tile.bits_of(grid) | (_tile.bits_of(y) & (-2147483648)))
    return tl.where(y != y, y, grid)


@triton.jit
def values(y, scale, RANDOM: tl.constexpr, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr,
           ELEM_MAX: tl.constexpr, FP8_INSTRUCTIONS: tl.constexpr):  # fmt: skip
    """What the codes of ``y`` stand for, by the fewest instructions; RANDOM has rounded y already."""
    if RANDOM:
        pass
    elif EXPONENT_BITS > 2 and FP8_INSTRUCTIONS:
        code = _tile.encode(y, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX, FP8_INSTRUCTIONS)
        y = _tile.decode(code, EXPONENT_BITS, MANTISSA_BITS, FP8_INSTRUCTIONS)
    else:
        grid = _tile.round_to_grid(y, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX)
        y = _tile.float_of(_tile.bits_of(grid) | (_tile.bits_of(y) & (-2147483648)))
    return y * scale


@triton.jit
def store_rows(x, words, q_ptr, s_ptr, v_ptr, pts_ptr, row, inside_m, k0, K, TILE_M: tl.constexpr,
               TILE_K: tl.constexpr, PACKED: tl.constexpr, VALUES: tl.constexpr,
               PER_TENSOR: tl.constexpr, MODE: tl.constexpr, SHORT_MANTISSA: tl.constexpr,
               RANDOM: tl.constexpr, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr,
               MAX_EXPONENT: tl.constexpr, ELEM_MAX: tl.constexpr, BLOCK: tl.constexpr,
               E8M0: tl.constexpr, FP8_INSTRUCTIONS: tl.constexpr):  # fmt: skip
    """A tile ``x [TILE_M, TILE_K]`` in blocks along K, to the rows ``row [TILE_M]`` (int64)."""
    BITS: tl.constexpr = 1 + EXPONENT_BITS + MANTISSA_BITS
    BLOCKS: tl.constexpr = TILE_K // BLOCK
    x = x.reshape(TILE_M * BLOCKS, BLOCK)
    pts = _tile.load_per_tensor_scale(pts_ptr, 0, PER_TENSOR)
    byte, multiplier = _tile.block_scale(
        _tile.max_magnitude(x, 1), pts, MODE, SHORT_MANTISSA, EXPONENT_BITS, MANTISSA_BITS,
        MAX_EXPONENT, ELEM_MAX, E8M0, FP8_INSTRUCTIONS,
    )  # fmt: skip
    y = x * multiplier[:, None]
    if RANDOM:
        random = (words & 0xFFFF).reshape(TILE_M * BLOCKS, BLOCK)
        y = round_stochastically(y, random, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX)
    if PACKED:
        block = k0 // BLOCK + tl.arange(0, BLOCKS)
        s_ptrs = s_ptr + row[:, None] * (K // BLOCK) + block[None, :]
        mask = inside_m[:, None] & (block < K // BLOCK)[None, :]
        tl.store(s_ptrs, byte.to(tl.uint8).reshape(TILE_M, BLOCKS), mask=mask)
        if BITS == 4:
            PER_BLOCK: tl.constexpr = BLOCK // 8  # int32 words
            is_nan = (byte == (255 if E8M0 else 0x7F))[:, None]
            code = _tile.encode(y, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX, FP8_INSTRUCTIONS)
            packed = tl.where(is_nan, _tile.E2M1_NAN_WORD, _tile.pack_words(code, BITS))
        else:
            PER_BLOCK: tl.constexpr = BLOCK  # bytes
            packed = _tile.encode_bytes(y, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX, FP8_INSTRUCTIONS)
        unit = k0 // BLOCK * PER_BLOCK + tl.arange(0, BLOCKS * PER_BLOCK)
        units = K // BLOCK * PER_BLOCK
        q_ptrs = q_ptr + row[:, None] * units + unit[None, :]
        mask = inside_m[:, None] & (unit < units)[None, :]
        tl.store(q_ptrs, packed.reshape(TILE_M, BLOCKS * PER_BLOCK), mask=mask)
    if VALUES:
        scale = _tile.scale_value(byte, pts, E8M0, FP8_INSTRUCTIONS)
        value = values(
            y, scale[:, None], RANDOM, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX, FP8_INSTRUCTIONS
        )
        k = k0 + tl.arange(0, TILE_K)
        v_ptrs = v_ptr + row[:, None] * K + k[None, :]
        value = value.to(v_ptr.dtype.element_ty).reshape(TILE_M, TILE_K)
        tl.store(v_ptrs, value, mask=inside_m[:, None] & (k < K)[None, :])


@triton.jit
def store_columns(x, words, q_ptr, s_ptr, v_ptr, pts_ptr, m0, M, k0, K, TILE_M: tl.constexpr,
                  TILE_K: tl.constexpr, PACKED: tl.constexpr, VALUES: tl.constexpr,
                  PER_TENSOR: tl.constexpr, MODE: tl.constexpr, SHORT_MANTISSA: tl.constexpr,
                  RANDOM: tl.constexpr, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr,
                  MAX_EXPONENT: tl.constexpr, ELEM_MAX: tl.constexpr, BLOCK: tl.constexpr,
                  E8M0: tl.constexpr, FP8_INSTRUCTIONS: tl.constexpr):  # fmt: skip
    """A tile ``x [TILE_M, TILE_K]`` in blocks along M, from the row ``m0`` on; packed, transposed, in words of e2m1."""
    BITS: tl.constexpr = 1 + EXPONENT_BITS + MANTISSA_BITS
    BLOCKS: tl.constexpr = TILE_M // BLOCK
    x = x.reshape(BLOCKS, BLOCK, TILE_K)
    pts = _tile.load_per_tensor_scale(pts_ptr, 0, PER_TENSOR)
    byte, multiplier = _tile.block_scale(
        _tile.max_magnitude(x, 1), pts, MODE, SHORT_MANTISSA, EXPONENT_BITS, MANTISSA_BITS,
        MAX_EXPONENT, ELEM_MAX, E8M0, FP8_INSTRUCTIONS,
    )  # fmt: skip
    y = x * multiplier[:, None, :]
    if RANDOM:
        random = ((words >> 16) & 0xFFFF).reshape(BLOCKS, BLOCK, TILE_K)
        y = round_stochastically(y, random, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX)
    k = k0 + tl.arange(0, TILE_K)
    if PACKED:
        blocks = tl.cdiv(M, BLOCK)
        block = m0 // BLOCK + tl.arange(0, BLOCKS)
        s_ptrs = s_ptr + k[None, :].to(tl.int64) * blocks + block[:, None]
        tl.store(s_ptrs, byte.to(tl.uint8), mask=(block < blocks)[:, None] & (k < K)[None, :])
        if BITS == 8:
            PER_BLOCK: tl.constexpr = BLOCK
            UNITS: tl.constexpr = TILE_M
            packed = _tile.encode_bytes(y, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX, FP8_INSTRUCTIONS)
            packed = packed.reshape(TILE_M, TILE_K)
        else:
            code = _tile.encode(y, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX, FP8_INSTRUCTIONS)
            PER_BLOCK: tl.constexpr = BLOCK // 8
            UNITS: tl.constexpr = BLOCKS * PER_BLOCK
            packed = _tile.pack_columns(code.reshape(UNITS, 8, TILE_K), BITS)
            is_nan = (byte == (255 if E8M0 else 0x7F))[:, None, :]
            packed = packed.reshape(BLOCKS, PER_BLOCK, TILE_K)
            packed = tl.where(is_nan, _tile.E2M1_NAN_WORD, packed).reshape(UNITS, TILE_K)
        index = m0 // BLOCK * PER_BLOCK + tl.arange(0, UNITS)
        row_units = blocks * PER_BLOCK
        q_ptrs = q_ptr + k[:, None].to(tl.int64) * row_units + index[None, :]
        tl.store(q_ptrs, tl.trans(packed), mask=(k < K)[:, None] & (index < row_units)[None, :])
    if VALUES:
        scale = _tile.scale_value(byte, pts, E8M0, FP8_INSTRUCTIONS)
        value = values(
            y, scale[:, None, :], RANDOM, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX, FP8_INSTRUCTIONS
        )
        value = value.to(v_ptr.dtype.element_ty).reshape(TILE_M, TILE_K)
        m = m0 + tl.arange(0, TILE_M)
        v_ptrs = v_ptr + m.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(v_ptrs, value, mask=(m < M)[:, None] & (k < K)[None, :])
