"""MXFakeQuantizedExperts: train 3-D expert weights on their quantized values.

Forward equals that of the converted module, with the same ops on equal operands: each weight is packed, the
input is quantized if the scheme quantizes activations, and ``ops.grouped_mm`` multiplies by the packed
weight. Backward treats quantization as the identity (straight-through, Bengio et al. 2013, arXiv:1308.3432)::

    dX = dY Wq_e        dW_e = dY_e^T Xq_e        dbias_e = sum over the rows of dY_e

The product itself yields dX and dbias; dW is one grouped product over rows. Backward keeps X, by reference,
and the packed weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from torchao_mx import ops
from torchao_mx.formats import QuantizeSpec
from torchao_mx.nn.experts import pipeline
from torchao_mx.nn.experts.module import MXExperts, check_experts, pack
from torchao_mx.nn.modules import twin_of
from torchao_mx.nn.qat.config import MXFakeQuantizeConfig, check_configs
from torchao_mx.nn.qat.fake_quantizer import FakeQuantized
from torchao_mx.ops.core.arguments import operands, spec_strings
from torchao_mx.ops.moe.gather import tokens_of
from torchao_mx.ops.moe.group_sum import group_outer_op
from torchao_mx.ops.packed_mm.matmul import fake_quantize_activation
from torchao_mx.tensor import MXTensor
from torchao_mx.torch_internals import parameters_of


class _WeightGradient(torch.autograd.Function):
    """Return y unchanged; backward adds the gradient of y's weight ``[E, out, in]``."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        weight: torch.Tensor,
        x: torch.Tensor,
        offs: torch.Tensor,
        order: torch.Tensor | None,
        activation: str,
        activation_mode: str,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, offs, order)
        ctx.dtype = weight.dtype
        ctx.activation = (activation, activation_mode)
        ctx.mark_dirty(y)  # so that y itself is returned: a view could not be modified in place
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, offs, order = ctx.saved_tensors
        dw = None
        if ctx.needs_input_grad[1]:
            rows = x if order is None else x[tokens_of(order, len(x))]
            rows = fake_quantize_activation(rows, *ctx.activation, offs)
            dw = group_outer_op(dy, rows, offs, ctx.dtype)
        # y, weight, x, offs, order, activation, its mode
        return dy, dw, None, None, None, None, None


def _packed(weight: torch.Tensor, spec: QuantizeSpec) -> tuple[torch.Tensor, ...]:
    """Pack a weight ``[E, out, in]``, unless FSDP2 gathered it packed: (qdata, scale, per-tensor scale)."""
    if isinstance(weight, MXTensor):
        return weight.packed_as(spec.format.name)
    stored, pts = weight.contiguous(), None
    if spec.format.has_per_tensor_scale:
        pts = ops.per_tensor_scale(stored, spec.format, True)
    return *ops.quantize(stored, spec.format, spec.scaling_mode, per_tensor_scale=pts), pts


class MXFakeQuantizedExperts(FakeQuantized, MXExperts):
    """A module of experts that computes with quantized weights, and activations, and trains through them.

    It has its source's call signature and shares its high-precision parameters. Made by ``quantize_`` with
    ``QATConfig(base, step="prepare")`` and ``filter_fn=is_experts``. ``QATConfig(base, step="convert")``
    turns it into an :class:`MXExperts` with the same forward, or without a ``base`` back into the source.
    :func:`torchao_mx.disable_fake_quant` makes it compute in high precision until re-enabled.

    Example:
        >>> import torch
        >>> from torchao.quantization import quantize_
        >>> from torchao.quantization.qat import QATConfig
        >>> from torchao_mx import MXWeightOnlyConfig, is_experts
        >>> class GroupedExperts(torch.nn.Module):  # as torchtitan has it
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w1 = torch.nn.Parameter(torch.randn(4, 64, 32))
        ...         self.w2 = torch.nn.Parameter(torch.randn(4, 32, 64))
        ...         self.w3 = torch.nn.Parameter(torch.randn(4, 64, 32))
        ...
        ...     def forward(self, x, num_tokens_per_expert): ...
        >>> model = torch.nn.ModuleDict({"experts": GroupedExperts()})
        >>> quantize_(model, QATConfig(MXWeightOnlyConfig(), step="prepare"), filter_fn=is_experts)
        >>> model["experts"](torch.randn(5, 32), torch.tensor([2, 0, 1, 2])).sum().backward()
        >>> model["experts"].w1.grad.shape
        torch.Size([4, 64, 32])
    """

    _separable = ("weight",)

    @classmethod
    def from_experts(
        cls,
        module: nn.Module,
        activation_config: MXFakeQuantizeConfig | None = None,
        weight_config: MXFakeQuantizeConfig | None = None,
    ) -> MXFakeQuantizedExperts:
        """Make the fake-quantized twin of ``module``, which is unchanged and shares its parameters.

        Raises:
            TypeError: :func:`torchao_mx.is_experts` does not select ``module``, or a config has another type.
            ValueError: ``weight_config`` is missing, or weights cannot be packed.
        """
        check_fake_quantized_experts(module, activation_config, weight_config)
        twin = cls.stand_in(module)
        twin._set_configs(activation_config, weight_config)
        return twin

    @property
    def activation_spec(self) -> QuantizeSpec | None:
        return None if self.activation_config is None else self.activation_config.spec

    def operand(self, name: str) -> pipeline.Product:
        """Return the product with the quantized weight ``name``, or with the weight itself while off."""
        weight_spec, activation_spec = self._specs(self.local_parameter(name))
        if weight_spec is None and activation_spec is None:
            return lambda x, offs, order, bias: pipeline.grouped_linear(
                operands(x, None)[0],
                self.base(name),
                offs,
                order=order,
                bias=bias,
                transpose_weight=True,
            )
        return lambda x, offs, order, bias: self._product(name, x, offs, order, bias)

    def _product(
        self,
        name: str,
        x: torch.Tensor,
        offs: torch.Tensor,
        order: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        x, _ = operands(x, None)
        weight = self.base(name)
        spec, activation = self._specs(weight)
        with torch.no_grad():
            qdata, scale, pts = _packed(weight.detach(), spec)
        y = ops.grouped_mm(
            x, qdata, scale, spec.format, offs, order=order, bias=bias, per_tensor_scale=pts,
            activation=activation,
        )  # fmt: skip
        return _WeightGradient.apply(y, weight, x, offs, order, *spec_strings(activation))

    def to_source(self) -> nn.Module:
        """Return a module of the source's class on the same parameters, in high precision."""
        source = twin_of(self.source_class, self)
        for name in (
            "activation_fake_quantizer",
            "weight_fake_quantizer",
            "layout",
            "source_class",
        ):
            del source.__dict__[name]
        return source

    def to_packed(self) -> MXExperts:
        """Return the frozen module on the quantized weights, which computes the same as this one."""
        twin = MXExperts.stand_in(self)
        del twin.activation_fake_quantizer, twin.weight_fake_quantizer
        for name in self.layout.weights:
            packed = pack(
                parameters_of(self)[name].detach(), self.layout.transposed, self.weight_config.spec,
                self.activation_spec,
            )  # fmt: skip
            twin.register_parameter(name, nn.Parameter(packed, requires_grad=False))
        return twin

    def extra_repr(self) -> str:
        text = f"{self.shapes_repr()}, weight={self.weight_config.spec}"
        if self.activation_config is not None:
            text += f", activation={self.activation_config.spec}"
        return text + self._switch_repr()


def check_fake_quantized_experts(
    module: nn.Module,
    activation: MXFakeQuantizeConfig | None,
    weight: MXFakeQuantizeConfig | None,
) -> None:
    """Raise unless ``module`` can become an :class:`MXFakeQuantizedExperts`; change nothing."""
    check_configs(activation, weight)
    check_experts(module, weight.spec, None if activation is None else activation.spec)
