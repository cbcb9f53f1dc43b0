"""LoRATensor: a frozen packed weight plus a low-rank update, used as one weight.

``torch.baddbmm(W, B, A, alpha=s)`` and ``torch.addmm`` onto an MXTensor return one (``matmul.py``). PEFT
with ``target_parameters`` calls ``baddbmm`` in every forward pass. That call computes nothing. Products with
the LoRATensor go to the fused ops at the ``__torch_function__`` level, above autograd, so the adapters get
gradients. The tensor itself has none: aten operators raise, because they would lose the adapters' gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from torchao_mx.errors import check_high_precision
from torchao_mx.ops.core.arguments import adapters_of
from torchao_mx.tensor.mx_tensor import MXTensor
from torchao_mx.tensor.storage import Unread, wrapper


class LoRATensor(Unread):
    """``base + scaling * lora_b @ lora_a``, or its transpose, as the weight of matrix products.

    ``linear``, ``mm``, ``addmm``, ``matmul``, ``bmm``, ``baddbmm`` and ``grouped_mm`` take it as their second
    matrix. Gradients go to the first matrix, both adapters and the bias. The last two axes can be swapped; a
    3-D tensor can be indexed along its first axis; :meth:`dequantize` returns the values. Each forward pass
    forms a new one, which cannot be saved: save ``base`` and the adapters.

    Attributes:
        base: the frozen ``W [N, K]`` or ``[E, N, K]``, packed along its last axis.
        lora_a: ``A [r, K]`` or ``[E, r, K]``; bfloat16, float16 or float32.
        lora_b: ``B [N, r]`` or ``[E, N, r]``, likewise.
        scaling: the factor of ``B A``; a Python number.
        transposed: whether this tensor is ``[..., K, N]``.

    Raises:
        TypeError: a field has the wrong type or dtype.
        ValueError: the fields do not fit together, or the base quantizes activations.

    Example:
        >>> import torch
        >>> from torchao_mx import MXFP4, MXTensor
        >>> w = MXTensor.from_hp(torch.randn(128, 256), MXFP4)
        >>> a, b = torch.randn(8, 256, requires_grad=True), torch.zeros(128, 8, requires_grad=True)
        >>> weight = torch.addmm(w, b, a, alpha=2.0)
        >>> weight
        LoRATensor(shape=(128, 256), r=8, scaling=2.0, base=mxfp4, orig_dtype=float32, device=cpu)
        >>> (torch.randn(4, 256) @ weight.t()).sum().backward()
        >>> b.grad.shape
        torch.Size([128, 8])
    """

    base: MXTensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    transposed: bool

    def __new__(
        cls,
        base: MXTensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: float,
        transposed: bool = False,
    ):
        check_base(base)
        for name, adapter in (("lora_a", lora_a), ("lora_b", lora_b)):
            if adapter.device != base.device:
                raise ValueError(
                    f"{name} is on {adapter.device} and the weight on {base.device}; move one with "
                    f".to(device)"
                )
        adapters_of(base.qdata, base.qdata, base.format, lora_a, lora_b, scaling, True)
        shape, strides = list(base.shape), list(base.stride())
        if transposed:
            shape[-2:], strides[-2:] = shape[:-3:-1], strides[:-3:-1]
        self = wrapper(cls, shape, strides, base.dtype, base.device)
        self.base = base
        self.lora_a = lora_a
        self.lora_b = lora_b
        self.scaling = scaling
        self.transposed = transposed
        return self

    def parts(self) -> list[torch.Tensor]:
        return [*self.base.parts(), self.lora_a, self.lora_b]

    def dequantize(self, output_dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the values in ``output_dtype``, by default base's ``orig_dtype``; adapters get gradients.

        Sums are in fp32, one expert at a time, and rounded once.

        Raises:
            TypeError: ``output_dtype`` is not bfloat16, float16 or float32.
        """
        dtype = self.dtype if output_dtype is None else output_dtype
        check_high_precision(dtype, "output_dtype")
        if self.dim() == 3:
            return torch.stack([self[e].dequantize(dtype) for e in range(len(self))])
        a, b = self.lora_a.float(), self.lora_b.float()
        with _without_autocast(self.device.type):
            values = torch.addmm(self.base.dequantize(torch.float32), b, a, alpha=self.scaling)
        values = values.to(dtype)
        return values.mT if self.transposed else values

    def replace(self, **fields: Any) -> LoRATensor:
        """Return this tensor with some of its fields replaced; the class lists them."""
        names = ("base", "lora_a", "lora_b", "scaling", "transposed")
        return LoRATensor(**{name: getattr(self, name) for name in names} | fields)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return (
            f"LoRATensor(shape={tuple(self.shape)}, r={self.lora_a.shape[-2]}, scaling={self.scaling}, "
            f"base={self.base._quantization_type()}{', transposed' if self.transposed else ''}, "
            f"device={self.device})"
        )

    __str__ = __repr__

    def __reduce_ex__(self, protocol):
        raise NotImplementedError(
            f"{self} exists only within a forward pass and cannot be saved: save its base, lora_a and "
            f"lora_b, or its .dequantize() values"
        )


def check_base(base: MXTensor) -> None:
    """Raise unless LoRA adapters can be added to ``base``."""
    if not isinstance(base, MXTensor):
        raise TypeError(
            f"the base of LoRA adapters is a {type(base).__name__}; it must be an MXTensor: quantize it "
            f"with MXTensor.from_hp"
        )
    if base.dim() > 3 or base.packed_axis != -1:
        raise ValueError(
            f"{base} cannot take LoRA adapters; the weight must be [N, K] or [E, N, K], packed along the "
            f"last axis: reshape it, or undo a transpose with .mT"
        )
    if base.activation is not None:
        raise ValueError(
            f"{base} quantizes the other operand of its products, which LoRA products cannot do: use "
            f".replace(activation=None)"
        )


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    # The meta device has no autocast.
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _implements(*torch_functions: Callable) -> Callable:
    def decorator(function: Callable) -> Callable:
        LoRATensor.functions.update(dict.fromkeys(torch_functions, function))
        return function

    return decorator


@_implements(torch.Tensor.mT.__get__)
def _swap_axes(w: LoRATensor, owner: type | None = None) -> LoRATensor:
    return w.replace(transposed=not w.transposed)


@_implements(torch.t, torch.Tensor.t, torch.Tensor.T.__get__)
def _t(w: LoRATensor, owner: type | None = None) -> LoRATensor:
    if w.dim() != 2:
        raise ValueError(f"t of {w}: t needs two dimensions; use .mT to swap the last two")
    return _swap_axes(w)


@_implements(torch.transpose, torch.Tensor.transpose)
def _transpose(w: LoRATensor, dim0: int, dim1: int) -> LoRATensor:
    rank = w.dim()
    dims = {dim + rank if dim < 0 else dim for dim in (dim0, dim1)}
    if dims != {rank - 2, rank - 1}:
        raise NotImplementedError(
            f"transpose of {w}: only the last two axes can be swapped; call .dequantize() on it first"
        )
    return _swap_axes(w)


@_implements(torch.Tensor.__getitem__)
def _getitem(w: LoRATensor, index: Any) -> LoRATensor:
    """Select one expert, or several."""
    if w.dim() != 3 or not isinstance(index, (int, slice, list, torch.Tensor)):
        raise NotImplementedError(
            f"indexing of {w}: only axis 0 of a 3-D weight can be indexed; call .dequantize() on it first"
        )
    return w.replace(base=w.base[index], lora_a=w.lora_a[index], lora_b=w.lora_b[index])


@_implements(torch.detach, torch.Tensor.detach)
def _detach(w: LoRATensor) -> LoRATensor:
    return w.replace(lora_a=w.lora_a.detach(), lora_b=w.lora_b.detach())


@_implements(torch.clone, torch.Tensor.clone)
def _clone(w: LoRATensor) -> LoRATensor:
    """Clone all fields; torch.compile does this to the intermediate results that it traces."""
    return w.replace(base=w.base.clone(), lora_a=w.lora_a.clone(), lora_b=w.lora_b.clone())
