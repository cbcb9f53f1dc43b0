"""quantize: turn high precision into packed elements and block scales, in one pass.

Two kernels. *Rows*: the blocks lie along the contiguous axis, so a tile is ``[blocks, block_size]`` of
a flat array and every load and store is a full line. *Columns*: the blocks run across rows (the operand
of a backward GEMM, or a transposed view), so a tile is ``[TILE_M, TILE_K]``, reduced along M and transposed
on the way out. In both cases the quantized axis is the contiguous axis of the results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from torchao_mx import reference
from torchao_mx.errors import (
    check_format,
    check_high_precision,
    check_offs,
    check_tensors,
)
from torchao_mx.formats import (
    BlockFormat,
    ScaleCalculationMode,
    format_by_name,
)
from torchao_mx.ops.core.arguments import check_operand
from torchao_mx.ops.core.launch import (
    batched_rows,
    bytes_of,
    cdiv,
    format_on,
    holds_bf16_pairs,
    launched,
    on_device_of,
    per_tensor_kind,
    quantized_axis_is_contiguous,
    rounds_products,
    row_layout,
)
from torchao_mx.ops.core.register import define_op
from torchao_mx.ops.core.replay import replayed
from torchao_mx.ops.core.tiles import QUANTIZE_COLUMNS, QUANTIZE_ROWS
from torchao_mx.ops.quantization import bf16x2
from torchao_mx.ops.quantization import tile as _tile
from torchao_mx.ops.quantization.amax import amax_scale


@launched
@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    q_ptr,
    s_ptr,
    values_ptr,
    pts_ptr,
    n_blocks,
    blocks_per_row,
    row_stride,
    blocks_per_expert,
    CONTIGUOUS: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    VALUES: tl.constexpr,
    TILE: tl.constexpr,
    MODE: tl.constexpr,
    SHORT_MANTISSA: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """``q_ptr`` takes int32 words of e2m1 codes, or fp8 bytes. VALUES: also write the dequantized x."""
    BITS: tl.constexpr = FORMAT.elem_bits
    BLOCK: tl.constexpr = FORMAT.block_size
    first = tl.program_id(0).to(tl.int64) * TILE
    block = tl.arange(0, TILE)
    inside = block < n_blocks - first
    if CONTIGUOUS:
        start = first * BLOCK + block * BLOCK
    else:
        row = (first + block) // blocks_per_row
        start = row * row_stride + (first + block - row * blocks_per_row) * BLOCK
    expert = (first + tl.minimum(block, n_blocks - first - 1)) // blocks_per_expert
    pts = _tile.load_per_tensor_scale(pts_ptr, expert, PER_TENSOR)
    if BITS == 4 and not VALUES:  # a thread takes whole blocks and computes each scale once
        WORDS: tl.constexpr = BLOCK // 8
        word = tl.arange(0, WORDS)
        elem = (word * 8)[None, :, None] + tl.arange(0, 8)[None, None, :]
        x = tl.load(x_ptr + start[:, None, None] + elem, mask=inside[:, None, None], other=0.0)
        x = x.to(tl.float32)
        amax = _tile.max_magnitude(x, 2, FORMAT.has_fp8_instructions)
        amax = _tile.max_magnitude(amax, 1, FORMAT.has_fp8_instructions)
        byte, multiplier = _tile.block_scale(amax, pts, MODE, SHORT_MANTISSA, FORMAT)
        words = _tile.encode_words(x * multiplier[:, None, None])
        is_nan = (byte == FORMAT.nan_scale)[:, None]
        words = tl.where(is_nan, _tile.E2M1_NAN_WORD, words)
        q_ptrs = q_ptr + first * WORDS + (block * WORDS)[:, None] + word[None, :]
        tl.store(q_ptrs, words, mask=inside[:, None])
    else:
        elem = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + start[:, None] + elem[None, :], mask=inside[:, None], other=0.0)
        x = x.to(tl.float32)
        amax = _tile.max_magnitude(x, 1)
        byte, multiplier = _tile.block_scale(amax, pts, MODE, SHORT_MANTISSA, FORMAT)
        code = _tile.encode(x * multiplier[:, None], FORMAT)
        if BITS == 4:
            PER_BLOCK: tl.constexpr = BLOCK // 8
            is_nan = (byte == FORMAT.nan_scale)[:, None]
            packed = tl.where(is_nan, _tile.E2M1_NAN_WORD, _tile.pack_words(code))
        else:
            PER_BLOCK: tl.constexpr = BLOCK
            packed = code.to(tl.uint8)
        q_ptrs = q_ptr + first * PER_BLOCK
        q_ptrs += (block * PER_BLOCK)[:, None] + tl.arange(0, PER_BLOCK)[None, :]
        tl.store(q_ptrs, packed, mask=inside[:, None])
        if VALUES:
            scale = _tile.scale_value(byte, pts, FORMAT)[:, None]
            value = _tile.decode(code, FORMAT) * scale
            v_ptrs = values_ptr + first * BLOCK + (block * BLOCK)[:, None] + elem[None, :]
            tl.store(v_ptrs, value.to(values_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(s_ptr + first + block, byte.to(tl.uint8), mask=inside)


@launched
@triton.jit
def _quantize_columns_kernel(
    x_ptr,
    q_ptr,
    s_ptr,
    pts_ptr,
    M,
    K,
    x_strides,
    PER_TENSOR: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE_K: tl.constexpr,
    MODE: tl.constexpr,
    SHORT_MANTISSA: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Quantize ``x [B, M, K]`` to ``q [B, K, M]`` in int32 words.

    Each thread packs its rows into words before the transposition, so little data moves between threads.
    """
    BITS: tl.constexpr = FORMAT.elem_bits
    BLOCK: tl.constexpr = FORMAT.block_size
    batch_stride, row_stride = x_strides
    blocks_m = M // BLOCK
    batch, tile_m, tile_k = _tile.tile_of_program(blocks_m, BLOCKS, K, TILE_K)
    block0 = tile_m * BLOCKS
    k = tile_k * TILE_K + tl.arange(0, TILE_K)
    block = block0 + tl.arange(0, BLOCKS)
    m = (block * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    x_ptrs = x_ptr + batch * batch_stride + (m.to(tl.int64) * row_stride)[:, :, None]
    inside = (block < blocks_m)[:, None, None] & (k < K)[None, None, :]
    x = tl.load(x_ptrs + k[None, None, :], mask=inside, other=0.0).to(tl.float32)
    pts = _tile.load_per_tensor_scale(pts_ptr, batch, PER_TENSOR)
    amax = _tile.max_magnitude(x, 1)
    byte, multiplier = _tile.block_scale(amax, pts, MODE, SHORT_MANTISSA, FORMAT)
    y = x * multiplier[:, None, :]
    code = _tile.encode(y, FORMAT)
    PER_BLOCK: tl.constexpr = BLOCK * BITS // 32
    WORDS: tl.constexpr = BLOCKS * PER_BLOCK
    word = _tile.pack_columns(code.reshape(WORDS, 32 // BITS, TILE_K), BITS)
    if BITS == 4:
        is_nan = (byte == FORMAT.nan_scale)[:, None, :]
        word = word.reshape(BLOCKS, PER_BLOCK, TILE_K)
        word = tl.where(is_nan, _tile.E2M1_NAN_WORD, word).reshape(WORDS, TILE_K)
    s_ptrs = s_ptr + batch * K * blocks_m + k[None, :].to(tl.int64) * blocks_m + block[:, None]
    tl.store(s_ptrs, byte.to(tl.uint8), mask=(block < blocks_m)[:, None] & (k < K)[None, :])
    index = block0 * PER_BLOCK + tl.arange(0, WORDS)
    row_words = blocks_m * PER_BLOCK
    q_ptrs = q_ptr + batch * K * row_words + k[:, None].to(tl.int64) * row_words + index[None, :]
    tl.store(q_ptrs, tl.trans(word), mask=(k < K)[:, None] & (index < row_words)[None, :])


def _results(x: torch.Tensor, fmt: BlockFormat, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate qdata and scale for ``x``."""
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
    if quantized_axis_is_contiguous(x_BMK):
        _launch_rows(x_BMK, f, scaling_mode, per_tensor_scale, qdata, scale, None)
    else:
        _launch_columns(x_BMK.mT, f, scaling_mode, per_tensor_scale, qdata, scale)
    return qdata, scale


def _launch_rows(
    x_BMK: torch.Tensor,
    fmt: BlockFormat,
    scaling_mode: str,
    per_tensor_scale: torch.Tensor | None,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    values: torch.Tensor | None,
) -> None:
    layout = row_layout(x_BMK, fmt.block_size)
    x = layout.x
    kernel_format = format_on(x.device, fmt)
    tile = QUANTIZE_ROWS.size // fmt.block_size
    grid = (cdiv(layout.n_blocks, tile),)
    scale_bytes = bytes_of(scale)
    common = dict(
        CONTIGUOUS=layout.contiguous,
        VALUES=values is not None,
        TILE=tile,
        MODE=scaling_mode,
        FORMAT=kernel_format,
        num_warps=QUANTIZE_ROWS.warps,
    )
    with on_device_of(x):
        if (
            kernel_format.scale is None
            and holds_bf16_pairs(x)
            and (values is None or values.dtype == torch.bfloat16)
            and (fmt.elem_bits == 4 or kernel_format.has_fp8_instructions)
        ):
            source = x.view(torch.int32)
            target = source if values is None else values.view(torch.int32)
            packed = qdata.view(torch.int32 if fmt.elem_bits == 4 else torch.int16)
            bf16x2.quantize_rows_kernel[grid](
                source,
                packed,
                scale_bytes,
                target,
                layout.n_blocks,
                layout.blocks_per_row,
                source.stride(1),
                **common,
            )
        else:
            pts = scale_bytes if per_tensor_scale is None else per_tensor_scale
            packed = qdata.view(torch.int32) if fmt.elem_bits == 4 else bytes_of(qdata)
            _quantize_rows_kernel[grid](
                x,
                packed,
                scale_bytes,
                x if values is None else values,
                pts,
                layout.n_blocks,
                layout.blocks_per_row,
                x.stride(1),
                layout.blocks_per_batch,
                PER_TENSOR=per_tensor_kind(per_tensor_scale),
                SHORT_MANTISSA=x.dtype != torch.float32,
                enable_fp_fusion=not rounds_products(fmt),
                **common,
            )


def _launch_columns(
    x_BMK: torch.Tensor,
    fmt: BlockFormat,
    scaling_mode: str,
    per_tensor_scale: torch.Tensor | None,
    qdata: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    """Quantize blocks along M; K is contiguous."""
    batch, m, k = x_BMK.shape
    tiles_m = cdiv(m, QUANTIZE_COLUMNS.m * fmt.block_size)
    scale_bytes = bytes_of(scale)
    kernel_format = format_on(x_BMK.device, fmt)
    common = dict(
        BLOCKS=QUANTIZE_COLUMNS.m,
        MODE=scaling_mode,
        FORMAT=kernel_format,
        num_warps=QUANTIZE_COLUMNS.warps,
    )
    with on_device_of(x_BMK):
        if (
            kernel_format.scale is None
            and fmt.elem_bits == 4
            and k % 2 == 0
            and holds_bf16_pairs(x_BMK)
        ):
            source = x_BMK.view(torch.int32)
            grid = (batch * tiles_m * cdiv(k // 2, QUANTIZE_COLUMNS.k),)
            bf16x2.quantize_columns_kernel[grid](
                source,
                qdata.view(torch.int16),
                scale_bytes,
                m,
                k,
                source.stride()[:2],
                TILE_K=QUANTIZE_COLUMNS.k,
                **common,
            )
        else:
            pts = scale_bytes if per_tensor_scale is None else per_tensor_scale
            grid = (batch * tiles_m * cdiv(k, QUANTIZE_COLUMNS.k),)
            _quantize_columns_kernel[grid](
                x_BMK,
                qdata.view(torch.int32),
                scale_bytes,
                pts,
                m,
                k,
                x_BMK.stride()[:2],
                PER_TENSOR=per_tensor_kind(per_tensor_scale),
                TILE_K=QUANTIZE_COLUMNS.k,
                SHORT_MANTISSA=x_BMK.dtype != torch.float32,
                enable_fp_fusion=not rounds_products(fmt),
                **common,
            )


def _quantize_fake(
    x: torch.Tensor, fmt: str, scaling_mode: str, axis: int, per_tensor_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return _results(x, format_by_name(fmt), axis)


quantize_op = define_op(
    "quantize",
    "(Tensor x, str fmt, str scaling_mode, int axis, Tensor? per_tensor_scale) -> (Tensor, Tensor)",
    cpu=_quantize_cpu,
    cuda=replayed(_quantize_triton),
    fake=_quantize_fake,
    strided=("x",),
)


def _with_values_cpu(
    x: torch.Tensor,
    fmt: str,
    scaling_mode: str,
    dtype: torch.dtype,
    per_tensor_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    f = format_by_name(fmt)
    qdata, scale = _quantize_cpu(x, fmt, scaling_mode, -1, per_tensor_scale)
    return qdata, scale, reference.dequantize(qdata, scale, f, dtype, -1, per_tensor_scale)


def _with_values_triton(
    x: torch.Tensor,
    fmt: str,
    scaling_mode: str,
    dtype: torch.dtype,
    per_tensor_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    f = format_by_name(fmt)
    qdata, scale, values = _with_values_fake(x, fmt, scaling_mode, dtype, per_tensor_scale)
    if x.numel():
        _launch_rows(batched_rows(x), f, scaling_mode, per_tensor_scale, qdata, scale, values)
    return qdata, scale, values


def _with_values_fake(
    x: torch.Tensor,
    fmt: str,
    scaling_mode: str,
    dtype: torch.dtype,
    per_tensor_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_results(x, format_by_name(fmt), -1), x.new_empty(x.shape, dtype=dtype)


quantize_with_values_op = define_op(
    "quantize_with_values",
    "(Tensor x, str fmt, str scaling_mode, ScalarType dtype, Tensor? per_tensor_scale)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=_with_values_cpu,
    cuda=replayed(_with_values_triton),
    fake=_with_values_fake,
    strided=("x",),
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

    The bytes equal those of torchao's ``to_mx`` and ``nvfp4_quantize`` (0.18) for every input, Inf included.
    A block that holds a NaN gets the NaN scale (and ``fmt.nan_code`` throughout).

    Args:
        x: ``[..., M, K]`` (or ``[K]``), bfloat16, float16 or float32, any strides.
        fmt: the block format.
        scaling_mode: the rule that derives a block's E8M0 scale from its largest magnitude.
        axis: -1, blocks along K; -2, blocks along M (32 x 1).
        per_tensor_scale: for NVFP4, fp32, 0-d or ``[E, 1, 1]`` for ``x [E, M, K]``; see
            :func:`per_tensor_scale`. None uses the block scales alone.

    Returns:
        ``(qdata, scale)`` with the quantized axis last: for ``axis=-1`` ``[..., M, K / elems_per_byte]`` and
        ``[..., M, K / block_size]``; for ``axis=-2`` ``[..., K, M / elems_per_byte]`` and
        ``[..., K, M / block_size]``.

    Raises:
        TypeError: a wrong dtype, format or scaling mode.
        ValueError: a wrong axis; a size that is zero or not a multiple of the block size.

    Example:
        >>> import torch
        >>> from torchao_mx import MXFP4, ops
        >>> qdata, scale = ops.quantize(torch.linspace(-6, 6, 32), MXFP4)
        >>> qdata.shape, scale.item()
        (torch.Size([16]), 1.0)
    """
    check_operand(x, fmt, scaling_mode, axis, per_tensor_scale)
    return quantize_op(x.detach(), fmt.name, scaling_mode.value, axis, per_tensor_scale)


def quantize_with_values(
    x: torch.Tensor,
    fmt: BlockFormat,
    scaling_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL,
    *,
    dtype: torch.dtype | None = None,
    per_tensor_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize along the last axis like :func:`quantize`, and also return the values; not differentiable.

    A training step needs both: the dequantized values for this product, the packed form for backward.

    Returns:
        ``(qdata, scale, values)``, ``values`` in x's shape and in ``dtype`` (x's by default). Arguments and
        errors as ``quantize``.

    Example:
        >>> import torch
        >>> from torchao_mx import MXFP4, ops
        >>> x = torch.randn(4, 64)
        >>> torch.equal(ops.quantize_with_values(x, MXFP4)[2], ops.fake_quantize(x, MXFP4))
        True
    """
    check_operand(x, fmt, scaling_mode, -1, per_tensor_scale)
    dtype = x.dtype if dtype is None else dtype
    check_high_precision(dtype, "the output")
    return quantize_with_values_op(
        x.detach(), fmt.name, scaling_mode.value, dtype, per_tensor_scale
    )


def _per_tensor_scale_cpu(
    x: torch.Tensor, fmt: str, per_expert: bool, offs: torch.Tensor | None
) -> torch.Tensor:
    return reference.per_tensor_scale(x, format_by_name(fmt), per_expert, offs)


def _per_tensor_scale_triton(
    x: torch.Tensor, fmt: str, per_expert: bool, offs: torch.Tensor | None
) -> torch.Tensor:
    return amax_scale(x, format_by_name(fmt), per_expert, offs)


def _per_tensor_scale_fake(
    x: torch.Tensor, fmt: str, per_expert: bool, offs: torch.Tensor | None
) -> torch.Tensor:
    shape = (x.shape[0], 1, 1) if per_expert else ()
    return x.new_empty(shape, dtype=torch.float32)


per_tensor_scale_op = define_op(
    "per_tensor_scale",
    "(Tensor x, str fmt, bool per_expert, Tensor? offs) -> Tensor",
    cpu=_per_tensor_scale_cpu,
    cuda=replayed(_per_tensor_scale_triton),
    fake=_per_tensor_scale_fake,
    strided=("x",),
)


def per_tensor_scale(
    x: torch.Tensor,
    fmt: BlockFormat,
    per_expert: bool = False,
    *,
    offs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return NVFP4's fp32 scale of ``x``, ``amax / (448 * 6)``: 0-d, or ``[E, 1, 1]`` with ``per_expert``.

    See :func:`torchao_mx.reference.per_tensor_scale`. The result stays on the device. A GPU multiplies by the
    fp32 reciprocal of 2688, as torchao's quantizer does there.

    Args:
        x: bfloat16, float16 or float32; with ``per_expert`` ``[E, N, K]``.
        fmt: a format with a per-tensor scale, :data:`torchao_mx.NVFP4`.
        per_expert: one scale per leading index.
        offs: int32 end offsets of groups of rows of ``x [R, K]``: only rows that belong to a group count.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a format without a per-tensor scale; a wrong shape.

    Example:
        >>> import torch
        >>> from torchao_mx import NVFP4, ops
        >>> x = torch.tensor([[2688.0], [5376.0]])
        >>> ops.per_tensor_scale(x, NVFP4), ops.per_tensor_scale(x, NVFP4, offs=torch.tensor([1]).int())
        (tensor(2.), tensor(1.))
    """
    check_tensors(x=x, optional={"offs": offs})
    check_format(fmt)
    check_high_precision(x.dtype, "x")
    if not fmt.has_per_tensor_scale:
        raise ValueError(f"{fmt.name} has no per-tensor scale; leave per_tensor_scale out")
    if per_expert and x.dim() != 3:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; with per_expert it must be [E, N, K]: leave per_expert out"
        )
    if offs is not None:
        check_offs(offs, x)
        if per_expert or x.dim() != 2:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, per_expert={per_expert}; offs takes rows of x [R, K] and one "
                f"scale for all of them: leave offs out"
            )
    if x.numel() == 0:  # torch refuses to reduce an empty tensor
        return reference.per_tensor_scale(x.detach(), fmt, per_expert, offs)
    return per_tensor_scale_op(x.detach(), fmt.name, per_expert, offs)
