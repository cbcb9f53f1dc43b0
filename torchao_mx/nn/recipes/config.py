"""The config of the recipe: NVFP4 forward, MXFP8 backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchao.core.config import AOBaseConfig
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

from torchao_mx.formats import (
    NVFP4,
    BlockFormat,
    QuantizeSpec,
    ScaleCalculationMode,
    check_scaling_mode,
)
from torchao_mx.nn.qat.config import MXFakeQuantizeConfig

_STEPS = ("prepare", "convert")
_BACKWARD_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class NVFP4ForwardMXFP8BackwardConfig(AOBaseConfig):
    """Train linear layers and experts with NVFP4 products in forward and MXFP8 products in backward.

    ::

        Y = Q4(X) Q4(W)^T + bias    dX = Q8(dY) Q8(W)    dW = Q8(dY)^T Q8(X)    dbias = sum of dY's rows

    Each operand is quantized along the axis that its product reduces. The weights stay in high precision.
    ``step="convert"`` quantizes them to NVFP4 after training. The converted model computes the trained
    model's forward, bit for bit if emulated (see ``kernel_preference``).

    Args:
        backward_dtype: element type of X and W in backward: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        grad_dtype: element type of dY, likewise.
        scaling_mode: how an E8M0 scale follows from a block's largest magnitude.
        stochastic_rounding: round dY up or down at random, which preserves its expectation except for values
            that saturate under FLOOR and EVEN. The random numbers come from torch's generator of dY's device
            (see ``torch.manual_seed``); seed data-parallel ranks differently, as for dropout.
        kernel_preference: ``AUTO`` multiplies in NVFP4 and MXFP8 on GPUs that can (compute capability 10.0)
            and emulates elsewhere. ``EMULATED`` emulates everywhere; converted models do so too, and match
            only an emulated forward bit for bit.
        step: ``"prepare"`` before training, ``"convert"`` after it, as in torchao's ``QATConfig``. Converting
            uses only the prepared layers and ignores the other fields.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: an element type, a kernel preference or the step is unsupported.

    Example:
        >>> import torch
        >>> from torchao.quantization import quantize_
        >>> from torchao_mx import NVFP4ForwardMXFP8BackwardConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> quantize_(model, NVFP4ForwardMXFP8BackwardConfig())
        >>> x = torch.randn(5, 64)
        >>> y = model(x)
        >>> y.sum().backward()  # and so on: train
        >>> quantize_(model, NVFP4ForwardMXFP8BackwardConfig(step="convert"))
        >>> model[0].weight
        MXTensor(shape=(32, 64), nvfp4, orig_dtype=float32, activation=nvfp4, device=cpu)
        >>> torch.equal(model(x), y)
        True
    """

    backward_dtype: torch.dtype = torch.float8_e4m3fn
    grad_dtype: torch.dtype = torch.float8_e4m3fn
    scaling_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL
    stochastic_rounding: bool = False
    kernel_preference: KernelPreference = KernelPreference.AUTO
    step: str = "prepare"

    def __post_init__(self) -> None:
        for name in ("backward_dtype", "grad_dtype"):
            dtype = getattr(self, name)
            if dtype not in _BACKWARD_DTYPES:
                error = ValueError if isinstance(dtype, torch.dtype) else TypeError
                raise error(
                    f"{name}={dtype!r}; the backward pass is in MXFP8: use torch.float8_e4m3fn or "
                    f"torch.float8_e5m2"
                )
        check_scaling_mode(self.scaling_mode)
        if not isinstance(self.stochastic_rounding, bool):
            raise TypeError(f"stochastic_rounding={self.stochastic_rounding!r}; it must be a bool")
        if self.kernel_preference not in (KernelPreference.AUTO, KernelPreference.EMULATED):
            raise ValueError(
                f"kernel_preference={self.kernel_preference!r} is not supported; use "
                f"KernelPreference.AUTO or KernelPreference.EMULATED"
            )
        if self.step not in _STEPS:
            raise ValueError(f"step={self.step!r}; it must be one of {', '.join(_STEPS)}")

    @property
    def forward_spec(self) -> QuantizeSpec:
        """The spec of X and W in forward."""
        return QuantizeSpec(NVFP4)

    @property
    def backward_spec(self) -> QuantizeSpec:
        """The spec of X and W in backward."""
        return QuantizeSpec(BlockFormat.from_dtype(self.backward_dtype), self.scaling_mode)

    @property
    def grad_spec(self) -> QuantizeSpec:
        """The spec of dY."""
        return QuantizeSpec(BlockFormat.from_dtype(self.grad_dtype), self.scaling_mode)

    @property
    def forward_config(self) -> MXFakeQuantizeConfig:
        """The forward spec as a config of quantization-aware training, for activations and weights."""
        return MXFakeQuantizeConfig.from_spec(self.forward_spec)

    def __str__(self) -> str:
        rounding = ", stochastic" if self.stochastic_rounding else ""
        return f"forward={self.forward_spec}, backward={self.backward_spec}, grad={self.grad_spec}{rounding}"
