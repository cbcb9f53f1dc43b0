"""route: which rows go to which expert, from the router's choice, on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from torchao_mx.errors import check_tensors

_NARROW = torch.iinfo(torch.int16).max  # a radix sort's time is its keys' bits


class Routing(NamedTuple):
    """What the grouped products take: the rows ``offs[e - 1] : offs[e]`` are expert e's.

    Attributes:
        order: int32 ``[T * k]``; row i of the groups is slot ``order[i]`` of ``[T, k]``, so token ``order[i] // k``.
        offs: int32 ``[E]`` end offsets.
    """

    order: torch.Tensor
    offs: torch.Tensor


def route(top_k_index: torch.Tensor, n_experts: int) -> Routing:
    """Sort the slots ``[T, k]`` by expert; each expert's slots stay in their order.

    Ids outside ``0 .. n_experts - 1``, such as those of experts on other ranks, belong to nobody: their rows
    come last, behind ``offs[-1]``, where grouped products leave zeros. Nothing waits for the GPU.

    Args:
        top_k_index: ``[T, k]`` of any integer dtype.
        n_experts: E, at least 1.

    Raises:
        TypeError: ids that are no integers.
        ValueError: other than two axes; no experts.

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
            f"top_k_index has dtype {top_k_index.dtype}; expert ids are integers, as topk(..).indices are"
        )
    if top_k_index.dim() != 2 or n_experts < 1:
        raise ValueError(
            f"top_k_index has shape {tuple(top_k_index.shape)} and there are {n_experts} experts; it takes "
            f"[T, k] and at least 1 expert"
        )
    ids = top_k_index.flatten()
    if ids.dtype not in (torch.int32, torch.int64):  # n_experts may not fit in theirs
        ids = ids.long()
    ids = ids.where((ids >= 0) & (ids < n_experts), n_experts)
    keys = ids.to(torch.int16 if n_experts <= _NARROW else torch.int32)
    keys, order = keys.sort(stable=True)
    experts = torch.arange(n_experts, dtype=keys.dtype, device=keys.device)
    offs = torch.searchsorted(keys, experts, right=True, out_int32=True)
    return Routing(order.int(), offs)
