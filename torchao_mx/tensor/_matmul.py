"""Matrix products with an MXTensor as the weight.

They are taken over at the ``__torch_function__`` level, above autograd, so that our ops bring their own
gradients; the same functions serve the aten level, where C++ callers arrive with autograd already done.
A product quantizes its other operand (``weight.activation``) only where it reduces over the packed axis: a
forward pass does, the product of a gradient with the weight does not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from torchao_mx import ops
from torchao_mx.tensor.mx_tensor import MXTensor

aten = torch.ops.aten


def _packed_last(w: MXTensor) -> MXTensor:
    return w if w.packed_axis == -1 else w.transpose(-2, -1)


def _check_weight(x: Any, w: Any, name: str) -> None:
    if not isinstance(w, MXTensor) or isinstance(x, MXTensor):
        raise NotImplementedError(
            f"{name} takes an MXTensor as its second matrix only, the weight; call .dequantize() on the "
            f"others first"
        )
    if w.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{name}: an MXTensor weight is frozen but requires_grad=True; call "
            f".requires_grad_(False), or train it with QATConfig(step='prepare') before converting"
        )


def _product(
    x: torch.Tensor, w: MXTensor, bias: torch.Tensor | None, *, transposed: bool, name: str
) -> torch.Tensor:
    """``x w^T + bias`` if ``transposed`` else ``x w + bias``."""
    _check_weight(x, w, name)
    base = _packed_last(w)
    reduces_packed = transposed == (w.packed_axis == -1)
    return ops.matmul(
        x,
        base.qdata,
        base.scale,
        base.format,
        per_tensor_scale=base.per_tensor_scale,
        bias=bias,
        transpose_weight=reduces_packed,
        activation=base.activation if reduces_packed else None,
    )


def _linear(
    input: torch.Tensor, weight: MXTensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return _product(input, weight, bias, transposed=True, name="linear")


def _mm(input: torch.Tensor, mat2: MXTensor) -> torch.Tensor:
    return _product(input, mat2, None, transposed=False, name="mm")


def _matmul(input: torch.Tensor, other: MXTensor) -> torch.Tensor:
    return _product(input, other, None, transposed=False, name="matmul")


def _bmm(input: torch.Tensor, mat2: MXTensor) -> torch.Tensor:
    return _product(input, mat2, None, transposed=False, name="bmm")


def _scaled_sum(
    input: torch.Tensor, product: torch.Tensor, beta: float, alpha: float
) -> torch.Tensor:
    return beta * input + (product if alpha == 1 else alpha * product)


def _addmm(
    input: torch.Tensor, mat1: torch.Tensor, mat2: MXTensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    if beta == 1 and alpha == 1 and input.dim() == 1:
        return _product(mat1, mat2, input, transposed=False, name="addmm")
    product = _product(mat1, mat2, None, transposed=False, name="addmm")
    return _scaled_sum(input, product, beta, alpha)


def _baddbmm(
    input: torch.Tensor,
    batch1: torch.Tensor,
    batch2: MXTensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    product = _product(batch1, batch2, None, transposed=False, name="baddbmm")
    return _scaled_sum(input, product, beta, alpha)


def _grouped_mm(
    mat_a: torch.Tensor,
    mat_b: MXTensor,
    *,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    _check_weight(mat_a, mat_b, "grouped_mm")
    if offs is None or bias is not None or out_dtype not in (None, mat_a.dtype):
        raise NotImplementedError(
            "grouped_mm with an MXTensor takes offs and neither bias nor another out_dtype; add the bias "
            "to the result, or call .dequantize() first"
        )
    base = _packed_last(mat_b)
    reduces_packed = mat_b.packed_axis == -2
    return ops.grouped_mm(
        mat_a,
        base.qdata,
        base.scale,
        base.format,
        offs,
        per_tensor_scale=base.per_tensor_scale,
        transpose_weight=reduces_packed,
        activation=base.activation if reduces_packed else None,
    )


_FUNCTIONS = {
    _linear: ([F.linear], [aten.linear.default]),
    _mm: ([torch.mm, torch.Tensor.mm], [aten.mm.default]),
    _matmul: (
        [torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__],
        [aten.matmul.default],
    ),
    _bmm: ([torch.bmm, torch.Tensor.bmm], [aten.bmm.default]),
    _addmm: ([torch.addmm, torch.Tensor.addmm], [aten.addmm.default]),
    _baddbmm: ([torch.baddbmm, torch.Tensor.baddbmm], [aten.baddbmm.default]),
    _grouped_mm: (
        [torch._grouped_mm, *([F.grouped_mm] if hasattr(F, "grouped_mm") else [])],
        [aten._grouped_mm.default],
    ),
}


def _register(function: Any, torch_functions: list[Any], aten_ops: list[Any]) -> None:
    def call(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
        return function(*args, **(kwargs or {}))

    MXTensor.implements_torch_function(torch_functions)(call)
    MXTensor.implements(aten_ops)(call)


for _function, (_torch_functions, _aten_ops) in _FUNCTIONS.items():
    _register(_function, _torch_functions, _aten_ops)
