"""Registration of the library's custom ops with the dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "torchao_mx"


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

    Plain ``torch.library`` definitions rather than ``custom_op``: the decorator's own checks cost more
    than a small kernel.
    """
    qualname = f"{NAMESPACE}::{name}"
    torch.library.define(qualname, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualname, "cpu")(cpu)
    torch.library.impl(qualname, "cuda")(cuda)
    torch.library.register_fake(qualname)(fake)
    if backward is not None:
        torch.library.register_autograd(qualname, backward, setup_context=setup_context)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
