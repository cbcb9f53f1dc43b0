"""combine: the experts' output rows, weighted and summed per token.

With k rows per token and ``order [T k]`` the permutation that grouped them::

    out[t] = sum over j of weights[t, j] * y[i],  order[i] = t k + j
    dy[i]  = weights[t, j] * dout[t]              dweights[t, j] = dout[t] . y[i]

in fp32, each token's rows in the order of j, so results are deterministic.
"""

from __future__ import annotations

from typing import Any

import torch

from torchao_mx import reference
from torchao_mx.errors import HIGH_PRECISION_DTYPES, check_offs, check_on_device_of, check_tensors
from torchao_mx.ops.core.arguments import check_order
from torchao_mx.ops.core.register import define_op, no_second_derivative
from torchao_mx.ops.core.replay import replayed
from torchao_mx.ops.moe.rows import rows_functions


def _combine(
    y: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, offs: torch.Tensor | None
) -> torch.Tensor:
    if not y.is_cuda:
        reference.check_order(order)
    return rows_functions(y).sum_rows(y, order, weights.shape[1], weights, offs)


def _combine_fake(
    y: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, offs: torch.Tensor | None
) -> torch.Tensor:
    return y.new_empty((weights.shape[0], y.shape[1]))


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_autograd(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dy, dweights = combine_backward_op(dout, *ctx.saved_tensors)
    return dy, dweights, None, None  # y, weights, order, offs


combine_op = define_op(
    "combine",
    "(Tensor y, Tensor weights, Tensor order, Tensor? offs) -> Tensor",
    cpu=_combine,
    cuda=replayed(_combine),
    fake=_combine_fake,
    strided=("y",),
    setup_context=_combine_setup,
    backward=_combine_autograd,
)


def _combine_backward(
    dout: torch.Tensor,
    y: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    offs: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return rows_functions(y).combine_backward(dout, y, weights, order, offs)


def _combine_backward_fake(
    dout: torch.Tensor,
    y: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    offs: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


combine_backward_op = define_op(
    "combine_backward",
    "(Tensor dout, Tensor y, Tensor weights, Tensor order, Tensor? offs) -> (Tensor, Tensor)",
    cpu=_combine_backward,
    cuda=replayed(_combine_backward),
    fake=_combine_backward_fake,
    strided=("dout", "y"),
    backward=no_second_derivative("combine", "sum the rows with torch's own operations instead"),
)


def combine(
    y: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    *,
    offs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum each token's rows, weighted: ``out[t] = sum over j of weights[t, j] * y[i]``, ``order[i] = t k + j``.

    Differentiable in y and weights.

    Args:
        y: ``[T * k, C]`` in the order of the groups; bfloat16, float16 or float32.
        weights: ``[T, k]``, floating; the dtype may differ from y's.
        order: ``[T * k]`` int32 (or int64, converted), as in :func:`torchao_mx.ops.grouped_mm`.
        offs: int32 ``[E]``, the groups' end offsets. Rows after the last one are unassigned: they add nothing and
            have zero gradients, whatever they and their weights hold.

    Returns:
        ``[T, C]`` in y's dtype.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes or devices that do not match; on the CPU, an ``order`` that is not a permutation.

    Example:
        >>> import torch
        >>> from torchao_mx import ops
        >>> weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
        >>> order = torch.tensor([0, 3, 1, 2])  # expert ids [[0, 1], [1, 0]]
        >>> ops.combine(torch.tensor([[1.0], [2.0], [4.0], [8.0]]), weights, order)
        tensor([[1.7500],
                [5.0000]])
    """
    check_tensors(y=y, weights=weights, order=order, optional={"offs": offs})
    if y.dtype not in HIGH_PRECISION_DTYPES or weights.dtype not in HIGH_PRECISION_DTYPES:
        raise TypeError(
            f"y has dtype {y.dtype} and weights {weights.dtype}; both must be bfloat16, float16 or float32: "
            f"convert them"
        )
    if (
        y.dim() != 2
        or weights.dim() != 2
        or y.shape[0] != weights.numel()
        or 0 in weights.shape[1:]
    ):
        raise ValueError(
            f"y has shape {tuple(y.shape)} and weights {tuple(weights.shape)}; they must be [T * k, C] and "
            f"[T, k], k at least 1"
        )
    check_on_device_of(y, weights, "weights")
    order = check_order(order, weights.shape[0], y)
    if order.shape[0] != y.shape[0]:
        raise ValueError(
            f"order has shape {tuple(order.shape)} and y {tuple(y.shape)}; order needs one number per row"
        )
    if offs is not None:
        check_offs(offs, y)
    return combine_op(y, weights, order, offs)
