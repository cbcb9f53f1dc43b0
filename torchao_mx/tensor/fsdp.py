"""Shard an MXTensor with FSDP2: split along axis 0, gather the packed bytes.

``fully_shard`` asks each parameter's local shard what to all-gather, and passes it the result. An MXTensor
gathers the bytes of qdata, scale and, for NVFP4, the per-tensor scale. Blocks run along another axis, so no
shard cuts one, and no bf16 copy of the weight is ever made. The gathered tensor is created once, over buffers
that FSDP2 frees and refills.

Move the model to its GPU before ``fully_shard``. Otherwise ``fully_shard`` moves it and marks all parameters
that are tensor subclasses, frozen ones included, as requiring gradients (torch 2.11 to 2.13).

FSDP2 pads shards to equal length along axis 0: ``new_zeros`` makes the padded tensor, and the shard is a view
of it. The padded tensor is the one gathered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from torchao_mx.torch_internals import view_base

_ALIGNMENT = 16  # bytes that a kernel may load at once
# Attributes that are not part of the tensor: is_padded_shard marks a tensor from new_zeros, or a moved one;
# padded refers to the padded tensor whose first rows this is, if torch does not record the view.
UNSAVED = ("is_padded_shard", "padded")


class PackedAllGather:
    """FSDP2's extension points for an MXTensor that is a parameter's local shard."""

    # FSDP2 accepts two signatures; this is the older one. With the newer one it requires uneven shards to
    # gather tensors of the logical shape, which packed bytes do not have.
    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> tuple[tuple[torch.Tensor, ...], None]:
        """Return the bytes to gather, with the same number of rows on each rank, and no metadata."""
        data = _bytes(padded_shard(self))
        if mesh.size() == 1:
            # On one rank FSDP2 copies the first tensor and drops the rest, so pass a single tensor.
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
        """Return the whole weight over the gathered bytes, with logical dtype ``param_dtype``.

        ``out`` is a weight from an earlier call over the same buffers: there is nothing left to do.
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
    """Return the padded tensor whose first rows ``shard`` is, or ``shard`` itself if it has no padding."""
    base = view_base(shard)
    return base if getattr(base, "is_padded_shard", False) else getattr(shard, "padded", shard)


def note_padding(rows: Any, x: Any) -> Any:
    """Return ``rows``, the first rows of x; a padded x is recorded, as inference mode tracks no views."""
    if getattr(x, "is_padded_shard", False):
        rows.padded = x
    return rows


def move_with_padding(x: Any, move: Callable[[Any], Any]) -> Any:
    """Return ``move(x)`` and move a shard's padding with it, because FSDP2 gathers the offloaded copy."""
    padded = padded_shard(x)
    if padded is x:
        out = move(x)
        if getattr(x, "is_padded_shard", False):
            out.is_padded_shard = True
        return out
    padded = move_with_padding(padded, move)
    return note_padding(torch.ops.aten.slice.Tensor(padded, 0, 0, x.shape[0]), padded)


def _bytes(shard: Any) -> list[torch.Tensor]:
    """Return qdata, scale and any per-tensor scale as dense uint8."""
    data, pts = [shard.qdata, shard.scale], shard.per_tensor_scale
    if shard.packed_axis == -2:
        data = [t.mT for t in data]
    if pts is not None:
        # Each rank sends the whole weight's scale, although ranks with rows share it: a rank without rows
        # may hold another value.
        data.append(pts if pts.dim() else pts.view(1))
    return [t.view(torch.uint8) for t in data]


def outside_inference(func: Any, args: tuple) -> contextlib.AbstractContextManager:
    """Leave inference mode for views of a normal tensor, which cannot be inference tensors."""
    leave = func.is_view and torch.is_inference_mode_enabled() and not args[0].is_inference()
    return torch.inference_mode(False) if leave else contextlib.nullcontext()
