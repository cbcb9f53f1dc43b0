"""Sums and narrow products over rows: the kernels on a GPU, the reference on the CPU."""

from __future__ import annotations

from typing import Any

import torch

from torchao_mx import reference
from torchao_mx.ops.moe import narrow


def rows_functions(x: torch.Tensor) -> Any:
    """Return the module with the functions that x's device needs: ``narrow`` on a GPU, else ``reference``."""
    return narrow if x.is_cuda else reference
