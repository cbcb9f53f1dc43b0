"""Device functions on a tile of fp32 values: block scales, encode, decode. Shared by every kernel.

They restate ``reference/quantize.py``, whose docstrings give the rules and their sources.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_PER_ULP = tl.constexpr(1.4426950408889634 * 2.0**-23)
_E4M3_MAX = tl.constexpr(448.0)
_E4M3_MIN_NORMAL = tl.constexpr(2.0**-6)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def max_magnitude(x, axis: tl.constexpr):
    """max |x| along ``axis``; NaN wins, as its bits are above Inf's."""
    return float_of(tl.max(bits_of(x) & 0x7FFFFFFF, axis=axis))


@triton.jit
def e8m0_scale(amax, MODE: tl.constexpr, MANTISSA_BITS: tl.constexpr, MAX_EXPONENT: tl.constexpr,
               ELEM_MAX: tl.constexpr):  # fmt: skip
    """Scale byte (int32) of a block, and what takes its values to the elements' range (NaN for NaN)."""
    bits = bits_of(amax)
    if MODE == "rceil":
        # ceil(log2(amax / elem_max)) without the division, whose slow path costs more than the rest:
        # elem_max = 2**MAX_EXPONENT * MANTISSA, so the quotient passes a power of two where amax's
        # mantissa passes MANTISSA. `above` counts by how many units; the quotient's mantissa is then
        # 1 + m * 2**-23, and log2 is rounded to fp32 as the reference has it. At 2**-127 the quotient
        # is subnormal, with steps twice as wide: one unit less.
        MANTISSA: tl.constexpr = ELEM_MAX / 2.0**MAX_EXPONENT
        exponent = bits >> 23
        above = (bits & 0x7FFFFF) - int((MANTISSA - 1.0) * 8388608.0)
        above = tl.maximum(above - (exponent == MAX_EXPONENT).to(tl.int32), 0)
        # Adding 2**23 rounds to an integer (above it `above` is far past any threshold).
        m = (above.to(tl.float32) * (1.0 / MANTISSA) + 8388608.0) - 8388608.0
        byte = exponent - MAX_EXPONENT
        k = (byte - 127).to(tl.float32)
        byte = tl.maximum(byte + ((k + m * _LOG2_PER_ULP) > k).to(tl.int32), 0)
        byte = tl.where(bits == 0x7F800000, 254, byte)  # Inf
        multiplier_exponent = tl.where(byte == 0, 127, 254 - byte)
    else:
        if MODE == "even":
            bits += 1 << (23 - MANTISSA_BITS - 1)
        byte = bits >> 23
        if MODE == "ceil":
            byte += ((bits & 0x7FFFFF) > 0).to(tl.int32)
        byte = tl.minimum(tl.maximum(byte - MAX_EXPONENT, 0), 255)
        multiplier_exponent = 254 - tl.maximum(byte, 1)
    # Exponent 0 is 2**-127, a subnormal.
    multiplier = tl.where(multiplier_exponent == 0, 0x400000, multiplier_exponent << 23)
    is_nan = amax != amax
    return tl.where(is_nan, 255, byte), float_of(tl.where(is_nan, 0x7FC00000, multiplier))


@triton.jit
def e4m3_scale(amax, per_tensor_scale, ELEM_MAX: tl.constexpr, FP8_INSTRUCTIONS: tl.constexpr):
    """NVFP4's scale byte (int32) of a block and the reciprocal of its whole scale."""
    ones = tl.full(amax.shape, 1.0, tl.float32)
    scale = tl.div_rn(tl.div_rn(amax, ones * ELEM_MAX), ones * per_tensor_scale)
    is_nan = scale != scale
    scale = tl.minimum(tl.maximum(scale, _E4M3_MIN_NORMAL), _E4M3_MAX)
    byte = tl.where(is_nan, 0x7F, encode(scale, 4, 3, _E4M3_MAX, FP8_INSTRUCTIONS))
    value = decode(byte, 4, 3, FP8_INSTRUCTIONS)
    return byte, tl.div_rn(tl.div_rn(ones, ones * per_tensor_scale), value)


@triton.jit
def block_scale(amax, per_tensor_scale, MODE: tl.constexpr, EXPONENT_BITS: tl.constexpr,
                MANTISSA_BITS: tl.constexpr, MAX_EXPONENT: tl.constexpr, ELEM_MAX: tl.constexpr,
                E8M0: tl.constexpr, FP8_INSTRUCTIONS: tl.constexpr):  # fmt: skip
    """(scale byte, multiplier) of each block in ``amax``."""
    if E8M0:
        byte, multiplier = e8m0_scale(amax, MODE, MANTISSA_BITS, MAX_EXPONENT, ELEM_MAX)
    else:
        byte, multiplier = e4m3_scale(amax, per_tensor_scale, ELEM_MAX, FP8_INSTRUCTIONS)
    return byte, multiplier


@triton.jit
def scale_value(byte, per_tensor_scale, E8M0: tl.constexpr, FP8_INSTRUCTIONS: tl.constexpr):
    """What a scale byte (int32) stands for, in fp32."""
    if E8M0:
        bits = tl.where(byte == 0, 0x400000, byte << 23)
        value = float_of(tl.where(byte == 255, 0x7FC00000, bits))
    else:
        value = decode(byte, 4, 3, FP8_INSTRUCTIONS) * per_tensor_scale
    return value


@triton.jit
def round_to_grid(y, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, ELEM_MAX: tl.constexpr):
    """|y| as the nearest element's magnitude, ties to even: adding 2**(e + 23 - m) drops the rest."""
    MIN_EXPONENT: tl.constexpr = 2 - (1 << (EXPONENT_BITS - 1))
    magnitude = tl.minimum(tl.abs(y), ELEM_MAX)
    binade = tl.maximum(bits_of(magnitude) & 0x7F800000, (127 + MIN_EXPONENT) << 23)
    magic = float_of(binade + ((23 - MANTISSA_BITS) << 23))
    return (magnitude + magic) - magic


@triton.jit
def encode(y, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, ELEM_MAX: tl.constexpr,
           FP8_INSTRUCTIONS: tl.constexpr):  # fmt: skip
    """Element codes (int32) of scaled values: to nearest even, saturated, NaN to the format's nan_code."""
    if EXPONENT_BITS == 2:
        # Three straight pieces take 0, .5, 1, 1.5, 2, 3, 4, 6 to 0 .. 7; an fma onto 2**23 rounds
        # once, to an integer in the low bits.
        magnitude = tl.abs(y)
        code = tl.minimum(tl.fma(magnitude, 2.0, 8388608.0), tl.fma(magnitude, 1.0, 8388610.0))
        code = tl.minimum(code, tl.fma(magnitude, 0.5, 8388612.0))
        code = (bits_of(tl.minimum(code, 8388615.0)) & 7) | ((bits_of(y) >> 28) & 8)
        code = tl.where(y != y, 7, code)
    elif FP8_INSTRUCTIONS:  # they saturate, and turn NaN into 0x7F
        if EXPONENT_BITS == 4:
            fp8 = y.to(tl.float8e4nv)
        else:
            fp8 = y.to(tl.float8e5)
        code = fp8.to(tl.uint8, bitcast=True).to(tl.int32)
    else:
        BIAS: tl.constexpr = (1 << (EXPONENT_BITS - 1)) - 1
        grid = round_to_grid(y, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX)
        normal = (bits_of(grid) >> (23 - MANTISSA_BITS)) - ((127 - BIAS) << MANTISSA_BITS)
        subnormal = (grid * (2.0 ** (MANTISSA_BITS + BIAS - 1))).to(tl.int32)
        code = tl.where(normal < (1 << MANTISSA_BITS), subnormal, normal)
        code = tl.where(y != y, 0x7F, code | ((bits_of(y) >> 24) & 0x80))
    return code


@triton.jit
def bf16_pair(low, high):
    """Two fp32 values that are exact in bf16 as one int32, ``low`` in the low half."""
    return ((bits_of(low) >> 16) & 0xFFFF) | (bits_of(high) & (-65536))


@triton.jit
def encode_e2m1_bf16_pairs(x, low_multiplier, high_multiplier):
    """``encode`` for int32 words of two bf16 values: a code in the low nibble of each half.

    The same three straight pieces, two elements an instruction: a product with a power of two is exact
    in the fma, which rounds once, onto 128 .. 135 where bf16 holds integers. 27 instructions an element
    become 8, and quantizing is bound by memory instead. A NaN multiplier gives an undefined code.
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
        [
            x,
            bf16_pair(low_multiplier * 2.0, high_multiplier * 2.0),
            bf16_pair(low_multiplier, high_multiplier),
            bf16_pair(low_multiplier * 0.5, high_multiplier * 0.5),
        ],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def decode(code, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr,
           FP8_INSTRUCTIONS: tl.constexpr):  # fmt: skip
    """fp32 values of element codes (int32)."""
    ELEM_BITS: tl.constexpr = 1 + EXPONENT_BITS + MANTISSA_BITS
    if ELEM_BITS == 8 and FP8_INSTRUCTIONS:
        byte = code.to(tl.uint8)
        if EXPONENT_BITS == 4:
            value = byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            value = byte.to(tl.float8e5, bitcast=True).to(tl.float32)
    else:
        # The code's bits at the top of an fp32 mantissa and exponent, then one multiplication for the
        # difference of the two biases: right for subnormals too.
        BIAS: tl.constexpr = (1 << (EXPONENT_BITS - 1)) - 1
        magnitude = code & ((1 << (ELEM_BITS - 1)) - 1)
        sign = (code >> (ELEM_BITS - 1)) << 31
        value = float_of((magnitude << (23 - MANTISSA_BITS)) | sign) * (2.0 ** (127 - BIAS))
        if EXPONENT_BITS == 4:
            value = tl.where(magnitude == 0x7F, float("nan"), value)
        elif EXPONENT_BITS == 5:
            value = tl.where(magnitude == 0x7C, value * float("inf"), value)
            value = tl.where(magnitude > 0x7C, float("nan"), value)
    return value


@triton.jit
def pack(code, axis: tl.constexpr, BITS: tl.constexpr):
    """Words of neighbouring codes along ``axis``, the first in the lowest bits (the axis goes away)."""
    N: tl.constexpr = code.shape[axis]
    shift = tl.arange(0, N) * BITS
    if axis == 1:
        shift = shift[None, :, None]
    else:
        shift = shift[None, None, :]
    return tl.sum(code << shift, axis=axis)


@triton.jit
def unpack_nibbles(word):
    """``[R, C]`` int32 words to ``[R, 8 C]`` 4-bit codes (int32)."""
    code = (word[:, :, None] >> (tl.arange(0, 8) * 4)[None, None, :]) & 15
    return code.reshape(word.shape[0], word.shape[1] * 8)
