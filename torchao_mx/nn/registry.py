"""Which configs there are: the one place that knows them all, and imports none of them.

A scheme is a file that ends with :func:`register`: what its config does to a module (the handler that
torchao's ``quantize_`` calls) and what it refuses beforehand (the check that ``check_model`` runs on each
layer). :func:`register_base` says what a config means to torchao's ``QATConfig`` as its ``base_config``.
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
_HANDLERS: dict[type, Handler] = {}
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
    _HANDLERS[config_type] = handler
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


def is_registered(config_type: type) -> bool:
    """Whether there is a scheme for configs of this type."""
    return config_type in _SCHEMES


def base_specs(config: Any) -> Specs | None:
    """``(of activations, of weights)`` of a base config; None of one that is not registered."""
    specs = _BASES.get(type(config))
    return None if specs is None else specs(config)


def handler_of(config_type: type) -> Handler:
    """What ``quantize_`` gives modules to, ours or torchao's.

    Of torchao's, where it keeps them elsewhere than we know: one that calls ``quantize_``.
    """
    if _TORCHAOS is not None:
        return _TORCHAOS[config_type]
    return _HANDLERS.get(config_type, _by_quantize)


def torchaos_handler(config_type: type) -> Handler:
    """torchao's own handler of one of its configs, to be asked before :func:`register` replaces it."""
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
    """The names of all configs with a scheme, in order of registration."""
    return [config_type.__name__ for config_type in _SCHEMES]
