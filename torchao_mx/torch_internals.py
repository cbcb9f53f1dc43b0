"""All use of torch beyond its documented API; no other file names any of it.

Each name is looked up once, here. If a release lacks a name, the fallback is a public way to the same result
(correct, but slower or less convenient). If there is none, the use raises an error that says which torch is
installed and which versions work. ``test/test_private_apis.py`` reports the names that a release lacks.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

SUPPORTED = "torch 2.11 – 2.13"


def missing(name: str, purpose: str) -> NotImplementedError:
    """The error for a missing name that has no public fallback."""
    return NotImplementedError(
        f"torch {torch.__version__} has no {name}, which {purpose}: install a version that torchao_mx is "
        f"tested with, {SUPPORTED}"
    )


def _required(owner: Any, name: str, purpose: str) -> Any:
    """``owner.name``, or a stand-in that raises when called."""
    found = getattr(owner, name, None)
    if found is not None:
        return found

    def absent(*args: Any, **kwargs: Any) -> Any:
        raise missing(name, purpose)

    return absent


# --- the dispatcher -------------------------------------------------------------------------------

# Fallback for kernels under the Autograd key: torch.library.register_autograd.
AFTER_AUTOGRAD = getattr(torch._C, "_after_autograd_keyset", None)
_functorch_is_active = getattr(torch._C, "_are_functorch_transforms_active", None)
HAS_AUTOGRAD_KERNELS = (
    AFTER_AUTOGRAD is not None
    and _functorch_is_active is not None
    and hasattr(forward_ad, "_current_level")
)

# In this context operators record no views and no graph. Fallback: no_grad, and .data of the results.
BELOW_AUTOGRAD = getattr(torch._C, "_AutoDispatchBelowADInplaceOrView", None)


def differentiates_otherwise() -> bool:
    """Whether torch.func or forward-mode differentiation is active."""
    return _functorch_is_active() or forward_ad._current_level >= 0


def argument_names(op: Any) -> list[str]:
    """The names of an operator's arguments, in order."""
    schema = getattr(op, "_schema", None)
    if schema is None:
        raise missing("OpOverload._schema", "tells the arguments of a collective")
    return [argument.name for argument in schema.arguments]


@functools.cache
def is_mutable(op: Any) -> bool:
    """Whether an operator writes to an argument. The fallback knows ``add_`` and ``add.out`` by name."""
    schema = getattr(op, "_schema", None)
    if schema is not None:
        return schema.is_mutable
    name, _, overload = op.name().partition("::")[2].partition(".")
    return (name.endswith("_") and not name.endswith("__")) or "out" in overload


try:
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:
    TorchDispatchMode = None  # calls are then not recorded

try:
    from torch.utils._python_dispatch import return_and_correct_aliasing
except ImportError:
    return_and_correct_aliasing = _required(
        None, "return_and_correct_aliasing", "ties the views of a packed weight to it"
    )


# --- trees of arguments: tuples, lists and dicts --------------------------------------------------


def _tree_iter(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Iterator[Any]:
    if isinstance(tree, (tuple, list, dict)) and not (is_leaf and is_leaf(tree)):
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _tree_iter(child, is_leaf)
    else:
        yield tree


def _tree_map(fn: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return type(tree)((key, _tree_map(fn, child)) for key, child in tree.items())
    if isinstance(tree, (tuple, list)):
        children = [_tree_map(fn, child) for child in tree]
        return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
    return fn(tree)


try:
    from torch.utils._pytree import tree_iter, tree_map
except ImportError:
    tree_iter, tree_map = _tree_iter, _tree_map


# --- tensors --------------------------------------------------------------------------------------

make_wrapper_subclass = _required(
    Tensor, "_make_wrapper_subclass", "makes a tensor without its own memory"
)
# Without it, reading such a tensor's address below Python gives 0 instead of an error.
forbid_address = getattr(torch._C, "_set_throw_on_mutable_data_ptr", lambda tensor: None)
WithoutTorchFunction = _required(
    torch._C, "DisableTorchFunctionSubclass", "calls torch's own function for a packed weight"
)


def _plain_torch_function(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    with WithoutTorchFunction():
        return func(*args, **(kwargs or {}))


# The ``__torch_function__`` of a class that overrides only operators.
no_torch_function = getattr(
    torch._C, "_disabled_torch_function_impl", staticmethod(_plain_torch_function)
)


def view_base(x: Tensor) -> Tensor | None:
    """The tensor that ``x`` is a view of; None if it is not a view."""
    if not hasattr(Tensor, "_base"):
        raise missing("Tensor._base", "tells which tensor a shard is cut from")
    return x._base


def identity_of(storage: torch.UntypedStorage) -> dict[str, Any]:
    """The attributes by which torch.compile recognizes that two tensors share a storage."""
    names = ("_cdata", "_weak_ref")
    return {name: getattr(storage, name) for name in names if hasattr(storage, name)}


def _rebuild_wrapper(cls: type, dtype: Any, size: Any, strides: Any, offset: Any, layout: Any,
                     device: Any, requires_grad: bool) -> Tensor:  # fmt: skip
    return make_wrapper_subclass(
        cls, size, strides=strides, storage_offset=offset, layout=layout, dtype=dtype, device=device,
        requires_grad=requires_grad,
    )  # fmt: skip


def _rebuild(make: Callable[..., Tensor], cls: type, args: tuple[Any, ...], state: Any) -> Tensor:
    tensor = make(*args)
    tensor.__setstate__(state)
    return tensor


# Pickles of wrapper subclasses call ``rebuild(rebuild_wrapper, cls, arguments, state)``.
rebuild_wrapper = getattr(torch._utils, "_rebuild_wrapper_subclass", _rebuild_wrapper)
rebuild = getattr(torch._tensor, "_rebuild_from_type_v2", _rebuild)
torch.serialization.add_safe_globals([_rebuild, _rebuild_wrapper])


# --- operators ------------------------------------------------------------------------------------

grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
# Both names are in use: transformers calls the older one.
GROUPED_MMS = [grouped_mm, *([torch._grouped_mm] if hasattr(torch, "_grouped_mm") else [])]


def scaled_mm(
    x8: Tensor, w8: Tensor, x_scale: Tensor, w_scale: Tensor, *, use_fast_accum: bool,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """bf16 ``[M, N]`` of e4m3 ``x8 [M, K]`` and ``w8 [K, N]``, with scales ``[M, 1]`` and ``[1, N]``."""
    if _scaled_mm is not None:
        return _scaled_mm(
            x8, w8, x_scale, w_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=use_fast_accum
        )  # fmt: skip
    rows = F.ScalingType.RowWise
    return F.scaled_mm(
        x8, w8, x_scale, rows, w_scale, rows, bias=bias, output_dtype=torch.bfloat16,
        use_fast_accum=use_fast_accum,
    )  # fmt: skip


def scaled_grouped_mm(
    x8: Tensor, w8: Tensor, x_scale: Tensor, w_scale: Tensor, offs: Tensor, *, use_fast_accum: bool
) -> Tensor:
    """bf16 ``[R, N]`` of e4m3 ``x8 [R, K]`` and ``w8 [E, K, N]``, with scales ``[R]`` and ``[E, N]``."""
    if _scaled_grouped_mm is not None:
        return _scaled_grouped_mm(
            x8, w8, x_scale, w_scale, offs=offs, out_dtype=torch.bfloat16, use_fast_accum=use_fast_accum
        )  # fmt: skip
    rows = F.ScalingType.RowWise
    return F.scaled_grouped_mm(
        x8, w8, x_scale, rows, w_scale, rows, offs=offs, output_dtype=torch.bfloat16,
        use_fast_accum=use_fast_accum,
    )  # fmt: skip


# Preferred to the public functions, which take a list of recipes and cost the host more per call.
_scaled_mm = getattr(torch, "_scaled_mm", None)
_scaled_grouped_mm = getattr(torch, "_scaled_grouped_mm", None)


def operators(name: str, overloads: str = "default") -> list[Any]:
    """The overloads of the operator ``name`` ("aten::add") that this torch has.

    A missing operator needs no implementation: this torch never calls it on a packed weight.
    """
    namespace, _, operator = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), operator, None)
    found = (getattr(packet, overload, None) for overload in overloads.split())
    return [overload for overload in found if overload is not None]


TO_COPY = operators("aten::_to_copy")
PIN_MEMORY = operators("aten::_pin_memory")
UNSAFE_VIEW = operators("aten::_unsafe_view")
LERP_LISTS = operators("aten::_foreach_lerp_", "Scalar List ScalarList")
ATEN_GROUPED_MM = operators("aten::_grouped_mm")
WAIT_TENSOR = operators("_c10d_functional::wait_tensor")
# In newer torch it wraps a result that is waited for on first use.
WRAP_TENSOR = operators("_c10d_functional::_wrap_tensor_autograd")
ALL_GATHER = operators("_c10d_functional::all_gather_into_tensor")


# --- modules --------------------------------------------------------------------------------------


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of ``module`` itself by name; None for one that is left out, such as a bias.

    Read only; to replace one, use ``module.register_parameter``. The fallback omits entries that are None.
    """
    own = getattr(module, "_parameters", None)
    if own is None:
        return dict(module.named_parameters(recurse=False, remove_duplicate=False))
    return own


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The direct children of ``module`` by name, read only. The fallback gives a shared child only once."""
    own = getattr(module, "_modules", None)
    return dict(module.named_children()) if own is None else own


def is_under_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 shards ``module``. The fallback knows only modules passed to ``fully_shard``."""
    if getattr(module, "_is_fsdp_managed_module", False):
        return True
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, getattr(fsdp, "FSDPModule", ()))


# Where module.compile() stores the compiled forward on a module.
COMPILED_CALL = "_compiled_call_impl"


def belongs_to_object(attribute: str) -> bool:
    """Whether ``attribute`` stays with its object, since hook handles refer to it, when twins are swapped."""
    return "_hooks" in attribute or attribute == COMPILED_CALL
