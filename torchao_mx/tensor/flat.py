"""FlatMXTensor: a packed weight viewed in one dimension, the result of ``w.view(-1)``.

Values packed along one of the last two axes are generally not packed along the flat axis, so only the shape
is flat. FSDP2 keeps one per shard and never reads it; for the values, call ``dequantize``.
"""

from __future__ import annotations

from typing import Any

import torch

from torchao_mx.tensor.storage import Unread, not_implemented, wrapper

aten = torch.ops.aten


class FlatMXTensor(Unread):
    """The values of ``base``, an MXTensor, in one dimension.

    It has a shape, a dtype and a device, and can be viewed in base's shape again. :meth:`dequantize` returns
    the values; anything else that would read them raises NotImplementedError.

    Example:
        >>> import torch
        >>> from torchao_mx import MXFP4, MXTensor
        >>> flat = MXTensor.from_hp(torch.randn(4, 64), MXFP4).flatten()
        >>> flat.shape, flat.dequantize().shape
        (torch.Size([256]), torch.Size([256]))
        >>> flat.view(4, 64)
        MXTensor(shape=(4, 64), mxfp4, orig_dtype=float32, device=cpu)
    """

    base: Any

    def __new__(cls, base: Any):
        self = wrapper(cls, [base.numel()], [1], base.dtype, base.device)
        self.base = base
        return self

    def parts(self) -> list[torch.Tensor]:
        return self.base.parts()

    def dequantize(self, output_dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the values in ``output_dtype``, by default base's ``orig_dtype``.

        Raises:
            TypeError: ``output_dtype`` is not bfloat16, float16 or float32.
        """
        return self.base.dequantize(output_dtype).reshape(-1)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"FlatMXTensor(shape={tuple(self.shape)}, base={self.base})"

    __str__ = __repr__

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func in (aten.detach.default, aten.alias.default):
            return cls(args[0].base)
        if func is aten.view.default and list(args[1]) in ([-1], [args[0].numel()]):
            return cls(args[0].base)
        if func is aten.view.default and list(args[1]) == list(args[0].base.shape):
            return args[0].base.detach()
        raise not_implemented(func, args, kwargs, cls)

    def __reduce_ex__(self, protocol):
        raise NotImplementedError(
            f"{self} cannot be copied or saved: copy or save its base, or its .dequantize() values"
        )
