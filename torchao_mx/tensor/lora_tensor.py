"""LoRATensor: a frozen packed weight plus a low-rank update, taken for one weight.

``torch.baddbmm(W, B, A, alpha=s)`` and ``torch.addmm`` onto an MXTensor make one (``_matmul.py``). PEFT,
given ``target_parameters``, evaluates the former in every forward pass. Nothing is computed then: products
with it go to our fused ops at the ``__torch_function__`` level, above autograd, which so sees the adapters.
The tensor itself has no gradient, and whatever reaches an aten operator is refused, as the adapters'
gradients would be lost there.
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
    """``base + scaling * lora_b @ lora_a``, or the transpose of it, as a weight of matrix products.

    ``linear``, ``mm``, ``addmm``, ``matmul``, ``bmm``, ``baddbmm`` and ``grouped_mm`` take it as their second
    matrix and give gradients to the first, to both adapters and to a bias. The last two axes can be
    swapped, and 3-D ones indexed along the first; :meth:`dequantize` gives the values. It is formed in each
    forward pass and cannot be saved: save ``base`` and the adapters.

    Attributes:
        base: the frozen ``W [N, K]`` or ``[E, N, K]``, packed along its last axis.
        lora_a: ``A [r, K]`` or ``[E, r, K]``; bfloat16, float16 or float32.
        lora_b: ``B [N, r]`` or ``[E, N, r]``, likewise.
        scaling: what ``B A`` is multiplied by; a Python number.
        transposed: whether this tensor is ``[..., K, N]``.

    Raises:
        TypeError: a field of the wrong type or dtype.
        ValueError: fields that do not belong together; a base that quantizes its activations.

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
        """The values in ``output_dtype``, or else in base's ``orig_dtype``, with gradients to the adapters.

        Summed in fp32, of experts one at a time, and rounded once.

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
        """This tensor with some fields exchanged; the class lists them."""
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
            f"{self} is formed in each forward pass and cannot be saved: save its base, lora_a and lora_b, "
            f"or what .dequantize() gives"
        )


def check_base(base: MXTensor) -> None:
    """Refuse a weight that adapters cannot be added to."""
    if not isinstance(base, MXTensor):
        raise TypeError(
            f"the weight of LoRA adapters is a {type(base).__name__}; it is an MXTensor: quantize with "
            f"MXTensor.from_hp"
        )
    if base.dim() > 3 or base.packed_axis != -1:
        raise ValueError(
            f"{base} is not [N, K] or [E, N, K], packed along the last axis, as a weight with LoRA "
            f"adapters is: reshape it, or undo a transpose with .mT"
        )
    if base.activation is not None:
        raise ValueError(
            f"{base} quantizes the other operand of its products, which those with LoRA adapters do not: "
            f"take .replace(activation=None)"
        )


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    # There is no autocast for meta.
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
        raise ValueError(f"t of {w}: it takes two dimensions; use .mT to swap the last two")
    return _swap_axes(w)


@_implements(torch.transpose, torch.Tensor.transpose)
def _transpose(w: LoRATensor, dim0: int, dim1: int) -> LoRATensor:
    rank = w.dim()
    dims = {dim + rank if dim < 0 else dim for dim in (dim0, dim1)}
    if dims != {rank - 2, rank - 1}:
        raise NotImplementedError(
            f"transpose of {w}: only its last two axes can be swapped; call .dequantize() on it first"
        )
    return _swap_axes(w)


@_implements(torch.Tensor.__getitem__)
def _getitem(w: LoRATensor, index: Any) -> LoRATensor:
    """Some experts, or one of them."""
    if w.dim() != 3 or not isinstance(index, (int, slice, list, torch.Tensor)):
        raise NotImplementedError(
            f"indexing of {w}: a 3-D one takes an index of its first axis; call .dequantize() on it first"
        )
    return w.replace(base=w.base[index], lora_a=w.lora_a[index], lora_b=w.lora_b[index])


@_implements(torch.detach, torch.Tensor.detach)
def _detach(w: LoRATensor) -> LoRATensor:
    return w.replace(lora_a=w.lora_a.detach(), lora_b=w.lora_b.detach())


@_implements(torch.clone, torch.Tensor.clone)
def _clone(w: LoRATensor) -> LoRATensor:
    """What torch.compile does to an intermediate result that it traces."""
    return w.replace(base=w.base.clone(), lora_a=w.lora_a.clone(), lora_b=w.lora_b.clone())
