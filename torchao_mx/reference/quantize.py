"""Define quantize and dequantize.

A block of values becomes one scale and ``block_size`` elements::

    amax   = max |x| over the block
    scale  = a power of two from amax, by FLOOR, RCEIL, CEIL or EVEN     (MX formats)
           = e4m3(amax / elem_max / per_tensor_scale)                    (NVFP4)
    element = round_to_nearest_even(x / scale), saturated at +-elem_max
    value   = element * scale (* per_tensor_scale)

Sources: OCP MX v1.0 section 6.3 (FLOOR); the cuBLAS manual, "D block quantization" (RCEIL); torchao's
``to_mx`` and ``nvfp4_quantize`` (0.18) for CEIL, EVEN and every corner case. The bytes equal torchao's, with
one exception: in a block that holds a NaN, torchao's *elements* depend on its version or on the device. Here
they are :attr:`BlockFormat.nan_code`. The scale is NaN as in torchao, so the block dequantizes to NaN. An Inf
saturates its block, also as in torchao.

Exponents are built as integers: arithmetic overflows at 2**(s - 127) for the largest E8M0 bytes.
"""

from __future__ import annotations

import functools
import math

import torch

from torchao_mx.formats import BlockFormat, ScaleCalculationMode

_E8M0_NAN = 255
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
MIN_PER_TENSOR_SCALE = 2.0**-120
_E4M3_MIN_NORMAL = torch.finfo(torch.float8_e4m3fn).smallest_normal
_FP32_MANTISSA_BITS = 23
_FP32_MANTISSA_MASK = (1 << _FP32_MANTISSA_BITS) - 1
_FP32_BIAS = 127
# The step of log2 v per unit in the last place of v's fp32 mantissa, at a power of two.
_LOG2_PER_ULP = math.log2(math.e) * 2.0**-_FP32_MANTISSA_BITS
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_CASE_SHIFT = 21  # keeps two mantissa bits
_E2M1_CASE_MASK = (1 << _E2M1_CASE_SHIFT) - 1


def quantize(
    x: torch.Tensor,
    fmt: BlockFormat,
    scaling_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL,
    axis: int = -1,
    per_tensor_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize ``x [..., M, K]`` in blocks along ``axis``.

    The quantized axis becomes the last axis of the results, where it is contiguous.

    Returns:
        ``axis=-1``: qdata ``[..., M, K / elems_per_byte]`` and scale ``[..., M, K / block_size]``;
        ``axis=-2``: qdata ``[..., K, M / elems_per_byte]`` and scale ``[..., K, M / block_size]``.
        qdata is ``fmt.qdata_dtype``, scale ``fmt.scale_dtype``.
    """
    if axis == -2:
        x = x.transpose(-2, -1)
    blocks = x.contiguous().unflatten(-1, (-1, fmt.block_size))
    amax = blocks.abs().amax(-1, keepdim=True).float()
    if fmt.scale_dtype == torch.float8_e8m0fnu:
        scale, multiplier = _e8m0_scale(amax, fmt, scaling_mode)
    else:
        scale, multiplier = _e4m3_scale(amax, fmt, per_tensor_scale)
    y = blocks.float() * multiplier
    if fmt.elem_bits == 4:
        codes = _encode_e2m1(y).flatten(-2).view(torch.int16)  # even element in the low byte
        qdata = (codes | (codes >> 4)).to(torch.uint8)
    else:
        codes = y.clamp_(-fmt.elem_max, fmt.elem_max).to(fmt.elem_dtype).view(torch.uint8)
        codes = torch.where(multiplier.isnan(), fmt.nan_code, codes)
        qdata = codes.flatten(-2).view(fmt.elem_dtype)
    return qdata, scale.squeeze(-1).view(fmt.scale_dtype)


def dequantize(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: BlockFormat,
    dtype: torch.dtype = torch.bfloat16,
    axis: int = -1,
    per_tensor_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the values of :func:`quantize`'s results in ``dtype``, of shape ``[..., M, K]``.

    Each product element * scale is exact in fp32 and rounded once, to ``dtype``.
    """
    if fmt.elem_bits == 4:
        pairs = _e2m1_pairs(qdata.device)
        values = pairs.index_select(0, qdata.flatten().int()).view(torch.float32)
        values = values.view(*qdata.shape[:-1], 2 * qdata.shape[-1])
    else:
        values = qdata.float()
    scale_fp32 = scale.float()
    if per_tensor_scale is not None:
        scale_fp32 = per_tensor_scale * scale_fp32
    out = values.unflatten(-1, (-1, fmt.block_size)).mul_(scale_fp32.unsqueeze(-1)).flatten(-2)
    out = out.to(dtype)
    return out.transpose(-2, -1).contiguous() if axis == -2 else out


def fake_quantize(
    x: torch.Tensor,
    fmt: BlockFormat,
    scaling_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL,
    axis: int = -1,
    per_tensor_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``dequantize(quantize(x))`` in x's dtype and shape."""
    qdata, scale = quantize(x, fmt, scaling_mode, axis, per_tensor_scale)
    return dequantize(qdata, scale, fmt, x.dtype, axis, per_tensor_scale)


def per_tensor_scale(
    x: torch.Tensor,
    fmt: BlockFormat,
    per_expert: bool = False,
    offs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return NVFP4's fp32 scale, ``amax(|x|) / (448 * 6)``, which makes the largest block scale 448.

    There is one scale (0-d) for the tensor, or one per leading index (``[E, 1, 1]``) with ``per_expert``. It
    is at least 2**-120: the reciprocal of a whole scale then stays within fp32, and zeros quantize to zeros
    (torchao divides zero by zero and yields NaN). ``offs`` are the end offsets of groups of rows; unassigned
    rows do not count.
    """
    if offs is not None:
        x = x[: offs[-1].clamp(min=0)]
    if offs is not None and x.numel() == 0:
        return x.new_full((), MIN_PER_TENSOR_SCALE, dtype=torch.float32)
    dims = (-2, -1) if per_expert else None
    amax = torch.linalg.vector_norm(x, math.inf, dim=dims, keepdim=per_expert).float()
    return (amax / (E4M3_MAX * fmt.elem_max)).clamp(min=MIN_PER_TENSOR_SCALE)


def _e8m0_scale(
    amax: torch.Tensor, fmt: BlockFormat, mode: ScaleCalculationMode
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each block's E8M0 byte and the power of two that multiplies its values."""
    if mode == ScaleCalculationMode.RCEIL:
        byte = _rceil_byte(amax / fmt.elem_max)
    else:
        bits = amax.view(torch.int32)
        if mode == ScaleCalculationMode.EVEN:  # round amax to the element's mantissa first
            bits = bits + (1 << (_FP32_MANTISSA_BITS - fmt.mantissa_bits - 1))
        byte = bits >> _FP32_MANTISSA_BITS
        if mode == ScaleCalculationMode.CEIL:
            byte = byte + (bits & _FP32_MANTISSA_MASK > 0)
        byte = (byte - fmt.max_exponent).clamp(0, _E8M0_NAN)
    # RCEIL reads byte 0 as "too small to scale"; the other modes read it as 2**-126, the smallest normal.
    exponent = 2 * _FP32_BIAS - byte.clamp(min=1)
    if mode == ScaleCalculationMode.RCEIL:
        exponent = torch.where(byte == 0, _FP32_BIAS, exponent)
    multiplier = torch.where(
        exponent == 0, 1 << (_FP32_MANTISSA_BITS - 1), exponent << _FP32_MANTISSA_BITS
    ).view(torch.float32)
    nan = amax.isnan()
    byte = torch.where(nan, _E8M0_NAN, byte).to(torch.uint8)
    return byte, torch.where(nan, math.nan, multiplier)


def _rceil_byte(descale: torch.Tensor) -> torch.Tensor:
    """Return 127 + ceil(log2(descale)) in 0 .. 254, with log2 rounded to fp32 as in torchao.

    The rounding matters only next to powers of two: log2(2**k * (1 + m * 2**-23)) is k until m * 1.44 ulp
    reaches half a unit in the last place of k. Adding the two in fp32 rounds the same way on every
    device, which a library's log2 need not do. Checked against torch.log2 for every exponent.
    """
    bits = descale.view(torch.int32)
    exponent = bits >> _FP32_MANTISSA_BITS
    mantissa = bits & _FP32_MANTISSA_MASK
    subnormal = exponent == 0  # only 2**-127 and above matter: below, the byte is 0
    half = 1 << (_FP32_MANTISSA_BITS - 1)
    mantissa = torch.where(subnormal, (mantissa - half).clamp(min=0) * 2, mantissa)
    k = (exponent - _FP32_BIAS).float()
    rounded_up = k + mantissa * _LOG2_PER_ULP > k
    return (exponent + rounded_up).clamp(max=_E8M0_NAN - 1)


def _e4m3_scale(
    amax: torch.Tensor, fmt: BlockFormat, per_tensor_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return NVFP4's block scale and the reciprocal of the whole scale (torchao 0.18 multiplies by it)."""
    block_scale = amax / fmt.elem_max
    reciprocal = 1.0
    if per_tensor_scale is not None:
        pts = per_tensor_scale.unsqueeze(-1) if per_tensor_scale.dim() else per_tensor_scale
        block_scale = block_scale / pts
        reciprocal = 1.0 / pts
    scale = block_scale.clamp(_E4M3_MIN_NORMAL, E4M3_MAX).to(torch.float8_e4m3fn)
    # 0x7F whatever the NaN's sign: on x86, inf / inf is a negative NaN.
    byte = torch.where(block_scale.isnan(), 0x7F, scale.view(torch.uint8))
    return byte, reciprocal / scale.float()


def _encode_e2m1(y: torch.Tensor) -> torch.Tensor:
    """Return the 4-bit codes (uint8) of fp32 values: nearest even, saturated, NaN as E2M1's nan_code.

    One look-up suffices. The code changes at points with two mantissa bits, so it depends on the sign, the
    exponent, two mantissa bits and whether lower bits are set. The sum of the bits' floor and ceiling to two
    mantissa bits numbers the cases (Inf's neighbours wrap around to -1, among the NaNs).
    """
    bits = y.view(torch.int32)
    case = (bits >> _E2M1_CASE_SHIFT).add_((bits + _E2M1_CASE_MASK) >> _E2M1_CASE_SHIFT)
    table = _e2m1_codes(y.device)
    return table.index_select(0, case.bitwise_and_(len(table) - 1).flatten()).view(y.shape)


@functools.lru_cache
def _e2m1_codes(device: torch.device) -> torch.Tensor:
    """Return ``[4096]`` uint8, the code for each case of :func:`_encode_e2m1`."""
    case = torch.arange(-2048, 2048, dtype=torch.int32).roll(-2048)  # 0 .. 2047, -2048 .. -1
    between = (case & 1) * ((_E2M1_CASE_MASK + 1) // 2)
    value = (((case >> 1) << _E2M1_CASE_SHIFT) + between).view(torch.float32)
    grid = torch.tensor(_E2M1_VALUES, dtype=torch.float32)
    middle = (grid[1:] + grid[:-1]) / 2
    # Between codes c and c + 1, a tie goes to the even code.
    above = value.abs().unsqueeze(-1)
    up = torch.where(torch.arange(len(middle)) % 2 == 0, above > middle, above >= middle)
    code = up.sum(-1) | (value.signbit().int() << 3)
    return torch.where(value.isnan(), len(grid) - 1, code).to(torch.uint8).to(device)


@functools.lru_cache
def _e2m1_pairs(device: torch.device) -> torch.Tensor:
    """Return ``[256]``: each packed byte's two fp32 values, low nibble first, as one 8-byte item."""
    values = torch.tensor(_E2M1_VALUES, dtype=torch.float32)
    values = torch.cat([values, -values])
    byte = torch.arange(256)
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], -1)
    return pairs.view(torch.int64).flatten().to(device)
