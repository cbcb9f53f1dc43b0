"""What this library uses of transformers beyond its documented API; no other file names any of it.

Where transformers has a public way to the same answer, that is the fallback for a release without the name.
The methods of ``HfQuantizer`` that a quantizer has to define, underscores and all, are with our quantizers.
``nn/experts/layouts.py`` knows the gates of experts, which a model's own code declares.
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
    """The tensors that are others under a second name."""
    if hasattr(model, "_tied_weights_keys"):
        return set(model._tied_weights_keys or ())  # a list in v4, a dict in v5
    first = {name for name, _ in model.named_parameters()}
    return {n for n, _ in model.named_parameters(remove_duplicate=False)} - first


def declared_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that v4 loads in, while a quantizer puts its parameters together."""
    found = getattr(model.config, "_pre_quantization_dtype", None)
    return model.dtype if found is None else found


def drop_conversions(model: PreTrainedModel, is_ours: Callable[[Any], bool]) -> None:
    """Have stock save_pretrained not undo the conversions of loading that have an operation of ours.

    Where v5 keeps them elsewhere it asks the operation for its reverse, which raises.
    """
    found = getattr(model, "_weight_conversions", None)
    if found is not None:
        model._weight_conversions = [
            conversion
            for conversion in found
            if not any(map(is_ours, getattr(conversion, "operations", ())))
        ]


def mark_initialized(module: nn.Module, but_for: str) -> None:
    """Mark ``module`` as filled if all parameters but one, to be replaced, are: 5.8 would fill a copy of it.

    A release that marks otherwise spends that time and memory; the result is the same.
    """
    module._is_hf_initialized = all(
        getattr(parameter, "_is_hf_initialized", False)
        for name, parameter in module.named_parameters(recurse=False)
        if name != but_for
    )
