"""Products with one narrow operand, by groups of rows: an adapter's rank on one side, thousands on the other.

::

    low_rank    h[i] = s * x[token of i] down_e^T               [R, r]      reads x and the adapters once
    gram        out_e = s * sum over i of l[i]^T m[token of i]  [E, r, C]   reads m once
    group_sum   out_e = sum over i of dy[i]                     [E, N]      reads dy once

where i runs over the rows of expert e (``groups``), or over all rows if ``offs`` is None. All three are bound
by the bytes of their wide operand, sum in fp32 in an order that depends on shapes alone, and take one launch.
Where few programs would have long sums, the sums are cut into parts, and a second launch adds them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from torchao_mx.ops.core.launch import (
    DOT_DTYPES,
    cdiv,
    launched,
    multiprocessors,
    on_device_of,
)
from torchao_mx.ops.core.tiles import ADD_SPLITS, GROUP_SUM, gram_tile, low_rank_tile
from torchao_mx.ops.moe import groups
from torchao_mx.ops.moe.gather import combine_backward, inverse, sum_rows, with_unit_rows

__all__ = [
    "add_splits",
    "combine_backward",
    "gram",
    "group_sum",
    "inverse",
    "low_rank",
    "partial_sums",
    "sum_rows",
]


# Sums are cut into at most so many parts while there are fewer programs than this per multiprocessor. Sums
# over rows are cut while the fp32 partial sums, written and read, are 3 % of the bytes (rank 16). Sums over
# columns, which few rows leave to few programs, are cut down to what a pipeline has in flight.
MAX_SPLITS, PROGRAMS_PER_SM, MIN_ROWS_PER_SPLIT, MIN_COLUMNS_PER_SPLIT = 32, 8, 2048, 512


@launched
@triton.jit
def _low_rank_kernel(
    x_ptr,
    down_ptr,
    offs_ptr,
    order_ptr,
    h_ptr,
    scale_by,
    n_rows,
    n_tokens,
    C,
    r,
    E,
    top_k,
    n_splits,
    stride_x,
    down_strides,
    E_SPAN: tl.constexpr,
    GROUPED: tl.constexpr,
    GATHERED: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """``h [splits, n_rows, r]``: one tile of a group's rows by one of ranks, for one part of the columns.

    Unassigned rows sum over no columns.
    """
    stride_e, stride_r, stride_c = down_strides
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    RANKS: tl.constexpr = TILE.ranks
    rank_tiles = tl.cdiv(r, RANKS)
    split, pid = tl.program_id(0) % n_splits, tl.program_id(0) // n_splits
    tile = pid // rank_tiles
    rank = (pid - tile * rank_tiles) * RANKS + tl.arange(0, RANKS)
    expert, first, end = groups.tile_rows(offs_ptr, n_rows, tile, E, E_SPAN, ROWS, GROUPED)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    inside = row < end
    token = groups.token_of(order_ptr, row, inside, top_k, n_tokens, GATHERED)
    start, stop = _part_of(0, C, split, n_splits, COLUMNS)
    stop = tl.where(expert < E, stop, start)
    column = tl.arange(0, COLUMNS)
    x_ptrs = x_ptr + start + token[:, None] * stride_x + column[None, :]
    d_ptrs = down_ptr + tl.cast(expert, tl.int64) * stride_e + start * stride_c
    d_ptrs = d_ptrs + column[:, None] * stride_c + rank[None, :] * stride_r
    acc = tl.zeros((ROWS, RANKS), tl.float32)
    for c0 in range(start, stop, COLUMNS):
        there = column < C - c0
        x = tl.load(x_ptrs, mask=inside[:, None] & there[None, :], other=0.0)
        d = tl.load(d_ptrs, mask=there[:, None] & (rank < r)[None, :], other=0.0)
        acc = tl.dot(x.to(DOT_DTYPE), d.to(DOT_DTYPE), acc, input_precision="ieee")
        x_ptrs += COLUMNS
        d_ptrs += COLUMNS * stride_c
    h_ptrs = h_ptr + (split * n_rows + row).to(tl.int64)[:, None] * r + rank[None, :]
    h = (acc * scale_by).to(h_ptr.dtype.element_ty)
    tl.store(h_ptrs, h, mask=inside[:, None] & (rank < r)[None, :])


def low_rank(
    x: torch.Tensor,
    down: torch.Tensor,
    offs: torch.Tensor | None,
    order: torch.Tensor | None,
    top_k: int,
    n_rows: int,
    *,
    scale_by: float = 1.0,
) -> torch.Tensor:
    """Return ``h [n_rows, r]`` in x's dtype; rows after ``offs[-1]`` are zero.

    Args:
        x: ``[n_rows, C]``, or ``[T, C]`` with an ``order``.
        down: ``[E, r, C]`` (``[r, C]`` without ``offs``), any strides and float dtype; cast to x's dtype.
        offs: int32 ``[E]`` end offsets, or None.
        order: int32 permutation; grouped row i is row ``order[i] // top_k`` of x. None: x is grouped.
        scale_by: multiplies h before it is rounded.
    """
    r, columns = down.shape[-2:]
    h = x.new_empty((n_rows, r))
    if h.numel() == 0:
        return h
    x = with_unit_rows(x)
    n_groups = 0 if offs is None else offs.shape[0]
    tile = low_rank_tile(n_rows, n_groups, r, x.itemsize, down.itemsize, multiprocessors(x.device))
    programs = groups.max_tiles(n_rows, n_groups, tile.rows) * cdiv(r, tile.ranks)
    splits = _splits(columns // MIN_COLUMNS_PER_SPLIT, programs, x.device)
    tile = tile._replace(stages=min(tile.stages, 1 + cdiv(columns, splits * tile.columns)))
    sums = partial_sums(h, splits)
    with on_device_of(x):
        _low_rank_kernel[(programs * splits,)](
            x,
            down,
            offs,
            order,
            sums,
            scale_by,
            n_rows,
            x.shape[0],
            columns,
            r,
            max(1, n_groups),
            top_k,
            splits,
            x.stride(0),
            (0 if offs is None else down.stride(0), *down.stride()[-2:]),
            E_SPAN=groups.span_of(offs),
            GROUPED=offs is not None,
            GATHERED=order is not None,
            DOT_DTYPE=DOT_DTYPES[x.dtype],
            TILE=tile,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        add_splits(sums, h, splits)
    return h


@triton.jit
def _part_of(start, end, part, n_parts, TILE: tl.constexpr):
    """Return (first, end) of one of ``n_parts`` parts, in whole tiles; the last part may be empty."""
    size = tl.cdiv(tl.cdiv(end - start, n_parts), TILE) * TILE
    return start + part * size, tl.minimum(start + (part + 1) * size, end)


@launched
@triton.jit
def _gram_kernel(
    l_ptr,
    m_ptr,
    offs_ptr,
    order_ptr,
    out_ptr,
    scaling,
    n_rows,
    n_tokens,
    C,
    r,
    E,
    top_k,
    n_splits,
    row_strides,
    out_strides,
    E_SPAN: tl.constexpr,
    GROUPED: tl.constexpr,
    GATHERED: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """``out [splits, E, r, C]`` (or ``[.., C, r]``, by strides): one tile of one expert's part of rows.

    Neighbouring programs read neighbouring columns of the same rows. The columns are the product's tall axis,
    so Hopper's tensor cores read both operands from shared memory.
    """
    stride_l, stride_m = row_strides
    stride_r, stride_c = out_strides
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    RANKS: tl.constexpr = TILE.ranks
    column_tiles, rank_tiles = tl.cdiv(C, COLUMNS), tl.cdiv(r, RANKS)
    pid = tl.program_id(0)
    column = (pid % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    pid = pid // column_tiles
    rank = (pid % rank_tiles) * RANKS + tl.arange(0, RANKS)
    pid = pid // rank_tiles
    split, expert = pid % n_splits, pid // n_splits
    start, end = groups.group_rows(offs_ptr, n_rows, expert, E, E_SPAN, GROUPED)
    start, end = _part_of(start, end, split, n_splits, ROWS)
    acc = tl.zeros((COLUMNS, RANKS), tl.float32)
    for row0 in range(start, end, ROWS):
        row = row0 + tl.arange(0, ROWS)
        inside = row < end
        token = groups.token_of(order_ptr, row, inside, top_k, n_tokens, GATHERED)
        m_ptrs = m_ptr + token[:, None] * stride_m + column[None, :]
        m = tl.load(m_ptrs, mask=inside[:, None] & (column < C)[None, :], other=0.0)
        l_ptrs = l_ptr + row.to(tl.int64)[:, None] * stride_l + rank[None, :]
        l = tl.load(l_ptrs, mask=inside[:, None] & (rank < r)[None, :], other=0.0)  # noqa: E741
        acc = tl.dot(tl.trans(m.to(DOT_DTYPE)), l.to(DOT_DTYPE), acc, input_precision="ieee")
    out_ptrs = out_ptr + (split * E + expert).to(tl.int64) * C * r
    out_ptrs = out_ptrs + column[:, None] * stride_c + rank[None, :] * stride_r
    out = (acc * scaling).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=(column < C)[:, None] & (rank < r)[None, :])


def gram(
    l: torch.Tensor,  # noqa: E741
    m: torch.Tensor,
    offs: torch.Tensor | None,
    order: torch.Tensor | None,
    top_k: int,
    scaling: float,
    dtype: torch.dtype,
    transposed: bool,
) -> torch.Tensor:
    """Return ``[E, r, C]`` in ``dtype``, or ``[E, C, r]`` if ``transposed``; without E if ``offs`` is None.

    Args:
        l: ``[R, r]``.
        m: ``[R, C]``, or ``[T, C]`` with an ``order``; l's dtype.
        offs, order, top_k: as in :func:`low_rank`; rows after ``offs[-1]`` add nothing, experts without rows
            give zeros.
    """
    (n_rows, r), columns = l.shape, m.shape[1]
    n_groups = 1 if offs is None else offs.shape[0]
    out = l.new_empty((n_groups, columns, r) if transposed else (n_groups, r, columns), dtype=dtype)
    if out.numel() != 0:
        l, m = with_unit_rows(l), with_unit_rows(m)  # noqa: E741
        tile = gram_tile(n_rows, n_groups, r, m.itemsize)
        programs = cdiv(columns, tile.columns) * cdiv(r, tile.ranks) * n_groups
        splits = _row_splits(n_rows, n_groups, programs, l.device)
        sums = partial_sums(out, splits)
        with on_device_of(l):
            _gram_kernel[(programs * splits,)](
                l,
                m,
                offs,
                order,
                sums,
                scaling,
                n_rows,
                m.shape[0],
                columns,
                r,
                n_groups,
                top_k,
                splits,
                (l.stride(0), m.stride(0)),
                (1, r) if transposed else (columns, 1),
                E_SPAN=groups.span_of(offs),
                GROUPED=offs is not None,
                GATHERED=order is not None,
                DOT_DTYPE=DOT_DTYPES[m.dtype],
                TILE=tile,
                num_stages=tile.stages,
                num_warps=tile.warps,
            )
            add_splits(sums, out, splits)
    return out[0] if offs is None else out


@launched
@triton.jit
def _group_sum_kernel(
    dy_ptr,
    offs_ptr,
    out_ptr,
    n_rows,
    N,
    E,
    n_splits,
    stride_dy,
    E_SPAN: tl.constexpr,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``out [splits, E, N]``: one tile of columns of one expert's part of rows."""
    column_tiles = tl.cdiv(N, COLUMNS)
    pid = tl.program_id(0)
    column = (pid % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    pid = pid // column_tiles
    split, expert = pid % n_splits, pid // n_splits
    start, end = groups.group_rows(offs_ptr, n_rows, expert, E, E_SPAN, GROUPED)
    start, end = _part_of(start, end, split, n_splits, ROWS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row0 in range(start, end, ROWS):
        row = row0 + tl.arange(0, ROWS)
        ptrs = dy_ptr + row.to(tl.int64)[:, None] * stride_dy + column[None, :]
        acc += tl.load(ptrs, mask=(row < end)[:, None] & (column < N)[None, :], other=0.0)
    out = tl.sum(acc, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (split * E + expert).to(tl.int64) * N + column, out, mask=column < N)


def group_sum(dy: torch.Tensor, offs: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Sum each expert's rows of ``dy [R, N]``: ``[E, N]`` in ``dtype``; ``[N]`` without ``offs``."""
    n_rows, n = dy.shape
    n_groups = 1 if offs is None else offs.shape[0]
    out = dy.new_empty((n_groups, n), dtype=dtype)
    if out.numel() != 0:
        dy = with_unit_rows(dy)
        programs = cdiv(n, GROUP_SUM.k) * n_groups
        splits = _row_splits(n_rows, n_groups, programs, dy.device)
        sums = partial_sums(out, splits)
        with on_device_of(dy):
            _group_sum_kernel[(programs * splits,)](
                dy,
                offs,
                sums,
                n_rows,
                n,
                n_groups,
                splits,
                dy.stride(0),
                E_SPAN=groups.span_of(offs),
                GROUPED=offs is not None,
                ROWS=GROUP_SUM.m,
                COLUMNS=GROUP_SUM.k,
                num_warps=GROUP_SUM.warps,
            )
            add_splits(sums, out, splits)
    return out[0] if offs is None else out


@launched
@triton.jit
def _add_splits_kernel(sums_ptr, out_ptr, n, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """Add ``sums [SPLITS, n]`` to ``out [n]``, first to last."""
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums_ptr + split * n.to(tl.int64) + index, mask=index < n, other=0.0)
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=index < n)


def _row_splits(n_rows: int, n_groups: int, programs: int, device: torch.device) -> int:
    return _splits(n_rows // (n_groups * MIN_ROWS_PER_SPLIT), programs, device)


def _splits(most: int, programs: int, device: torch.device) -> int:
    """Return the number of parts, a power of two up to ``most``. Results depend on it, so shapes and device fix it."""
    wanted = PROGRAMS_PER_SM * multiprocessors(device) // programs
    return 1 << (max(1, min(wanted, most, MAX_SPLITS)).bit_length() - 1)


def partial_sums(out: torch.Tensor, splits: int) -> torch.Tensor:
    """Allocate fp32 sums of ``splits`` parts, ``[splits, *out.shape]``; return out itself for one part."""
    return out if splits == 1 else out.new_empty((splits, *out.shape), dtype=torch.float32)


def add_splits(sums: torch.Tensor, out: torch.Tensor, splits: int) -> None:
    """Add the parts in ``sums`` (:func:`partial_sums`), first to last, into ``out`` in its dtype."""
    if splits > 1:
        grid = (cdiv(out.numel(), ADD_SPLITS.size),)
        _add_splits_kernel[grid](sums, out, out.numel(), SPLITS=splits, TILE=ADD_SPLITS.size)
