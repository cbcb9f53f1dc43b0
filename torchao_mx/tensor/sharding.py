"""The operators that FSDP2 and DTensor need beyond ``dispatch``: new tensors, padding and collectives.

Collectives move bytes along axis 0, which no block crosses. All ranks that hold rows of a weight share its
per-tensor scale.
"""

from __future__ import annotations

from typing import Any

import torch

from torchao_mx import torch_internals
from torchao_mx.tensor.dispatch import (
    _alias,
    _has_expert_scales,
    _implements,
    _logical_dtype,
    _map_all,
    _map_bytes,
    _packed_at,
    _refusal,
    _slice,
)
from torchao_mx.tensor.mx_tensor import MXTensor

aten = torch.ops.aten


@MXTensor.implements_torch_function(torch.Tensor.is_contiguous)
def _is_contiguous(func, types, args, kwargs):
    """Return whether ``contiguous()`` is a no-op: the rows of blocks are dense, transposed or not."""
    return _is_dense(*args, **kwargs)


def _is_dense(x: MXTensor, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
    data = [t if x.packed_axis == -1 else t.mT for t in (x.qdata, x.scale)]
    return all(t.is_contiguous(memory_format=memory_format) for t in data)


def _new(x: MXTensor, size: list[int], make: Any, dtype, device, pin_memory) -> torch.Tensor:
    """Make an MXTensor like x of another size, or a plain tensor for a single axis."""
    dtype = _logical_dtype(x, dtype)
    options = {"device": device or x.device, "pin_memory": bool(pin_memory)}
    size = list(size)
    if len(size) < 2:
        return make(size, dtype=dtype, **options)
    block = x.format.block_size
    if len(size) != x.dim() or size[x.packed_axis] % block:
        raise ValueError(
            f"a new tensor like {x} of shape {tuple(size)}: the shape needs {x.dim()} axes, with axis "
            f"{x.packed_axis} a multiple of {block}: choose such a shape, or call .dequantize() first"
        )
    fields = {}
    for name, span in (("qdata", x.format.elems_per_byte), ("scale", block)):
        shape = list(size)
        shape[x.packed_axis] //= span
        data = getattr(x, name)
        if x.packed_axis == -2:
            shape[-2:] = shape[:-3:-1]
        new = make(shape, dtype=torch.uint8, **options).view(data.dtype)
        fields[name] = new.mT if x.packed_axis == -2 else new
    if _has_expert_scales(x):
        fields["per_tensor_scale"] = make((size[0], 1, 1), dtype=torch.float32, **options)
    elif x.per_tensor_scale is not None:
        # A rank's shard may have no rows from which to compute the weight's scale.
        fields["per_tensor_scale"] = x.per_tensor_scale.to(options["device"], copy=True)
    return x.replace(**fields, orig_dtype=dtype)


@_implements(aten.new_zeros.default)
def _new_zeros(x, size, *, dtype=None, layout=None, device=None, pin_memory=None):
    if _packed_at(x) == 0:
        raise _refusal("new_zeros", x, "axis 0 is packed, and FSDP2 would cut blocks along it")
    out = _new(x, size, torch.zeros, dtype, device, pin_memory)
    out.is_padded_shard = True  # for padded_shard in fsdp.py
    return out


@_implements(aten.new_empty.default)
def _new_empty(x, size, *, dtype=None, layout=None, device=None, pin_memory=None):
    return _new(x, size, torch.empty, dtype, device, pin_memory)


@_implements(aten.as_strided.default)
def _as_strided(x, size, stride, storage_offset=None):
    """Return x itself or its first rows, with which FSDP2 cuts off padding."""
    size, stride = list(size), tuple(stride)
    if (size, stride, storage_offset or 0) == (list(x.shape), x.stride(), x.storage_offset()):
        return _alias(x)
    dense = (
        _is_dense(x) and not storage_offset and stride == torch.empty(size, device="meta").stride()
    )
    if dense and size[1:] == list(x.shape[1:]) and _packed_at(x) != 0:
        return _slice(x, 0, 0, size[0])
    raise _refusal(
        f"as_strided to {tuple(size)}, strides {stride}", x, "only dense first rows are possible"
    )


@_implements(aten.constant_pad_nd.default)
def _constant_pad_nd(x, pad, value=0):
    """Append rows of zeros, with which DTensor pads uneven shards."""
    rows = pad[-1] if len(pad) == 2 * x.dim() else 0
    if value or rows < 0 or sum(map(abs, pad)) != rows or (rows and _packed_at(x) == 0):
        why = "the padding must be rows of zeros after the last row"
        raise _refusal(f"pad by {list(pad)} with {value}", x, why)
    if not rows:
        return x.clone()
    out = _new(x, [x.shape[0] + rows, *x.shape[1:]], torch.zeros, None, None, None)
    out[: x.shape[0]].copy_(x)
    return out


# --- collectives ----------------------------------------------------------------------------------


@_implements(*torch_internals.WAIT_TENSOR, *torch_internals.WRAP_TENSOR)
def _wait_tensor(x):
    return _map_all(x, torch_internals.WAIT_TENSOR[0])


@_implements(*torch_internals.ALL_GATHER)
def _all_gather_into_tensor(x, group_size, group_name):
    """Concatenate the rows of all ranks, in the order of the ranks."""
    if _packed_at(x) == 0:
        raise _refusal("all_gather", x, "axis 0 is packed")

    def gather(t: torch.Tensor) -> torch.Tensor:
        t = t.contiguous()
        out = torch_internals.ALL_GATHER[0](t, group_size, group_name)
        # Two concurrent gloo all-gathers sometimes corrupt the heap, even for plain tensors (torch 2.13).
        return torch_internals.WAIT_TENSOR[0](out) if t.device.type == "cpu" else out

    def gather_bytes(span, b):
        return gather(b) if x.packed_axis == -1 else gather(b.mT).mT

    fields = _map_bytes(gather_bytes, x)
    pts = x.per_tensor_scale
    if _has_expert_scales(x):
        fields["per_tensor_scale"] = gather(pts)
    elif pts is not None:
        # The first rank always has rows and so the weight's scale; a rank without rows may not have it.
        fields["per_tensor_scale"] = gather(pts.view(1))[0]
    return x.replace(**fields)


def _dense_bytes(x: MXTensor) -> list[torch.Tensor]:
    """Return x's tensors as collectives take them."""
    transposed = x.packed_axis == -2
    data = [(t.mT if transposed else t).view(torch.uint8) for t in (x.qdata, x.scale)]
    return data if x.per_tensor_scale is None else [*data, x.per_tensor_scale]


def _run_and_wait(func: Any, device: torch.device, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run a collective, wait for it and return its work object.

    NCCL runs asynchronously: its synchronous calls return a work object that must not be touched. Gloo keeps
    its setting: unless waited for at once, its threads free Python's tensors, which sometimes crashes.
    """
    given = dict(zip(torch_internals.argument_names(func), args, strict=False)) | kwargs
    if device.type == "cuda":
        given["async_op"] = True
    _, work = func(**given)
    work.wait()
    return work


@MXTensor.implements(torch.ops.c10d.broadcast_.default)
def _broadcast_(func, types, args, kwargs):
    (x,), *others = args
    for t in _dense_bytes(x):
        work = _run_and_wait(func, x.device, ([t], *others), kwargs)
    return [x], work


@MXTensor.implements(torch.ops.c10d.scatter_.default)
def _scatter_(func, types, args, kwargs):
    (out,), inputs, *others = args
    parts = [[_dense_bytes(x.contiguous()) for x in row] for row in inputs]
    for i, t in enumerate(_dense_bytes(out)):
        given = [t], [[part[i] for part in row] for row in parts], *others
        work = _run_and_wait(func, out.device, given, kwargs)
    return [out], work
