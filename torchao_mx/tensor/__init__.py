"""Weight tensors in packed formats, and what PyTorch's operators do with them."""

from torchao_mx.tensor import _dispatch  # noqa: F401  registers the operators
from torchao_mx.tensor.mx_tensor import MXTensor

__all__ = ["MXTensor"]
