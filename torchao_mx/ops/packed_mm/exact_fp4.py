"""mxfp4_product: MXFP4 times MXFP4 on the 8-bit tensor cores, exactly.

An MXFP4 row, with rare exceptions, equals an e4m3 row times one power of two, without loss
(``packed_mm/fp8/weight.py`` gives the condition). So the product is a row-wise scaled GEMM at twice the bf16
rate. There are three launches:

1. per operand: e4m3 rows, their scales, and a flag for the rows that do not fit;
2. ``torch._scaled_mm`` with ``use_fast_accum=False`` (fast accumulation keeps too few bits);
3. a Triton GEMM in bf16 that overwrites the flagged rows and columns, and returns at once if there are none:
   the decision is made on the device, without the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from torchao_mx import reference, torch_internals
from torchao_mx.formats import MXFP4
from torchao_mx.ops.core.launch import (
    bytes_of,
    cdiv,
    has_fp8_instructions,
    launched,
    multiprocessors,
    on_device_of,
)
from torchao_mx.ops.core.register import define_op
from torchao_mx.ops.core.replay import replayed
from torchao_mx.ops.core.tiles import FLAGGED_TILES
from torchao_mx.ops.packed_mm.fp8.weight import fp8_rows, load_values

# At 1,024 rows of a 4096 x 4096 layer the faster GEMM gains 4 % in a CUDA graph, and the extra launches cost
# more than that in eager mode.
MIN_ROWS = 2048


@launched
@triton.jit
def _flagged_tiles_kernel(
    xq_ptr,
    xs_ptr,
    wq_ptr,
    ws_ptr,
    bias_ptr,
    y_ptr,
    x_flag_ptr,
    w_flag_ptr,
    M,
    N,
    words_per_row,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Overwrite the flagged rows and columns of ``y``; a program that finds no flag at all returns."""
    TILE_M: tl.constexpr = TILE.m
    TILE_N: tl.constexpr = TILE.n
    TILE_WORDS: tl.constexpr = TILE.k // 8
    any_flag = _any(x_flag_ptr, M) + _any(w_flag_ptr, N)
    if any_flag > 0:
        tiles_n = tl.cdiv(N, TILE_N)
        for tile in range(tl.program_id(0), tl.cdiv(M, TILE_M) * tiles_n, tl.num_programs(0)):
            m = (tile // tiles_n) * TILE_M + tl.arange(0, TILE_M)
            n = (tile % tiles_n) * TILE_N + tl.arange(0, TILE_N)
            x_flag = tl.load(x_flag_ptr + m, mask=m < M, other=0).to(tl.int32)
            w_flag = tl.load(w_flag_ptr + n, mask=n < N, other=0).to(tl.int32)
            if tl.max(x_flag, axis=0) + tl.max(w_flag, axis=0) > 0:
                total = tl.zeros((TILE_M, TILE_N), tl.float32)
                for first in range(0, words_per_row, TILE_WORDS):
                    k_word = first + tl.arange(0, TILE_WORDS)
                    x = load_values(
                        xq_ptr,
                        xs_ptr,
                        m,
                        M,
                        words_per_row,
                        words_per_row // 4,
                        k_word,
                        words_per_row,
                        DOT_DTYPE,
                    )
                    w = load_values(
                        wq_ptr,
                        ws_ptr,
                        n,
                        N,
                        words_per_row,
                        words_per_row // 4,
                        k_word,
                        words_per_row,
                        DOT_DTYPE,
                    )
                    total = tl.dot(x, tl.trans(w), total)
                if HAS_BIAS:
                    total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
                y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
                mine = (x_flag != 0)[:, None] | (w_flag != 0)[None, :]
                mine = mine & (m < M)[:, None] & (n < N)[None, :]
                tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=mine)


@triton.jit
def _any(flag_ptr, n):
    """Return the largest of ``n`` int8 flags."""
    largest = tl.zeros((2048,), tl.int32)
    for first in range(0, n, 2048):
        index = first + tl.arange(0, 2048)
        flag = tl.load(flag_ptr + index, mask=index < n, other=0).to(tl.int32)
        largest = tl.maximum(largest, flag)
    return tl.max(largest, axis=0)


def recompute_flagged(
    y: torch.Tensor,
    x: tuple[torch.Tensor, torch.Tensor],
    w: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    x_flag: torch.Tensor,
    w_flag: torch.Tensor,
    dot_dtype: tl.dtype = tl.bfloat16,
) -> None:
    """Overwrite the flagged rows and columns of ``y [M, N]`` by the product in bf16 (fp32 in tests)."""
    (m, n), words = y.shape, x[0].shape[1] // 4
    tiles = cdiv(m, FLAGGED_TILES.m) * cdiv(n, FLAGGED_TILES.n)
    with on_device_of(y):
        _flagged_tiles_kernel[(min(tiles, multiprocessors(y.device)),)](
            x[0].view(torch.int32),
            bytes_of(x[1]),
            w[0].view(torch.int32),
            bytes_of(w[1]),
            y if bias is None else bias,
            y,
            x_flag,
            w_flag,
            m,
            n,
            words,
            HAS_BIAS=bias is not None,
            TILE=FLAGGED_TILES,
            DOT_DTYPE=dot_dtype,
            num_warps=8,
        )


def _product_cuda(
    xq: torch.Tensor,
    xs: torch.Tensor,
    wq: torch.Tensor,
    ws: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    x8, x_scale, x_flag = fp8_rows(xq, xs)
    w8, w_scale, w_flag = fp8_rows(wq, ws)
    y = torch_internals.scaled_mm(
        x8, w8.t(), x_scale[:, None], w_scale[None, :], bias=bias, use_fast_accum=False
    )
    recompute_flagged(y, (xq, xs), (wq, ws), bias, x_flag, w_flag)
    return y


def _product_cpu(
    xq: torch.Tensor,
    xs: torch.Tensor,
    wq: torch.Tensor,
    ws: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return F.linear(reference.dequantize(xq, xs, MXFP4), reference.dequantize(wq, ws, MXFP4), bias)


def _product_fake(
    xq: torch.Tensor,
    xs: torch.Tensor,
    wq: torch.Tensor,
    ws: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return xq.new_empty((xq.shape[0], wq.shape[0]), dtype=torch.bfloat16)


mxfp4_product_op = define_op(
    "mxfp4_product",
    "(Tensor xq, Tensor xs, Tensor wq, Tensor ws, Tensor? bias) -> Tensor",
    cpu=_product_cpu,
    cuda=replayed(_product_cuda),
    fake=_product_fake,
)


def takes_mxfp4_product(
    x: torch.Tensor, n: int, weight_format: str, activation_format: str
) -> bool:
    """Whether ``x [M, K]`` times a weight of ``n`` rows is computed here. QAT and PTQ must agree, and do."""
    return (
        x.is_cuda
        and weight_format == activation_format == MXFP4.name
        and x.dtype == torch.bfloat16
        and x.dim() == 2
        and x.shape[0] >= MIN_ROWS
        and n % 16 == 0
        and has_fp8_instructions(x.device)
    )
