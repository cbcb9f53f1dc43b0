"""Define the fp8 product: each row of x is rounded to fp8, MXFP4 weights are exact.

::

    scale = max|x_row| / max(fp8)                          fp32, one per row
    q     = fp8(x_row / scale)                             to nearest even
    y     = scale * (q W^T) + s * h up^T + bias            (or q W: reduced over N)

An MXFP4 weight equals an e4m3 matrix times one power of two per output column if the block scales in that
column's sum lie within 14 powers of two (:func:`fits_fp8`). The other columns use the unrounded x, because
the kernels compute them in bf16.
"""

from __future__ import annotations

import torch

from torchao_mx.formats import MXFP4, BlockFormat
from torchao_mx.reference.mm import Added, Rows
from torchao_mx.reference.quantize import dequantize

# e2m1 * 2**(6 - spread) is an e4m3 number for spreads of 0 .. 14.
MAX_SPREAD = 14
# Bounds on a column's largest scale byte: products with row scales then stay within fp32.
MIN_BYTE, MAX_BYTE = 64, 190
# The smallest row scale, whose fp32 reciprocal is finite.
MIN_ROW_SCALE = 2.0**-126
_NAN_BYTE = 255


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize ``x [R, C]`` to (``dtype [R, C]``, fp32 scales ``[R]``): one scale per row, from its amax.

    A row of zeros gets the smallest scale, 2**-126. A row with a NaN or an Inf gets the scale NaN, so all its
    products are NaN.
    """
    largest = torch.finfo(dtype).max
    x = x.float()
    amax = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    scale = (amax / largest).clamp(min=MIN_ROW_SCALE)
    scale = torch.where(amax.isfinite(), scale, torch.nan)
    q = (x * scale.reciprocal().unsqueeze(-1)).clamp(-largest, largest)
    return q.to(dtype), scale


def fits_fp8(
    qdata: torch.Tensor, scale: torch.Tensor, transpose_weight: bool = True
) -> torch.Tensor:
    """Flag the output columns in which the MXFP4 weight ``[..., N, K]`` is exactly e4m3 times a power of two.

    Returns:
        bool. With ``transpose_weight`` (reduced over K) ``[..., N]``, one flag per row; otherwise
        (reduced over N) ``[..., K / 32]``, one per block of columns, which share their scales.
    """
    byte = scale.view(torch.uint8).int()
    per_block = MXFP4.block_size // MXFP4.elems_per_byte
    nonzero = (qdata.unflatten(-1, (-1, per_block)) & 0x77).ne(0).any(-1)
    axis = -1 if transpose_weight else -2
    largest = byte.amax(axis, keepdim=True)
    lost = (largest - byte > MAX_SPREAD) | (largest < MIN_BYTE) | (largest > MAX_BYTE)
    return ~((lost & nonzero) | (byte == _NAN_BYTE)).any(axis)


def fp8_product(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: BlockFormat,
    rows: Rows,
    transpose_weight: bool,
    added: Added,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Define ``fp8_product`` of ``ops.packed_mm.fp8``: sum in fp32 and round once, to x's dtype."""
    offs, order, top_k, n_rows = rows
    h, up, scaling, bias = added
    x_rows = x if order is None else x[order.long() // top_k]
    q, row_scale = quantize_rows(x_rows, dtype)
    rounded = q.float() * row_scale.unsqueeze(-1)
    w = dequantize(qdata, scale, fmt, torch.float32)
    w = w.mT if transpose_weight else w
    fits = fits_fp8(qdata, scale, transpose_weight)
    if not transpose_weight:
        fits = fits.repeat_interleave(fmt.block_size, -1)
    y = torch.zeros(n_rows, w.shape[-1], dtype=torch.float32, device=x.device)
    start = 0
    for e, end in enumerate([n_rows] if offs is None else offs.tolist()):
        group, expert = slice(start, end), ... if offs is None else e
        y[group] = rounded[group] @ w[expert]
        unfit = ~fits[expert]
        if unfit.any():
            y[group, unfit] = x_rows[group].float() @ w[expert][:, unfit]
        if h is not None:
            y[group] += scaling * (h[group].float() @ up[expert].to(x.dtype).float().mT)
        if bias is not None:
            y[group] += bias[expert].float()
        start = end
    return y.to(x.dtype)
