"""Quantization-aware training, through torchao's ``QATConfig`` and ``quantize_``."""

from torchao_mx.nn.qat.config import MXFakeQuantizeConfig
from torchao_mx.nn.qat.experts import MXFakeQuantizedExperts
from torchao_mx.nn.qat.fake_quantizer import disable_fake_quant, enable_fake_quant
from torchao_mx.nn.qat.handler import register_qat_handler
from torchao_mx.nn.qat.linear import MXFakeQuantizedLinear

__all__ = [
    "MXFakeQuantizeConfig",
    "MXFakeQuantizedExperts",
    "MXFakeQuantizedLinear",
    "disable_fake_quant",
    "enable_fake_quant",
    "register_qat_handler",
]
