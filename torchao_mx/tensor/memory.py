"""The memory size that an MXTensor reports: its packed bytes, scales included."""

from __future__ import annotations

import torch

from torchao_mx.tensor.mx_tensor import MXTensor
from torchao_mx.tensor.storage import answers


def _nbytes(x: MXTensor, owner: type | None = None) -> int:
    return sum(part.nbytes for part in x.parts())


def _element_size(x: MXTensor, owner: type | None = None) -> float:
    """Return bytes per value, a fraction: ``numel() * element_size()`` is ``nbytes``."""
    return _nbytes(x) / x.numel() if x.numel() else x.dtype.itemsize


_ANSWERS = {
    **answers(MXTensor.parts),
    torch.Tensor.element_size: _element_size,
    torch.Tensor.itemsize.__get__: _element_size,
    torch.Tensor.nbytes.__get__: _nbytes,
}
for _function, _answer in _ANSWERS.items():
    MXTensor.implements_torch_function(_function)(
        lambda func, types, args, kwargs, answer=_answer: answer(*args, **kwargs)
    )
