"""MXFP4 weights as e4m3 matrices times powers of two, without loss.

An e2m1 element is a multiple of 0.5 up to 6, so ``element * 2**(6 - spread)`` is an e4m3 number for spreads
of 0 .. 14. If block scales differ by at most 14 powers of two (ignoring blocks of zeros), the blocks share
one scale, the largest:

* *rows*, ``W [N, K]``: the blocks of a row, for products reduced over K; * *columns*, ``W^T [K, N]``: the
blocks of all rows at one position, for products reduced over N. The 8-bit tensor
  cores need both operands contiguous along the reduced axis, so this decode transposes.

A flag marks exceptions: a larger spread, a NaN scale, or a scale so large or small that its product with
another row's scale could leave fp32's range.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from torchao_mx.formats import MXFP4
from torchao_mx.ops.core.launch import (
    bytes_of,
    cdiv,
    in_words,
    kernel_format,
    launched,
    next_power_of_2,
    on_device_of,
)
from torchao_mx.ops.core.tiles import (
    FP8_COLUMN_SCALES_BLOCKS,
    FP8_COLUMN_SCALES_BYTES,
    FP8_COLUMNS,
    FP8_ROWS_WORDS,
)
from torchao_mx.ops.moe import groups
from torchao_mx.ops.quantization import tile
from torchao_mx.reference import fp8 as definition

BLOCK = MXFP4.block_size
WORDS = BLOCK // 8  # int32 words per block
_MXFP4 = tl.constexpr(kernel_format(MXFP4, has_fp8_instructions=True))
_MAX_SPREAD = tl.constexpr(definition.MAX_SPREAD)
MIN_BYTE, MAX_BYTE = tl.constexpr(definition.MIN_BYTE), tl.constexpr(definition.MAX_BYTE)
_EVEN_BYTES, _ODD_BYTES = tl.constexpr(0x00FF00FF), tl.constexpr(0xFF00FF00 - 2**32)
_LOW_HALF, _HIGH_HALF = tl.constexpr(0x0000FFFF), tl.constexpr(0xFFFF0000 - 2**32)


@triton.jit
def _table(spread):
    """Return e2m1's eight magnitudes times ``2**(6 - spread)``, spread in 0 .. 14, as bytes of two words."""
    offset = (12 - tl.minimum(spread, 12)) * 8
    low = 0x0C080000 + offset * 0x01010100
    high = 0x1C181410 + offset * 0x01010101
    # Subnormal in e4m3: multiples of 2**-9.
    low = tl.where(spread == 12, 0x0C080400, low)
    low = tl.where(spread == 13, 0x06040200, low)
    high = tl.where(spread == 13, 0x14100C08, high)
    low = tl.where(spread == 14, 0x03020100, low)
    high = tl.where(spread == 14, 0x0C080604, high)
    return low, high


@triton.jit
def _e2m1_to_e4m3(word, low, high, PTX: tl.constexpr):
    """Convert eight e2m1 codes to two words of e4m3 codes, by the :func:`_table` of their block.

    One byte permutation looks up four magnitudes at a time, the next takes the signs from bit 3 of each
    nibble. Without PTX (in the interpreter) codes are converted one at a time.
    """
    if PTX:
        first, second = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 index, sign, ones;
            and.b32 index, $2, 0x77777777;
            and.b32 sign, $2, 0x88888888;
            mov.b32 ones, 0x80808080;
            prmt.b32 $0, $3, $4, index;
            prmt.b32 ones, ones, ones, sign;
            shl.b32 ones, ones, 7;
            lop3.b32 $0, ones, 0x80808080, $0, 0xEA;
            shr.u32 index, index, 16;
            shr.u32 sign, sign, 16;
            mov.b32 ones, 0x80808080;
            prmt.b32 $1, $3, $4, index;
            prmt.b32 ones, ones, ones, sign;
            shl.b32 ones, ones, 7;
            lop3.b32 $1, ones, 0x80808080, $1, 0xEA;
            }
            """,
            "=&r,=&r,r,r,r",
            [word, low, high],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        first = _four_by_table(word, low, high)
        second = _four_by_table(word >> 16, low, high)
    return first, second


@triton.jit
def _four_by_table(word, low, high):
    """Look the low four codes of ``word`` up in a table of eight bytes; return a word of e4m3 codes."""
    out = tl.zeros_like(word)
    for i in tl.static_range(4):
        code = (word >> (4 * i)) & 15
        table = tl.where((code & 4) != 0, high, low)
        byte = ((table >> ((code & 3) * 8)) & 0x7F) | ((code & 8) << 4)
        out = out | (byte << (8 * i))
    return out


@triton.jit
def _load_blocks(q_row_ptrs, s_row_ptrs, real, block, n_blocks, WORDS: tl.constexpr):
    """Load words ``[R, B, WORDS]`` and scale bytes ``[R, B]`` of the ``real [R]`` rows at ``[R]`` pointers."""
    inside = real[:, None] & (block < n_blocks)[None, :]
    index = block[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    q_ptrs = q_row_ptrs[:, None, None] + index[None, :, :]
    word = tl.load(q_ptrs, mask=inside[:, :, None], other=0)
    byte = tl.load(s_row_ptrs[:, None] + block[None, :], mask=inside, other=0).to(tl.int32)
    return word, byte


@launched
@triton.jit
def _rows_kernel(
    q_ptr,
    s_ptr,
    out_ptr,
    row_scale_ptr,
    flag_ptr,
    offs_ptr,
    n_rows,
    rows_per_expert,
    n_blocks,
    q_strides,
    s_strides,
    flag_expert,
    SELECTIVE: tl.constexpr,
    PTX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Convert int32 words of e2m1, WORDS per block, to words of four e4m3 codes; BLOCKS covers a row.

    Rows are numbered across the experts. Strides are of experts and rows. SELECTIVE skips experts without
    rows of x; their flags are 0.
    """
    q_expert, q_row = q_strides
    s_expert, s_row = s_strides
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = (row // rows_per_expert).to(tl.int64)
    real = row < n_rows
    if SELECTIVE:
        real = real & groups.has_rows(offs_ptr, expert, real)
    local = (row % rows_per_expert).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    q_row_ptrs = q_ptr + expert * q_expert + local * q_row
    s_row_ptrs = s_ptr + expert * s_expert + local * s_row
    word, byte = _load_blocks(q_row_ptrs, s_row_ptrs, real, block, n_blocks, WORDS)
    largest = tl.max(byte, axis=1)
    spread = largest[:, None] - byte
    extreme = ((largest < MIN_BYTE) | (largest > MAX_BYTE)).to(tl.int32)
    nonzero = tl.max(word & 0x77777777, axis=2) != 0
    lost = tl.max((nonzero & (spread > _MAX_SPREAD)).to(tl.int32), axis=1)
    flag = lost | (extreme & tl.max(nonzero.to(tl.int32), axis=1)) | (largest == 255).to(tl.int32)
    flag_ptrs = flag_ptr + expert * flag_expert + local
    tl.store(flag_ptrs, flag.to(flag_ptr.dtype.element_ty), mask=row < n_rows)
    # The product of flagged rows is overwritten, so it only has to be harmless.
    exponent = tl.where(extreme == 1, 127, largest - 6)
    low, high = _table(tl.minimum(spread, _MAX_SPREAD))
    first, second = _e2m1_to_e4m3(word, low[:, :, None], high[:, :, None], PTX)
    pairs = tl.join(first, second).reshape(ROWS, 2 * BLOCKS * WORDS)
    index = tl.arange(0, 2 * BLOCKS * WORDS)
    width = 2 * n_blocks * WORDS
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * width + index[None, :]
    tl.store(out_ptrs, pairs, mask=real[:, None] & (index < width)[None, :])
    tl.store(row_scale_ptr + row, tile.float_of(exponent << 23), mask=real)


@launched
@triton.jit
def _column_scales_kernel(
    s_ptr,
    largest_ptr,
    scale_ptr,
    flag_ptr,
    offs_ptr,
    N,
    n_blocks,
    s_strides,
    flag_expert,
    SELECTIVE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Find the largest scale byte over the N rows, per block of columns; set the flags to 0."""
    s_expert, s_row = s_strides
    tiles = tl.cdiv(n_blocks, BLOCKS)
    expert = (tl.program_id(0) // tiles).to(tl.int64)
    block = (tl.program_id(0) % tiles) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < n_blocks
    tl.store(flag_ptr + expert * flag_expert + block, tl.zeros_like(block), mask=inside)
    if SELECTIVE:
        if not groups.has_rows(offs_ptr, expert, True):
            return
    found = tl.zeros((ROWS, BLOCKS), tl.int32)
    for first in range(0, N, ROWS):
        row = first + tl.arange(0, ROWS)
        ptrs = s_ptr + expert * s_expert + row.to(tl.int64)[:, None] * s_row + block[None, :]
        byte = tl.load(ptrs, mask=(row < N)[:, None] & inside[None, :], other=0)
        found = tl.maximum(found, byte.to(tl.int32))
    largest = tl.max(found, axis=0)
    tl.store(largest_ptr + expert * n_blocks + block, largest, mask=inside)
    extreme = (largest < MIN_BYTE) | (largest > MAX_BYTE)
    scale = tile.float_of(tl.where(extreme, 127, largest - 6) << 23)
    column = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    scale_ptrs = scale_ptr + expert * n_blocks * BLOCK_SIZE + column
    scales = tl.broadcast_to(scale[:, None], (BLOCKS, BLOCK_SIZE))
    tl.store(scale_ptrs, scales, mask=tl.broadcast_to(inside[:, None], (BLOCKS, BLOCK_SIZE)))


@triton.jit
def _transpose_4x4(a, b, c, d):
    """Return words of bytes ``a[k], b[k], c[k], d[k]`` for k = 0 .. 3."""
    ab_even = (a & _EVEN_BYTES) | ((b << 8) & _ODD_BYTES)
    ab_odd = ((a >> 8) & _EVEN_BYTES) | (b & _ODD_BYTES)
    cd_even = (c & _EVEN_BYTES) | ((d << 8) & _ODD_BYTES)
    cd_odd = ((c >> 8) & _EVEN_BYTES) | (d & _ODD_BYTES)
    k0 = (ab_even & _LOW_HALF) | (cd_even << 16)
    k1 = (ab_odd & _LOW_HALF) | (cd_odd << 16)
    k2 = ((ab_even >> 16) & _LOW_HALF) | (cd_even & _HIGH_HALF)
    k3 = ((ab_odd >> 16) & _LOW_HALF) | (cd_odd & _HIGH_HALF)
    return k0, k1, k2, k3


@triton.jit
def _decode_row(
    q_ptr,
    s_ptr,
    row,
    N,
    block,
    n_blocks,
    q_row,
    s_row,
    largest,
    PTX: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Return two words of e4m3 for each of ``[R, B, WORDS]``, and whether a block ``[R, B]`` loses bits."""
    wide = row.to(tl.int64)
    word, byte = _load_blocks(
        q_ptr + wide * q_row, s_ptr + wide * s_row, row < N, block, n_blocks, WORDS
    )
    spread = largest[None, :] - byte
    extreme = (largest < MIN_BYTE) | (largest > MAX_BYTE)
    nonzero = tl.max(word & 0x77777777, axis=2) != 0
    lossy = (nonzero & ((spread > _MAX_SPREAD) | extreme[None, :])) | (byte == 255)
    low, high = _table(tl.minimum(spread, _MAX_SPREAD))
    first, second = _e2m1_to_e4m3(word, low[:, :, None], high[:, :, None], PTX)
    return first, second, lossy.to(tl.int32)


@triton.jit
def _store_columns(out_ptrs, stride, a, b, c, d, mask):
    """Store four words of four columns, of neighbouring rows ``[R / 4, ...]``, to four rows of ``W^T``."""
    k0, k1, k2, k3 = _transpose_4x4(a, b, c, d)
    tl.store(out_ptrs, tl.permute(k0, (1, 2, 0)), mask=mask)
    tl.store(out_ptrs + stride, tl.permute(k1, (1, 2, 0)), mask=mask)
    tl.store(out_ptrs + 2 * stride, tl.permute(k2, (1, 2, 0)), mask=mask)
    tl.store(out_ptrs + 3 * stride, tl.permute(k3, (1, 2, 0)), mask=mask)


@launched
@triton.jit
def _columns_kernel(
    q_ptr,
    s_ptr,
    out_ptr,
    largest_ptr,
    flag_ptr,
    offs_ptr,
    N,
    n_blocks,
    q_strides,
    s_strides,
    flag_expert,
    SELECTIVE: tl.constexpr,
    PTX: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Convert ``[E, N, K / 8]`` words of e2m1, WORDS per block, to ``[E, K, N / 4]`` of e4m3; 4 divides N.

    A thread holds four neighbouring rows of a word, so it can transpose their bytes 4 x 4.
    """
    q_expert, q_row = q_strides
    s_expert, s_row = s_strides
    expert, tile_n, tile_b = tile.tile_of_program(N, TILE_N, n_blocks, BLOCKS)
    if SELECTIVE:
        if not groups.has_rows(offs_ptr, expert, True):
            return
    q_ptr += expert * q_expert
    s_ptr += expert * s_expert
    quad = tile_n * (TILE_N // 4) + tl.arange(0, TILE_N // 4)
    row = 4 * quad
    block = tile_b * BLOCKS + tl.arange(0, BLOCKS)
    largest = tl.load(largest_ptr + expert * n_blocks + block, mask=block < n_blocks, other=127)
    low0, high0, lossy0 = _decode_row(
        q_ptr, s_ptr, row, N, block, n_blocks, q_row, s_row, largest, PTX, WORDS
    )
    low1, high1, lossy1 = _decode_row(
        q_ptr, s_ptr, row + 1, N, block, n_blocks, q_row, s_row, largest, PTX, WORDS
    )
    low2, high2, lossy2 = _decode_row(
        q_ptr, s_ptr, row + 2, N, block, n_blocks, q_row, s_row, largest, PTX, WORDS
    )
    low3, high3, lossy3 = _decode_row(
        q_ptr, s_ptr, row + 3, N, block, n_blocks, q_row, s_row, largest, PTX, WORDS
    )
    lossy = tl.max((lossy0 | lossy1) | (lossy2 | lossy3), axis=0)
    mask = (lossy > 0) & (block < n_blocks)
    tl.atomic_max(flag_ptr + expert * flag_expert + block, lossy, mask=mask)
    stride = (N // 4).to(tl.int64)
    word = (expert * n_blocks + block[:, None]) * WORDS + tl.arange(0, WORDS)[None, :]
    out_ptrs = out_ptr + (word * 8 * stride)[:, :, None] + quad[None, None, :]
    inside = (block < n_blocks)[:, None, None] & (quad < N // 4)[None, None, :]
    _store_columns(out_ptrs, stride, low0, low1, low2, low3, inside)
    _store_columns(out_ptrs + 4 * stride, stride, high0, high1, high2, high3, inside)


@triton.jit
def load_values(
    q_ptr, s_ptr, row, n_rows, q_row, s_row, word_index, words_per_row, DTYPE: tl.constexpr
):
    """Return decoded values ``[R, 8 W]`` of rows ``row [R]`` and words ``word_index [W]``, in DTYPE."""
    inside = (row < n_rows)[:, None] & (word_index < words_per_row)[None, :]
    wide = row.to(tl.int64)[:, None]
    word = tl.load(q_ptr + wide * q_row + word_index[None, :], mask=inside, other=0)
    byte = tl.load(s_ptr + wide * s_row + word_index[None, :] // 4, mask=inside, other=0)
    FORMAT: tl.constexpr = _MXFP4.value
    scale = tile.scale_value(byte.to(tl.int32), 1.0, FORMAT)
    code = (word[:, :, None] >> (tl.arange(0, 8) * 4)[None, None, :]) & 15
    value = tile.decode(code, FORMAT) * scale[:, :, None]
    return value.reshape(row.shape[0], word_index.shape[0] * 8).to(DTYPE)


def words_of(qdata: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int32 words ``[E, N, K / 8]`` and scale bytes ``[E, N, K / 32]`` (E = 1: matrix), as views if possible."""
    qdata, scale = in_words(qdata, 4), bytes_of(scale)
    if scale.stride(-1) != 1:
        scale = scale.contiguous()
    words = qdata.view(torch.int32)
    return (words[None], scale[None]) if qdata.dim() == 2 else (words, scale)


def column_scales(
    scale: torch.Tensor,
    column_scale: torch.Tensor,
    flag: torch.Tensor,
    offs: torch.Tensor | None,
) -> torch.Tensor:
    """Return the largest scale byte per column block, int32 ``[E, K / 32]``; fill column_scale, zero flag."""
    experts, rows, blocks = scale.shape
    largest = torch.empty((experts, blocks), dtype=torch.int32, device=scale.device)
    tile_blocks = min(FP8_COLUMN_SCALES_BLOCKS, next_power_of_2(blocks))
    tile_rows = min(FP8_COLUMN_SCALES_BYTES // tile_blocks, next_power_of_2(rows))
    with on_device_of(scale):
        _column_scales_kernel[(experts * cdiv(blocks, tile_blocks),)](
            scale,
            largest,
            column_scale,
            flag,
            offs,
            rows,
            blocks,
            scale.stride()[:2],
            flag.stride(0),
            SELECTIVE=offs is not None,
            BLOCK_SIZE=BLOCK,
            ROWS=tile_rows,
            BLOCKS=tile_blocks,
            num_warps=8,
        )
    return largest


def fp8_rows(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    flag: torch.Tensor | None = None,
    offs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convert MXFP4 ``[..., N, K / 2]``: (e4m3 ``[..., N, K]``, fp32 scales ``[..., N]``, int8 flags ``[..., N]``).

    ``e4m3 * scale`` equals the values exactly wherever the row's flag is 0. Two or three axes, any strides
    with a contiguous last axis. ``flag``: the tensor to write the flags to. ``offs``: decode only experts
    that own rows; the others' flags are 0.
    """
    words, scale_ENB = words_of(qdata, scale)
    experts, rows, blocks = scale_ENB.shape
    fp8 = words.new_empty((*qdata.shape[:-1], blocks * BLOCK), dtype=torch.float8_e4m3fn)
    row_scale = words.new_empty(qdata.shape[:-1], dtype=torch.float32)
    flag = row_flags(qdata) if flag is None else flag
    flag_EN = flag[None] if flag.dim() == 1 else flag
    span = next_power_of_2(blocks)
    tile_rows = max(1, FP8_ROWS_WORDS // (span * WORDS))
    with on_device_of(words):
        _rows_kernel[(cdiv(experts * rows, tile_rows),)](
            words,
            scale_ENB,
            fp8.view(torch.int32),
            row_scale,
            flag_EN,
            offs,
            experts * rows,
            rows,
            blocks,
            words.stride()[:2],
            scale_ENB.stride()[:2],
            flag_EN.stride(0),
            SELECTIVE=offs is not None,
            PTX=words.is_cuda,
            ROWS=tile_rows,
            BLOCKS=span,
            WORDS=WORDS,
            num_warps=4 if span * WORDS <= FP8_ROWS_WORDS else 8,
        )
    return fp8, row_scale, flag


def fp8_columns(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    flag: torch.Tensor | None = None,
    offs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convert MXFP4 ``[..., N, K / 2]`` to its transpose: (e4m3 ``[..., K, N]``, fp32 scales ``[..., K]``,
    int32 flags ``[..., K / 32]``).

    ``e4m3 * scale`` equals the values of ``W^T`` exactly wherever the flag of a block of 32 rows is 0. N is a
    multiple of 4. The rest is as in :func:`fp8_rows`.
    """
    words, scale_ENB = words_of(qdata, scale)
    experts, rows, blocks = scale_ENB.shape
    lead = qdata.shape[:-2]
    fp8 = words.new_empty((*lead, blocks * BLOCK, rows), dtype=torch.float8_e4m3fn)
    column_scale = words.new_empty((*lead, blocks * BLOCK), dtype=torch.float32)
    flag = column_flags(scale) if flag is None else flag
    flag_EB = flag[None] if flag.dim() == 1 else flag
    largest = column_scales(scale_ENB, column_scale, flag_EB, offs)
    tiles = cdiv(rows, FP8_COLUMNS.m) * cdiv(blocks, FP8_COLUMNS.k)
    with on_device_of(words):
        _columns_kernel[(experts * tiles,)](
            words,
            scale_ENB,
            fp8.view(torch.int32),
            largest,
            flag_EB,
            offs,
            rows,
            blocks,
            words.stride()[:2],
            scale_ENB.stride()[:2],
            flag_EB.stride(0),
            SELECTIVE=offs is not None,
            PTX=words.is_cuda,
            TILE_N=FP8_COLUMNS.m,
            BLOCKS=FP8_COLUMNS.k,
            WORDS=WORDS,
            num_warps=4,
        )
    return fp8, column_scale, flag


def row_flags(qdata: torch.Tensor) -> torch.Tensor:
    """Allocate the flags that :func:`fp8_rows` writes."""
    return torch.empty(qdata.shape[:-1], dtype=torch.int8, device=qdata.device)


def column_flags(scale: torch.Tensor) -> torch.Tensor:
    """Allocate the flags that :func:`fp8_columns` writes: int32, for its integer atomics."""
    shape = (*scale.shape[:-2], scale.shape[-1])
    return torch.empty(shape, dtype=torch.int32, device=scale.device)
