"""Which configs there are: the one place that knows them all, and imports none of them.

A scheme is a file that ends with :func:`register`: what its config does to a module (the handler that
torchao's ``quantize_`` calls) and what it refuses beforehand (the check that ``check_model`` runs on each
layer). :func:`register_base` says what a config means to torchao's ``QATConfig`` as its ``base_config``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torchao.quantization.transform_module import (
    _QUANTIZE_CONFIG_HANDLER,
    register_quantize_module_handler,
)

from torchao_mx.formats import QuantizeSpec

Handler = Callable[[nn.Module, Any], nn.Module]
Specs = tuple[QuantizeSpec | None, QuantizeSpec]


class Scheme(NamedTuple):
    """What is registered for a type of config.

    Attributes:
        check: ``(module, config)``; raises TypeError or ValueError for a module that the handler would
            refuse, and changes nothing.
        claims: ``(config)``: whether this very config is ours; None if all of its type are.
        is_in_training: ``(module)``: whether ``step="convert"`` would convert it; None of a config that has
            no steps.
        changes_weight_alone: a layer goes on computing as its class does, so that code that reads its weight
            without calling it stays right.
    """

    check: Callable[[nn.Module, Any], None]
    claims: Callable[[Any], bool] | None = None
    is_in_training: Callable[[nn.Module], bool] | None = None
    changes_weight_alone: bool = False


_SCHEMES: dict[type, Scheme] = {}
_BASES: dict[type, Callable[[Any], Specs]] = {}


def register(
    config_type: type, handler: Handler, check: Callable[..., None], **fields: Any
) -> None:
    """Have ``quantize_`` give modules to ``handler``, and ``check_model`` to ``check``.

    Args:
        config_type: a subclass of torchao's ``AOBaseConfig``.
        handler: ``(module, config) -> module``, which changes ``module`` in place or returns another.
        check: as :class:`Scheme` has it, like the other ``fields``.
    """
    _SCHEMES[config_type] = Scheme(check, **fields)
    register_quantize_module_handler(config_type)(handler)


def register_base(config_type: type, specs: Callable[[Any], Specs]) -> None:
    """Have ``QATConfig`` take configs of this type as its base.

    Args:
        config_type: one that ``quantize_`` has a handler for, ours or torchao's; it converts after training.
        specs: ``(config) -> (of activations, of weights)``: what is trained for.
    """
    _BASES[config_type] = specs


def scheme_of(config: Any) -> Scheme | None:
    """What is registered for ``config``; None of one that is not ours."""
    scheme = _SCHEMES.get(type(config))
    if scheme is None or (scheme.claims is not None and not scheme.claims(config)):
        return None
    return scheme


def base_specs(config: Any) -> Specs | None:
    """``(of activations, of weights)`` of a base config; None of one that is not registered."""
    specs = _BASES.get(type(config))
    return None if specs is None else specs(config)


def handler_of(config_type: type) -> Handler:
    """What ``quantize_`` gives modules to, ours or torchao's."""
    return _QUANTIZE_CONFIG_HANDLER[config_type]


def registered() -> list[str]:
    """The names of all configs with a scheme, in order of registration."""
    return [config_type.__name__ for config_type in _SCHEMES]
