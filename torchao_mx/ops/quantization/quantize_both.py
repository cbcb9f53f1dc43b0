"""quantize_both: one pass over a matrix, quantized along its rows, along its columns, or both.

A training step multiplies an operand twice, reducing a different axis each time: X ``[M, K]`` along K in
forward and along M in backward, dY along both in backward. A program reads a tile once and writes every
requested form of it, packed or as values. NVFP4's per-tensor scale depends on all of x: ``per_tensor_scale``
finds it first, in a read of its own.

The number of rows need not be whole blocks: rows after the last one load as zeros, which is the definition
(``reference/recipes.py``), and a packed column form includes them at its end.

Stochastic rounding takes its bits from Philox, a function of the seed and an element's position alone: the
tiles do not affect it, and the CPU computes the same. The seed is read on the device, so drawing one neither
waits for the GPU nor repeats itself when a CUDA graph is replayed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from torchao_mx import reference
from torchao_mx.errors import check_blocks, check_high_precision, check_tensors
from torchao_mx.formats import (
    BlockFormat,
    QuantizeSpec,
    ScaleCalculationMode,
    format_by_name,
)
from torchao_mx.ops.core.arguments import check_per_tensor_scale, spec_strings
from torchao_mx.ops.core.launch import (
    bytes_of,
    cdiv,
    format_on,
    launched,
    on_device_of,
    per_tensor_kind,
    rounds_products,
)
from torchao_mx.ops.core.register import define_op
from torchao_mx.ops.core.replay import replayed
from torchao_mx.ops.core.tiles import quantize_both_tile
from torchao_mx.ops.quantization import both_tile
from torchao_mx.reference import BothDirections

GRID_M = 32768  # tiles of rows on the grid's second axis, whose limit is 65,535
FORMS = BothDirections._fields


@launched
@triton.jit
def _quantize_both_kernel(
    x_ptr,
    index_ptr,
    seed_ptr,
    row_outputs,
    column_outputs,
    M,
    K,
    x_strides,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    TILE: tl.constexpr,
    GRID_M: tl.constexpr,
    EVEN: tl.constexpr,
    GATHERED: tl.constexpr,
    RANDOM: tl.constexpr,
    SHORT_MANTISSA: tl.constexpr,
):
    """Quantize a tile of ``x [M, K]``, or of the rows ``x[index]`` if GATHERED; EVEN: all tiles are whole.

    ROW and COLUMN, each a :class:`both_tile.Form`, say what is stored. e2m1 rows are stored in words of
    eight, fp8 rows in bytes, columns in units of four codes.
    """
    TILE_K: tl.constexpr = TILE.k
    ROWS_OF_WORDS: tl.constexpr = ROW.packed and ROW.format.elem_bits == 4
    ROWS_OF_BYTES: tl.constexpr = ROW.packed and ROW.format.elem_bits == 8
    k0, m0 = tl.program_id(0) * TILE_K, (tl.program_id(1) + tl.program_id(2) * GRID_M) * TILE.m
    m = m0 + both_tile.rows_in_order(TILE.m, COLUMN.format.block_size, TILE.stack)
    k = k0 + tl.arange(0, TILE_K)
    if GATHERED:
        row = tl.load(index_ptr + m, mask=m < M, other=-1)
    else:
        row = m
    inside_m = (m < M) & (row >= 0) | EVEN
    inside_k = (k < K) | EVEN
    row_64 = row.to(tl.int64)
    stride_m, stride_k = x_strides
    x_ptrs = x_ptr + row_64[:, None] * stride_m + k.to(tl.int64)[None, :] * stride_k
    inside = inside_m[:, None] & inside_k[None, :]
    words = 0
    if RANDOM:
        words = both_tile.random_words(tl.load(seed_ptr), row, k0, TILE_K)
    if ROWS_OF_WORDS:
        both_tile.store_row_words(
            x_ptr,
            index_ptr,
            row_outputs,
            m0,
            M,
            k0,
            K,
            x_strides,
            ROW,
            TILE,
            EVEN,
            GATHERED,
            SHORT_MANTISSA,
        )
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    if ROWS_OF_BYTES or ROW.values:
        both_tile.store_rows(
            x,
            words,
            row_outputs,
            row_64,
            inside_m,
            k0,
            k,
            inside_k,
            K,
            ROW,
            TILE,
            EVEN,
            SHORT_MANTISSA,
            RANDOM,
        )
    if COLUMN.packed or COLUMN.values:
        both_tile.store_columns(
            x,
            words,
            column_outputs,
            m0,
            m,
            M,
            k,
            inside_k,
            K,
            COLUMN,
            TILE,
            EVEN,
            SHORT_MANTISSA,
            RANDOM,
        )


def _format_of(spec: tuple[str, str], other: tuple[str, str]) -> BlockFormat:
    """Return a spec's format; for an absent spec, the other one's format as a placeholder."""
    return format_by_name(spec[0] or other[0])


def _column_rows(x: torch.Tensor, index: torch.Tensor | None) -> int:
    """Return the number of rows of the column forms. (len() of a fake tensor would specialise the graph.)"""
    return x.shape[0] if index is None else index.shape[0]


def _whole(n_rows: int, fmt: BlockFormat) -> int:
    """Round ``n_rows`` up to whole blocks."""
    return -(-n_rows // fmt.block_size) * fmt.block_size


def _empty_results(
    x: torch.Tensor,
    row: tuple[str, str],
    column: tuple[str, str],
    forms: list[str],
    dtype: torch.dtype,
    index: torch.Tensor | None,
) -> BothDirections:
    m, k = x.shape
    n_rows = _column_rows(x, index)
    row_fmt, column_fmt = _format_of(row, column), _format_of(column, row)

    def packed(fmt: BlockFormat, rows: int, reduced: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            x.new_empty((rows, reduced // fmt.elems_per_byte), dtype=fmt.qdata_dtype),
            x.new_empty((rows, reduced // fmt.block_size), dtype=fmt.scale_dtype),
        )

    return BothDirections(
        packed(row_fmt, m, k) if "rows" in forms else None,
        x.new_empty((m, k), dtype=dtype) if "row_values" in forms else None,
        packed(column_fmt, k, _whole(n_rows, column_fmt)) if "columns" in forms else None,
        x.new_empty((n_rows, k), dtype=dtype) if "column_values" in forms else None,
    )


def _flat(both: BothDirections) -> list[torch.Tensor]:
    """Return the tensors of the forms present, in order: the op's result."""
    forms = (form if isinstance(form, tuple) else (form,) for form in both if form is not None)
    return [t for form in forms for t in form]


def unflattened(tensors: list[torch.Tensor], forms: tuple[str, ...]) -> BothDirections:
    """Return the op's results by name."""
    rest, found = list(tensors), {}
    for name in FORMS:
        if name in forms:
            count = 1 if name.endswith("values") else 2
            taken, rest = rest[:count], rest[count:]
            found[name] = taken[0] if count == 1 else tuple(taken)
    return BothDirections(**found)


class Arguments(NamedTuple):
    """The op's arguments, in its schema's order; format and mode are empty for an absent form."""

    x: torch.Tensor
    row_format: str
    row_mode: str
    column_format: str
    column_mode: str
    forms: list[str]
    dtype: torch.dtype
    row_scale: torch.Tensor | None
    column_scale: torch.Tensor | None
    seed: torch.Tensor | None
    index: torch.Tensor | None

    @property
    def row(self) -> tuple[str, str]:
        return self.row_format, self.row_mode

    @property
    def column(self) -> tuple[str, str]:
        return self.column_format, self.column_mode


def _quantize_both_cpu(*args: Any) -> list[torch.Tensor]:
    a = Arguments(*args)
    row, column = (
        QuantizeSpec(format_by_name(name), ScaleCalculationMode(mode)) if name else None
        for name, mode in (a.row, a.column)
    )
    both = reference.quantize_both(
        a.x, row, column, tuple(a.forms), a.dtype, a.row_scale, a.column_scale, a.seed, a.index
    )
    return _flat(both)


def _quantize_both_triton(*args: Any) -> list[torch.Tensor]:
    a = Arguments(*args)
    both = _empty_results(a.x, a.row, a.column, a.forms, a.dtype, a.index)
    n_rows = _column_rows(a.x, a.index)
    if n_rows and a.x.shape[1]:
        _launch(a, both, n_rows)
    return _flat(both)


def _launch(a: Arguments, both: BothDirections, n_rows: int) -> None:
    x, seed, index = a.x, a.seed, a.index
    row_fmt, column_fmt = _format_of(a.row, a.column), _format_of(a.column, a.row)
    row_unit = torch.int32 if row_fmt.elem_bits == 4 else torch.uint8
    column_unit = torch.int16 if column_fmt.elem_bits == 4 else torch.int32  # holds four rows
    row, row_outputs = _form(
        x, row_fmt, a.row_mode, a.row_scale, both.rows, both.row_values, row_unit
    )
    column, column_outputs = _form(
        x, column_fmt, a.column_mode, a.column_scale, both.columns, both.column_values, column_unit
    )
    k = x.shape[1]
    tile = quantize_both_tile(a.forms, row_fmt.elem_bits, seed is not None)
    tile = tile._replace(stack=min(tile.stack, column_fmt.block_size // 16))
    tiles_m = cdiv(n_rows, tile.m)
    grid = (cdiv(k, tile.k), min(tiles_m, GRID_M), cdiv(tiles_m, GRID_M))
    even = n_rows % tile.m == 0 and k % tile.k == 0 and tiles_m <= GRID_M and index is None
    with on_device_of(x):
        _quantize_both_kernel[grid](
            x,
            x if index is None else index,
            x if seed is None else seed,
            row_outputs,
            column_outputs,
            n_rows,
            k,
            x.stride(),
            ROW=row,
            COLUMN=column,
            TILE=tile,
            GRID_M=GRID_M,
            EVEN=even,
            GATHERED=index is not None,
            RANDOM=seed is not None,
            SHORT_MANTISSA=x.dtype != torch.float32,
            num_warps=tile.warps,
            maxnreg=tile.max_registers,
            enable_fp_fusion=not (rounds_products(row_fmt) or rounds_products(column_fmt)),
        )


def _form(
    x: torch.Tensor,
    fmt: BlockFormat,
    mode: str,
    per_tensor_scale: torch.Tensor | None,
    packed: tuple[torch.Tensor, torch.Tensor] | None,
    values: torch.Tensor | None,
    unit: torch.dtype,
) -> tuple[both_tile.Form, tuple[torch.Tensor, ...]]:
    """Describe a direction for the kernel; ``x`` stands in for tensors that the kernel does not touch."""
    qdata, scale = (x, x) if packed is None else (packed[0].view(unit), bytes_of(packed[1]))
    form = both_tile.Form(
        format_on(x.device, fmt),
        mode,
        per_tensor_kind(per_tensor_scale),
        packed is not None,
        values is not None,
    )
    values = x if values is None else values
    return form, (qdata, scale, values, x if per_tensor_scale is None else per_tensor_scale)


def _quantize_both_fake(*args: Any) -> list[torch.Tensor]:
    a = Arguments(*args)
    return _flat(_empty_results(a.x, a.row, a.column, a.forms, a.dtype, a.index))


_quantize_both_cuda = replayed(_quantize_both_triton)
quantize_both_op = define_op(
    "quantize_both",
    "(Tensor x, str row_format, str row_mode, str column_format, str column_mode, str[] forms,"
    " ScalarType dtype, Tensor? row_scale, Tensor? column_scale, Tensor? seed, Tensor? index) -> Tensor[]",
    cpu=_quantize_both_cpu,
    cuda=_quantize_both_cuda,
    fake=_quantize_both_fake,
    strided=("x",),
)


def quantize_both(
    x: torch.Tensor,
    row: QuantizeSpec | None,
    column: QuantizeSpec | None,
    forms: tuple[str, ...] | None = None,
    *,
    dtype: torch.dtype | None = None,
    row_scale: torch.Tensor | None = None,
    column_scale: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
) -> BothDirections:
    """Quantize ``x [M, K]`` along K and along M in one pass; not differentiable.

    The bytes equal those of :func:`torchao_mx.ops.quantize` along each axis, for x padded with rows of zeros
    to whole blocks along M.

    Args:
        x: ``[M, K]``, bfloat16, float16 or float32, any strides.
        row: the format and scaling mode along K; None for no row form.
        column: the same along M; None for no column form.
        forms: the forms to return, by the names of the result's fields; by default the packed forms, ``"rows"``
            and ``"columns"``, of the given specs.
        dtype: the dtype of the values; x's by default.
        row_scale: for NVFP4 rows, fp32, 0-d: ``ops.per_tensor_scale(x, NVFP4)``.
        column_scale: for NVFP4 columns.
        seed: int64, 0-d, on x's device: round stochastically to 8-bit elements (in expectation x under FLOOR and
            EVEN, except for saturated values). Equal seeds give equal results on every device.
        index: int32 ``[P]`` on x's device: the column forms are those of ``x[index]``, with zeros where the index
            is negative, and have P rows. The row forms have x's rows; rows missing from ``index`` are
            undefined.

    Returns:
        A :class:`BothDirections`: ``rows`` and ``columns`` are ``(qdata, scale)`` with the quantized axis
        last, ``row_values`` and ``column_values`` are ``[M, K]``; forms that were not requested are None.

    Raises:
        TypeError: a wrong dtype, or a spec that is not a QuantizeSpec.
        ValueError: a wrong shape; a K that is not whole blocks of ``row``; unknown forms, or forms without their
            spec; a seed with 4-bit elements.

    Example:
        >>> import torch
        >>> from torchao_mx import MXFP8_E4M3, QuantizeSpec, ops
        >>> mxfp8 = QuantizeSpec(MXFP8_E4M3)
        >>> both = ops.quantize_both(torch.randn(40, 96), mxfp8, mxfp8, ("row_values", "columns"))
        >>> both.row_values.shape, *(t.shape for t in both.columns)
        (torch.Size([40, 96]), torch.Size([96, 64]), torch.Size([96, 2]))
    """
    specs = {"row": row, "column": column}
    if forms is None:
        forms = tuple(f"{name}s" for name, spec in specs.items() if spec is not None)
    optional = {"row_scale": row_scale, "column_scale": column_scale, "seed": seed, "index": index}
    check_tensors(x=x, optional=optional)
    check_high_precision(x.dtype, "x")
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [M, K]: use x.flatten(0, -2)")
    dtype = x.dtype if dtype is None else dtype
    check_high_precision(dtype, "the output")
    _check_forms(forms, specs)
    for spec, scale in ((row, row_scale), (column, column_scale)):
        _check_spec(spec, scale, seed, x)
    _check_on_device(x, seed, "seed", torch.int64, 0)
    _check_on_device(x, index, "index", torch.int32, 1)
    if row is not None:
        check_blocks(x.shape, row.format, -1, "x")
    if column is not None:
        n_rows = _column_rows(x, index)
        check_blocks((_whole(n_rows, column.format), x.shape[1]), column.format, -2, "x")
    tensors = quantize_both_op(
        x.detach(),
        *spec_strings(row),
        *spec_strings(column),
        list(forms),
        dtype,
        row_scale,
        column_scale,
        seed,
        index,
    )
    return unflattened(tensors, forms)


def _check_forms(forms: tuple[str, ...], specs: dict[str, QuantizeSpec | None]) -> None:
    unknown = [form for form in forms if form not in FORMS]
    if unknown or not forms:
        raise ValueError(f"forms={forms!r}; give one or more of {', '.join(FORMS)}")
    for name, spec in specs.items():
        if spec is None and any(form.startswith(name) for form in forms):
            raise ValueError(f"forms={forms!r} with {name}=None; give {name} a QuantizeSpec")


def _check_spec(
    spec: QuantizeSpec | None,
    scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    x: torch.Tensor,
) -> None:
    if spec is None:
        return
    if not isinstance(spec, QuantizeSpec):
        raise TypeError(f"{spec!r} is not a QuantizeSpec; use torchao_mx.QuantizeSpec(format)")
    if scale is not None:
        check_per_tensor_scale(scale, spec.format, x)
    if seed is not None and spec.format.elem_bits != 8:
        raise ValueError(
            f"got a seed with {spec.format.name}; stochastic rounding needs 8-bit elements: leave the seed out, "
            f"or use an MXFP8 format"
        )


def _check_on_device(
    x: torch.Tensor, t: torch.Tensor | None, name: str, dtype: torch.dtype, dim: int
) -> None:
    if t is not None and (t.dtype, t.dim(), t.device) != (dtype, dim, x.device):
        raise ValueError(
            f"{name} is a {t.dim()}-d {t.dtype} tensor on {t.device}; it must be {dim}-d, {dtype} and on x's "
            f"device, {x.device}"
        )
