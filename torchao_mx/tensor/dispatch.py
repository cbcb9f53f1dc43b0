"""The aten operators of an MXTensor, except matmuls (see ``matmul.py``).

Nearly all of them move whole blocks: they apply the same operation to the bytes of qdata and of
scale. Each entry spans ``span`` logical elements of the packed axis: the elements per byte in qdata,
the block size in scale. They work on bytes because many CPU kernels lack the float8 types. The
per-tensor scale stays as it is, unless there is one per expert, ``[E, 1, 1]``, which follows axis 0.

An operator raises if it would cut a block or move the packed axis away from the last two axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch

from torchao_mx import torch_internals
from torchao_mx.errors import HIGH_PRECISION_DTYPES
from torchao_mx.tensor.flat import FlatMXTensor
from torchao_mx.tensor.fsdp import move_with_padding, note_padding, outside_inference
from torchao_mx.tensor.mx_tensor import MXTensor
from torchao_mx.torch_internals import return_and_correct_aliasing, view_base

aten = torch.ops.aten


def _implements(*overloads):
    """Register a function that takes the operator's own arguments; views alias their input."""

    def decorator(fn):
        @MXTensor.implements(list(overloads))
        def _(func, types, args, kwargs):
            with outside_inference(func, args):
                out = fn(*args, **kwargs)
            return return_and_correct_aliasing(func, args, kwargs, out)

        return fn

    return decorator


def _map_bytes(fn: Callable[..., torch.Tensor], *tensors: MXTensor) -> dict[str, torch.Tensor]:
    """Apply ``fn(span, *bytes)`` to the tensors' qdata and scales; return fields for ``replace``."""
    fmt = tensors[0].format
    fields = {}
    for name, span in (("qdata", fmt.elems_per_byte), ("scale", fmt.block_size)):
        data = [getattr(t, name) for t in tensors]
        fields[name] = fn(span, *[d.view(torch.uint8) for d in data]).view(data[0].dtype)
    return fields


def _map_all(x: MXTensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> MXTensor:
    """Return x with ``fn`` applied to each of its tensors."""
    pts = x.per_tensor_scale
    fields = _map_bytes(lambda span, b: fn(b), x)
    return x.replace(**fields, per_tensor_scale=None if pts is None else fn(pts))


def _refusal(op: str, x: MXTensor, why: str) -> NotImplementedError:
    return NotImplementedError(f"{op} of {x}: {why}; call .dequantize() on it first")


def _normalized_dim(dim: int, rank: int) -> int:
    if not -rank <= dim < rank:
        raise IndexError(
            f"dim={dim} is out of range for {rank} dimensions; use {-rank}..{rank - 1}"
        )
    return dim % rank


def _packed_at(x: MXTensor) -> int:
    return x.dim() + x.packed_axis


def _has_expert_scales(x: MXTensor) -> bool:
    return x.per_tensor_scale is not None and x.per_tensor_scale.dim() == 3


def _packed_axis(op: str, x: MXTensor, position: int, rank: int) -> int:
    """Return the ``packed_axis`` of a result of ``rank`` axes whose packed axis is at ``position``."""
    if rank < 2:
        raise _refusal(op, x, "the result would have one dimension; an MXTensor has two or more")
    if position < rank - 2:
        raise _refusal(op, x, "the packed axis must remain one of the last two")
    return position - rank


# --- the whole tensor: copies, devices, dtypes ----------------------------------------------------


@_implements(aten.detach.default, aten.alias.default)
def _alias(x):
    return _map_all(x, lambda t: t.detach())


@_implements(aten.clone.default)
def _clone(x, *, memory_format=torch.preserve_format):
    """Clone; "contiguous" makes the packed axis innermost in memory, transposed or not."""
    if memory_format == torch.preserve_format or x.packed_axis == -1:
        return _map_all(x, lambda t: t.clone(memory_format=memory_format))
    return _transpose(_clone(_transpose(x, -2, -1), memory_format=memory_format), -2, -1)


@MXTensor.implements_torch_function(torch.Tensor.contiguous)
def _contiguous(func, types, args, kwargs):
    """Return x with dense rows of blocks (see ``_clone``), or x itself if they are dense."""
    x = args[0]
    data = (x.qdata, x.scale)
    if all((t if x.packed_axis == -1 else t.mT).is_contiguous() for t in data):
        return x
    return x.clone(memory_format=torch.contiguous_format)


@MXTensor.implements([aten.contiguous.default, aten.to.dtype_layout])
def _(func, types, args, kwargs):
    return func.decompose(*args, **kwargs)  # torchao's version of `to` asserts its arguments


@MXTensor.implements_torch_function(torch.Tensor.data.__set__)
def _set_data(func, types, args, kwargs):
    """``x.data = value`` also takes value's inner tensors; torch alone sets only the wrapper."""
    x, value = args
    if not isinstance(value, MXTensor):
        raise TypeError(
            f"cannot set .data of {x} to {_describe(value)}: quantize it with MXTensor.from_hp, or "
            f"replace the parameter"
        )
    with torch_internals.WithoutTorchFunction():
        func(x, value)
    for name, field in value.fields().items():
        setattr(x, name, field)


def _logical_dtype(x: MXTensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return x.orig_dtype
    if dtype not in HIGH_PRECISION_DTYPES:
        raise TypeError(
            f"{x} cannot become {dtype}; its logical dtype must be bfloat16, float16 or float32: "
            f"call .dequantize() on it first"
        )
    return dtype


@_implements(*torch_internals.TO_COPY)
def _to_copy(
    x,
    *,
    dtype=None,
    layout=None,
    device=None,
    pin_memory=None,
    non_blocking=False,
    memory_format=None,
):
    """Change the device or the logical dtype; the packed bytes stay the same."""
    dtype = _logical_dtype(x, dtype)
    options = {"device": device, "pin_memory": pin_memory, "non_blocking": non_blocking}

    def move(t):
        return _map_all(t, lambda d: torch_internals.TO_COPY[0](d, **options)).replace(
            orig_dtype=dtype
        )

    return move_with_padding(x, move)


@_implements(aten.empty_like.default)
def _empty_like(
    x, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=torch.preserve_format
):
    dtype = _logical_dtype(x, dtype)
    out = _map_all(x, lambda t: torch.empty_like(t, device=device, pin_memory=bool(pin_memory)))
    return out.replace(orig_dtype=dtype)


@_implements(aten.is_pinned.default)
def _is_pinned(x, device=None):
    return all(t.is_pinned() for t in x.parts())


@_implements(*torch_internals.PIN_MEMORY)
def _pin_memory(x, device=None):
    return move_with_padding(x, lambda t: _map_all(t, lambda d: d.pin_memory()))


def _differences(a: MXTensor, b: MXTensor) -> list[str]:
    """List the attributes that differ: ``["format: mxfp4 and nvfp4", ...]``."""
    names = (*MXTensor.tensor_attribute_names, *MXTensor.optional_tensor_attribute_names)
    pairs = [(name, getattr(a, name), getattr(b, name)) for name in names]
    return [f"{name}: {x} and {y}" for name, x, y in pairs if x != y]


def _values_per_scale(x: MXTensor) -> int:
    if x.per_tensor_scale is None:
        return 0
    return x.numel() // max(1, x.per_tensor_scale.numel())  # a shard may have no experts


@_implements(aten.copy_.default)
def _copy_(x, src, non_blocking=False):
    if not (isinstance(x, MXTensor) and isinstance(src, MXTensor)):
        raise ValueError(
            f"copy_ into {_describe(x)} from {_describe(src)}; both must be MXTensors: quantize a "
            f"plain source with MXTensor.from_hp, or call .dequantize() on a packed one"
        )
    differences = _differences(x, src)
    for name, to, origin in (
        ("shape", x, src),
        ("shape of per_tensor_scale", x.per_tensor_scale, src.per_tensor_scale),
    ):
        shapes = [None if t is None else tuple(t.shape) for t in (to, origin)]
        if shapes[0] != shapes[1]:
            differences.append(f"{name}: {shapes[0]} and {shapes[1]}")
    if differences:
        raise ValueError(
            f"copy_ into {x} from {src}: they differ in {', '.join(differences)}; quantize both the "
            f"same way, or assign instead of copying: load_state_dict(..., assign=True)"
        )
    base = view_base(x)
    base = x if base is None else base
    is_shard = getattr(base, "is_padded_shard", False)  # whose other rows are padding
    if _values_per_scale(x) < _values_per_scale(base) and not is_shard:
        raise ValueError(
            f"copy_ into {x}, a part of {base}: the source's per_tensor_scale would also replace that "
            f"of the other parts; clone() the part, or use torch.stack for one scale per expert"
        )
    for to, origin in zip(x.parts(), src.parts(), strict=True):
        to.copy_(origin, non_blocking)
    return x


def _describe(x: object) -> str:
    if isinstance(x, torch.Tensor) and not isinstance(x, MXTensor):
        return f"a {type(x).__name__} of shape {tuple(x.shape)} and {x.dtype}"
    return str(x)


def _dequantized(x):
    return x.dequantize() if isinstance(x, MXTensor) else x


@MXTensor.implements(
    [aten.eq.Tensor, aten.ne.Tensor, aten.eq.Scalar, aten.ne.Scalar, aten.equal.default]
)
def _(func, types, args, kwargs):
    return func(*map(_dequantized, args), **kwargs)


# --- the order and number of axes -----------------------------------------------------------------


@_implements(aten.permute.default)
def _permute(x, dims):
    rank = x.dim()
    dims = [_normalized_dim(d, rank) for d in dims]
    if _has_expert_scales(x) and dims[0] != 0:
        raise _refusal("permute", x, "each expert has a per_tensor_scale, so axis 0 must stay")
    packed_axis = _packed_axis("permute", x, dims.index(_packed_at(x)), rank)
    fields = _map_bytes(lambda span, b: b.permute(dims), x)
    return x.replace(**fields, packed_axis=packed_axis)


@_implements(aten.transpose.int)
def _transpose(x, dim0, dim1):
    dims = list(range(x.dim()))
    a, b = _normalized_dim(dim0, x.dim()), _normalized_dim(dim1, x.dim())
    dims[a], dims[b] = b, a
    return _permute(x, dims)


@_implements(aten.t.default)
def _t(x):
    if x.dim() != 2:
        raise ValueError(f"t of {x}: t needs two dimensions; use .mT to swap the last two")
    return _transpose(x, 0, 1)


@_implements(aten.unsqueeze.default)
def _unsqueeze(x, dim):
    if _has_expert_scales(x):
        raise _refusal("unsqueeze", x, "each expert has a per_tensor_scale, so axis 0 must stay")
    dim = _normalized_dim(dim, x.dim() + 1)
    packed_axis = _packed_axis("unsqueeze", x, _packed_at(x) + (dim <= _packed_at(x)), x.dim() + 1)
    fields = _map_bytes(lambda span, b: b.unsqueeze(dim), x)
    return x.replace(**fields, packed_axis=packed_axis)


@_implements(aten.squeeze.dim)
def _squeeze(x, dim):
    return _select(x, dim, 0) if x.shape[_normalized_dim(dim, x.dim())] == 1 else _alias(x)


@MXTensor.implements([aten.view.default, *torch_internals.UNSAFE_VIEW])
def _view(func, types, args, kwargs):
    x, size = args
    with outside_inference(func, args):
        if list(size) in ([-1], [x.numel()]):
            return FlatMXTensor(x)  # another class: return_and_correct_aliasing would refuse it
        out = _view_axes(x, list(size))
    return return_and_correct_aliasing(func, args, kwargs, out)


def _view_axes(x: MXTensor, size: list[int]) -> MXTensor:
    if -1 in size:
        i = size.index(-1)
        size[i] = x.numel() // max(1, math.prod(size[:i] + size[i + 1 :]))
    if math.prod(size) != x.numel():
        raise ValueError(f"view of {x} as {tuple(size)}: the shape must have {x.numel()} elements")
    kept = -x.packed_axis
    if len(size) < 2 or size[-kept:] != list(x.shape[-kept:]):
        which = "the last axis" if kept == 1 else "the last two axes"
        raise _refusal(f"view as {tuple(size)}", x, f"{which} must stay, to keep the blocks whole")
    if _has_expert_scales(x) and size != list(x.shape):
        raise _refusal(
            f"view as {tuple(size)}", x, "each expert has a per_tensor_scale, so axis 0 must stay"
        )

    def view(span, b):
        shape = list(size)
        shape[x.packed_axis] //= span
        return b.view(shape)

    return x.replace(**_map_bytes(view, x))


# --- parts of it ----------------------------------------------------------------------------------


def _check_not_packed(op: str, x: MXTensor, dim: int) -> None:
    if dim == _packed_at(x):
        raise _refusal(f"{op} along axis {dim}", x, "this would cut blocks of the packed axis")


def _along_axis(x: MXTensor, dim: int, fn: Callable[[torch.Tensor], torch.Tensor]) -> MXTensor:
    """Apply ``fn``, which picks along the unpacked axis ``dim``, to bytes and per-expert scales."""
    fields = _map_bytes(lambda span, b: fn(b), x)
    if _has_expert_scales(x) and dim == 0:
        fields["per_tensor_scale"] = fn(x.per_tensor_scale)
    return x.replace(**fields)


def _with_own_scale(x: MXTensor) -> MXTensor:
    """Return x with its own per-tensor scale, for operators whose result shares no memory."""
    pts = x.per_tensor_scale
    return x if pts is None else x.replace(per_tensor_scale=pts.clone())


@_implements(aten.select.int)
def _select(x, dim, index):
    dim = _normalized_dim(dim, x.dim())
    _check_not_packed("select", x, dim)
    fields = _map_bytes(lambda span, b: b.select(dim, index), x)
    if _has_expert_scales(x):
        if dim:
            raise _refusal(f"select along axis {dim}", x, "each expert has a per_tensor_scale")
        fields["per_tensor_scale"] = x.per_tensor_scale.select(0, index).view(())
    packed_axis = _packed_axis("select", x, _packed_at(x) - (dim < _packed_at(x)), x.dim() - 1)
    return x.replace(**fields, packed_axis=packed_axis)


@_implements(aten.unbind.int)
def _unbind(x, dim=0):
    return [_select(x, dim, i) for i in range(x.shape[_normalized_dim(dim, x.dim())])]


@_implements(aten.slice.Tensor)
def _slice(x, dim=0, start=None, end=None, step=1):
    dim = _normalized_dim(dim, x.dim())
    if dim != _packed_at(x):
        out = _along_axis(x, dim, lambda t: aten.slice.Tensor(t, dim, start, end, step))
        return note_padding(out, x) if dim == 0 and not start else out
    length, block = x.shape[dim], x.format.block_size
    start, end = (_clamp(i, length, default) for i, default in ((start, 0), (end, length)))
    if step != 1 or start % block or end % block:
        raise ValueError(
            f"slice of {x} along axis {dim} from {start} to {end} by {step}: the axis is packed, "
            f"so start and end must be multiples of {block}, the block size of {x.format}, and "
            f"step must be 1: align them, or call .dequantize() first"
        )
    length = max(end - start, 0)
    return x.replace(**_map_bytes(lambda span, b: b.narrow(dim, start // span, length // span), x))


def _clamp(index: int | None, length: int, default: int) -> int:
    if index is None:
        return default
    return min(max(index + length if index < 0 else index, 0), length)


@_implements(aten.split_with_sizes.default)
def _split_with_sizes(x, sizes, dim=0):
    dim = _normalized_dim(dim, x.dim())
    if sum(sizes) != x.shape[dim]:
        raise ValueError(
            f"split of {x} along axis {dim} into {sizes}: the sizes must sum to {x.shape[dim]}"
        )
    ends = itertools.accumulate(sizes)
    return [_slice(x, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


@_implements(aten.split.Tensor)
def _split(x, size, dim=0):
    dim = _normalized_dim(dim, x.dim())
    if size <= 0:
        raise ValueError(f"split of {x}: split_size={size} must be positive")
    return [_slice(x, dim, i, i + size) for i in range(0, max(x.shape[dim], 1), size)]


@_implements(aten.index_select.default)
def _index_select(x, dim, index):
    dim = _normalized_dim(dim, x.dim())
    _check_not_packed("index_select", x, dim)
    return _with_own_scale(_along_axis(x, dim, lambda t: t.index_select(dim, index)))


@_implements(aten.index.Tensor)
def _index(x, indices):
    used = [i for i, index in enumerate(indices) if index is not None]
    if len(used) != 1 or indices[used[0]].dim() != 1:
        raise _refusal("indexing", x, "use one index tensor of one dimension")
    _check_not_packed("indexing", x, used[0])
    return _with_own_scale(_along_axis(x, used[0], lambda t: aten.index.Tensor(t, indices)))


# --- several into one -----------------------------------------------------------------------------


def _check_tensors(op: str, tensors: Sequence[torch.Tensor]) -> None:
    other = next((t for t in tensors if not isinstance(t, MXTensor)), None)
    if other is not None:
        raise TypeError(
            f"{op} of MXTensors and {_describe(other)}: quantize it with MXTensor.from_hp, or call "
            f".dequantize() on the MXTensors; for DistributedDataParallel, pass init_sync=False"
        )


@_implements(aten.cat.default)
def _cat(tensors, dim=0):
    _check_tensors("cat", tensors)
    first, dim = tensors[0], _normalized_dim(dim, tensors[0].dim())
    for t in tensors:
        differences = _differences(first, t)
        shapes = [(*s[:dim], *s[dim + 1 :]) for s in (first.shape, t.shape)]
        if shapes[0] != shapes[1]:
            differences.append(f"shape: {tuple(first.shape)} and {tuple(t.shape)}")
        if differences:
            raise ValueError(
                f"cat along axis {dim}: the tensors differ in {', '.join(differences)}; make them "
                f"alike, or call .dequantize() on them first"
            )
    fields = _map_bytes(lambda span, *b: torch.cat(b, dim), *tensors)
    return _with_own_scale(
        first.replace(**fields, per_tensor_scale=_cat_per_tensor_scale(tensors, dim))
    )


@_implements(aten.stack.default)
def _stack(tensors, dim=0):
    """Stack experts into one tensor; ``dim=0`` keeps each per-tensor scale as the expert's own."""
    _check_tensors("stack", tensors)
    return _cat([_unsqueeze(t, dim) for t in tensors], dim)


def _cat_per_tensor_scale(tensors: Sequence[MXTensor], dim: int) -> torch.Tensor | None:
    first, *others = scales = [t.per_tensor_scale for t in tensors]
    if all(s is None for s in scales):
        return None
    if any(s is None for s in scales):
        raise ValueError(
            f"cat along axis {dim}: some of the tensors have a per_tensor_scale and some do not; "
            f"requantize all of them with MXTensor.from_hp"
        )
    if dim == 0 and tensors[0].dim() == 3:  # experts: each keeps its own
        return torch.cat([t.per_tensor_scale.expand(t.shape[0], 1, 1) for t in tensors])
    if any(s is not first and not torch.equal(s, first) for s in others):
        raise ValueError(
            f"cat along axis {dim}: the tensors have different per_tensor_scales, and the result "
            f"has only one: use torch.stack for one scale per expert, or concatenate the "
            f".dequantize() values and quantize them with MXTensor.from_hp"
        )
    return first
