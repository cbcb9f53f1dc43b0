"""group_sum: the sum of each expert's rows, the gradient of a bias."""

from __future__ import annotations

import torch

from torchao_mx.ops._library import define_op
from torchao_mx.ops.mm import rows_functions


def _group_sum(dy: torch.Tensor, offs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return rows_functions(dy).group_sum(dy, offs, dtype)


def _group_sum_fake(dy: torch.Tensor, offs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return dy.new_empty((offs.shape[0], dy.shape[1]), dtype=dtype)


# ``[E, C]`` in ``dtype`` of ``dy [R, C]``, summed in fp32 in an order that depends on shapes alone.
group_sum_op = define_op(
    "group_sum",
    "(Tensor dy, Tensor offs, ScalarType dtype) -> Tensor",
    cpu=_group_sum,
    cuda=_group_sum,
    fake=_group_sum_fake,
)
