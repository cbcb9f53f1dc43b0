"""Decides whether to use the native block-scaled products of a GPU and this build of torch.

These products are untested on GPUs, so they are not trusted. On first use per device, a small native product
is checked against the one of decoded operands. If torch has no kernel for it or the two differ, a warning
says so and products are emulated, as on every other GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from torchao_mx.formats import BlockFormat
from torchao_mx.ops.core.launch import capability
from torchao_mx.ops.quantization.quantize import per_tensor_scale_op, quantize_op

MIN_CAPABILITY = (10, 0)
_TOLERANCE = 1e-2  # of the Frobenius norm: sums are rounded to bfloat16
_verdicts: dict[tuple[str, torch.device], bool] = {}
Products = Callable[[torch.device], list[tuple[torch.Tensor, torch.Tensor]]]


def has_block_scaled_gemms(device: torch.device) -> bool:
    """Whether the GPU multiplies block-scaled operands natively."""
    return device.type == "cuda" and capability(device.index) >= MIN_CAPABILITY


def seam(name: str, products: Products) -> Callable[[torch.device], bool]:
    """Return a function that tells whether a device has the products ``name``, and they are verified."""

    @torch.compiler.assume_constant_result
    def is_native(device: torch.device) -> bool:
        return has_block_scaled_gemms(device) and is_verified(name, device, products)

    return is_native


def example(fmt: BlockFormat, device: torch.device, *shape: int) -> tuple[torch.Tensor | None, ...]:
    """Return a packed operand for ``products``: elements, block scales, and a per-tensor scale per expert."""
    g = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=g).to(device, torch.bfloat16)
    pts = per_tensor_scale_op(x, fmt.name, x.dim() == 3, None) if fmt.has_per_tensor_scale else None
    return (*quantize_op(x, fmt.name, "rceil", -1, pts), pts)


def is_verified(name: str, device: torch.device, products: Products) -> bool:
    """Whether the pairs of native and decoded results from ``products(device)`` agree.

    The check runs on the first call per device and waits for the GPU. While a CUDA graph is captured, the
    answer is False, for that call only.
    """
    verdict = _verdicts.get((name, device))
    if verdict is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        verdict = _verdicts[name, device] = _agree(name, device, products)
    return verdict


def _agree(name: str, device: torch.device, products: Products) -> bool:
    try:
        with torch.no_grad():
            pairs = [(got.double(), want.double()) for got, want in products(device)]
        errors = [(got - want).norm() / want.norm() for got, want in pairs]
        worst = float(torch.stack(errors).max())  # a NaN counts as the largest
    except (RuntimeError, ValueError) as error:  # NotImplementedError is a RuntimeError
        reason = f"torch refuses it: {str(error).splitlines()[0]}"
    else:
        if worst <= _TOLERANCE:
            return True
        reason = f"it is off by {worst:.1%} of the product of the decoded operands"
    warnings.warn(
        f"{name} on {device} is emulated in high precision, without its 4- and 8-bit tensor cores: {reason}",
        stacklevel=2,
    )
    return False
