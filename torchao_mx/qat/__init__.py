"""Quantization-aware training, through torchao's ``QATConfig`` and ``quantize_``."""

from torchao_mx.qat.config import MXFakeQuantizeConfig
from torchao_mx.qat.experts import MXFakeQuantizedExperts
from torchao_mx.qat.handler import register_qat_handler
from torchao_mx.qat.linear import MXFakeQuantizedLinear

__all__ = [
    "MXFakeQuantizeConfig",
    "MXFakeQuantizedExperts",
    "MXFakeQuantizedLinear",
    "register_qat_handler",
]
