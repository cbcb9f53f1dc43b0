"""Sums and narrow products over rows: the kernels on a GPU, the reference on the CPU."""

from __future__ import annotations

from typing import Any

import torch

from torchao_mx import reference
from torchao_mx.ops.moe import narrow


def rows_functions(x: torch.Tensor) -> Any:
    """Where ``low_rank``, ``gram``, ``sum_rows``, ``combine_backward`` and ``group_sum`` are for x's device."""
    return narrow if x.is_cuda else reference
