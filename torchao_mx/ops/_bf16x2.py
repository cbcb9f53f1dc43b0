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
def duplicate(value):
    """An fp32 value that is exact in bf16, in both halves."""
    high = _tile.bits_of(value) & (-65536)
    return high | ((high >> 16) & 0xFFFF)


@triton.jit
def max_magnitude(x):
    """max |x| over axis 1, in fp32; NaN wins. The low halves are noise below the high ones' last bit."""
    magnitude = x & 0x7FFF7FFF
    return _tile.float_of(tl.max(tl.maximum(magnitude, magnitude << 16), axis=1) & 0x7FFF0000)


@triton.jit
def encode_e2m1(x, multiplier):
    """Codes of ``x * multiplier`` (fp32, a power of two): one in the low nibble of each half.

    ``_tile.encode``'s three straight pieces: the product is exact inside the fma, which rounds once, onto
    128 .. 135 where bf16 holds the integers. A NaN multiplier gives undefined codes.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 magnitude, sign, code, line, k;
        and.b32 magnitude, $1, 0x7FFF7FFF;
        mov.b32 k, 0x43004300;
        fma.rn.bf16x2 code, magnitude, $2, k;
        mov.b32 k, 0x43024302;
        fma.rn.bf16x2 line, magnitude, $3, k;
        min.bf16x2 code, code, line;
        mov.b32 k, 0x43044304;
        fma.rn.bf16x2 line, magnitude, $4, k;
        min.bf16x2 code, code, line;
        mov.b32 k, 0x43074307;
        min.bf16x2 code, code, k;
        shr.u32 sign, $1, 12;
        lop3.b32 code, code, sign, 0x00070007, 0xE4;
        and.b32 $0, code, 0x000F000F;
        }
        """,
        "=r,r,r,r,r",
        [x, duplicate(multiplier * 2.0), duplicate(multiplier), duplicate(multiplier * 0.5)],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def decode_e2m1(code, scale):
    """bf16 pairs ``code * scale`` from what :func:`encode_e2m1` returns; ``scale`` fp32, a power of two.

    The code sits at the top of a bf16's mantissa and exponent; 2**126 is the difference of the biases.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 value, sign, k, zero;
        shl.b32 value, $1, 6;
        and.b32 value, value, 0x01C001C0;
        shl.b32 sign, $1, 12;
        lop3.b32 value, value, sign, 0x80008000, 0xF8;
        mov.b32 k, 0x7E807E80;
        mov.b32 zero, 0x80008000;
        fma.rn.bf16x2 value, value, k, zero;
        fma.rn.bf16x2 $0, value, $2, zero;
        }
        """,
        "=r,r,r",
        [code, duplicate(scale)],
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
