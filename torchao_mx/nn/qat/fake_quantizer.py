"""Switches for fake quantization, under the names that torchao's modules use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torchao.quantization.qat.linear import enable_linear_fake_quant

from torchao_mx.formats import QuantizeSpec
from torchao_mx.nn.qat.config import MXFakeQuantizeConfig
from torchao_mx.tensor import MXTensor


@dataclass
class FakeQuantizer:
    """How an operand is fake-quantized, and whether it is now."""

    config: MXFakeQuantizeConfig
    enabled: bool = True


class FakeQuantized:
    """Base of modules in training: the schemes of their operands, each with its switch.

    Attributes:
        weight_fake_quantizer: the scheme of the weights.
        activation_fake_quantizer: the scheme of the input; None if it is never quantized (weight-only).
    """

    # A flag rather than a base class, so that other schemes need not import this file.
    is_in_training = True
    # The operands that may be quantized without the other one.
    _separable: tuple[str, ...] = ("weight", "activation")
    weight_fake_quantizer: FakeQuantizer
    activation_fake_quantizer: FakeQuantizer | None

    def _set_configs(
        self, activation: MXFakeQuantizeConfig | None, weight: MXFakeQuantizeConfig
    ) -> None:
        self.activation_fake_quantizer = None if activation is None else FakeQuantizer(activation)
        self.weight_fake_quantizer = FakeQuantizer(weight)

    @property
    def weight_config(self) -> MXFakeQuantizeConfig:
        return self.weight_fake_quantizer.config

    @property
    def activation_config(self) -> MXFakeQuantizeConfig | None:
        quantizer = self.activation_fake_quantizer
        return None if quantizer is None else quantizer.config

    def _specs(self, weight: torch.Tensor) -> tuple[QuantizeSpec | None, QuantizeSpec | None]:
        """Return the active specs of ``weight`` and of the input, None for an unquantized operand.

        Raises:
            ValueError: only one operand is quantized, and this class does not support that; or ``weight`` was
                gathered packed while its quantization is off.
        """
        w, x = self.weight_fake_quantizer, self.activation_fake_quantizer
        weight_spec = w.config.spec if w.enabled else None
        activation_spec = x.config.spec if x is not None and x.enabled else None
        if x is not None and w.enabled != x.enabled:
            on = "weight" if w.enabled else "activation"
            if on not in self._separable:
                raise ValueError(
                    f"{type(self).__name__}: fake quantization is on only for the {on}, which this module "
                    f"does not support; set the same enabled on weight_fake_quantizer and "
                    f"activation_fake_quantizer, as torchao_mx.enable_fake_quant and "
                    f"disable_fake_quant do"
                )
        if weight_spec is None and isinstance(weight, MXTensor):
            raise ValueError(
                f"{type(self).__name__}: fake quantization of the weight is off, but FSDP2 gathered it "
                f"packed; leave gather_packed out to train with it off, or switch it on"
            )
        return weight_spec, activation_spec

    @property
    def is_switched_off(self) -> bool:
        """Whether an operand with a scheme is currently not quantized."""
        quantizers = (self.weight_fake_quantizer, self.activation_fake_quantizer)
        return any(q is not None and not q.enabled for q in quantizers)

    def _switch_repr(self) -> str:
        return ", fake quantization off" if self.is_switched_off else ""


def enable_fake_quant(module: nn.Module, enabled: bool = True) -> None:
    """Switch on the fake quantization of one module, for use with ``model.apply``; ignore other modules.

    While it is off, a layer computes and trains in high precision; a linear layer equals ``nn.Linear`` bit
    for bit. torchao's ``enable_linear_fake_quant`` switches this library's and torchao's linear layers. This
    function also switches modules of experts.

    Args:
        module: one module; its children are not visited.
        enabled: False to switch it off.

    Example:
        >>> import torch
        >>> from torchao.quantization import quantize_
        >>> from torchao.quantization.qat import QATConfig
        >>> from torchao_mx import MXWeightOnlyConfig
        >>> from torchao_mx.nn.qat import disable_fake_quant, enable_fake_quant
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(64, 32)), torch.randn(2, 64)
        >>> y = model(x)
        >>> quantize_(model, QATConfig(MXWeightOnlyConfig(), step="prepare"))
        >>> _ = model.apply(disable_fake_quant)
        >>> torch.equal(model(x), y)
        True
        >>> _ = model.apply(enable_fake_quant)
    """
    if isinstance(module, FakeQuantized):
        for quantizer in (module.weight_fake_quantizer, module.activation_fake_quantizer):
            if quantizer is not None:
                quantizer.enabled = enabled
    else:
        enable_linear_fake_quant(module, enabled)


def disable_fake_quant(module: nn.Module) -> None:
    """Switch off the fake quantization of one module: :func:`enable_fake_quant` with ``enabled=False``.

    Example::

        model.apply(disable_fake_quant)  # the first steps in high precision
        ...
        model.apply(enable_fake_quant)
    """
    enable_fake_quant(module, enabled=False)
