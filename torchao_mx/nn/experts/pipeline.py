"""A layer of experts, as a pipeline over one grouped-matmul seam.

::

    route     top_k_index [T, k] -> order [T k], offs [E]   sorted by expert, on the device
    up        hidden [T, H]      -> gate_up [T k, 2 I]      gather, bias and LoRA fused into the GEMM
    activate  gate_up            -> act [T k, I]
    down      act                -> y [T k, H]              bias and LoRA fused
    combine   y, weights [T, k]  -> out [T, H]              sums each token's rows in slot order

No row count reaches the host, so the layer is CUDA-graph safe. No sum depends on timing.

Backward keeps the packed weights by reference, hidden ``[T, H]`` once (not as T k rows), gate_up, from which
it recomputes the activation, and y for the gradient of the routing weights. Trained adapters add
``x A^T [T k, r]``; trained down adapters also add act.

Weights follow ``torch._grouped_mm``: ``w [E, in, out]``, ``x @ w[e]``; with ``transpose_weight`` they are
``[E, out, in]``. (``w.mT`` would express the same, but torch.compile loses the fields of a packed view.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from torchao_mx import ops, torch_internals
from torchao_mx.formats import BlockFormat
from torchao_mx.ops.moe.gather import tokens_of
from torchao_mx.tensor import LoRATensor, MXTensor
from torchao_mx.tensor.matmul import check_frozen

Activation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class AdaptedWeight(NamedTuple):
    """``W [E, out, in] = base + scaling * lora_b @ lora_a``, for products ``x W^T``.

    Like a :class:`LoRATensor`, but not a tensor, so that torch.compile can trace a module that creates it.
    """

    base: MXTensor  # packed along in: [E, out, in], or its transpose, [E, in, out]
    lora_a: torch.Tensor  # [E, r, in]
    lora_b: torch.Tensor  # [E, out, r]
    scaling: float


# (x, offs, order, bias) -> y, for a weight whose owner computes the product.
Product = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor
]
Weight = torch.Tensor | AdaptedWeight | Product


def grouped_linear(
    x: torch.Tensor,
    weight: Weight,
    offs: torch.Tensor,
    *,
    transpose_weight: bool = False,
    order: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Multiply rows ``offs[e - 1] : offs[e]`` of x by expert e of any weight and add its bias.

    Args:
        x: ``[R, C]`` in the order of the groups; with an ``order``, ungrouped ``[T, C]``.
        weight: ``[E, C, D]``: an :class:`MXTensor`, one with adapters (a :class:`LoRATensor` or an
            :class:`AdaptedWeight`), or a plain tensor; adapters and plain tensors get gradients. Or a
            function that computes the product.
        offs: int32 ``[E]``, as in :func:`torchao_mx.ops.grouped_mm`.
        transpose_weight: whether the weight is ``[E, D, C]``.
        order: int32 ``[R]``, as in :func:`torchao_mx.ops.grouped_mm`.
        bias: ``[E, D]``.
        options: options of a packed weight's op: ``strategy``, ``max_scratch_bytes`` and, with adapters,
            ``compute_dtype`` and ``grad_compute_dtype``.

    Returns:
        ``[R, D]`` in x's dtype; unassigned rows, after ``offs[-1]``, are zero.

    Raises:
        NotImplementedError: x is not bfloat16 with a plain weight on a GPU, or a packed weight requires a
            gradient.
        TypeError, ValueError: as in the ops.
    """
    if isinstance(weight, (LoRATensor, AdaptedWeight)):
        check_frozen(weight.base, "grouped_linear")
        is_adapted = isinstance(weight, AdaptedWeight)
        return ops.lora_grouped_mm(
            x, *_packed(weight.base), offs, weight.lora_a, weight.lora_b, weight.scaling, order=order,
            bias=bias, per_tensor_scale=weight.base.per_tensor_scale,
            transpose_weight=is_adapted or transpose_weight != weight.transposed, **options,
        )  # fmt: skip
    if isinstance(weight, MXTensor):
        check_frozen(weight, "grouped_linear")
        reduces_packed = transpose_weight == (weight.packed_axis == -1)
        return ops.grouped_mm(
            x, *_packed(weight), offs, order=order, bias=bias, per_tensor_scale=weight.per_tensor_scale,
            transpose_weight=reduces_packed, activation=weight.activation if reduces_packed else None,
            **options,
        )  # fmt: skip
    if options:
        raise TypeError(
            f"the weight is a {type(weight).__name__}; only packed weights take {', '.join(options)}"
        )
    if not isinstance(weight, torch.Tensor):
        return weight(x, offs, order, bias)
    return _plain_grouped_mm(x, weight.mT if transpose_weight else weight, offs, order, bias)


def _packed(w: MXTensor) -> tuple[torch.Tensor, torch.Tensor, BlockFormat]:
    """Return the fields of ``w``, packed axis last; torch.compile cannot see those of ``w.mT``."""
    if w.packed_axis == -1:
        return w.qdata, w.scale, w.format
    return w.qdata.transpose(-2, -1), w.scale.transpose(-2, -1), w.format


def _plain_grouped_mm(
    x: torch.Tensor,
    weight: torch.Tensor,
    offs: torch.Tensor,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Run ``torch._grouped_mm`` with unassigned rows zero in forward and backward."""
    if x.is_cuda and x.dtype != torch.bfloat16:
        raise NotImplementedError(
            f"x has dtype {x.dtype} and the experts are not quantized; torch._grouped_mm needs bfloat16 on "
            f"a GPU: use .bfloat16(), or quantize the experts"
        )
    rows = x if order is None else x[tokens_of(order, len(x))]
    if len(rows) == 0:
        return rows @ weight.sum(0)  # gradients are zero rather than None
    owned = (torch.arange(len(rows), device=x.device) < offs[-1])[:, None]
    y = torch_internals.grouped_mm(rows.where(owned, 0), weight.to(x.dtype), offs=offs)
    if bias is not None:
        expert = torch.searchsorted(offs, torch.arange(len(rows), device=x.device), right=True)
        y = y + bias.to(y.dtype)[expert.clamp(max=len(bias) - 1)]
    return y.where(owned, 0)


def experts(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    activation: Activation,
    *,
    n_experts: int | None = None,
    transpose_weight: bool = False,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Compute a layer's output ``[T, H]``; hidden, top_k_weights, biases and trained weights get gradients.

    Args:
        hidden: ``[T, H]``.
        top_k_index: ``[T, k]`` expert ids; out-of-range ids add nothing.
        top_k_weights: ``[T, k]``, floating.
        gate_up: ``[E, H, D]``, a weight of :func:`grouped_linear`.
        down: ``[E, I, H]``, likewise.
        activation: ``(gate_up [T k, D], offs) -> [T k, I]``; it may turn the unassigned rows, which are
            zero, into anything.
        n_experts: E; None to take it from gate_up, a tensor.
        transpose_weight: whether the two are ``[E, D, H]`` and ``[E, H, I]``.
        gate_up_bias: ``[E, D]``.
        down_bias: ``[E, H]``.
        options: as in :func:`grouped_linear`, for both products.
    """
    order, offs = ops.route(top_k_index, gate_up.shape[0] if n_experts is None else n_experts)
    options["transpose_weight"] = transpose_weight
    x = grouped_linear(hidden, gate_up, offs, order=order, bias=gate_up_bias, **options)
    y = grouped_linear(activation(x, offs), down, offs, bias=down_bias, **options)
    return ops.combine(y, top_k_weights, order, offs=offs)
