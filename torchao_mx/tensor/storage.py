"""Tensors without memory of their own, and what torch functions that ask for memory do with them.

A wrapper subclass keeps its bytes in the tensors inside it. Torch all the same declares a storage of the
logical size for it, at address 0. Code that goes there without the dispatcher (``share_memory_``, ``apply_``,
DLPack, TorchScript's ``save``) ends the process, or finds zeros. :func:`wrapper` declares a storage of no
bytes whose address nobody gets, so that all such code raises. The functions that users call are answered
here: by the tensors inside, where that is what they mean, and else by a refusal that says what to do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchao_mx import torch_internals

Tensor = torch.Tensor

_REFUSED = (
    torch.from_dlpack,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.__dlpack_device__,
    Tensor.apply_,
    Tensor.map2_,
    Tensor.map_,
    Tensor.numpy,
    Tensor.tolist,
)

_ADDRESSES = ("const_data_ptr", "data_ptr")  # the first from torch 2.12 on

_MERGES = (
    "; for PEFT's DoRA, merge_and_unload and several adapters at once, load the model in high precision, or "
    "merge one adapter with torchao_mx.hf.save_pretrained(merge_adapters=True)"
)
_AVERAGES = (
    "; give an AveragedModel multi_avg_fn=get_ema_multi_avg_fn() or get_swa_multi_avg_fn(), which leave "
    "frozen weights as they are"
)
_REPLICAS = "; in DistributedDataParallel, give it init_sync=False"
# What ends in an operator that users do not call themselves.
_WAYS_OUT = {
    "cat": _REPLICAS,
    "add": _MERGES,
    "add_": _MERGES,
    "sub": _AVERAGES,
    "mul": _AVERAGES,
    "lerp": _AVERAGES,
}


def wrapper(
    cls: type, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype,
    device: torch.device, storage_offset: int = 0,
) -> Any:  # fmt: skip
    """A tensor of ``cls`` that has this shape and no memory."""
    self = torch_internals.make_wrapper_subclass(
        cls, shape, strides=strides, storage_offset=storage_offset, dtype=dtype, device=device,
        storage_size=0,
    )  # fmt: skip
    torch_internals.forbid_address(self)
    return self


def not_implemented(func: Any, args: Any, kwargs: Any, cls: type) -> NotImplementedError:
    """The error of the operator ``func``, one of whose arguments is a ``cls``; it says what to do instead."""
    tensor = next(t for t in torch_internals.tree_iter((args, kwargs)) if isinstance(t, cls))
    way_out = _WAYS_OUT.get(func.name().removeprefix("aten::").split(".")[0], "")
    return NotImplementedError(
        f"{func} is not implemented for {tensor}: call .dequantize() on it first{way_out}"
    )


class _NoMemory:
    """What ``untyped_storage()`` of a wrapper is: an identity that has no bytes.

    torch.compile tells by it which tensors alias, and distributed checkpoints compare its size.
    """

    def __init__(self, owner: Tensor, storage: torch.UntypedStorage) -> None:
        self._owner, self.device = owner, storage.device
        vars(self).update(torch_internals.identity_of(storage))
        self.size = self.nbytes = storage.nbytes

    def resize_(self, nbytes: int) -> None:
        """What torch.compile does to the copies of tensors whose storage has no bytes: nothing."""
        if nbytes:
            raise _no_storage("resize_", self._owner)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise _no_storage(name, self._owner)


def _no_storage(name: str, x: Tensor) -> TypeError:
    # No NotImplementedError: safetensors and Accelerate take that for an empty tensor, and drop it.
    return TypeError(
        f"{name} of the storage of {x}: its bytes are in the tensors inside it; call .dequantize() on it "
        f"first, or share_memory_() on the tensor itself"
    )


def answers(parts: Callable[[Any], list[Tensor]]) -> dict[Callable[..., Any], Callable[..., Any]]:
    """By torch function, what it does with a wrapper whose bytes are those of ``parts(x)``."""

    def share_memory_(x: Tensor) -> Tensor:
        for part in parts(x):
            part.share_memory_()
        return x

    def is_shared(x: Tensor) -> bool:
        return all(part.is_shared() for part in parts(x))

    def no_address(x: Tensor) -> int:
        """0, by which torch and libraries know wrapper subclasses."""
        return 0

    def untyped_storage(x: Tensor) -> _NoMemory:
        with torch_internals.WithoutTorchFunction():
            return _NoMemory(x, x.untyped_storage())

    def storage(x: Tensor) -> None:
        raise _no_storage("typed view", x)

    def refusal(name: str) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> None:
            x = next(t for t in itertools.chain(args, kwargs.values()) if hasattr(t, "dequantize"))
            raise NotImplementedError(
                f"{name} of {x}, whose values are packed: call .dequantize() on it first"
            )

        return refuse

    return {
        **{function: refusal(function.__name__.lstrip("_")) for function in _REFUSED},
        **{getattr(Tensor, name): no_address for name in _ADDRESSES if hasattr(Tensor, name)},
        Tensor.is_shared: is_shared,
        Tensor.share_memory_: share_memory_,
        Tensor.storage: storage,
        Tensor.untyped_storage: untyped_storage,
    }


class Unread(Tensor):
    """A wrapper that no operator reads: torch functions in ``functions`` take it, the others are refused."""

    functions: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __init_subclass__(cls) -> None:
        cls.functions = answers(cls.parts)

    def parts(self) -> list[Tensor]:
        """The tensors that hold its bytes."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        implementation = cls.functions.get(func)
        if implementation is not None:
            return implementation(*args, **(kwargs or {}))
        with torch_internals.WithoutTorchFunction():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        raise not_implemented(func, args, kwargs, cls)

    def __deepcopy__(self, memo):
        return self.__reduce_ex__(2)
