"""The registry of configs: it knows all of them and imports none.

A scheme's file ends with :func:`register`, which takes the config's handler, called by torchao's
``quantize_``, and its check, which ``check_model`` runs on each layer beforehand. :func:`register_base`
defines what a config means as the ``base_config`` of torchao's ``QATConfig``.
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
    """The functions registered for a type of config.

    Attributes:
        check: ``(module, config)``; raises TypeError or ValueError if the handler would refuse the module,
            and changes nothing.
        claims: ``(config)``; whether the scheme handles this instance; None if it handles all of the type.
        is_in_training: ``(module)``; whether ``step="convert"`` would convert it; None if the config has
            no steps.
        changes_weight_alone: whether the layer keeps its class's forward, so that code that reads the weight
            without calling the layer still computes the right result.
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
    """Make ``quantize_`` pass modules to ``handler``, and ``check_model`` to ``check``.

    Args:
        config_type: a subclass of torchao's ``AOBaseConfig``.
        handler: ``(module, config) -> module``; changes ``module`` in place or returns another.
        check: see :class:`Scheme`, also for the other ``fields``.
    """
    _SCHEMES[config_type] = Scheme(check, **fields)
    register_quantize_module_handler(config_type)(handler)


def register_base(config_type: type, specs: Callable[[Any], Specs]) -> None:
    """Make ``QATConfig`` accept configs of this type as its base.

    Args:
        config_type: a type with a ``quantize_`` handler, ours or torchao's, which converts after training.
        specs: ``(config) -> (activation spec, weight spec)`` to train for.
    """
    _BASES[config_type] = specs


def scheme_of(config: Any) -> Scheme | None:
    """Return the scheme registered for ``config``, or None for a config of another library."""
    scheme = _SCHEMES.get(type(config))
    if scheme is None or (scheme.claims is not None and not scheme.claims(config)):
        return None
    return scheme


def base_specs(config: Any) -> Specs | None:
    """Return ``(activation spec, weight spec)`` of a base config, or None if it is not registered."""
    specs = _BASES.get(type(config))
    return None if specs is None else specs(config)


def handler_of(config_type: type) -> Handler:
    """Return the ``quantize_`` handler for a type of config, ours or torchao's."""
    return _QUANTIZE_CONFIG_HANDLER[config_type]


def registered() -> list[str]:
    """Return the names of all configs with a scheme, in order of registration."""
    return [config_type.__name__ for config_type in _SCHEMES]
