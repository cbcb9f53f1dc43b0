"""NVFP4MXFP8Linear: train a linear layer with NVFP4 products in forward and MXFP8 products in backward.

::

    Y  = Q4(X) Q4(W)^T + bias    reduces K: both operands in blocks of 16 along K
    dX = Q8(dY) Q8(W)            reduces N: both in blocks of 32 along N
    dW = Q8(dY)^T Q8(X)          reduces the tokens: both in blocks of 32 along M, completed by zeros

Forward and conversion are those of quantization-aware training in NVFP4 (``qat/linear.py``); only backward
differs. X and dY are each read once for both directions (``quantization/quantize_both.py``); X is also read
once before, for NVFP4's per-tensor scale. Backward keeps the packed columns of X (8.25 bits per element) and
W by reference, and quantizes W along N when it needs it. Keeping that form from forward on would cost another
byte per weight in every layer, for the whole weight even where FSDP2 reshards W.

``reference.recipe_products`` defines the operands; ``block_scaled/dense.py`` multiplies them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

from torchao_mx.errors import check_blocks
from torchao_mx.nn.linear_checks import check_linear, check_own_forward
from torchao_mx.nn.qat.linear import MXFakeQuantizedLinear
from torchao_mx.nn.recipes.config import NVFP4ForwardMXFP8BackwardConfig
from torchao_mx.ops.block_scaled.dense import takes_block_scaled_mm
from torchao_mx.ops.block_scaled.recipe_linear import recipe_linear_backward_op, recipe_linear_op
from torchao_mx.ops.core.arguments import check_product, operands, spec_strings


def random_seed(config: NVFP4ForwardMXFP8BackwardConfig, dy: torch.Tensor) -> torch.Tensor | None:
    """Draw a seed for dY's stochastic rounding, on its device; None for rounding to nearest."""
    if not config.stochastic_rounding:
        return None
    return torch.randint(2**63 - 1, (), device=dy.device)


class _RecipeLinear(torch.autograd.Function):
    """Take x [M, K] in the compute dtype, weight [N, K] and bias [N] in their own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        config: NVFP4ForwardMXFP8BackwardConfig,
        native: bool,
        has_backward: bool,
    ) -> torch.Tensor:
        needs_dx, needs_dw = (has_backward and needed for needed in ctx.needs_input_grad[:2])
        specs = *spec_strings(config.forward_spec), *spec_strings(config.backward_spec)
        y, *x_columns = recipe_linear_op(x, weight, bias, *specs, native, needs_dw)
        ctx.save_for_backward(weight if needs_dx else None, *(x_columns or (None, None)))
        ctx.config, ctx.native = config, native
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *x_columns = ctx.saved_tensors  # read once: checkpointing unpacks on each access
        config, needs = ctx.config, ctx.needs_input_grad
        gradients = iter(
            recipe_linear_backward_op(
                dy, weight if needs[0] else None, *(x_columns if needs[1] else (None, None)),
                random_seed(config, dy), *spec_strings(config.grad_spec),
                *spec_strings(config.backward_spec), ctx.native, ctx.weight_dtype,
                ctx.bias_dtype if needs[2] else None,
            )
        )  # fmt: skip
        dx, dw, dbias = (next(gradients) if needed else None for needed in needs[:3])
        # x, weight, bias, config, native, has_backward
        return dx, dw, dbias, None, None, None


class NVFP4MXFP8Linear(MXFakeQuantizedLinear):
    """An ``nn.Linear`` with a high-precision weight that multiplies in NVFP4 in forward, MXFP8 in backward.

    It keeps the parameters of the linear layer it came from: bfloat16, float16 or float32; x's dtype may
    differ. Under autocast x is cast, and the weight is quantized from its own dtype, as in conversion. x may
    have any number of rows, including none. A NaN or an Inf in x makes all of Y NaN through the per-tensor
    scale; in backward a NaN spreads only over its block.

    Made by ``quantize_`` with an :class:`NVFP4ForwardMXFP8BackwardConfig`, or by :meth:`from_linear`.

    Args:
        in_features: K, a multiple of 16, NVFP4's block size.
        out_features: N, a multiple of 32, MXFP8's block size.
        bias: whether to add a bias.
        config: the recipe; its defaults if None.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        TypeError: ``config`` has another type, or the dtype is unsupported.
        ValueError: ``in_features`` or ``out_features`` is not whole blocks.

    Example:
        >>> import torch
        >>> from torchao_mx import NVFP4MXFP8Linear
        >>> linear = NVFP4MXFP8Linear(64, 32)
        >>> linear(torch.randn(2, 5, 64)).sum().backward()
        >>> linear.weight.grad.shape
        torch.Size([32, 64])
    """

    recipe: NVFP4ForwardMXFP8BackwardConfig
    _separable = ()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: NVFP4ForwardMXFP8BackwardConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = NVFP4ForwardMXFP8BackwardConfig() if config is None else config
        meta = nn.Linear(in_features, out_features, bias, device="meta", dtype=dtype)
        check_recipe_linear(meta, config)
        forward = config.forward_config
        super().__init__(in_features, out_features, bias, forward, forward, device, dtype)
        self.recipe = config

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._specs(self.weight) == (None, None):
            return nn.Linear.forward(self, x)
        x, _ = operands(x, None)
        check_product(x, self.weight, self.in_features, self.recipe.forward_spec)
        rows = x.reshape(-1, self.in_features)
        # needs_input_grad does not reflect no_grad, so pass whether gradients are enabled.
        y = _RecipeLinear.apply(
            rows,
            self.weight,
            self.bias,
            self.recipe,
            _is_native(rows, self.recipe),
            torch.is_grad_enabled(),
        )
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, {self.recipe}{self._switch_repr()}"

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, config: NVFP4ForwardMXFP8BackwardConfig | None = None
    ) -> NVFP4MXFP8Linear:
        """Make the twin of ``linear`` under the recipe: same parameters (ties included), hooks and mode.

        Raises:
            TypeError, ValueError: as in the constructor, and if ``linear`` has its own forward.
        """
        config = NVFP4ForwardMXFP8BackwardConfig() if config is None else config
        check_recipe_linear(linear, config)
        twin = super().from_linear(linear, config.forward_config, config.forward_config)
        twin.recipe = config
        return twin

    def to_linear(self) -> nn.Linear:
        """Return a plain ``nn.Linear`` on the same parameters."""
        linear = super().to_linear()
        del linear.recipe
        return linear


def _is_native(x: torch.Tensor, config: NVFP4ForwardMXFP8BackwardConfig) -> bool:
    formats = (config.backward_spec.format, config.grad_spec.format)
    forward = config.forward_spec.format
    return (
        config.kernel_preference == KernelPreference.AUTO
        and x.shape[0] > 0
        and takes_block_scaled_mm(x, x.shape[1], (forward, forward))
        and takes_block_scaled_mm(x, config.grad_spec.format.block_size, formats)
    )


def check_recipe_linear(module: nn.Module, config: NVFP4ForwardMXFP8BackwardConfig) -> None:
    """Raise unless ``module`` can become an :class:`NVFP4MXFP8Linear`; change nothing."""
    check_config(config)
    check_linear(module, config.forward_spec, config.forward_spec)
    check_own_forward(module)
    name = f"{type(module).__name__}(in_features={module.in_features}, out_features={module.out_features})"
    check_blocks((module.out_features,), config.grad_spec.format, -1, f"{name}: its output")


def check_config(config: object) -> None:
    """Raise TypeError unless ``config`` is a :class:`NVFP4ForwardMXFP8BackwardConfig`."""
    if not isinstance(config, NVFP4ForwardMXFP8BackwardConfig):
        raise TypeError(
            f"config={config!r}; it must be a torchao_mx.NVFP4ForwardMXFP8BackwardConfig"
        )
