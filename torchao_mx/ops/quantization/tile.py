"""Device functions on a tile of fp32 values, shared by every kernel: block scales, encode, decode.

They restate ``reference/quantize.py``, whose docstrings give the rules and their sources.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_PER_ULP = tl.constexpr(1.4426950408889634 * 2.0**-23)
_E4M3_MAX = tl.constexpr(448.0)
_E4M3_MIN_NORMAL = tl.constexpr(2.0**-6)
# Per-tensor scales between these keep the divisions of e4m3_scale from underflow, except for clamped results.
_SMALLEST_QUICK = tl.constexpr(2.0**-90)
_LARGEST_QUICK = tl.constexpr(2.0**90)
_ENCODE = """
{
.reg .b16 pair;
cvt.rn.satfinite.TYPEx2.f32 pair, 0f00000000, $1;
cvt.u32.u16 $0, pair;
}
"""
_ENCODE_E4M3 = tl.constexpr(_ENCODE.replace("TYPE", "e4m3"))
_ENCODE_E5M2 = tl.constexpr(_ENCODE.replace("TYPE", "e5m2"))
_ENCODE_TWO = """
{
.reg .b16 pair;
cvt.rn.satfinite.TYPEx2.f32 pair, $2, $1;
cvt.u32.u16 $0, pair;
}
"""
_ENCODE_TWO_E4M3 = tl.constexpr(_ENCODE_TWO.replace("TYPE", "e4m3"))
_ENCODE_TWO_E5M2 = tl.constexpr(_ENCODE_TWO.replace("TYPE", "e5m2"))
_ENCODE_FOUR = """
{
.reg .b16 low, high;
cvt.rn.satfinite.TYPEx2.f32 low, $2, $1;
cvt.rn.satfinite.TYPEx2.f32 high, $4, $3;
mov.b32 $0, {low, high};
}
"""
_ENCODE_FOUR_E4M3 = tl.constexpr(_ENCODE_FOUR.replace("TYPE", "e4m3"))
_ENCODE_FOUR_E5M2 = tl.constexpr(_ENCODE_FOUR.replace("TYPE", "e5m2"))
_E2M1_LARGEST = tl.constexpr(0x4B000007)  # 2**23 + 7 in fp32
# In int32, the sum of 0x4B000000 << 4 i for i = 0 .. 7.
_E2M1_OFFSETS = tl.constexpr(0xFB000000 - 2**32)
_E2M1_SIGNS = tl.constexpr(0x88888888 - 2**32)
E2M1_NAN_WORD = tl.constexpr(0x77777777)  # eight codes of a NaN block


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def tile_of_program(m, TILE_M: tl.constexpr, k, TILE_K: tl.constexpr):
    """Return a program's (batch as int64, tile row, tile column) on ``[B, m, k]``.

    All tiles lie on the first grid axis: the others hold only 65,535 programs.
    """
    tiles_k = tl.cdiv(k, TILE_K)
    tiles = tl.cdiv(m, TILE_M) * tiles_k
    batch = tl.program_id(0) // tiles
    tile = tl.program_id(0) - batch * tiles
    return batch.to(tl.int64), tile // tiles_k, tile % tiles_k


@triton.jit
def load_per_tensor_scale(ptr, expert, KIND: tl.constexpr):
    """Load NVFP4's fp32 scale: per ``"expert"``, per ``"tensor"``, or 1 for ``"none"``."""
    if KIND == "expert":
        scale = tl.load(ptr + expert)
    elif KIND == "tensor":
        scale = tl.load(ptr)
    else:
        scale = 1.0
    return scale


@triton.jit
def _larger_magnitude(a, b):
    return tl.maximum(tl.abs(a), tl.abs(b), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_magnitude(x, axis: tl.constexpr, COMPILED: tl.constexpr = False):
    """Return max |x| along ``axis``; NaN wins.

    COMPILED: by an instruction that takes magnitudes itself, which is slow in Triton's interpreter. Otherwise
    by the bits: those of NaN are above those of Inf.
    """
    if COMPILED:
        amax = tl.reduce(x, axis, _larger_magnitude)
    else:
        amax = float_of(tl.max(bits_of(x) & 0x7FFFFFFF, axis=axis))
    return amax


@triton.jit
def e8m0_scale(amax, MODE: tl.constexpr, SHORT_MANTISSA: tl.constexpr, FORMAT: tl.constexpr):
    """Return a block's scale byte (int32) and the multiplier to the elements' range (NaN for NaN).

    Every mode takes the exponent of ``amax``, rounded up from some mantissa on, minus the format's largest:
    adding the mantissa's distance to the next power of two carries into the exponent.
    """
    MAX_EXPONENT: tl.constexpr = FORMAT.max_exponent
    ELEM_MAX: tl.constexpr = FORMAT.elem_max
    bits = bits_of(amax)
    # elem_max = 2**MAX_EXPONENT * (1 + ELEM_MANTISSA * 2**-23)
    ELEM_MANTISSA: tl.constexpr = int((ELEM_MAX / 2.0**MAX_EXPONENT - 1.0) * 8388608.0)
    if MODE == "rceil":
        CARRY: tl.constexpr = 0x7FFFFF - ELEM_MANTISSA
    elif MODE == "ceil":
        CARRY: tl.constexpr = 0x7FFFFF
    elif MODE == "even":
        CARRY: tl.constexpr = 1 << (22 - FORMAT.mantissa_bits)
    else:
        CARRY: tl.constexpr = 0
    if MODE == "rceil" and not SHORT_MANTISSA:
        # The reference rounds log2(amax / elem_max) to fp32, so an fp32 amax must pass elem_max's mantissa by
        # a few units before the exponent goes up. `above` counts these units, m is the quotient's mantissa
        # (adding 2**23 rounds it to an integer), and k + m * 1.44 ulp > k is the reference's own rounding. At
        # 2**-127 the quotient is subnormal, with steps twice as wide: one unit fewer. A bf16 or fp16 amax is
        # either past that range or has exactly elem_max's mantissa.
        exponent = bits >> 23
        above = (bits & 0x7FFFFF) - ELEM_MANTISSA
        above = tl.maximum(above - (exponent == MAX_EXPONENT).to(tl.int32), 0)
        m = (above.to(tl.float32) * (1.0 + ELEM_MANTISSA / 8388608.0) ** -1 + 8388608.0) - 8388608.0
        byte = exponent - MAX_EXPONENT
        k = (byte - 127).to(tl.float32)
        byte = tl.maximum(byte + ((k + m * _LOG2_PER_ULP) > k).to(tl.int32), 0)
    else:
        byte = tl.maximum(bits + (CARRY - (MAX_EXPONENT << 23)), 0) >> 23
    if (
        MODE == "rceil"
    ):  # 0 means "too small to scale"; Inf has 254, whose multiplier 2**-127 is subnormal
        is_inf = bits == 0x7F800000
        byte = tl.where(is_inf, 254, byte)
        multiplier = tl.where(byte == 0, 127, 254 - byte) << 23
        multiplier = tl.where(is_inf, 0x400000, multiplier)
    else:  # 0 counts as 2**-126, the smallest normal
        multiplier = (254 - tl.maximum(byte, 1)) << 23
    is_nan = bits > 0x7F800000
    return tl.where(is_nan, 255, byte), float_of(tl.where(is_nan, 0x7FC00000, multiplier))


@triton.jit
def e4m3_scale(amax, per_tensor_scale, FORMAT: tl.constexpr):
    """Return NVFP4's scale byte (int32) of a block, and the reciprocal of its whole scale."""
    if FORMAT.has_fp8_instructions and len(per_tensor_scale.shape) == 0:
        if (per_tensor_scale > _SMALLEST_QUICK) & (per_tensor_scale < _LARGEST_QUICK):
            byte, multiplier = _quick_e4m3_scale(amax, per_tensor_scale, FORMAT)
        else:
            byte, multiplier = _any_e4m3_scale(amax, per_tensor_scale, FORMAT)
    else:
        byte, multiplier = _any_e4m3_scale(amax, per_tensor_scale, FORMAT)
    return byte, multiplier


@triton.jit
def _any_e4m3_scale(amax, per_tensor_scale, FORMAT: tl.constexpr):
    SCALE: tl.constexpr = FORMAT.scale
    ones = tl.full(amax.shape, 1.0, tl.float32)
    scale = tl.div_rn(tl.div_rn(amax, ones * FORMAT.elem_max), ones * per_tensor_scale)
    is_nan = scale != scale
    scale = tl.minimum(tl.maximum(scale, _E4M3_MIN_NORMAL), _E4M3_MAX)
    byte = tl.where(is_nan, 0x7F, encode(scale, SCALE))
    value = decode(byte, SCALE)
    return byte, tl.div_rn(tl.div_rn(ones, ones * per_tensor_scale), value)


@triton.jit
def _quick_e4m3_scale(amax, per_tensor_scale, FORMAT: tl.constexpr):
    """:func:`_any_e4m3_scale` without its divisions' branches, for a per-tensor scale far from fp32's limits.

    The corrections below get the quotients of Inf and of tiny numbers wrong; both functions clamp those.
    """
    SCALE: tl.constexpr = FORMAT.scale
    ELEM_MAX: tl.constexpr = FORMAT.elem_max
    SIXTH: tl.constexpr = 1.0 / ELEM_MAX
    whole = tl.div_rn(1.0, per_tensor_scale)
    part = corrected(amax * SIXTH, amax, ELEM_MAX, SIXTH)
    scale = corrected(part * whole, part, per_tensor_scale, whole)
    scale = corrected(scale, part, per_tensor_scale, whole)
    scale = tl.maximum(tl.minimum(scale, _E4M3_MAX), _E4M3_MIN_NORMAL)  # NaN becomes the largest
    byte = tl.where(amax != amax, 0x7F, encode(scale, SCALE))
    value = decode(byte, SCALE)
    reciprocal = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
    )
    reciprocal = tl.fma(reciprocal, tl.fma(-value, reciprocal, 1.0), reciprocal)
    return byte, corrected(whole * reciprocal, whole, value, reciprocal)


@triton.jit
def corrected(quotient, a, b, reciprocal):
    """Return ``a / b`` rounded to nearest, from a quotient at most one unit off and the rounded 1 / b.

    Markstein 1990, "Computation of elementary functions on the IBM RISC System/6000 processor"; no underflow.
    The quotients by 6 and by every e4m3 value are right in one step from ``a * reciprocal`` (test_tile.py).
    """
    return tl.fma(tl.fma(-b, quotient, a), reciprocal, quotient)


@triton.jit
def block_scale(
    amax,
    per_tensor_scale,
    MODE: tl.constexpr,
    SHORT_MANTISSA: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Return (scale byte, multiplier) of each block in ``amax``; SHORT_MANTISSA: x was bf16 or fp16."""
    if FORMAT.scale is None:
        byte, multiplier = e8m0_scale(amax, MODE, SHORT_MANTISSA, FORMAT)
    else:
        byte, multiplier = e4m3_scale(amax, per_tensor_scale, FORMAT)
    return byte, multiplier


@triton.jit
def scale_value(byte, per_tensor_scale, FORMAT: tl.constexpr):
    """Return the fp32 value of a scale byte (int32)."""
    if FORMAT.scale is None:
        bits = tl.where(byte == 0, 0x400000, byte << 23)
        value = float_of(tl.where(byte == 255, 0x7FC00000, bits))
    else:
        SCALE: tl.constexpr = FORMAT.scale
        value = decode(byte, SCALE) * per_tensor_scale
    return value


@triton.jit
def round_to_grid(y, FORMAT: tl.constexpr):
    """Round |y| to the nearest element's magnitude, ties to even: adding 2**(e + 23 - m) drops the rest."""
    MIN_EXPONENT: tl.constexpr = 2 - (1 << (FORMAT.exponent_bits - 1))
    magnitude = tl.minimum(tl.abs(y), FORMAT.elem_max)
    binade = tl.maximum(bits_of(magnitude) & 0x7F800000, (127 + MIN_EXPONENT) << 23)
    magic = float_of(binade + ((23 - FORMAT.mantissa_bits) << 23))
    return (magnitude + magic) - magic


@triton.jit
def encode(y, FORMAT: tl.constexpr):
    """Return element codes (int32) of scaled values, rounded to nearest even and saturated.

    NaN becomes 0x7F in the fp8 types. Its e2m1 code is undefined: callers fill the block with NAN_WORD.
    """
    EXPONENT_BITS: tl.constexpr = FORMAT.exponent_bits
    MANTISSA_BITS: tl.constexpr = FORMAT.mantissa_bits
    if EXPONENT_BITS == 2:
        # Three linear pieces map 0, .5, 1, 1.5, 2, 3, 4, 6 to 0 .. 7; an fma onto 2**23 rounds once, to an
        # integer in the low bits.
        magnitude = tl.abs(y)
        code = tl.minimum(tl.fma(magnitude, 2.0, 8388608.0), tl.fma(magnitude, 1.0, 8388610.0))
        code = tl.minimum(code, tl.fma(magnitude, 0.5, 8388612.0))
        code = (bits_of(tl.minimum(code, 8388615.0)) & 7) | ((bits_of(y) >> 28) & 8)
    elif FORMAT.has_fp8_instructions:
        # The instructions saturate and turn NaN into 0x7F. Inline PTX, because Triton 3.6's own cast,
        # followed by widening and packing into words, gave wrong bytes on an H200 for some tile shapes (bf16
        # rows, fp32 columns); the GPU tests check the bytes of both.
        asm: tl.constexpr = _ENCODE_E4M3 if EXPONENT_BITS == 4 else _ENCODE_E5M2
        code = tl.inline_asm_elementwise(asm, "=r,f", [y], dtype=tl.int32, is_pure=True, pack=1)
    else:
        BIAS: tl.constexpr = (1 << (EXPONENT_BITS - 1)) - 1
        grid = round_to_grid(y, FORMAT)
        normal = (bits_of(grid) >> (23 - MANTISSA_BITS)) - ((127 - BIAS) << MANTISSA_BITS)
        subnormal = (grid * (2.0 ** (MANTISSA_BITS + BIAS - 1))).to(tl.int32)
        code = tl.where(normal < (1 << MANTISSA_BITS), subnormal, normal)
        code = tl.where(y != y, 0x7F, code | ((bits_of(y) >> 24) & 0x80))
    return code


@triton.jit
def encode_bytes(y, FORMAT: tl.constexpr):
    """:func:`encode` to 8-bit elements as uint8, four per thread by two instructions."""
    if FORMAT.has_fp8_instructions:
        asm: tl.constexpr = _ENCODE_FOUR_E4M3 if FORMAT.exponent_bits == 4 else _ENCODE_FOUR_E5M2
        code = tl.inline_asm_elementwise(
            asm, "=r,f,f,f,f", [y], dtype=tl.uint8, is_pure=True, pack=4
        )
    else:
        code = encode(y, FORMAT).to(tl.uint8)
    return code


@triton.jit
def encode_two(a, b, FORMAT: tl.constexpr):
    """:func:`encode` a, and b in the bits above it."""
    if FORMAT.elem_bits == 8 and FORMAT.has_fp8_instructions:
        asm: tl.constexpr = _ENCODE_TWO_E4M3 if FORMAT.exponent_bits == 4 else _ENCODE_TWO_E5M2
        code = tl.inline_asm_elementwise(
            asm, "=r,f,f", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        code = encode(a, FORMAT)
        code |= encode(b, FORMAT) << FORMAT.elem_bits
    return code


@triton.jit
def decode(code, FORMAT: tl.constexpr):
    """Return the fp32 values of element codes (int32)."""
    EXPONENT_BITS: tl.constexpr = FORMAT.exponent_bits
    MANTISSA_BITS: tl.constexpr = FORMAT.mantissa_bits
    ELEM_BITS: tl.constexpr = FORMAT.elem_bits
    if ELEM_BITS == 8 and FORMAT.has_fp8_instructions:
        byte = code.to(tl.uint8)
        if EXPONENT_BITS == 4:
            value = byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            value = byte.to(tl.float8e5, bitcast=True).to(tl.float32)
    else:
        # Put the code's bits at the top of an fp32 mantissa and exponent; one multiplication then corrects
        # the difference of the biases, for subnormals too.
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
def pack_columns(code, BITS: tl.constexpr):
    """Pack ``[R, N, C]`` codes into ``[R, C]`` words, the first of N in the lowest bits."""
    shift = tl.arange(0, code.shape[1]) * BITS
    return tl.sum(code << shift[None, :, None], axis=1)


@triton.jit
def pack_neighbours(code, BITS: tl.constexpr):
    """Pack ``[R, C]`` codes of BITS bits into ``[R, C / 2]`` of twice the bits, the even code in the low half."""
    low, high = tl.split(code.reshape(code.shape[0], code.shape[1] // 2, 2))
    return low | (high << BITS)


@triton.jit
def encode_words(y):
    """Encode ``[A, B, 8]`` scaled values to ``[A, B]`` words of e2m1, the first in the lowest bits.

    The same as :func:`encode`, for whole words: the bits of 2**23 add up to a constant, so codes need no
    mask, and a funnel shift takes a sign.
    """
    even, odd = tl.split(y.reshape(y.shape[0], y.shape[1], 2, 2, 2))
    y04, y26 = tl.split(even)
    y15, y37 = tl.split(odd)
    y0, y4 = tl.split(y04)
    y1, y5 = tl.split(y15)
    y2, y6 = tl.split(y26)
    y3, y7 = tl.split(y37)
    codes, signs = _e2m1_above(y7, 0, tl.zeros(y7.shape, tl.uint32))
    codes, signs = _e2m1_above(y6, codes, signs)
    codes, signs = _e2m1_above(y5, codes, signs)
    codes, signs = _e2m1_above(y4, codes, signs)
    codes, signs = _e2m1_above(y3, codes, signs)
    codes, signs = _e2m1_above(y2, codes, signs)
    codes, signs = _e2m1_above(y1, codes, signs)
    codes, signs = _e2m1_above(y0, codes, signs)
    return (codes - _E2M1_OFFSETS) | (signs.to(tl.int32, bitcast=True) & _E2M1_SIGNS)


@triton.jit
def _e2m1_above(y, codes, signs):
    """Shift ``codes`` and ``signs`` up by one code; add y's code on top of 2**23, and its sign, below them."""
    magnitude = tl.abs(y)
    code = tl.minimum(
        bits_of(tl.fma(magnitude, 2.0, 8388608.0)), bits_of(tl.fma(magnitude, 1.0, 8388610.0))
    )
    code = tl.minimum(code, bits_of(tl.fma(magnitude, 0.5, 8388612.0)))
    code = tl.minimum(code, _E2M1_LARGEST)
    return (codes << 4) + code, (signs << 4) | (y.to(tl.uint32, bitcast=True) >> 28)


@triton.jit
def pack_words(code):
    """Pack ``[R, C]`` codes of e2m1 into ``[R, C / 8]`` words, the first in the lowest bits."""
    return pack_neighbours(pack_neighbours(pack_neighbours(code, 4), 8), 16)


@triton.jit
def unpack_word(word, BITS: tl.constexpr):
    """Unpack ``[R]`` words of eight codes to ``[R, 8]`` codes (int32)."""
    return ((word[:, None] >> (tl.arange(0, 8) * BITS)[None, :]) & ((1 << BITS) - 1)).to(tl.int32)
