"""Matrix products with an MXTensor or a LoRATensor as the weight.

Products are overridden at the ``__torch_function__`` level, above autograd, where the ops bring their own
gradients. The same functions serve the aten level, which C++ callers reach after autograd. A product
quantizes its other operand (``weight.activation``) only if it reduces over the packed axis: a forward pass
does, the product of a gradient with the weight does not.

``addmm`` and ``baddbmm`` *onto* an MXTensor return a LoRATensor, but only above autograd: below it, the
adapters' gradients would be lost.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from torchao_mx import ops, torch_internals
from torchao_mx.tensor.lora_tensor import LoRATensor
from torchao_mx.tensor.mx_tensor import MXTensor

aten = torch.ops.aten
WHOLE = 2**62  # scratch bytes: no limit


def _packed_last(w: MXTensor) -> MXTensor:
    return w if w.packed_axis == -1 else w.transpose(-2, -1)


def check_frozen(w: MXTensor | LoRATensor, name: str) -> None:
    """Raise NotImplementedError if the packed weight ``w`` requires a gradient; it has none."""
    if w.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{name}: the {type(w).__name__} weight has requires_grad=True but cannot be trained; call "
            f".requires_grad_(False), or train it with QATConfig(step='prepare') before converting"
        )


def _check_weight(x: Any, w: Any, name: str) -> None:
    if not isinstance(w, (MXTensor, LoRATensor)) or isinstance(x, (MXTensor, LoRATensor)):
        raise NotImplementedError(
            f"{name} takes an MXTensor or a LoRATensor only as its second matrix, the weight; call "
            f".dequantize() on the other operands first"
        )
    check_frozen(w, name)


def _product(
    x: torch.Tensor,
    w: MXTensor | LoRATensor,
    bias: torch.Tensor | None,
    *,
    transposed: bool,
    name: str,
) -> torch.Tensor:
    """Return ``x w^T + bias`` if ``transposed``, else ``x w + bias``."""
    _check_weight(x, w, name)
    if isinstance(w, LoRATensor):
        return _lora_product(x, w, bias, transposed != w.transposed)
    base = _packed_last(w)
    reduces_packed = transposed == (w.packed_axis == -1)
    activation = base.activation if reduces_packed else None
    return ops.matmul(
        x,
        base.qdata,
        base.scale,
        base.format,
        per_tensor_scale=base.per_tensor_scale,
        bias=bias,
        transpose_weight=reduces_packed,
        activation=activation,
        # Decode the whole weight and call F.linear, as QAT does: a converted layer then equals the trained
        # one bit for bit. The fused kernel sums in another order. Batches have only one strategy.
        strategy="unpack" if activation is None and base.dim() == 2 else "auto",
        max_scratch_bytes=WHOLE,
    )


def _lora_product(
    x: torch.Tensor, w: LoRATensor, bias: torch.Tensor | None, reduces_packed: bool
) -> torch.Tensor:
    base = w.base
    packed, adapters = (base.qdata, base.scale, base.format), (w.lora_a, w.lora_b, w.scaling)
    options = {"per_tensor_scale": base.per_tensor_scale, "transpose_weight": reduces_packed}
    if base.dim() == 2:
        return ops.lora_matmul(x, *packed, *adapters, bias=bias, **options)
    experts = base.shape[0]
    if x.dim() != 3 or x.shape[0] != experts:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; a weight of {experts} matrices needs x [{experts}, M, "
            f"{base.shape[-1 if reduces_packed else -2]}]: expand or reshape x"
        )
    # A batch is a set of groups of equal size.
    rows = x.shape[1]
    offs = torch.arange(1, experts + 1, dtype=torch.int32, device=x.device) * rows
    bias = None if bias is None else bias.expand(experts, -1)
    y = ops.lora_grouped_mm(x.flatten(0, 1), *packed, offs, *adapters, bias=bias, **options)
    return y.view(experts, rows, y.shape[-1])


def _linear(
    input: torch.Tensor, weight: MXTensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return _product(input, weight, bias, transposed=True, name="linear")


def _mm(input: torch.Tensor | MXTensor, mat2: torch.Tensor | MXTensor) -> torch.Tensor:
    return _two_sided_product(input, mat2, "mm")


def _matmul(input: torch.Tensor | MXTensor, other: torch.Tensor | MXTensor) -> torch.Tensor:
    return _two_sided_product(input, other, "matmul")


def _two_sided_product(a: torch.Tensor, b: torch.Tensor, name: str) -> torch.Tensor:
    """Return ``a b`` with the weight on either side: on the left, ``W x`` is ``(x^T W^T)^T``."""
    if (
        isinstance(a, (MXTensor, LoRATensor))
        and a.dim() == 2
        and not isinstance(b, (MXTensor, LoRATensor))
    ):
        if b.dim() < 2:
            return _product(b, a, None, transposed=True, name=name)
        return _product(b.mT, a, None, transposed=True, name=name).mT
    return _product(a, b, None, transposed=False, name=name)


def _bmm(input: torch.Tensor, mat2: MXTensor) -> torch.Tensor:
    return _product(input, mat2, None, transposed=False, name="bmm")


def _scaled_sum(
    input: torch.Tensor, product: torch.Tensor, beta: float, alpha: float
) -> torch.Tensor:
    product = product if alpha == 1 else alpha * product
    # As in torch, beta == 0 ignores the input, NaN included.
    return product if beta == 0 else beta * input + product


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


def _with_update(
    w: MXTensor, lhs: torch.Tensor, rhs: torch.Tensor, beta: float, alpha: float, name: str
) -> LoRATensor:
    """Return ``w + alpha * lhs @ rhs`` for low-rank factors, without computing it."""
    check_frozen(w, name)
    if beta != 1:
        raise NotImplementedError(
            f"{name} onto {w} with beta={beta}; a low-rank update of a packed weight needs beta=1: call "
            f".dequantize() on it first"
        )
    if w.packed_axis == -1:
        return LoRATensor(w, rhs, lhs, alpha)
    return LoRATensor(w.mT, lhs.mT, rhs.mT, alpha, transposed=True)


def _takes_update(input: Any, factor: Any) -> bool:
    return isinstance(input, MXTensor) and not isinstance(factor, (MXTensor, LoRATensor))


def _addmm_or_update(
    input: torch.Tensor,
    mat1: torch.Tensor,
    mat2: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    if _takes_update(input, mat2):
        return _with_update(input, mat1, mat2, beta, alpha, "addmm")
    return _addmm(input, mat1, mat2, beta=beta, alpha=alpha)


def _baddbmm_or_update(
    input: torch.Tensor,
    batch1: torch.Tensor,
    batch2: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    if _takes_update(input, batch2):
        return _with_update(input, batch1, batch2, beta, alpha, "baddbmm")
    return _baddbmm(input, batch1, batch2, beta=beta, alpha=alpha)


def _grouped_mm(
    mat_a: torch.Tensor,
    mat_b: MXTensor | LoRATensor,
    *,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    _check_weight(mat_a, mat_b, "grouped_mm")
    if offs is None or out_dtype not in (None, mat_a.dtype):
        raise NotImplementedError(
            "grouped_mm with a packed weight needs offs, and out_dtype must be mat_a's: convert the result, "
            "use bmm for groups of equal size, or call .dequantize() first"
        )
    if isinstance(mat_b, LoRATensor):
        base = mat_b.base
        return ops.lora_grouped_mm(
            mat_a,
            base.qdata,
            base.scale,
            base.format,
            offs,
            mat_b.lora_a,
            mat_b.lora_b,
            mat_b.scaling,
            per_tensor_scale=base.per_tensor_scale,
            bias=bias,
            transpose_weight=mat_b.transposed,
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
        bias=bias,
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
    _addmm: ([], [aten.addmm.default]),
    _addmm_or_update: ([torch.addmm, torch.Tensor.addmm], []),
    _baddbmm: ([], [aten.baddbmm.default]),
    _baddbmm_or_update: ([torch.baddbmm, torch.Tensor.baddbmm], []),
    _grouped_mm: (
        torch_internals.GROUPED_MMS,
        torch_internals.ATEN_GROUPED_MM,
    ),
}


def _register(function: Any, torch_functions: list[Any], aten_ops: list[Any]) -> None:
    def call(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
        return function(*args, **(kwargs or {}))

    MXTensor.implements_torch_function(torch_functions)(call)
    MXTensor.implements(aten_ops)(call)
    LoRATensor.functions.update(dict.fromkeys(torch_functions, function))


for _function, (_torch_functions, _aten_ops) in _FUNCTIONS.items():
    _register(_function, _torch_functions, _aten_ops)
