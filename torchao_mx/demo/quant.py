"""The formats on offer, and the linears that they apply to."""

from __future__ import annotations

import torch
from torch import nn
from torchao.core.config import AOBaseConfig

from torchao_mx import MXDynamicActivationMXWeightConfig as WeightAndActivation
from torchao_mx import MXWeightOnlyConfig

_FP4, _FP8 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn

#: The choices of ``--format``.
FORMATS: dict[str, AOBaseConfig] = {
    "mxfp4": WeightAndActivation(activation_dtype=_FP4, weight_dtype=_FP4),
    "mxfp8": WeightAndActivation(activation_dtype=_FP8, weight_dtype=_FP8),
    "w4a8": WeightAndActivation(activation_dtype=_FP8, weight_dtype=_FP4),
    "nvfp4": WeightAndActivation(activation_dtype=_FP4, weight_dtype=_FP4, block_size=16),
    "mxfp4-weight-only": MXWeightOnlyConfig(dtype=_FP4),
    "mxfp8-weight-only": MXWeightOnlyConfig(dtype=_FP8),
}


def is_quantized_linear(module: nn.Module, name: str) -> bool:
    """The ``filter_fn``: every linear of the blocks; embedding and head stay in high precision."""
    return isinstance(module, nn.Linear) and name.startswith("blocks.")


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor: those of the packed elements and the scales, for a quantized one."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes
