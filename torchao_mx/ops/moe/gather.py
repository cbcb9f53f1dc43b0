"""From grouped rows back to tokens: the weighted sum of each token's rows, and its backward.

``order [R]`` maps grouped row i to slot ``order[i]`` of ``[T, top_k]``; its inverse maps a slot to its row.
With the inverse, one program owns a token: it sums in the order of the slots, without atomics, and backward
reads a token's gradient once for all of its rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.compiler import is_compiling

from torchao_mx import reference
from torchao_mx.ops.core.launch import cdiv, launched, next_power_of_2, on_device_of
from torchao_mx.ops.core.tiles import INVERSE, SUM_ROWS


@launched
@triton.jit
def _inverse_kernel(order_ptr, inverse_ptr, n_rows, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    slot = tl.load(order_ptr + row, mask=row < n_rows, other=-1)
    # Each slot has one row, so plain stores are deterministic. Slots out of range are skipped.
    tl.store(inverse_ptr + slot, row, mask=(slot >= 0) & (slot < n_rows))


def inverse(order: torch.Tensor) -> torch.Tensor:
    """Invert a permutation: ``inverse[order[i]] = i``, int32 ``[R]``."""
    out = torch.empty_like(order, dtype=torch.int32, memory_format=torch.contiguous_format)
    n_rows = order.shape[0]
    if n_rows:
        with on_device_of(order):
            grid = (cdiv(n_rows, INVERSE.size),)
            _inverse_kernel[grid](order, out, n_rows, TILE=INVERSE.size)
    return out


def tokens_of(order: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """Return the token of each grouped row, ``order // top_k``.

    On a GPU the values are clamped unread: an index out of range would end the process's CUDA context.

    Raises:
        ValueError: on the CPU, an ``order`` that is not a permutation.
    """
    if order.device.type == "cpu" and type(order) is torch.Tensor and not is_compiling():
        reference.check_order(order)
    top_k = reference.rows_per_token(n_tokens, order)
    return (order // top_k).clamp(0, max(0, n_tokens - 1))


@triton.jit
def _rows_of(inverse_ptr, slot, inside, n_rows):
    """Return the rows (int64) of slots, clamped so that a bad order stays within its tensors."""
    row = tl.load(inverse_ptr + slot, mask=inside, other=0)
    return tl.minimum(tl.maximum(row, 0), n_rows - 1).to(tl.int64)


@triton.jit
def _n_owned(offs_ptr, n_groups, n_rows, GROUPED: tl.constexpr):
    """Return how many rows, counted from the first, belong to a group; all rows without GROUPED."""
    if GROUPED:
        n_owned = tl.minimum(tl.load(offs_ptr + n_groups - 1), n_rows)
    else:
        n_owned = n_rows
    return n_owned


@launched
@triton.jit
def _sum_rows_kernel(
    y_ptr,
    inverse_ptr,
    weights_ptr,
    offs_ptr,
    out_ptr,
    n_rows,
    n_groups,
    C,
    stride_y,
    stride_out,
    WEIGHTED: tl.constexpr,
    GROUPED: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum a tile of columns of one token."""
    n_owned = _n_owned(offs_ptr, n_groups, n_rows, GROUPED)
    column_tiles = tl.cdiv(C, COLUMNS)
    token = (tl.program_id(0) // column_tiles).to(tl.int64)
    column = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < C
    total = tl.zeros((COLUMNS,), tl.float32)
    for j in tl.static_range(TOP_K):
        row = _rows_of(inverse_ptr, token * TOP_K + j, True, n_rows)
        owned = row < n_owned
        y = tl.load(y_ptr + row * stride_y + column, mask=inside & owned, other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weights_ptr + token * TOP_K + j, mask=owned, other=0.0).to(tl.float32)
        total += y
    tl.store(out_ptr + token * stride_out + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def sum_rows(
    y: torch.Tensor,
    order: torch.Tensor,
    top_k: int,
    weights: torch.Tensor | None,
    offs: torch.Tensor | None = None,
    inv: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``[T, C]`` in y's dtype: the weighted sum of each token's ``top_k`` rows of ``y [R, C]``.

    Args:
        order: int32 ``[R]``, a permutation; row i fills slot ``order[i]`` of ``[T, top_k]``.
        weights: ``[T, top_k]`` of any float dtype, or None for ones.
        offs: int32 ``[E]`` end offsets: rows after the last group, and their weights, count as zero.
        inv: ``inverse(order)``, if the caller has it.
        out: the tensor to write to, of unit stride along C.
    """
    n_rows, columns = y.shape
    out = y.new_empty((n_rows // top_k, columns)) if out is None else out
    if out.numel() != 0:
        y, inv = with_unit_rows(y), inverse(order) if inv is None else inv
        with on_device_of(y):
            _sum_rows_kernel[(out.shape[0] * cdiv(columns, SUM_ROWS.size),)](
                y,
                inv,
                weights,
                offs,
                out,
                n_rows,
                0 if offs is None else offs.shape[0],
                columns,
                y.stride(0),
                out.stride(0),
                WEIGHTED=weights is not None,
                GROUPED=offs is not None,
                TOP_K=top_k,
                COLUMNS=SUM_ROWS.size,
                num_warps=SUM_ROWS.warps,
            )
    return out


@launched
@triton.jit
def _combine_backward_kernel(
    dout_ptr,
    y_ptr,
    weights_ptr,
    inverse_ptr,
    offs_ptr,
    dy_ptr,
    dweights_ptr,
    n_rows,
    n_groups,
    C,
    stride_dout,
    stride_y,
    GROUPED: tl.constexpr,
    TOP_K: tl.constexpr,
    K_SPAN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write one token's rows of dy and its dweights."""
    n_owned = _n_owned(offs_ptr, n_groups, n_rows, GROUPED)
    token = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, K_SPAN)
    slot = token * TOP_K + j
    row = _rows_of(inverse_ptr, slot, j < TOP_K, n_rows)
    owned = (j < TOP_K) & (row < n_owned)
    weight = tl.load(weights_ptr + slot, mask=owned, other=0.0).to(tl.float32)
    column = tl.arange(0, COLUMNS)
    acc = tl.zeros((K_SPAN, COLUMNS), tl.float32)
    for c0 in range(0, C, COLUMNS):
        there = column < C - c0
        inside = (j < TOP_K)[:, None] & there[None, :]
        summed = owned[:, None] & there[None, :]
        dout = tl.load(dout_ptr + token * stride_dout + c0 + column, mask=there, other=0.0)
        dout = dout.to(tl.float32)[None, :]
        y_ptrs = y_ptr + row[:, None] * stride_y + (c0 + column)[None, :]
        y = tl.load(y_ptrs, mask=summed, other=0.0).to(tl.float32)
        acc += tl.where(summed, y * dout, 0.0)
        dy = tl.where(summed, weight[:, None] * dout, 0.0).to(dy_ptr.dtype.element_ty)
        tl.store(dy_ptr + row[:, None] * C + (c0 + column)[None, :], dy, mask=inside)
    dweights = tl.sum(acc, 1).to(dweights_ptr.dtype.element_ty)
    tl.store(dweights_ptr + slot, dweights, mask=j < TOP_K)


def combine_backward(
    dout: torch.Tensor,
    y: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    offs: torch.Tensor | None = None,
    inv: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward of :func:`sum_rows`: ``(dy [R, C], dweights [T, top_k])`` in y's and the weights' dtypes.

    ``dy[i] = w_i * dout[token of i]``; ``dweights`` are the dot products of ``dout [T, C]``'s rows with y's.
    Both are zero for rows after the last group of ``offs``.
    """
    (n_tokens, top_k), (n_rows, columns) = weights.shape, y.shape
    dy = y.new_empty((n_rows, columns))
    dweights = weights.new_empty((n_tokens, top_k))
    if dweights.numel() != 0:
        dout, y = with_unit_rows(dout), with_unit_rows(y)
        inv = inverse(order) if inv is None else inv
        with on_device_of(y):
            _combine_backward_kernel[(n_tokens,)](
                dout,
                y,
                weights,
                inv,
                offs,
                dy,
                dweights,
                n_rows,
                0 if offs is None else offs.shape[0],
                columns,
                dout.stride(0),
                y.stride(0),
                GROUPED=offs is not None,
                TOP_K=top_k,
                K_SPAN=next_power_of_2(top_k),
                COLUMNS=SUM_ROWS.size,
                num_warps=SUM_ROWS.warps,
            )
    return dy, dweights


def with_unit_rows(x: torch.Tensor) -> torch.Tensor:
    """Return ``x [R, C]`` with unit stride along rows, copied only if its stride differs."""
    return x if x.stride(1) == 1 else x.contiguous()
