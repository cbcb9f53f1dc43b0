"""ExpertParallel: split a layer's experts over ranks and send rows to the ranks that own them.

With E experts on P ranks, rank p owns experts ``p E/P .. (p + 1) E/P - 1``: weights, biases and adapters.
Each rank calls the module with its own tokens, routed among all E experts::

    route      ids [T, k] -> order, offs [E]         sorted by expert, and so by rank
    dispatch   hidden[order // k] -> rows [R, H]     all-to-all: all ranks' rows for this rank's experts
    experts    rows, ids [R, 1] -> y [R, H]          nn/experts/pipeline.py, on this rank's experts
    return     y [R, H] -> y [T k, H]                the reverse all-to-all
    combine    y, weights [T, k] -> out [T, H]       on the token's rank, as in one process

Rows arrive in the order of the ranks, and the pipeline sorts them stably. An expert sees its rows in the
order in which a single process would see them for the concatenated batches of all ranks.

The host must know the sizes of the exchanges, which costs one synchronization per layer, as in torchtitan.
The sync-free mode, for CUDA graphs, avoids it: each rank sends T k rows to every rank, real rows first and
then zeros, which are unassigned. The result is exact for any routing, at P times the bytes and activations.

Backward exchanges gradients the same way. A rank gets

- for hidden and weights, and so for its router, the gradients of its own tokens;
- for its experts, the gradients of all P ranks' losses, summed over the tokens of all ranks. If each loss is
  a mean over a rank's tokens and other gradients are averaged over ranks, divide those of experts by P.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from torchao_mx import ops
from torchao_mx.nn.experts.layouts import layout_of
from torchao_mx.nn.experts.module import LocalExperts, MXExperts, split_experts
from torchao_mx.ops.moe.combine import combine_op
from torchao_mx.torch_internals import parameters_of


class _AllToAll(torch.autograd.Function):
    """Send rows to ranks: ``x [sum(sent), ...] -> [sum(received), ...]``, both in the order of the ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        received: list[int],
        sent: list[int],
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        ctx.args = (sent, received, group)
        out = x.new_empty((sum(received), *x.shape[1:]))
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _AllToAll.apply(dout, *ctx.args), None, None, None  # x, received, sent, group


class _Gather(torch.autograd.Function):
    """Gather ``hidden[order // k]``; backward sums each token's k rows in fp32, without atomics."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, order: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return hidden[order // top_k]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        ones = drows.new_ones((len(drows) // ctx.top_k, ctx.top_k))
        return combine_op(drows, ones, order, None), None, None  # hidden, order, top_k


class _Pick(torch.autograd.Function):
    """Gather ``x[index]``, zeros for -1; ``inverse`` holds the destination of each row of x, -1 for none."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(index, inverse)
        if len(x) == 0:
            return x.new_zeros((len(index), *x.shape[1:]))
        return x[index.clamp(min=0)].where((index >= 0)[:, None], 0)

    @staticmethod
    def backward(ctx: Any, drows: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        index, inverse = ctx.saved_tensors
        return _Pick.apply(drows, inverse, index), None, None  # x, index, inverse


@dataclass(frozen=True)
class RowExchange:
    """The row exchanges of one layer; implements :class:`torchao_mx.nn.experts.module.Exchange`.

    Attributes:
        mesh: the 1-D mesh over which the experts are split.
        n_experts: E, the number of experts on all ranks together.
        sync_free: whether all ranks have equally many rows, and each sends that many to every rank.
    """

    mesh: DeviceMesh
    n_experts: int
    sync_free: bool

    def routed(
        self, experts: LocalExperts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """``(hidden [T, H], ids [T, k], weights [T, k]) -> [T, H]``; out-of-range ids add nothing."""
        order, offs = ops.route(ids, self.n_experts)
        rows = _Gather.apply(hidden, order, ids.shape[1])
        y = self.grouped(experts, rows, offs.diff(prepend=offs.new_zeros(1)))
        return ops.combine(y, weights, order, offs=offs)

    def grouped(
        self, experts: LocalExperts, rows: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """``(rows [R, H] in expert order, counts [E]) -> [R, H]``, zeros for unassigned rows."""
        sent = counts.to(torch.int32).view(self.mesh.size(), -1)  # [P, E / P]
        received = torch.empty_like(sent)  # from each rank, for the local experts
        dist.all_to_all_single(received, sent, group=self.mesh.get_group())
        if self.sync_free:
            return self._padded(experts, rows, sent, received)

        sizes, back = torch.stack([sent.sum(1), received.sum(1)]).tolist()
        x = self._all_to_all(rows[: sum(sizes)], back, sizes)
        ids = torch.arange(sent.shape[1], device=sent.device).repeat(len(sizes))
        ids = ids.repeat_interleave(received.flatten(), output_size=len(x))
        y = experts(x, ids[:, None], x.new_ones((len(x), 1)))
        y = self._all_to_all(y, sizes, back)
        return y if len(y) == len(rows) else F.pad(y, (0, 0, 0, len(rows) - len(y)))

    def _padded(
        self,
        experts: LocalExperts,
        rows: torch.Tensor,
        sent: torch.Tensor,
        received: torch.Tensor,
    ) -> torch.Tensor:
        """Run ``grouped`` with R rows from every rank to every rank; only the leading rows count."""
        n_ranks, n_rows = len(sent), len(rows)
        row = torch.arange(n_rows, device=rows.device)
        ends = sent.sum(1).cumsum(0)
        starts = ends - sent.sum(1)
        index = starts[:, None] + row  # [P, R]: the row in each place
        index = index.where(index < ends[:, None], -1).flatten()
        rank = torch.searchsorted(ends, row, right=True)
        place = rank * n_rows + row - starts[rank.clamp(max=n_ranks - 1)]
        place = place.where(rank < n_ranks, -1)  # [R]: the place of each row

        sizes = [n_rows] * n_ranks
        x = self._all_to_all(_Pick.apply(rows, index, place), sizes, sizes)
        ids = torch.searchsorted(
            received.cumsum(1), row.expand(n_ranks, -1).contiguous(), right=True
        )
        y = experts(x, ids.view(-1, 1), x.new_ones((len(x), 1)))
        return _Pick.apply(self._all_to_all(y, sizes, sizes), place, index)

    def _all_to_all(self, x: torch.Tensor, received: list[int], sent: list[int]) -> torch.Tensor:
        return _AllToAll.apply(x, received, sent, self.mesh.get_group())

    def __str__(self) -> str:
        return f"split over {self.mesh.size()} ranks{', sync-free' if self.sync_free else ''}"


class ExpertParallel(ParallelStyle):
    """Split a module's experts over the ranks of a mesh dimension, for ``parallelize_module``.

    The module must come from ``quantize_``: :class:`torchao_mx.MXExperts`, :class:`torchao_mx.MXLoRAExperts`,
    :class:`torchao_mx.MXFakeQuantizedExperts` or a subclass. Call it as before: each rank passes its own
    tokens and the ids (or the row counts) of all E experts. Every rank, even one without tokens, must call it
    and run its backward, and the same tensors must require gradients on all ranks.

    Parameters keep their names and shapes and become DTensors, ``Shard(0)`` over the mesh. Their values come
    from the mesh's first rank, or from each rank with ``parallelize_module(..., src_data_rank=None)``.
    ``full_tensor()`` gathers packed weights packed. Load and quantize first, then split, then apply FSDP2:
    over another mesh dimension to the experts, and over all ranks to the rest, which is replicated::

        mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "ep"))
        quantize_(model, MXWeightOnlyLoRAConfig(), filter_fn=is_experts)
        parallelize_module(model, mesh["ep"], {"model.layers.*.mlp.experts": ExpertParallel()})
        for layer in model.model.layers:
            fully_shard(layer.mlp.experts, mesh=mesh["dp"])
            layer.mlp.experts.set_gradient_divide_factor(8)  # if each rank's loss is a mean over its tokens
        fully_shard(model, mesh=init_device_mesh("cuda", (8,)))

    The experts' gradients are sums over the mesh; see the top of the file. NVFP4 activations take their scale
    from the rows on one rank, so they round differently than in one process.

    Args:
        sync_free: avoid the wait for the device that each call otherwise needs. All ranks must then have
            equally many tokens; each receives P times its own number of rows, most of them unassigned.
    """

    def __init__(self, sync_free: bool = False) -> None:
        super().__init__()
        self.sync_free = sync_free

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Split ``module`` in place.

        Raises:
            TypeError: ``module`` is not a module of experts made by ``quantize_``.
            ValueError: the mesh has several dimensions, its size does not divide the number of experts, or
                parameters are DTensors already.
        """
        check_splittable(module, device_mesh)
        n_experts = module.n_experts
        for name, p in parameters_of(module).items():
            if p is not None:
                split = distribute_tensor(
                    p.detach(), device_mesh, [Shard(0)], src_data_rank=self.src_data_rank
                )
                local = split.to_local().contiguous()
                split = split_experts(local, device_mesh, [Shard(0)], n_experts)
                module.register_parameter(name, nn.Parameter(split, requires_grad=p.requires_grad))
        module.exchange = RowExchange(device_mesh, n_experts, self.sync_free)
        return module


def gather_experts(model: nn.Module) -> nn.Module:
    """Undo :class:`ExpertParallel`, for example to save: each rank again holds all experts, bit for bit.

    All ranks must call it. Optimizers keep referring to the old parameters.

    Args:
        model: changed in place.

    Raises:
        ValueError: FSDP2 also shards the experts; gather those with ``full_tensor()``.
    """
    split = {n: m for n, m in model.named_modules() if isinstance(m, MXExperts) and m.exchange}
    for name, module in split.items():
        for key, p in parameters_of(module).items():
            if p is not None and p.device_mesh != module.exchange.mesh:
                raise ValueError(
                    f"{name}.{key} is split over {p.device_mesh}, so FSDP2 shards it too: gather the "
                    f"entries of state_dict() with full_tensor()"
                )
    for module in split.values():
        for key, p in parameters_of(module).items():
            if p is not None:
                whole = p.detach().full_tensor()
                module.register_parameter(key, nn.Parameter(whole, requires_grad=p.requires_grad))
        del module.exchange
    return model


def check_splittable(module: nn.Module, mesh: DeviceMesh) -> None:
    """Raise unless the experts of ``module`` can be split over ``mesh``; change nothing."""
    kind = type(module).__name__
    if not isinstance(module, MXExperts):
        what = "is not quantized" if layout_of(module) is not None else "is not a module of experts"
        raise TypeError(
            f"this {kind} {what}; ExpertParallel needs modules of experts made by quantize_(..., "
            f"filter_fn=is_experts): quantize it first, or take it out of the plan"
        )
    if mesh.ndim != 1:
        raise ValueError(
            f"the mesh has {mesh.ndim} dimensions, {mesh.mesh_dim_names or tuple(mesh.shape)}; experts are "
            f"split over one: pass one of them, such as mesh['ep']"
        )
    parameters = {name: p for name, p in parameters_of(module).items() if p is not None}
    split = [name for name, p in parameters.items() if isinstance(p, DTensor)]
    if split:
        raise ValueError(
            f"{kind}: {', '.join(split)} are DTensors already; apply ExpertParallel once, and before FSDP2"
        )
    n_experts = module.n_experts
    if n_experts % mesh.size():
        raise ValueError(
            f"{kind} has {n_experts} experts, which {mesh.size()} ranks cannot share evenly; use a mesh "
            f"whose size divides {n_experts}"
        )
    others = [f"{name} {tuple(p.shape)}" for name, p in parameters.items() if len(p) != n_experts]
    if others:
        raise ValueError(
            f"{kind} has {n_experts} experts, but {', '.join(others)} does not have one entry per expert; "
            f"keep other parameters in a separate module"
        )
