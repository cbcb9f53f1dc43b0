"""What the modules that stand in for others share."""

from __future__ import annotations

from typing import Any

from torch import nn


def twin_of(cls: type[nn.Module], module: nn.Module) -> Any:
    """A ``cls`` that shares everything ``module`` holds: parameters, buffers, hooks, training mode."""
    twin = cls.__new__(cls)
    state = module.__dict__.copy()
    for name, value in state.items():
        if isinstance(value, dict):  # _parameters, _buffers, _modules and the hooks
            state[name] = value.copy()
    twin.__dict__.update(state)
    return twin
