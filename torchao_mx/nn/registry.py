"""The registry of configs: it knows all of them and imports none.

A scheme's file ends with :func:`register`, which takes the config's handler, called by torchao's
``quantize_``, and its check, which ``check_model`` runs on each layer beforehand. :func:`register_base`
defines what a config means as the ``base_config`` of torchao's ``QATConfig``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torchao
from torch import nn
from torchao.quantization import quantize_, transform_module
from torchao.quantization.transform_module import register_quantize_module_handler

from torchao_mx.formats import QuantizeSpec

SUPPORTED = "torchao 0.17 and 0.18"
# torchao's table of handlers, which it does not document; only this file names it.
_TORCHAOS: dict[type, Any] | None = getattr(transform_module, "_QUANTIZE_CONFIG_HANDLER", None)

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
_HANDLERS: dict[type, Handler] = {}
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
    _HANDLERS[config_type] = handler
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


def is_registered(config_type: type) -> bool:
    """Whether there is a scheme for configs of this type."""
    return config_type in _SCHEMES


def base_specs(config: Any) -> Specs | None:
    """Return ``(activation spec, weight spec)`` of a base config, or None if it is not registered."""
    specs = _BASES.get(type(config))
    return None if specs is None else specs(config)


def handler_of(config_type: type) -> Handler:
    """Return the ``quantize_`` handler for a type of config, ours or torchao's.

    Without torchao's table of handlers, the handler of a torchao config calls ``quantize_`` itself.
    """
    if _TORCHAOS is not None:
        return _TORCHAOS[config_type]
    return _HANDLERS.get(config_type, _by_quantize)


def torchaos_handler(config_type: type) -> Handler:
    """Return torchao's own handler for one of its configs; call before :func:`register` replaces it."""
    if _TORCHAOS is not None:
        return _TORCHAOS[config_type]

    def absent(module: nn.Module, config: Any, **kwargs: Any) -> nn.Module:
        raise NotImplementedError(
            f"torchao {torchao.__version__} has no transform_module._QUANTIZE_CONFIG_HANDLER, through which "
            f"{config} is handed on to torchao: install one that torchao_mx is tested with, {SUPPORTED}"
        )

    return absent


def _by_quantize(module: nn.Module, config: Any) -> nn.Module:
    holder = nn.ModuleList([module])
    quantize_(holder, config, filter_fn=lambda m, fqn: m is module)
    return holder[0]


def registered() -> list[str]:
    """Return the names of all configs with a scheme, in order of registration."""
    return [config_type.__name__ for config_type in _SCHEMES]
