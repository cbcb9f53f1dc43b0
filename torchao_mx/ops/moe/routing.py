"""route: assign rows to experts on the device, from the router's choice."""

from __future__ import annotations

from typing import NamedTuple

import torch

from torchao_mx.errors import check_tensors

_NARROW = torch.iinfo(torch.int16).max  # a radix sort takes time in proportion to its keys' bits


class Routing(NamedTuple):
    """The routing that grouped products take: expert e owns the rows ``offs[e - 1] : offs[e]``.

    Attributes:
        order: int32 ``[T * k]``; grouped row i is slot ``order[i]`` of ``[T, k]``, so token ``order[i] // k``.
        offs: int32 ``[E]`` end offsets.
    """

    order: torch.Tensor
    offs: torch.Tensor


def route(top_k_index: torch.Tensor, n_experts: int) -> Routing:
    """Sort the slots ``[T, k]`` by expert; the slots of each expert stay in order.

    Slots with ids outside ``0 .. n_experts - 1``, such as experts on other ranks, are unassigned: their rows
    come last, after ``offs[-1]``, and grouped products fill them with zeros. Nothing waits for the GPU.

    Args:
        top_k_index: ``[T, k]`` of any integer dtype.
        n_experts: E, at least 1.

    Raises:
        TypeError: ids that are not integers.
        ValueError: a number of axes other than two; no experts.

    Example:
        >>> import torch
        >>> from torchao_mx import ops
        >>> ops.route(torch.tensor([[2, 0], [1, 2], [0, 9]]), 3)
        Routing(order=tensor([1, 4, 2, 0, 3, 5], dtype=torch.int32), offs=tensor([2, 3, 5], dtype=torch.int32))
    """
    check_tensors(top_k_index=top_k_index)
    no_integers = top_k_index.is_floating_point() or top_k_index.is_complex()
    if no_integers or top_k_index.dtype == torch.bool:
        raise TypeError(
            f"top_k_index has dtype {top_k_index.dtype}; expert ids must be integers, as topk(..).indices are"
        )
    if top_k_index.dim() != 2 or n_experts < 1:
        raise ValueError(
            f"top_k_index has shape {tuple(top_k_index.shape)} for {n_experts} experts; it must be [T, k], "
            f"with at least 1 expert"
        )
    ids = top_k_index.flatten()
    if ids.dtype not in (torch.int32, torch.int64):  # n_experts may not fit in a narrower dtype
        ids = ids.long()
    ids = ids.where((ids >= 0) & (ids < n_experts), n_experts)
    keys = ids.to(torch.int16 if n_experts <= _NARROW else torch.int32)
    keys, order = keys.sort(stable=True)
    experts = torch.arange(n_experts, dtype=keys.dtype, device=keys.device)
    offs = torch.searchsorted(keys, experts, right=True, out_int32=True)
    return Routing(order.int(), offs)
