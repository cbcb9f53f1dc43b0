"""Post-training quantization: configs for torchao's ``quantize_``.

The handlers replace ``linear.weight`` with a frozen :class:`MXTensor`; the module stays an ``nn.Linear``.
Modules of experts become :class:`MXExperts`.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchao.core.config import AOBaseConfig

from torchao_mx.formats import BlockFormat, QuantizeSpec, ScaleCalculationMode
from torchao_mx.nn.experts.layouts import layout_of
from torchao_mx.nn.experts.module import check_experts, is_packed, local_of, quantize_experts
from torchao_mx.nn.linear_checks import check_linear
from torchao_mx.nn.modules import check_not_in_training, check_replaceable, in_place_of
from torchao_mx.nn.registry import Specs, register, register_base
from torchao_mx.tensor import MXTensor


@dataclass(frozen=True)
class MXWeightOnlyConfig(AOBaseConfig):
    """Quantize weights to a block format and leave activations unquantized (W4A16, W8A16).

    gpt-oss, DeepSeek-V4 and Kimi-class experts ship in this form. Products decode the weight and run in the
    activation's dtype, on the CPU and on CUDA GPUs from Ampere on.

    Args:
        dtype: element type: ``torch.float4_e2m1fn_x2``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        block_size: 32 for the MX formats; 16 with 4-bit elements for NVFP4.
        scaling_mode: how an E8M0 scale follows from a block's largest magnitude.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: no format has this dtype with this block size.

    Example:
        >>> import torch
        >>> from torchao.quantization import quantize_
        >>> from torchao_mx import MXWeightOnlyConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32, dtype=torch.bfloat16))
        >>> quantize_(model, MXWeightOnlyConfig())
        >>> model[0].weight
        MXTensor(shape=(32, 64), mxfp4, orig_dtype=bfloat16, device=cpu)
    """

    dtype: torch.dtype = torch.float4_e2m1fn_x2
    block_size: int = 32
    scaling_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL

    def __post_init__(self) -> None:
        self.weight_spec  # validates

    @property
    def weight_spec(self) -> QuantizeSpec:
        return QuantizeSpec(BlockFormat.from_dtype(self.dtype, self.block_size), self.scaling_mode)

    @property
    def activation_spec(self) -> None:
        return None


@dataclass(frozen=True)
class MXDynamicActivationMXWeightConfig(AOBaseConfig):
    """Quantize weights to a block format, and activations as they enter each product.

    It has the fields of torchao's config of this name but fewer restrictions: the two dtypes may differ
    (W4A8), weights may be fp16 or fp32, and no particular GPU is needed. Products multiply the dequantized
    operands in the activation's dtype. Two large MXFP4 operands go to 8-bit tensor cores instead if the GPU
    has them, which represent their values exactly.

    Args:
        activation_dtype: element type of the activations.
        weight_dtype: element type of the weights.
        block_size: block size of both; 32 for the MX formats, 16 with 4-bit elements for NVFP4.
        scaling_mode: how an E8M0 scale follows from a block's largest magnitude.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: no format has one of the dtypes with this block size.

    Example:
        >>> import torch
        >>> from torchao.quantization import quantize_
        >>> from torchao_mx import MXDynamicActivationMXWeightConfig
        >>> w4a8 = MXDynamicActivationMXWeightConfig(torch.float8_e4m3fn, torch.float4_e2m1fn_x2)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> quantize_(model, w4a8)
        >>> model(torch.randn(3, 64)).shape
        torch.Size([3, 32])
    """

    activation_dtype: torch.dtype = torch.float8_e4m3fn
    weight_dtype: torch.dtype = torch.float8_e4m3fn
    block_size: int = 32
    scaling_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL

    def __post_init__(self) -> None:
        self.weight_spec, self.activation_spec  # validate

    @property
    def weight_spec(self) -> QuantizeSpec:
        return QuantizeSpec(
            BlockFormat.from_dtype(self.weight_dtype, self.block_size), self.scaling_mode
        )

    @property
    def activation_spec(self) -> QuantizeSpec:
        return QuantizeSpec(
            BlockFormat.from_dtype(self.activation_dtype, self.block_size), self.scaling_mode
        )


PTQConfig = MXWeightOnlyConfig | MXDynamicActivationMXWeightConfig


def quantize_linear(
    module: nn.Module, weight: QuantizeSpec, activation: QuantizeSpec | None
) -> nn.Module:
    """Replace ``module.weight`` with its MXTensor in place; warn and do nothing if it is one already."""
    if isinstance(module, nn.Linear) and isinstance(module.weight, MXTensor):
        warnings.warn(
            f"{module} already holds an MXTensor and is left as it is. Quantize a model once, or "
            f"exclude this layer with filter_fn",
            stacklevel=2,
        )
        return module
    check_linear(module, weight, activation)
    quantized = MXTensor.from_hp(
        module.weight.detach(), weight.format, weight.scaling_mode, activation=activation
    )
    module.weight = nn.Parameter(quantized, requires_grad=False)
    # A partial, because a method bound to the instance would not survive pickling.
    module.extra_repr = functools.partial(_extra_repr, module)
    return module


def check_ptq_module(module: nn.Module, config: PTQConfig) -> None:
    """Raise if the handler would; accept packed modules unchecked and change nothing."""
    check_not_in_training(module)
    if layout_of(module) is not None:
        if not is_packed(module):
            check_experts(module, config.weight_spec, config.activation_spec)
            check_replaceable(module)
    elif not (isinstance(module, nn.Linear) and isinstance(module.weight, MXTensor)):
        check_linear(module, config.weight_spec, config.activation_spec)


def _extra_repr(module: Any) -> str:
    text, weight = type(module).extra_repr(module), local_of(module.weight)
    if not isinstance(weight, MXTensor):  # the weight was replaced
        return text
    return f"{text}, weight={weight._quantization_type()}"


def _quantize_handler(module: nn.Module, config: PTQConfig) -> nn.Module:
    check_not_in_training(module)
    if layout_of(module) is None:
        return quantize_linear(module, config.weight_spec, config.activation_spec)
    return in_place_of(module, quantize_experts(module, config.weight_spec, config.activation_spec))


def _specs_of(config: PTQConfig) -> Specs:
    return config.activation_spec, config.weight_spec


for _config in (MXWeightOnlyConfig, MXDynamicActivationMXWeightConfig):
    register(_config, _quantize_handler, check_ptq_module, changes_weight_alone=True)
    register_base(_config, _specs_of)
