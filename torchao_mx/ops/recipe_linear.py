"""A linear layer's step whose products have operands quantized to one format forward and to another backward.

One op for each direction, so that a step of small kernels costs its launches and not their planning
(``_replay.py``). X, W and dY are each read once for all forms that they are needed in, and X and W once more
before where the format has a per-tensor scale. What they compute is ``reference.recipe_products``.
"""

from __future__ import annotations

import torch

from torchao_mx.formats import format_by_name
from torchao_mx.ops._library import define_op
from torchao_mx.ops._replay import replayed
from torchao_mx.ops.block_scaled_mm import Operand, block_scaled_mm
from torchao_mx.ops.matmul import NO_ACTIVATION
from torchao_mx.ops.quantize import per_tensor_scale_op
from torchao_mx.ops.quantize_both import quantize_both_op, unflattened

_Spec = tuple[str, str]  # format and scaling mode, as matmul.spec_strings has them


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
    """``x [R, C]`` as an operand ``[R, C]`` in blocks along C, and as one ``[C, R]`` in blocks along R."""
    forms = []
    if row is not None:
        forms.append("rows" if packed_rows else "row_values")
    if column is not None:
        forms.append("columns" if packed_columns else "column_values")
    if not forms:
        return None, None
    pts = None
    if row is not None and format_by_name(row[0]).has_per_tensor_scale and x.numel():
        pts = per_tensor_scale_op(x, row[0], False)
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


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    forward_format: str,
    forward_mode: str,
    backward_format: str,
    backward_mode: str,
    native: bool,
    keeps_columns: bool,
) -> list[torch.Tensor]:
    """Y and, if they are to be kept for dW, the packed columns of x."""
    forward, backward = (forward_format, forward_mode), (backward_format, backward_mode)
    x_rows, x_columns = _quantized(
        x, forward, backward if keeps_columns else None, x.dtype, packed_rows=native, packed_columns=True
    )  # fmt: skip
    w_rows, _ = _quantized(
        weight, forward, None, x.dtype, packed_rows=native, packed_columns=native
    )
    y = block_scaled_mm(x_rows, w_rows, x.dtype, None if bias is None else bias.to(x.dtype))
    return [y, *x_columns.packed] if keeps_columns else [y]


def _forward_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    forward_format: str,
    forward_mode: str,
    backward_format: str,
    backward_mode: str,
    native: bool,
    keeps_columns: bool,
) -> list[torch.Tensor]:
    y = x.new_empty((x.shape[0], weight.shape[0]))
    if not keeps_columns:
        return [y]
    columns = quantize_both_op(
        x, *NO_ACTIVATION, backward_format, backward_mode, ["columns"], x.dtype, None, None, None, None
    )  # fmt: skip
    return [y, *columns]


recipe_linear_op = define_op(
    "recipe_linear",
    "(Tensor x, Tensor weight, Tensor? bias, str forward_format, str forward_mode, str backward_format,"
    " str backward_mode, bool native, bool keeps_columns) -> Tensor[]",
    cpu=_forward,
    cuda=replayed(_forward),
    fake=_forward_fake,
)


def _backward(
    dy: torch.Tensor,
    weight: torch.Tensor | None,
    x_qdata: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    grad_format: str,
    grad_mode: str,
    backward_format: str,
    backward_mode: str,
    native: bool,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> list[torch.Tensor]:
    """Those of dX, dW and dbias that are wanted: what they take is given."""
    grad, backward = (grad_format, grad_mode), (backward_format, backward_mode)
    needs_dx, needs_dw = weight is not None, x_qdata is not None
    options = {"packed_rows": native, "packed_columns": native}
    gradients = []
    dy_rows, dy_columns = _quantized(
        dy, grad if needs_dx else None, grad if needs_dw else None, dy.dtype, seed=seed, **options
    )
    if needs_dx:
        _, w_columns = _quantized(weight, None, backward, dy.dtype, **options)
        gradients.append(block_scaled_mm(dy_rows, w_columns, dy.dtype))
    if needs_dw:
        x_columns = Operand(format_by_name(backward_format), (x_qdata, x_scale))
        gradients.append(block_scaled_mm(dy_columns, x_columns, dy.dtype).to(weight_dtype))
    if bias_dtype is not None:
        gradients.append(dy.sum(0, dtype=torch.float32).to(bias_dtype))
    return gradients


def _backward_fake(
    dy: torch.Tensor,
    weight: torch.Tensor | None,
    x_qdata: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    grad_format: str,
    grad_mode: str,
    backward_format: str,
    backward_mode: str,
    native: bool,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> list[torch.Tensor]:
    gradients = []
    if weight is not None:
        gradients.append(dy.new_empty((dy.shape[0], weight.shape[1])))
    if x_qdata is not None:
        gradients.append(dy.new_empty((dy.shape[1], x_qdata.shape[0]), dtype=weight_dtype))
    if bias_dtype is not None:
        gradients.append(dy.new_empty((dy.shape[1],), dtype=bias_dtype))
    return gradients


recipe_linear_backward_op = define_op(
    "recipe_linear_backward",
    "(Tensor dy, Tensor? weight, Tensor? x_qdata, Tensor? x_scale, Tensor? seed, str grad_format,"
    " str grad_mode, str backward_format, str backward_mode, bool native, ScalarType weight_dtype,"
    " ScalarType? bias_dtype) -> Tensor[]",
    cpu=_backward,
    cuda=replayed(_backward),
    fake=_backward_fake,
)
