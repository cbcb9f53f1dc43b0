"""The steps around the fp8 GEMM of ``product.py``: rows of x to fp8, and flagged columns recomputed."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from torchao_mx.formats import MXFP4, MXFP8_E4M3, MXFP8_E5M2
from torchao_mx.ops.core.launch import (
    bytes_of,
    cdiv,
    format_on,
    launched,
    multiprocessors,
    next_power_of_2,
    on_device_of,
)
from torchao_mx.ops.core.operands import Added, Rows
from torchao_mx.ops.core.tiles import FLAGGED_COLUMNS, FP8_GATHER, FP8_QUANTIZE_ELEMENTS, rank_tile
from torchao_mx.ops.moe import groups
from torchao_mx.ops.packed_mm.fp8.weight import load_values, words_of
from torchao_mx.ops.quantization import tile
from torchao_mx.reference import fp8 as definition

_MIN_ROW_SCALE = tl.constexpr(definition.MIN_ROW_SCALE)


@launched
@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    n_rows,
    C,
    strides,
    FORMAT: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Convert rows of x to fp8 bytes, zero-padded; SPAN covers a row of q. ORDER: see ``permuted_rows``."""
    x_row, q_row = strides
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SPAN)
    inside = (row < n_rows)[:, None] & (column < C)[None, :]
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * x_row + column[None, :]
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    amax = tile.max_magnitude(x, axis=1)
    ones = tl.full(amax.shape, 1.0, tl.float32)
    scale = tl.maximum(tl.div_rn(amax, ones * FORMAT.elem_max), _MIN_ROW_SCALE)
    finite = tile.bits_of(amax) < 0x7F800000
    y = x * tl.div_rn(ones, scale)[:, None]
    code = tile.encode_bytes(y, FORMAT)
    if ORDER == "halves":
        code = code.reshape(ROWS, SPAN // 32, 4, 2, 4).permute(0, 1, 3, 2, 4).reshape(ROWS, SPAN)
    elif ORDER == "pairs":
        code = code.reshape(ROWS, SPAN // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, SPAN)
    q_ptrs = q_ptr + row.to(tl.int64)[:, None] * q_row + column[None, :]
    tl.store(q_ptrs, code, mask=(row < n_rows)[:, None] & (column < q_row)[None, :])
    tl.store(scale_ptr + row, tl.where(finite, scale, float("nan")), mask=row < n_rows)


@launched
@triton.jit
def _gather_rows_kernel(
    q_ptr,
    scale_ptr,
    order_ptr,
    q_out_ptr,
    scale_out_ptr,
    n_rows,
    n_tokens,
    words,
    top_k,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Gather rows of int32 words, and one scale per row, in the order of the groups."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    real = row < n_rows
    token = groups.token_of(order_ptr, row, real, top_k, n_tokens, True)
    inside = real[:, None] & (word < words)[None, :]
    q = tl.load(q_ptr + token[:, None] * words + word[None, :], mask=inside, other=0)
    tl.store(q_out_ptr + row.to(tl.int64)[:, None] * words + word[None, :], q, mask=inside)
    if tl.program_id(1) == 0:
        scale = tl.load(scale_ptr + token, mask=real, other=0.0)
        tl.store(scale_out_ptr + row, scale, mask=real)


@triton.jit
def _low_rank(
    total,
    h_ptr,
    up_ptr,
    expert,
    row,
    mine,
    column,
    inside,
    rank,
    strides,
    RANK: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Return ``total + h up_e^T`` for the rows that are ``mine``, at the columns ``inside``."""
    up_ptr += tl.cast(expert, tl.int64) * strides.up_expert  # expert is an int in the interpreter
    h_ptrs = h_ptr + row.to(tl.int64)[:, None] * strides.h_row
    up_ptrs = up_ptr + column.to(tl.int64)[None, :] * strides.up_column
    for first in range(0, rank, RANK):
        r = first + tl.arange(0, RANK)
        h = tl.load(h_ptrs + r[None, :], mask=mine[:, None] & (r < rank)[None, :], other=0.0)
        mask = (r < rank)[:, None] & inside[None, :]
        up = tl.load(up_ptrs + r[:, None] * strides.up_rank, mask=mask, other=0.0)
        total = tl.dot(h.to(DOT_DTYPE), up.to(DOT_DTYPE), total)
    return total


class _Strides(NamedTuple):
    """The strides of experts, rows, columns and ranks."""

    x_row: int
    q_expert: int
    q_row: int
    s_expert: int
    s_row: int
    h_row: int
    up_expert: int
    up_column: int
    up_rank: int
    bias_expert: int


@launched
@triton.jit
def _flagged_columns_kernel(
    x_ptr,
    order_ptr,
    weight,
    flag_ptr,
    offs_ptr,
    added,
    y_ptr,
    n_rows,
    C,
    N,
    words_per_row,
    n_experts,
    top_k,
    rank,
    scaling,
    strides,
    FLAG_COLUMNS: tl.constexpr,
    GATHER: tl.constexpr,
    GROUPED: tl.constexpr,
    TRANSPOSE_WEIGHT: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Overwrite the columns of y whose flag (one per FLAG_COLUMNS columns) is set.

    A program handles ``TILE.pairs`` pairs of an expert and a tile of columns. The programs of the second grid
    axis share the rows of a flagged pair.
    """
    q_ptr, s_ptr = weight
    h_ptr, up_ptr, bias_ptr = added
    TILE_M: tl.constexpr = TILE.m
    TILE_N: tl.constexpr = TILE.n
    TILE_K: tl.constexpr = TILE.k
    PAIRS: tl.constexpr = TILE.pairs
    FLAGS: tl.constexpr = TILE_N // FLAG_COLUMNS
    tiles_n = tl.cdiv(C, TILE_N)
    flags_per_expert = C // FLAG_COLUMNS
    first_pair = tl.program_id(0) * PAIRS
    n_pairs = n_experts * tiles_n
    pair = first_pair + tl.arange(0, PAIRS)
    index = (pair % tiles_n)[:, None] * FLAGS + tl.arange(0, FLAGS)[None, :]
    real = (pair < n_pairs)[:, None] & (index < flags_per_expert)
    flag_ptrs = flag_ptr + (pair // tiles_n)[:, None] * flags_per_expert + index
    flag = tl.load(flag_ptrs, mask=real, other=0)
    found = tl.max(tl.max((flag != 0).to(tl.int32), axis=1), axis=0)
    if found > 0:
        for p in range(first_pair, tl.minimum(first_pair + PAIRS, n_pairs)):
            expert = p // tiles_n
            column = (p % tiles_n) * TILE_N + tl.arange(0, TILE_N)
            inside = column < C
            at = expert * flags_per_expert + column // FLAG_COLUMNS
            flagged = tl.load(flag_ptr + at, mask=inside, other=0) != 0
            if tl.max(flagged.to(tl.int32), axis=0) > 0:
                first, end = 0, n_rows
                if GROUPED:
                    first = tl.maximum(tl.load(offs_ptr + expert - 1, mask=expert > 0, other=0), 0)
                    end = tl.minimum(tl.load(offs_ptr + expert), n_rows)
                wide = tl.cast(expert, tl.int64)  # expert is an int in the interpreter
                e_q_ptr, e_s_ptr = q_ptr + wide * strides.q_expert, s_ptr + wide * strides.s_expert
                step = tl.num_programs(1) * TILE_M
                for row0 in range(first + tl.program_id(1) * TILE_M, end, step):
                    row = row0 + tl.arange(0, TILE_M)
                    mine = row < end
                    token = groups.token_of(order_ptr, row, mine, top_k, n_rows // top_k, GATHER)
                    x_ptrs = x_ptr + token[:, None] * strides.x_row
                    total = tl.zeros((TILE_M, TILE_N), tl.float32)
                    if HAS_LORA:
                        total = _low_rank(
                            total,
                            h_ptr,
                            up_ptr,
                            expert,
                            row,
                            mine,
                            column,
                            inside,
                            rank,
                            strides,
                            TILE.rank,
                            DOT_DTYPE,
                        )
                        total *= scaling
                    if HAS_BIAS:
                        bias_ptrs = bias_ptr + wide * strides.bias_expert + column
                        bias = tl.load(bias_ptrs, mask=inside, other=0.0)
                        total += bias.to(tl.float32)[None, :]
                    reduced = words_per_row * 8 if TRANSPOSE_WEIGHT else N
                    for k0 in range(0, reduced, TILE_K):
                        k = k0 + tl.arange(0, TILE_K)
                        x_mask = mine[:, None] & (k < reduced)[None, :]
                        x = tl.load(x_ptrs + k[None, :], mask=x_mask, other=0.0).to(DOT_DTYPE)
                        if TRANSPOSE_WEIGHT:
                            word = k0 // 8 + tl.arange(0, TILE_K // 8)
                            w = load_values(
                                e_q_ptr,
                                e_s_ptr,
                                column,
                                C,
                                strides.q_row,
                                strides.s_row,
                                word,
                                words_per_row,
                                DOT_DTYPE,
                            )
                            w = tl.trans(w)
                        else:
                            word = (p % tiles_n) * (TILE_N // 8) + tl.arange(0, TILE_N // 8)
                            w = load_values(
                                e_q_ptr,
                                e_s_ptr,
                                k,
                                N,
                                strides.q_row,
                                strides.s_row,
                                word,
                                words_per_row,
                                DOT_DTYPE,
                            )
                        total = tl.dot(x, w, total)
                    y_ptrs = y_ptr + row.to(tl.int64)[:, None] * C + column[None, :]
                    mask = mine[:, None] & flagged[None, :]
                    tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=mask)


def quantize_rows(
    x: torch.Tensor, order: torch.Tensor | None, top_k: int, n_rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply ``reference.fp8.quantize_rows`` to ``x[order // top_k]``: (``[n_rows, C]``, fp32 ``[n_rows]``).

    C is a multiple of 4. Each token is rounded once, and its bytes are gathered.
    """
    columns = x.shape[1]
    q, scale = _quantized(x, dtype, columns, "natural")
    if order is None:
        return q, scale
    with on_device_of(x):
        q_rows = torch.empty((n_rows, columns), dtype=dtype, device=x.device)
        scale_rows = torch.empty(n_rows, dtype=torch.float32, device=x.device)
        words = columns // 4
        _gather_rows_kernel[(cdiv(n_rows, FP8_GATHER.m), cdiv(words, FP8_GATHER.k))](
            q.view(torch.int32),
            scale,
            order,
            q_rows.view(torch.int32),
            scale_rows,
            n_rows,
            x.shape[0],
            words,
            top_k,
            ROWS=FP8_GATHER.m,
            WORDS=FP8_GATHER.k,
            num_warps=4,
        )
    return q_rows, scale_rows


def permuted_rows(x: torch.Tensor, order: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize_rows`` to e4m3 in the order that the fused kernels read: (``[T, C]``, fp32 ``[T]``).

    C is whole chunks of 128; x is padded with zeros. The order ``"halves"``, for the forward kernel, puts per
    32 columns the first halves of the four runs of eight first, then the second halves. ``"pairs"``, for the
    backward kernel, puts the i-th pairs of the two runs of eight in 16 columns side by side.
    """
    return _quantized(x, torch.float8_e4m3fn, cdiv(x.shape[1], 128) * 128, order)


def _quantized(
    x: torch.Tensor, dtype: torch.dtype, pitch: int, order: str
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, columns = x.shape
    q = torch.empty((tokens, pitch), dtype=dtype, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    span = next_power_of_2(pitch)
    rows = max(1, FP8_QUANTIZE_ELEMENTS // span)
    fmt = MXFP8_E4M3 if dtype == torch.float8_e4m3fn else MXFP8_E5M2
    with on_device_of(x):
        _quantize_rows_kernel[(cdiv(tokens, rows),)](
            x,
            bytes_of(q),
            scale,
            tokens,
            columns,
            (x.stride(0), pitch),
            FORMAT=format_on(x.device, fmt),
            ORDER=order,
            ROWS=rows,
            SPAN=span,
            num_warps=min(32, max(4, span // 1024)),
        )
    return q, scale


def recompute_flagged(
    y: torch.Tensor,
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    flags: torch.Tensor,
    rows: Rows,
    transpose_weight: bool,
    added: Added,
    dot_dtype: tl.dtype = tl.bfloat16,
) -> None:
    """Overwrite the columns of ``y [R, C]`` whose flag is set with the whole product in bf16.

    ``flags [E, C]`` with ``transpose_weight``, else ``[E, C / 32]``, contiguous; the weight ``[E, N, ...]``.
    """
    words, scale = words_of(qdata, scale)
    offs, order, top_k, n_rows = rows
    h, up, scaling, bias = added
    columns = y.shape[1]
    experts, n, per_row = words.shape
    rank = 0 if h is None else h.shape[1]
    tile = FLAGGED_COLUMNS._replace(rank=rank_tile(rank, FLAGGED_COLUMNS.rank))
    programs = cdiv(experts * cdiv(columns, tile.n), tile.pairs)
    shares = min(cdiv(2 * multiprocessors(y.device), programs), cdiv(n_rows, tile.m))
    strides = _Strides(
        x.stride(0),
        *words.stride()[:2],
        *scale.stride()[:2],
        0 if h is None else h.stride(0),
        *((0, 0, 0) if up is None else up.stride()),
        0 if bias is None else bias.stride(0),
    )
    with on_device_of(y):
        _flagged_columns_kernel[(programs, shares)](
            x,
            y if order is None else order,
            (words, scale),
            flags,
            y if offs is None else offs,
            (y if h is None else h, y if up is None else up, y if bias is None else bias),
            y,
            n_rows,
            columns,
            n,
            per_row,
            experts,
            top_k,
            rank,
            scaling,
            strides,
            FLAG_COLUMNS=1 if transpose_weight else MXFP4.block_size,
            GATHER=order is not None,
            GROUPED=offs is not None,
            TRANSPOSE_WEIGHT=transpose_weight,
            HAS_LORA=rank > 0,
            HAS_BIAS=bias is not None,
            TILE=tile,
            DOT_DTYPE=dot_dtype,
            num_warps=8,
        )
