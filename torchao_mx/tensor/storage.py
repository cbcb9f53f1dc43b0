"""Wrapper tensors without memory of their own, and the torch functions that ask for memory.

A wrapper subclass keeps its bytes in its inner tensors, but torch declares a storage of the logical size at
address 0 for it. Code that bypasses the dispatcher (``share_memory_``, ``apply_``, DLPack, TorchScript's
``save``) then crashes the process or reads zeros. :func:`wrapper` declares an empty storage whose address
cannot be taken, so all such code raises. This file overrides the functions that users call: those with a
meaning for the inner tensors act on them, and the rest raise an error that says what to do.
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

_ADDRESSES = ("const_data_ptr", "data_ptr")  # const_data_ptr is new in torch 2.12

_MERGES = (
    "; for PEFT's DoRA, merge_and_unload and several adapters at once, load the model in high precision, or "
    "merge one adapter with torchao_mx.hf.save_pretrained(merge_adapters=True)"
)
_AVERAGES = (
    "; for an AveragedModel, pass multi_avg_fn=get_ema_multi_avg_fn() or get_swa_multi_avg_fn(), which leave "
    "frozen weights as they are"
)
_REPLICAS = "; for DistributedDataParallel, pass init_sync=False"
# Remedies for operators that users reach only indirectly.
_REMEDIES = {
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
    """Make a tensor of ``cls`` with this shape and no memory."""
    self = torch_internals.make_wrapper_subclass(
        cls, shape, strides=strides, storage_offset=storage_offset, dtype=dtype, device=device,
        storage_size=0,
    )  # fmt: skip
    torch_internals.forbid_address(self)
    return self


def not_implemented(func: Any, args: Any, kwargs: Any, cls: type) -> NotImplementedError:
    """Return the error for operator ``func`` on a ``cls``; it says what to do instead."""
    tensor = next(t for t in torch_internals.tree_iter((args, kwargs)) if isinstance(t, cls))
    remedy = _REMEDIES.get(func.name().removeprefix("aten::").split(".")[0], "")
    return NotImplementedError(
        f"{func} is not implemented for {tensor}: call .dequantize() on it first{remedy}"
    )


class _NoMemory:
    """The ``untyped_storage()`` of a wrapper: an identity without bytes.

    torch.compile uses it to detect aliases, and distributed checkpoints compare its size.
    """

    def __init__(self, owner: Tensor, storage: torch.UntypedStorage) -> None:
        self._owner, self.device = owner, storage.device
        vars(self).update(torch_internals.identity_of(storage))
        self.size = self.nbytes = storage.nbytes

    def resize_(self, nbytes: int) -> None:
        """Accept 0 bytes, to which torch.compile resizes copies of tensors with an empty storage."""
        if nbytes:
            raise _storage_error("resize_", self._owner)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise _storage_error(name, self._owner)


def _storage_error(name: str, x: Tensor) -> TypeError:
    # Not NotImplementedError: safetensors and Accelerate read that as an empty tensor and drop it.
    return TypeError(
        f"{name} of the storage of {x}: the bytes are in its inner tensors; call .dequantize() on it "
        f"first, or share_memory_() on the tensor itself"
    )


def answers(parts: Callable[[Any], list[Tensor]]) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return overrides by torch function for a wrapper whose bytes are in ``parts(x)``."""

    def share_memory_(x: Tensor) -> Tensor:
        for part in parts(x):
            part.share_memory_()
        return x

    def is_shared(x: Tensor) -> bool:
        return all(part.is_shared() for part in parts(x))

    def no_address(x: Tensor) -> int:
        """Return 0, by which torch and libraries recognize wrapper subclasses."""
        return 0

    def untyped_storage(x: Tensor) -> _NoMemory:
        with torch_internals.WithoutTorchFunction():
            return _NoMemory(x, x.untyped_storage())

    def storage(x: Tensor) -> None:
        raise _storage_error("typed view", x)

    def refusal(name: str) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> None:
            x = next(t for t in itertools.chain(args, kwargs.values()) if hasattr(t, "dequantize"))
            raise NotImplementedError(
                f"{name} of {x}: its values are packed; call .dequantize() on it first"
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
    """A wrapper that no operator reads: only the torch functions in ``functions`` accept it."""

    functions: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __init_subclass__(cls) -> None:
        cls.functions = answers(cls.parts)

    def parts(self) -> list[Tensor]:
        """Return the tensors that hold the bytes."""
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
