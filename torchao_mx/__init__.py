"""Train in microscaling formats (MXFP4, MXFP8, NVFP4) with configs for torchao's ``quantize_``."""

from torchao_mx import ops
from torchao_mx.formats import (
    MXFP4,
    MXFP8_E4M3,
    MXFP8_E5M2,
    NVFP4,
    BlockFormat,
    QuantizeSpec,
    ScaleCalculationMode,
)
from torchao_mx.nn.check_model import check_model, quantize_
from torchao_mx.nn.experts.layouts import register_experts
from torchao_mx.nn.experts.module import MXExperts, is_experts
from torchao_mx.nn.linear_checks import is_linear
from torchao_mx.nn.lora import MXLoRAExperts, MXLoRALinear, MXWeightOnlyLoRAConfig
from torchao_mx.nn.ptq import MXDynamicActivationMXWeightConfig, MXWeightOnlyConfig
from torchao_mx.nn.qat import (
    MXFakeQuantizeConfig,
    MXFakeQuantizedExperts,
    MXFakeQuantizedLinear,
    disable_fake_quant,
    enable_fake_quant,
    register_qat_handler,
)
from torchao_mx.nn.recipes import (
    NVFP4ForwardMXFP8BackwardConfig,
    NVFP4MXFP8Experts,
    NVFP4MXFP8Linear,
)
from torchao_mx.tensor import MXTensor

__version__ = "0.1.0"

__all__ = [
    "MXFP4",
    "MXFP8_E4M3",
    "MXFP8_E5M2",
    "NVFP4",
    "BlockFormat",
    "MXDynamicActivationMXWeightConfig",
    "MXExperts",
    "MXFakeQuantizeConfig",
    "MXFakeQuantizedExperts",
    "MXFakeQuantizedLinear",
    "MXLoRAExperts",
    "MXLoRALinear",
    "MXTensor",
    "MXWeightOnlyConfig",
    "MXWeightOnlyLoRAConfig",
    "NVFP4ForwardMXFP8BackwardConfig",
    "NVFP4MXFP8Experts",
    "NVFP4MXFP8Linear",
    "QuantizeSpec",
    "ScaleCalculationMode",
    "check_model",
    "disable_fake_quant",
    "enable_fake_quant",
    "is_experts",
    "is_linear",
    "ops",
    "quantize_",
    "register_experts",
]

register_qat_handler()
