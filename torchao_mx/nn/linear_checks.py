"""Checks of linear layers: which to select, which to refuse, and which are still in high precision."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torchao_mx.errors import check_blocks, check_high_precision
from torchao_mx.formats import QuantizeSpec
from torchao_mx.nn.experts.layouts import layout_of
from torchao_mx.nn.experts.module import is_packed
from torchao_mx.torch_internals import parameters_of


def is_linear(module: nn.Module, fqn: str = "") -> bool:
    """Select every ``nn.Linear`` that is called, as a ``filter_fn`` for ``quantize_``.

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
    """Raise unless ``module`` is a linear layer that can be quantized to these specs; change nothing."""
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{type(module).__name__} is not an nn.Linear{_what_to_select(module)}")
    name = (
        f"{type(module).__name__}(in_features={module.in_features}, "
        f"out_features={module.out_features})"
    )
    for what in ("weight", "bias"):
        if what not in parameters_of(module):
            raise TypeError(
                f"{name}: its {what} is computed, for example by a parametrization or weight_norm, and "
                f"must be a parameter; remove that first, or leave this layer out with filter_fn"
            )
    if isinstance(module.weight, DTensor):
        raise TypeError(
            f"{name}: its weight is a DTensor, of which this rank holds only a part; call quantize_ before "
            f"sharding, or load the whole state (torch.distributed.checkpoint.state_dict, "
            f"full_state_dict=True) into an unsharded model, and quantize or convert that"
        )
    if type(module.weight.data) is not torch.Tensor:
        raise TypeError(
            f"{name}: its weight is already a {type(module.weight.data).__name__}; quantize from a "
            f"high-precision weight, or leave this layer out with filter_fn"
        )
    check_high_precision(module.weight.dtype, f"{name}: its weight")
    check_blocks(module.weight.shape, weight.format, -1, f"{name}: its weight")
    if activation is not None:
        check_blocks((module.in_features,), activation.format, -1, f"{name}: its input")


def _what_to_select(module: nn.Module) -> str:
    """Return the end of an error about ``module``, neither a linear layer nor experts: what to select."""
    linear = sum(is_linear(m) for m in module.modules())
    experts = sum(layout_of(m) is not None for m in module.modules())
    if not linear and not experts:
        return "; select linear layers with quantize_(..., filter_fn=torchao_mx.is_linear)"
    held = [f"{linear} linear layer{'s' * (linear > 1)}"] * (linear > 0)
    held += [f"{experts} module{'s' * (experts > 1)} of experts"] * (experts > 0)
    kind = "is_linear" if linear else "is_experts"
    return (
        f" but holds {' and '.join(held)}, which quantize_ does not reach: it stops at the first module that "
        f"filter_fn selects, and a filter by name also selects the model itself; test the kind of module "
        f"too: lambda module, name: torchao_mx.{kind}(module) and ..."
    )


def is_in_high_precision(module: nn.Module) -> bool:
    """Return whether ``module`` is a linear layer or module of experts with unquantized weights."""
    if layout_of(module) is not None:
        return not is_packed(module)
    return isinstance(module, nn.Linear) and type(module.weight.data) in (torch.Tensor, DTensor)


def check_own_forward(linear: nn.Linear) -> None:
    """Raise unless the layer computes by ``nn.Linear.forward``; change nothing."""
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        raise TypeError(
            f"{linear} has its own forward, from its class or set on the instance, which fake "
            f"quantization would drop; remove it, or leave this layer out with filter_fn"
        )
    if not is_linear(linear):
        raise TypeError(
            f"{linear} is never called: the module around it reads its weight, so fake quantization "
            f"would do nothing; leave this layer out with filter_fn=torchao_mx.is_linear"
        )
