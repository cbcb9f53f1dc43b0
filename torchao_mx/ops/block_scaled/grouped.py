"""grouped_block_scaled_mm: ``block_scaled_mm`` by groups, for the products of experts.

The groups lie along an axis of ``a``, one after the other; int32 end offsets stay on the device::

    a [R, C], b [E, S, C]  ->  [R, S]     groups of rows: those of group e times b[e]^T, plus bias[e]
    a [R, C], b [S, C]     ->  [E, R, S]  groups of columns: a[:, group e] b[:, group e]^T

Both operands are packed in blocks along C. *Native*, on GPUs of compute capability 10.0 and newer: torch's
scaled grouped matmul, for two operands in NVFP4 or in MXFP8 with E4M3 elements. It takes the block scales of
each group separately, padded to whole tiles of 128 rows and 4 columns. The tile count is known only on the
device, so the upper bound is allocated. *Decoded*, elsewhere and on the CPU.

The native product is untested on GPUs: its dispatch and its layout (byte for byte torchao's) are tested on
the CPU, and ``block_scaled/native.py`` checks it before its first use.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torchao.prototype.mx_formats.utils import to_blocked

from torchao_mx import torch_internals
from torchao_mx.formats import MXFP8_E4M3, NVFP4, BlockFormat, format_by_name
from torchao_mx.ops.block_scaled import native
from torchao_mx.ops.block_scaled.dense import ROW_BYTES, scaling_of
from torchao_mx.ops.core.launch import bytes_of
from torchao_mx.ops.core.operands import Added
from torchao_mx.ops.core.register import define_op
from torchao_mx.ops.moe.groups import completed_groups
from torchao_mx.ops.packed_mm.epilogue import finish
from torchao_mx.ops.quantization.dequantize import dequantize_op

TILE_ROWS, TILE_COLUMNS = 128, 4  # of block scales
TILE_BYTES = TILE_ROWS * TILE_COLUMNS


def takes_grouped_block_scaled_mm(x: torch.Tensor, columns: int, fmt: BlockFormat) -> bool:
    """Whether products in x's dtype over ``columns`` elements run natively, both operands in ``fmt``."""
    return (
        fmt in (NVFP4, MXFP8_E4M3)
        and x.dtype == torch.bfloat16
        and columns % (ROW_BYTES * fmt.elems_per_byte) == 0
        and _is_native(x.device)
    )


class Arguments(NamedTuple):
    """The op's arguments, in schema order: per-tensor scales 0-d (a) and ``[E, 1, 1]`` (b), bias ``[E, S]``."""

    a_qdata: torch.Tensor
    a_scale: torch.Tensor
    a_per_tensor: torch.Tensor | None
    b_qdata: torch.Tensor
    b_scale: torch.Tensor
    b_per_tensor: torch.Tensor | None
    bias: torch.Tensor | None
    offs: torch.Tensor
    fmt: str
    dtype: torch.dtype

    @property
    def groups_rows(self) -> bool:
        return self.b_qdata.dim() == 3


def blocked_rows(scale: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Tile the scale bytes ``[R, B]`` of groups of rows: ``[P, B']``, P and B' whole tiles."""
    index, _ = completed_groups(offs, scale.shape[0], TILE_ROWS)
    rows = scale[index.clamp(min=0)].where((index >= 0)[:, None], 0)
    return to_blocked(rows).view(index.shape[0], -1)


def blocked_experts(scale: torch.Tensor) -> torch.Tensor:
    """Tile the scale bytes ``[E, S, B]`` of each expert: ``[E, S' B']``."""
    experts, rows, _ = scale.shape
    whole = F.pad(scale, (0, 0, 0, -rows % TILE_ROWS))
    return to_blocked(whole.flatten(0, 1)).view(experts, -1)


def blocked_columns(scale: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Tile the scale bytes ``[S, B]`` of groups of columns: ``[S', B']``, each group's tiles contiguous."""
    index, ends = completed_groups(ends, scale.shape[1], TILE_COLUMNS)
    columns = scale[:, index.clamp(min=0)].where(index >= 0, 0)
    tiles = to_blocked(columns).view(-1, index.shape[0] // TILE_COLUMNS, TILE_BYTES)
    n_rows, n_columns, _ = tiles.shape
    # Tile p belongs to a group e: it is the c-th tile of that group's tile row r.
    end = ends // TILE_COLUMNS
    start = F.pad(end[:-1], (1, 0))
    place = torch.arange(n_rows * n_columns, dtype=torch.int32, device=scale.device)
    group = torch.searchsorted(end * n_rows, place, right=True, out_int32=True)
    group = group.clamp(max=ends.shape[0] - 1)
    width = (end - start)[group].clamp(min=1)
    local = place - start[group] * n_rows
    row, column = local // width, start[group] + local % width
    # Nothing reads the tiles after the last group.
    source = (row * n_columns + column).clamp(max=n_rows * n_columns - 1)
    return tiles.flatten(0, 1)[source].view(n_rows * TILE_ROWS, -1)


def _native_product(*args: Any) -> torch.Tensor:
    t = Arguments(*args)
    fmt, n_groups = format_by_name(t.fmt), t.offs.shape[0]
    a_scale, b_scale = bytes_of(t.a_scale), bytes_of(t.b_scale)
    if t.groups_rows:
        a_scale, b_scale = blocked_rows(a_scale, t.offs), blocked_experts(b_scale)
    else:
        ends = t.offs // fmt.block_size
        a_scale, b_scale = blocked_columns(a_scale, ends), blocked_columns(b_scale, ends)

    def per_group(scale: torch.Tensor | None) -> torch.Tensor | None:
        return None if scale is None else scale.reshape(-1).expand(n_groups).contiguous()

    scales_a, recipes, swizzles = scaling_of(fmt, a_scale, per_group(t.a_per_tensor))
    scales_b, _, _ = scaling_of(fmt, b_scale, per_group(t.b_per_tensor))
    y = F.scaled_grouped_mm(
        t.a_qdata.view(fmt.elem_dtype),
        t.b_qdata.view(fmt.elem_dtype).mT,
        scales_a,
        recipes,
        scales_b,
        recipes,
        swizzles,
        swizzles,
        offs=t.offs,
        output_dtype=t.dtype,
    )
    if t.groups_rows:
        finish(y, y, t.offs, Added(bias=t.bias))
    return y


def _decoded_product(*args: Any) -> torch.Tensor:
    t = Arguments(*args)
    a = dequantize_op(t.a_qdata, t.a_scale, t.fmt, t.dtype, -1, t.a_per_tensor)
    b = dequantize_op(t.b_qdata, t.b_scale, t.fmt, t.dtype, -1, t.b_per_tensor)
    y = torch_internals.grouped_mm(a, b.mT, offs=t.offs)
    if t.groups_rows:
        finish(y, y, t.offs, Added(bias=t.bias))
    return y


def _fake(*args: Any) -> torch.Tensor:
    t = Arguments(*args)
    shape = (t.a_qdata.shape[0], t.b_qdata.shape[-2])
    shape = shape if t.groups_rows else (t.offs.shape[0], *shape)
    return t.a_qdata.new_empty(shape, dtype=t.dtype)


def _cuda(*args: Any) -> torch.Tensor:
    return (_native_product if _is_native(args[0].device) else _decoded_product)(*args)


# Takes packed operands and end offsets, in elements along the grouped axis. Rows after the last group are
# zero, columns after it are ignored; a group of columns is whole blocks.
grouped_block_scaled_mm_op = define_op(
    "grouped_block_scaled_mm",
    "(Tensor a_qdata, Tensor a_scale, Tensor? a_per_tensor, Tensor b_qdata, Tensor b_scale,"
    " Tensor? b_per_tensor, Tensor? bias, Tensor offs, str fmt, ScalarType dtype) -> Tensor",
    cpu=_decoded_product,
    cuda=_cuda,
    fake=_fake,
)


def _examples(device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (native, decoded) products: groups of rows in both formats, and of columns; one is empty."""
    rows = torch.tensor([3, 3, 150, 203], dtype=torch.int32, device=device)
    columns = torch.tensor([32, 32, 192, 352], dtype=torch.int32, device=device)
    pairs = []
    for fmt, offs, a_shape, b_shape in (
        (NVFP4, rows, (203, 192), (4, 160, 192)),
        (MXFP8_E4M3, rows, (203, 192), (4, 160, 192)),
        (MXFP8_E4M3, columns, (96, 352), (160, 352)),
    ):
        a, b = (native.example(fmt, device, *shape) for shape in (a_shape, b_shape))
        args = (*a, *b, None, offs, fmt.name, torch.bfloat16)
        pairs.append((_native_product(*args), _decoded_product(*args)))
    return pairs


_is_native = native.seam("The grouped product of block-scaled operands", _examples)
