"""A linear layer's training step: operands are quantized to one format in forward, to another in backward.

There is one op per direction, so that a step of small kernels costs its launches and not their planning
(``core/replay.py``). X, W and dY are each read once for all required forms; X and W are read once more before
that if the format has a per-tensor scale. The ops compute ``reference.recipe_products``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from torchao_mx.formats import format_by_name
from torchao_mx.ops.block_scaled.dense import Operand, block_scaled_mm
from torchao_mx.ops.core.arguments import NO_ACTIVATION
from torchao_mx.ops.core.register import define_op
from torchao_mx.ops.core.replay import replayed
from torchao_mx.ops.quantization.quantize import per_tensor_scale_op
from torchao_mx.ops.quantization.quantize_both import quantize_both_op, unflattened

_Spec = tuple[str, str]  # format and scaling mode, as from matmul.spec_strings


def _quantized(
    x: torch.Tensor,
    row: _Spec | None,
    column: _Spec | None,
    dtype: torch.dtype,
    *,
    packed_rows: bool,
    packed_columns: bool,
    seed: torch.Tensor | None = None,
) -> tuple[Operand | None, Operand | None]:
    """Quantize ``x [R, C]`` to operands ``[R, C]``, in blocks along C, and ``[C, R]``, in blocks along R."""
    forms = []
    if row is not None:
        forms.append("rows" if packed_rows else "row_values")
    if column is not None:
        forms.append("columns" if packed_columns else "column_values")
    if not forms:
        return None, None
    pts = None
    if row is not None and format_by_name(row[0]).has_per_tensor_scale and x.numel():
        pts = per_tensor_scale_op(x, row[0], False, None)
    tensors = quantize_both_op(
        x, *(row or NO_ACTIVATION), *(column or NO_ACTIVATION), forms, dtype, pts, None, seed, None
    )
    both = unflattened(tensors, forms)
    rows = columns = None
    if row is not None:
        rows = Operand(format_by_name(row[0]), both.rows, pts, both.row_values)
    if column is not None:
        values = None if both.column_values is None else both.column_values.mT
        columns = Operand(format_by_name(column[0]), both.columns, None, values)
    return rows, columns


class Forward(NamedTuple):
    """Forward's arguments, in its schema's order."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    forward_format: str
    forward_mode: str
    backward_format: str
    backward_mode: str
    native: bool
    keeps_columns: bool

    @property
    def forward(self) -> _Spec:
        return self.forward_format, self.forward_mode

    @property
    def backward(self) -> _Spec:
        return self.backward_format, self.backward_mode


def _forward(*args: Any) -> list[torch.Tensor]:
    """Return Y and, if they are kept for dW, the packed columns of x."""
    a = Forward(*args)
    x, native = a.x, a.native
    x_rows, x_columns = _quantized(
        x,
        a.forward,
        a.backward if a.keeps_columns else None,
        x.dtype,
        packed_rows=native,
        packed_columns=True,
    )
    w_rows, _ = _quantized(
        a.weight, a.forward, None, x.dtype, packed_rows=native, packed_columns=native
    )
    y = block_scaled_mm(x_rows, w_rows, x.dtype, None if a.bias is None else a.bias.to(x.dtype))
    return [y, *x_columns.packed] if a.keeps_columns else [y]


def _forward_fake(*args: Any) -> list[torch.Tensor]:
    a = Forward(*args)
    y = a.x.new_empty((a.x.shape[0], a.weight.shape[0]))
    if not a.keeps_columns:
        return [y]
    columns = quantize_both_op(
        a.x, *NO_ACTIVATION, *a.backward, ["columns"], a.x.dtype, None, None, None, None
    )
    return [y, *columns]


recipe_linear_op = define_op(
    "recipe_linear",
    "(Tensor x, Tensor weight, Tensor? bias, str forward_format, str forward_mode, str backward_format,"
    " str backward_mode, bool native, bool keeps_columns) -> Tensor[]",
    cpu=_forward,
    cuda=replayed(_forward),
    fake=_forward_fake,
    strided=("x", "weight"),
)


class Backward(NamedTuple):
    """Backward's arguments, in its schema's order; the inputs of an unwanted gradient are None."""

    dy: torch.Tensor
    weight: torch.Tensor | None
    x_qdata: torch.Tensor | None
    x_scale: torch.Tensor | None
    seed: torch.Tensor | None
    grad_format: str
    grad_mode: str
    backward_format: str
    backward_mode: str
    native: bool
    weight_dtype: torch.dtype
    bias_dtype: torch.dtype | None

    @property
    def grad(self) -> _Spec:
        return self.grad_format, self.grad_mode

    @property
    def backward(self) -> _Spec:
        return self.backward_format, self.backward_mode


def _backward(*args: Any) -> list[torch.Tensor]:
    """Return the requested ones of dX, dW and dbias."""
    a = Backward(*args)
    dy, needs_dx, needs_dw = a.dy, a.weight is not None, a.x_qdata is not None
    options = {"packed_rows": a.native, "packed_columns": a.native}
    gradients = []
    dy_rows, dy_columns = _quantized(
        dy,
        a.grad if needs_dx else None,
        a.grad if needs_dw else None,
        dy.dtype,
        seed=a.seed,
        **options,
    )
    if needs_dx:
        _, w_columns = _quantized(a.weight, None, a.backward, dy.dtype, **options)
        gradients.append(block_scaled_mm(dy_rows, w_columns, dy.dtype))
    if needs_dw:
        x_columns = Operand(format_by_name(a.backward_format), (a.x_qdata, a.x_scale))
        gradients.append(block_scaled_mm(dy_columns, x_columns, dy.dtype).to(a.weight_dtype))
    if a.bias_dtype is not None:
        gradients.append(dy.sum(0, dtype=torch.float32).to(a.bias_dtype))
    return gradients


def _backward_fake(*args: Any) -> list[torch.Tensor]:
    a = Backward(*args)
    dy, gradients = a.dy, []
    if a.weight is not None:
        gradients.append(dy.new_empty((dy.shape[0], a.weight.shape[1])))
    if a.x_qdata is not None:
        gradients.append(dy.new_empty((dy.shape[1], a.x_qdata.shape[0]), dtype=a.weight_dtype))
    if a.bias_dtype is not None:
        gradients.append(dy.new_empty((dy.shape[1],), dtype=a.bias_dtype))
    return gradients


recipe_linear_backward_op = define_op(
    "recipe_linear_backward",
    "(Tensor dy, Tensor? weight, Tensor? x_qdata, Tensor? x_scale, Tensor? seed, str grad_format,"
    " str grad_mode, str backward_format, str backward_mode, bool native, ScalarType weight_dtype,"
    " ScalarType? bias_dtype) -> Tensor[]",
    cpu=_backward,
    cuda=replayed(_backward),
    fake=_backward_fake,
    strided=("dy", "weight"),
)
