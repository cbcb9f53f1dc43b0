"""What torchao's ``quantize_`` does with our LoRA config."""

from __future__ import annotations

import warnings

from torch import nn
from torchao.quantization.transform_module import register_quantize_module_handler

from torchao_mx.lora.config import MXWeightOnlyLoRAConfig
from torchao_mx.lora.linear import MXLoRALinear


@register_quantize_module_handler(MXWeightOnlyLoRAConfig)
def _lora_linear_handler(module: nn.Module, config: MXWeightOnlyLoRAConfig) -> nn.Module:
    """An :class:`MXLoRALinear` of an ``nn.Linear``; twice is once, with a warning."""
    if isinstance(module, MXLoRALinear):
        warnings.warn(
            f"{module} has adapters already; left as it is. Exclude this layer with filter_fn",
            stacklevel=2,
        )
        return module
    return MXLoRALinear.from_linear(module, config)
