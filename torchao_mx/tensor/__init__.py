"""Weight tensors in packed formats, and their PyTorch operators."""

from torchao_mx.tensor import (  # noqa: F401  they register operators
    averages,
    dispatch,
    matmul,
    memory,
    sharding,
)
from torchao_mx.tensor.lora_tensor import LoRATensor
from torchao_mx.tensor.mx_tensor import MXTensor

__all__ = ["LoRATensor", "MXTensor"]
