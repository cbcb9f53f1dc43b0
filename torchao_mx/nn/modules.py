"""What modules that stand in for others share: their making, and taking the other's place."""

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
    """A ``cls`` that shares everything ``module`` holds: parameters, buffers, hooks, training mode.

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
    vars(twin).pop(COMPILED_CALL, None)  # module.compile()'s, of the forward of ``module``
    return twin


def in_place_of(module: nn.Module, twin: nn.Module) -> nn.Module:
    """Turn ``module`` into its ``twin``, which is given up, and return ``module``.

    The object stays, so whatever holds it needs no replacement: its parents, wherever it stands in a model,
    or the caller who gave ``quantize_`` this module itself. Handles of its hooks keep working.

    Raises:
        TypeError: the class of ``module`` cannot be changed to that of ``twin``; ``module`` is unchanged.
    """
    if twin is module:
        return module
    check_replaceable(module)
    cls = type(twin)
    # Handles refer to the dicts of hooks, of which the twin has copies.
    kept = {name: value for name, value in vars(module).items() if belongs_to_object(name)}
    state = {name: _bound_to(module, cls, value, twin) for name, value in vars(twin).items()}
    module.__class__ = cls
    vars(module).clear()
    vars(module).update(state | kept)
    return module


def check_replaceable(module: nn.Module) -> None:
    """Raise TypeError unless :func:`in_place_of` can turn ``module`` into another; nothing is changed."""
    _check_not_sharded(module)
    # accelerate's calls the method that it hides, which _bound_to gives the new class's.
    if "forward" in vars(module) and "_hf_hook" not in vars(module):
        raise TypeError(
            f"{type(module).__name__} has a forward set on the instance, as by module.forward = "
            f"torch.compile(module.forward), which would go on to compute what it does now; set it after "
            f"quantize_, or leave this module out with filter_fn"
        )
    try:  # on an empty one; our classes are laid out as nn.Module is
        object.__new__(type(module)).__class__ = nn.Module
    except TypeError as error:
        raise TypeError(
            f"{type(module).__name__} cannot become another class ({error}), which quantize_ has to make of "
            f"it: remove its __slots__ or base class in C, or leave this module out with filter_fn"
        ) from None


def is_in_training(module: nn.Module) -> bool:
    """Whether ``module`` is one of ours that trains its weight, until ``step="convert"`` packs it."""
    return getattr(module, "is_in_training", False)


def check_not_in_training(module: nn.Module) -> None:
    """Raise TypeError for a module of which :func:`is_in_training` holds."""
    if is_in_training(module):
        raise TypeError(
            f"{module} is being trained; convert it first, with step='convert' of the config that prepared "
            f"it, or leave it out with filter_fn"
        )


def _check_not_sharded(module: nn.Module) -> None:
    """FSDP2 would go on to gather into ``module`` and not into its twin."""
    if is_under_fsdp(module):
        raise TypeError(
            f"{type(module).__name__} is sharded by FSDP2; call quantize_ before fully_shard, or load the "
            f"whole state (torch.distributed.checkpoint.state_dict, full_state_dict=True) into a model that "
            f"is not sharded, and quantize or convert that"
        )


def _bound_to(module: nn.Module, cls: type[nn.Module], value: Any, source: nn.Module) -> Any:
    """``value`` of the state of ``source``; what is bound to ``source`` is bound to ``module``, a ``cls``."""
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
    """What to say of the weights of modules to be packed that other modules of ``model`` have too."""
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
            ties.append(_tie(model, list(names), apart))
    return ties


def _tie(model: nn.Module, names: list[str], apart: list[str]) -> str:
    layers = " and ".join(name.rpartition(".")[0] for name in apart)
    text = (
        f"{' and '.join(names)} are one parameter, which packing {layers} unties; to keep them tied, leave "
        f"{layers} out with filter_fn"
    )
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        text += (
            "; otherwise set model.config.tie_word_embeddings = False, or transformers' tie_weights() puts "
            "the high-precision weight back"
        )
    return text
