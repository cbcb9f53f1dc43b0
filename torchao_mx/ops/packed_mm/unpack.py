"""The unpack strategy: decode the weight into a bounded scratch buffer, then call the vendor's GEMM.

With many rows per expert the decode pays off, and nothing beats the vendor's GEMM. A decoded weight larger
than the scratch buffer is processed in slices of the output columns. For a packed ``W [E, N, K]`` those are
slices of N (``x W^T``) or of whole blocks along K (``x W``). A slice holds all experts, so no row
counts reach the host.

If rows of x are gathered anyway, the grouped product includes its low-rank update and its bias in the GEMM::

    X' = [x | h | 1 | 0]      W' = [W | s up | bias | 0]      y = X' W'^T

and the zeros pad the rows to multiples of 16 bytes, as the GEMM requires. Otherwise X' would be a copy of x;
if that is larger than y, the pass of ``epilogue.py`` adds the terms to y.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from torchao_mx import reference, torch_internals
from torchao_mx.ops.core.launch import (
    bytes_of,
    cdiv,
    format_on,
    in_words,
    launched,
    on_device_of,
    per_tensor_kind,
)
from torchao_mx.ops.core.operands import Added, Packed, Rows, aligned_rows
from torchao_mx.ops.core.tiles import DEQUANTIZE_ROWS, WIDE_ROWS
from torchao_mx.ops.moe import groups
from torchao_mx.ops.moe.gather import inverse, sum_rows, with_unit_rows
from torchao_mx.ops.packed_mm.epilogue import finish
from torchao_mx.ops.quantization import tile

ROW_MULTIPLE = 8  # elements: 16 bytes of bf16, for the GEMM, and the elements of one word
SLICE_STEP = 128  # columns: slices are whole tiles of the GEMM if the scratch buffer allows


@launched
@triton.jit
def _decode_into_kernel(
    weight,
    offs_ptr,
    out_ptr,
    n_words,
    words_per_row,
    q_strides,
    s_strides,
    out_strides,
    SELECTIVE: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    TILE: tl.constexpr,
    LONG_ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Decode ``n_words`` per expert, ``words_per_row`` per row, each word being eight elements.

    Strides are of experts and rows. Those of q and of the output count words, so the compiler knows that a
    thread's eight results are aligned to 16 bytes. SELECTIVE skips experts without rows.
    """
    q_ptr, s_ptr, pts_ptr = weight
    q_expert, q_row = q_strides
    s_expert, s_row = s_strides
    out_expert, out_row = out_strides
    if SELECTIVE:
        if not groups.has_rows(offs_ptr, tl.program_id(1), True):
            return
    expert = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * TILE
    index = tl.arange(0, TILE)
    inside = index < n_words - first
    first_row = (first // words_per_row).to(tl.int64)
    column = first % words_per_row + index
    if LONG_ROWS:  # words_per_row >= TILE: a tile meets at most one end of a row
        row = (column >= words_per_row).to(tl.int32)
    else:
        row = column // words_per_row
    column -= row * words_per_row
    q_ptr += expert * q_expert + first_row * q_row
    s_ptr += expert * s_expert + first_row * s_row
    out_ptr += (expert * out_expert + first_row * out_row) * 8
    word = tl.load(q_ptr + row * q_row + column, mask=inside, other=0)
    byte = tl.load(
        s_ptr + row * s_row + column // (FORMAT.block_size // 8), mask=inside, other=0
    ).to(tl.int32)
    pts = tile.load_per_tensor_scale(pts_ptr, expert, PER_TENSOR)
    scale = tile.scale_value(byte, pts, FORMAT)
    code = tile.unpack_word(word, FORMAT.elem_bits)
    value = tile.decode(code, FORMAT) * scale[:, None]
    out_ptrs = out_ptr + ((row * out_row + column) * 8)[:, None] + tl.arange(0, 8)[None, :]
    tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@launched
@triton.jit
def _wide_rows_kernel(
    x_ptr,
    order_ptr,
    h_ptr,
    out_ptr,
    n_rows,
    n_tokens,
    top_k,
    x_row,
    columns,
    rank,
    depth,
    HAS_ORDER: tl.constexpr,
    HAS_H: tl.constexpr,
    ONE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = groups.token_of(order_ptr, row, row < n_rows, top_k, n_tokens, HAS_ORDER)
    is_row = (row < n_rows)[:, None]
    x_ptrs = x_ptr + token[:, None] * x_row + column[None, :]
    value = tl.load(x_ptrs, mask=is_row & (column < columns)[None, :], other=0.0)
    if HAS_H:
        in_h = (column >= columns) & (column < columns + rank)
        h_ptrs = h_ptr + row.to(tl.int64)[:, None] * rank + (column - columns)[None, :]
        h = tl.load(h_ptrs, mask=is_row & in_h[None, :], other=0.0)
        value = tl.where(in_h[None, :], h, value)
    if ONE:
        value = tl.where((column == columns + rank)[None, :], 1.0, value)
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * depth + column[None, :]
    value = value.to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, value, mask=is_row & (column < depth)[None, :])


def decode_into(out: torch.Tensor, w: Packed, offs: torch.Tensor | None = None) -> None:
    """Write the values of ``w [E, N, K]`` to ``out``, whose last stride is 1 and whose others are free.

    With ``offs``, only experts that own rows are decoded; on the GPU, the memory of the others is untouched.

    On the GPU, rows and experts of ``out`` and of the packed bytes start at multiples of eight elements.
    """
    if not out.is_cuda:
        out.copy_(reference.dequantize(w.qdata, w.scale, w.fmt, out.dtype, -1, w.per_tensor_scale))
    elif out.numel() > 0:
        _decode_into_triton(out, w, offs)


def _decode_into_triton(out: torch.Tensor, w: Packed, offs: torch.Tensor | None = None) -> None:
    word = torch.int32 if w.fmt.elem_bits == 4 else torch.int64
    qdata, scale = in_words(w.qdata, word.itemsize), bytes_of(w.scale)
    scale = scale if scale.stride(-1) == 1 else scale.contiguous()
    qdata = qdata.view(word)
    experts, rows, words = qdata.shape
    pts = scale if w.per_tensor_scale is None else w.per_tensor_scale
    with on_device_of(out):
        _decode_into_kernel[(cdiv(rows * words, DEQUANTIZE_ROWS.size), experts)](
            (qdata, scale, pts),
            offs,
            out,
            rows * words,
            words,
            qdata.stride()[:2],
            scale.stride()[:2],
            (out.stride(0) // 8, out.stride(1) // 8),
            SELECTIVE=offs is not None,
            PER_TENSOR=per_tensor_kind(w.per_tensor_scale),
            TILE=DEQUANTIZE_ROWS.size,
            LONG_ROWS=words >= DEQUANTIZE_ROWS.size,
            num_warps=DEQUANTIZE_ROWS.warps,
            FORMAT=format_on(out.device, w.fmt),
        )


def slices(
    columns: int, bytes_per_column: int, unit: int, max_bytes: int
) -> Iterator[tuple[int, int]]:
    """Cut the output columns into even slices, multiples of ``unit``, within ``max_bytes`` (or one ``unit``)."""
    width = columns
    if columns * bytes_per_column > max_bytes:
        most = max_bytes // bytes_per_column
        step = SLICE_STEP if most >= SLICE_STEP else unit
        most = max(step, most // step * step)
        width = min(most, round_up(cdiv(columns, cdiv(columns, most)), step))
    for first in range(0, columns, width):
        yield first, min(first + width, columns)


def round_up(size: int, multiple: int) -> int:
    return cdiv(size, multiple) * multiple


def dense_product(
    x: torch.Tensor, w: Packed, transpose_weight: bool, added: Added, max_scratch_bytes: int
) -> torch.Tensor:
    """Return ``y = x W^T + scaling * h up^T + bias`` (``x W``) of a dense ``w [N, K]``; bias in x's dtype."""
    h, up, scaling, bias = added
    reduced, columns = (w.k, w.n) if transpose_weight else (w.n, w.k)
    unit = ROW_MULTIPLE if transpose_weight else w.fmt.block_size
    parts = list(slices(columns, reduced * x.itemsize, unit, max_scratch_bytes))
    whole = w._replace(qdata=w.qdata[None], scale=w.scale[None])  # decoded as if it had one expert
    if len(parts) == 1:
        values = x.new_empty((w.n, w.k))
        decode_into(values[None], whole)
        y = F.linear(x, values if transpose_weight else values.mT, bias)
    else:
        y = x.new_empty((x.shape[0], columns))
        width = parts[0][1]
        scratch = x.new_empty((width, reduced) if transpose_weight else (reduced, width))
        for first, end in parts:
            if transpose_weight:
                values = scratch[: end - first]
                part, values_CD = whole.slice_n(first, end), values.t()
            else:
                values = values_CD = scratch[:, : end - first]
                part = whole.slice_k(first, end)
            decode_into(values[None], part)
            out = y[:, first:end]
            if bias is None:
                torch.mm(x, values_CD, out=out)
            else:
                torch.addmm(bias[first:end], x, values_CD, out=out)
    return y if h is None else y.addmm_(h, up.to(x.dtype).t(), alpha=scaling)


class TokenSum(NamedTuple):
    """How a result's rows are summed: row i is added to the token ``order[i] // top_k``."""

    order: torch.Tensor
    top_k: int


def grouped_product(
    x: torch.Tensor,
    w: Packed,
    rows: Rows,
    transpose_weight: bool,
    added: Added,
    max_scratch_bytes: int,
    token_sum: TokenSum | None = None,
) -> torch.Tensor:
    """Return ``y [R, D]`` of ``reference.product``, by one ``torch._grouped_mm`` per slice of its columns.

    With ``token_sum``, return its sums ``[T, D]``; then no more than one slice of y exists at a time.
    """
    reduced, columns = (w.k, w.n) if transpose_weight else (w.n, w.k)
    wide = rows.order is not None or reduced <= columns
    along, after = (added, Added()) if wide else (Added(), added)
    y = None
    if token_sum is not None:
        y = x.new_empty((rows.n_rows // token_sum.top_k, columns))
        slots = inverse(token_sum.order) if x.is_cuda else None
    products = _products(x, w, rows, transpose_weight, along, max_scratch_bytes)
    for first, end, product in products:
        part = product[:, : end - first]
        target = part
        if token_sum is None and end - first < columns:
            y = x.new_empty((rows.n_rows, columns)) if y is None else y
            target = y[:, first:end]
        finish(part, target, rows.offs, after.at((slice(None), slice(first, end))))
        if token_sum is not None:
            _sum_into(y[:, first:end], part, token_sum, slots)
    return part.contiguous() if y is None else y


def _products(
    x: torch.Tensor,
    w: Packed,
    rows: Rows,
    transpose_weight: bool,
    added: Added,
    max_scratch_bytes: int,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield ``(first, end, y[:, first:end])``, ``added`` included by the GEMM; drop columns after those."""
    h, up, scaling, bias = added
    reduced, columns = (w.k, w.n) if transpose_weight else (w.n, w.k)
    rank = 0 if h is None else h.shape[1]
    used = reduced + rank + (bias is not None)
    depth = round_up(used, ROW_MULTIPLE)
    x_RD = _wide_rows(x, rows.order, rows.top_k, h, bias is not None, depth)
    unit = ROW_MULTIPLE if transpose_weight else w.fmt.block_size
    experts = w.qdata.shape[0]
    scratch = None
    for first, end in slices(columns, experts * depth * x.itemsize, unit, max_scratch_bytes):
        width = round_up(end - first, ROW_MULTIPLE)
        if scratch is None:
            shape = (width, depth) if transpose_weight else (depth, width)
            scratch = x.new_empty((experts, *shape))
        if transpose_weight:
            w_EDC, part = scratch[:, :width], w.slice_n(first, end)
            w_ECD = w_EDC.mT
        else:
            w_ECD, part = scratch[:, :, :width], w.slice_k(first, end)
            w_EDC = w_ECD.mT
        wanted_EDC = w_EDC[:, : end - first]
        values_EDC = wanted_EDC[..., :reduced]
        decode_into(values_EDC if transpose_weight else values_EDC.mT, part, rows.offs)
        if h is not None:
            scaled = scaled_adapter(up[:, first:end], scaling, x.dtype)
            wanted_EDC[..., reduced : reduced + rank].copy_(scaled)
        if bias is not None:
            wanted_EDC[..., reduced + rank].copy_(bias[:, first:end])
        if depth > used:
            wanted_EDC[..., used:].zero_()
        product = torch_internals.grouped_mm(x_RD, w_ECD, offs=rows.offs)
        yield first, end, product if product.stride(1) == 1 else product.contiguous()


def _sum_into(
    out: torch.Tensor, part: torch.Tensor, token_sum: TokenSum, slots: torch.Tensor | None
) -> None:
    if out.is_cuda:
        sum_rows(part, *token_sum, None, None, slots, out)
    else:
        out.copy_(reference.sum_rows(part, *token_sum, None))


def scaled_adapter(adapter: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """Return ``scaling * adapter`` for a product in ``dtype`` (not cast to it): rounded at most once."""
    if scaling == 1:
        return adapter
    return adapter.to(torch.promote_types(adapter.dtype, dtype)) * scaling


def _wide_rows(
    x: torch.Tensor,
    order: torch.Tensor | None,
    top_k: int,
    h: torch.Tensor | None,
    one: bool,
    depth: int,
) -> torch.Tensor:
    """Return ``[x | h | 1 | 0] [R, depth]`` with x in group order; x itself if it is the only part."""
    if order is None and depth == x.shape[1]:
        return aligned_rows(x)
    n_rows = x.shape[0] if order is None else order.shape[0]
    if x.is_cuda:
        return _wide_rows_triton(x, order, top_k, h, one, n_rows, depth)
    parts = [x if order is None else x[order // top_k]]
    if h is not None:
        parts.append(h)
    if one:
        parts.append(x.new_ones((n_rows, 1)))
    used = sum(part.shape[1] for part in parts)
    return torch.cat([*parts, x.new_zeros((n_rows, depth - used))], 1)


def _wide_rows_triton(
    x: torch.Tensor,
    order: torch.Tensor | None,
    top_k: int,
    h: torch.Tensor | None,
    one: bool,
    n_rows: int,
    depth: int,
) -> torch.Tensor:
    x = with_unit_rows(x)
    rows = x.new_empty((n_rows, depth))
    rank = 0 if h is None else h.shape[1]
    grid = (cdiv(n_rows, WIDE_ROWS.m), cdiv(depth, WIDE_ROWS.k))
    with on_device_of(x):
        _wide_rows_kernel[grid](
            x,
            x if order is None else order,
            x if h is None else h,
            rows,
            n_rows,
            x.shape[0],
            top_k,
            x.stride(0),
            x.shape[1],
            rank,
            depth,
            HAS_ORDER=order is not None,
            HAS_H=h is not None,
            ONE=one,
            ROWS=WIDE_ROWS.m,
            COLUMNS=WIDE_ROWS.k,
        )
    return rows
