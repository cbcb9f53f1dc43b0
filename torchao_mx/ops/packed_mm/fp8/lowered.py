"""Block spreads for kernels that decode MXFP4 to e4m3 as they multiply and see one block at a time.

The blocks of a row (of a column, over all rows) share the scale of the largest, as in ``fp8/weight.py``. For
every other block, the kernel receives the number of powers of two by which it is smaller. Up to 11, e4m3 has
all eight magnitudes as normal numbers, so one subtraction lowers a table of them. Larger spreads are flagged,
unless the block is zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from torchao_mx.ops.core.launch import cdiv, launched, next_power_of_2, on_device_of
from torchao_mx.ops.core.tiles import FP8_LOWERED_BLOCKS, FP8_LOWERED_COLUMNS_BLOCKS
from torchao_mx.ops.moe import groups
from torchao_mx.ops.packed_mm.fp8.weight import (
    BLOCK,
    MAX_BYTE,
    MIN_BYTE,
    WORDS,
    column_scales,
    words_of,
)
from torchao_mx.ops.quantization import tile as _tile

MAX_SPREAD = tl.constexpr(11)


@launched
@triton.jit
def _lowered_kernel(
    q_ptr,
    s_ptr,
    lowered_ptr,
    row_scale_ptr,
    flag_ptr,
    offs_ptr,
    n_rows,
    rows_per_expert,
    n_blocks,
    pitch,
    q_strides,
    s_strides,
    SELECTIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Write 8 times each block's spread as a byte, the scale of the row, and its flag.

    Reads only the words that decide whether a larger spread would lose something. Strides: experts and rows.
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
    inside = real[:, None] & (block < n_blocks)[None, :]
    s_ptrs = s_ptr + expert * s_expert + local * s_row
    byte = tl.load(s_ptrs[:, None] + block[None, :], mask=inside, other=0).to(tl.int32)
    largest = tl.max(byte, axis=1)
    spread = largest[:, None] - byte
    extreme = (largest < MIN_BYTE) | (largest > MAX_BYTE)
    doubtful = inside & ((spread > MAX_SPREAD) | extreme[:, None])
    flag = (largest == 255).to(tl.int32)
    if tl.max(tl.max(doubtful.to(tl.int32), axis=1), axis=0) > 0:
        q_ptrs = q_ptr + expert * q_expert + local * q_row
        index = block[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        word = tl.load(
            q_ptrs[:, None, None] + index[None, :, :], mask=doubtful[:, :, None], other=0
        )
        nonzero = tl.max(word & 0x77777777, axis=2) != 0
        flag = flag | tl.max(nonzero.to(tl.int32), axis=1)
    tl.store(flag_ptr + row, flag.to(flag_ptr.dtype.element_ty), mask=row < n_rows)
    lowered = tl.where(inside, tl.minimum(spread, MAX_SPREAD) * 8, 0)
    lowered_ptrs = lowered_ptr + row.to(tl.int64)[:, None] * pitch + block[None, :]
    mask = real[:, None] & (block < pitch)[None, :]
    tl.store(lowered_ptrs, lowered.to(lowered_ptr.dtype.element_ty), mask=mask)
    exponent = tl.where(extreme, 127, largest - 6)
    tl.store(row_scale_ptr + row, _tile.float_of(exponent << 23), mask=real)


@launched
@triton.jit
def _lowered_columns_kernel(
    q_ptr,
    s_ptr,
    lowered_ptr,
    largest_ptr,
    flag_ptr,
    offs_ptr,
    N,
    n_blocks,
    q_strides,
    s_strides,
    SELECTIVE: tl.constexpr,
    BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """:func:`_lowered_kernel` for blocks of columns: ``[E, n_blocks, chunks, 128]``; sets flags that were zero.

    Within a chunk's 128 rows n, the rows that one thread of the backward kernel reads are neighbours.
    """
    q_expert, q_row = q_strides
    s_expert, s_row = s_strides
    expert, chunk, tile = _tile.tile_of_program(N, 128, n_blocks, BLOCKS)
    if SELECTIVE:
        if not groups.has_rows(offs_ptr, expert, True):
            return
    row = chunk * 128 + tl.arange(0, 128)
    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    inside = (row < N)[:, None] & (block < n_blocks)[None, :]
    wide = row.to(tl.int64)
    s_ptrs = s_ptr + expert * s_expert + wide[:, None] * s_row + block[None, :]
    byte = tl.load(s_ptrs, mask=inside, other=0).to(tl.int32)
    largest = tl.load(largest_ptr + expert * n_blocks + block, mask=block < n_blocks, other=127)
    spread = largest[None, :] - byte
    extreme = (largest < MIN_BYTE) | (largest > MAX_BYTE)
    doubtful = inside & ((spread > MAX_SPREAD) | extreme[None, :])
    if tl.max(tl.max(doubtful.to(tl.int32), axis=1), axis=0) > 0:
        index = block[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        q_ptrs = q_ptr + expert * q_expert + wide[:, None, None] * q_row + index[None, :, :]
        word = tl.load(q_ptrs, mask=doubtful[:, :, None], other=0)
        lost = (tl.max(word & 0x77777777, axis=2) != 0) | (inside & (byte == 255))
        lost = tl.max(lost.to(tl.int32), axis=0)
        tl.atomic_max(
            flag_ptr + expert * n_blocks + block, lost, mask=(lost > 0) & (block < n_blocks)
        )
    lowered = tl.where(inside, tl.minimum(spread, MAX_SPREAD) * 8, 0)
    # n = 32 step + 16 half + 8 j + 2 t + b becomes 32 t + 8 step + 4 half + 2 j + b
    lowered = lowered.reshape(4, 2, 2, 4, 2, BLOCKS).permute(5, 3, 0, 1, 2, 4).reshape(BLOCKS, 128)
    place = (expert * n_blocks + block)[:, None] * (tl.cdiv(N, 128) * 128) + chunk * 128
    lowered_ptrs = lowered_ptr + place + tl.arange(0, 128)[None, :]
    tl.store(
        lowered_ptrs, lowered.to(lowered_ptr.dtype.element_ty), mask=(block < n_blocks)[:, None]
    )


def lowered_rows(
    qdata: torch.Tensor, scale: torch.Tensor, offs: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what a kernel needs besides a block to decode MXFP4 ``[..., N, K / 2]`` to e4m3 as it multiplies.

    Returns:
        ``(lowered [..., N, C], row_scale [..., N], flag [..., N])``. ``lowered``: uint8, 8 x the powers of two
        by which a block's scale is below the row's largest; C is the blocks of a row, padded with zeros to a
        multiple of four. The rest: fp32 and int8 as in ``weight.fp8_rows``, but spreads above 11 are flagged.
    """
    words, scale = words_of(qdata, scale)
    experts, rows, blocks = scale.shape
    pitch = cdiv(blocks, 4) * 4
    lowered = words.new_empty((experts, rows, pitch), dtype=torch.uint8)
    row_scale = words.new_empty((experts, rows), dtype=torch.float32)
    flag = words.new_empty((experts, rows), dtype=torch.int8)
    span = next_power_of_2(pitch)
    tile_rows = max(1, FP8_LOWERED_BLOCKS // span)
    with on_device_of(words):
        _lowered_kernel[(cdiv(experts * rows, tile_rows),)](
            words,
            scale,
            lowered,
            row_scale,
            flag,
            offs,
            experts * rows,
            rows,
            blocks,
            pitch,
            words.stride()[:2],
            scale.stride()[:2],
            SELECTIVE=offs is not None,
            ROWS=tile_rows,
            BLOCKS=span,
            WORDS=WORDS,
            num_warps=4,
        )
    return tuple(t[0] if qdata.dim() == 2 else t for t in (lowered, row_scale, flag))


def lowered_columns(
    qdata: torch.Tensor, scale: torch.Tensor, offs: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`lowered_rows` of ``W^T``, for products reduced over N.

    Returns:
        ``(lowered [..., K / 32, C, 128], column_scale [..., K], flag [..., K / 32])``: per column block, the
        rows n in chunks of 128, in the order of ``hopper/fp8_backward.py``; fp32 and int32 as in
        ``weight.fp8_columns``, but spreads above 11 are flagged.
    """
    words, scale = words_of(qdata, scale)
    experts, rows, blocks = scale.shape
    chunks = cdiv(rows, 128)
    lowered = words.new_empty((experts, blocks, chunks, 128), dtype=torch.uint8)
    column_scale = words.new_empty((experts, blocks * BLOCK), dtype=torch.float32)
    flag = words.new_empty((experts, blocks))
    largest = column_scales(scale, column_scale, flag, offs)
    tile_blocks = min(FP8_LOWERED_COLUMNS_BLOCKS, next_power_of_2(blocks))
    with on_device_of(words):
        _lowered_columns_kernel[(experts * chunks * cdiv(blocks, tile_blocks),)](
            words,
            scale,
            lowered,
            largest,
            flag,
            offs,
            rows,
            blocks,
            words.stride()[:2],
            scale.stride()[:2],
            SELECTIVE=offs is not None,
            BLOCKS=tile_blocks,
            WORDS=WORDS,
            num_warps=4,
        )
    return tuple(t[0] if qdata.dim() == 2 else t for t in (lowered, column_scale, flag))
