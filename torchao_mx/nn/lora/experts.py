"""MXLoRAExperts: experts whose packed 3-D weights are frozen and whose adapters are trained.

For each weight ``W [E, out, in]``, packed along ``in``, ``A [E, r, in]`` and ``B [E, out, r]``::

    y = x W_e^T + s (x A_e^T) B_e^T + bias_e        for the rows of expert e

in one op, ``packed_mm/lora.py``, in the pipeline of ``pipeline.py``. No bf16 copy of a weight is kept.
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
    """A module of experts on frozen packed weights, with LoRA adapters beside each of them.

    It is called as its source is, and has the source's attributes, hooks and parameters under their names,
    frozen: weights as :class:`MXTensor` of the source's logical shape, biases as they were. Each weight
    ``NAME`` gets ``NAME_lora_A [E, r, in]`` and ``NAME_lora_B [E, out, r]``, which are trained:
    Kaiming-uniform and zero, as PEFT has them, so that the module begins as the quantized one.

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
        >>> rows_an_expert = torch.tensor([2, 0, 1, 2])
        >>> model["experts"](torch.randn(5, 32), rows_an_expert).sum().backward()
        >>> model["experts"].w1_lora_B.grad.shape
        torch.Size([4, 64, 4])
    """

    @classmethod
    def from_experts(cls, module: nn.Module, config: MXWeightOnlyLoRAConfig) -> MXLoRAExperts:
        """The twin of ``module`` with adapters; weights are quantized unless they are MXTensors.

        Biases are shared, ``module`` is unchanged.

        Raises:
            TypeError: a module that :func:`torchao_mx.is_experts` does not know.
            ValueError: weights that cannot be packed so; a rank above a side of one; dropout.
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
        """Initialise the adapters, each expert's as those of a linear layer.

        Of experts that are split over ranks each rank draws its own: seed ranks differently, as for dropout.
        """
        for name in self.layout.weights:
            for a in self.local_parameter(f"{name}_lora_A").detach():
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.zeros_(self.local_parameter(f"{name}_lora_B").detach())

    @property
    def options(self) -> dict[str, Any]:
        """What the products are told."""
        config = self.lora_config
        return {
            "strategy": config.strategy,
            "max_scratch_bytes": config.max_scratch_bytes,
            "compute_dtype": config.compute_dtype,
            "grad_compute_dtype": config.grad_compute_dtype,
        }

    def operand(self, name: str) -> AdaptedWeight:
        """The weight ``name`` with its adapters."""
        a, b = (self.local_parameter(f"{name}_lora_{side}") for side in "AB")
        return AdaptedWeight(self.local_parameter(name), a, b, self.lora_config.scaling)

    @torch.no_grad()
    def merged_weight(self, name: str) -> torch.Tensor:
        """``W + s B A`` of the weight ``name``, in its dtype and shape; summed in fp32, rounded once.

        Of experts that are split over ranks it is this rank's.
        """
        _, *adapters = self.operand(name)
        return LoRATensor(self.base(name), *adapters, self.layout.transposed).dequantize()

    def extra_repr(self) -> str:
        weight = self.base(self.layout.weights[0])._quantization_type()
        return f"{self.shapes_repr()}, {self.lora_config.repr_of(weight)}"


def check_lora_experts(module: nn.Module, config: MXWeightOnlyLoRAConfig) -> None:
    """Refuse a module that cannot become an :class:`MXLoRAExperts`; nothing is changed."""
    name = type(module).__name__
    if not isinstance(config, MXWeightOnlyLoRAConfig):
        raise TypeError(f"config={config!r} must be a torchao_mx.MXWeightOnlyLoRAConfig")
    if isinstance(module, MXLoRAExperts):
        raise TypeError(f"{name} has adapters already: train these, or leave this module out")
    check_not_in_training(module)
    check_parameters(module)
    if config.lora_dropout:
        raise ValueError(
            f"{name}: lora_dropout={config.lora_dropout}; experts have none, as their adapters' input is "
            f"gathered in the product: set it to 0"
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
            f"{name}: r={config.r} is more than a side of {tuple(stored.shape[-2:])}; take a smaller r"
        )
