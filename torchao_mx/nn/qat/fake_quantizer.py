"""Fake quantization switched off and on, under the names that torchao's modules have for it."""

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
    """How an operand is fake-quantized, and whether it is at the moment."""

    config: MXFakeQuantizeConfig
    enabled: bool = True


class FakeQuantized:
    """What modules in training share: the schemes of their operands, each with its switch.

    Attributes:
        weight_fake_quantizer: of the weights.
        activation_fake_quantizer: of the input; None where that is never quantized (weight-only).
    """

    is_in_training = (
        True  # a flag rather than a base class, so that other schemes need not import this
    )
    _alone: tuple[str, ...] = (
        "weight",
        "activation",
    )  # which operand may be quantized without the other
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
        """(of ``weight``, of the input) as they are switched: None for what is not quantized.

        Raises:
            ValueError: one operand alone is quantized, and this class does not compute that; ``weight`` was
                gathered packed, and is not to be quantized.
        """
        w, x = self.weight_fake_quantizer, self.activation_fake_quantizer
        weight_spec = w.config.spec if w.enabled else None
        activation_spec = x.config.spec if x is not None and x.enabled else None
        if x is not None and w.enabled != x.enabled:
            on = "weight" if w.enabled else "activation"
            if on not in self._alone:
                raise ValueError(
                    f"{type(self).__name__}: fake quantization is on for the {on} alone, which this module "
                    f"does not compute; set enabled alike on weight_fake_quantizer and "
                    f"activation_fake_quantizer, as torchao_mx.enable_fake_quant and "
                    f"disable_fake_quant do"
                )
        if weight_spec is None and isinstance(weight, MXTensor):
            raise ValueError(
                f"{type(self).__name__}: fake quantization of the weight is off, and FSDP2 gathered it "
                f"packed; leave gather_packed out to train with it off, or switch it on"
            )
        return weight_spec, activation_spec

    @property
    def is_switched_off(self) -> bool:
        """Whether an operand that has a scheme is not quantized at the moment."""
        quantizers = (self.weight_fake_quantizer, self.activation_fake_quantizer)
        return any(q is not None and not q.enabled for q in quantizers)

    def _switch_repr(self) -> str:
        return ", fake quantization off" if self.is_switched_off else ""


def enable_fake_quant(module: nn.Module, enabled: bool = True) -> None:
    """Switch the fake quantization of one module on, for ``model.apply``; any other module is left alone.

    While it is off, a layer computes and trains in high precision: a linear layer what ``nn.Linear`` does,
    bit for bit. torchao's ``enable_linear_fake_quant`` switches our linear layers too; this function switches
    our modules of experts as well, and torchao's own linear layers.

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
    """Switch the fake quantization of one module off: :func:`enable_fake_quant` with ``enabled=False``.

    Example::

        model.apply(disable_fake_quant)  # the first steps in high precision
        ...
        model.apply(enable_fake_quant)
    """
    enable_fake_quant(module, enabled=False)
