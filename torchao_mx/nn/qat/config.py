"""The explicit config of a fake-quantization scheme, for ``QATConfig(weight_config=...)``."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torchao.quantization.qat import FakeQuantizeConfigBase
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

from torchao_mx.formats import BlockFormat, QuantizeSpec, ScaleCalculationMode


@dataclass(frozen=True)
class MXFakeQuantizeConfig(FakeQuantizeConfigBase):
    """How to fake-quantize weights or activations in training.

    It has the fields of torchao's prototype config of this name. In addition it supports NVFP4 (4-bit
    elements, ``block_size=16``) and quantizing only the weights.

    Args:
        dtype: element type: ``torch.float4_e2m1fn_x2``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        block_size: 32 for the MX formats; 16 with 4-bit elements for NVFP4.
        scaling_mode: how an E8M0 scale follows from a block's largest magnitude.
        kernel_preference: ``AUTO`` or ``EMULATED``, which use the same path: the exact product of the
            quantized values. Training therefore computes what the converted model computes.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: no format has this dtype with this block size, or the kernel preference is unsupported.

    Example:
        >>> import torch
        >>> from torchao.quantization import quantize_
        >>> from torchao.quantization.qat import QATConfig
        >>> from torchao_mx import MXFakeQuantizeConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> quantize_(model, QATConfig(weight_config=MXFakeQuantizeConfig(), step="prepare"))
        >>> model
        Sequential(
          (0): MXFakeQuantizedLinear(in_features=64, out_features=32, bias=True, weight=mxfp4 (rceil))
        )
    """

    dtype: torch.dtype = torch.float4_e2m1fn_x2
    block_size: int = 32
    scaling_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL
    kernel_preference: KernelPreference = KernelPreference.AUTO

    def __post_init__(self) -> None:
        self.spec  # validates
        supported = (KernelPreference.AUTO, KernelPreference.EMULATED)
        if self.kernel_preference not in supported:
            raise ValueError(
                f"kernel_preference={self.kernel_preference!r} is not supported; use "
                f"KernelPreference.AUTO or KernelPreference.EMULATED"
            )

    @functools.cached_property
    def spec(self) -> QuantizeSpec:
        return QuantizeSpec(BlockFormat.from_dtype(self.dtype, self.block_size), self.scaling_mode)

    @classmethod
    def from_spec(cls, spec: QuantizeSpec | None) -> MXFakeQuantizeConfig | None:
        """Return the config that quantizes to ``spec``, or None for None."""
        if spec is None:
            return None
        return cls(spec.format.elem_dtype, spec.format.block_size, spec.scaling_mode)


def check_configs(activation: object, weight: object) -> None:
    """Raise ValueError if ``weight`` is None, TypeError if either is not an :class:`MXFakeQuantizeConfig`."""
    if weight is None:
        raise ValueError(
            "weight_config is missing; pass an MXFakeQuantizeConfig (activation_config may be None, for "
            "weight-only)"
        )
    for name, config in (("weight_config", weight), ("activation_config", activation)):
        if config is not None and not isinstance(config, MXFakeQuantizeConfig):
            raise TypeError(
                f"{name} is a {type(config).__name__}; it must be a torchao_mx.MXFakeQuantizeConfig"
            )
