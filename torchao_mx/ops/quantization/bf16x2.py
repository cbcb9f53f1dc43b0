"""Quantize bf16 as int32 words that hold two values: two elements per instruction.

Device functions, then the two kernels that ``quantization/quantize.py`` launches for bf16 operands.
Quantizing in fp32 costs some 27 instructions per element, and an H200 runs out of integer issue slots at two
thirds of its memory bandwidth; these functions take 8. They need a GPU (inline PTX; bf16x2 arithmetic from
sm_80, fp8 conversions from sm_89) and agree bit for bit with ``tile.py``, as the GPU tests check.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchao_mx.ops.core.launch import launched
from torchao_mx.ops.quantization import tile

_ENCODE = """
{
.reg .b32 word;
.reg .f32 low, high;
.reg .b16 pair;
shl.b32 word, $1, 16;
mov.b32 low, word;
and.b32 word, $1, 0xFFFF0000;
mov.b32 high, word;
mul.f32 low, low, $2;
mul.f32 high, high, $2;
cvt.rn.satfinite.TYPEx2.f32 pair, high, low;
cvt.u32.u16 $0, pair;
}
"""
_DECODE = """
{
.reg .b16 pair, a, b;
.reg .b32 halves;
.reg .f32 low, high;
cvt.u16.u32 pair, $1;
cvt.rn.f16x2.TYPEx2 halves, pair;
mov.b32 {a, b}, halves;
cvt.f32.f16 low, a;
cvt.f32.f16 high, b;
mul.f32 low, low, $2;
mul.f32 high, high, $2;
cvt.rn.bf16x2.f32 $0, high, low;
}
"""
_ENCODE_E4M3 = tl.constexpr(_ENCODE.replace("TYPE", "e4m3"))
_ENCODE_E5M2 = tl.constexpr(_ENCODE.replace("TYPE", "e5m2"))
_DECODE_E4M3 = tl.constexpr(_DECODE.replace("TYPE", "e4m3"))
_DECODE_E5M2 = tl.constexpr(_DECODE.replace("TYPE", "e5m2"))


@triton.jit
def magnitudes(x):
    """|x| of both halves."""
    return x & 0x7FFF7FFF


@triton.jit
def max_of_pairs(magnitude, axis: tl.constexpr):
    """The largest of ``magnitudes`` along ``axis``, over both halves, in fp32; NaN wins.

    The low halves are noise below the high ones' last bit.
    """
    largest = tl.max(tl.maximum(magnitude, magnitude << 16), axis=axis)
    return tile.float_of(largest & 0x7FFF0000)


@triton.jit
def max_of_halves(magnitude, axis: tl.constexpr):
    """The largest of the low halves and of the high halves along ``axis``, in fp32; NaN wins."""
    low = tile.float_of(tl.max(magnitude << 16, axis=axis))
    return low, tile.float_of(tl.max(magnitude, axis=axis) & 0x7FFF0000)


@triton.jit
def as_pair(low, high):
    """Pack two fp32 values that are exact in bf16, one in each half."""
    return (tile.bits_of(high) & (-65536)) | ((tile.bits_of(low) >> 16) & 0xFFFF)


@triton.jit
def encode_e2m1(magnitude, double, one, half):
    """Unsigned codes of ``magnitude * one``, one in the low byte of each half (0x43 in the high byte).

    The three linear pieces of ``_tile.encode``: the product with a power of two is exact inside the fma,
    which rounds once, onto 128 .. 135, where bf16 holds the integers. ``double``, ``one`` and ``half`` are
    twice the multiplier, the multiplier and half of it, as pairs. A NaN multiplier gives undefined codes.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 line, k;
        mov.b32 k, 0x43004300;
        fma.rn.bf16x2 $0, $1, $2, k;
        mov.b32 k, 0x43024302;
        fma.rn.bf16x2 line, $1, $3, k;
        min.bf16x2 $0, $0, line;
        mov.b32 k, 0x43044304;
        fma.rn.bf16x2 line, $1, $4, k;
        min.bf16x2 $0, $0, line;
        mov.b32 k, 0x43074307;
        min.bf16x2 $0, $0, k;
        }
        """,
        "=&r,r,r,r,r",
        [magnitude, double, one, half],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def pack_four(code, next_code, x, next_x):
    """Pack four signed codes from two words: those of ``code`` in byte 0, those of ``next_code`` in byte 2.

    ``code`` as :func:`encode_e2m1` returns it, the signs from ``x``; bytes 1 and 3 are undefined.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 codes, signs, mask;
        prmt.b32 codes, $1, $2, 0x6420;
        prmt.b32 signs, $3, $4, 0x7531;
        shr.u32 signs, signs, 4;
        mov.b32 mask, 0x08080808;
        lop3.b32 codes, codes, signs, mask, 0xF8;
        shr.u32 signs, codes, 4;
        or.b32 $0, codes, signs;
        }
        """,
        "=r,r,r,r,r",
        [code, next_code, x, next_x],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def pack_eight(four, next_four):
    """Pack eight codes into a word from two results of :func:`pack_four`."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x6420;",
        "=r,r,r",
        [four, next_four],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def decode_e2m1(code, x, scale):
    """bf16 pairs ``+-code * scale``: codes of :func:`encode_e2m1`, signs of ``x``, ``scale`` a pair.

    The code goes to the top of a bf16's mantissa and exponent; 2**126 corrects the difference of the biases.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 value, sign, k, zero;
        shl.b32 value, $1, 6;
        and.b32 value, value, 0x01C001C0;
        mov.b32 sign, 0x80008000;
        lop3.b32 value, value, $2, sign, 0xF8;
        mov.b32 k, 0x7E807E80;
        mov.b32 zero, 0x80008000;
        fma.rn.bf16x2 value, value, k, zero;
        fma.rn.bf16x2 $0, value, $3, zero;
        }
        """,
        "=r,r,r,r",
        [code, x, scale],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def encode_fp8(x, multiplier, FORMAT: tl.constexpr):
    """Codes of ``x * multiplier`` (fp32): two bytes, the low half's element first. NaN gives 0x7F."""
    asm: tl.constexpr = _ENCODE_E4M3 if FORMAT.exponent_bits == 4 else _ENCODE_E5M2
    return tl.inline_asm_elementwise(
        asm, "=r,r,f", [x, multiplier], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def decode_fp8(code, scale, FORMAT: tl.constexpr):
    """bf16 pairs ``code * scale`` from what :func:`encode_fp8` returns; ``scale`` in fp32."""
    asm: tl.constexpr = _DECODE_E4M3 if FORMAT.exponent_bits == 4 else _DECODE_E5M2
    return tl.inline_asm_elementwise(
        asm, "=r,r,f", [code, scale], dtype=tl.int32, is_pure=True, pack=1
    )


@launched
@triton.jit
def quantize_rows_kernel(
    x_ptr,
    q_ptr,
    s_ptr,
    values_ptr,
    n_blocks,
    blocks_per_row,
    row_stride,
    CONTIGUOUS: tl.constexpr,
    VALUES: tl.constexpr,
    TILE: tl.constexpr,
    MODE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """The rows kernel for bf16 and the MX formats: ``x`` and the values as int32 words of two.

    ``q_ptr`` takes int32 words of e2m1 codes, or int16 words of two fp8.
    """
    BLOCK: tl.constexpr = FORMAT.block_size
    PAIRS: tl.constexpr = BLOCK // 2
    first = tl.program_id(0).to(tl.int64) * TILE
    block = tl.arange(0, TILE)
    inside = block < n_blocks - first
    pair = tl.arange(0, PAIRS)
    contiguous = (first * PAIRS) + (block * PAIRS)[:, None] + pair[None, :]
    if CONTIGUOUS:
        x_ptrs = x_ptr + contiguous
    else:
        row = (first + block) // blocks_per_row
        start = row * row_stride + (first + block - row * blocks_per_row) * PAIRS
        x_ptrs = x_ptr + start[:, None] + pair[None, :]
    x = tl.load(x_ptrs, mask=inside[:, None], other=0)
    magnitude = magnitudes(x)
    byte, multiplier = tile.e8m0_scale(max_of_pairs(magnitude, 1), MODE, True, FORMAT)
    tl.store(s_ptr + first + block, byte.to(tl.uint8), mask=inside)
    scale = tile.scale_value(byte, 1.0, FORMAT)
    shape: tl.constexpr = (TILE, PAIRS)
    if FORMAT.exponent_bits == 2:
        PER_BLOCK: tl.constexpr = BLOCK // 8
        code = encode_e2m1(
            magnitude,
            tl.broadcast_to(as_pair(multiplier * 2.0, multiplier * 2.0)[:, None], shape),
            tl.broadcast_to(as_pair(multiplier, multiplier)[:, None], shape),
            tl.broadcast_to(as_pair(multiplier * 0.5, multiplier * 0.5)[:, None], shape),
        )
        scale_pair = tl.broadcast_to(as_pair(scale, scale)[:, None], shape)
        value = decode_e2m1(code, x, scale_pair)
        even, odd = tl.split(code.reshape(TILE, PAIRS // 2, 2))
        even_x, odd_x = tl.split(x.reshape(TILE, PAIRS // 2, 2))
        four = pack_four(even, odd, even_x, odd_x)
        even, odd = tl.split(four.reshape(TILE, PER_BLOCK, 2))
        packed = pack_eight(even, odd)
        packed = tl.where((byte == 255)[:, None], tile.E2M1_NAN_WORD, packed)
    else:
        PER_BLOCK: tl.constexpr = PAIRS
        multiplier = tl.broadcast_to(multiplier[:, None], shape)
        code = encode_fp8(x, multiplier, FORMAT)
        value = decode_fp8(code, tl.broadcast_to(scale[:, None], shape), FORMAT)
        packed = code.to(tl.int16)
    q_ptrs = q_ptr + first * PER_BLOCK
    q_ptrs += (block * PER_BLOCK)[:, None] + tl.arange(0, PER_BLOCK)[None, :]
    tl.store(q_ptrs, packed, mask=inside[:, None])
    if VALUES:
        tl.store(values_ptr + contiguous, value, mask=inside[:, None])


@launched
@triton.jit
def quantize_columns_kernel(
    x_ptr,
    q_ptr,
    s_ptr,
    M,
    K,
    x_strides,
    BLOCKS: tl.constexpr,
    TILE_K: tl.constexpr,
    MODE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """The columns kernel for MXFP4: ``x`` as TILE_K int32 words of two columns each; ``q`` in int16.

    A word keeps its two columns in its two halves throughout: four rows of codes fill each half.
    """
    BLOCK: tl.constexpr = FORMAT.block_size
    batch_stride, row_stride = x_strides
    blocks_m = M // BLOCK
    batch, tile_m, tile_k = tile.tile_of_program(blocks_m, BLOCKS, K // 2, TILE_K)
    block0 = tile_m * BLOCKS
    pair = tile_k * TILE_K + tl.arange(0, TILE_K)
    block = block0 + tl.arange(0, BLOCKS)
    m = (block * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    x_ptrs = x_ptr + batch * batch_stride + (m.to(tl.int64) * row_stride)[:, :, None]
    inside = (block < blocks_m)[:, None, None] & (pair < K // 2)[None, None, :]
    x = tl.load(x_ptrs + pair[None, None, :], mask=inside, other=0)
    magnitude = magnitudes(x)
    low, high = max_of_halves(magnitude, 1)
    low_byte, low_m = tile.e8m0_scale(low, MODE, True, FORMAT)
    high_byte, high_m = tile.e8m0_scale(high, MODE, True, FORMAT)
    shape: tl.constexpr = (BLOCKS, BLOCK, TILE_K)
    code = encode_e2m1(
        magnitude,
        tl.broadcast_to(as_pair(low_m * 2.0, high_m * 2.0)[:, None, :], shape),
        tl.broadcast_to(as_pair(low_m, high_m)[:, None, :], shape),
        tl.broadcast_to(as_pair(low_m * 0.5, high_m * 0.5)[:, None, :], shape),
    )
    code = (code & 0x00070007) | ((x >> 12) & 0x00080008)
    PER_BLOCK: tl.constexpr = BLOCK // 4
    WORDS: tl.constexpr = BLOCKS * PER_BLOCK
    word = tile.pack_columns(code.reshape(WORDS, 4, TILE_K), 4)
    nan = tl.where(low_byte == 255, 0xFFFF, 0) | tl.where(high_byte == 255, -65536, 0)
    nan = tl.broadcast_to(nan[:, None, :], (BLOCKS, PER_BLOCK, TILE_K)).reshape(WORDS, TILE_K)
    word = (word & ~nan) | (tile.E2M1_NAN_WORD & nan)
    k = tl.join(2 * pair, 2 * pair + 1).reshape(2 * TILE_K)
    byte = tl.join(low_byte, high_byte).reshape(BLOCKS, 2 * TILE_K)
    s_ptrs = s_ptr + batch * K * blocks_m + k[None, :].to(tl.int64) * blocks_m + block[:, None]
    tl.store(s_ptrs, byte.to(tl.uint8), mask=(block < blocks_m)[:, None] & (k < K)[None, :])
    index = block0 * PER_BLOCK + tl.arange(0, WORDS)
    row_words = blocks_m * PER_BLOCK
    # [TILE_K, WORDS] of two columns each becomes [2 TILE_K, WORDS]
    word = tl.trans(word)
    word = tl.permute(tl.join(word, word >> 16), (0, 2, 1)).reshape(2 * TILE_K, WORDS).to(tl.int16)
    q_ptrs = q_ptr + batch * K * row_words + k[:, None].to(tl.int64) * row_words + index[None, :]
    tl.store(q_ptrs, word, mask=(k < K)[:, None] & (index < row_words)[None, :])
