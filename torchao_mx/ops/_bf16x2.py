"""Device functions on int32 words that hold two bf16 values: two elements an instruction.

Quantizing in fp32 costs some 27 instructions an element, and an H200 runs out of integer issue slots at two
thirds of its memory bandwidth; these take 8. They need a GPU (inline PTX; bf16x2 arithmetic from sm_80 on,
fp8 conversions from sm_89 on) and agree bit for bit with ``_tile.py``, which the GPU tests check.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchao_mx.ops import _tile


@triton.jit
def magnitudes(x):
    """|x| of both halves."""
    return x & 0x7FFF7FFF


@triton.jit
def max_of_pairs(magnitude, axis: tl.constexpr):
    """The largest of ``magnitudes`` along ``axis``, halves together, in fp32; NaN wins.

    The low halves are noise below the high ones' last bit.
    """
    largest = tl.max(tl.maximum(magnitude, magnitude << 16), axis=axis)
    return _tile.float_of(largest & 0x7FFF0000)


@triton.jit
def max_of_halves(magnitude, axis: tl.constexpr):
    """The largest of the low halves and of the high halves along ``axis``, in fp32; NaN wins."""
    low = _tile.float_of(tl.max(magnitude << 16, axis=axis))
    return low, _tile.float_of(tl.max(magnitude, axis=axis) & 0x7FFF0000)


@triton.jit
def pair(low, high):
    """Two fp32 values that are exact in bf16, one in each half."""
    return (_tile.bits_of(high) & (-65536)) | ((_tile.bits_of(low) >> 16) & 0xFFFF)


@triton.jit
def encode_e2m1(magnitude, double, one, half):
    """Unsigned codes of ``magnitude * one``, one in the low byte of each half (0x43 in the high byte).

    ``_tile.encode``'s three straight pieces: the product with a power of two is exact inside the fma, which
    rounds once, onto 128 .. 135 where bf16 holds the integers. ``double``, ``one`` and ``half`` are twice the
    multiplier, the multiplier and half of it, as pairs. A NaN multiplier gives undefined codes.
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
    """Four signed codes from two words: those of ``code`` in byte 0, those of ``next_code`` in byte 2.

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
    """A word of eight codes from two results of :func:`pack_four`."""
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

    The code goes to the top of a bf16's mantissa and exponent; 2**126 is the difference of the biases.
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
def encode_fp8(x, multiplier, EXPONENT_BITS: tl.constexpr):
    """Codes of ``x * multiplier`` (fp32): two bytes, the low half's element first. NaN gives 0x7F."""
    if EXPONENT_BITS == 4:
        code = tl.inline_asm_elementwise(
            """
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
            cvt.rn.satfinite.e4m3x2.f32 pair, high, low;
            cvt.u32.u16 $0, pair;
            }
            """,
            "=r,r,f", [x, multiplier], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        code = tl.inline_asm_elementwise(
            """
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
            cvt.rn.satfinite.e5m2x2.f32 pair, high, low;
            cvt.u32.u16 $0, pair;
            }
            """,
            "=r,r,f", [x, multiplier], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return code


@triton.jit
def decode_fp8(code, scale, EXPONENT_BITS: tl.constexpr):
    """bf16 pairs ``code * scale`` from what :func:`encode_fp8` returns; ``scale`` in fp32."""
    if EXPONENT_BITS == 4:
        value = tl.inline_asm_elementwise(
            """
            {
            .reg .b16 pair, a, b;
            .reg .b32 halves;
            .reg .f32 low, high;
            cvt.u16.u32 pair, $1;
            cvt.rn.f16x2.e4m3x2 halves, pair;
            mov.b32 {a, b}, halves;
            cvt.f32.f16 low, a;
            cvt.f32.f16 high, b;
            mul.f32 low, low, $2;
            mul.f32 high, high, $2;
            cvt.rn.bf16x2.f32 $0, high, low;
            }
            """,
            "=r,r,f", [code, scale], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        value = tl.inline_asm_elementwise(
            """
            {
            .reg .b16 pair, a, b;
            .reg .b32 halves;
            .reg .f32 low, high;
            cvt.u16.u32 pair, $1;
            cvt.rn.f16x2.e5m2x2 halves, pair;
            mov.b32 {a, b}, halves;
            cvt.f32.f16 low, a;
            cvt.f32.f16 high, b;
            mul.f32 low, low, $2;
            mul.f32 high, high, $2;
            cvt.rn.bf16x2.f32 $0, high, low;
            }
            """,
            "=r,r,f", [code, scale], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return value
