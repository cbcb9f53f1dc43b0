"""group_sum and group_outer: sums over each expert's rows, the gradients of its bias and its weight."""

from __future__ import annotations

import torch

from torchao_mx import torch_internals
from torchao_mx.ops.core.operands import aligned_rows
from torchao_mx.ops.core.register import define_op
from torchao_mx.ops.moe.rows import rows_functions


def _group_sum(dy: torch.Tensor, offs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return rows_functions(dy).group_sum(dy, offs, dtype)


def _group_sum_fake(dy: torch.Tensor, offs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return dy.new_empty((offs.shape[0], dy.shape[1]), dtype=dtype)


# Sums ``dy [R, N]`` to ``[E, N]`` in ``dtype``, in fp32, in an order that depends on shapes alone.
group_sum_op = define_op(
    "group_sum",
    "(Tensor dy, Tensor offs, ScalarType dtype) -> Tensor",
    cpu=_group_sum,
    cuda=_group_sum,
    fake=_group_sum_fake,
    strided=("dy",),
)


def _group_outer(
    dy: torch.Tensor, x: torch.Tensor, offs: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    if len(dy) == 0:
        return dy.new_zeros((len(offs), dy.shape[1], x.shape[1]), dtype=dtype)
    # Neither operand is contiguous along its groups: group ends are arbitrary, but a tensor core's loads
    # along a contiguous axis need groups of 16 bytes.
    return torch_internals.grouped_mm(aligned_rows(dy).mT, aligned_rows(x), offs=offs).to(dtype)


def _group_outer_fake(
    dy: torch.Tensor, x: torch.Tensor, offs: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return dy.new_empty((offs.shape[0], dy.shape[1], x.shape[1]), dtype=dtype)


# ``dW_e = dY_e^T X_e``, ``[E, N, K]`` in ``dtype``, of ``dy [R, N]`` and ``x [R, K]``; rows after the last
# group are ignored. An op, because inductor would change the layouts of torch._grouped_mm's operands.
group_outer_op = define_op(
    "group_outer",
    "(Tensor dy, Tensor x, Tensor offs, ScalarType dtype) -> Tensor",
    cpu=_group_outer,
    cuda=_group_outer,
    fake=_group_outer_fake,
    strided=("dy", "x"),
)
