"""Layouts of packed weights in checkpoints: one module per layout, with everything :class:`Layout` lists."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn


class Layout(Protocol):
    """The interface of a layout for ``write.py``."""

    NAME: str  # for error messages

    def packed_weights(self, model: nn.Module) -> list[str]:
        """The names of the weights that a checkpoint stores packed."""

    def empty(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A packed weight on ``meta``, to compute its stored sizes."""

    def stored(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that a checkpoint stores for a parameter, packed or not."""

    def weight_problems(self, name: str, weight: torch.Tensor) -> list[str]:
        """One line per reason why a weight cannot be stored packed, or could not be loaded again."""

    def quantization_config(self, loaded: Any = None) -> dict[str, Any]:
        """The quantization_config for config.json; ``loaded`` is the one that the model was loaded with."""
