"""NVFP4MXFP8Experts: train 3-D expert weights with NVFP4 products in forward and MXFP8 products in backward.

For the rows of expert e, as in ``recipes/linear.py``::

    Y = Q4(X) Q4(W_e)^T + bias_e    dX = Q8(dY) Q8(W_e)    dW_e = Q8(dY)^T Q8(X)    dbias_e = sum of dY's rows

Forward equals that of the converted module: the same op on equal operands. dW_e reduces over e's tokens, so
blocks along the tokens start afresh per expert. ``quantize_both`` gathers rows by an index that completes
each group to whole blocks, so no padded copy of X or dY is made. The index is made on the device; no row
count reaches the host.

Backward keeps the ungathered X and W by reference: a quantized X would hold its gathered rows, top-k times as
many. ``block_scaled/grouped.py`` says which GPUs multiply packed operands; elsewhere the products are
emulated on the operands' values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

from torchao_mx import ops, torch_internals
from torchao_mx.errors import check_blocks
from torchao_mx.formats import QuantizeSpec
from torchao_mx.nn.experts.layouts import layout_of
from torchao_mx.nn.experts.module import MXExperts, check_experts
from torchao_mx.nn.qat.experts import MXFakeQuantizedExperts
from torchao_mx.nn.recipes.config import NVFP4ForwardMXFP8BackwardConfig
from torchao_mx.nn.recipes.linear import check_config, random_seed
from torchao_mx.ops.block_scaled.grouped import (
    grouped_block_scaled_mm_op,
    takes_grouped_block_scaled_mm,
)
from torchao_mx.ops.core.arguments import operands, spec_strings
from torchao_mx.ops.core.launch import bytes_of
from torchao_mx.ops.moe.combine import combine_op
from torchao_mx.ops.moe.gather import tokens_of
from torchao_mx.ops.moe.group_sum import group_outer_op, group_sum_op
from torchao_mx.ops.moe.groups import completed_groups
from torchao_mx.ops.quantization.fake_quantize import fake_quantize_op
from torchao_mx.ops.quantization.quantize import per_tensor_scale_op, quantize_op
from torchao_mx.ops.quantization.quantize_both import quantize_both_op, unflattened
from torchao_mx.torch_internals import parameters_of


class _Native(NamedTuple):
    """Which products the GPU computes from packed operands; the others are emulated."""

    forward: bool
    backward: bool

    @classmethod
    def of(
        cls, x: torch.Tensor, weight: torch.Tensor, config: NVFP4ForwardMXFP8BackwardConfig
    ) -> _Native:
        """Decide for ``x [T, K]`` and ``weight [E, N, K]``."""
        if config.kernel_preference != KernelPreference.AUTO or len(x) == 0:
            return cls(False, False)
        forward, backward = config.forward_spec.format, config.backward_spec.format
        _, n, k = weight.shape
        return cls(
            takes_grouped_block_scaled_mm(x, k, forward),
            backward == config.grad_spec.format and takes_grouped_block_scaled_mm(x, n, backward),
        )


class _RecipeGroupedLinear(torch.autograd.Function):
    """Take x [T, K] in the compute dtype, weight [E, N, K], bias [E, N] in their own, w_scale [E, 1, 1]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        w_scale: torch.Tensor,
        offs: torch.Tensor,
        order: torch.Tensor | None,
        config: NVFP4ForwardMXFP8BackwardConfig,
        native: _Native,
    ) -> torch.Tensor:
        spec = config.forward_spec
        packed = ops.quantize(
            weight.contiguous(), spec.format, spec.scaling_mode, per_tensor_scale=w_scale
        )
        if native.forward:
            y = _native_product(x, *packed, w_scale, bias, offs, order, spec)
        else:
            y = ops.grouped_mm(
                x, *packed, spec.format, offs, order=order, bias=bias, per_tensor_scale=w_scale,
                activation=spec,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, offs, None if order is None else order.int())
        ctx.config, ctx.native = config, native.backward
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TK, w_ENK, offs, order = ctx.saved_tensors
        needs_dx, needs_dw, needs_dbias, *_ = ctx.needs_input_grad
        dx = dw = dbias = None
        if dy_RN.shape[0] == 0:
            dx = torch.zeros_like(x_TK) if needs_dx else None
            dw = torch.zeros_like(w_ENK) if needs_dw else None
        elif needs_dx or needs_dw:
            dx, dw = _gradients(
                ctx.config, ctx.native, dy_RN, x_TK, w_ENK, offs, order, needs_dx, needs_dw
            )
        if needs_dbias:
            dbias = group_sum_op(dy_RN, offs, ctx.bias_dtype)
        # x, weight, bias, w_scale, offs, order, config, native
        return dx, dw, dbias, None, None, None, None, None


def _native_product(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    offs: torch.Tensor,
    order: torch.Tensor | None,
    spec: QuantizeSpec,
) -> torch.Tensor:
    """Compute ``ops.grouped_mm`` with an activation spec; rows are packed before they are gathered."""
    token = None if order is None else tokens_of(order, len(x))
    rows = x if order is None else x[token]
    pts = per_tensor_scale_op(rows, spec.format.name, False, offs)
    x_qdata, x_scale = quantize_op(x, *spec_strings(spec), -1, pts)
    if order is not None:
        x_qdata, x_scale = x_qdata[token], bytes_of(x_scale)[token].view(x_scale.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return grouped_block_scaled_mm_op(
        x_qdata, x_scale, pts, qdata, scale, w_scale, bias, offs, spec.format.name, x.dtype
    )


def _gradients(
    config: NVFP4ForwardMXFP8BackwardConfig,
    native: bool,
    dy_RN: torch.Tensor,
    x_TK: torch.Tensor,
    w_ENK: torch.Tensor,
    offs: torch.Tensor,
    order: torch.Tensor | None,
    needs_dx: bool,
    needs_dw: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return dX ``[T, K]`` and dW ``[E, N, K]``."""
    n_rows, dtype = dy_RN.shape[0], dy_RN.dtype
    grad, backward = spec_strings(config.grad_spec), spec_strings(config.backward_spec)
    index, ends = completed_groups(offs, n_rows, config.grad_spec.format.block_size)
    rows, columns = ("rows", "columns") if native else ("row_values", "column_values")
    forms = [form for form, wanted in ((rows, needs_dx), (columns, needs_dw)) if wanted]
    dy = unflattened(
        quantize_both_op(
            dy_RN, *grad, *grad, forms, dtype, None, None, random_seed(config, dy_RN), index
        ),
        forms,
    )
    dx = dw = None
    if needs_dx:
        if native:
            w_packed = quantize_op(w_ENK, *backward, -2, None)
            dx = grouped_block_scaled_mm_op(
                *dy.rows, None, *w_packed, None, None, offs, backward[0], dtype
            )
        else:
            wq_ENK = fake_quantize_op(w_ENK, *backward, -2, None).to(dtype)
            dx_RK = torch_internals.grouped_mm(dy.row_values, wq_ENK, offs=offs)
            # torch leaves the rows after the last group uninitialized.
            is_owned = torch.arange(n_rows, device=offs.device) < offs[-1]
            dx = dx_RK.where(is_owned[:, None], 0)
        if order is not None:
            ones = dx.new_ones((x_TK.shape[0], n_rows // x_TK.shape[0]))
            dx = combine_op(dx, ones, order, None)
    if needs_dw:
        if order is not None:
            token = tokens_of(order, x_TK.shape[0])[index.clamp(min=0)]
            index = token.where(index >= 0, -1)
        x = quantize_both_op(x_TK, "", "", *backward, [columns], dtype, None, None, None, index)
        if native:
            dw = grouped_block_scaled_mm_op(
                *dy.columns, None, *x, None, None, ends, backward[0], dtype
            ).to(w_ENK.dtype)
        else:
            dw = group_outer_op(dy.column_values, *x, ends, w_ENK.dtype)
    return dx, dw


class NVFP4MXFP8Experts(MXFakeQuantizedExperts):
    """A module of experts that multiplies in NVFP4 in forward and in MXFP8 in backward.

    It has its source's call signature and shares its high-precision parameters. Made by ``quantize_`` with an
    :class:`NVFP4ForwardMXFP8BackwardConfig` and ``filter_fn=is_experts``; ``step="convert"`` turns it into an
    :class:`MXExperts` with the same forward.

    Example:
        >>> import torch
        >>> from torchao.quantization import quantize_
        >>> from torchao_mx import NVFP4ForwardMXFP8BackwardConfig, is_experts
        >>> class GroupedExperts(torch.nn.Module):  # as torchtitan has it
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w1 = torch.nn.Parameter(torch.randn(4, 64, 32))
        ...         self.w2 = torch.nn.Parameter(torch.randn(4, 32, 64))
        ...         self.w3 = torch.nn.Parameter(torch.randn(4, 64, 32))
        ...
        ...     def forward(self, x, num_tokens_per_expert): ...
        >>> model = torch.nn.ModuleDict({"experts": GroupedExperts()})
        >>> quantize_(model, NVFP4ForwardMXFP8BackwardConfig(), filter_fn=is_experts)
        >>> model["experts"](torch.randn(5, 32), torch.tensor([2, 0, 1, 2])).sum().backward()
        >>> model["experts"].w1.grad.shape
        torch.Size([4, 64, 32])
    """

    recipe: NVFP4ForwardMXFP8BackwardConfig
    _separable = ()

    @classmethod
    def from_experts(
        cls, module: nn.Module, config: NVFP4ForwardMXFP8BackwardConfig | None = None
    ) -> NVFP4MXFP8Experts:
        """Make the twin of ``module`` under the recipe; ``module`` is unchanged and shares its parameters.

        Raises:
            TypeError: :func:`torchao_mx.is_experts` does not select ``module``, or ``config`` has another
            type. ValueError: weights are not whole blocks.
        """
        config = NVFP4ForwardMXFP8BackwardConfig() if config is None else config
        check_recipe_experts(module, config)
        twin = super().from_experts(module, config.forward_config, config.forward_config)
        twin.recipe = config
        return twin

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
        w_scale = ops.per_tensor_scale(weight, self.recipe.forward_spec.format, True)
        native = _Native.of(x, weight, self.recipe)
        return _RecipeGroupedLinear.apply(
            x, weight, bias, w_scale, offs, order, self.recipe, native
        )

    def to_packed(self) -> MXExperts:
        """Return the frozen module on NVFP4 weights, which computes the same as this one."""
        packed = super().to_packed()
        del packed.recipe
        return packed

    def extra_repr(self) -> str:
        return f"{self.shapes_repr()}, {self.recipe}{self._switch_repr()}"


def check_recipe_experts(module: nn.Module, config: NVFP4ForwardMXFP8BackwardConfig) -> None:
    """Raise unless ``module`` can become an :class:`NVFP4MXFP8Experts`; change nothing."""
    check_config(config)
    kind = type(module).__name__
    check_experts(module, config.forward_spec, config.forward_spec)
    layout = layout_of(module)
    for name in layout.weights:
        n = parameters_of(module)[name].shape[-1 if layout.transposed else -2]
        check_blocks((n,), config.grad_spec.format, -1, f"{kind}.{name}: its output")
