"""Registration of the library's custom ops with the dispatcher."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from torchao_mx import torch_internals

NAMESPACE = "torchao_mx"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # registrations live as long as this object
_ALIGNMENT = 16  # bytes: a kernel's widest load
implementations: dict[tuple[Any, str], Callable[..., Any]] = {}  # by op and device type


def define_op(
    name: str,
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    strided: tuple[str, ...] = (),
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define ``torchao_mx::<name>`` and return its overload.

    An implementation receives contiguous tensors that start at a multiple of 16 bytes. The exceptions are the
    tensors named in ``strided``, whose strides and offset it handles itself. Autograd adds to gradients in
    place, so results must not be views for autograd, nor share storage with each other or with an argument.

    Plain ``torch.library`` definitions and our autograd kernel replace ``custom_op`` and
    ``register_autograd``: the checks of the first and the argument handling of the second (through the schema
    in Python, per call) cost more than a small kernel. ``setup_context`` and ``backward`` are as for
    ``register_autograd``.
    """
    qualname = f"{NAMESPACE}::{name}"
    torch.library.define(qualname, schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    dense = _dense_operands(op, schema, strided)
    for device, implementation in (("cpu", cpu), ("cuda", cuda)):
        entry = implementations[op, device] = _entry(implementation, device, dense)
        torch.library.impl(qualname, device)(entry)
    torch.library.register_fake(qualname)(fake)
    if backward is not None and torch_internals.HAS_AUTOGRAD_KERNELS:
        kernel = _autograd_kernel(name, op, setup_context, backward)
        _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    elif backward is not None:
        _register_autograd(qualname, setup_context, backward)
    return op


def _dense_operands(op: Any, schema: str, strided: tuple[str, ...]) -> tuple[int, ...]:
    """Return the positions of the tensors of ``op`` that its implementations take contiguous and aligned."""
    arguments = [a.split() for a in schema[1 : schema.index(")")].split(",") if a.strip() != "*"]
    tensors = {a[1].split("=")[0]: i for i, a in enumerate(arguments) if a[0].startswith("Tensor")}
    unknown = set(strided) - tensors.keys()
    if unknown:
        raise ValueError(
            f"{op}: strided names {sorted(unknown)}, which are not tensors of its schema"
        )
    return tuple(i for name, i in tensors.items() if name not in strided)


def _entry(
    implementation: Callable[..., Any], device: str, dense: tuple[int, ...]
) -> Callable[..., Any]:
    """Wrap ``implementation`` for the dispatcher: dense operands, below autograd and autocast.

    Autocast applies to an op's arguments only; the computation inside keeps their dtypes.
    """

    below_autograd = torch_internals.BELOW_AUTOGRAD or torch.no_grad

    @functools.wraps(implementation)
    def run(*args: Any) -> Any:
        for i in dense:
            t = args[i]
            if t is not None and not (t.is_contiguous() and t.data_ptr() % _ALIGNMENT == 0):
                args = (*args[:i], as_dense(t), *args[i + 1 :])
        with below_autograd():
            if not torch.is_autocast_enabled(device):
                return implementation(*args)
            with torch.autocast(device, enabled=False):
                return implementation(*args)

    if torch_internals.BELOW_AUTOGRAD is not None:
        return run
    return lambda *args: torch_internals.tree_map(_no_view, run(*args))


def _no_view(result: Any) -> Any:
    """Return ``result``; for a view, return a non-view tensor that shares its memory."""
    return result.data if isinstance(result, torch.Tensor) else result


def no_second_derivative(verb: str, remedy: str) -> Callable[..., Any]:
    """Return the ``backward`` of a verb's backward op that has no derivative itself: it raises."""

    def refuse(ctx: Any, *grads: torch.Tensor) -> None:
        raise NotImplementedError(f"{verb} has no second derivative: {remedy}")

    return refuse


def as_dense(t: torch.Tensor) -> torch.Tensor:
    """Return ``t``, copied unless it is contiguous and starts where a kernel can load 16 bytes at once."""
    if t.is_contiguous() and t.data_ptr() % _ALIGNMENT == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _register_autograd(
    qualname: str, setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> None:
    """Register autograd through the public API, at some microseconds more per call."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    def gradients(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        needed = ctx.needs_input_grad
        ctx.needs_input_grad = (*needed, False)  # False for the keyset, which our kernel has last
        try:
            return backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = needed

    torch.library.register_autograd(qualname, gradients, setup_context=setup)


def _autograd_kernel(
    name: str, op: Any, setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset = args
        output = op.redispatch(keyset & torch_internals.AFTER_AUTOGRAD, *inputs)
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
        if torch_internals.differentiates_otherwise():
            raise NotImplementedError(
                f"torchao_mx::{name} supports only backward() and torch.autograd.grad, not torch.func or "
                f"forward-mode differentiation: use one of the first two, or compute from .dequantize()"
            )
        if torch.is_grad_enabled() and any(
            isinstance(a, torch.Tensor) and a.requires_grad for a in args
        ):
            return function.apply(*args, keyset)
        return op.redispatch(keyset & torch_internals.AFTER_AUTOGRAD, *args)

    return kernel
