"""A whole model before ``quantize_`` changes it: what would be refused, left out, or come apart.

torchao's ``quantize_`` goes through a model module by module and tells a handler neither names nor what else
there is, so only a look at the model beforehand can name a layer, or say that none was selected.
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
    """torchao's ``quantize_`` after a look at the whole model: it changes all that is selected, or nothing.

    A layer that could not be quantized is refused by name before the first is changed. A warning names what
    would otherwise go unsaid: a ``filter_fn`` that selects nothing, modules with 3-D weights that no layout
    claims, weights that come untied, and in ``step="convert"`` layers that stay in training and layers that
    were never prepared.

    Args:
        model: changed in place; one linear layer or module of experts may be given itself.
        config: any config of torchao's ``quantize_``. Layers are checked for ours, ``QATConfig`` of ours
            included.
        filter_fn: ``(module, fully qualified name) -> bool``; None for linear layers, as in torchao. With an
            ``FqnToConfig``, which has names of its own and goes on to torchao as it is, None.
        device: where to move each module first; None leaves them where they are.

    Raises:
        ValueError: one line for each layer that cannot be quantized so; ``model`` is unchanged.

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
    """Refuse, before ``quantize_``, a model that it could not convert to the end.

    torchao's ``quantize_`` converts layer by layer and does not tell a handler the layer's name, so an error
    half-way leaves the layers before it converted. This looks at all of them first, changes nothing, and
    names each; :func:`torchao_mx.quantize_` does both.

    Args:
        model: what will be given to ``quantize_``.
        config: ours, LoRA's and the recipe's included, or torchao's ``QATConfig`` with one of ours, or
            torchao's ``MXDynamicActivationMXWeightConfig``, as ``base_config``, or ours as ``weight_config``.
        filter_fn: as for ``quantize_``.

    Raises:
        TypeError: a config with no scheme of ours in it.
        ValueError: one line for each layer that cannot be quantized so; or nothing would be done at all, as
            ``filter_fn`` selects nothing, or nothing to be converted is in training.

    Warns:
        UserWarning: as :func:`torchao_mx.quantize_` does, of what would be left out or untied.

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
    """The refusals of :func:`check_model` alone, for a caller that names itself what is left out."""
    plan = _Plan(model, config, is_linear if filter_fn is None else filter_fn)
    if plan.scheme is None:
        raise TypeError(
            f"{type(config).__name__} holds no scheme of torchao_mx; give one of "
            f"{', '.join(registered())}; a QATConfig of one of ours"
        )
    plan.raise_problems()
    return plan


class _Plan:
    """What ``quantize_`` would do to a model, and what there is to say of it.

    Attributes:
        scheme: what is registered for the config; None of one that is not ours.
        selected: the modules that handlers would be given, by name; of a convert step those that it converts.
        nothing: why nothing would be done; empty where something would.
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
                f"training ({_some(self.in_training)}); give the filter_fn of the prepare step"
            )
        return converted, ""

    def raise_problems(self) -> None:
        """One error that names every module that would be refused, if any."""
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
        """What would be left out, or come untied."""
        notes = []
        if self.is_convert:
            left = [n for n in self.in_training if n not in self.selected]
            if left and self.selected:
                subject = "1 layer stays" if len(left) == 1 else f"{len(left)} layers stay"
                notes.append(
                    f"{subject} in training: {_some(left)}; give the filter_fn of the prepare step to "
                    f"convert all that it prepared"
                )
            never = [n for n, m in self.given.items() if is_in_high_precision(m)]
            never = [n for n in never if n not in self.in_training]
            if never and self.selected:
                one, many = (
                    "1 layer was never prepared and stays",
                    "layers were never prepared and stay",
                )
                subject = one if len(never) == 1 else f"{len(never)} {many}"
                notes.append(f"{subject} in high precision: {_some(never)}")
        elif self.scheme is not None:
            notes.extend(f"{name}: {why}" for name, why in unclaimed_experts(self.model).items())
            notes.extend(self._read_raw())
        is_unpacked = isinstance(self.config, QATConfig) and self.config.base_config is None
        if self.scheme is not None and not (self.is_convert and is_unpacked):
            notes.extend(ties_of(self.model, self.selected.values()))
        return notes

    def _read_raw(self) -> list[str]:
        """Selected layers whose weight is read past them; packed weights multiply there too."""
        if self.scheme.changes_weight_alone:
            return []
        return [
            f"{name}: {reader} reads its weight past the layer, where neither fake quantization nor adapters "
            f"are seen; leave it out with filter_fn"
            for name, reader in raw_reads(self.model).items()
            if name in self.selected
        ]

    def filter_fn(self, given: _Filter) -> _Filter:
        """What to give torchao's ``quantize_`` rather than ``given``: what changes in place is taken once."""
        if self.scheme is None:
            return given
        todo = {id(m) for m in self.selected.values()}

        def selects(module: nn.Module, name: str) -> bool:
            if id(module) not in todo:
                return False
            if not self._is_replaced(module):
                todo.remove(id(module))  # it may stand at a second place
            return True

        return selects

    def _is_replaced(self, module: nn.Module) -> bool:
        """Whether a handler returns another module: torchao's, of its own modules in training."""
        converts = self.scheme.is_in_training
        return converts is not None and converts(module) and not is_in_training(module)


def _selected(model: nn.Module, filter_fn: _Filter) -> dict[str, nn.Module]:
    """What torchao's ``quantize_`` finds: nothing inside a module that is selected; a shared module once."""
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
        held.append(f"linear layers ({_some(linear)}): filter_fn=torchao_mx.is_linear")
    if known:
        held.append(f"modules of experts ({_some(known)}): filter_fn=torchao_mx.is_experts")
    what = "; ".join(held) or "neither linear layers nor modules of experts that are known"
    return f"filter_fn selects nothing in {type(model).__name__}, which holds {what}"


def _some(names: Any) -> str:
    """The first names, and that there are more."""
    names = [name or "the model" for name in names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
