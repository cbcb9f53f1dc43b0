"""MasterTensor: a weight in high precision that FSDP2 gathers packed.

A fake-quantized layer multiplies by its weight as it is once quantized, and nothing else of it. With dim 0
sharded no block lies on two ranks, so each quantizes its own shard, and a quarter of the bytes of bf16 (for
MXFP4) give every rank the weight that it would have quantized from the gathered one, bit for bit. The
gathered parameter is an :class:`MXTensor`; gradients are plain tensors, which FSDP2 reduces to the shards as
ever, and optimizers see the shards.

NVFP4's per-tensor scale needs the largest magnitude of the whole weight: one small all-gather of a number a
rank, unless it is one per expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from torchao_mx import ops, torch_internals
from torchao_mx.formats import QuantizeSpec
from torchao_mx.tensor.fsdp import moved, noted_shard, outside_inference, padded_shard
from torchao_mx.tensor.mx_tensor import MXTensor
from torchao_mx.tensor.storage import wrapper
from torchao_mx.torch_internals import return_and_correct_aliasing, tree_map

aten = torch.ops.aten

# The result is the parameter itself, copied or cut; that of any other operator is a plain tensor.
_KEPT = {
    aten.alias.default,
    aten.as_strided.default,
    aten.clone.default,
    aten.detach.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.view.default,
}

_MOVES = {*torch_internals.PIN_MEMORY, *torch_internals.TO_COPY}


class MasterTensor(torch.Tensor):
    """``data``, which operators see, and how FSDP2 is to quantize it for the gathered parameter.

    Made by :func:`torchao_mx.distributed.gather_packed`. Pickled, and so saved, as the plain ``data``.

    Attributes:
        data_: ``[N, K]`` or ``[E, N, K]``; bfloat16, float16 or float32.
        spec: the format, and how scales are chosen.
        transposed: ``data_`` is ``[E, K, N]``; blocks run along K all the same.
    """

    data_: torch.Tensor
    spec: QuantizeSpec
    transposed: bool

    def __new__(cls, data: torch.Tensor, spec: QuantizeSpec, transposed: bool = False):
        self = wrapper(
            cls, data.shape, data.stride(), data.dtype, data.device, data.storage_offset()
        )
        self.data_ = data
        self.spec = spec
        self.transposed = transposed
        return self

    __torch_function__ = torch_internals.no_torch_function

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: Any, args: tuple, kwargs: dict | None = None
    ) -> Any:
        if func in _MOVES:
            x, *others = args

            def move(t: MasterTensor) -> MasterTensor:
                return cls(func(t.data_, *others, **kwargs or {}), t.spec, t.transposed)

            return moved(x, move)
        if torch.Tag.inplace_view in func.tags and isinstance(args[0], cls):
            raise NotImplementedError(
                f"{func} of {args[0]}, a parameter that FSDP2 shards and gathers packed: use the operator "
                f"that makes a new tensor, without the underscore"
            )
        # inference_mode sends composite operators (narrow) here whole.
        out = func.decompose(*args, **kwargs or {})
        if out is not NotImplemented:
            return out
        found: list[MasterTensor] = []

        def unwrap(x: Any) -> Any:
            if not isinstance(x, MasterTensor):
                return x
            found.append(x)
            return x.data_

        plain = tree_map(unwrap, (args, kwargs or {}))
        with outside_inference(func, args):
            out = func(*plain[0], **plain[1])
            if func in _KEPT:
                spec, transposed = found[0].spec, found[0].transposed
                out = tree_map(
                    lambda t: cls(t, spec, transposed) if isinstance(t, torch.Tensor) else t, out
                )
        if func is aten.new_zeros.default:
            out.is_padded_shard = True  # see _fsdp.py
        elif func is aten.slice.Tensor and args[1:3] == (0, 0):
            noted_shard(out, args[0])
        elif func not in _KEPT and not (_writes(func) and isinstance(args[0], cls)):
            return out
        return return_and_correct_aliasing(func, args, kwargs or {}, out)

    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> tuple[tuple[torch.Tensor, ...], MXTensor]:
        """The bytes of the shard, quantized, and the shard itself as an MXTensor."""
        packed = _quantized(padded_shard(self), mesh)
        return packed.fsdp_pre_all_gather(mesh)[0], packed

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[torch.Tensor, ...],
        metadata: MXTensor,
        param_dtype: torch.dtype,
        *,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        """The whole weight, packed; see :class:`torchao_mx.tensor.fsdp.PackedAllGather`."""
        return metadata.fsdp_post_all_gather(all_gather_outputs, None, param_dtype, out=out)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[QuantizeSpec, bool]]:
        return ["data_"], (self.spec, self.transposed)

    @classmethod
    def __tensor_unflatten__(cls, tensors: dict, fields: tuple, size: Any, stride: Any):
        return cls(tensors["data_"], *fields)

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.data_.__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"MasterTensor(shape={tuple(self.shape)}, {dtype}, gathered as {self.spec})"


@functools.cache
def _writes(func: Any) -> bool:
    """Whether the operator changes an argument, by its name: ``aten::add_.Tensor``, ``aten::add.out``."""
    name, _, overload = func.name().partition("::")[2].partition(".")
    return name.endswith("_") or "out" in overload


def _of_data(name: str) -> Callable[..., Any]:
    """The method ``name``, which no operator is behind: that of ``data_``."""

    def method(self: MasterTensor, *args: Any, **kwargs: Any) -> Any:
        # Torch refuses some of them where gradients are required.
        data = self.data_.detach().requires_grad_(self.requires_grad)
        out = getattr(data, name)(*args, **kwargs)
        return self if out is data else out

    return method


for _name in (
    "__array__", "__dlpack__", "__dlpack_device__", "apply_", "const_data_ptr", "data_ptr", "is_shared",
    "map2_", "map_", "numpy", "share_memory_", "storage", "tolist", "untyped_storage", "_typed_storage",
):  # fmt: skip
    setattr(MasterTensor, _name, _of_data(_name))


def _quantized(shard: MasterTensor, mesh: DeviceMesh) -> MXTensor:
    fmt, pts = shard.spec.format, None
    data = shard.data_.mT.contiguous() if shard.transposed else shard.data_
    if fmt.has_per_tensor_scale:
        pts = ops.per_tensor_scale(data, fmt, data.dim() == 3)
        if not pts.dim():
            scales = [torch.empty_like(pts) for _ in range(mesh.size())]
            dist.all_gather(scales, pts, group=mesh.get_group())
            pts = torch.stack(scales).amax()  # it grows with the largest magnitude, NaN included
    qdata, scale = ops.quantize(data, fmt, shard.spec.scaling_mode, per_tensor_scale=pts)
    packed = MXTensor(qdata, scale, fmt, data.dtype, -1, pts)
    return packed.mT if shard.transposed else packed
