"""How FSDP2 shards an MXTensor: along axis 0, gathered as the bytes that it is.

``fully_shard`` asks a parameter's local shard what to all-gather and hands back what came of it. Here that
is the bytes of qdata and scale and, for NVFP4, of the per-tensor scale; blocks run along another axis, so
that no shard cuts one. A bf16 copy of the weight exists nowhere. The gathered tensor is made once, over
buffers that FSDP2 frees and fills again.

A model should be on its GPU before ``fully_shard``, which else moves it there: tensors of subclasses, frozen
ones too, as parameters that require gradients (torch 2.11 to 2.13).

FSDP2 pads shards to one length along axis 0, in tensors from ``new_zeros`` of which the shard is a view: what
is gathered is the padded one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from torchao_mx.torch_internals import view_base

_ALIGNMENT = 16  # bytes, what kernels may load at a time
# Noted on a tensor and not part of it: that it is what new_zeros made, or that moved; the padded tensor that
# it is the first rows of, where torch does not say.
UNSAVED = ("is_padded_shard", "padded")


class PackedAllGather:
    """FSDP2's extension points, for an MXTensor that is the local shard of a parameter."""

    # One argument is the older of the two signatures that FSDP2 accepts. With the other it requires that
    # what an uneven shard gathers has the logical shape, which packed bytes do not.
    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> tuple[tuple[torch.Tensor, ...], None]:
        """The bytes to gather, of as many rows on each rank, and nothing else."""
        data = _bytes(padded_shard(self))
        if mesh.size() == 1:
            # FSDP2 then copies the first tensor and drops the others.
            data = [torch.cat([F.pad(t.flatten(), (0, -t.numel() % _ALIGNMENT)) for t in data])]
        return tuple(data), None

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[torch.Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        """The whole weight over the gathered bytes, its logical dtype ``param_dtype``.

        With ``out``, a weight that this returned before: it is over the same buffers, so nothing is left to
        do.
        """
        if out is not None:
            return None
        if len(all_gather_outputs) == 1:
            shapes = [t.shape for t in _bytes(self)]
            sizes = [shape.numel() for shape in shapes]
            parts = all_gather_outputs[0].split([n + -n % _ALIGNMENT for n in sizes])
            cut = zip(parts, sizes, shapes, strict=True)
            all_gather_outputs = [t[:n].view(shape) for t, n, shape in cut]
        qdata, scale, *pts = all_gather_outputs
        fields = {"qdata": qdata.view(self.qdata.dtype), "scale": scale.view(self.scale.dtype)}
        if self.packed_axis == -2:
            fields = {name: t.mT for name, t in fields.items()}
        if pts:
            whole = pts[0].view(torch.float32)
            fields["per_tensor_scale"] = whole if self.per_tensor_scale.dim() else whole[0]
        return self.replace(**fields, orig_dtype=param_dtype), ()


def padded_shard(shard: Any) -> Any:
    """The tensor with FSDP2's padding that ``shard`` is the first rows of; itself where there is none."""
    base = view_base(shard)
    return base if getattr(base, "is_padded_shard", False) else getattr(shard, "padded", shard)


def noted_shard(rows: Any, x: Any) -> Any:
    """``rows``, the first of x; with x noted if it is a padded shard, as inference mode knows no views."""
    if getattr(x, "is_padded_shard", False):
        rows.padded = x
    return rows


def moved(x: Any, move: Callable[[Any], Any]) -> Any:
    """``move(x)``, x being a shard together with its padding: FSDP2 gathers what it offloaded from there."""
    padded = padded_shard(x)
    if padded is x:
        out = move(x)
        if getattr(x, "is_padded_shard", False):
            out.is_padded_shard = True
        return out
    padded = moved(padded, move)
    return noted_shard(torch.ops.aten.slice.Tensor(padded, 0, 0, x.shape[0]), padded)


def _bytes(shard: Any) -> list[torch.Tensor]:
    """qdata, scale and, if there is one, the per-tensor scale, as dense uint8."""
    data, pts = [shard.qdata, shard.scale], shard.per_tensor_scale
    if shard.packed_axis == -2:
        data = [t.mT for t in data]
    if pts is not None:
        # One for the whole weight is sent by each rank, though it is the same: one without rows may have
        # another.
        data.append(pts if pts.dim() else pts.view(1))
    return [t.view(torch.uint8) for t in data]


def outside_inference(func: Any, args: tuple) -> contextlib.AbstractContextManager:
    """Where ``func`` may make its result: a view of what is no inference tensor may not be one."""
    leave = func.is_view and torch.is_inference_mode_enabled() and not args[0].is_inference()
    return torch.inference_mode(False) if leave else contextlib.nullcontext()
