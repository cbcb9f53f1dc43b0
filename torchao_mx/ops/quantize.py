"""quantize: high precision to packed elements and block scales, in one pass.

Two kernels. *Rows*: the blocks lie along the contiguous axis, so a tile is ``[blocks, block_size]`` of
a flat array and every load and store is a full line. *Columns*: the blocks run across rows (the operand
of a backward GEMM, or a transposed view), so a tile is ``[TILE_M, TILE_K]``, reduced along M, and is
transposed on the way out: the quantized axis is the contiguous one of the results in both cases.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from torchao_mx import reference
from torchao_mx.checks import check_axis, check_blocks, check_high_precision
from torchao_mx.formats import (
    MXFP4,
    BlockFormat,
    ScaleCalculationMode,
    check_scaling_mode,
    format_by_name,
)
from torchao_mx.ops import _tile
from torchao_mx.ops._launch import (
    batched_rows,
    bytes_of,
    column_layout,
    format_constants,
    holds_bf16_pairs,
    on_device_of,
    quantized_axis_is_contiguous,
    row_layout,
)
from torchao_mx.ops._library import define_op

ROW_TILE, ROW_WARPS = 128, 4
COLUMN_BLOCKS, COLUMN_TILE_K, COLUMN_WARPS = 2, 128, 4


@triton.jit
def _quantize_rows_kernel(x_ptr, q_ptr, s_ptr, pts_ptr, n_blocks, blocks_per_row, row_stride,
                          blocks_per_expert, CONTIGUOUS: tl.constexpr, PER_TENSOR: tl.constexpr,
                          PAIRS: tl.constexpr, TILE: tl.constexpr, MODE: tl.constexpr,
                          EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr,
                          MAX_EXPONENT: tl.constexpr, ELEM_MAX: tl.constexpr, BLOCK: tl.constexpr,
                          E8M0: tl.constexpr, FP8_INSTRUCTIONS: tl.constexpr):  # fmt: skip
    """``q_ptr`` takes int32 words; with PAIRS, ``x_ptr`` holds int32 words of two bf16 values."""
    BITS: tl.constexpr = 1 + EXPONENT_BITS + MANTISSA_BITS
    WORDS: tl.constexpr = BLOCK * BITS // 32
    LOADS: tl.constexpr = BLOCK // 2 if PAIRS else BLOCK  # of a block
    first = tl.program_id(0).to(tl.int64) * TILE
    block = tl.arange(0, TILE)
    inside = block < n_blocks - first
    if CONTIGUOUS:
        x_ptrs = x_ptr + first * LOADS + (block * LOADS)[:, None] + tl.arange(0, LOADS)[None, :]
    else:
        row = (first + block) // blocks_per_row
        start = row * row_stride + (first + block - row * blocks_per_row) * LOADS
        x_ptrs = x_ptr + start[:, None] + tl.arange(0, LOADS)[None, :]
    x = tl.load(x_ptrs, mask=inside[:, None], other=0)
    if PAIRS:
        amax = _tile.float_of(tl.max(tl.maximum((x << 16) & 0x7FFFFFFF, x & 0x7FFF0000), axis=1))
    else:
        x = x.to(tl.float32)
        amax = _tile.max_magnitude(x, 1)
    if PER_TENSOR == "expert":
        pts = tl.load(pts_ptr + (first + block) // blocks_per_expert, mask=inside, other=1.0)
    elif PER_TENSOR == "tensor":
        pts = tl.load(pts_ptr)
    else:
        pts = 1.0
    byte, multiplier = _tile.block_scale(
        amax, pts, MODE, EXPONENT_BITS, MANTISSA_BITS, MAX_EXPONENT, ELEM_MAX, E8M0,
        FP8_INSTRUCTIONS,
    )  # fmt: skip
    tl.store(s_ptr + first + block, byte.to(tl.uint8), mask=inside)
    if PAIRS:
        multiplier = tl.broadcast_to(multiplier[:, None], (TILE, LOADS))
        code = _tile.encode_e2m1_bf16_pairs(x, multiplier, multiplier)
        code = (code | (code >> 12)) & 0xFF
        word = _tile.pack(code.reshape(TILE, WORDS, LOADS // WORDS), 2, 8)
        word = tl.where((byte == 255)[:, None], 0x77777777, word)
    else:
        y = x * multiplier[:, None]
        code = _tile.encode(y, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX, FP8_INSTRUCTIONS)
        word = _tile.pack(code.reshape(TILE, WORDS, BLOCK // WORDS), 2, BITS)
    q_ptrs = q_ptr + first * WORDS + (block * WORDS)[:, None] + tl.arange(0, WORDS)[None, :]
    tl.store(q_ptrs, word, mask=inside[:, None])


@triton.jit
def _quantize_columns_kernel(x_ptr, q_ptr, s_ptr, pts_ptr, M, K, batch_stride, row_stride,
                             PER_TENSOR: tl.constexpr, PAIRS: tl.constexpr, BLOCKS: tl.constexpr,
                             TILE_K: tl.constexpr, MODE: tl.constexpr,
                             EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr,
                             MAX_EXPONENT: tl.constexpr, ELEM_MAX: tl.constexpr,
                             BLOCK: tl.constexpr, E8M0: tl.constexpr,
                             FP8_INSTRUCTIONS: tl.constexpr):  # fmt: skip
    """``x [B, M, K]`` to ``q [B, K, M]`` packed. With PAIRS, a load is two neighbouring columns.

    A thread's rows are packed into words before the transposition, so little data crosses threads.
    """
    BITS: tl.constexpr = 1 + EXPONENT_BITS + MANTISSA_BITS
    LOADS: tl.constexpr = TILE_K // 2 if PAIRS else TILE_K
    tiles_k = tl.cdiv(K, TILE_K)
    block0 = (tl.program_id(0) // tiles_k) * BLOCKS
    k0 = (tl.program_id(0) % tiles_k) * TILE_K
    batch = tl.program_id(1).to(tl.int64)
    blocks_m = M // BLOCK
    block = block0 + tl.arange(0, BLOCKS)
    m = (block * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    k = k0 + tl.arange(0, TILE_K)
    load_k = k0 // (TILE_K // LOADS) + tl.arange(0, LOADS)
    x_ptrs = x_ptr + batch * batch_stride + (m.to(tl.int64) * row_stride)[:, :, None]
    x_ptrs += load_k[None, None, :]
    inside = (block < blocks_m)[:, None, None] & (load_k < K // (TILE_K // LOADS))[None, None, :]
    x = tl.load(x_ptrs, mask=inside, other=0)
    if PER_TENSOR == "expert":
        pts = tl.load(pts_ptr + batch)
    elif PER_TENSOR == "tensor":
        pts = tl.load(pts_ptr)
    else:
        pts = 1.0
    if PAIRS:
        low = _tile.float_of(tl.max((x << 16) & 0x7FFFFFFF, axis=1))
        high = _tile.float_of(tl.max(x & 0x7FFF0000, axis=1))
        low_byte, low_multiplier = _tile.e8m0_scale(low, MODE, MANTISSA_BITS, MAX_EXPONENT, ELEM_MAX)
        high_byte, high_multiplier = _tile.e8m0_scale(
            high, MODE, MANTISSA_BITS, MAX_EXPONENT, ELEM_MAX
        )
        byte = tl.join(low_byte, high_byte).reshape(BLOCKS, TILE_K)
        shape: tl.constexpr = (BLOCKS, BLOCK, LOADS)
        code = _tile.encode_e2m1_bf16_pairs(
            x, tl.broadcast_to(low_multiplier[:, None, :], shape),
            tl.broadcast_to(high_multiplier[:, None, :], shape),
        )  # fmt: skip
        # Four rows fill each half of a word: 16 bits of the one column, 16 of the other.
        WORDS: tl.constexpr = BLOCKS * BLOCK // 4
        word = _tile.pack(code.reshape(WORDS, 4, LOADS), 1, 4)
        low_nan = tl.broadcast_to((low_byte == 255)[:, None, :], (BLOCKS, BLOCK // 4, LOADS))
        high_nan = tl.broadcast_to((high_byte == 255)[:, None, :], (BLOCKS, BLOCK // 4, LOADS))
        low_word = tl.where(low_nan.reshape(WORDS, LOADS), 0x7777, word & 0xFFFF)
        high_word = tl.where(high_nan.reshape(WORDS, LOADS), 0x7777, (word >> 16) & 0xFFFF)
        word = tl.join(low_word, high_word).reshape(WORDS, TILE_K).to(tl.int16)
    else:
        x = x.to(tl.float32)
        byte, multiplier = _tile.block_scale(
            _tile.max_magnitude(x, 1), pts, MODE, EXPONENT_BITS, MANTISSA_BITS, MAX_EXPONENT,
            ELEM_MAX, E8M0, FP8_INSTRUCTIONS,
        )  # fmt: skip
        y = x * multiplier[:, None, :]
        code = _tile.encode(y, EXPONENT_BITS, MANTISSA_BITS, ELEM_MAX, FP8_INSTRUCTIONS)
        WORDS: tl.constexpr = BLOCKS * BLOCK * BITS // 32
        word = _tile.pack(code.reshape(WORDS, 32 // BITS, TILE_K), 1, BITS)
    in_k = (k < K)[None, :]
    s_ptrs = s_ptr + batch * K * blocks_m + k[None, :].to(tl.int64) * blocks_m + block[:, None]
    tl.store(s_ptrs, byte.to(tl.uint8), mask=(block < blocks_m)[:, None] & in_k)
    PER_BLOCK: tl.constexpr = WORDS // BLOCKS
    index = block0 * PER_BLOCK + tl.arange(0, WORDS)
    row_words = blocks_m * PER_BLOCK
    q_ptrs = q_ptr + batch * K * row_words + k[:, None].to(tl.int64) * row_words + index[None, :]
    tl.store(q_ptrs, tl.trans(word), mask=(k < K)[:, None] & (index < row_words)[None, :])


def _results(x: torch.Tensor, fmt: BlockFormat, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty qdata and scale for ``x``."""
    *lead, m, k = x.shape if x.dim() > 1 else (1, *x.shape)
    rows, reduced = (m, k) if axis == -1 else (k, m)
    lead = [] if x.dim() == 1 else [*lead, rows]
    qdata = x.new_empty((*lead, reduced // fmt.elems_per_byte), dtype=fmt.qdata_dtype)
    return qdata, x.new_empty((*lead, reduced // fmt.block_size), dtype=fmt.scale_dtype)


def _quantize_cpu(
    x: torch.Tensor, fmt: str, scaling_mode: str, axis: int, per_tensor_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.quantize(
        x, format_by_name(fmt), ScaleCalculationMode(scaling_mode), axis, per_tensor_scale
    )


def _quantize_triton(
    x: torch.Tensor, fmt: str, scaling_mode: str, axis: int, per_tensor_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    f = format_by_name(fmt)
    qdata, scale = _results(x, f, axis)
    if x.numel() == 0:
        return qdata, scale
    x_BMK = batched_rows(x if axis == -1 else x.mT)
    along_rows = quantized_axis_is_contiguous(x_BMK)
    layout = row_layout(x_BMK, f.block_size) if along_rows else column_layout(x_BMK)
    pairs = f is MXFP4 and holds_bf16_pairs(layout.x)
    source = layout.x.view(torch.int32) if pairs else layout.x
    common = dict(
        PER_TENSOR=per_tensor_kind(per_tensor_scale),
        PAIRS=pairs,
        MODE=scaling_mode,
        # A product fused with the addition that rounds it would round once where torchao rounds twice.
        enable_fp_fusion=f.scale_dtype == torch.float8_e8m0fnu,
        **format_constants(f, x.device),
    )
    scale_bytes = bytes_of(scale)
    pts = per_tensor_scale if per_tensor_scale is not None else scale_bytes
    with on_device_of(x):
        if along_rows:
            _quantize_rows_kernel[(triton.cdiv(layout.n_blocks, ROW_TILE),)](
                source, qdata.view(torch.int32), scale_bytes, pts, layout.n_blocks,
                layout.blocks_per_row, source.stride(1), layout.blocks_per_batch,
                CONTIGUOUS=layout.contiguous, TILE=ROW_TILE, num_warps=ROW_WARPS, **common,
            )  # fmt: skip
        else:
            batch, m, k = layout.x.shape
            tiles = triton.cdiv(m, COLUMN_BLOCKS * f.block_size) * triton.cdiv(k, COLUMN_TILE_K)
            _quantize_columns_kernel[(tiles, batch)](
                source, qdata.view(torch.int16 if pairs else torch.int32), scale_bytes, pts, m, k,
                source.stride(0), source.stride(1), BLOCKS=COLUMN_BLOCKS, TILE_K=COLUMN_TILE_K,
                num_warps=COLUMN_WARPS, **common,
            )  # fmt: skip
    return qdata, scale


def per_tensor_kind(per_tensor_scale: torch.Tensor | None) -> str:
    """How a kernel finds the per-tensor scale: ``"none"``, one for the ``"tensor"``, or per ``"expert"``."""
    if per_tensor_scale is None:
        return "none"
    return "expert" if per_tensor_scale.dim() else "tensor"


def _quantize_fake(
    x: torch.Tensor, fmt: str, scaling_mode: str, axis: int, per_tensor_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return _results(x, format_by_name(fmt), axis)


quantize_op = define_op(
    "quantize",
    "(Tensor x, str fmt, str scaling_mode, int axis, Tensor? per_tensor_scale) -> (Tensor, Tensor)",
    cpu=_quantize_cpu,
    cuda=_quantize_triton,
    fake=_quantize_fake,
)


def quantize(
    x: torch.Tensor,
    fmt: BlockFormat,
    scaling_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL,
    *,
    axis: int = -1,
    per_tensor_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize ``x`` into packed elements and block scales; not differentiable.

    The bytes are those of torchao's ``to_mx`` and ``nvfp4_quantize`` (0.18) for every input, Inf included;
    a block that holds a NaN gets the NaN scale (and ``fmt.nan_code`` throughout).

    Args:
        x: ``[..., M, K]`` (or ``[K]``), bfloat16, float16 or float32, any strides.
        fmt: the block format.
        scaling_mode: how a block's E8M0 scale follows from its largest magnitude.
        axis: -1, blocks along K; -2, blocks along M (32 x 1).
        per_tensor_scale: for NVFP4, fp32, 0-d or ``[E, 1, 1]`` for ``x [E, M, K]``; see
            :func:`per_tensor_scale`. None uses the block scales alone.

    Returns:
        ``(qdata, scale)`` with the quantized axis last: for ``axis=-1`` ``[..., M, K / elems_per_byte]`` and
        ``[..., M, K / block_size]``; for ``axis=-2`` ``[..., K, M / elems_per_byte]`` and
        ``[..., K, M / block_size]``.

    Raises:
        TypeError: dtype, format or scaling mode.
        ValueError: axis; a size that is zero or not a multiple of the block size.

    Example:
        >>> import torch
        >>> from torchao_mx import MXFP4, ops
        >>> qdata, scale = ops.quantize(torch.linspace(-6, 6, 32), MXFP4)
        >>> qdata.shape, scale.item()
        (torch.Size([16]), 1.0)
    """
    check_operand(x, fmt, scaling_mode, axis, per_tensor_scale)
    return quantize_op(x.detach(), fmt.name, scaling_mode.value, axis, per_tensor_scale)


def per_tensor_scale(x: torch.Tensor, fmt: BlockFormat, per_expert: bool = False) -> torch.Tensor:
    """NVFP4's fp32 scale of ``x``, ``amax / (448 * 6)``: 0-d, or ``[E, 1, 1]`` with ``per_expert``.

    See :func:`torchao_mx.reference.per_tensor_scale`. Stays on the device.
    """
    return reference.per_tensor_scale(x.detach(), fmt, per_expert)


def check_operand(
    x: torch.Tensor,
    fmt: BlockFormat,
    scaling_mode: ScaleCalculationMode,
    axis: int,
    per_tensor_scale: torch.Tensor | None,
) -> None:
    """Refuse what :func:`quantize` and ``fake_quantize`` cannot take, before any kernel runs."""
    if not isinstance(fmt, BlockFormat):
        raise TypeError(f"fmt={fmt!r} is not a BlockFormat; use one from torchao_mx, such as MXFP4")
    check_scaling_mode(scaling_mode)
    check_axis(axis)
    check_high_precision(x.dtype, "x")
    check_blocks(x.shape, fmt, axis, "x")
    if per_tensor_scale is not None:
        check_per_tensor_scale(per_tensor_scale, fmt, x)


def check_per_tensor_scale(per_tensor_scale: torch.Tensor, fmt: BlockFormat, x: torch.Tensor) -> None:
    """Refuse a per-tensor scale that ``fmt`` has not, or of a shape that does not fit ``x``."""
    if not fmt.has_per_tensor_scale:
        raise ValueError(f"{fmt.name} has no per-tensor scale; leave per_tensor_scale out")
    if per_tensor_scale.dtype != torch.float32:
        raise TypeError(f"per_tensor_scale has dtype {per_tensor_scale.dtype}; it must be float32")
    shape = tuple(per_tensor_scale.shape)
    if shape and (x.dim() != 3 or shape != (x.shape[0], 1, 1)):
        raise ValueError(
            f"per_tensor_scale has shape {shape}; it must be 0-d, or [E, 1, 1] for x [E, M, K]: "
            f"x has shape {tuple(x.shape)}"
        )
