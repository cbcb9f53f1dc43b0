"""Weight tensors in packed formats, and what PyTorch's operators do with them."""

from torchao_mx.tensor import _dispatch, _matmul, _sharding  # noqa: F401  they register operators
from torchao_mx.tensor.lora_tensor import LoRATensor
from torchao_mx.tensor.mx_tensor import MXTensor

__all__ = ["LoRATensor", "MXTensor"]
