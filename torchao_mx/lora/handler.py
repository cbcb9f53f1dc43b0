"""What torchao's ``quantize_`` does with our LoRA config."""

from __future__ import annotations

import warnings

from torch import nn
from torchao.quantization.transform_module import register_quantize_module_handler

from torchao_mx.layouts import layout_of
from torchao_mx.lora.config import MXWeightOnlyLoRAConfig
from torchao_mx.lora.experts import MXLoRAExperts, check_lora_experts
from torchao_mx.lora.linear import MXLoRALinear, check_lora_linear
from torchao_mx.modules import check_replaceable, in_place_of

_OURS = (MXLoRALinear, MXLoRAExperts)


@register_quantize_module_handler(MXWeightOnlyLoRAConfig)
def _lora_handler(module: nn.Module, config: MXWeightOnlyLoRAConfig) -> nn.Module:
    """An MXLoRALinear of an ``nn.Linear``, an MXLoRAExperts of experts; twice is once, with a warning."""
    if isinstance(module, _OURS):
        warnings.warn(
            f"{module} has adapters already; left as it is. Exclude this layer with filter_fn",
            stacklevel=2,
        )
        return module
    if layout_of(module) is not None:
        return in_place_of(module, MXLoRAExperts.from_experts(module, config))
    return in_place_of(module, MXLoRALinear.from_linear(module, config))


def check_lora_module(module: nn.Module, config: MXWeightOnlyLoRAConfig) -> None:
    """Refuse what the handler would refuse; nothing is changed."""
    if not isinstance(module, _OURS):
        (check_lora_experts if layout_of(module) is not None else check_lora_linear)(module, config)
        check_replaceable(module)
