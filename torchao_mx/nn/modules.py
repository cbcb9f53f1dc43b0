"""Make a module that stands in for another, and put it in the other's place."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable
from typing import Any

from torch import nn

from torchao_mx.torch_internals import (
    COMPILED_CALL,
    belongs_to_object,
    is_under_fsdp,
    parameters_of,
)


def twin_of(cls: type[nn.Module], module: nn.Module) -> Any:
    """Make a ``cls`` that shares all state of ``module``: parameters, buffers, hooks, training mode.

    Raises:
        TypeError: FSDP2 shards ``module``.
    """
    _check_not_sharded(module)
    twin = cls.__new__(cls)
    for name, value in vars(module).items():
        if isinstance(value, (dict, set)):  # parameters, buffers, submodules and hooks
            value = value.copy()
        if isinstance(value, dict):
            value.update({key: _bound_to(twin, cls, v, module) for key, v in value.items()})
        vars(twin)[name] = _bound_to(twin, cls, value, module)
    vars(twin).pop(COMPILED_CALL, None)  # set by module.compile() for the old forward
    return twin


def in_place_of(module: nn.Module, twin: nn.Module) -> nn.Module:
    """Turn ``module`` into its ``twin`` and return ``module``; discard ``twin`` afterwards.

    The object stays the same, so all references to it remain valid: those of its parents, and that of a
    caller who passed this very module to ``quantize_``. Handles of its hooks keep working.

    Raises:
        TypeError: the class of ``module`` cannot be changed to that of ``twin``; ``module`` is unchanged.
    """
    if twin is module:
        return module
    check_replaceable(module)
    cls = type(twin)
    # Keep the dicts of hooks: handles refer to them, and the twin has only copies.
    kept = {name: value for name, value in vars(module).items() if belongs_to_object(name)}
    state = {name: _bound_to(module, cls, value, twin) for name, value in vars(twin).items()}
    module.__class__ = cls
    vars(module).clear()
    vars(module).update(state | kept)
    return module


def check_replaceable(module: nn.Module) -> None:
    """Raise TypeError unless :func:`in_place_of` can change the class of ``module``; change nothing."""
    _check_not_sharded(module)
    # accelerate's forward calls the method that it hides; _bound_to replaces that by the new class's.
    if "forward" in vars(module) and "_hf_hook" not in vars(module):
        raise TypeError(
            f"{type(module).__name__} has a forward set on the instance, as by module.forward = "
            f"torch.compile(module.forward), which would bypass quantization; set it after "
            f"quantize_, or leave this module out with filter_fn"
        )
    try:  # on an empty instance; this library's classes have the layout of nn.Module
        object.__new__(type(module)).__class__ = nn.Module
    except TypeError as error:
        raise TypeError(
            f"quantize_ must change the class of this {type(module).__name__} and cannot ({error}): remove "
            f"its __slots__ or its base class in C, or leave this module out with filter_fn"
        ) from None


def is_in_training(module: nn.Module) -> bool:
    """Return whether ``module`` trains a fake-quantized weight, until ``step="convert"`` packs it."""
    return getattr(module, "is_in_training", False)


def check_not_in_training(module: nn.Module) -> None:
    """Raise TypeError if :func:`is_in_training` holds for ``module``."""
    if is_in_training(module):
        raise TypeError(
            f"{module} is in training; convert it first, with step='convert' and the config that prepared "
            f"it, or leave it out with filter_fn"
        )


def _check_not_sharded(module: nn.Module) -> None:
    """Raise if FSDP2 shards ``module``: it would keep gathering into ``module``, not its twin."""
    if is_under_fsdp(module):
        raise TypeError(
            f"{type(module).__name__} is sharded by FSDP2; call quantize_ before fully_shard, or load the "
            f"whole state (torch.distributed.checkpoint.state_dict, full_state_dict=True) into an unsharded "
            f"model, and quantize or convert that"
        )


def _bound_to(module: nn.Module, cls: type[nn.Module], value: Any, source: nn.Module) -> Any:
    """Return ``value`` from the state of ``source``, rebound from ``source`` to ``module``, a ``cls``."""
    if isinstance(value, types.MethodType) and value.__self__ is source:
        function = value.__func__
        name = getattr(function, "__name__", "")
        if getattr(type(source), name, None) is function:
            function = getattr(cls, name, function)
        return types.MethodType(function, module)
    if isinstance(value, functools.partial) and any(arg is source for arg in value.args):
        args = (module if arg is source else arg for arg in value.args)
        bound = functools.partial(value.func, *args, **value.keywords)
        vars(bound).update(vars(value))
        return bound
    if getattr(value, "with_module", False):  # a hook of load_state_dict
        return type(value)(value.hook, module)
    return value


def ties_of(model: nn.Module, packed: Iterable[nn.Module]) -> list[str]:
    """Return a warning for each weight that a module in ``packed`` shares with another of ``model``."""
    owners: dict[int, dict[str, nn.Module]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in parameters_of(module).items():
            if parameter is not None and parameter.dim() > 1:  # biases are not packed
                name = f"{prefix}.{key}" if prefix else key
                owners.setdefault(id(parameter), {})[name] = module
    packed_ids = {id(module) for module in packed}
    ties = []
    for names in owners.values():
        apart = [name for name, module in names.items() if id(module) in packed_ids]
        if len(names) > 1 and apart:
            ties.append(_untying_warning(model, list(names), apart))
    return ties


def _untying_warning(model: nn.Module, names: list[str], apart: list[str]) -> str:
    layers = " and ".join(name.rpartition(".")[0] for name in apart)
    text = (
        f"{' and '.join(names)} are one parameter; packing {layers} unties them: to keep them tied, leave "
        f"{layers} out with filter_fn"
    )
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        text += (
            "; otherwise set model.config.tie_word_embeddings = False, because transformers' tie_weights() "
            "would put the high-precision weight back"
        )
    return text
