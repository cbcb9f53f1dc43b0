"""The product with MXFP4 weights on the 8-bit tensor cores: x rounded to fp8 row by row, weights exact.

``torchao_mx/reference/fp8.py`` defines the algebra. The launches, for as many columns of y at a time as the
scratch buffer holds (step 3 has twice the bf16 rate, at the price of the passes around it)::

    1. x to fp8 rows in the order of the groups, and one scale per row        once
    2. the weight to e4m3, lossless, and flags for parts that do not fit      (reduced over N: two launches)
    3. torch._scaled_grouped_mm, or torch._scaled_mm for a dense weight
    4. + s * h up^T + bias, zeros after the last group: one pass over y, which also moves a part of the columns
       to its place. Neither GEMM can include it: h in fp8 would lose the adapter's accuracy.
    5. the flagged columns again, from x itself in bf16                       once

Step 5 returns at once if nothing is flagged, so the host never waits for the flags. They are computed in each
call: nothing proves that they belong to the present weight (FSDP2 gathers into the same memory and keeps its
version, a CUDA graph is replayed on whatever is there), and flags of another weight are silently wrong.

``fused`` (Hopper) replaces 2, 3 and 4 by one GEMM, which decodes the weight in registers and adds the
low-rank term to the fp32 sums: no scratch buffer, and nothing is gathered.

``kind`` names the dtype of the rows. e5m2 spends bits on range that a scale per row already gives, so e4m3 is
more accurate, for gradients too; ``torch._scaled_grouped_mm`` takes only e4m3.
"""

from __future__ import annotations

import torch
import triton.language as tl

from torchao_mx import torch_internals
from torchao_mx.formats import MXFP4
from torchao_mx.ops.core.launch import capability, cdiv
from torchao_mx.ops.core.operands import Added, Packed, Rows
from torchao_mx.ops.moe.gather import with_unit_rows
from torchao_mx.ops.packed_mm.epilogue import finish
from torchao_mx.ops.packed_mm.fp8.kernels import permuted_rows, quantize_rows, recompute_flagged
from torchao_mx.ops.packed_mm.fp8.lowered import lowered_columns, lowered_rows
from torchao_mx.ops.packed_mm.fp8.weight import column_flags, fp8_columns, fp8_rows, row_flags
from torchao_mx.ops.packed_mm.hopper.product import hopper_fp8_product, takes_hopper_fp8
from torchao_mx.reference import fp8 as definition

MAX_SCRATCH_BYTES = 256 * 2**20
KINDS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_ALIGNMENT = 16  # elements along every axis, in the two GEMMs
_COLUMNS_STEP = MXFP4.block_size  # columns are decoded in multiples of this


def columns_at_a_time(experts: int, columns: int, reduced: int, max_scratch_bytes: int) -> int:
    """Return how many columns of every expert to decode at once: equal parts of at least 32 columns."""
    fit = max(_COLUMNS_STEP, max_scratch_bytes // (experts * reduced))
    width = cdiv(columns, cdiv(columns, fit))
    width = cdiv(width, _COLUMNS_STEP) * _COLUMNS_STEP
    if width > fit:  # rounding up exceeded the bound
        width = fit // _COLUMNS_STEP * _COLUMNS_STEP
    return min(width, columns)


def fp8_product(
    x: torch.Tensor,
    w: Packed,
    rows: Rows,
    transpose_weight: bool,
    added: Added,
    kind: str = "float8_e4m3fn",
    max_scratch_bytes: int = MAX_SCRATCH_BYTES,
    fused: bool = False,
) -> torch.Tensor:
    """Return ``x W^T + s * h up^T + bias`` (``x W`` without ``transpose_weight``), x rounded to ``kind``.

    Rows are rounded to fp8 with one fp32 scale each, weights are exact, sums are in fp32, and the result is
    rounded to bf16 before and after the low-rank term is added. On Gaussian data the product is off by 2.6 %
    with ``"float8_e4m3fn"`` (root mean square, relative to the result's), by 5.3 % with ``"float8_e5m2"``. A
    row of x that holds a NaN or an Inf gives a row of NaN and Inf.

    Args:
        x: ``[T, K]`` (``[T, N]`` without ``transpose_weight``) bfloat16.
        w: ``[E, N, K]`` in MXFP4, or ``[N, K]`` for a dense product. N is a multiple of 16.
        rows: on x's device, ``offs`` and ``order`` int32.
        transpose_weight: reduce over K; otherwise over N.
        added: h ``[n_rows, r]``, up ``[E, C, r]`` (``[C, r]`` dense), bias ``[E, C]`` (``[C]`` dense).
        kind: ``"float8_e4m3fn"``, or for a dense weight ``"float8_e5m2"``.
        max_scratch_bytes: the bound of the decoded weight, unless 32 columns of each expert need more.
        fused: decode in the GEMM's registers; columns whose scales spread over more than 11 powers of two then
            use the unrounded x, as do columns that do not fit.

    Returns:
        ``[n_rows, C]`` in x's dtype; zeros after ``offs[-1]``.

    Raises:
        NotImplementedError: another format; a GPU without the instructions; e5m2 with ``offs``; ``fused`` where it
            does not apply.
        TypeError: a wrong dtype of x.
        ValueError: an unknown kind; an N that is not a multiple of 16.
    """
    _check(x, w, rows.offs is not None)
    dtype = KINDS[kind]
    if not x.is_cuda:
        return definition.fp8_product(
            x, w.qdata, w.scale, w.fmt, rows, transpose_weight, added, dtype
        )
    if fused:
        return _fused_on_gpu(x, w.qdata, w.scale, rows, transpose_weight, added, dtype)
    return _product_on_gpu(
        x, w.qdata, w.scale, rows, transpose_weight, added, dtype, max_scratch_bytes
    )


def _product_on_gpu(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    rows: Rows,
    transpose_weight: bool,
    added: Added,
    dtype: torch.dtype,
    max_scratch_bytes: int,
    dot_dtype: tl.dtype = tl.bfloat16,
) -> torch.Tensor:
    """Run the launches listed in the file's head."""
    columns = qdata.shape[-2] if transpose_weight else qdata.shape[-1] * MXFP4.elems_per_byte
    if rows.n_rows == 0:
        return x.new_empty((0, columns))
    x = with_unit_rows(x)
    if rows.offs is None:
        qdata, scale, added = qdata[None], scale[None], added.at(None)
    x8, x_scale = quantize_rows(x, *rows[1:], dtype)
    flags = row_flags(qdata) if transpose_weight else column_flags(scale)
    width = columns_at_a_time(qdata.shape[0], columns, x.shape[1], max_scratch_bytes)
    y = None if width == columns else x.new_empty((rows.n_rows, columns))
    for first in range(0, columns, width):
        part = slice(first, min(first + width, columns))
        w8, w_scale = _decode(qdata, scale, part, transpose_weight, flags, rows.offs)
        product = _scaled_product(x8, w8, x_scale, w_scale, rows.offs)
        del w8  # the next part decodes into the same memory
        target = product if y is None else y[:, part]
        finish(product, target, rows.offs, added.at((slice(None), part)))
    y = product if y is None else y
    recompute_flagged(y, x, qdata, scale, flags, rows, transpose_weight, added, dot_dtype)
    return y


def _fused_on_gpu(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    rows: Rows,
    transpose_weight: bool,
    added: Added,
    dtype: torch.dtype,
) -> torch.Tensor:
    if dtype != torch.float8_e4m3fn or not takes_hopper_fp8(x):
        raise NotImplementedError(
            "strategy='fused8' needs rows of torch.float8_e4m3fn and a GPU of compute capability 9.0: leave "
            "strategy out, or use 'unpack8'"
        )
    if rows.n_rows == 0:
        return x.new_empty((0, qdata.shape[-2] if transpose_weight else 2 * qdata.shape[-1]))
    x = with_unit_rows(x)
    lower = lowered_rows if transpose_weight else lowered_columns
    lowered, w_scale, flags = lower(qdata, scale, rows.offs)
    x8, x_scale = permuted_rows(x, "halves" if transpose_weight else "pairs")
    y = hopper_fp8_product(x8, x_scale, qdata, lowered, w_scale, rows, transpose_weight, added)
    if rows.offs is None:
        qdata, scale, flags, added = qdata[None], scale[None], flags[None], added.at(None)
    recompute_flagged(y, x, qdata, scale, flags, rows, transpose_weight, added)
    return y


def _decode(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    part: slice,
    transpose_weight: bool,
    flags: torch.Tensor,
    offs: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode columns ``part`` of the result: e4m3 weights ``[E, part, reduced]`` and scales ``[E, part]``."""
    if transpose_weight:
        w8, w_scale, _ = fp8_rows(qdata[:, part], scale[:, part], flags[:, part], offs)
    else:
        packed = slice(part.start // MXFP4.elems_per_byte, part.stop // MXFP4.elems_per_byte)
        blocks = slice(part.start // MXFP4.block_size, part.stop // MXFP4.block_size)
        w8, w_scale, _ = fp8_columns(qdata[..., packed], scale[..., blocks], flags[:, blocks], offs)
    return w8, w_scale


def _scaled_product(
    x8: torch.Tensor,
    w8: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    offs: torch.Tensor | None,
) -> torch.Tensor:
    """Multiply to bf16 ``[R, C]``.

    Fast accumulation is on: its error is small beside that of x's rounding. Without it, 131,072 rows of 2,048
    columns to 1,024 took 1.65 ms, in a training step of 4.2 ms that takes 3.0 with it (H200).
    """
    if offs is not None:
        return torch_internals.scaled_grouped_mm(
            x8, w8.mT, x_scale, w_scale, offs, use_fast_accum=True
        )
    return torch_internals.scaled_mm(x8, w8[0].t(), x_scale[:, None], w_scale, use_fast_accum=True)


def _check(x: torch.Tensor, w: Packed, grouped: bool) -> None:
    if x.dtype != torch.bfloat16:
        raise TypeError(
            f"x has dtype {x.dtype}; the 8-bit GEMMs return bfloat16: use x.bfloat16(), or leave "
            f"compute_dtype out"
        )
    if w.n % _ALIGNMENT:
        raise ValueError(
            f"the weight has N={w.n} rows, but the 8-bit GEMMs need a multiple of {_ALIGNMENT} along every "
            f"axis: pad the weight, or leave compute_dtype out"
        )
    if x.is_cuda:
        _check_device(x.device.index, grouped)


def _check_device(index: int, grouped: bool) -> None:
    major, minor = found = capability(index)
    enough = found in ((9, 0), (10, 0)) if grouped else found >= (8, 9)
    if not enough:
        needed = "9.0 or 10.0 with experts" if grouped else "8.9 or newer"
        raise NotImplementedError(
            f"cuda:{index} has compute capability {major}.{minor}; the 8-bit GEMM needs "
            f"{needed}: leave compute_dtype out, with strategy='unpack' or 'fused'"
        )
