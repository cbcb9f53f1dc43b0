"""mxfp4_product: MXFP4 times MXFP4 on the 8-bit tensor cores, exactly.

An e2m1 element is a multiple of 0.5 up to 6, so ``element * 2**(d + 6)`` is an e4m3 number while -14 <= d <= 0.
Where the block scales of a row differ by at most 14 powers of two (blocks of zeros aside), the row is
therefore an e4m3 row times one power of two, without loss, and the product is a row-wise scaled GEMM at
twice the bf16 rate. Three launches:

1. each operand: e4m3 rows, their scales, and a flag for the rows that do not fit;
2. ``torch._scaled_mm`` with ``use_fast_accum=False`` (fast accumulation keeps too few bits);
3. a Triton GEMM in bf16 that overwrites the flagged rows and columns, and returns at once where there are
   none: deciding on the device keeps the host out of it.

Flagged are also rows with a NaN block and rows of scales so large or small that the product of two row scales
could leave fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from torchao_mx import reference
from torchao_mx.formats import MXFP4
from torchao_mx.ops import _tile
from torchao_mx.ops._launch import bytes_of, has_fp8_instructions, multiprocessors, on_device_of
from torchao_mx.ops._library import define_op

# At 1,024 rows of a 4096 x 4096 layer the faster GEMM gains 4 % in a CUDA graph and the extra launches cost
# more than that in eager mode.
MIN_ROWS = 2048
FP8_ROWS_TILE = 1024  # words of a tile
_MIN_BYTE, _MAX_BYTE = tl.constexpr(64), tl.constexpr(190)  # of a row's largest scale
_MAX_SPREAD = tl.constexpr(14)


@triton.jit
def _e2m1_to_e4m3(word, spread):
    """Eight e2m1 codes times ``2**(6 - spread)``, spread in 0 .. 14, as two words of e4m3 codes.

    For one spread the eight magnitudes are a table of eight bytes, which a byte permutation looks up four at
    a time; the next one takes the signs from bit 3 of each nibble.
    """
    offset = (12 - tl.minimum(spread, 12)) * 8
    low = 0x0C080000 + offset * 0x01010100
    high = 0x1C181410 + offset * 0x01010101
    # Subnormal in e4m3: multiples of 2**-9.
    low = tl.where(spread == 12, 0x0C080400, low)
    low = tl.where(spread == 13, 0x06040200, low)
    high = tl.where(spread == 13, 0x14100C08, high)
    low = tl.where(spread == 14, 0x03020100, low)
    high = tl.where(spread == 14, 0x0C080604, high)
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 index, sign, ones;
        and.b32 index, $2, 0x77777777;
        and.b32 sign, $2, 0x88888888;
        mov.b32 ones, 0x80808080;
        prmt.b32 $0, $3, $4, index;
        prmt.b32 ones, ones, ones, sign;
        and.b32 ones, ones, 0x01010101;
        shl.b32 ones, ones, 7;
        or.b32 $0, $0, ones;
        shr.u32 index, index, 16;
        shr.u32 sign, sign, 16;
        mov.b32 ones, 0x80808080;
        prmt.b32 $1, $3, $4, index;
        prmt.b32 ones, ones, ones, sign;
        and.b32 ones, ones, 0x01010101;
        shl.b32 ones, ones, 7;
        or.b32 $1, $1, ones;
        }
        """,
        "=&r,=&r,r,r,r",
        [word, low, high],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _fp8_rows_kernel(q_ptr, s_ptr, out_ptr, row_scale_ptr, flag_ptr, n_rows, words_per_row,
                     ROWS: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """int32 words of eight e2m1 codes to int32 words of four e4m3 codes; WORDS covers a row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.arange(0, WORDS)
    inside = (row < n_rows)[:, None] & (index < words_per_row)[None, :]
    offset = row.to(tl.int64)[:, None] * words_per_row + index[None, :]
    word = tl.load(q_ptr + offset, mask=inside, other=0)
    byte = tl.load(s_ptr + offset // 4, mask=inside, other=0).to(tl.int32)
    largest = tl.max(byte, axis=1)
    spread = largest[:, None] - byte
    nonzero = (word & 0x77777777) != 0
    lost = tl.max((nonzero & (spread > _MAX_SPREAD)).to(tl.int32), axis=1)
    extreme = ((largest < _MIN_BYTE) | (largest > _MAX_BYTE)).to(tl.int32)
    flag = lost | (extreme & tl.max(nonzero.to(tl.int32), axis=1))
    # The flagged rows' product is overwritten; it only has to be harmless.
    exponent = tl.where(extreme == 1, 127, largest - 6)
    low, high = _e2m1_to_e4m3(word, tl.minimum(spread, _MAX_SPREAD))
    pairs = tl.join(low, high).reshape(ROWS, 2 * WORDS)
    index2 = tl.arange(0, 2 * WORDS)
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * (2 * words_per_row) + index2[None, :]
    in_row = (row < n_rows)[:, None] & (index2 < 2 * words_per_row)[None, :]
    tl.store(out_ptrs, pairs, mask=in_row)
    tl.store(row_scale_ptr + row, _tile.float_of(exponent << 23), mask=row < n_rows)
    tl.store(flag_ptr + row, flag.to(tl.int8), mask=row < n_rows)


@triton.jit
def _load_bf16(q_ptr, s_ptr, row, n_rows, k_word, words_per_row, DOT_DTYPE: tl.constexpr):
    """``[R, 8 C]`` decoded values of the rows ``row [R]`` and the words ``k_word [C]``."""
    inside = (row < n_rows)[:, None] & (k_word < words_per_row)[None, :]
    offset = row.to(tl.int64)[:, None] * words_per_row + k_word[None, :]
    word = tl.load(q_ptr + offset, mask=inside, other=0)
    byte = tl.load(s_ptr + offset // 4, mask=inside, other=0).to(tl.int32)
    scale = _tile.scale_value(byte, 1.0, True, True)
    code = (word[:, :, None] >> (tl.arange(0, 8) * 4)[None, None, :]) & 15
    value = _tile.decode(code, 2, 1, True) * scale[:, :, None]
    return value.reshape(row.shape[0], k_word.shape[0] * 8).to(DOT_DTYPE)


@triton.jit
def _flagged_tiles_kernel(xq_ptr, xs_ptr, wq_ptr, ws_ptr, bias_ptr, y_ptr, x_flag_ptr, w_flag_ptr,
                          M, N, words_per_row, HAS_BIAS: tl.constexpr, TILE_M: tl.constexpr,
                          TILE_N: tl.constexpr, TILE_WORDS: tl.constexpr,
                          DOT_DTYPE: tl.constexpr):  # fmt: skip
    """Overwrites the flagged rows and columns of ``y``; a program that finds no flag at all returns."""
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
                    x = _load_bf16(xq_ptr, xs_ptr, m, M, k_word, words_per_row, DOT_DTYPE)
                    w = _load_bf16(wq_ptr, ws_ptr, n, N, k_word, words_per_row, DOT_DTYPE)
                    total = tl.dot(x, tl.trans(w), total)
                if HAS_BIAS:
                    total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
                y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
                mine = (x_flag != 0)[:, None] | (w_flag != 0)[None, :]
                mine = mine & (m < M)[:, None] & (n < N)[None, :]
                tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=mine)


@triton.jit
def _any(flag_ptr, n):
    """The largest of ``n`` int8 flags."""
    largest = tl.zeros((2048,), tl.int32)
    for first in range(0, n, 2048):
        index = first + tl.arange(0, 2048)
        flag = tl.load(flag_ptr + index, mask=index < n, other=0).to(tl.int32)
        largest = tl.maximum(largest, flag)
    return tl.max(largest, axis=0)


def fp8_rows(
    qdata: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """MXFP4 ``[R, K / 2]`` as (e4m3 ``[R, K]``, fp32 row scales ``[R]``, int8 flags ``[R]``) on the GPU.

    ``e4m3 * row scale`` are the values, exactly, wherever the flag is 0.
    """
    rows, row_bytes = qdata.shape
    words = row_bytes // 4
    fp8 = torch.empty((rows, 2 * row_bytes), dtype=torch.float8_e4m3fn, device=qdata.device)
    row_scale = torch.empty(rows, dtype=torch.float32, device=qdata.device)
    flag = torch.empty(rows, dtype=torch.int8, device=qdata.device)
    span = triton.next_power_of_2(words)
    tile_rows = max(1, FP8_ROWS_TILE // span)
    with on_device_of(qdata):
        _fp8_rows_kernel[(triton.cdiv(rows, tile_rows),)](
            qdata.view(torch.int32), bytes_of(scale), fp8.view(torch.int32), row_scale, flag, rows,
            words, ROWS=tile_rows, WORDS=span,
            num_warps=4 if span <= FP8_ROWS_TILE else 8,
        )  # fmt: skip
    return fp8, row_scale, flag


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
    tiles = triton.cdiv(m, 128) * triton.cdiv(n, 128)
    with on_device_of(y):
        _flagged_tiles_kernel[(min(tiles, multiprocessors(y.device)),)](
            x[0].view(torch.int32), bytes_of(x[1]), w[0].view(torch.int32), bytes_of(w[1]),
            y if bias is None else bias, y, x_flag, w_flag, m, n, words, HAS_BIAS=bias is not None,
            TILE_M=128, TILE_N=128, TILE_WORDS=8, DOT_DTYPE=dot_dtype, num_warps=8,
        )  # fmt: skip


def _product_cuda(
    xq: torch.Tensor,
    xs: torch.Tensor,
    wq: torch.Tensor,
    ws: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    xq, xs, wq, ws = (t.contiguous() for t in (xq, xs, wq, ws))
    x8, x_scale, x_flag = fp8_rows(xq, xs)
    w8, w_scale, w_flag = fp8_rows(wq, ws)
    y = torch._scaled_mm(
        x8, w8.t(), x_scale[:, None], w_scale[None, :], bias=bias, out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )  # fmt: skip
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
    cuda=_product_cuda,
    fake=_product_fake,
)


def takes_mxfp4_product(
    x: torch.Tensor, n: int, weight_format: str, activation_format: str
) -> bool:
    """Whether ``x [M, K]`` times a weight of ``n`` rows goes this way: QAT and PTQ must agree, and do."""
    return (
        x.is_cuda
        and weight_format == activation_format == MXFP4.name
        and x.dtype == torch.bfloat16
        and x.dim() == 2
        and x.shape[0] >= MIN_ROWS
        and n % 16 == 0
        and has_fp8_instructions(x.device)
    )
