"""Find the linear layers whose role keeps them in high precision: routers, gates and output heads.

A small error in a router's logits sends a token to other experts. So a layer stays in high precision if it is

- inside a router, gate or indexer: a module whose class or name says router, gating or indexer (indexers
  choose which tokens sparse attention sees), or one called ``gate`` beside experts. A ``gate`` without
  experts, a ``gate_proj``, ``output_gate`` or ``forget_gate`` scales activations and is packed as usual;
- beside experts, under any name, with one output per expert;
- a layer with a single output, such as the gates of shared experts and the heads of reward models;
- an output head: what ``get_output_embeddings`` returns, and layers outside the base model or directly under
  the model, such as ``score`` and ``classifier``.

Nothing is run: the roles follow from the modules' places, classes and sizes.
"""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from torchao_mx.nn.experts.module import layout_of
from torchao_mx.nn.linear_checks import is_linear
from torchao_mx.nn.raw_reads import raw_reads
from torchao_mx.torch_internals import parameters_of

_CHOOSES = re.compile(r"(^|_)(router|gating|indexer)(_|$)")  # a name
_CHOOSER = re.compile(r"Router|Gating|Indexer|MoE?Gate|TopK")  # a class
_GATE = "gate"

ROUTER, ONE, HEAD = "a router or gate", "a gate or head of one output", "an output head"


def kept_linears(model: PreTrainedModel) -> dict[str, str]:
    """The role of each linear layer of ``model`` that stays in high precision, by name."""
    modules = dict(model.named_modules())
    counts = _experts_beside(modules)
    holders = {prefix for name in counts for prefix in _prefixes(name)} | counts.keys()
    output, base = model.get_output_embeddings(), model.base_model
    inside = set() if base is model else {id(module) for module in base.modules()}

    def chooses(name: str) -> bool:
        """Whether the module ``name`` is a router, gate or indexer."""
        owner, _, own = name.rpartition(".")
        if name in holders:  # it contains the experts
            return False
        kind = type(modules[name]).__name__
        return bool(
            _CHOOSES.search(own) or _CHOOSER.search(kind) or (own == _GATE and owner in holders)
        )

    def role(name: str, module: nn.Linear) -> str | None:
        owner = name.rpartition(".")[0]
        if module.out_features in counts.get(owner, ()):
            return ROUTER
        if any(chooses(prefix) for prefix in (name, *_prefixes(name)) if prefix):
            return ROUTER
        is_outside = inside and id(module) not in inside and not _is_layered(modules, name)
        if module is output or is_outside or not owner:
            return HEAD
        return ONE if module.out_features == 1 else None

    roles = {name: role(name, module) for name, module in modules.items() if is_linear(module)}
    for name, reader in raw_reads(model).items():
        if name in roles:
            roles[name] = roles[name] or f"its weight is read by {reader}, past the layer"
    return {name: found for name, found in roles.items() if found is not None}


def _experts_beside(modules: dict[str, nn.Module]) -> dict[str, set[int]]:
    """The possible numbers of experts directly below each module that holds some, by its name."""
    counts: dict[str, set[int]] = {}
    for name, module in modules.items():
        owner, _, own = name.rpartition(".")
        layout = layout_of(module)
        if layout is not None:
            counts.setdefault(owner, set()).add(len(parameters_of(module)[layout.weights[0]]))
        elif own == "experts" and name:
            is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict))
            counts.setdefault(owner, set()).update([len(module)] if is_list else ())
    return counts


def _prefixes(name: str) -> list[str]:
    """The names of the modules that contain the module ``name``, including the model's own, ""."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def _is_layered(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether ``name`` is in a part of the model with layers, such as an encoder beside the base model."""
    top = modules[name.split(".")[0]]
    return any(isinstance(module, nn.ModuleList) for module in top.modules())
