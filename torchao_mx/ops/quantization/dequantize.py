"""dequantize: turn packed elements and block scales into values, in one pass at copy bandwidth.

The kernels mirror ``quantization/quantize.py``: *rows* writes the quantized axis contiguously, *columns*
transposes on the way out, so that ``dequantize(*quantize(x, axis=-2), axis=-2)`` has x's shape and layout.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from torchao_mx import reference
from torchao_mx.errors import check_axis, check_high_precision
from torchao_mx.formats import BlockFormat, format_by_name
from torchao_mx.ops.core.arguments import check_packed
from torchao_mx.ops.core.launch import (
    bytes_of,
    cdiv,
    format_on,
    launched,
    on_device_of,
    per_tensor_kind,
)
from torchao_mx.ops.core.register import define_op
from torchao_mx.ops.core.replay import replayed
from torchao_mx.ops.core.tiles import DEQUANTIZE_COLUMNS, DEQUANTIZE_ROWS
from torchao_mx.ops.quantization import tile


@launched
@triton.jit
def _dequantize_rows_kernel(
    q_ptr,
    s_ptr,
    pts_ptr,
    out_ptr,
    n_words,
    words_per_expert,
    PER_TENSOR: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """``q_ptr`` holds words that decode to eight elements: int32 for e2m1, int64 for fp8.

    A thread loads one word and stores its 16 bytes of bf16: nothing crosses threads.
    """
    first = tl.program_id(0).to(tl.int64) * TILE
    index = tl.arange(0, TILE)
    inside = index < n_words - first
    word = tl.load(q_ptr + first + index, mask=inside, other=0)
    byte = tl.load(s_ptr + (first + index) // (FORMAT.block_size // 8), mask=inside, other=0).to(
        tl.int32
    )
    expert = (first + tl.minimum(index, n_words - first - 1)) // words_per_expert
    pts = tile.load_per_tensor_scale(pts_ptr, expert, PER_TENSOR)
    scale = tile.scale_value(byte, pts, FORMAT)
    code = tile.unpack_word(word, FORMAT.elem_bits)
    value = tile.decode(code, FORMAT) * scale[:, None]
    out_ptrs = out_ptr + first * 8 + (index * 8)[:, None] + tl.arange(0, 8)[None, :]
    tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@launched
@triton.jit
def _dequantize_columns_kernel(
    q_ptr,
    s_ptr,
    pts_ptr,
    out_ptr,
    M,
    K,
    PER_TENSOR: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Decode ``q [B, K, M / elems_per_byte]`` to ``out [B, M, K]``."""
    BLOCK: tl.constexpr = FORMAT.block_size
    BYTES: tl.constexpr = TILE_M * FORMAT.elem_bits // 8
    BLOCKS: tl.constexpr = TILE_M // BLOCK
    batch, tile_m, tile_k = tile.tile_of_program(M, TILE_M, K, TILE_K)
    m0, k0 = tile_m * TILE_M, tile_k * TILE_K
    k = k0 + tl.arange(0, TILE_K)
    row_bytes = M // (TILE_M // BYTES)
    byte_index = m0 // (TILE_M // BYTES) + tl.arange(0, BYTES)
    q_ptrs = q_ptr + (batch * K + k[:, None]) * row_bytes + byte_index[None, :]
    packed = tl.load(q_ptrs, mask=(k < K)[:, None] & (byte_index < row_bytes)[None, :], other=0)
    block = m0 // BLOCK + tl.arange(0, BLOCKS)
    s_ptrs = s_ptr + (batch * K + k[:, None]) * (M // BLOCK) + block[None, :]
    s_mask = (k < K)[:, None] & (block < M // BLOCK)[None, :]
    byte = tl.load(s_ptrs, mask=s_mask, other=0).to(tl.int32)
    pts = tile.load_per_tensor_scale(pts_ptr, batch, PER_TENSOR)
    scale = tile.scale_value(byte, pts, FORMAT)
    # Transpose the bytes, before they grow to values.
    packed = tl.trans(packed)
    if FORMAT.exponent_bits == 2:
        byte32 = packed.to(tl.int32)
        code = tl.permute(tl.join(byte32 & 15, byte32 >> 4), (0, 2, 1)).reshape(TILE_M, TILE_K)
    else:
        code = packed.to(tl.int32)
    value = tile.decode(code, FORMAT)
    value = value.reshape(BLOCKS, BLOCK, TILE_K) * tl.trans(scale)[:, None, :]
    m = m0 + tl.arange(0, TILE_M)
    out_ptrs = out_ptr + (batch * M + m[:, None]) * K + k[None, :]
    tl.store(
        out_ptrs,
        value.reshape(TILE_M, TILE_K).to(out_ptr.dtype.element_ty),
        mask=(m < M)[:, None] & (k < K)[None, :],
    )


def _empty_values(
    qdata: torch.Tensor, fmt: BlockFormat, dtype: torch.dtype, axis: int
) -> torch.Tensor:
    *lead, packed = qdata.shape
    shape = [*lead, packed * fmt.elems_per_byte]
    if axis == -2:
        shape[-2:] = shape[-1], shape[-2]
    return qdata.new_empty(shape, dtype=dtype)


def _dequantize_cpu(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: str,
    dtype: torch.dtype,
    axis: int,
    per_tensor_scale: torch.Tensor | None,
) -> torch.Tensor:
    return reference.dequantize(qdata, scale, format_by_name(fmt), dtype, axis, per_tensor_scale)


def _dequantize_triton(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: str,
    dtype: torch.dtype,
    axis: int,
    per_tensor_scale: torch.Tensor | None,
) -> torch.Tensor:
    f = format_by_name(fmt)
    out = _empty_values(qdata, f, dtype, axis)
    if out.numel() == 0:
        return out
    qdata, scale = bytes_of(qdata), bytes_of(scale)
    pts = scale if per_tensor_scale is None else per_tensor_scale
    common = dict(PER_TENSOR=per_tensor_kind(per_tensor_scale), FORMAT=format_on(qdata.device, f))
    with on_device_of(qdata):
        if axis == -1:
            words = qdata.view(torch.int32 if f.elem_bits == 4 else torch.int64)
            n_words = words.numel()
            _dequantize_rows_kernel[(cdiv(n_words, DEQUANTIZE_ROWS.size),)](
                words,
                scale,
                pts,
                out,
                n_words,
                n_words // max(1, qdata.shape[0]),
                TILE=DEQUANTIZE_ROWS.size,
                num_warps=DEQUANTIZE_ROWS.warps,
                **common,
            )
        else:
            *_lead, m, k = out.shape
            tiles = cdiv(m, DEQUANTIZE_COLUMNS.m) * cdiv(k, DEQUANTIZE_COLUMNS.k)
            grid = (tiles * (out.numel() // (m * k)),)
            _dequantize_columns_kernel[grid](
                qdata,
                scale,
                pts,
                out,
                m,
                k,
                TILE_M=DEQUANTIZE_COLUMNS.m,
                TILE_K=DEQUANTIZE_COLUMNS.k,
                num_warps=DEQUANTIZE_COLUMNS.warps,
                **common,
            )
    return out


def _dequantize_fake(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: str,
    dtype: torch.dtype,
    axis: int,
    per_tensor_scale: torch.Tensor | None,
) -> torch.Tensor:
    return _empty_values(qdata, format_by_name(fmt), dtype, axis)


dequantize_op = define_op(
    "dequantize",
    "(Tensor qdata, Tensor scale, str fmt, ScalarType dtype, int axis, Tensor? per_tensor_scale)"
    " -> Tensor",
    cpu=_dequantize_cpu,
    cuda=replayed(_dequantize_triton),
    fake=_dequantize_fake,
)


def dequantize(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: BlockFormat,
    dtype: torch.dtype = torch.bfloat16,
    *,
    axis: int = -1,
    per_tensor_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode the results of :func:`torchao_mx.ops.quantize`; not differentiable.

    Each value is element * scale (* per-tensor scale), exact in fp32 for the MX formats, rounded once to
    ``dtype``. Scale byte 255 (E8M0) or 0x7F (E4M3) makes its whole block NaN.

    Args:
        qdata: ``[..., R, C / elems_per_byte]`` of ``fmt.qdata_dtype``.
        scale: ``[..., R, C / block_size]`` of ``fmt.scale_dtype``.
        fmt: the block format.
        dtype: bfloat16, float16 or float32.
        axis: as given to ``quantize``.
        per_tensor_scale: as given to ``quantize``.

    Returns:
        ``[..., R, C]`` for ``axis=-1``, ``[..., C, R]`` for ``axis=-2``, contiguous.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that do not belong together.

    Example:
        >>> import torch
        >>> from torchao_mx import MXFP4, ops
        >>> qdata, scale = ops.quantize(torch.arange(32.0), MXFP4)
        >>> ops.dequantize(qdata, scale, MXFP4, torch.float32)[-4:]
        tensor([32., 32., 32., 32.])
    """
    check_axis(axis)
    check_high_precision(dtype, "the output")
    check_packed(qdata, scale, per_tensor_scale, fmt)
    return dequantize_op(qdata, scale, fmt.name, dtype, axis, per_tensor_scale)
