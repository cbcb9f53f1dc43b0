"""Post-training quantization: configs for torchao's ``quantize_``.

The handlers replace ``linear.weight`` by a frozen :class:`MXTensor`; the module stays an ``nn.Linear``.
Modules of experts become :class:`MXExperts`.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from torchao_mx.checks import check_blocks, check_high_precision
from torchao_mx.experts import (
    check_experts,
    is_packed,
    local_of,
    quantize_experts,
)
from torchao_mx.formats import BlockFormat, QuantizeSpec, ScaleCalculationMode
from torchao_mx.layouts import layout_of
from torchao_mx.modules import check_replaceable, in_place_of
from torchao_mx.tensor import MXTensor


@dataclass(frozen=True)
class MXWeightOnlyConfig(AOBaseConfig):
    """Weights in a block format, activations as they are (W4A16, W8A16).

    What gpt-oss, DeepSeek-V4 and Kimi-class experts ship in. Products decode the weight and run in the
    activation's dtype, on the CPU and on any CUDA GPU from Ampere up.

    Args:
        dtype: element type: ``torch.float4_e2m1fn_x2``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        block_size: 32 for the MX formats; 16 with 4-bit elements is NVFP4.
        scaling_mode: how an E8M0 scale follows from a block's largest magnitude.

    Raises:
        TypeError: a field of the wrong type.
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
    """Weights in a block format, and activations quantized on the way into each product.

    The fields of torchao's config of this name, without its demands: the two dtypes may differ (W4A8),
    weights may be fp16 or fp32, and no particular GPU is needed. A product is computed from the dequantized
    operands in the activation's dtype; two large MXFP4 operands go to 8-bit tensor cores instead where
    the GPU has them, which takes nothing from their values.

    Args:
        activation_dtype: element type of the activations.
        weight_dtype: element type of the weights.
        block_size: of both; 32 for the MX formats, 16 with 4-bit elements for NVFP4.
        scaling_mode: how an E8M0 scale follows from a block's largest magnitude.

    Raises:
        TypeError: a field of the wrong type.
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


def is_linear(module: nn.Module, fqn: str = "") -> bool:
    """A ``filter_fn`` for ``quantize_``: every ``nn.Linear`` with a forward of its own kind.

    Example:
        >>> import torch
        >>> from torchao_mx import is_linear
        >>> is_linear(torch.nn.Linear(32, 32)), is_linear(torch.nn.LayerNorm(32))
        (True, False)
    """
    return isinstance(module, nn.Linear) and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )


def check_linear(module: nn.Module, weight: QuantizeSpec, activation: QuantizeSpec | None) -> None:
    """Refuse a module whose weight cannot be quantized so; nothing is changed."""
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{type(module).__name__} is not an nn.Linear{_what_to_select(module)}")
    name = (
        f"{type(module).__name__}(in_features={module.in_features}, "
        f"out_features={module.out_features})"
    )
    for what in ("weight", "bias"):
        if what not in module._parameters:
            raise TypeError(
                f"{name}: its {what} is not a parameter but computed, as by a parametrization or "
                f"weight_norm; remove that first, or leave this layer out with filter_fn"
            )
    if isinstance(module.weight, DTensor):
        raise TypeError(
            f"{name}: its weight is a DTensor, of which this rank has a part; call quantize_ before it is "
            f"split, or load the whole state (torch.distributed.checkpoint.state_dict, full_state_dict=True) "
            f"into a model that is not, and quantize or convert that"
        )
    if type(module.weight.data) is not torch.Tensor:
        raise TypeError(
            f"{name}: its weight is a {type(module.weight.data).__name__} already; quantize from a "
            f"high-precision weight, or leave this layer out with filter_fn"
        )
    check_high_precision(module.weight.dtype, f"{name}: its weight")
    check_blocks(module.weight.shape, weight.format, -1, f"{name}: its weight")
    if activation is not None:
        check_blocks((module.in_features,), activation.format, -1, f"{name}: its input")


def quantize_linear(
    module: nn.Module, weight: QuantizeSpec, activation: QuantizeSpec | None
) -> nn.Module:
    """Replace ``module.weight`` by its MXTensor, in place; twice is once, with a warning."""
    if isinstance(module, nn.Linear) and isinstance(module.weight, MXTensor):
        warnings.warn(
            f"{module} holds an MXTensor already; left as it is. Quantize a model once, or exclude "
            f"this layer with filter_fn",
            stacklevel=2,
        )
        return module
    check_linear(module, weight, activation)
    quantized = MXTensor.from_hp(
        module.weight.detach(), weight.format, weight.scaling_mode, activation=activation
    )
    module.weight = nn.Parameter(quantized, requires_grad=False)
    # A partial, as a method bound to the instance would not survive pickling.
    module.extra_repr = functools.partial(_extra_repr, module)
    return module


def _what_to_select(module: nn.Module) -> str:
    """Rather than ``module``, which is neither a linear layer nor experts: what an error says of it."""
    linear = sum(is_linear(m) for m in module.modules())
    experts = sum(layout_of(m) is not None for m in module.modules())
    if not linear and not experts:
        return "; select linear layers with quantize_(..., filter_fn=torchao_mx.is_linear)"
    held = [f"{linear} linear layer{'s' * (linear > 1)}"] * (linear > 0)
    held += [f"{experts} module{'s' * (experts > 1)} of experts"] * (experts > 0)
    kind = "is_linear" if linear else "is_experts"
    return (
        f" but holds {' and '.join(held)}, which quantize_ does not reach: it stops at the first module that "
        f"filter_fn selects, and one that goes by names selects the model itself; have it ask for the kind "
        f"too: lambda module, name: torchao_mx.{kind}(module) and ..."
    )


def check_ptq_module(
    module: nn.Module, weight: QuantizeSpec, activation: QuantizeSpec | None
) -> None:
    """Refuse what the handler would refuse; nothing is changed, nor is what is packed already looked at."""
    _check_not_in_training(module)
    if layout_of(module) is not None:
        if not is_packed(module):
            check_experts(module, weight, activation)
            check_replaceable(module)
    elif not (isinstance(module, nn.Linear) and isinstance(module.weight, MXTensor)):
        check_linear(module, weight, activation)


def _check_not_in_training(module: nn.Module) -> None:
    if getattr(module, "is_in_training", False):
        raise TypeError(
            f"{module} is being trained; convert it with quantize_(model, QATConfig(config, "
            f"step='convert'))"
        )


def is_in_high_precision(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer or one of experts, and its weights are not quantized."""
    if layout_of(module) is not None:
        return not is_packed(module)
    return isinstance(module, nn.Linear) and type(module.weight.data) in (torch.Tensor, DTensor)


def _extra_repr(module: Any) -> str:
    text, weight = type(module).extra_repr(module), local_of(module.weight)
    if not isinstance(weight, MXTensor):  # another one was put in its place
        return text
    return f"{text}, weight={weight._quantization_type()}"


@register_quantize_module_handler(MXWeightOnlyConfig)
@register_quantize_module_handler(MXDynamicActivationMXWeightConfig)
def _quantize_handler(
    module: nn.Module, config: MXWeightOnlyConfig | MXDynamicActivationMXWeightConfig
) -> nn.Module:
    _check_not_in_training(module)
    if layout_of(module) is None:
        return quantize_linear(module, config.weight_spec, config.activation_spec)
    return in_place_of(module, quantize_experts(module, config.weight_spec, config.activation_spec))
