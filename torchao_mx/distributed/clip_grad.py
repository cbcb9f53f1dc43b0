"""clip_grad_norm_ for a model whose parameters lie on several meshes, or partly on none.

torch's own function requires either only plain parameters or only DTensors of one mesh. Expert parallelism
mixes them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """Scale gradients down so that their total norm is at most ``max_norm``.

    Takes the arguments of :func:`torch.nn.utils.clip_grad_norm_`. All ranks must call it. A DTensor counts
    once, as a whole. Plain gradients must be equal on every rank: reduce them first.

    Returns:
        The norm before clipping, a plain 0-d tensor, equal on every rank.

    Raises:
        RuntimeError: ``error_if_nonfinite`` is set and the norm is not finite.
    """
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else parameters
    groups: dict[DeviceMesh | None, list[torch.Tensor]] = defaultdict(list)
    for p in parameters:
        if p.grad is not None:
            groups[p.grad.device_mesh if isinstance(p.grad, DTensor) else None].append(p)
    norms = []
    for group in groups.values():
        norm = get_total_norm([p.grad for p in group], norm_type)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = get_total_norm(norms, norm_type, error_if_nonfinite)
    for group in groups.values():
        clip_grads_with_norm_(group, max_norm, total)
    return total
