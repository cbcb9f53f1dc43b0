"""fake_quantize: ``dequantize(quantize(x))`` in one pass, with a straight-through gradient.

It reads and writes each element once and stores nothing packed. Rounding to the element grid needs no codes:
adding and subtracting a power of two drops the mantissa bits that the element lacks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from torchao_mx import reference
from torchao_mx.formats import BlockFormat, ScaleCalculationMode, format_by_name
from torchao_mx.ops.core.arguments import check_operand
from torchao_mx.ops.core.launch import (
    batched_rows,
    cdiv,
    format_on,
    launched,
    on_device_of,
    per_tensor_kind,
    quantized_axis_is_contiguous,
    rounds_products,
    row_layout,
)
from torchao_mx.ops.core.register import define_op
from torchao_mx.ops.core.replay import replayed
from torchao_mx.ops.core.tiles import FAKE_QUANTIZE_COLUMNS, FAKE_QUANTIZE_ROWS
from torchao_mx.ops.quantization import tile


@triton.jit
def _fake_quantize_tile(
    x,
    pts,
    axis: tl.constexpr,
    MODE: tl.constexpr,
    SHORT_MANTISSA: tl.constexpr,
    FORMAT: tl.constexpr,
):
    amax = tile.max_magnitude(x, axis)
    byte, multiplier = tile.block_scale(amax, pts, MODE, SHORT_MANTISSA, FORMAT)
    scale = tile.scale_value(byte, pts, FORMAT)
    y = x * tl.expand_dims(multiplier, axis)
    grid = tile.round_to_grid(y, FORMAT)
    signed = tile.float_of(tile.bits_of(grid) | (tile.bits_of(y) & (-2147483648)))
    return signed * tl.expand_dims(scale, axis)


@launched
@triton.jit
def _fake_quantize_rows_kernel(
    x_ptr,
    out_ptr,
    pts_ptr,
    n_blocks,
    blocks_per_row,
    row_stride,
    blocks_per_expert,
    CONTIGUOUS: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    TILE: tl.constexpr,
    MODE: tl.constexpr,
    SHORT_MANTISSA: tl.constexpr,
    FORMAT: tl.constexpr,
):
    BLOCK: tl.constexpr = FORMAT.block_size
    first = tl.program_id(0).to(tl.int64) * TILE
    block = tl.arange(0, TILE)
    inside = block < n_blocks - first
    elem = tl.arange(0, BLOCK)
    if CONTIGUOUS:
        x_ptrs = x_ptr + first * BLOCK + (block * BLOCK)[:, None] + elem[None, :]
    else:
        row = (first + block) // blocks_per_row
        start = row * row_stride + (first + block - row * blocks_per_row) * BLOCK
        x_ptrs = x_ptr + start[:, None] + elem[None, :]
    x = tl.load(x_ptrs, mask=inside[:, None], other=0.0).to(tl.float32)
    expert = (first + tl.minimum(block, n_blocks - first - 1)) // blocks_per_expert
    pts = tile.load_per_tensor_scale(pts_ptr, expert, PER_TENSOR)
    value = _fake_quantize_tile(x, pts, 1, MODE, SHORT_MANTISSA, FORMAT)
    out_ptrs = out_ptr + first * BLOCK + (block * BLOCK)[:, None] + elem[None, :]
    tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@launched
@triton.jit
def _fake_quantize_columns_kernel(
    x_ptr,
    out_ptr,
    pts_ptr,
    M,
    K,
    x_strides,
    PER_TENSOR: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE_K: tl.constexpr,
    MODE: tl.constexpr,
    SHORT_MANTISSA: tl.constexpr,
    FORMAT: tl.constexpr,
):
    BLOCK: tl.constexpr = FORMAT.block_size
    batch_stride, row_stride = x_strides
    batch, tile_m, tile_k = tile.tile_of_program(M // BLOCK, BLOCKS, K, TILE_K)
    block = tile_m * BLOCKS + tl.arange(0, BLOCKS)
    m = ((block * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]).to(tl.int64)[:, :, None]
    k = (tile_k * TILE_K + tl.arange(0, TILE_K))[None, None, :]
    inside = (m < M) & (k < K)
    x_ptrs = x_ptr + batch * batch_stride + m * row_stride + k
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    pts = tile.load_per_tensor_scale(pts_ptr, batch, PER_TENSOR)
    value = _fake_quantize_tile(x, pts, 1, MODE, SHORT_MANTISSA, FORMAT)
    out_ptrs = out_ptr + (batch * M + m) * K + k
    tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=inside)


def _fake_quantize_cpu(
    x: torch.Tensor, fmt: str, scaling_mode: str, axis: int, per_tensor_scale: torch.Tensor | None
) -> torch.Tensor:
    return reference.fake_quantize(
        x, format_by_name(fmt), ScaleCalculationMode(scaling_mode), axis, per_tensor_scale
    )


def _empty_result(x: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x`` in kernel form, ``[B, M, K]`` with blocks along K, and an empty result laid out like it.

    The result is contiguous along the same axis as x, so neither kernel transposes.
    """
    x_BMK = batched_rows(x if axis == -1 else x.mT)
    if quantized_axis_is_contiguous(x_BMK):
        return x_BMK, x.new_empty(x_BMK.shape)
    return x_BMK, x.new_empty(x_BMK.mT.shape).mT


def _in_shape_of(x: torch.Tensor, axis: int, out_BMK: torch.Tensor) -> torch.Tensor:
    return (out_BMK if axis == -1 else out_BMK.mT).reshape(x.shape)


def _fake_quantize_triton(
    x: torch.Tensor, fmt: str, scaling_mode: str, axis: int, per_tensor_scale: torch.Tensor | None
) -> torch.Tensor:
    f = format_by_name(fmt)
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    x_BMK, out_BMK = _empty_result(x, axis)
    common = dict(
        PER_TENSOR=per_tensor_kind(per_tensor_scale),
        MODE=scaling_mode,
        SHORT_MANTISSA=x.dtype != torch.float32,
        enable_fp_fusion=not rounds_products(f),
        FORMAT=format_on(x.device, f),
    )
    pts = out_BMK if per_tensor_scale is None else per_tensor_scale
    with on_device_of(x):
        if quantized_axis_is_contiguous(x_BMK):
            layout = row_layout(x_BMK, f.block_size)
            _fake_quantize_rows_kernel[(cdiv(layout.n_blocks, FAKE_QUANTIZE_ROWS.size),)](
                layout.x,
                out_BMK,
                pts,
                layout.n_blocks,
                layout.blocks_per_row,
                layout.x.stride(1),
                layout.blocks_per_batch,
                CONTIGUOUS=layout.contiguous,
                TILE=FAKE_QUANTIZE_ROWS.size,
                num_warps=FAKE_QUANTIZE_ROWS.warps,
                **common,
            )
        else:
            x_BKM = x_BMK.mT
            batch, m, k = x_BKM.shape
            tiles = cdiv(m, FAKE_QUANTIZE_COLUMNS.m * f.block_size) * cdiv(
                k, FAKE_QUANTIZE_COLUMNS.k
            )
            _fake_quantize_columns_kernel[(batch * tiles,)](
                x_BKM,
                out_BMK,
                pts,
                m,
                k,
                x_BKM.stride()[:2],
                BLOCKS=FAKE_QUANTIZE_COLUMNS.m,
                TILE_K=FAKE_QUANTIZE_COLUMNS.k,
                num_warps=FAKE_QUANTIZE_COLUMNS.warps,
                **common,
            )
    return _in_shape_of(x, axis, out_BMK)


def _fake_quantize_fake(
    x: torch.Tensor, fmt: str, scaling_mode: str, axis: int, per_tensor_scale: torch.Tensor | None
) -> torch.Tensor:
    if x.device.type == "cpu" or x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return _in_shape_of(x, axis, _empty_result(x, axis)[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    pass


def _straight_through(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return grad, None, None, None, None  # x, fmt, scaling_mode, axis, per_tensor_scale


fake_quantize_op = define_op(
    "fake_quantize",
    "(Tensor x, str fmt, str scaling_mode, int axis, Tensor? per_tensor_scale) -> Tensor",
    cpu=_fake_quantize_cpu,
    cuda=replayed(_fake_quantize_triton),
    fake=_fake_quantize_fake,
    strided=("x",),
    setup_context=_setup_context,
    backward=_straight_through,
)


def fake_quantize(
    x: torch.Tensor,
    fmt: BlockFormat,
    scaling_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL,
    *,
    axis: int = -1,
    per_tensor_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``dequantize(quantize(x))`` in x's shape and dtype; its gradient is the identity.

    Takes the arguments and raises the errors of :func:`torchao_mx.ops.quantize`. The straight-through
    estimator (Bengio et al. 2013, arXiv:1308.3432) also passes the gradient of saturated values.

    Example:
        >>> import torch
        >>> from torchao_mx import MXFP4, ops
        >>> x = torch.arange(32.0, requires_grad=True)
        >>> ops.fake_quantize(x, MXFP4).sum().backward()
        >>> x.grad.unique()
        tensor([1.])
    """
    check_operand(x, fmt, scaling_mode, axis, per_tensor_scale)
    return fake_quantize_op(x, fmt.name, scaling_mode.value, axis, per_tensor_scale)
