"""All use of transformers beyond its documented API; no other file names any of it.

If a release lacks a name, the fallback is a public way to the same answer, where transformers has one.
Exceptions: the methods that every ``HfQuantizer`` must define, underscores and all, are with the quantizers,
and ``nn/experts/layouts.py`` reads the gates that a model's own code declares for its experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def holds_adapters_of_peft(model: PreTrainedModel) -> bool:
    """Whether ``model.add_adapter`` was called, so that save_pretrained writes adapters alone."""
    loaded = getattr(model, "_hf_peft_config_loaded", None)
    return bool(getattr(model, "peft_config", None)) if loaded is None else loaded


def tied_keys(model: PreTrainedModel) -> set[str]:
    """The second names of tied tensors."""
    if hasattr(model, "_tied_weights_keys"):
        return set(model._tied_weights_keys or ())  # a list in v4, a dict in v5
    first = {name for name, _ in model.named_parameters()}
    return {n for n, _ in model.named_parameters(remove_duplicate=False)} - first


def declared_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that v4 loads in, for a quantizer that assembles parameters."""
    found = getattr(model.config, "_pre_quantization_dtype", None)
    return model.dtype if found is None else found


def drop_conversions(model: PreTrainedModel, is_ours: Callable[[Any], bool]) -> None:
    """Keep stock save_pretrained from reversing the loading conversions for which ``is_ours`` holds.

    A release that stores conversions elsewhere asks the operation for its reverse, which raises.
    """
    found = getattr(model, "_weight_conversions", None)
    if found is not None:
        model._weight_conversions = [
            conversion
            for conversion in found
            if not any(map(is_ours, getattr(conversion, "operations", ())))
        ]


def mark_initialized(module: nn.Module, but_for: str) -> None:
    """Mark ``module`` as initialized if all its parameters are, except ``but_for``, which will be replaced.

    Otherwise 5.8 would fill a copy of that one. A release with other marks spends that time and memory; the
    result is the same.
    """
    module._is_hf_initialized = all(
        getattr(parameter, "_is_hf_initialized", False)
        for name, parameter in module.named_parameters(recurse=False)
        if name != but_for
    )
