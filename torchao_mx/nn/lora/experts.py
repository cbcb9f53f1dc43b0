"""MXLoRAExperts: experts with frozen, packed 3-D weights and trained adapters.

Each weight ``W [E, out, in]``, packed along ``in``, has adapters ``A [E, r, in]`` and ``B [E, out, r]``::

    y = x W_e^T + s (x A_e^T) B_e^T + bias_e        for the rows of expert e

One op computes this, ``packed_mm/lora.py``, within ``pipeline.py``. No bf16 copy of a weight is kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from torchao_mx.errors import check_blocks, check_high_precision
from torchao_mx.nn.experts.module import (
    MXExperts,
    check_parameters,
    layout_of,
    local_of,
    pack,
    placed_like,
)
from torchao_mx.nn.experts.pipeline import AdaptedWeight
from torchao_mx.nn.lora.config import MXWeightOnlyLoRAConfig
from torchao_mx.nn.modules import check_not_in_training
from torchao_mx.ops.packed_mm.strategy import compute_names
from torchao_mx.tensor import LoRATensor, MXTensor
from torchao_mx.tensor.lora_tensor import check_base
from torchao_mx.torch_internals import parameters_of


class MXLoRAExperts(MXExperts):
    """A module of experts on frozen packed weights, with LoRA adapters for each weight.

    It has the call signature, attributes, hooks and parameter names of its source module. The source's
    parameters are frozen: weights are :class:`MXTensor` of the source's logical shape, biases are unchanged.
    Each weight ``NAME`` gets trained ``NAME_lora_A [E, r, in]`` and ``NAME_lora_B [E, out, r]``, initialized
    as in PEFT (Kaiming-uniform and zero): the module first computes what the quantized one does.

    Made by ``quantize_`` with an :class:`MXWeightOnlyLoRAConfig` and ``filter_fn=is_experts``, or by
    :meth:`from_experts`.

    Example:
        >>> import torch
        >>> from torchao.quantization import quantize_
        >>> from torchao_mx import MXWeightOnlyLoRAConfig, is_experts
        >>> class GroupedExperts(torch.nn.Module):  # as torchtitan has it
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w1 = torch.nn.Parameter(torch.randn(4, 64, 32))
        ...         self.w2 = torch.nn.Parameter(torch.randn(4, 32, 64))
        ...         self.w3 = torch.nn.Parameter(torch.randn(4, 64, 32))
        ...
        ...     def forward(self, x, num_tokens_per_expert): ...
        >>> model = torch.nn.ModuleDict({"experts": GroupedExperts()})
        >>> quantize_(model, MXWeightOnlyLoRAConfig(r=4), filter_fn=is_experts)
        >>> rows_per_expert = torch.tensor([2, 0, 1, 2])
        >>> model["experts"](torch.randn(5, 32), rows_per_expert).sum().backward()
        >>> model["experts"].w1_lora_B.grad.shape
        torch.Size([4, 64, 4])
    """

    @classmethod
    def from_experts(cls, module: nn.Module, config: MXWeightOnlyLoRAConfig) -> MXLoRAExperts:
        """Make the twin of ``module`` with adapters; weights are quantized unless they are MXTensors.

        Biases are shared; ``module`` is unchanged.

        Raises:
            TypeError: :func:`torchao_mx.is_experts` does not select ``module``.
            ValueError: weights cannot be packed, the rank exceeds a side of one, or dropout is set.
        """
        check_lora_experts(module, config)
        twin = cls.stand_in(module)
        twin.lora_config = config
        for name in twin.layout.weights:
            twin._add_weight(name, parameters_of(module)[name].detach())
        for name in twin.layout.biases:
            bias = nn.Parameter(parameters_of(module)[name].detach(), requires_grad=False)
            twin.register_parameter(name, bias)
        twin.reset_parameters()
        return twin

    def _add_weight(self, name: str, weight: torch.Tensor) -> None:
        config = self.lora_config
        if not isinstance(local_of(weight), MXTensor):
            weight = pack(weight, self.layout.transposed, config.weight_spec)
        self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        experts, n, k = self.base(name).shape
        options = {"device": weight.device, "dtype": config.adapter_dtype or weight.dtype}
        a, b = (
            torch.empty(experts, config.r, k, **options),
            torch.empty(experts, n, config.r, **options),
        )
        self.register_parameter(f"{name}_lora_A", nn.Parameter(placed_like(a, weight)))
        self.register_parameter(f"{name}_lora_B", nn.Parameter(placed_like(b, weight)))

    def reset_parameters(self) -> None:
        """Initialize each expert's adapters like those of a linear layer.

        If experts are split over ranks, each rank draws its own: seed ranks differently, as for dropout.
        """
        for name in self.layout.weights:
            for a in self.local_parameter(f"{name}_lora_A").detach():
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.zeros_(self.local_parameter(f"{name}_lora_B").detach())

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for the products."""
        config = self.lora_config
        return {
            "strategy": config.strategy,
            "max_scratch_bytes": config.max_scratch_bytes,
            "compute_dtype": config.compute_dtype,
            "grad_compute_dtype": config.grad_compute_dtype,
        }

    def operand(self, name: str) -> AdaptedWeight:
        """Return the weight ``name`` with its adapters."""
        a, b = (self.local_parameter(f"{name}_lora_{side}") for side in "AB")
        return AdaptedWeight(self.local_parameter(name), a, b, self.lora_config.scaling)

    @torch.no_grad()
    def merged_weight(self, name: str) -> torch.Tensor:
        """Return ``W + s B A`` of the weight ``name`` in its dtype and shape, summed in fp32, rounded once.

        If experts are split over ranks, return this rank's part.
        """
        _, *adapters = self.operand(name)
        return LoRATensor(self.base(name), *adapters, self.layout.transposed).dequantize()

    def extra_repr(self) -> str:
        weight = self.base(self.layout.weights[0])._quantization_type()
        return f"{self.shapes_repr()}, {self.lora_config.repr_of(weight)}"


def check_lora_experts(module: nn.Module, config: MXWeightOnlyLoRAConfig) -> None:
    """Raise unless ``module`` can become an :class:`MXLoRAExperts`; change nothing."""
    name = type(module).__name__
    if not isinstance(config, MXWeightOnlyLoRAConfig):
        raise TypeError(f"config={config!r} must be a torchao_mx.MXWeightOnlyLoRAConfig")
    if isinstance(module, MXLoRAExperts):
        raise TypeError(f"{name} already has adapters: train these, or leave this module out")
    check_not_in_training(module)
    check_parameters(module)
    if config.lora_dropout:
        raise ValueError(
            f"{name}: lora_dropout={config.lora_dropout}; experts do not support dropout, because the "
            f"product gathers their adapters' input: set it to 0"
        )
    layout = layout_of(module)
    for weight_name in layout.weights:
        weight = local_of(parameters_of(module)[weight_name]).detach()
        _check_weight(f"{name}.{weight_name}", weight, layout, config)


def _check_weight(
    name: str, weight: torch.Tensor, layout: Any, config: MXWeightOnlyLoRAConfig
) -> None:
    stored = weight.mT if layout.transposed else weight
    packed = isinstance(weight, MXTensor)
    fmt = weight.format if packed else config.weight_spec.format
    try:
        if packed:
            check_base(stored)
        compute_names(config.compute_dtype, config.grad_compute_dtype, fmt, grouped=True)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not packed:
        check_high_precision(weight.dtype, name)
        check_blocks(stored.shape, config.weight_spec.format, -1, name)
    if config.r > min(stored.shape[-2:]):
        raise ValueError(
            f"{name}: r={config.r} exceeds a side of {tuple(stored.shape[-2:])}; use a smaller r"
        )
