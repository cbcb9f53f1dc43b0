"""Check a whole model before ``quantize_`` changes it: report layers refused, left out or untied.

torchao's ``quantize_`` visits a model module by module and tells a handler neither the layer's name nor the
rest of the model. Only a check beforehand can name a layer, or report that no layer is selected.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchao.quantization
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig
from torchao.quantization.qat import QATConfig

from torchao_mx.nn.experts.layouts import layout_of
from torchao_mx.nn.experts.module import unclaimed_experts
from torchao_mx.nn.linear_checks import is_in_high_precision, is_linear
from torchao_mx.nn.modules import is_in_training, ties_of
from torchao_mx.nn.raw_reads import raw_reads
from torchao_mx.nn.registry import registered, scheme_of

_Filter = Callable[[nn.Module, str], bool]


def quantize_(
    model: nn.Module,
    config: AOBaseConfig,
    filter_fn: _Filter | None = None,
    device: torch.types.Device | None = None,
) -> None:
    """Run torchao's ``quantize_`` after a check of the whole model: change every selected layer, or nothing.

    The error names each layer that cannot be quantized, before any layer changes. Warnings report a
    ``filter_fn`` that selects nothing, modules with 3-D weights that no layout claims, and weights that get
    untied; with ``step="convert"`` also layers that stay in training and layers that were never prepared.

    Args:
        model: changed in place; may itself be a linear layer or a module of experts.
        config: any config of torchao's ``quantize_``. Layers are checked for configs of this library and for
            a ``QATConfig`` of one.
        filter_fn: ``(module, fully qualified name) -> bool``; None selects linear layers, as in torchao. Must
            be None for an ``FqnToConfig``, which selects by name and is passed to torchao unchecked.
        device: where to move each module first; None leaves them where they are.

    Raises:
        ValueError: one line per layer that cannot be quantized with ``config``; ``model`` is unchanged.

    Example:
        >>> import torch
        >>> from torchao_mx import MXWeightOnlyConfig, quantize_
        >>> model = torch.nn.ModuleDict({"up": torch.nn.Linear(64, 100), "down": torch.nn.Linear(100, 64)})
        >>> quantize_(model, MXWeightOnlyConfig())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: 1 of 2 layers cannot be quantized:
        down: Linear(in_features=100, out_features=64): its weight has shape (64, 100); ...
        >>> quantize_(model, MXWeightOnlyConfig(), filter_fn=lambda module, name: name == "up")
        >>> model["up"].weight
        MXTensor(shape=(100, 64), mxfp4, orig_dtype=float32, device=cpu)
    """
    if isinstance(config, FqnToConfig):
        torchao.quantization.quantize_(model, config, filter_fn=filter_fn, device=device)
        return
    selects = is_linear if filter_fn is None else filter_fn
    plan = _Plan(model, config, selects)
    plan.raise_problems()
    for text in (plan.nothing, *plan.notes()):
        if text:
            warnings.warn(text, stacklevel=2)
    torchao.quantization.quantize_(model, config, filter_fn=plan.filter_fn(selects), device=device)


def check_model(model: nn.Module, config: AOBaseConfig, filter_fn: _Filter | None = None) -> None:
    """Raise if ``quantize_`` could not convert every selected layer of ``model``; change nothing.

    torchao's ``quantize_`` converts layer by layer, so an error half-way leaves earlier layers converted, and
    the error cannot name its layer. This function checks all layers first and names each one that fails;
    :func:`torchao_mx.quantize_` does both.

    Args:
        model: the model to be passed to ``quantize_``.
        config: a config of this library, or a ``QATConfig`` with one of its configs, or with torchao's
            ``MXDynamicActivationMXWeightConfig`` as ``base_config``.
        filter_fn: as for ``quantize_``.

    Raises:
        TypeError: ``config`` contains no scheme of this library.
        ValueError: one line per layer that cannot be quantized with ``config``; or there is nothing to do,
            because ``filter_fn`` selects nothing or no layer to convert is in training.

    Warns:
        UserWarning: layers would be left out or untied, as in :func:`torchao_mx.quantize_`.

    Example:
        >>> import torch
        >>> from torchao_mx import MXWeightOnlyConfig, check_model
        >>> model = torch.nn.ModuleDict({"up": torch.nn.Linear(100, 64), "down": torch.nn.Linear(64, 64)})
        >>> check_model(model, MXWeightOnlyConfig())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: 1 of 2 layers cannot be quantized:
        up: Linear(in_features=100, out_features=64): its weight has shape (64, 100); ...
    """
    plan = check_layers(model, config, filter_fn)
    if plan.nothing:
        raise ValueError(plan.nothing)
    for text in plan.notes():
        warnings.warn(text, stacklevel=2)


def check_layers(model: nn.Module, config: AOBaseConfig, filter_fn: _Filter | None = None) -> _Plan:
    """Raise the errors of :func:`check_model`, for callers that report left-out layers themselves."""
    plan = _Plan(model, config, is_linear if filter_fn is None else filter_fn)
    if plan.scheme is None:
        raise TypeError(
            f"{type(config).__name__} contains no scheme of torchao_mx; pass one of "
            f"{', '.join(registered())}; a QATConfig needs a base_config of torchao_mx"
        )
    plan.raise_problems()
    return plan


class _Plan:
    """The changes that ``quantize_`` would make to a model, and the errors and warnings about them.

    Attributes:
        scheme: the scheme registered for the config; None for configs of other libraries.
        selected: the modules that handlers would receive, by name; in a convert step those that it converts.
        nothing: the reason why nothing would change; empty if something would.
    """

    def __init__(self, model: nn.Module, config: AOBaseConfig, filter_fn: _Filter) -> None:
        self.model, self.config = model, config
        self.scheme = scheme_of(config)
        self.is_convert = self.scheme is not None and getattr(config, "step", None) == "convert"
        self.given = _selected(model, filter_fn)
        if self.is_convert:
            self.selected, self.nothing = self._converted()
        else:
            self.selected = self.given
            self.nothing = "" if self.given else _nothing_selected(model)

    def _converted(self) -> tuple[dict[str, nn.Module], str]:
        converts = self.scheme.is_in_training
        self.in_training = {n: m for n, m in self.model.named_modules() if converts(m)}
        inside = {id(m) for given in self.given.values() for m in given.modules()}
        converted = {n: m for n, m in self.in_training.items() if id(m) in inside}
        if not self.in_training:
            return {}, (
                f"nothing to convert: no layer of {type(self.model).__name__} is in training under "
                f"{type(self.config).__name__}; quantize_ it with step='prepare' and train it first"
            )
        if not converted:
            return {}, (
                f"nothing to convert: filter_fn selects none of the {len(self.in_training)} layers in "
                f"training ({_first_names(self.in_training)}); pass the filter_fn of the prepare step"
            )
        return converted, ""

    def raise_problems(self) -> None:
        """Raise one error that names every module that a handler would refuse, if any."""
        refusals = {n: self._refusal(m) for n, m in self.selected.items()}
        problems = [f"{n or 'the model'}: {text}" for n, text in refusals.items() if text]
        if problems:
            lines = "\n".join(problems)
            raise ValueError(
                f"{len(problems)} of {len(self.selected)} layers cannot be quantized:\n{lines}"
            )

    def _refusal(self, module: nn.Module) -> str:
        try:
            if self.scheme is not None:
                self.scheme.check(module, self.config)
        except (TypeError, ValueError) as error:
            return str(error)
        return ""

    def notes(self) -> list[str]:
        """Return warnings about modules left out or weights untied."""
        notes = []
        if self.is_convert:
            left = [n for n in self.in_training if n not in self.selected]
            if left and self.selected:
                subject = "1 layer stays" if len(left) == 1 else f"{len(left)} layers stay"
                notes.append(
                    f"{subject} in training: {_first_names(left)}; pass the filter_fn of the prepare step "
                    f"to convert all layers that it prepared"
                )
            never = [n for n, m in self.given.items() if is_in_high_precision(m)]
            never = [n for n in never if n not in self.in_training]
            if never and self.selected:
                one, many = (
                    "1 layer was never prepared and stays",
                    "layers were never prepared and stay",
                )
                subject = one if len(never) == 1 else f"{len(never)} {many}"
                notes.append(f"{subject} in high precision: {_first_names(never)}")
        elif self.scheme is not None:
            notes.extend(f"{name}: {why}" for name, why in unclaimed_experts(self.model).items())
            notes.extend(self._read_raw())
        is_unpacked = isinstance(self.config, QATConfig) and self.config.base_config is None
        if self.scheme is not None and not (self.is_convert and is_unpacked):
            notes.extend(ties_of(self.model, self.selected.values()))
        return notes

    def _read_raw(self) -> list[str]:
        """Return warnings for layers whose weight is read directly; a packed weight allows that."""
        if self.scheme.changes_weight_alone:
            return []
        return [
            f"{name}: {reader} reads the weight without calling the layer, which bypasses fake quantization "
            f"and adapters; leave the layer out with filter_fn"
            for name, reader in raw_reads(self.model).items()
            if name in self.selected
        ]

    def filter_fn(self, given: _Filter) -> _Filter:
        """Return the filter for torchao's ``quantize_``; it selects a module changed in place only once."""
        if self.scheme is None:
            return given
        todo = {id(m) for m in self.selected.values()}

        def selects(module: nn.Module, name: str) -> bool:
            if id(module) not in todo:
                return False
            if not self._is_replaced(module):
                todo.remove(id(module))  # the model may hold it a second time
            return True

        return selects

    def _is_replaced(self, module: nn.Module) -> bool:
        """Return whether the handler returns a new module, as torchao's does for its modules in training."""
        converts = self.scheme.is_in_training
        return converts is not None and converts(module) and not is_in_training(module)


def _selected(model: nn.Module, filter_fn: _Filter) -> dict[str, nn.Module]:
    """Find modules as torchao's ``quantize_`` does: none inside a selected module, shared modules once."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, name: str) -> None:
        if id(module) in seen:
            return
        if filter_fn(module, name):
            seen.add(id(module))
            found[name] = module
            return
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name)

    visit(model, "")
    return found


def _nothing_selected(model: nn.Module) -> str:
    linear = [n for n, m in model.named_modules() if is_linear(m)]
    known = [n for n, m in model.named_modules() if layout_of(m) is not None]
    held = []
    if linear:
        held.append(f"linear layers ({_first_names(linear)}): filter_fn=torchao_mx.is_linear")
    if known:
        held.append(f"modules of experts ({_first_names(known)}): filter_fn=torchao_mx.is_experts")
    what = "; ".join(held) or "neither linear layers nor modules of experts of a known class"
    return f"filter_fn selects nothing in {type(model).__name__}, which holds {what}"


def _first_names(names: Any) -> str:
    """Return the first names and the number of the rest."""
    names = [name or "the model" for name in names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
