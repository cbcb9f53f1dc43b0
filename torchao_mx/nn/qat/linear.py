"""MXFakeQuantizedLinear: train a linear layer on its quantized values.

Forward multiplies Xq and Wq, the operands quantized to a block format and decoded again::

    Y = Xq Wq^T + bias

The converted layer computes the same product of equal operands, so the results agree bit for bit.
Backward treats quantization as the identity (straight-through)::

    dX = dY Wq        dW = dY^T Xq        dbias = sum over rows of dY

(MXFP4 times MXFP4 uses 8-bit tensor cores, in training and after: ``packed_mm/exact_fp4.py``.)

Backward keeps the *packed* operands (4.25 bits per element for MXFP4 rather than 16) and decodes them again;
decoding runs at copy bandwidth, a few per cent of the GEMM that it feeds. An unquantized operand
(weight-only) is the caller's own tensor, kept by reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torchao.quantization.qat import FakeQuantizedLinear

from torchao_mx.formats import format_by_name
from torchao_mx.nn.linear_checks import check_linear, check_own_forward
from torchao_mx.nn.modules import twin_of
from torchao_mx.nn.qat.config import MXFakeQuantizeConfig, check_configs
from torchao_mx.nn.qat.fake_quantizer import FakeQuantized
from torchao_mx.ops.core.arguments import spec_strings
from torchao_mx.ops.packed_mm.exact_fp4 import mxfp4_product_op, takes_mxfp4_product
from torchao_mx.ops.packed_mm.matmul import check_product, operands, product
from torchao_mx.ops.quantization.dequantize import dequantize_op
from torchao_mx.ops.quantization.quantize import (
    per_tensor_scale,
    quantize_op,
    quantize_with_values_op,
)
from torchao_mx.tensor import MXTensor

# (qdata, scale, per-tensor scale), or (the operand, None, None) if it is not quantized
_Packed = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def _pack(
    x: torch.Tensor, fmt: str, scaling_mode: str, dtype: torch.dtype
) -> tuple[_Packed, torch.Tensor]:
    """Return ``x`` packed, and its dequantized values in ``dtype``; x unpacked if ``fmt`` is empty."""
    if not fmt:
        return (x, None, None), x.to(dtype)
    if isinstance(x, MXTensor):
        packed = x.packed_as(fmt)
        return packed, _unpack(packed, fmt, dtype)
    f = format_by_name(fmt)
    pts = per_tensor_scale(x, f) if f.has_per_tensor_scale else None
    qdata, scale, values = quantize_with_values_op(x, fmt, scaling_mode, dtype, pts)
    return (qdata, scale, pts), values


def _unpack(packed: _Packed, fmt: str, dtype: torch.dtype) -> torch.Tensor:
    qdata, scale, pts = packed
    if not fmt:
        return qdata.to(dtype)
    return dequantize_op(qdata, scale, fmt, dtype, -1, pts)


class _FakeQuantizedLinear(torch.autograd.Function):
    """Take x [M, K] and bias [N] in the compute dtype, weight [N, K] in its own.

    A weight that FSDP2 gathered packed is an MXTensor; its gradient is a plain tensor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight_format: str,
        weight_mode: str,
        activation_format: str,
        activation_mode: str,
    ) -> torch.Tensor:
        if takes_mxfp4_product(x, len(weight), weight_format, activation_format):
            if isinstance(weight, MXTensor):
                w_packed = weight.packed_as(weight_format)
            else:
                w_packed = *quantize_op(weight, weight_format, weight_mode, -1, None), None
            x_saved = *quantize_op(x, activation_format, activation_mode, -1, None), None
            y = mxfp4_product_op(*x_saved[:2], *w_packed[:2], bias)
        else:
            w_packed, wq = _pack(weight, weight_format, weight_mode, x.dtype)
            if not x.numel():
                activation_format = ""
            x_saved, xq = _pack(x, activation_format, activation_mode, x.dtype)
            y = product(xq, wq, bias)
        needs_dx, needs_dw, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            *(w_packed if needs_dx else (None,) * 3), *(x_saved if needs_dw else (None,) * 3)
        )
        ctx.weight_format, ctx.activation_format = weight_format, activation_format
        ctx.compute_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: under checkpointing each access unpacks again
        w_packed, x_saved = saved[:3], saved[3:]
        needs_dx, needs_dw, needs_dbias, *_ = ctx.needs_input_grad
        dx = dw = None
        if needs_dx:
            dx = dy @ _unpack(w_packed, ctx.weight_format, ctx.compute_dtype)
        if needs_dw:
            xq = _unpack(x_saved, ctx.activation_format, ctx.compute_dtype)
            dw = (dy.mT @ xq).to(ctx.weight_dtype)
        dbias = dy.sum(0) if needs_dbias else None
        # x, weight, bias, weight_format, weight_mode, activation_format, activation_mode
        return dx, dw, dbias, None, None, None, None


class MXFakeQuantizedLinear(FakeQuantized, FakeQuantizedLinear):
    """An ``nn.Linear`` that computes with quantized weights, and activations, and trains through them.

    It keeps the parameters of the linear layer it came from: bfloat16, float16 or float32; the activations'
    dtype may differ. Under autocast x is cast, and the weight is quantized from its own dtype, as in
    conversion.

    It subclasses torchao's ``FakeQuantizedLinear``. ``disable_linear_fake_quant`` and
    ``enable_linear_fake_quant`` switch it; while off, it computes what ``nn.Linear`` does.
    ``weight_fake_quantizer.enabled`` and ``activation_fake_quantizer.enabled`` switch one operand each.

    Args:
        in_features: K, a multiple of both block sizes.
        out_features: N.
        bias: whether to add a bias.
        activation_config: how to quantize x; None leaves it unquantized (weight-only).
        weight_config: how to quantize the weight, in blocks along K.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        TypeError: a config is not an :class:`MXFakeQuantizeConfig`, or the dtype is unsupported.
        ValueError: ``weight_config`` is missing, or ``in_features`` is not a multiple of a block size.

    Example:
        >>> import torch
        >>> from torchao_mx import MXFakeQuantizeConfig, MXFakeQuantizedLinear
        >>> mxfp4 = MXFakeQuantizeConfig(torch.float4_e2m1fn_x2)
        >>> linear = MXFakeQuantizedLinear(64, 32, activation_config=mxfp4, weight_config=mxfp4)
        >>> linear(torch.randn(2, 5, 64)).sum().backward()
        >>> linear.weight.grad.shape
        torch.Size([32, 64])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation_config: MXFakeQuantizeConfig | None = None,
        weight_config: MXFakeQuantizeConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        linear = nn.Linear(in_features, out_features, bias, device="meta", dtype=dtype)
        check_fake_quantized_linear(linear, activation_config, weight_config)
        # torchao's constructor accepts only torchao's configs.
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self._set_configs(activation_config, weight_config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, activation = self._specs(self.weight)
        if weight is None and activation is None:
            return nn.Linear.forward(self, x)
        x, bias = operands(x, self.bias)
        check_product(x, self.weight, self.in_features, activation)
        y = _FakeQuantizedLinear.apply(
            x.reshape(-1, self.in_features),
            self.weight,
            bias,
            *spec_strings(weight),
            *spec_strings(activation),
        )
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, weight={self.weight_config.spec}"
        if self.activation_config is not None:
            text += f", activation={self.activation_config.spec}"
        return text + self._switch_repr()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        activation_config: MXFakeQuantizeConfig | None = None,
        weight_config: MXFakeQuantizeConfig | None = None,
    ) -> MXFakeQuantizedLinear:
        """Make the fake-quantized twin of ``linear``: same parameters (tied ones stay tied), hooks and mode.

        Raises:
            TypeError, ValueError: as in the constructor; ``linear`` is unchanged.
        """
        check_fake_quantized_linear(linear, activation_config, weight_config)
        twin = twin_of(cls, linear)
        twin._set_configs(activation_config, weight_config)
        return twin

    def to_linear(self) -> nn.Linear:
        """Return a plain ``nn.Linear`` on the same parameters."""
        linear = twin_of(nn.Linear, self)
        del linear.activation_fake_quantizer, linear.weight_fake_quantizer
        return linear


def check_fake_quantized_linear(
    linear: nn.Module,
    activation: MXFakeQuantizeConfig | None,
    weight: MXFakeQuantizeConfig | None,
) -> None:
    """Raise unless ``linear`` can become an :class:`MXFakeQuantizedLinear`; change nothing."""
    check_configs(activation, weight)
    check_linear(linear, weight.spec, None if activation is None else activation.spec)
    check_own_forward(linear)
