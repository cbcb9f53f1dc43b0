"""MasterTensor: a high-precision weight that FSDP2 gathers packed.

A fake-quantized layer uses only the quantized values of its weight. FSDP2 shards dim 0, so no block spans two
ranks and each rank can quantize its own shard. For MXFP4 the all-gather then moves a quarter of the bytes of
bf16, and every rank gets, bit for bit, the weight that it would have quantized after gathering. The gathered
parameter is an :class:`MXTensor`. Gradients are plain tensors, which FSDP2 reduces to the shards as usual.
Optimizers see the shards.

NVFP4's per-tensor scale needs the largest magnitude of the whole weight: a small all-gather of one number per
rank, unless each expert has its own scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from torchao_mx import ops, torch_internals
from torchao_mx.formats import QuantizeSpec
from torchao_mx.tensor.fsdp import move_with_padding, note_padding, outside_inference, padded_shard
from torchao_mx.tensor.mx_tensor import MXTensor
from torchao_mx.tensor.storage import wrapper
from torchao_mx.torch_internals import is_mutable, return_and_correct_aliasing, tree_map

aten = torch.ops.aten

# Operators whose result is still the parameter, copied or cut; all others return plain tensors.
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
    """A plain tensor for operators, and the spec by which FSDP2 quantizes it for the gathered parameter.

    Made by :func:`torchao_mx.distributed.gather_packed`. Pickled and saved as the plain ``data_``.

    Attributes:
        data_: ``[N, K]`` or ``[E, N, K]``; bfloat16, float16 or float32.
        spec: the format, and how scales are chosen.
        transposed: whether ``data_`` is ``[E, K, N]``; blocks still run along K.
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

            return move_with_padding(x, move)
        if torch.Tag.inplace_view in func.tags and isinstance(args[0], cls):
            raise NotImplementedError(
                f"{func} of {args[0]}: FSDP2 shards this parameter and gathers it packed; use the "
                f"out-of-place operator, without the underscore"
            )
        # In inference_mode, composite operators (narrow) arrive here undecomposed.
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
            out.is_padded_shard = True  # see fsdp.py
        elif func is aten.slice.Tensor and args[1:3] == (0, 0):
            note_padding(out, args[0])
        elif func not in _KEPT and not (is_mutable(func) and isinstance(args[0], cls)):
            return out
        return return_and_correct_aliasing(func, args, kwargs or {}, out)

    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> tuple[tuple[torch.Tensor, ...], MXTensor]:
        """Return the quantized shard's bytes, and the quantized shard as an MXTensor."""
        packed = _quantize_shard(padded_shard(self), mesh)
        return packed.fsdp_pre_all_gather(mesh)[0], packed

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[torch.Tensor, ...],
        metadata: MXTensor,
        param_dtype: torch.dtype,
        *,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        """Return the whole weight, packed; see :class:`torchao_mx.tensor.fsdp.PackedAllGather`."""
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


def _data_method(name: str) -> Callable[..., Any]:
    """Return a method that calls ``name`` on ``data_``, for methods that dispatch no operator."""

    def method(self: MasterTensor, *args: Any, **kwargs: Any) -> Any:
        # Torch raises for some of them if the tensor requires gradients.
        data = self.data_.detach().requires_grad_(self.requires_grad)
        out = getattr(data, name)(*args, **kwargs)
        return self if out is data else out

    return method


for _name in (
    "__array__", "__dlpack__", "__dlpack_device__", "apply_", "const_data_ptr", "data_ptr", "is_shared",
    "map2_", "map_", "numpy", "share_memory_", "storage", "tolist", "untyped_storage", "_typed_storage",
):  # fmt: skip
    setattr(MasterTensor, _name, _data_method(_name))


def _quantize_shard(shard: MasterTensor, mesh: DeviceMesh) -> MXTensor:
    fmt, pts = shard.spec.format, None
    data = shard.data_.mT.contiguous() if shard.transposed else shard.data_
    if fmt.has_per_tensor_scale:
        pts = ops.per_tensor_scale(data, fmt, data.dim() == 3)
        if not pts.dim():
            scales = [torch.empty_like(pts) for _ in range(mesh.size())]
            dist.all_gather(scales, pts, group=mesh.get_group())
            pts = torch.stack(scales).amax()  # the scale grows with the largest magnitude; NaN wins
    qdata, scale = ops.quantize(data, fmt, shard.spec.scaling_mode, per_tensor_scale=pts)
    packed = MXTensor(qdata, scale, fmt, data.dtype, -1, pts)
    return packed.mT if shard.transposed else packed
