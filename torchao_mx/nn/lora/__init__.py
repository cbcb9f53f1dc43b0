"""LoRA on frozen packed weights, through torchao's ``quantize_``."""

from torchao_mx.nn.lora import handler  # noqa: F401  registers itself
from torchao_mx.nn.lora.config import MXWeightOnlyLoRAConfig
from torchao_mx.nn.lora.experts import MXLoRAExperts
from torchao_mx.nn.lora.linear import MXLoRALinear

__all__ = ["MXLoRAExperts", "MXLoRALinear", "MXWeightOnlyLoRAConfig"]
