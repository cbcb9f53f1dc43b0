"""How checkpoints hold packed weights: one file per layout, a module with what :class:`Layout` lists."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn


class Layout(Protocol):
    """What ``write.py`` asks of a layout."""

    NAME: str  # in errors

    def packed_weights(self, model: nn.Module) -> list[str]:
        """The names of the weights that a checkpoint holds packed."""

    def empty(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A packed weight on ``meta``, whose sizes alone are of interest."""

    def stored(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a checkpoint has for a parameter, packed or not."""

    def weight_problems(self, name: str, weight: torch.Tensor) -> list[str]:
        """A line for each reason why a weight cannot be held packed, or not loaded again."""

    def quantization_config(self, loaded: Any = None) -> dict[str, Any]:
        """What config.json says; ``loaded`` is what the config of the model said when it was loaded."""
