"""The terms that a vendor's GEMM leaves out, the low-rank term and the bias, added to its result in one pass.

::

    y[i] = part[i] + s * h[i] up_e^T + bias_e        for the rows i of expert e, zeros after the last group

A tile of rows belongs to one expert. Its program covers several tiles of columns, so the pass is bound by the
bytes of ``part`` and y.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from torchao_mx import reference
from torchao_mx.ops.core.launch import DOT_DTYPES, cdiv, launched, next_power_of_2, on_device_of
from torchao_mx.ops.core.operands import Added
from torchao_mx.ops.core.tiles import ADD, ZERO_ROWS, rank_tile
from torchao_mx.ops.moe import groups


class _Strides(NamedTuple):
    """The strides of experts, rows, columns and ranks."""

    part_row: int
    y_row: int
    h_row: int
    up_expert: int
    up_column: int
    up_rank: int
    bias_expert: int


@launched
@triton.jit
def _add_kernel(
    part_ptr,
    y_ptr,
    added,
    offs_ptr,
    n_rows,
    C,
    E,
    rank,
    scaling,
    strides,
    GROUPED: tl.constexpr,
    E_SPAN: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Add to a tile of one expert's rows, over ``TILE.steps`` tiles of columns."""
    h_ptr, up_ptr, bias_ptr = added
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    STEPS: tl.constexpr = TILE.steps
    RANKS: tl.constexpr = TILE.ranks
    parts = tl.cdiv(C, COLUMNS * STEPS)
    slot, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    expert, first, end = groups.slot_rows(offs_ptr, n_rows, slot, E, E_SPAN, ROWS, GROUPED)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    somebody = expert < E
    owned = row < tl.where(somebody, end, 0)
    row_64 = row.to(tl.int64)[:, None]
    expert = tl.cast(expert, tl.int64)  # a Python int without groups
    for step in tl.static_range(STEPS):
        column = (part * STEPS + step) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < C
        part_ptrs = part_ptr + row_64 * strides.part_row + column[None, :]
        value = tl.load(part_ptrs, mask=owned[:, None] & inside[None, :], other=0.0)
        value = value.to(tl.float32)
        if HAS_LORA:
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            up_ptrs = (
                up_ptr
                + expert * strides.up_expert
                + column.to(tl.int64)[None, :] * strides.up_column
            )
            for r0 in range(0, rank, RANKS):
                r = r0 + tl.arange(0, RANKS)
                h_ptrs = h_ptr + row_64 * strides.h_row + r[None, :]
                h = tl.load(h_ptrs, mask=owned[:, None] & (r < rank)[None, :], other=0.0)
                up_mask = (r < rank)[:, None] & inside[None, :] & somebody
                up = tl.load(up_ptrs + r[:, None] * strides.up_rank, mask=up_mask, other=0.0)
                total = tl.dot(h.to(DOT_DTYPE), up.to(DOT_DTYPE), total, input_precision="ieee")
            value += total * scaling
        if HAS_BIAS:
            bias_ptrs = bias_ptr + expert * strides.bias_expert + column
            bias = tl.load(bias_ptrs, mask=inside & somebody, other=0.0).to(tl.float32)
            value += tl.where(owned[:, None], bias[None, :], 0.0)
        y_ptrs = y_ptr + row_64 * strides.y_row + column[None, :]
        value = value.to(y_ptr.dtype.element_ty)
        tl.store(y_ptrs, value, mask=(row < end)[:, None] & inside[None, :])


@launched
@triton.jit
def _zero_unassigned_kernel(
    y_ptr, offs_ptr, E, n_rows, columns, y_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    end = tl.load(offs_ptr + E - 1)
    first = tl.program_id(0) * ROWS
    if first + ROWS > end:
        row = first + tl.arange(0, ROWS)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        mask = ((row >= end) & (row < n_rows))[:, None] & (column < columns)[None, :]
        y_ptrs = y_ptr + row.to(tl.int64)[:, None] * y_row + column[None, :]
        tl.store(y_ptrs, tl.zeros((ROWS, COLUMNS), y_ptr.dtype.element_ty), mask=mask)


def finish(
    part: torch.Tensor,
    y: torch.Tensor,
    offs: torch.Tensor | None,
    added: Added,
    dot_dtype: tl.dtype | None = None,
) -> None:
    """Write ``y = part + s * h up^T + bias`` on ``[R, C]``, zeros after the last group.

    Args:
        part: ``[R, C]``, of unit stride along C. It may be y itself; then only the added terms are computed.
        y: like ``part``, of the same dtype.
        offs: int32 ``[E]`` end offsets, or None for one expert.
        added: h ``[R, r]``, up ``[E, C, r]``, cast to y's dtype, and bias ``[E, C]``, of unit stride along C.
        dot_dtype: the dtype of the product; y's by default (tests use others).
    """
    h, up, scaling, bias = added
    in_place = part.data_ptr() == y.data_ptr()
    n_rows, columns = part.shape
    if in_place and h is None and bias is None:
        if offs is not None:
            zero_unassigned(y, offs)
        return
    if not y.is_cuda and dot_dtype is None:
        y.copy_(reference.add_low_rank(part, offs, added))
        return
    rank = 0 if h is None else h.shape[1]
    n_groups = 0 if offs is None else offs.shape[0]
    tile = ADD._replace(ranks=rank_tile(rank, ADD.ranks))
    programs = groups.max_slots(n_rows, n_groups, tile.rows)
    programs *= cdiv(columns, tile.columns * tile.steps)
    strides = _Strides(
        part.stride(0),
        y.stride(0),
        0 if h is None else h.stride(0),
        *((0, 0, 0) if up is None else up.stride()),
        0 if bias is None else bias.stride(0),
    )
    with on_device_of(y):
        _add_kernel[(programs,)](
            part,
            y,
            (y if h is None else h, y if up is None else up, y if bias is None else bias),
            offs,
            n_rows,
            columns,
            max(1, n_groups),
            rank,
            scaling,
            strides,
            GROUPED=offs is not None,
            E_SPAN=next_power_of_2(n_groups + 1),
            HAS_LORA=rank > 0,
            HAS_BIAS=bias is not None,
            TILE=tile,
            DOT_DTYPE=dot_dtype or DOT_DTYPES[y.dtype],
            num_warps=4,
        )


def zero_unassigned(y: torch.Tensor, offs: torch.Tensor) -> None:
    """Zero the rows of ``y [R, C]`` after the last group, without asking the device where it ends.

    On the GPU, programs before that row return at once; a ``masked_fill_`` would rewrite all of y.
    """
    if y.is_cuda:
        _zero_unassigned_triton(y, offs)
    else:
        y[offs[-1] :] = 0


def _zero_unassigned_triton(y: torch.Tensor, offs: torch.Tensor) -> None:
    rows, columns = y.shape
    grid = (cdiv(rows, ZERO_ROWS.m), cdiv(columns, ZERO_ROWS.k))
    with on_device_of(y):
        _zero_unassigned_kernel[grid](
            y,
            offs,
            offs.shape[0],
            rows,
            columns,
            y.stride(0),
            ROWS=ZERO_ROWS.m,
            COLUMNS=ZERO_ROWS.k,
        )
