"""The formats on offer, which linears they apply to, and what a model's weights weigh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from torchao_mx import MXDynamicActivationMXWeightConfig, MXWeightOnlyConfig

_FP4, _FP8 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn


@dataclass(frozen=True)
class Format:
    """A choice of ``--format``: what it is in a line, and the config that makes it."""

    what: str
    config: Callable[[], AOBaseConfig]


def _both(activation: torch.dtype, weight: torch.dtype, block_size: int = 32) -> AOBaseConfig:
    return MXDynamicActivationMXWeightConfig(
        activation_dtype=activation, weight_dtype=weight, block_size=block_size
    )


FORMATS = {
    "mxfp4": Format("MXFP4 weights and activations (W4A4)", lambda: _both(_FP4, _FP4)),
    "mxfp8": Format("MXFP8 weights and activations (W8A8)", lambda: _both(_FP8, _FP8)),
    "w4a8": Format("MXFP4 weights, MXFP8 activations", lambda: _both(_FP8, _FP4)),
    "nvfp4": Format("NVFP4 weights and activations (W4A4)", lambda: _both(_FP4, _FP4, 16)),
    "mxfp4-weight-only": Format("MXFP4 weights", lambda: MXWeightOnlyConfig(dtype=_FP4)),
    "mxfp8-weight-only": Format("MXFP8 weights", lambda: MXWeightOnlyConfig(dtype=_FP8)),
}


def is_quantized_linear(module: nn.Module, name: str) -> bool:
    """The ``filter_fn``: every linear of the blocks; embedding and head stay in high precision."""
    return isinstance(module, nn.Linear) and name.startswith("blocks.")


def quantize_after_training(model: nn.Module, format_name: str) -> None:
    """PTQ, in place."""
    quantize_(model, FORMATS[format_name].config(), filter_fn=is_quantized_linear)


def prepare_qat(model: nn.Module, format_name: str) -> None:
    """Put fake quantization into the linears, in place; the weights stay trainable as they are."""
    config = QATConfig(FORMATS[format_name].config(), step="prepare")
    quantize_(model, config, filter_fn=is_quantized_linear)


def convert_qat(model: nn.Module, format_name: str) -> None:
    """Turn fake-quantized linears into linears with packed weights, in place."""
    quantize_(model, QATConfig(FORMATS[format_name].config(), step="convert"))


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes a tensor holds: those of the packed elements and the scales, for a quantized one."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of all parameters, and of those of the linears that the formats apply to."""
    total = sum(stored_bytes(p) for p in model.parameters())
    linears = (m for n, m in model.named_modules() if is_quantized_linear(m, n))
    return total, sum(stored_bytes(linear.weight) for linear in linears)
