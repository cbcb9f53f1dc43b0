"""The ``quantize_`` handler of the LoRA config."""

from __future__ import annotations

import warnings

from torch import nn

from torchao_mx.nn.experts.layouts import layout_of
from torchao_mx.nn.lora.config import MXWeightOnlyLoRAConfig
from torchao_mx.nn.lora.experts import MXLoRAExperts, check_lora_experts
from torchao_mx.nn.lora.linear import MXLoRALinear, check_lora_linear
from torchao_mx.nn.modules import check_replaceable, in_place_of
from torchao_mx.nn.registry import register

_OURS = (MXLoRALinear, MXLoRAExperts)


def _lora_handler(module: nn.Module, config: MXWeightOnlyLoRAConfig) -> nn.Module:
    """Turn an ``nn.Linear`` into an MXLoRALinear, experts into MXLoRAExperts; warn if already done."""
    if isinstance(module, _OURS):
        warnings.warn(
            f"{module} already has adapters and is left as it is. Exclude this layer with filter_fn",
            stacklevel=2,
        )
        return module
    if layout_of(module) is not None:
        return in_place_of(module, MXLoRAExperts.from_experts(module, config))
    return in_place_of(module, MXLoRALinear.from_linear(module, config))


def check_lora_module(module: nn.Module, config: MXWeightOnlyLoRAConfig) -> None:
    """Raise if the handler would; change nothing."""
    if not isinstance(module, _OURS):
        (check_lora_experts if layout_of(module) is not None else check_lora_linear)(module, config)
        check_replaceable(module)


register(MXWeightOnlyLoRAConfig, _lora_handler, check_lora_module)
