"""Registration of the library's custom ops with the dispatcher."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

NAMESPACE = "torchao_mx"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # registrations live as long as it does
_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
implementations: dict[tuple[Any, str], Callable[..., Any]] = {}  # by op and type of device


def define_op(
    name: str,
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define ``torchao_mx::<name>`` and return its overload.

    Plain ``torch.library`` definitions rather than ``custom_op``, and an autograd kernel of our own rather
    than ``register_autograd``: the checks of the one and the argument handling of the other (it goes through
    the schema in Python at every call) cost more than a small kernel. ``setup_context`` and ``backward`` are
    as for ``register_autograd``.
    """
    qualname = f"{NAMESPACE}::{name}"
    torch.library.define(qualname, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualname, "cpu")(_without_autocast(cpu))
    torch.library.impl(qualname, "cuda")(cuda)
    torch.library.register_fake(qualname)(fake)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    implementations.update({(op, "cpu"): cpu, (op, "cuda"): cuda})
    if backward is not None:
        kernel = _autograd_kernel(name, op, setup_context, backward)
        _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    return op


def _without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast is for an op's arguments; what the reference computes with them keeps its dtypes."""

    @functools.wraps(implementation)
    def run(*args: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return implementation(*args)
        with torch.autocast("cpu", enabled=False):
            return implementation(*args)

    return run


def _autograd_kernel(
    name: str, op: Any, setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset = args
        output = op.redispatch(keyset & _BELOW_AUTOGRAD, *inputs)
        if setup_context is not None:
            setup_context(ctx, inputs, output)
        return output

    def gradients(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return (*backward(ctx, *grads), None)

    function = type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(gradients)},
    )

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"torchao_mx::{name} has gradients by backward() and torch.autograd.grad alone, and none in "
                f"torch.func or forward-mode differentiation: use those, or compute from .dequantize()"
            )
        if torch.is_grad_enabled() and any(
            isinstance(a, torch.Tensor) and a.requires_grad for a in args
        ):
            return function.apply(*args, keyset)
        return op.redispatch(keyset & _BELOW_AUTOGRAD, *args)

    return kernel
